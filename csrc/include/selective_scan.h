// Parameters of the selective-scan kernels. Shapes and meaning: parrot_kernels/ops/selective_scan.py.
#pragma once

#include "tensor_view.h"

namespace parrot {

struct SelectiveScanInputs {
    // u, delta (B,D,L); A (D,N); B, C (D,N), (B,N,L) or (B,G,N,L), told apart by ndim;
    // D, delta_bias (D); z (B,D,L); lengths (B); seq_idx (B,L); initial_state (B,D,N). From D on, each may be absent.
    TensorView u, delta, A, B, C, D, z, delta_bias, lengths, seq_idx, initial_state;
    bool delta_softplus = false;
    bool reverse = false;
};

struct SelectiveScanForward : SelectiveScanInputs {
    // Outputs, preallocated: out (B,D,L); final_state (B,D,N); checkpoints (B,ceil(L/chunk_size),D,N) may be absent:
    // the states before the scan steps c * chunk_size.
    TensorView out, final_state, checkpoints;
    int64_t chunk_size = 0;
    TensorView workspace;    // CUDA: what selective_scan_workspace asks for, or absent: one pass over the time axis
    int num_threads = 1;     // CPU
    void* stream = nullptr;  // CUDA
};

struct SelectiveScanBackward : SelectiveScanInputs {
    TensorView grad_out, grad_final_state;  // may be absent: zero
    TensorView checkpoints;                 // from the forward; absent: one more pass over the time axis
    int64_t chunk_size = 0;
    // Outputs, preallocated; those of absent inputs are absent.
    TensorView du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state;
    TensorView workspace;    // CUDA: what selective_scan_backward_workspace asks for
    int num_threads = 1;     // CPU
    void* stream = nullptr;  // CUDA
};

// Groups into which a B or C divides the channels.
inline int scan_groups(const TensorView& matrix) { return matrix.ndim == 4 ? static_cast<int>(matrix.size[1]) : 1; }

namespace cuda {
// Return nullptr, or what the launch failed with.
const char* selective_scan_forward(const SelectiveScanForward& params);
const char* selective_scan_backward(const SelectiveScanBackward& params);
// Elements of the compute dtype that let the time axis run in parallel; 0 where that would not be faster on the
// current device. `groups`: the least common multiple of those of B and C. Results are bitwise the same without.
int64_t selective_scan_workspace(int64_t batch, int64_t dim, int64_t groups, int64_t length, int64_t state);
// Elements of the compute dtype that the backward needs.
int64_t selective_scan_backward_workspace(const TensorView& u, const TensorView& A, const TensorView& B,
                                          const TensorView& C);
}  // namespace cuda

}  // namespace parrot
