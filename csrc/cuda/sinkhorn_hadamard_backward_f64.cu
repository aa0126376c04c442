// One file per dtype, so that they compile in parallel.
#include "sinkhorn_hadamard_backward.cuh"

namespace parrot {
namespace cuda {

const char* sinkhorn_hadamard_backward_f64(const SinkhornHadamardBackward& params) {
    return sinkhorn::backward<double>(params);
}

}  // namespace cuda
}  // namespace parrot
