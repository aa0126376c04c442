// The adjoint of the Sinkhorn iteration on CUDA, one block per problem, from the potentials that the forward stored.
//
// Equations, and when K can be trusted: csrc/cpu/sinkhorn_adjoint.h. Kept are offsets alpha, beta and K_ij = 2^(alpha_i
// + beta_j - c_ij); with h = 2^(F - alpha), w = 2^(G - beta), t = K^T h and s = K w, an iteration backwards is
//     p = damp_y dG / t,   dF -= h K p,   q = damp_x dF / s,   dc += K (h p^T + q w^T),   dG = -w K^T q,
// multiply-adds only. K and dc are in registers, a warp holding whole rows: after the sums of its rows it adds to dc
// and to the column sums, which one thread per column collects behind a barrier, together with the t of the iteration
// that is next. What K can't represent is done with softmax weights in the log domain. So are all iterations of
// problems whose K doesn't fit the registers; their dc is in global memory, each entry of one thread.
#pragma once

#include "sinkhorn_hadamard_tile.cuh"

namespace parrot {
namespace cuda {
namespace sinkhorn {

template <typename T>
struct BackwardArguments {
    using Real = Compute<T>;
    Array<const T> x, y;
    Array<const Real> a, b, cost_matrix, eps, f, g, scale, f_history, g_history;
    Array<const int32_t> x_lengths, y_lengths, iterations;
    Array<const T> grad_x_to_y, grad_y_to_x, grad_x_hadamard, grad_y_hadamard;
    Array<const T> grad_x_copy, grad_y_copy, grad_paired_hadamard;
    Array<const Real> grad_f, grad_g, grad_plan, grad_transport_cost;
    Array<Real> dx, dy, dcost_matrix, da, db, deps;
    Array<Real> workspace;  // (B, N, M), dc of problems that the registers don't hold
    CostKind cost;
    int N, M, features;
    bool balanced_x, balanced_y, unroll, through_cost;  // whether there is a gradient of the iteration, of the cost
    Real rho_x, rho_y;
};

// One of FIELDS vectors in turn by groups of GROUP, so that the addresses of an element of each differ by constants:
// pointers to all vectors would take the registers that K needs.
template <typename Real, int GROUP, int FIELDS>
struct Interleaved {
    Real* first = nullptr;

    __device__ __forceinline__ explicit operator bool() const { return first != nullptr; }
    __device__ __forceinline__ Real& operator[](unsigned i) const {
        return first[i / GROUP * (GROUP * FIELDS) + i % GROUP];
    }
    __device__ __forceinline__ Real* group(unsigned i) const { return first + i * FIELDS; }
};

// A block's shared memory.
template <typename Real>
struct BackwardMemory {
    using Rows = Interleaved<Real, kRows, 8>;
    using Columns = Interleaved<Real, 32, 10>;
    Real* c;                   // (rows, pitch), at the end the gradient over distances
    Real *slots, *more_slots;  // (warps, columns) each: what the warps found for a column
    Real *rows, *columns;      // the vectors below

    __host__ __device__ size_t carve(char* memory, const Shape<Real>& shape) {
        Carver carver{memory};
        c = carver.take<Real>(shape.rows * shape.pitch);
        const int parts = shape.warps * shape.columns, staging = shape.staging();
        slots = carver.take<Real>(2 * parts > staging ? 2 * parts : staging);
        more_slots = slots + parts;
        rows = carver.take<Real>(8 * shape.rows);
        columns = carver.take<Real>(10 * shape.columns);
        return carver.used;
    }
    __device__ __forceinline__ Rows F() const { return {rows}; }
    __device__ __forceinline__ Rows alpha() const { return {rows + 1 * kRows}; }
    __device__ __forceinline__ Rows h() const { return {rows + 2 * kRows}; }
    __device__ __forceinline__ Rows q() const { return {rows + 3 * kRows}; }
    __device__ __forceinline__ Rows dF() const { return {rows + 4 * kRows}; }
    __device__ __forceinline__ Rows extra_i() const { return {rows + 5 * kRows}; }
    __device__ __forceinline__ Rows dlog_a() const { return {rows + 6 * kRows}; }
    __device__ __forceinline__ Rows ddamp_i() const { return {rows + 7 * kRows}; }
    __device__ __forceinline__ Columns G() const { return {columns}; }
    __device__ __forceinline__ Columns beta() const { return {columns + 1 * 32}; }
    __device__ __forceinline__ Columns w() const { return {columns + 2 * 32}; }
    __device__ __forceinline__ Columns p() const { return {columns + 3 * 32}; }
    __device__ __forceinline__ Columns t() const { return {columns + 4 * 32}; }
    __device__ __forceinline__ Columns dG() const { return {columns + 5 * 32}; }
    __device__ __forceinline__ Columns extra_j() const { return {columns + 6 * 32}; }
    __device__ __forceinline__ Columns dlog_b() const { return {columns + 7 * 32}; }
    __device__ __forceinline__ Columns ddamp_j() const { return {columns + 8 * 32}; }
    __device__ __forceinline__ Columns last_G() const { return {columns + 9 * 32}; }
};

// With dc in registers, which hold whole rows; or in the workspace, from where tiles are fetched.
template <typename T, int CHUNKS, bool REGISTERS>
struct Adjoint {
    using Real = Compute<T>;
    using Columns = typename BackwardMemory<Real>::Columns;
    using Tile = Real[kRows][CHUNKS];  // of a warp: kRows rows, CHUNKS x 32 columns
    // Entries of K below 2^-126 are lost: with h and w at most 2^58, less than rounding in sums from 2^-29 to 2^29.
    static constexpr Real kTrusted = 536870912, kLargest = Real(288230376151711744.0), kLargestLog = 58;
    static constexpr int kColumns = 32 * CHUNKS;

    const BackwardArguments<T>& arguments;
    const Shape<Real> shape;
    const int warp, lane, thread, threads;
    const int i0;  // the warp's first row
    int n, m;
    Real unit, damp_x, damp_y;  // unit = eps ln 2
    BackwardMemory<Real> s;

    // Each phase makes an object of its own, so that none keeps registers through another one.
    __device__ __forceinline__ Adjoint(const BackwardArguments<T>& given, char* memory)
        : arguments(given),
          shape(opaque(given.N), opaque(given.M), kBackwardWarps),
          warp(opaque(warp_index())),
          lane(opaque(lane_index())),
          thread(32 * warp + lane),
          threads(static_cast<int>(blockDim.x)),
          i0(warp * kRows) {
        s.carve(memory, shape);
        n = given.x_lengths ? given.x_lengths(problem()) : given.N;
        m = given.y_lengths ? given.y_lengths(problem()) : given.M;
        const Real eps = given.eps(problem());
        unit = eps * static_cast<Real>(kLn2);
        damp_x = given.balanced_x ? Real(1) : given.rho_x / (given.rho_x + eps);
        damp_y = given.balanced_y ? Real(1) : given.rho_y / (given.rho_y + eps);
    }

    __device__ __forceinline__ Adjoint again() const { return Adjoint(arguments, reinterpret_cast<char*>(s.c)); }

    // Cheaper to read again than to keep.
    __device__ __forceinline__ int64_t problem() const { return opaque(static_cast<int>(blockIdx.x)); }
    __device__ __forceinline__ bool fits_registers() const { return n <= shape.warps * kRows && m <= kColumns; }

    // Potentials after iteration k (from zero), not yet in units of eps ln 2.
    __device__ __forceinline__ Real f_after(int k, int i) const {
        return k >= 0 && i < n ? arguments.f_history(problem(), k, i) : Real(0);
    }
    __device__ __forceinline__ Real g_after(int k, int j) const {
        return k >= 0 && j < m ? arguments.g_history(problem(), k, j) : Real(0);
    }

    // body(tile) for the tile of dc at these rows and columns.
    template <typename Body>
    __device__ __forceinline__ void for_tile(Tile& dc, int first, int column, const Body& body) const {
        if constexpr (REGISTERS) {
            body(dc);
        } else {
            Tile tile;
            move(first, column, [&](int r, int q, Real& there) { tile[r][q] = there; });
            body(tile);
            move(first, column, [&](int r, int q, Real& there) { there = tile[r][q]; });
        }
    }

    // body(tile, first column) for all tiles of the group of rows at `first`.
    template <typename Body>
    __device__ __forceinline__ void for_tiles(Tile& dc, int first, const Body& body) const {
        for (int column = 0; column < (REGISTERS ? 1 : m); column += kColumns)
            for_tile(dc, first, column, [&](Tile& tile) { body(tile, column); });
    }

    __device__ __forceinline__ void clear(int first, int column) const {
        move(first, column, [](int, int, Real& there) { there = 0; });
    }

    template <typename Copy>
    __device__ __forceinline__ void move(int first, int column, const Copy& copy) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int q = 0; q < CHUNKS; ++q) {
                const int i = first + r, j = column + lane + 32 * q;
                if (i < n && j < m) copy(r, q, arguments.workspace(problem(), i, j));
            }
    }

    __device__ __forceinline__ static bool untrusted(Real sum) { return !(sum >= 1 / kTrusted && sum <= kTrusted); }

    __device__ __forceinline__ void write_slots(const Real (&columns)[CHUNKS], Real* slots) const {
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q)
            if (lane + 32 * q < shape.columns) slots[warp * shape.columns + lane + 32 * q] = columns[q];
    }

    __device__ __forceinline__ Real column(const Columns& values, int q) const {
        return lane + 32 * q < shape.columns ? values[lane + 32 * q] : Real(0);
    }

    __device__ __forceinline__ void add_rows(const Tile& K, const Real (&factor)[kRows], Real (&sums)[CHUNKS]) const {
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q)
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[q] = fma(factor[r], K[r][q], sums[q]);
    }

    // The sum of the row lane / 4 of the tile times `values`.
    __device__ __forceinline__ Real dot_rows(const Tile& K, const Columns& values) const {
        Real sums[kRows] = {};
#pragma unroll
        for (int q = 0; q < CHUNKS; ++q) {
            const Real value = column(values, q);
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[r] = fma(K[r][q], value, sums[r]);
        }
        return reduce_rows<Sum>(sums, lane);
    }

    __device__ __forceinline__ void read_potentials(int k) const {
        for (int i = thread; i < n; i += threads) s.F()[i] = f_after(k, i) / unit;
        for (int j = thread; j < m; j += threads) s.G()[j] = g_after(k - 1, j) / unit;
        __syncthreads();
    }

    // Offsets and K anew, so that t and s are one, and the parts of t. False if K can't represent them.
    __device__ __forceinline__ bool refresh(Tile& K, int k) const {
        const int lane = opaque(this->lane), i0 = opaque(this->i0), pitch = opaque(shape.pitch);
        read_potentials(k);
        column_lse_parts(s.c, shape, n, m, s.F(), s.slots, s.more_slots);
        __syncthreads();
        for (int j = thread; j < m; j += threads) s.beta()[j] = -column_lse(s.slots, s.more_slots, shape, j);
        __syncthreads();
        Real sums[CHUNKS] = {};
        bool bad = false;
        if (i0 < n) {
            const int i = i0 + lane / 4;
            const Real offset = -row_lse(s.c + i0 * pitch, pitch, m, [&](int j) { return s.G()[j]; }, lane);
            if (lane % 4 == 0) {
                const Real exponent = i < n ? s.F()[i] - offset : Real(0);
                bad = !(exponent <= kLargestLog);
                s.alpha()[i] = offset, s.h()[i] = i < n ? exp2(exponent) : Real(0);
            }
            __syncwarp();
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int q = 0; q < CHUNKS; ++q) {
                    const int row = i0 + r, j = lane + 32 * q;
                    K[r][q] = 0;
                    if (row >= n || j >= m) continue;
                    const Real exponent = (s.beta()[j] + s.alpha().group(i0)[r]) - s.c[row * pitch + j];
                    bad |= !(exponent <= kLargestLog);
                    K[r][q] = exp2_fast(exponent);
                }
            Real h[kRows];
            load_rows(h, s.h().group(i0));
            add_rows(K, h, sums);
        }
        write_slots(sums, s.more_slots);
        return !__syncthreads_or(bad);
    }

    // Iteration k with the K at hand, with h of it and its parts of t; leaves those of the iteration before. False,
    // and nothing changed, if they can't be trusted. f, g: potentials before it, of this thread's row and column.
    __device__ __forceinline__ bool attempt(const Tile& K, Tile& dc, int k, Real f, Real g) const {
        const int lane = opaque(this->lane), i0 = opaque(this->i0), i = i0 + lane / 4, j = opaque(thread);
        bool bad = false;
        if (j < kColumns && j < shape.columns) {
            Real w = 0, p = 0;
            if (j < m) {
                const Real t = add_slots(s.more_slots, shape.columns, j, shape.warps);
                w = exp2(g / unit - s.beta()[j]);
                bad = untrusted(t) || !(w <= kLargest);
                p = (s.dG()[j] + s.extra_j()[j]) * damp_y / t;
                s.t()[j] = t;
            }
            s.w()[j] = w, s.p()[j] = p;
        }
        for (int row = thread; row < n; row += threads) bad |= !(s.h()[row] <= kLargest);
        if (__syncthreads_or(bad)) return false;
        Real with_p = 0, with_w = 1;
        if (i0 < n) with_p = dot_rows(K, s.p()), with_w = dot_rows(K, s.w());
        if (__syncthreads_or(i < n && untrusted(with_w))) return false;

        Real q[kRows] = {}, sums[CHUNKS] = {};
        if (i0 < n) {
            if (lane % 4 == 0) {
                Real value = 0;
                if (i < n) {
                    const Real gradient = s.dF()[i] - s.h()[i] * with_p;
                    value = finish_row(i, gradient, log2(with_w) - s.alpha()[i]) / with_w;
                }
                s.q()[i] = value;
            }
            __syncwarp();
            load_rows(q, s.q().group(i0));
            add_rows(K, q, sums);
        }
        write_slots(sums, s.slots);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) sums[c] = 0;
        if (i0 < n) {
            Real h[kRows];
            load_rows(h, s.h().group(i0));
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                const Real p = column(s.p(), c), w = column(s.w(), c);
#pragma unroll
                for (int r = 0; r < kRows; ++r) dc[r][c] = fma(K[r][c], fma(h[r], p, q[r] * w), dc[r][c]);
            }
            __syncwarp();
            if (lane % 4 == 0) s.h()[i] = i < n && k > 0 ? exp2(f / unit - s.alpha()[i]) : Real(0);
            __syncwarp();
            load_rows(h, s.h().group(i0));
            add_rows(K, h, sums);
        }
        write_slots(sums, s.more_slots);
        __syncthreads();
        if (j < m) {
            finish_column(j, log2(s.t()[j]) - s.beta()[j]);
            s.dG()[j] = -s.w()[j] * add_slots(s.slots, shape.columns, j, shape.warps);
        }
        return true;
    }

    // The row's part in the gradients of log a and of the damping; returns that of the log-sum-exp, damped.
    __device__ __forceinline__ Real finish_row(int i, Real gradient, Real lse) const {
        const Real all = gradient + s.extra_i()[i];
        s.dlog_a()[i] += gradient, s.ddamp_i()[i] -= all * lse;
        s.dF()[i] = s.extra_i()[i] = 0;
        return all * damp_x;
    }
    __device__ __forceinline__ void finish_column(int j, Real lse) const {
        const Real all = s.dG()[j] + s.extra_j()[j];
        s.dlog_b()[j] += s.dG()[j], s.ddamp_j()[j] -= all * lse;
        s.extra_j()[j] = 0;
    }

    // Iteration k in the log domain; t and h hold the logarithms of the sums.
    __device__ __forceinline__ void log_step(Tile& dc, int k) const {
        const int lane = opaque(this->lane), i0 = opaque(this->i0), pitch = opaque(shape.pitch);
        __syncthreads();
        read_potentials(k);
        column_lse_parts(s.c, shape, n, m, s.F(), s.slots, s.more_slots);
        __syncthreads();
        for (int j = thread; j < m; j += threads) {
            s.t()[j] = column_lse(s.slots, s.more_slots, shape, j);
            s.p()[j] = (s.dG()[j] + s.extra_j()[j]) * damp_y;
            finish_column(j, s.t()[j]);
        }
        __syncthreads();
        Real* const slots = s.slots + warp * shape.columns;
        for (int j = lane; j < m; j += 32) slots[j] = 0;
        for (int first = i0; first < n; first += shape.warps * kRows) {
            const int i = first + lane / 4;
            for_tiles(dc, first, [&](Tile& tile, int start) {
                Real sums[kRows] = {};
#pragma unroll
                for (int q = 0; q < CHUNKS; ++q) {
                    const int j = start + lane + 32 * q;
                    if (j >= m) continue;
                    const Real p = s.p()[j], t = s.t()[j];
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        if (first + r >= n) break;
                        const Real part = exp2_fast((s.F().group(first)[r] - s.c[(first + r) * pitch + j]) - t) * p;
                        tile[r][q] += part, sums[r] += part;
                    }
                }
                const Real sum = reduce_rows<Sum>(sums, lane);
                if (i < n && lane % 4 == 0) s.dF()[i] -= sum;
            });
            __syncwarp();
            const Real lse = row_lse(s.c + first * pitch, pitch, m, [&](int j) { return s.G()[j]; }, lane);
            if (i < n && lane % 4 == 0) s.q()[i] = finish_row(i, s.dF()[i], lse), s.h()[i] = lse;
            __syncwarp();
            for_tiles(dc, first, [&](Tile& tile, int start) {
#pragma unroll
                for (int q = 0; q < CHUNKS; ++q) {
                    const int j = start + lane + 32 * q;
                    if (j >= m) continue;
                    const Real G = s.G()[j];
                    Real sum = 0;
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        const int row = first + r;
                        if (row >= n) break;
                        const Real part =
                            exp2_fast((G - s.c[row * pitch + j]) - s.h().group(first)[r]) * s.q().group(first)[r];
                        tile[r][q] += part, sum += part;
                    }
                    slots[j] += sum;
                }
            });
        }
        __syncthreads();
        for (int j = thread; j < m; j += threads) s.dG()[j] = -add_slots(s.slots, shape.columns, j, shape.warps);
        __syncthreads();
    }

    // All iterations, from the last to the first: adds to dc, dlog_a, dlog_b and the gradients of the dampings.
    __device__ __forceinline__ void unroll(Tile& dc) const {
        int k = arguments.iterations(problem()) - 1;
        if constexpr (REGISTERS) {
            const int i = i0 + lane / 4, j = thread;
            Tile K = {};
            bool usable = false;
            Real f_before = f_after(k - 1, i), g_before = g_after(k - 1, j);
            for (; k >= 0; --k) {
                // Read an iteration ahead of their use.
                const Real f = f_before, g = g_before;
                f_before = f_after(k - 2, i), g_before = g_after(k - 2, j);
                for (int tries = usable ? 0 : 1;; ++tries) {
                    if (tries == 1) usable = again().refresh(K, k);
                    if (tries == 2 || !usable) {
                        again().log_step(dc, k);
                        usable = false;
                        break;
                    }
                    if (attempt(K, dc, k, f, g)) break;
                }
            }
        } else {
            for (; k >= 0; --k) log_step(dc, k);
        }
        __syncthreads();
    }
};

}  // namespace sinkhorn
}  // namespace cuda
}  // namespace parrot
