// The entry points of the CUDA backward of Sinkhorn-Hadamard: dispatch on the dtype, and who needs a workspace.
#include "sinkhorn_hadamard_backward.cuh"

namespace parrot {
namespace cuda {

const char* sinkhorn_hadamard_backward_f32(const SinkhornHadamardBackward& params);
const char* sinkhorn_hadamard_backward_f64(const SinkhornHadamardBackward& params);
const char* sinkhorn_hadamard_backward_f16(const SinkhornHadamardBackward& params);
const char* sinkhorn_hadamard_backward_bf16(const SinkhornHadamardBackward& params);

const char* sinkhorn_hadamard_backward(const SinkhornHadamardBackward& params) {
    switch (params.x.dtype) {
        case DType::f32:
            return sinkhorn_hadamard_backward_f32(params);
        case DType::f64:
            return sinkhorn_hadamard_backward_f64(params);
        case DType::f16:
            return sinkhorn_hadamard_backward_f16(params);
        case DType::bf16:
            return sinkhorn_hadamard_backward_bf16(params);
        default:
            return "unsupported dtype";
    }
}

bool sinkhorn_hadamard_needs_workspace(int64_t N, int64_t M, bool wide) {
    using namespace sinkhorn;
    return N > kRows * kBackwardWarps || M > 32 * (wide ? kBackwardChunks<double> : kBackwardChunks<float>);
}

}  // namespace cuda
}  // namespace parrot
