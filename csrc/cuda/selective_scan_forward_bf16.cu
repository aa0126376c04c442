// One file per dtype, so that they compile in parallel.
#include "selective_scan_forward.cuh"

namespace parrot {
namespace cuda {

const char* selective_scan_forward_bf16(const SelectiveScanForward& params) {
    return scan_forward_launch<__nv_bfloat16>(params);
}

}  // namespace cuda
}  // namespace parrot
