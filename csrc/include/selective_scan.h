// Parameters of the selective-scan kernels. Shapes and meaning: parrot_kernels/ops/selective_scan.py.
#pragma once

#include "tensor_view.h"

namespace parrot {

struct SelectiveScanForward {
    // u, delta (B,D,L); A (D,N); B, C (D,N), (B,N,L) or (B,G,N,L), told apart by ndim;
    // D, delta_bias (D); z (B,D,L); lengths (B); seq_idx (B,L); initial_state (B,D,N). From D on, each may be absent.
    TensorView u, delta, A, B, C, D, z, delta_bias, lengths, seq_idx, initial_state;
    bool delta_softplus = false;
    bool reverse = false;
    // Outputs, preallocated: out (B,D,L); final_state (B,D,N).
    TensorView out, final_state;
    int num_threads = 1;      // CPU
    void* stream = nullptr;   // CUDA
};

namespace cuda {
// Returns nullptr, or what the launch failed with.
const char* selective_scan_forward(const SelectiveScanForward& params);
}  // namespace cuda

}  // namespace parrot
