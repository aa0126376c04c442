// One file per dtype, so that they compile in parallel.
#include "sinkhorn_hadamard_forward.cuh"

namespace parrot {
namespace cuda {

const char* sinkhorn_hadamard_forward_f16(const SinkhornHadamardForward& params) {
    return sinkhorn::forward<__half>(params);
}

}  // namespace cuda
}  // namespace parrot
