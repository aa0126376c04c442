// One file per dtype, so that they compile in parallel.
#include "selective_scan_backward.cuh"

namespace parrot {
namespace cuda {

const char* selective_scan_backward_f16(const SelectiveScanBackward& params) {
    return scan_backward::launch<__half>(params);
}

}  // namespace cuda
}  // namespace parrot
