// Parameters of the kernels that run one step of the selective scan; shapes and meaning:
// parrot_kernels/ops/selective_state_update.py.
#pragma once

#include "tensor_view.h"

namespace parrot {

struct SelectiveStateUpdate {
    // state (E,D,N), read and written, of the dtype of x, of the compute dtype or fp64; x, dt, z (B,D); A (D,N);
    // B, C (B,N) or (B,G,N); D, dt_bias (D); indices (B) int32, the entry of `state` of each row, negative for none.
    // From D on, each may be absent; without indices E is B.
    TensorView state, x, dt, A, B, C, D, z, dt_bias, indices;
    bool dt_softplus = false;
    TensorView out;          // (B,D), preallocated
    int num_threads = 1;     // CPU
    void* stream = nullptr;  // CUDA
};

namespace cuda {
const char* selective_state_update(const SelectiveStateUpdate& params);  // nullptr, or what the launch failed with
}

}  // namespace parrot
