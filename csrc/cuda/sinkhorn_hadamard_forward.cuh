// Forward of Sinkhorn-Hadamard on CUDA, for problems whose costs fit the shared memory of a block (formulas:
// parrot_kernels/ops/sinkhorn_hadamard.py).
//
// Around the iteration (sinkhorn_hadamard_iteration.cuh): the costs before it, the projections and what is written
// after it.
#pragma once

#include "sinkhorn_hadamard_iteration.cuh"

namespace parrot {
namespace cuda {
namespace sinkhorn {

template <typename T, int CHUNKS>
struct Forward : Iteration<T, CHUNKS> {
    using Base = Iteration<T, CHUNKS>;
    using Base::p, Base::shape, Base::warp, Base::lane, Base::thread, Base::threads, Base::n, Base::m;
    using Base::problem, Base::row_potential, Base::column_potential, Base::run_scaling, Base::run_log_domain;
    using Base::unit, Base::damp_x, Base::damp_y, Base::s, Base::done, Base::error, Base::kLargestMass;
    using typename Base::Real, typename Base::Kernel;

    __device__ __forceinline__ Forward(const ForwardArguments<T>& arguments, char* memory) : Base(arguments, memory) {}

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
