// The entry points of the CUDA forward of Sinkhorn-Hadamard: dispatch on the dtype, and which sizes fit a block.
#include <algorithm>

#include "sinkhorn_hadamard_adjoint.cuh"
#include "sinkhorn_hadamard_forward.cuh"

namespace parrot {
namespace cuda {

const char* sinkhorn_hadamard_forward_f32(const SinkhornHadamardForward& params);
const char* sinkhorn_hadamard_forward_f64(const SinkhornHadamardForward& params);
const char* sinkhorn_hadamard_forward_f16(const SinkhornHadamardForward& params);
const char* sinkhorn_hadamard_forward_bf16(const SinkhornHadamardForward& params);

const char* sinkhorn_hadamard_forward(const SinkhornHadamardForward& params) {
    switch (params.x.dtype) {
        case DType::f32:
            return sinkhorn_hadamard_forward_f32(params);
        case DType::f64:
            return sinkhorn_hadamard_forward_f64(params);
        case DType::f16:
            return sinkhorn_hadamard_forward_f16(params);
        case DType::bf16:
            return sinkhorn_hadamard_forward_bf16(params);
        default:
            return "unsupported dtype";
    }
}

int64_t sinkhorn_hadamard_shared_memory(int64_t N, int64_t M, bool wide) {
    using namespace sinkhorn;
    const auto most = [&](auto forward, auto backward) {
        using Real = std::remove_pointer_t<decltype(forward.c)>;
        return static_cast<int64_t>(std::max(forward.carve(nullptr, Shape<Real>(N, M)),
                                             backward.carve(nullptr, Shape<Real>(N, M, kBackwardWarps))));
    };
    return wide ? most(ForwardMemory<double>(), BackwardMemory<double>())
                : most(ForwardMemory<float>(), BackwardMemory<float>());
}

int64_t shared_memory_limit() { return most_shared_memory(); }

}  // namespace cuda
}  // namespace parrot
