// New steps of the causal convolution after a kept history, on GPUs; formulas in
// parrot_kernels/reference/causal_conv1d_update.py. A thread has a channel of its own: it reads all of the history that
// it needs before it overwrites any.
#include "causal_conv1d_update.h"

#include "common.cuh"

namespace parrot {
namespace cuda {
namespace {

constexpr int kThreads = 64;  // few, so that a single token reaches many multiprocessors

template <typename T, typename S>
struct Steps {
    using Real = Compute<T>;
    const T* x;
    S* state;
    const Real *weight, *bias;
    const int32_t *seen, *indices;
    T* out;
    int64_t x_by[3], state_by[3], out_by[3], weight_by[2], bias_by, seen_by, indices_by;
    int rows, dim, steps, width, kept;
    bool silu;

    explicit Steps(const CausalConv1dUpdate& p)
        : x(p.x.ptr<const T>()),
          state(p.state.ptr<S>()),
          weight(p.weight.ptr<const Real>()),
          bias(p.bias.ptr<const Real>()),
          seen(p.seen.ptr<const int32_t>()),
          indices(p.indices.ptr<const int32_t>()),
          out(p.out.ptr<T>()),
          weight_by{p.weight.stride[0], p.weight.stride[1]},
          bias_by(p.bias.stride[0]),
          seen_by(p.seen.stride[0]),
          indices_by(p.indices.stride[0]),
          rows(static_cast<int>(p.x.size[0])),
          dim(static_cast<int>(p.x.size[1])),
          steps(static_cast<int>(p.x.size[2])),
          width(static_cast<int>(p.weight.size[1])),
          kept(static_cast<int>(p.state.size[2])),
          silu(p.silu) {
        for (int i = 0; i < 3; ++i)
            x_by[i] = p.x.stride[i], state_by[i] = p.state.stride[i], out_by[i] = p.out.stride[i];
    }
};

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads, 4) steps_kernel(Steps<T, S> p) {
    using Real = Compute<T>;
    const int64_t b = blockIdx.x;
    const int d = blockIdx.y * kThreads + threadIdx.x;
    if (d >= p.dim) return;
    T* const out = p.out + b * p.out_by[0] + d * p.out_by[1];
    const int64_t entry = p.indices ? p.indices[b * p.indices_by] : b;
    if (entry < 0) {
        for (int s = 0; s < p.steps; ++s) out[s * p.out_by[2]] = from_compute<T>(Real(0));
        return;
    }
    const T* const x = p.x + b * p.x_by[0] + d * p.x_by[1];
    S* const line = p.state + entry * p.state_by[0] + d * p.state_by[1];
    const Real* const weight = p.weight + d * p.weight_by[0];
    const bool ring = p.seen != nullptr;
    const int seen = ring ? p.seen[b * p.seen_by] : 0;
    // The place of step s, counted from the first new one, in the state.
    const auto place = [&](int s) -> int64_t {
        if (!ring) return p.kept + s;
        const int at = (seen + s) % p.kept;
        return at < 0 ? at + p.kept : at;
    };

    for (int s = 0; s < p.steps; ++s) {
        Real y = p.bias ? p.bias[d * p.bias_by] : Real(0);
        for (int k = 0; k < p.width; ++k) {
            const int from = s + k - (p.width - 1);
            const Real value = from >= 0 ? to_compute(x[from * p.x_by[2]])
                                         : static_cast<Real>(to_compute(line[place(from) * p.state_by[2]]));
            y += weight[k * p.weight_by[1]] * value;
        }
        out[s * p.out_by[2]] = from_compute<T>(p.silu ? silu(y) : y);
    }
    const auto kept_value = [&](int s) {
        return from_compute<S>(static_cast<Compute<S>>(to_compute(x[s * p.x_by[2]])));
    };
    if (ring) {
        for (int s = p.steps > p.kept ? p.steps - p.kept : 0; s < p.steps; ++s)
            line[place(s) * p.state_by[2]] = kept_value(s);
        return;
    }
    for (int j = 0; j < p.kept; ++j) {
        const int from = j + p.steps;
        line[j * p.state_by[2]] = from < p.kept ? line[from * p.state_by[2]] : kept_value(from - p.kept);
    }
}

template <typename T, typename S>
const char* launch(const CausalConv1dUpdate& params) {
    const Steps<T, S> steps(params);
    const int64_t blocks = (params.x.size[1] + kThreads - 1) / kThreads;
    if (params.x.size[0] == 0 || blocks == 0) return nullptr;
    if (blocks > 65535) return "too many channels";
    const dim3 grid(static_cast<unsigned>(steps.rows), static_cast<unsigned>(blocks));
    PARROT_LAUNCH((steps_kernel<T, S>), grid, kThreads, params.stream, steps);
    return last_launch_error();
}

template <typename T>
const char* update(const CausalConv1dUpdate& params) {
    if (params.state.dtype == params.x.dtype) return launch<T, T>(params);
    return params.state.dtype == DType::f64 ? launch<T, double>(params) : launch<T, Compute<T>>(params);
}

}  // namespace

const char* causal_conv1d_update(const CausalConv1dUpdate& params) {
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
