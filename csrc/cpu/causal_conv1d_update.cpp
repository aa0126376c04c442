// New steps of the causal convolution after a kept history, on CPUs; formulas in
// parrot_kernels/reference/causal_conv1d_update.py. Lanes are channels, whose blocks are independent.
#include "causal_conv1d_update.h"

#include "dispatch.h"
#include "lanes.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

constexpr int64_t kShared = 4096;  // outputs from which on it pays to wake other threads

// Where the history and the new steps of one row lie in its state.
struct Ring {
    int64_t size, seen;  // seen < 0: no ring, the newest input is the last

    // Of the input `back` steps before the first new one.
    int64_t before(int64_t back) const {
        if (seen < 0) return size - back;
        const int64_t place = (seen - back) % size;
        return place < 0 ? place + size : place;
    }
};

// The state of `count` channels after the steps of x.
template <typename T, typename S, typename F>
void keep(const TensorView& view, S* state, const T* x, const TensorView& steps, const Ring& ring, int count) {
    const int64_t L = steps.size[2], by = view.stride[2];
    for (int c = 0; c < count; ++c) {
        S* const line = state + c * view.stride[1];
        const T* const input = x + c * steps.stride[1];
        auto value = [&](int64_t s) { return from_real<S, F>(to_real<F>(input[s * steps.stride[2]])); };
        if (ring.seen < 0) {
            for (int64_t j = 0; j < ring.size; ++j)
                line[j * by] = j + L < ring.size ? line[(j + L) * by] : value(j + L - ring.size);
        } else {
            for (int64_t s = L > ring.size ? L - ring.size : 0; s < L; ++s)
                line[(ring.seen + s) % ring.size * by] = value(s);
        }
    }
}

// `line`: room for the history and the steps of kLanes channels; `filter`: for the taps.
template <typename T, typename S, typename F>
void update_block(const CausalConv1dUpdate& p, int64_t b, int64_t d, int count, F* line, F* filter) {
    constexpr int W = kLanes<F>;
    const int steps = static_cast<int>(p.x.size[2]), width = static_cast<int>(p.weight.size[1]), history = width - 1;
    const Strip to{p.out.stride[1], p.out.stride[2], count, 0, steps, false};
    T* const out = p.out.ptr<T>() + b * p.out.stride[0] + d * p.out.stride[1];
    const int64_t entry = p.indices ? p.indices.ptr<const int32_t>()[b * p.indices.stride[0]] : b;
    if (entry < 0) return zero_times(out, to.channel_stride, to.time_stride, count, 0, steps);

    const Ring ring{p.state.size[2], p.seen ? p.seen.ptr<const int32_t>()[b * p.seen.stride[0]] : -1};
    S* const state = p.state.ptr<S>() + entry * p.state.stride[0] + d * p.state.stride[1];
    const T* const x = p.x.ptr<const T>() + b * p.x.stride[0] + d * p.x.stride[1];
    for (int k = 0; k < history; ++k)
        load_tile<S, F>(line + k * W, state + ring.before(history - k) * p.state.stride[2],
                        {p.state.stride[1], p.state.stride[2], count, 0, 1, false});
    load_tile<T, F>(line + history * W, x, {p.x.stride[1], p.x.stride[2], count, 0, steps, false});
    load_tile<F, F>(filter, p.weight.ptr<const F>() + d * p.weight.stride[0],
                    {p.weight.stride[0], p.weight.stride[1], count, 0, width, false});
    F bias[W] = {};
    for (int c = 0; c < count && p.bias; ++c) bias[c] = p.bias.ptr<const F>()[(d + c) * p.bias.stride[0]];

    keep<T, S, F>(p.state, state, x, p.x, ring, count);
    for (int s = 0; s < steps; ++s) {
        Vec<F> y = load(bias);
        for (int k = 0; k < width; ++k) y += load(filter + k * W) * load(line + (s + k) * W);
        store(line + s * W, p.silu ? y * sigmoid<F>(y) : y);  // the oldest input is not read again
    }
    store_tile<T, F>(out, line, to);
}

template <typename T, typename S, typename F>
void update(const CausalConv1dUpdate& p) {
    constexpr int W = kLanes<F>;
    const int64_t dim = p.x.size[1], width = p.weight.size[1], blocks = (dim + W - 1) / W;
    const int64_t tasks = p.x.size[0] * blocks, rows = p.x.size[2] + width - 1;
#pragma omp parallel num_threads(p.num_threads) if (tasks * W * p.x.size[2] >= kShared)
    {
        const FlushDenormals flush;
        const Buffer<F> line(rows * W), filter(width * W);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; ++i) {
            const int64_t d = i % blocks * W;
            const int count = static_cast<int>(dim - d < W ? dim - d : W);
            update_block<T, S, F>(p, i / blocks, d, count, line.get(), filter.get());
        }
    }
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdate& params) {
    for_dtype(params.x.dtype, [&](auto element, auto real) {
        using T = decltype(element);
        using F = decltype(real);
        if (params.state.dtype == params.x.dtype) return update<T, T, F>(params);
        params.state.dtype == DType::f64 ? update<T, double, F>(params) : update<T, F, F>(params);
    });
}

}  // namespace PARROT_ISA
}  // namespace parrot
