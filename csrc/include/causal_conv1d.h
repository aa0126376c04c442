// Parameters of the causal convolution kernels. Shapes and meaning: parrot_kernels/ops/causal_conv1d.py.
#pragma once

#include "tensor_view.h"

namespace parrot {

struct CausalConv1dInputs {
    // x (B,D,L); weight (D,W); bias (D); lengths (B); seq_idx (B,L); initial_state (B,D,W-1). From bias on, each may
    // be absent.
    TensorView x, weight, bias, lengths, seq_idx, initial_state;
    bool silu = false;
    bool reverse = false;
};

struct CausalConv1dForward : CausalConv1dInputs {
    TensorView out, final_state;  // (B,D,L), (B,D,W-1)
    int num_threads = 1;          // CPU
    void* stream = nullptr;       // CUDA
};

struct CausalConv1dBackward : CausalConv1dInputs {
    TensorView grad_out, grad_final_state;  // may be absent: zero
    // Outputs, preallocated; those of absent inputs are absent.
    TensorView dx, dweight, dbias, dinitial_state;
    TensorView workspace;    // CUDA: what causal_conv1d_workspace asks for
    int num_threads = 1;     // CPU
    void* stream = nullptr;  // CUDA
};

namespace cuda {
// Return nullptr, or what the launch failed with.
const char* causal_conv1d_forward(const CausalConv1dForward& params);
const char* causal_conv1d_backward(const CausalConv1dBackward& params);
// Elements of the compute dtype that the backward needs.
int64_t causal_conv1d_workspace(const TensorView& x, const TensorView& weight);
}  // namespace cuda

}  // namespace parrot
