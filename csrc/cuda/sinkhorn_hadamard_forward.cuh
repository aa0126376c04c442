// Forward of Sinkhorn-Hadamard on CUDA, for problems whose costs fit the shared memory of a block (formulas:
// parrot_kernels/ops/sinkhorn_hadamard.py).
//
// The iteration is that of csrc/cpu/sinkhorn_iteration.h, which derives it and says when it can be trusted: offsets
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
struct Forward {
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

    __device__ __forceinline__ Forward(const ForwardArguments<T>& arguments, char* memory)
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

    // ---- around the iteration

    __device__ __forceinline__ Real find_costs() {
        Real largest;
        if (p.cost == CostKind::matrix) {
            largest = given_costs(p.cost_matrix, problem(), n, m, shape, s.c);
        } else {
            if (p.cost == CostKind::cosine) {
                inverse_lengths(p.x, problem(), n, p.features, shape.warps, s.h);
                inverse_lengths(p.y, problem(), m, p.features, shape.warps, s.w);
            }
            largest = pairwise_costs(p.x, p.y, problem(), n, m, p.features, p.cost, s.h, s.w, shape, s.slots, s.c);
        }
        Real scale = p.cost_scale;
        if (scale <= 0) {
            scale = largest_of_block(largest, s.slots, shape.warps);
            scale = Largest{}(scale, static_cast<Real>(kLeastScale));
        }
        const Real inverse = Real(1) / (scale * unit);
        for (int i = warp; i < n; i += shape.warps)
            for (int j = lane; j < m; j += 32) s.c[i * shape.pitch + j] *= inverse;
        return scale;
    }

    __device__ __forceinline__ bool usual_mass(const Real* weights, int count) const {
        Real mass = 0;
        for (int i = lane; i < count; i += 32) mass += weights[i];
        mass = reduce_lanes<Sum>(mass);
        return mass > 1 / kLargestMass && mass < kLargestMass;
    }

    // One side's projections: out_i = factor_i sum_k kernel weight_k points_k, their products with `own`, a copy of
    // that, and its products with the points.
    template <bool BY_ROWS>
    __device__ __forceinline__ void project(const Array<const T>& points, const Real* weights, int inner,
                                            const Array<const T>& own, const Real* factor, int count,
                                            const Array<T>& out, const Array<T>& hadamard, const Array<T>& copy,
                                            const Array<T>& paired) const {
        constexpr int width = kWidth<Real>;
        const int blocks = (p.features + 32 * width - 1) / (32 * width), groups = (count + kRows - 1) / kRows;
        for (int task = warp; task < groups * blocks; task += shape.warps) {
            const int i0 = task / blocks * kRows, first = task % blocks * 32 * width;
            Real sums[kRows][width] = {};
            multiply<BY_ROWS, T>(BY_ROWS ? s.c + i0 * shape.pitch : s.c + i0, shape.pitch, inner, weights, points,
                                 problem(), first, p.features, sums);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (i0 + r >= count) break;
                const Real by = factor[i0 + r];
#pragma unroll
                for (int q = 0; q < width; ++q) {
                    const int d = first + lane + 32 * q;
                    if (d >= p.features) break;
                    const Real value = sums[r][q] * by;
                    if (out) out(problem(), i0 + r, d) = from_compute<T>(value);
                    if (!(hadamard || copy || paired)) continue;
                    const T point = own(problem(), i0 + r, d);
                    if (hadamard) hadamard(problem(), i0 + r, d) = from_compute<T>(value * to_compute(point));
                    if (copy) copy(problem(), i0 + r, d) = point;
                    if (paired)
                        paired(problem(), i0 + r, d) =
                            from_compute<T>(to_compute(point) * to_compute(points(problem(), i0 + r, d)));
                }
            }
        }
    }

    __device__ __forceinline__ void write_padding(const Array<T>& out, int count, int size) const {
        if (!out) return;
        for (int i = count + warp; i < size; i += shape.warps)
            for (int d = lane; d < p.features; d += 32) out(problem(), i, d) = from_compute<T>(0);
    }

    __device__ __forceinline__ void write(Real scale, bool empty) const {
        const int rows = empty ? 0 : n, columns = empty ? 0 : m;
        write_padding(p.y_to_x, rows, p.N), write_padding(p.x_hadamard, rows, p.N);
        write_padding(p.x_to_y, columns, p.M), write_padding(p.y_hadamard, columns, p.M);
        for (int i = thread; i < p.N; i += threads) {
            p.f(problem(), i) = i < rows ? row_potential(i, done) * unit : Real(0);
            if (p.f_history)
                for (int k = 0; k < done && i >= rows; ++k) p.f_history(problem(), k, i) = 0;
        }
        for (int j = thread; j < p.M; j += threads) {
            p.g(problem(), j) = j < columns ? column_potential(j) * unit : Real(0);
            if (p.g_history)
                for (int k = 0; k < done && j >= columns; ++k) p.g_history(problem(), k, j) = 0;
        }
        if (p.plan)
            for (int i = warp; i < p.N; i += shape.warps)
                for (int j = lane; j < p.M; j += 32)
                    p.plan(problem(), i, j) =
                        i < rows && j < columns ? s.c[i * shape.pitch + j] * s.h[i] * s.w[j] : Real(0);
        if (warp != 0) return;
        Real spent = 0;
        for (int j = lane; j < columns; j += 32) spent += s.spent[j];
        spent = reduce_lanes<Sum>(spent);
        if (lane != 0) return;
        p.transport_cost(problem()) = spent * unit;
        p.error(problem()) = error;
        p.iterations(problem()) = done;
        p.converged(problem()) = error <= (p.tolerance ? p.tol : static_cast<Real>(kConverged));
        p.scale(problem()) = scale;
    }

    __device__ __forceinline__ void run() {
        const Real eps = p.eps(problem());
        unit = eps * static_cast<Real>(kLn2);
        if (n == 0 || m == 0) return write(p.cost_scale > 0 ? p.cost_scale : static_cast<Real>(kLeastScale), true);
        damp_x = p.balanced_x ? Real(1) : p.rho_x / (p.rho_x + eps);
        damp_y = p.balanced_y ? Real(1) : p.rho_y / (p.rho_y + eps);
        const Real scale = find_costs();
        read_weights(p.a, problem(), n, s.a, s.log_a);
        read_weights(p.b, problem(), m, s.b, s.log_b);
        __syncthreads();
        // Which way it goes depends on the valid rows and columns alone.
        bool scaled = n <= shape.warps * kRows && m <= 32 * CHUNKS && usual_mass(s.a, n) && usual_mass(s.b, m);
        if (scaled) {
            Kernel K = {};
            scaled = run_scaling(K);
        }
        if (!scaled) {
            __syncthreads();
            run_log_domain();
        }
        project<true>(p.y, s.w, m, p.x, s.u(done), n, p.y_to_x, p.x_hadamard, p.x_copy, p.paired_hadamard);
        project<false>(p.x, s.h, n, p.y, s.v, m, p.x_to_y, p.y_hadamard, p.y_copy, {});
        write(scale, false);
    }
};

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(32 * kMostWarps<Compute<T>>, 1)
    forward_kernel(const __grid_constant__ ForwardArguments<T> p) {
    PARROT_DYNAMIC_SHARED(memory);
    Forward<T, CHUNKS>(p, memory).run();
}

template <typename T, int CHUNKS>
const char* launch_forward(const ForwardArguments<T>& p, int64_t batch, void* stream) {
    const Shape<Compute<T>> shape(p.N, p.M);
    const size_t bytes = ForwardMemory<Compute<T>>().carve(nullptr, shape);
    auto* const kernel = forward_kernel<T, CHUNKS>;
    if (const char* failure = allow_shared_memory(kernel, bytes)) return failure;
    PARROT_LAUNCH_SHARED(kernel, dim3(static_cast<unsigned>(batch)), 32 * shape.warps, bytes, stream, p);
    return last_launch_error();
}

template <typename T>
const char* forward(const SinkhornHadamardForward& params) {
    using Real = Compute<T>;
    ForwardArguments<T> p;
    p.x = Array<const T>(params.x), p.y = Array<const T>(params.y);
    p.a = Array<const Real>(params.a), p.b = Array<const Real>(params.b);
    p.cost_matrix = Array<const Real>(params.cost_matrix), p.eps = Array<const Real>(params.eps);
    p.x_lengths = Array<const int32_t>(params.x_lengths), p.y_lengths = Array<const int32_t>(params.y_lengths);
    p.x_to_y = Array<T>(params.x_to_y), p.y_to_x = Array<T>(params.y_to_x);
    p.x_hadamard = Array<T>(params.x_hadamard), p.y_hadamard = Array<T>(params.y_hadamard);
    p.x_copy = Array<T>(params.x_copy), p.y_copy = Array<T>(params.y_copy);
    p.paired_hadamard = Array<T>(params.paired_hadamard);
    p.f = Array<Real>(params.f), p.g = Array<Real>(params.g), p.plan = Array<Real>(params.plan);
    p.transport_cost = Array<Real>(params.transport_cost), p.error = Array<Real>(params.error);
    p.scale = Array<Real>(params.scale), p.iterations = Array<int32_t>(params.iterations);
    p.converged = Array<bool>(params.converged);
    p.f_history = Array<Real>(params.f_history), p.g_history = Array<Real>(params.g_history);
    p.cost = params.cost, p.n_iters = params.n_iters;
    p.N = static_cast<int>(params.x.size[1]), p.M = static_cast<int>(params.y.size[1]);
    p.features = static_cast<int>(params.x.size[2]);
    constexpr double infinity = std::numeric_limits<double>::infinity();
    p.tolerance = params.tol >= 0, p.balanced_x = params.rho_x == infinity, p.balanced_y = params.rho_y == infinity;
    p.cost_scale = static_cast<Real>(params.cost_scale), p.tol = static_cast<Real>(params.tol);
    p.rho_x = static_cast<Real>(params.rho_x), p.rho_y = static_cast<Real>(params.rho_y);

    const int64_t batch = params.x.size[0];
    if (batch == 0) return nullptr;
    const Shape<Compute<T>> shape(p.N, p.M);
    if (shape.columns <= 32) return launch_forward<T, 1>(p, batch, params.stream);
    if (shape.columns <= 64) return launch_forward<T, 2>(p, batch, params.stream);
    return launch_forward<T, 4>(p, batch, params.stream);
}

}  // namespace sinkhorn
}  // namespace cuda
}  // namespace parrot
