// The causal convolution on CPUs, forward and backward; formulas in parrot_kernels/reference/causal_conv1d.py.
//
// Lanes are channels, as in the scan. "Line": the inputs of a sequence in scan order with the W-1 of its history in
// front; row e of it is step e - (W-1), and the output at step s reads the rows s to s + W-1.
#include "dispatch.h"
#include "scan_blocks.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

constexpr int kTile = 64;  // steps at a time

// Visits the taps k = 0..W-1; WIDTH > 0 is a width known to the compiler.
template <int WIDTH, typename Body>
PARROT_INLINE void for_taps(int width, Body&& body) {
    if constexpr (WIDTH > 0) {
        PARROT_UNROLL
        for (int k = 0; k < WIDTH; ++k) body(k);
    } else {
        for (int k = 0; k < width; ++k) body(k);
    }
}

// One block of channels of one batch entry.
template <typename T, typename F>
class Line {
  public:
    static constexpr int W = kLanes<F>;

    Line(const CausalConv1dInputs& params, int64_t batch_entry, int64_t block)
        : p(params),
          b(batch_entry),
          width(static_cast<int>(p.weight.size[1])),
          first(block * W),
          channels(static_cast<int>(p.x.size[1] - first < W ? p.x.size[1] - first : W)),
          length(p.lengths ? p.lengths.ptr<const int32_t>()[b * p.lengths.stride[0]] : p.x.size[2]) {}

    int64_t plane(const TensorView& view) const { return b * view.stride[0] + first * view.stride[1]; }
    int64_t time(int64_t step) const { return p.reverse ? length - 1 - step : step; }
    Strip strip(const TensorView& view, int64_t step, int steps) const {
        return {view.stride[1], view.stride[2], channels, time(step), steps, p.reverse};
    }
    void load_steps(const TensorView& view, F* rows, int64_t step, int steps) const {
        load_tile<T, F>(rows, view.ptr<const T>() + plane(view), strip(view, step, steps));
    }
    void store_steps(const TensorView& view, const F* rows, int64_t step, int steps) const {
        store_tile<T, F>(view.ptr<T>() + plane(view), rows, strip(view, step, steps));
    }
    // Rows 0..W-2 of the line, the history, of x or of its gradient.
    Strip history(const TensorView& view, int64_t row, int rows) const {
        return {view.stride[1], view.stride[2], channels, row, rows, false};
    }
    void load_history(F* rows) const {
        if (p.initial_state)
            load_tile<T, F>(rows, p.initial_state.ptr<const T>() + plane(p.initial_state),
                            history(p.initial_state, 0, width - 1));
        else
            clear(rows, (width - 1) * W);
    }
    void load_filter(F* weight, Vec<F>& bias) const {
        load_tile<F, F>(weight, p.weight.ptr<const F>() + first * p.weight.stride[0],
                        {p.weight.stride[0], p.weight.stride[1], channels, 0, width, false});
        F values[W] = {};
        for (int c = 0; c < channels && p.bias; ++c) values[c] = p.bias.ptr<const F>()[(first + c) * p.bias.stride[0]];
        bias = load(values);
    }

    // The packed sequence that row e belongs to; the history to that of the first step.
    int32_t id(int64_t e) const {
        const int64_t step = e - (width - 1);
        return p.seq_idx
            .ptr<const int32_t>()[b * p.seq_idx.stride[0] + time(step > 0 ? step : 0) * p.seq_idx.stride[1]];
    }
    // Whether some of the rows e..e + count - 1 belong to different sequences.
    bool mixed(int64_t e, int count) const {
        for (int i = 1; p.seq_idx && i < count; ++i)
            if (id(e + i) != id(e)) return true;
        return false;
    }
    // Whether the final state drops row e.
    bool dropped(int64_t e) const { return p.seq_idx && length > 0 && id(e) != id(length + width - 2); }

    // The sum over the taps at step s, whose first row is `rows`.
    template <int WIDTH>
    PARROT_INLINE Vec<F> convolve(const F* rows, const F* weight, Vec<F> bias, int64_t s, bool check) const {
        Vec<F> total = bias;
        for_taps<WIDTH>(width, [&](int k) {
            if (!check || id(s + k) == id(s + width - 1)) total += load(weight + k * W) * load(rows + k * W);
        });
        return total;
    }

    const CausalConv1dInputs& p;
    int64_t b;
    int width;
    int64_t first;
    int channels;
    int64_t length;
};

template <typename T, typename F, int WIDTH>
void forward_block(const CausalConv1dForward& p, int64_t b, int64_t block, F* rows, F* weight) {
    constexpr int W = kLanes<F>;
    const Line<T, F> line(p, b, block);
    const int history = line.width - 1;
    Vec<F> bias;
    line.load_filter(weight, bias);
    line.load_history(rows);
    F* const out = weight + line.width * W;
    for (int64_t step = 0; step < line.length; step += kTile) {
        const int64_t left = line.length - step;
        const int steps = static_cast<int>(left < kTile ? left : kTile);
        line.load_steps(p.x, rows + history * W, step, steps);
        const bool check = line.mixed(step, steps + history);
        for (int s = 0; s < steps; ++s) {
            const Vec<F> pre = line.template convolve<WIDTH>(rows + s * W, weight, bias, step + s, check);
            store(out + s * W, p.silu ? pre * sigmoid<F>(pre) : pre);
        }
        line.store_steps(p.out, out, step, steps);
        std::memmove(rows, rows + steps * W, sizeof(F) * history * W);
    }
    zero_times(p.out.ptr<T>() + line.plane(p.out), p.out.stride[1], p.out.stride[2], line.channels, line.length,
               p.x.size[2]);
    for (int k = 0; k < history; ++k)
        if (line.dropped(line.length + k)) clear(rows + k * W, W);
    store_tile<T, F>(p.final_state.ptr<T>() + line.plane(p.final_state), rows, line.history(p.final_state, 0, history));
}

template <typename T, typename F>
void forward(const CausalConv1dForward& p) {
    const int64_t batch = p.x.size[0], blocks = (p.x.size[1] + kLanes<F> - 1) / kLanes<F>, width = p.weight.size[1];
    auto* const run = width == 2   ? forward_block<T, F, 2>
                      : width == 3 ? forward_block<T, F, 3>
                      : width == 4 ? forward_block<T, F, 4>
                                   : forward_block<T, F, 0>;
#pragma omp parallel num_threads(p.num_threads)
    {
        const FlushDenormals flush;
        const Buffer<F> rows((kTile + width) * kLanes<F>), weight((kTile + width) * kLanes<F>);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * blocks; ++i) run(p, i / blocks, i % blocks, rows.get(), weight.get());
    }
}

// `sums`: [tap][lane], then one row for the bias.
template <typename T, typename F, int WIDTH>
void backward_block(const CausalConv1dBackward& p, int64_t b, int64_t block, F* rows, F* drows, F* weight, F* sums) {
    constexpr int W = kLanes<F>;
    const Line<T, F> line(p, b, block);
    const int width = line.width, history = width - 1;
    Vec<F> bias, dbias{};
    line.load_filter(weight, bias);
    line.load_history(rows);
    clear(drows, history * W);
    clear(sums, (width + 1) * W);
    F* const dout = weight + width * W;

    // Writes the gradients of `count` rows from row e on: of the history, then of the steps.
    auto write = [&](const F* from, int64_t e, int count) {
        const int64_t before = history - e;
        const int in_history = static_cast<int>(before <= 0 ? 0 : before < count ? before : count);
        if (in_history > 0 && p.dinitial_state)
            store_tile<T, F>(p.dinitial_state.ptr<T>() + line.plane(p.dinitial_state), from,
                             line.history(p.dinitial_state, e, in_history));
        if (in_history < count)
            line.store_steps(p.dx, from + in_history * W, e + in_history - history, count - in_history);
    };

    for (int64_t step = 0; step < line.length; step += kTile) {
        const int64_t left = line.length - step;
        const int steps = static_cast<int>(left < kTile ? left : kTile);
        line.load_steps(p.x, rows + history * W, step, steps);
        if (p.grad_out)
            line.load_steps(p.grad_out, dout, step, steps);
        else
            clear(dout, steps * W);
        const bool check = line.mixed(step, steps + history);
        clear(drows + history * W, steps * W);
        for (int s = 0; s < steps; ++s) {
            Vec<F> dpre = load(dout + s * W);
            if (p.silu) {
                const Vec<F> pre = line.template convolve<WIDTH>(rows + s * W, weight, bias, step + s, check);
                const Vec<F> sigma = sigmoid<F>(pre);
                dpre = dpre * sigma * (F(1) + pre * (F(1) - sigma));
            }
            dbias += dpre;
            for_taps<WIDTH>(width, [&](int k) {
                if (check && line.id(step + s + k) != line.id(step + s + history)) return;
                store(sums + k * W, load(sums + k * W) + dpre * load(rows + (s + k) * W));
                store(drows + (s + k) * W, load(drows + (s + k) * W) + dpre * load(weight + k * W));
            });
        }
        write(drows, step, steps);  // later steps do not reach these rows
        std::memmove(rows, rows + steps * W, sizeof(F) * history * W);
        std::memmove(drows, drows + steps * W, sizeof(F) * history * W);
    }
    if (p.grad_final_state) {
        load_tile<T, F>(rows, p.grad_final_state.ptr<const T>() + line.plane(p.grad_final_state),
                        line.history(p.grad_final_state, 0, history));
        for (int k = 0; k < history; ++k)
            if (!line.dropped(line.length + k)) store(drows + k * W, load(drows + k * W) + load(rows + k * W));
    }
    write(drows, line.length, history);
    zero_times(p.dx.ptr<T>() + line.plane(p.dx), p.dx.stride[1], p.dx.stride[2], line.channels, line.length,
               p.x.size[2]);
    store(sums + width * W, dbias);
}

template <typename T, typename F>
void backward(const CausalConv1dBackward& p) {
    constexpr int W = kLanes<F>;
    const int64_t batch = p.x.size[0], dim = p.x.size[1], blocks = (dim + W - 1) / W, width = p.weight.size[1];
    auto* const run = width == 2   ? backward_block<T, F, 2>
                      : width == 3 ? backward_block<T, F, 3>
                      : width == 4 ? backward_block<T, F, 4>
                                   : backward_block<T, F, 0>;
    const int64_t size = (width + 1) * W;
    const Buffer<F> sums(batch * blocks * size);
#pragma omp parallel num_threads(p.num_threads)
    {
        const FlushDenormals flush;
        const int64_t tile = (kTile + width) * W;
        const Buffer<F> rows(tile), drows(tile), weight(tile);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * blocks; ++i)
            run(p, i / blocks, i % blocks, rows.get(), drows.get(), weight.get(), sums.get() + i * size);
#pragma omp for schedule(static)
        for (int64_t d = 0; d < dim; ++d)
            for (int64_t k = 0; k <= width; ++k) {
                F total = 0;
                for (int64_t b = 0; b < batch; ++b) total += sums[(b * blocks + d / W) * size + k * W + d % W];
                if (k < width)
                    p.dweight.ptr<F>()[d * p.dweight.stride[0] + k * p.dweight.stride[1]] = total;
                else if (p.dbias)
                    p.dbias.ptr<F>()[d * p.dbias.stride[0]] = total;
            }
    }
}

}  // namespace

void causal_conv1d_forward(const CausalConv1dForward& params) {
    for_dtype(params.x.dtype, [&](auto element, auto real) { forward<decltype(element), decltype(real)>(params); });
}

void causal_conv1d_backward(const CausalConv1dBackward& params) {
    for_dtype(params.x.dtype, [&](auto element, auto real) { backward<decltype(element), decltype(real)>(params); });
}

}  // namespace PARROT_ISA
}  // namespace parrot
