// One file per dtype, so that they compile in parallel.
#include "sinkhorn_hadamard_forward.cuh"

namespace parrot {
namespace cuda {

const char* sinkhorn_hadamard_forward_f32(const SinkhornHadamardForward& params) {
    return sinkhorn::forward<float>(params);
}

}  // namespace cuda
}  // namespace parrot
