// One file per dtype, so that they compile in parallel.
#include "causal_conv1d_backward.cuh"
#include "causal_conv1d_forward.cuh"

namespace parrot {
namespace cuda {

const char* causal_conv1d_forward_f64(const CausalConv1dForward& params) {
    return conv::forward_launch<double>(params);
}

const char* causal_conv1d_backward_f64(const CausalConv1dBackward& params) {
    return conv::backward_launch<double>(params);
}

}  // namespace cuda
}  // namespace parrot
