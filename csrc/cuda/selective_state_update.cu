// One step of the selective scan on GPUs; formulas in parrot_kernels/reference/selective_state_update.py.
//
// kLanes threads share a channel and take its states in turn, so that a warp reads whole lines of the state; their sums
// meet by shuffles in a fixed order. Channels are independent: batch-mates change no bit.
#include "selective_state_update.h"

#include "common.cuh"

namespace parrot {
namespace cuda {
namespace {

constexpr int kLanes = 8, kThreads = 128, kChannels = kThreads / kLanes;  // channels of a block

// A tensor of up to three dimensions.
template <typename T>
struct Plane {
    T* data;
    int64_t by[3];

    explicit Plane(const TensorView& view)
        : data(view.ptr<T>()), by{view.stride[0], view.stride[1], view.ndim > 2 ? view.stride[2] : 0} {}
    explicit operator bool() const { return data != nullptr; }
    __device__ __forceinline__ T* at(int64_t i, int64_t j = 0, int64_t k = 0) const {
        return data + i * by[0] + j * by[1] + k * by[2];
    }
};

// B or C, (B,G,N): those without groups get one.
template <typename T>
struct Grouped {
    const T* data;
    int64_t by_batch, by_group, by_state;
    int group_dim;

    Grouped(const TensorView& view, int64_t dim)
        : data(view.ptr<const T>()),
          by_batch(view.stride[0]),
          by_group(view.ndim == 3 ? view.stride[1] : 0),
          by_state(view.stride[view.ndim - 1]),
          group_dim(static_cast<int>(view.ndim == 3 ? dim / view.size[1] : dim)) {}
    __device__ __forceinline__ const T* row(int64_t b, int d) const {
        return data + b * by_batch + d / group_dim * by_group;
    }
};

template <typename T, typename S>
struct Step {
    using Real = Compute<T>;
    Plane<S> state;
    Plane<const T> x, dt, z;
    Plane<const Real> A, D, dt_bias;
    Grouped<T> B, C;
    Plane<const int32_t> indices;
    Plane<T> out;
    int rows, dim, states;
    bool softplus;

    explicit Step(const SelectiveStateUpdate& p)
        : state(p.state),
          x(p.x),
          dt(p.dt),
          z(p.z),
          A(p.A),
          D(p.D),
          dt_bias(p.dt_bias),
          B(p.B, p.x.size[1]),
          C(p.C, p.x.size[1]),
          indices(p.indices),
          out(p.out),
          rows(static_cast<int>(p.x.size[0])),
          dim(static_cast<int>(p.x.size[1])),
          states(static_cast<int>(p.A.size[1])),
          softplus(p.dt_softplus) {}
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, 4) step_kernel(Step<T, S> p) {
    using Real = Compute<T>;
    const int lane = threadIdx.x % kLanes;
    const int64_t b = blockIdx.x;
    const int d = blockIdx.y * kChannels + threadIdx.x / kLanes;
    const bool valid = d < p.dim;
    const int64_t entry = p.indices.data ? *p.indices.at(b) : b;
    const bool padding = entry < 0;

    Real x = 0, sum = 0;
    if (valid && !padding) {
        x = to_compute(*p.x.at(b, d));
        Real dt = to_compute(*p.dt.at(b, d));
        if (p.dt_bias.data) dt += *p.dt_bias.at(d);
        if (p.softplus) dt = softplus(dt);
        const Real rate = dt * static_cast<Real>(kLog2e), input = dt * x;
        const T *B = p.B.row(b, d), *C = p.C.row(b, d);
        for (int n = lane; n < p.states; n += kLanes) {
            S* const h = p.state.at(entry, d, n);
            const Real next = exp2_fast(rate * *p.A.at(d, n)) * static_cast<Real>(to_compute(*h)) +
                              input * to_compute(B[n * p.B.by_state]);
            *h = from_compute<S>(static_cast<Compute<S>>(next));
            sum += next * to_compute(C[n * p.C.by_state]);
        }
    }
    for (int by = kLanes / 2; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (!valid || lane != 0) return;
    if (p.D.data) sum += *p.D.at(d) * x;
    if (p.z.data) sum *= silu(to_compute(*p.z.at(b, d)));
    *p.out.at(b, d) = from_compute<T>(padding ? Real(0) : sum);
}

template <typename T, typename S>
const char* launch(const SelectiveStateUpdate& params) {
    const Step<T, S> step(params);
    const int64_t blocks = (params.x.size[1] + kChannels - 1) / kChannels;
    if (params.x.size[0] == 0 || blocks == 0) return nullptr;
    if (blocks > 65535) return "too many channels";
    const dim3 grid(static_cast<unsigned>(step.rows), static_cast<unsigned>(blocks));
    PARROT_LAUNCH((step_kernel<T, S>), grid, kThreads, params.stream, step);
    return last_launch_error();
}

template <typename T>
const char* update(const SelectiveStateUpdate& params) {
    if (params.state.dtype == params.x.dtype) return launch<T, T>(params);
    return params.state.dtype == DType::f64 ? launch<T, double>(params) : launch<T, Compute<T>>(params);
}

}  // namespace

const char* selective_state_update(const SelectiveStateUpdate& params) {
    switch (params.x.dtype) {
        case DType::f32:
            return update<float>(params);
        case DType::f64:
            return update<double>(params);
        case DType::f16:
            return update<__half>(params);
        case DType::bf16:
            return update<__nv_bfloat16>(params);
        default:
            return "unsupported dtype";
    }
}

}  // namespace cuda
}  // namespace parrot
