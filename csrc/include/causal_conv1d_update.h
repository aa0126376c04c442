// Parameters of the kernels that convolve new steps after a kept history; shapes and meaning:
// parrot_kernels/ops/causal_conv1d_update.py.
#pragma once

#include "tensor_view.h"

namespace parrot {

struct CausalConv1dUpdate {
    // x (B,D,L); state (E,D,S), S >= W - 1, read and written, of the dtype of x, of the compute dtype or fp64;
    // weight (D,W); bias (D); seen (B) int32: the state is a ring in which step s lies at s % S; indices (B) int32,
    // the entry of `state` of each row, negative for none. From bias on, each may be absent.
    TensorView x, state, weight, bias, seen, indices;
    bool silu = false;
    TensorView out;          // (B,D,L), preallocated
    int num_threads = 1;     // CPU
    void* stream = nullptr;  // CUDA
};

namespace cuda {
const char* causal_conv1d_update(const CausalConv1dUpdate& params);  // nullptr, or what the launch failed with
}

}  // namespace parrot
