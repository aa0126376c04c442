// Parameters of the Sinkhorn-Hadamard kernels. Shapes and meaning: parrot_kernels/ops/sinkhorn_hadamard.py.
#pragma once

#include <limits>

#include "tensor_view.h"

namespace parrot {

enum class CostKind : int { euclidean = 0, sqeuclidean = 1, cosine = 2, matrix = 3 };

struct SinkhornHadamardForward {
    // Inputs: x (B,N,D), y (B,M,D); weights, lengths and the cost matrix (B,N,M) may be absent; eps (B,).
    TensorView x, y, a, b, x_lengths, y_lengths, cost_matrix, eps;
    CostKind cost = CostKind::euclidean;
    double cost_scale = 0.0;  // 0: divide by the largest valid cost of the problem
    int n_iters = 50;
    double tol = -1.0;                                       // negative: always run n_iters
    double rho_x = std::numeric_limits<double>::infinity();  // infinity: balanced
    double rho_y = std::numeric_limits<double>::infinity();
    // Outputs, preallocated; plan and the histories may be absent.
    TensorView x_to_y, y_to_x, x_hadamard, y_hadamard, f, g, plan;
    TensorView transport_cost, error, iterations, converged, scale, f_history, g_history;
    TensorView x_copy, y_copy, paired_hadamard;  // CUDA: x, y, x * y once more, where N = M; may be absent
    // CPU: bytes; what a problem would keep beyond them is made tile by tile.
    int64_t workspace_limit = int64_t{1} << 30;
    int num_threads = 1;     // CPU
    void* stream = nullptr;  // CUDA
};

// In the compute dtype, but for dx, dy (on CUDA they are too) and dcost_matrix, which have their inputs'. What is not
// needed is absent.
struct SinkhornHadamardBackward {
    TensorView x, y, a, b, x_lengths, y_lengths, cost_matrix, eps;
    CostKind cost = CostKind::euclidean;
    double rho_x = std::numeric_limits<double>::infinity();
    double rho_y = std::numeric_limits<double>::infinity();
    bool unrolled = true;  // else the plan and the potentials are constants
    // Outputs of the forward; the histories are read where the iteration is differentiated.
    TensorView f, g, scale, iterations, f_history, g_history;
    // Gradients of its outputs; absent: zero.
    TensorView grad_x_to_y, grad_y_to_x, grad_x_hadamard, grad_y_hadamard, grad_f, grad_g, grad_plan;
    TensorView grad_transport_cost;
    TensorView grad_x_copy, grad_y_copy, grad_paired_hadamard;  // CUDA
    // Outputs, preallocated.
    TensorView dx, dy, dcost_matrix, da, db, deps;
    TensorView workspace;                        // CUDA: (B,N,M), see sinkhorn_hadamard_needs_workspace
    int64_t workspace_limit = int64_t{1} << 30;  // as in the forward
    int num_threads = 1;                         // CPU
    void* stream = nullptr;                      // CUDA
};

namespace cuda {
// Return nullptr, or what the launch failed with.
const char* sinkhorn_hadamard_forward(const SinkhornHadamardForward& params);
const char* sinkhorn_hadamard_backward(const SinkhornHadamardBackward& params);
// Whether the backward needs a workspace: what the registers of a block don't hold.
bool sinkhorn_hadamard_needs_workspace(int64_t N, int64_t M, bool wide);
// Bytes of shared memory that a problem takes (`wide`: of doubles), and that a block of the current device can have.
int64_t sinkhorn_hadamard_shared_memory(int64_t N, int64_t M, bool wide);
int64_t shared_memory_limit();
}  // namespace cuda

}  // namespace parrot
