// Backward of the selective scan on CPUs; the formulas are in parrot_kernels/reference/selective_scan.py.
//
// A task takes the chunks of the time axis from the last to the first and, inside a chunk, its blocks of channels one
// after the other; the states of a chunk are computed again from those at its start. So the products whose sums over
// the channels are dB and dC are summed lane by lane over the blocks of a task, and across lanes only once a chunk.
// How channels are shared out to tasks depends on their number alone: the sums never depend on threads or batch.
#include <initializer_list>

#include "dispatch.h"
#include "scan_blocks.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

constexpr int kStates = kVectorBytes == 64 ? 8 : 4;  // states that walk a chunk together
constexpr int64_t kTasksPerGroup = 16;               // at most: partial sums of dB and dC

// What the states of one block need in one chunk; arrays are [step][lane].
template <typename F>
struct Chunk {
    int steps;
    const F *dt, *input, *dy;  // input: dt u
    const F *B, *C;            // at step 0
    int64_t B_by, C_by;        // to the next step
    const bool* starts;        // null if no packed sequence starts in the chunk
    F *y, *dinput, *ddt;       // added to
    F *dB, *dC;                // added to: [step][state][lane], or [state][lane] if constant
    int64_t states;
};

// What a block of channels keeps from chunk to chunk; arrays are [state][lane].
template <typename F>
struct Channels {
    F *A2, *adjoint, *dA;  // adjoint: decay times the adjoint state of the step after
};

// NB states: forward through the chunk from `state` keeping decays and states, then back. (The chunk by value: what is
// stored through its pointers can't change it.)
template <typename F, int NB, bool B_constant, bool C_constant>
void walk(const Chunk<F> chunk, const F* state, const Channels<F> keep, F* decays, F* states, Prefetch& prefetch,
          int lines) {
    constexpr int W = kLanes<F>;
    Vec<F> A2[NB], h[NB];
    PARROT_UNROLL
    for (int n = 0; n < NB; ++n) {
        A2[n] = load(keep.A2 + n * W), h[n] = load(state + n * W);
        store(states + n * W, h[n]);
    }
    const F *B = chunk.B, *C = chunk.C;
    for (int s = 0; s < chunk.steps; ++s, B += chunk.B_by, C += chunk.C_by) {
        const Vec<F> dt = load(chunk.dt + s * W), input = load(chunk.input + s * W);
        const bool starts = chunk.starts && chunk.starts[s];
        Vec<F> y = load(chunk.y + s * W);
        prefetch.next(lines);
        F* const decay_row = decays + s * NB * W;
        F* const state_row = states + (s + 1) * NB * W;
        if (starts) {
            PARROT_UNROLL
            for (int n = 0; n < NB; ++n) h[n] = Vec<F>{};
        }
        PARROT_UNROLL
        for (int n = 0; n < NB; ++n) {
            const Vec<F> decay = exp2(dt * A2[n]);
            store(decay_row + n * W, decay);
            h[n] = decay * h[n] + input * entry<F, B_constant>(B, n);
            store(state_row + n * W, h[n]);
            y += h[n] * entry<F, C_constant>(C, n);
        }
        store(chunk.y + s * W, y);
        if (starts) clear(decay_row, NB * W);  // for the way back
    }

    Vec<F> adjoint[NB], dA[NB];
    PARROT_UNROLL
    for (int n = 0; n < NB; ++n) adjoint[n] = load(keep.adjoint + n * W), dA[n] = Vec<F>{};
    for (int s = chunk.steps - 1; s >= 0; --s) {
        B -= chunk.B_by, C -= chunk.C_by;
        const Vec<F> dt = load(chunk.dt + s * W), input = load(chunk.input + s * W), dy = load(chunk.dy + s * W);
        Vec<F> dinput = load(chunk.dinput + s * W), ddt = load(chunk.ddt + s * W);
        const F* const decay_row = decays + s * NB * W;
        const F* const state_row = states + s * NB * W;
        F* const dB = B_constant ? chunk.dB : chunk.dB + s * chunk.states * W;
        F* const dC = C_constant ? chunk.dC : chunk.dC + s * chunk.states * W;
        PARROT_UNROLL
        for (int n = 0; n < NB; ++n) {
            const Vec<F> g = dy * entry<F, C_constant>(C, n) + adjoint[n];
            store(dC + n * W, load(dC + n * W) + h[n] * dy);  // h: the state after the step
            store(dB + n * W, load(dB + n * W) + g * input);
            dinput += g * entry<F, B_constant>(B, n);
            adjoint[n] = load(decay_row + n * W) * g;
            h[n] = load(state_row + n * W);
            const Vec<F> e = adjoint[n] * h[n];
            ddt += e * A2[n];
            dA[n] += e * dt;
        }
        store(chunk.dinput + s * W, dinput);
        store(chunk.ddt + s * W, ddt);
    }
    PARROT_UNROLL
    for (int n = 0; n < NB; ++n) {
        store(keep.adjoint + n * W, adjoint[n]);
        store(keep.dA + n * W, load(keep.dA + n * W) + dA[n]);  // chunk by chunk: a running sum would lose digits
    }
}

template <typename F, bool B_constant, bool C_constant>
void walk_all(Chunk<F> chunk, const F* state, Channels<F> keep, F* decays, F* states, Prefetch& prefetch) {
    constexpr int W = kLanes<F>;
    int64_t left = chunk.states;
    if (left == 0) return;
    const int lines = prefetch.lines() / (static_cast<int>((left + kStates - 1) / kStates) * chunk.steps) + 1;
    auto advance = [&](int count) {
        left -= count;
        chunk.B += count * (B_constant ? W : 1), chunk.C += count * (C_constant ? W : 1);
        chunk.dB += count * W, chunk.dC += count * W;
        keep.A2 += count * W, keep.adjoint += count * W, keep.dA += count * W, state += count * W;
    };
    for (; left >= kStates; advance(kStates)) {
        walk<F, kStates, B_constant, C_constant>(chunk, state, keep, decays, states, prefetch, lines);
    }
    for (; left > 0; advance(1))
        walk<F, 1, B_constant, C_constant>(chunk, state, keep, decays, states, prefetch, lines);
}

// Sums over the lanes of `count` rows.
template <typename F>
void sum_rows(const F* rows, F* sums, int64_t count) {
    constexpr int W = kLanes<F>;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        Vec<F> group[W];
        for (int j = 0; j < W; ++j) group[j] = load(rows + (i + j) * W);
        store(sums + i, sum_each<F>(group));
    }
    for (; i < count; ++i) sums[i] = sum_lanes<F>(load(rows + i * W));
}

// The sums that cross blocks, batch entries or lanes, before they do.
template <typename F>
struct Partials {
    const ScanShape& shape;
    int64_t blocks_per_task, tasks_per_group, tasks;  // tasks: of one batch entry
    // By batch entry and block: [state][lane] for A and constant B and C, [lane] for D and delta_bias.
    Buffer<F> dA, dB_constant, dC_constant, dD, dbias;
    Buffer<F> dB, dC;  // by batch entry and task: [time][state]

    Partials(const ScanShape& s, bool B_constant, bool C_constant)
        : shape(s),
          blocks_per_task(at_least_one((s.blocks_per_group + kTasksPerGroup - 1) / kTasksPerGroup)),
          tasks_per_group(at_least_one((s.blocks_per_group + blocks_per_task - 1) / blocks_per_task)),
          tasks(s.groups * tasks_per_group),
          dA(matrices()),
          dB_constant(B_constant ? matrices() : 0),
          dC_constant(C_constant ? matrices() : 0),
          dD(s.batch * s.blocks * kLanes<F>),
          dbias(s.batch * s.blocks * kLanes<F>),
          dB(B_constant ? 0 : s.batch * tasks * s.length * s.state),
          dC(C_constant ? 0 : s.batch * tasks * s.length * s.state) {}

    // Without channels a task remains, which writes the zeros that dB and dC are.
    static int64_t at_least_one(int64_t count) { return count > 1 ? count : 1; }
    int64_t matrices() const { return shape.batch * shape.blocks * shape.state * kLanes<F>; }
    int64_t vector(int64_t b, int64_t block) const { return (b * shape.blocks + block) * kLanes<F>; }
    int64_t matrix(int64_t b, int64_t block) const { return vector(b, block) * shape.state; }
    int64_t rows(int64_t b, int64_t task) const { return (b * tasks + task) * shape.length * shape.state; }
};

// Memory of one thread.
template <typename F>
struct Scratch {
    Buffer<F> A2, adjoint, state;      // by block of the task; of one block
    Buffer<F> decays, states, dB, dC;  // of a chunk
    Buffer<F> delta, dt, input, dy, u, y, dinput, ddt, gate;
    Buffer<bool> starts;

    Scratch(const ScanShape& s, int64_t blocks, int64_t steps)
        : A2(blocks * s.state * W),
          adjoint(blocks * s.state * W),
          state(s.state * W),
          decays(steps * kStates * W),
          states((steps + 1) * kStates * W),
          dB(steps * s.state * W),
          dC(steps * s.state * W),
          delta(steps * W),
          dt(steps * W),
          input(steps * W),
          dy(steps * W),
          u(steps * W),
          y(steps * W),
          dinput(steps * W),
          ddt(steps * W),
          gate(steps * W),
          starts(steps) {}

    static constexpr int W = kLanes<F>;
};

template <typename T, typename F>
class Backward {
  public:
    explicit Backward(const SelectiveScanBackward& params)
        : p(params),
          shape(ScanShape::of<F>(params)),
          B(params.B, shape),
          C(params.C, shape),
          partials(shape, B.constant(), C.constant()) {}

    void run() {
        const int64_t B_pieces = B.pieces(), C_pieces = C.pieces();
        for (const TensorView* view : {&p.du, &p.ddelta, &p.dz}) prefer_huge_pages(*view);
#pragma omp parallel num_threads(p.num_threads)
        {
            const FlushDenormals flush;
            const Scratch<F> scratch(shape, partials.blocks_per_task, p.chunk_size);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < B_pieces + C_pieces; ++i) i < B_pieces ? B.prepare(i) : C.prepare(i - B_pieces);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < shape.batch * partials.tasks; ++i)
                task(i / partials.tasks, i % partials.tasks, scratch);
#pragma omp for schedule(dynamic) nowait
            for (int64_t block = 0; block < shape.blocks; ++block) sum_over_batch(block);
            sum_over_tasks(p.dB, B.constant(), partials.dB);
            sum_over_tasks(p.dC, C.constant(), partials.dC);
        }
    }

  private:
    static constexpr int W = kLanes<F>;

    void task(int64_t b, int64_t task, const Scratch<F>& scratch) const {
        const int64_t N = shape.state, size = N * W, group = task / partials.tasks_per_group;
        const int64_t in_group = task % partials.tasks_per_group * partials.blocks_per_task;
        const int64_t rest = shape.blocks_per_group - in_group;
        const int64_t first = group * shape.blocks_per_group + in_group;
        const int64_t count = rest < partials.blocks_per_task ? rest : partials.blocks_per_task;
        const Sequence sequence(p, b);

        for (int64_t i = 0; i < count; ++i) {
            const Lanes<F> lanes(shape, first + i);
            F* const A2 = scratch.A2.get() + i * size;
            load_tile<F, F>(A2, p.A.ptr<const F>() + lanes.first * p.A.stride[0],
                            state_strip(p.A.stride[0], p.A.stride[1], lanes.count, N));
            for (int64_t n = 0; n < N; ++n) store(A2 + n * W, load(A2 + n * W) * kLog2e<F>);
            load_states(p.grad_final_state, b, lanes, scratch.adjoint.get() + i * size);
            clear(partials.dA.get() + partials.matrix(b, first + i), size);
            if (B.constant()) clear(partials.dB_constant.get() + partials.matrix(b, first + i), size);
            if (C.constant()) clear(partials.dC_constant.get() + partials.matrix(b, first + i), size);
            clear(partials.dD.get() + partials.vector(b, first + i), W);
            clear(partials.dbias.get() + partials.vector(b, first + i), W);
        }
        F* const dB = partials.dB.get() + partials.rows(b, task);
        F* const dC = partials.dC.get() + partials.rows(b, task);
        for (int64_t c = (sequence.length + p.chunk_size - 1) / p.chunk_size - 1; c >= 0; --c) {
            const int64_t step = c * p.chunk_size, left = sequence.length - step;
            const int steps = static_cast<int>(left < p.chunk_size ? left : p.chunk_size);
            if (!B.constant()) clear(scratch.dB.get(), steps * size);
            if (!C.constant()) clear(scratch.dC.get(), steps * size);
            bool any = false;
            for (int s = 0; s < steps && sequence.ids; ++s) any |= scratch.starts[s] = sequence.starts(step + s);
            for (int64_t i = 0; i < count; ++i) {
                Prefetch prefetch;
                if (i + 1 < count)
                    expect(b, first + i + 1, sequence, c, step, steps, prefetch);
                else if (c > 0)
                    expect(b, first, sequence, c - 1, step - p.chunk_size, static_cast<int>(p.chunk_size), prefetch);
                chunk(b, first + i, i, sequence, c, step, steps, any, scratch, prefetch);
            }
            for (int s = 0; s < steps; ++s) {
                const int64_t row = sequence.time(step + s) * N;
                if (!B.constant()) sum_rows(scratch.dB.get() + s * size, dB + row, N);
                if (!C.constant()) sum_rows(scratch.dC.get() + s * size, dC + row, N);
            }
        }
        const int64_t padding = (shape.length - sequence.length) * N;
        if (!B.constant()) clear(dB + sequence.length * N, padding);
        if (!C.constant()) clear(dC + sequence.length * N, padding);

        for (int64_t i = 0; i < count; ++i) {
            const Lanes<F> lanes(shape, first + i);
            for (const TensorView* view : {&p.du, &p.ddelta, &p.dz})
                if (*view)
                    zero_times(view->ptr<T>() + plane(*view, b, lanes), view->stride[1], view->stride[2], lanes.count,
                               sequence.length, shape.length);
            if (p.dinitial_state) {
                const TensorView& d = p.dinitial_state;
                store_tile<F, F>(d.ptr<F>() + plane(d, b, lanes), scratch.adjoint.get() + i * size,
                                 state_strip(d.stride[1], d.stride[2], lanes.count, N));
            }
        }
    }

    // What the coming chunk of a block will touch.
    void expect(int64_t b, int64_t block, const Sequence& sequence, int64_t c, int64_t step, int steps,
                Prefetch& prefetch) const {
        const Lanes<F> lanes(shape, block);
        for (const TensorView* view : {&p.delta, &p.u, &p.z, &p.grad_out, &p.ddelta, &p.du, &p.dz})
            if (*view)
                prefetch.add(view->ptr<const T>() + plane(*view, b, lanes),
                             sequence.strip(*view, lanes.count, step, steps));
        const TensorView& kept = p.checkpoints;
        prefetch.add(kept.ptr<const F>() + b * kept.stride[0] + c * kept.stride[1] + lanes.first * kept.stride[2],
                     state_strip(kept.stride[2], kept.stride[3], lanes.count, shape.state));
    }

    // Chunk c of one block, number i of its task.
    void chunk(int64_t b, int64_t block, int64_t i, const Sequence& sequence, int64_t c, int64_t step, int steps,
               bool any_start, const Scratch<F>& scratch, Prefetch& prefetch) const {
        const Lanes<F> lanes(shape, block);
        const int64_t N = shape.state, size = N * W;
        auto load_steps = [&](const TensorView& view, F* tile) {
            load_tile<T, F>(tile, view.ptr<const T>() + plane(view, b, lanes),
                            sequence.strip(view, lanes.count, step, steps));
        };
        auto store_steps = [&](const TensorView& view, const F* tile) {
            store_tile<T, F>(view.ptr<T>() + plane(view, b, lanes), tile,
                             sequence.strip(view, lanes.count, step, steps));
        };
        const Vec<F> bias = load_lanes(p.delta_bias, lanes), skip = load_lanes(p.D, lanes);
        F *const dt = scratch.dt.get(), *const delta = scratch.delta.get(), *const u = scratch.u.get();
        F *const input = scratch.input.get(), *const y = scratch.y.get(), *const dy = scratch.dy.get();
        F* const gate = scratch.gate.get();
        load_steps(p.delta, delta);
        load_steps(p.u, u);
        if (p.grad_out)
            load_steps(p.grad_out, dy);
        else
            clear(dy, steps * W);
        if (p.z) load_steps(p.z, gate);
        for (int s = 0; s < steps * W; s += W) {  // slopes take the place of delta and z
            const Vec<F> raw = load(delta + s) + bias, x = load(u + s), dout = load(dy + s);
            Vec<F> d = raw, slope = broadcast(F(1));
            if (p.delta_softplus) d = softplus<F>(raw, slope);
            store(delta + s, slope);
            store(dt + s, d);
            store(input + s, d * x);
            store(y + s, skip * x);
            if (p.z) {
                const Vec<F> z = load(gate + s), sigma = sigmoid<F>(z);
                store(dy + s, dout * z * sigma);
                store(gate + s, dout * (sigma * (F(1) + z * (F(1) - sigma))));
            }
        }
        F *const dinput = scratch.dinput.get(), *const ddt = scratch.ddt.get();
        clear(dinput, steps * W);
        clear(ddt, steps * W);
        load_checkpoint(b, lanes, c, scratch.state.get());

        const int64_t time = sequence.time(step), direction = p.reverse ? -1 : 1;
        const Chunk<F> arrays{steps,
                              dt,
                              input,
                              dy,
                              B.rows(b, block, lanes.group) + time * B.stride(),
                              C.rows(b, block, lanes.group) + time * C.stride(),
                              direction * B.stride(),
                              direction * C.stride(),
                              any_start ? scratch.starts.get() : nullptr,
                              y,
                              dinput,
                              ddt,
                              B.constant() ? partials.dB_constant.get() + partials.matrix(b, block) : scratch.dB.get(),
                              C.constant() ? partials.dC_constant.get() + partials.matrix(b, block) : scratch.dC.get(),
                              N};
        const Channels<F> keep{scratch.A2.get() + i * size, scratch.adjoint.get() + i * size,
                               partials.dA.get() + partials.matrix(b, block)};
        const F* const state = scratch.state.get();
        F *const decays = scratch.decays.get(), *const states = scratch.states.get();
        if (B.constant())
            C.constant() ? walk_all<F, true, true>(arrays, state, keep, decays, states, prefetch)
                         : walk_all<F, true, false>(arrays, state, keep, decays, states, prefetch);
        else
            C.constant() ? walk_all<F, false, true>(arrays, state, keep, decays, states, prefetch)
                         : walk_all<F, false, false>(arrays, state, keep, decays, states, prefetch);

        F* const dD = partials.dD.get() + partials.vector(b, block);
        F* const dbias = partials.dbias.get() + partials.vector(b, block);
        Vec<F> dD_sum{}, dbias_sum{};
        constexpr F ln2 = F(0.69314718055994530942);
        for (int s = 0; s < steps * W; s += W) {  // gradients take the place of what they are the gradients of
            const Vec<F> x = load(u + s), dx = load(dinput + s);
            const Vec<F> d = (load(ddt + s) * ln2 + dx * x) * load(delta + s);
            dbias_sum += d;
            dD_sum += load(dy + s) * x;
            store(delta + s, d);
            store(u + s, dx * load(dt + s) + skip * load(dy + s));
            if (p.z) store(gate + s, load(gate + s) * load(y + s));
        }
        store(dD, load(dD) + dD_sum);
        store(dbias, load(dbias) + dbias_sum);
        store_steps(p.ddelta, delta);
        store_steps(p.du, u);
        if (p.z) store_steps(p.dz, gate);
    }

    void load_states(const TensorView& view, int64_t b, const Lanes<F>& lanes, F* tile) const {
        if (view)
            load_tile<F, F>(tile, view.ptr<const F>() + plane(view, b, lanes),
                            state_strip(view.stride[1], view.stride[2], lanes.count, shape.state));
        else
            clear(tile, shape.state * W);
    }

    void load_checkpoint(int64_t b, const Lanes<F>& lanes, int64_t c, F* tile) const {
        const TensorView& view = p.checkpoints;
        load_tile<F, F>(tile,
                        view.ptr<const F>() + b * view.stride[0] + c * view.stride[1] + lanes.first * view.stride[2],
                        state_strip(view.stride[2], view.stride[3], lanes.count, shape.state));
    }

    static int64_t plane(const TensorView& view, int64_t b, const Lanes<F>& lanes) {
        return b * view.stride[0] + lanes.first * view.stride[1];
    }

    // dA, dD, ddelta_bias and the gradients of constant B and C, of one block.
    void sum_over_batch(int64_t block) const {
        const Lanes<F> lanes(shape, block);
        auto write = [&](const TensorView& view, const Buffer<F>& from, int64_t states) {
            for (int64_t n = 0; n < states; ++n) {
                Vec<F> total{};
                for (int64_t b = 0; b < shape.batch; ++b)
                    total += load(from.get() + partials.vector(b, block) * states + n * W);
                for (int c = 0; c < lanes.count; ++c)
                    view.ptr<F>()[(lanes.first + c) * view.stride[0] + (view.ndim > 1 ? n * view.stride[1] : 0)] =
                        total[c];
            }
        };
        write(p.dA, partials.dA, shape.state);
        if (B.constant()) write(p.dB, partials.dB_constant, shape.state);
        if (C.constant()) write(p.dC, partials.dC_constant, shape.state);
        if (p.dD) write(p.dD, partials.dD, 1);
        if (p.ddelta_bias) write(p.ddelta_bias, partials.dbias, 1);
    }

    // dB or dC by step; called by all threads.
    void sum_over_tasks(const TensorView& view, bool constant, const Buffer<F>& from) const {
        if (constant) return;
        constexpr int64_t kSlice = 64;
        const int64_t groups = scan_groups(view), tasks = partials.tasks / groups, N = shape.state;
        const int64_t slices = (shape.length + kSlice - 1) / kSlice;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < shape.batch * groups * slices; ++i) {
            const int64_t b = i / slices / groups, group = i / slices % groups, start = i % slices * kSlice;
            const int64_t stop = start + kSlice < shape.length ? start + kSlice : shape.length;
            F* const total = from.get() + partials.rows(b, group * tasks);
            for (int64_t task = 1; task < tasks; ++task) {
                const F* const other = from.get() + partials.rows(b, group * tasks + task);
                for (int64_t k = start * N; k < stop * N; ++k) total[k] += other[k];
            }
            T* const to = view.ptr<T>() + b * view.stride[0] + (view.ndim == 4 ? group * view.stride[1] : 0);
            const int64_t state_stride = view.stride[view.ndim - 2], time_stride = view.stride[view.ndim - 1];
            for (int64_t n = 0; n < N; ++n)
                for (int64_t t = start; t < stop; ++t)
                    to[n * state_stride + t * time_stride] = from_real<T, F>(total[t * N + n]);
        }
    }

    const SelectiveScanBackward& p;
    const ScanShape shape;
    const Rows<T, F> B, C;
    const Partials<F> partials;
};

template <typename T, typename F>
void backward(SelectiveScanBackward p) {
    if (p.checkpoints) return Backward<T, F>(p).run();
    // No checkpoints were kept: run forward again, with nowhere else to write than scratch.
    const int64_t batch = p.u.size[0], dim = p.u.size[1], length = p.u.size[2], state = p.A.size[1];
    const int64_t chunks = (length + p.chunk_size - 1) / p.chunk_size;
    const Buffer<F> checkpoints(batch * chunks * dim * state), final_state(batch * dim * state);
    const Buffer<T> out(batch * dim * length);
    SelectiveScanForward forward;
    static_cast<SelectiveScanInputs&>(forward) = p;
    forward.z = TensorView{};
    forward.out.ndim = 3, forward.out.data = out.get(), forward.out.dtype = p.u.dtype;
    forward.out.stride[0] = dim * length, forward.out.stride[1] = length, forward.out.stride[2] = 1;
    forward.final_state.ndim = 3, forward.final_state.data = final_state.get();
    forward.final_state.stride[0] = dim * state, forward.final_state.stride[1] = state,
    forward.final_state.stride[2] = 1;
    TensorView& view = p.checkpoints;
    view.ndim = 4, view.data = checkpoints.get(), view.size[1] = chunks;
    view.stride[0] = chunks * dim * state, view.stride[1] = dim * state, view.stride[2] = state, view.stride[3] = 1;
    forward.checkpoints = view, forward.chunk_size = p.chunk_size, forward.num_threads = p.num_threads;
    selective_scan_forward(forward);
    Backward<T, F>(p).run();
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackward& params) {
    for_dtype(params.u.dtype, [&](auto element, auto real) { backward<decltype(element), decltype(real)>(params); });
}

}  // namespace PARROT_ISA
}  // namespace parrot
