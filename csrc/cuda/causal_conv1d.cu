// The entry points of the CUDA convolution: dispatch on the dtype, size of the workspace.
#include "causal_conv1d.cuh"

namespace parrot {
namespace cuda {

#define PARROT_CONV_DTYPE(dtype)                                                  \
    const char* causal_conv1d_forward_##dtype(const CausalConv1dForward& params); \
    const char* causal_conv1d_backward_##dtype(const CausalConv1dBackward& params);
PARROT_CONV_DTYPE(f32)
PARROT_CONV_DTYPE(f64)
PARROT_CONV_DTYPE(f16)
PARROT_CONV_DTYPE(bf16)
#undef PARROT_CONV_DTYPE

const char* causal_conv1d_forward(const CausalConv1dForward& params) {
    switch (params.x.dtype) {
        case DType::f32:
            return causal_conv1d_forward_f32(params);
        case DType::f64:
            return causal_conv1d_forward_f64(params);
        case DType::f16:
            return causal_conv1d_forward_f16(params);
        case DType::bf16:
            return causal_conv1d_forward_bf16(params);
        default:
            return "unsupported dtype";
    }
}

const char* causal_conv1d_backward(const CausalConv1dBackward& params) {
    switch (params.x.dtype) {
        case DType::f32:
            return causal_conv1d_backward_f32(params);
        case DType::f64:
            return causal_conv1d_backward_f64(params);
        case DType::f16:
            return causal_conv1d_backward_f16(params);
        case DType::bf16:
            return causal_conv1d_backward_bf16(params);
        default:
            return "unsupported dtype";
    }
}

int64_t causal_conv1d_workspace(const TensorView& x, const TensorView& weight) {
    return conv::stretches(x, weight) * x.size[0] * x.size[1] * (weight.size[1] + 1);
}

}  // namespace cuda
}  // namespace parrot
