// One file per dtype, so that they compile in parallel.
#include "causal_conv1d_backward.cuh"
#include "causal_conv1d_forward.cuh"

namespace parrot {
namespace cuda {

const char* causal_conv1d_forward_f16(const CausalConv1dForward& params) {
    return conv::forward_launch<__half>(params);
}

const char* causal_conv1d_backward_f16(const CausalConv1dBackward& params) {
    return conv::backward_launch<__half>(params);
}

}  // namespace cuda
}  // namespace parrot
