// The entry points of the CUDA selective scan: dispatch on the dtype, size of the workspace.
#include "selective_scan_forward.cuh"

namespace parrot {
namespace cuda {

const char* selective_scan_forward_f32(const SelectiveScanForward& params);
const char* selective_scan_forward_f64(const SelectiveScanForward& params);
const char* selective_scan_forward_f16(const SelectiveScanForward& params);
const char* selective_scan_forward_bf16(const SelectiveScanForward& params);

const char* selective_scan_forward(const SelectiveScanForward& params) {
    switch (params.u.dtype) {
        case DType::f32:
            return selective_scan_forward_f32(params);
        case DType::f64:
            return selective_scan_forward_f64(params);
        case DType::f16:
            return selective_scan_forward_f16(params);
        case DType::bf16:
            return selective_scan_forward_bf16(params);
        default:
            return "unsupported dtype";
    }
}

int64_t selective_scan_workspace(int64_t batch, int64_t dim, int64_t groups, int64_t length, int64_t state) {
    if (state > 64 || time_segments(channel_blocks(batch, dim, groups), length) == 1) return 0;
    const int64_t chunks = (length + kChunk - 1) / kChunk;
    return chunks * batch * dim * (state + 1);
}

}  // namespace cuda
}  // namespace parrot
