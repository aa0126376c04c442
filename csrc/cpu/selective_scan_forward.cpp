// Forward of the selective scan on CPUs; the formulas are in parrot_kernels/reference/selective_scan.py.
#include <initializer_list>

#include "dispatch.h"
#include "scan_blocks.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

constexpr int kTile = 64;                            // steps at a time: what they need stays in the first cache
constexpr int kStates = kVectorBytes == 64 ? 8 : 4;  // states that walk a tile together, in registers

// What a tile needs, steps first.
template <typename F>
struct Tile {
    int steps;
    const F *dt, *input;  // input: dt u
    const F *B, *C;       // at step 0
    int64_t B_by, C_by;   // to the next step
    const bool* starts;   // null if no packed sequence starts in the tile
    F* y;                 // added to
};

// NB states, from `state` on, walk a tile.
template <typename F, int NB, bool B_constant, bool C_constant>
void walk(const Tile<F>& tile, const F* A2, F* state, Prefetch& prefetch, int lines) {
    constexpr int W = kLanes<F>;
    Vec<F> h[NB], a[NB];
    PARROT_UNROLL
    for (int n = 0; n < NB; ++n) h[n] = load(state + n * W), a[n] = load(A2 + n * W);
    const F *B = tile.B, *C = tile.C;
    for (int s = 0; s < tile.steps; ++s, B += tile.B_by, C += tile.C_by) {
        if (tile.starts && tile.starts[s]) {
            PARROT_UNROLL
            for (int n = 0; n < NB; ++n) h[n] = Vec<F>{};
        }
        prefetch.next(lines);
        const Vec<F> dt = load(tile.dt + s * W), input = load(tile.input + s * W);
        Vec<F> y = load(tile.y + s * W);
        PARROT_UNROLL
        for (int n = 0; n < NB; ++n) {
            h[n] = exp2(dt * a[n]) * h[n] + input * entry<F, B_constant>(B, n);
            y += h[n] * entry<F, C_constant>(C, n);
        }
        store(tile.y + s * W, y);
    }
    PARROT_UNROLL
    for (int n = 0; n < NB; ++n) store(state + n * W, h[n]);
}

template <typename F, bool B_constant, bool C_constant>
void walk_all(Tile<F> tile, const F* A2, F* state, int64_t states, Prefetch& prefetch, int lines) {
    constexpr int W = kLanes<F>;
    int64_t n = 0;
    auto advance = [&](int count) {
        n += count;
        tile.B += count * (B_constant ? W : 1), tile.C += count * (C_constant ? W : 1);
    };
    for (; n + kStates <= states; advance(kStates)) {
        walk<F, kStates, B_constant, C_constant>(tile, A2 + n * W, state + n * W, prefetch, lines);
    }
    for (; n < states; advance(1)) walk<F, 1, B_constant, C_constant>(tile, A2 + n * W, state + n * W, prefetch, lines);
}

template <typename T, typename F>
void scan_block(const SelectiveScanForward& p, const ScanShape& shape, const Rows<T, F>& B, const Rows<T, F>& C,
                int64_t b, int64_t block, F* A2, F* state) {
    constexpr int W = kLanes<F>;
    const Lanes<F> lanes(shape, block);
    const Sequence sequence(p, b);
    const int64_t N = shape.state;
    alignas(64) F raw[kTile * W], dt[kTile * W], input[kTile * W], y[kTile * W];
    bool starts[kTile];

    load_tile<F, F>(A2, p.A.ptr<const F>() + lanes.first * p.A.stride[0],
                    state_strip(p.A.stride[0], p.A.stride[1], lanes.count, N));
    for (int64_t n = 0; n < N; ++n) store(A2 + n * W, load(A2 + n * W) * kLog2e<F>);
    auto plane = [&](const TensorView& view) { return b * view.stride[0] + lanes.first * view.stride[1]; };
    if (p.initial_state)
        load_tile<F, F>(state, p.initial_state.ptr<const F>() + plane(p.initial_state),
                        state_strip(p.initial_state.stride[1], p.initial_state.stride[2], lanes.count, N));
    else
        std::memset(static_cast<void*>(state), 0, sizeof(F) * N * W);
    const Vec<F> bias = load_lanes(p.delta_bias, lanes), skip = load_lanes(p.D, lanes);
    auto keep_state = [&](int64_t chunk) {
        const TensorView& c = p.checkpoints;
        store_tile<F, F>(c.ptr<F>() + b * c.stride[0] + chunk * c.stride[1] + lanes.first * c.stride[2], state,
                         state_strip(c.stride[2], c.stride[3], lanes.count, N));
    };

    const int64_t chunk = p.checkpoints ? p.chunk_size : shape.length + 1;
    const int visits = kTile * static_cast<int>(N / kStates + 1);  // of steps, to prefetch in; roughly, never 0
    for (int64_t step = 0; step < sequence.length; step += kTile) {
        const int64_t left = sequence.length - step;
        const int steps = static_cast<int>(left < kTile ? left : kTile);
        auto strip = [&](const TensorView& view) { return sequence.strip(view, lanes.count, step, steps); };
        bool any = false;
        for (int s = 0; s < steps && sequence.ids; ++s) any |= starts[s] = sequence.starts(step + s);

        load_tile<T, F>(raw, p.delta.ptr<const T>() + plane(p.delta), strip(p.delta));
        load_tile<T, F>(y, p.u.ptr<const T>() + plane(p.u), strip(p.u));
        for (int s = 0; s < steps; ++s) {
            const Vec<F> x = load(raw + s * W) + bias, u = load(y + s * W), d = p.delta_softplus ? softplus<F>(x) : x;
            store(dt + s * W, d);
            store(input + s * W, d * u);
            store(y + s * W, skip * u);
        }

        Prefetch prefetch;
        const int64_t after = step + kTile, rest = left - kTile;
        for (const TensorView* view : {&p.delta, &p.u, &p.z, &p.out})
            if (*view && rest > 0)
                prefetch.add(view->ptr<const T>() + plane(*view),
                             sequence.strip(*view, lanes.count, after, static_cast<int>(rest < kTile ? rest : kTile)));
        for (int s = 0, stop; s < steps; s = stop) {
            const int64_t now = step + s, in_chunk = now % chunk;
            if (p.checkpoints && in_chunk == 0) keep_state(now / chunk);
            stop = chunk - in_chunk < steps - s ? s + static_cast<int>(chunk - in_chunk) : steps;
            const int64_t time = sequence.time(now), direction = p.reverse ? -1 : 1;
            const Tile<F> segment{stop - s,
                                  dt + s * W,
                                  input + s * W,
                                  B.rows(b, block, lanes.group) + time * B.stride(),
                                  C.rows(b, block, lanes.group) + time * C.stride(),
                                  direction * B.stride(),
                                  direction * C.stride(),
                                  any ? starts + s : nullptr,
                                  y + s * W};
            const int lines = prefetch.lines() / visits + 1;
            if (B.constant())
                C.constant() ? walk_all<F, true, true>(segment, A2, state, N, prefetch, lines)
                             : walk_all<F, true, false>(segment, A2, state, N, prefetch, lines);
            else
                C.constant() ? walk_all<F, false, true>(segment, A2, state, N, prefetch, lines)
                             : walk_all<F, false, false>(segment, A2, state, N, prefetch, lines);
        }

        if (p.z) {
            F* const z = raw;
            load_tile<T, F>(z, p.z.ptr<const T>() + plane(p.z), strip(p.z));
            for (int s = 0; s < steps; ++s) {
                const Vec<F> gate = load(z + s * W);
                store(y + s * W, load(y + s * W) * gate * sigmoid<F>(gate));
            }
        }
        store_tile<T, F>(p.out.ptr<T>() + plane(p.out), y, strip(p.out));
    }
    zero_times(p.out.ptr<T>() + plane(p.out), p.out.stride[1], p.out.stride[2], lanes.count, sequence.length,
               shape.length);
    for (int64_t c = (sequence.length + chunk - 1) / chunk; p.checkpoints && c < p.checkpoints.size[1]; ++c)
        keep_state(c);
    store_tile<F, F>(p.final_state.ptr<F>() + plane(p.final_state), state,
                     state_strip(p.final_state.stride[1], p.final_state.stride[2], lanes.count, N));
}

template <typename T, typename F>
void forward(const SelectiveScanForward& p) {
    const ScanShape shape = ScanShape::of<F>(p);
    for (const TensorView* view : {&p.out, &p.checkpoints}) prefer_huge_pages(*view);
    const Rows<T, F> B(p.B, shape), C(p.C, shape);
    const int64_t B_pieces = B.pieces(), C_pieces = C.pieces(), size = shape.state * kLanes<F>;
#pragma omp parallel num_threads(p.num_threads)
    {
        const FlushDenormals flush;
        const Buffer<F> A2(size), state(size);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B_pieces + C_pieces; ++i) i < B_pieces ? B.prepare(i) : C.prepare(i - B_pieces);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < shape.batch * shape.blocks; ++i)
            scan_block<T, F>(p, shape, B, C, i / shape.blocks, i % shape.blocks, A2.get(), state.get());
    }
}

}  // namespace

void selective_scan_forward(const SelectiveScanForward& params) {
    for_dtype(params.u.dtype, [&](auto element, auto real) { forward<decltype(element), decltype(real)>(params); });
}

}  // namespace PARROT_ISA
}  // namespace parrot
