// One file per dtype, so that they compile in parallel.
#include "sinkhorn_hadamard_forward.cuh"

namespace parrot {
namespace cuda {

const char* sinkhorn_hadamard_forward_f64(const SinkhornHadamardForward& params) {
    return sinkhorn::forward<double>(params);
}

}  // namespace cuda
}  // namespace parrot
