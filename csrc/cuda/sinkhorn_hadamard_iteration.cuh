// The iteration of the forward of Sinkhorn-Hadamard on CUDA, on costs in shared memory.
//
// It is that of csrc/cpu/sinkhorn_iteration.h, which derives it and says when it can be trusted: offsets
// alpha, beta, a kernel K_ij = 2^(alpha_i + beta_j - c_ij), here in registers, and scalings u, v by multiply-adds
// alone; with h = a u and w = b v, u = 1 / (K w) and v = 1 / (K^T h). A warp holds whole rows, so that it takes s = K
// w, sets u and adds h K to the column sums without any other warp; then, after a barrier, one thread per column adds
// up what the warps found. Sums out of [2^-28, 2^28] make the rows of the warp, or all columns, take that half-step in
// the log domain, which sets their offsets and K anew. What K can't represent makes the problem start again with plain
// log-domain steps on the costs. So do all steps of problems whose K doesn't fit the registers.
#pragma once

#include "sinkhorn_hadamard_tile.cuh"

namespace parrot {
namespace cuda {
namespace sinkhorn {

template <typename T>
struct ForwardArguments {
    using Real = Compute<T>;
    Array<const T> x, y;
    Array<const Real> a, b, cost_matrix, eps;
    Array<const int32_t> x_lengths, y_lengths;
    Array<T> x_to_y, y_to_x, x_hadamard, y_hadamard;  // each may be absent, as the next three
    Array<T> x_copy, y_copy, paired_hadamard;         // x, y, x * y
    Array<Real> f, g, plan, transport_cost, error, scale, f_history, g_history;
    Array<int32_t> iterations;
    Array<bool> converged;
    CostKind cost;
    int N, M, features, n_iters;
    bool tolerance, balanced_x, balanced_y;
    Real cost_scale, tol, rho_x, rho_y;
};

// A block's shared memory.
template <typename Real>
struct ForwardMemory {
    Real* c;                                      // (rows, pitch), at the end the kernel
    Real *slots, *more_slots;                     // (warps, columns) each: what the warps found for a column
    Real *a, *log_a, *alpha, *h, *F, *row_error;  // (rows)
    Real *u_even, *u_odd;                         // (rows), after even and after odd iterations
    Real *b, *log_b, *beta, *v, *w, *spent;       // (columns)

    __host__ __device__ size_t carve(char* memory, const Shape<Real>& shape) {
        Carver carver{memory};
        c = carver.take<Real>(shape.rows * shape.pitch);
        const int parts = shape.warps * shape.columns, staging = shape.staging();
        slots = carver.take<Real>(2 * parts > staging ? 2 * parts : staging);
        more_slots = slots + parts;
        for (Real** array : {&a, &log_a, &alpha, &u_even, &u_odd, &h, &F, &row_error})
            *array = carver.take<Real>(shape.rows);
        for (Real** array : {&b, &log_b, &beta, &v, &w, &spent}) *array = carver.take<Real>(shape.columns);
        return carver.used;
    }
    __device__ __forceinline__ Real* u(int k) const { return k % 2 == 0 ? u_even : u_odd; }  // after iteration k
};

// A warp holds kRows rows of K and up to CHUNKS x 32 columns in its registers.
template <typename T, int CHUNKS>
struct Iteration {
    using Real = Compute<T>;
    static constexpr Real kTrusted = 268435456;  // 2^28: what is lost below 2^-126 is less than rounding
    static constexpr Real kLargestLog = 28, kLargestEntry = 57, kLargestMass = Real(1e6);
    using Kernel = Real[kRows][CHUNKS];

    const ForwardArguments<T>& p;
    const Shape<Real> shape;
    const int warp, lane, thread, threads;
    const int i0;  // the warp's first row, where it holds K
    int n, m;
    Real unit, damp_x, damp_y;  // unit = eps ln 2
    ForwardMemory<Real> s;
    bool unrepresentable = false;  // this thread met what the kernel can't hold
    int done = 0;
    Real error = 0;

    __device__ __forceinline__ Iteration(const ForwardArguments<T>& arguments, char* memory)
        : p(arguments),
          shape(arguments.N, arguments.M),
          warp(warp_index()),
          lane(lane_index()),
          thread(static_cast<int>(threadIdx.x)),
          threads(static_cast<int>(blockDim.x)),
          i0(warp * kRows) {
        s.carve(memory, shape);
        n = p.x_lengths ? p.x_lengths(problem()) : p.N;
        m = p.y_lengths ? p.y_lengths(problem()) : p.M;
    }

    // Cheaper to read again than to keep.
    __device__ __forceinline__ int64_t problem() const { return opaque(static_cast<int>(blockIdx.x)); }
    __device__ __forceinline__ Real row_potential(int i, int k) const {
        return s.alpha[i] + log2(s.u(k)[i]) + s.log_a[i];
    }
    __device__ __forceinline__ Real column_potential(int j) const { return s.beta[j] + log2(s.v[j]) + s.log_b[j]; }

    // ---- scaling steps

    // The warp's rows anew: offsets from the log-sum-exp, then K; returns its sums over w.
    __device__ __forceinline__ Real refresh_rows(Kernel& K, int k) {
        const int i = i0 + lane / 4;
        const Real offset =
            -row_lse(s.c + i0 * shape.pitch, shape.pitch, m, [&](int j) { return column_potential(j); }, lane);
        if (i < n && lane % 4 == 0) {
            // The last iteration's u with respect to the new offset.
            if (k > 1) s.u(k - 1)[i] = exp2(s.alpha[i] + log2(s.u(k - 1)[i]) - offset);
            s.alpha[i] = offset;
        }
        __syncwarp();
        Real sums[kRows] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const Real alpha = __shfl_sync(kAllLanes, offset, 4 * r);
#pragma unroll
            for (int q = 0; q < CHUNKS; ++q) {
                const int j = lane + 32 * q;
                if (j >= m || i0 + r >= n) continue;
                const Real exponent = (s.beta[j] + alpha) - s.c[(i0 + r) * shape.pitch + j];
                unrepresentable |= !(exponent <= kLargestEntry);
                K[r][q] = exp2_fast(exponent);
                sums[r] = fma(K[r][q], s.w[j], sums[r]);
            }
        }
        return reduce_rows<Sum>(sums, lane);
    }

    // Row update k, in `check` with the error after iteration k - 1.
    __device__ __forceinline__ void update_rows(Real sum, int i, int k, bool check, bool last) {
        if (i >= n) {
            if (i < shape.rows && lane % 4 == 0) s.h[i] = 0;
            return;
        }
        Real u;
        if (p.balanced_x) {
            u = Real(1) / sum;
        } else {
            const Real offset = s.alpha[i], potential = (offset - log2(sum)) * damp_x;
            unrepresentable |= potential - offset > kLargestLog;
            u = exp2(potential - offset);
        }
        const Real h = s.a[i] * u;
        if (lane % 4 != 0) return;
        if (check) s.row_error[i] = fabs(s.u(k - 1)[i] - u) * (s.a[i] * sum);
        s.u(k)[i] = u, s.h[i] = h;
        if (p.f_history && !last) p.f_history(problem(), k - 1, i) = row_potential(i, k) * unit;
    }

    __device__ __forceinline__ static bool untrusted(Real sum) { return !(sum >= 1 / kTrusted && sum <= kTrusted); }

    __device__ __forceinline__ void add_rows(const Kernel& K, Real (&columns)[CHUNKS]) const {
        Real h[kRows];
        load_rows(h, s.h + i0);
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q)
#pragma unroll
            for (int r = 0; r < kRows; ++r) columns[q] = fma(h[r], K[r][q], columns[q]);
    }

    __device__ __forceinline__ void write_slots(const Real (&columns)[CHUNKS]) const {
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q)
            if (lane + 32 * q < shape.columns) s.slots[warp * shape.columns + lane + 32 * q] = columns[q];
    }

    __device__ __forceinline__ void row_pass(Kernel& K, int k, bool check, bool last) {
        Real columns[CHUNKS] = {}, w[CHUNKS] = {};
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q)
            if (lane + 32 * q < shape.columns) w[q] = s.w[lane + 32 * q];
        if (i0 < n) {
            const int i = i0 + lane / 4;
            Real sums[kRows] = {};
#pragma unroll
            for (int q = 0; q < CHUNKS; ++q)
#pragma unroll
                for (int r = 0; r < kRows; ++r) sums[r] = fma(K[r][q], w[q], sums[r]);
            Real sum = reduce_rows<Sum>(sums, lane);
            if (__ballot_sync(kAllLanes, k == 1 || (i < n && untrusted(sum)))) sum = refresh_rows(K, k);
            update_rows(sum, i, k, check, last);
            __syncwarp();
            add_rows(K, columns);
        }
        write_slots(columns);
    }

    __device__ __forceinline__ void update_column(int j, Real sum, int k) {
        if (p.balanced_y) {
            s.v[j] = Real(1) / sum;
        } else {
            const Real offset = s.beta[j], potential = (offset - log2(sum)) * damp_y;
            unrepresentable |= potential - offset > kLargestLog;
            s.v[j] = exp2(potential - offset);
        }
        s.w[j] = s.b[j] * s.v[j];
        if (p.g_history) p.g_history(problem(), k - 1, j) = column_potential(j) * unit;
    }

    // All columns anew, as refresh_rows.
    __device__ __forceinline__ void refresh_columns(Kernel& K, int k) {
        if (lane < kRows && i0 + lane < n) s.F[i0 + lane] = row_potential(i0 + lane, k);
        __syncwarp();
        column_lse_parts(s.c, shape, n, m, s.F, s.slots, s.more_slots);
        __syncthreads();
        for (int j = thread; j < m; j += threads) s.beta[j] = -column_lse(s.slots, s.more_slots, shape, j);
        __syncthreads();
        Real columns[CHUNKS] = {};
        if (i0 < n) {
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int q = 0; q < CHUNKS; ++q) {
                    const int i = i0 + r, j = lane + 32 * q;
                    if (i >= n || j >= m) continue;
                    const Real exponent = (s.beta[j] + s.alpha[i]) - s.c[i * shape.pitch + j];
                    unrepresentable |= !(exponent <= kLargestEntry);
                    K[r][q] = exp2_fast(exponent);
                }
            add_rows(K, columns);
        }
        write_slots(columns);
        __syncthreads();
        for (int j = thread; j < m; j += threads)
            update_column(j, add_slots(s.slots, shape.columns, j, shape.warps), k);
        __syncthreads();
    }

    __device__ __forceinline__ Real total_error() const {
        Real sum = 0;
        for (int i = lane; i < n; i += 32) sum += s.row_error[i];
        return reduce_lanes<Sum>(sum);
    }

    // False if the kernel couldn't represent the problem.
    __device__ __forceinline__ bool run_scaling(Kernel& K) {
        for (int j = thread; j < shape.columns; j += threads) {
            s.w[j] = j < m ? 1 : 0, s.beta[j] = 0;  // g = 0
            if (j < m) s.v[j] = Real(1) / s.b[j];
        }
        __syncthreads();
        for (int k = 1;; ++k) {
            const bool last = k > p.n_iters, check = last || (p.tolerance && k > 1);
            row_pass(K, k, check, last);
            if (__syncthreads_or(unrepresentable)) return false;
            if (check) {
                error = total_error(), done = k - 1;
                if (last || error <= p.tol) break;
            }
            bool bad = false;
            for (int j = thread; j < m; j += threads) {
                const Real sum = add_slots(s.slots, shape.columns, j, shape.warps);
                bad |= untrusted(sum);
                update_column(j, sum, k);
            }
            if (__syncthreads_or(bad)) refresh_columns(K, k);
        }
        // Back to iteration `done`, and the kernel to where the projections find it.
        Real columns[CHUNKS] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int i = i0 + r;
            if (i >= n) break;
            const Real h = s.a[i] * s.u(done)[i];
#pragma unroll
            for (int q = 0; q < CHUNKS; ++q) {
                const int j = lane + 32 * q;
                if (j >= m) continue;
                Real& entry = s.c[i * shape.pitch + j];
                columns[q] += h * K[r][q] * entry;
                entry = K[r][q];
            }
        }
        __syncthreads();  // all have read the slots of the last row update
        write_slots(columns);
        __syncthreads();
        for (int i = thread; i < n; i += threads) s.h[i] = s.a[i] * s.u(done)[i];
        for (int j = thread; j < m; j += threads)
            s.spent[j] = s.w[j] * add_slots(s.slots, shape.columns, j, shape.warps);
        __syncthreads();
        return true;
    }

    // ---- plain log-domain steps: u = v = 1, and alpha, beta are the potentials but for the weights

    __device__ __forceinline__ void run_log_domain() {
        for (int j = thread; j < m; j += threads) s.beta[j] = -s.log_b[j], s.v[j] = 1;  // g = 0
        for (int i = thread; i < n; i += threads) s.alpha[i] = 0, s.u_even[i] = s.u_odd[i] = 1;
        __syncthreads();
        for (int k = 1;; ++k) {
            const bool last = k > p.n_iters, check = last || (p.tolerance && k > 1);
            for (int first = i0; first < n; first += shape.warps * kRows) {
                const Real lse = row_lse(
                    s.c + first * shape.pitch, shape.pitch, m, [&](int j) { return s.beta[j] + s.log_b[j]; }, lane);
                const int i = first + lane / 4;
                if (i >= n || lane % 4 != 0) continue;
                const Real now = s.log_a[i] - damp_x * lse;
                if (check) s.row_error[i] = fabs(exp2(s.alpha[i] + s.log_a[i] + lse) - exp2(now + lse));
                s.F[i] = now;
                if (p.f_history && !last) p.f_history(problem(), k - 1, i) = now * unit;
            }
            __syncthreads();
            if (check) {
                error = total_error(), done = k - 1;
                if (last || error <= p.tol) break;
            }
            for (int i = thread; i < n; i += threads) s.alpha[i] = s.F[i] - s.log_a[i];
            column_lse_parts(s.c, shape, n, m, s.F, s.slots, s.more_slots);
            __syncthreads();
            for (int j = thread; j < m; j += threads) {
                s.beta[j] = -damp_y * column_lse(s.slots, s.more_slots, shape, j);
                if (p.g_history) p.g_history(problem(), k - 1, j) = (s.beta[j] + s.log_b[j]) * unit;
            }
            __syncthreads();
        }
        // The last column update is made again with the kernel, so that its sums cancel the rounding of the offsets.
        for (int j = lane; j < m; j += 32) {
            Real sum = 0, spent = 0;
            for (int first = i0; first < n; first += shape.warps * kRows)
                for (int i = first; i < first + kRows && i < n; ++i) {
                    Real& c = s.c[i * shape.pitch + j];
                    const Real entry = exp2_fast((s.alpha[i] - c) + s.beta[j]), part = s.a[i] * entry;
                    sum += part, spent += part * c;
                    c = entry;
                }
            s.slots[warp * shape.columns + j] = sum, s.more_slots[warp * shape.columns + j] = spent;
        }
        __syncthreads();
        for (int i = thread; i < n; i += threads) s.h[i] = s.a[i];
        for (int j = thread; j < m; j += threads) {
            if (p.balanced_y) s.v[j] = Real(1) / add_slots(s.slots, shape.columns, j, shape.warps);
            s.w[j] = s.b[j] * s.v[j];
            s.spent[j] = s.w[j] * add_slots(s.more_slots, shape.columns, j, shape.warps);
        }
        __syncthreads();
    }
};

}  // namespace sinkhorn
}  // namespace cuda
}  // namespace parrot
