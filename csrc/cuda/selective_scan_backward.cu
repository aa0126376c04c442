// The entry points of the CUDA backward of the selective scan: dispatch on the dtype, size of the workspace.
#include "selective_scan_backward_shared.cuh"

namespace parrot {
namespace cuda {

const char* selective_scan_backward_f32(const SelectiveScanBackward& params);
const char* selective_scan_backward_f64(const SelectiveScanBackward& params);
const char* selective_scan_backward_f16(const SelectiveScanBackward& params);
const char* selective_scan_backward_bf16(const SelectiveScanBackward& params);

const char* selective_scan_backward(const SelectiveScanBackward& params) {
    switch (params.u.dtype) {
        case DType::f32:
            return selective_scan_backward_f32(params);
        case DType::f64:
            return selective_scan_backward_f64(params);
        case DType::f16:
            return selective_scan_backward_f16(params);
        case DType::bf16:
            return selective_scan_backward_bf16(params);
        default:
            return "unsupported dtype";
    }
}

int64_t selective_scan_backward_workspace(const TensorView& u, const TensorView& A, const TensorView& B,
                                          const TensorView& C) {
    const int64_t batch = u.size[0], dim = u.size[1], length = u.size[2], state = A.size[1];
    const bool B_constant = B.ndim == 2, C_constant = C.ndim == 2;
    const int64_t groups = std::lcm(scan_groups(B), scan_groups(C));
    const int64_t channels = scan_backward::block_channels(u.dtype, state);
    const int64_t blocks = groups * ((dim / groups + channels - 1) / channels);
    const int64_t rows = batch * dim * (state * (2 + B_constant + C_constant) + 2);
    return rows + batch * blocks * length * state * (2 - B_constant - C_constant);
}

}  // namespace cuda
}  // namespace parrot
