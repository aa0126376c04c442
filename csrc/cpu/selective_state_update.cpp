// One step of the selective scan on CPUs; formulas in parrot_kernels/reference/selective_state_update.py.
//
// Lanes are states, as they lie in memory; what belongs to channels (dt, x, z, out) is worked on kLanes channels at a
// time. Blocks of channels are independent, so threads and batch-mates change no bit.
#include "selective_state_update.h"

#include "dispatch.h"
#include "lanes.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

constexpr int64_t kShared = 8192;  // states from which on it pays to wake other threads

template <typename T>
T* at(const TensorView& view, int64_t i, int64_t j = 0, int64_t k = 0) {
    return view.ptr<T>() + i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
}

// `count` elements that lie `stride` apart.
template <typename T, typename F>
PARROT_INLINE Vec<F> load_line(const T* p, int64_t stride, int count) {
    if (stride == 1) return load_some<T, F>(p, count);
    T gathered[kLanes<F>] = {};
    for (int i = 0; i < count; ++i) gathered[i] = p[i * stride];
    return load_as<T, F>(gathered);
}
template <typename T, typename F>
PARROT_INLINE void store_line(T* p, int64_t stride, Vec<F> v, int count) {
    if (stride == 1) return store_some<T, F>(p, v, count);
    T scattered[kLanes<F>];
    store_as<T, F>(scattered, v);
    for (int i = 0; i < count; ++i) p[i * stride] = scattered[i];
}

// B or C of one row of the batch and one channel.
template <typename T>
PARROT_INLINE const T* matrix_row(const TensorView& m, int64_t b, int64_t d, int64_t dim) {
    return m.ndim == 2 ? at<const T>(m, b) : at<const T>(m, b, d / (dim / m.size[1]));
}

// Channels d .. d + count - 1 of row b; T: inputs, S: states.
template <typename T, typename S, typename F>
void update_block(const SelectiveStateUpdate& p, int64_t b, int64_t d, int count) {
    constexpr int W = kLanes<F>;
    const int64_t dim = p.x.size[1], N = p.A.size[1], B_by = p.B.stride[p.B.ndim - 1], C_by = p.C.stride[p.C.ndim - 1];
    T* const out = at<T>(p.out, b, d);
    const int64_t entry = p.indices ? at<const int32_t>(p.indices, b)[0] : b;
    if (entry < 0) return store_line<T, F>(out, p.out.stride[1], Vec<F>{}, count);

    const Vec<F> x = load_line<T, F>(at<const T>(p.x, b, d), p.x.stride[1], count);
    Vec<F> dt = load_line<T, F>(at<const T>(p.dt, b, d), p.dt.stride[1], count);
    if (p.dt_bias) dt += load_line<F, F>(at<const F>(p.dt_bias, d), p.dt_bias.stride[0], count);
    if (p.dt_softplus) dt = softplus<F>(dt);

    Vec<F> sums[W];
    for (int c = 0; c < W; ++c) {
        sums[c] = Vec<F>{};
        if (c >= count) continue;
        const F *A = at<const F>(p.A, d + c), rate = dt[c] * kLog2e<F>, input = dt[c] * x[c];
        S* const state = at<S>(p.state, entry, d + c);
        const T* const B = matrix_row<T>(p.B, b, d + c, dim);
        const T* const C = matrix_row<T>(p.C, b, d + c, dim);
        for (int64_t n = 0; n < N; n += W) {
            const int states = static_cast<int>(N - n < W ? N - n : W);
            S* const h = state + n * p.state.stride[2];
            const Vec<F> decay = exp2(rate * load_line<F, F>(A + n * p.A.stride[1], p.A.stride[1], states));
            const Vec<F> next = decay * load_line<S, F>(h, p.state.stride[2], states) +
                                input * load_line<T, F>(B + n * B_by, B_by, states);
            store_line<S, F>(h, p.state.stride[2], next, states);
            sums[c] += next * load_line<T, F>(C + n * C_by, C_by, states);
        }
    }
    Vec<F> y = sum_each<F>(sums);
    if (p.D) y += load_line<F, F>(at<const F>(p.D, d), p.D.stride[0], count) * x;
    if (p.z) {
        const Vec<F> gate = load_line<T, F>(at<const T>(p.z, b, d), p.z.stride[1], count);
        y *= gate * sigmoid<F>(gate);
    }
    store_line<T, F>(out, p.out.stride[1], y, count);
}

template <typename T, typename S, typename F>
void update(const SelectiveStateUpdate& p) {
    constexpr int W = kLanes<F>;
    const int64_t dim = p.x.size[1], blocks = (dim + W - 1) / W, tasks = p.x.size[0] * blocks;
#pragma omp parallel for num_threads(p.num_threads) schedule(static) if (tasks * W * p.A.size[1] >= kShared)
    for (int64_t i = 0; i < tasks; ++i) {
        const FlushDenormals flush;
        const int64_t d = i % blocks * W;
        update_block<T, S, F>(p, i / blocks, d, static_cast<int>(dim - d < W ? dim - d : W));
    }
}

}  // namespace

void selective_state_update(const SelectiveStateUpdate& params) {
    for_dtype(params.x.dtype, [&](auto element, auto real) {
        using T = decltype(element);
        using F = decltype(real);
        if (params.state.dtype == params.x.dtype) return update<T, T, F>(params);
        params.state.dtype == DType::f64 ? update<T, double, F>(params) : update<T, F, F>(params);
    });
}

}  // namespace PARROT_ISA
}  // namespace parrot
