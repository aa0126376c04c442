// One file per dtype, so that they compile in parallel.
#include "causal_conv1d_backward.cuh"
#include "causal_conv1d_forward.cuh"

namespace parrot {
namespace cuda {

const char* causal_conv1d_forward_bf16(const CausalConv1dForward& params) {
    return conv::forward_launch<__nv_bfloat16>(params);
}

const char* causal_conv1d_backward_bf16(const CausalConv1dBackward& params) {
    return conv::backward_launch<__nv_bfloat16>(params);
}

}  // namespace cuda
}  // namespace parrot
