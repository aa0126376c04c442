// Backward of Sinkhorn-Hadamard on CUDA, for the problems that its forward takes (formulas: reference/
// sinkhorn_hadamard.py): through the projections (sinkhorn_hadamard_projections.cuh), the iteration
// (sinkhorn_hadamard_adjoint.cuh) and the cost.
#pragma once

#include "sinkhorn_hadamard_projections.cuh"

namespace parrot {
namespace cuda {
namespace sinkhorn {

template <typename T, int CHUNKS, bool REGISTERS>
struct Backward : Projections<T, CHUNKS, REGISTERS> {
    using Base = Projections<T, CHUNKS, REGISTERS>;
    using Base::arguments, Base::shape, Base::warp, Base::lane, Base::thread, Base::threads, Base::i0, Base::n, Base::m;
    using Base::entry, Base::plan, Base::to_x, Base::to_y, Base::x_given, Base::y_given;
    using Base::unit, Base::damp_x, Base::damp_y, Base::s, Base::problem, Base::kColumns;
    using typename Base::Real, typename Base::Rows, typename Base::X, typename Base::Y;
    using typename Base::Tile, typename Base::Columns, typename Base::Kernel;
    static constexpr int kPart = CHUNKS < 2 ? CHUNKS : 2;  // chunks whose products are made together

    __device__ __forceinline__ Backward(const BackwardArguments<T>& given, char* memory) : Base(given, memory) {}

    __device__ __forceinline__ Backward again() const { return Backward(arguments, reinterpret_cast<char*>(s.c)); }

    template <typename Points>
    __device__ __forceinline__ void stage_source(const Points& source, int first, int width, int count, int d0,
                                                 Real* staged) const {
        for (int item = thread; item < width * kFeatures; item += threads) {
            const int i = item / kFeatures, d = item % kFeatures;
            const bool valid = first + i < count && d0 + d < arguments.features;
            staged[d * (width + 4) + i] = valid ? source(problem(), first + i, d0 + d) : Real(0);
        }
    }

    // What reaches log P through kernel_ij <left_i, right_j>, or for the plan through the plan and the transport cost,
    // out of dc, its sums added to those of rows and columns.
    __device__ __forceinline__ void through_kernel(Tile& dc, const Kernel& kernel, bool of_plan, const X& left,
                                                   const Y& right, Rows row_sums, Columns column_sums) const {
        const int lane = opaque(this->lane), i0 = opaque(this->i0), pitch = opaque(shape.pitch);
        const int width = shape.warps * kRows, features = of_plan ? 0 : arguments.features;
        Real *const xs = s.slots, *const ys = s.slots + kFeatures * (width + 4);
        const bool grad_plan = of_plan && arguments.grad_plan;
        const Real spent =
            of_plan && arguments.grad_transport_cost ? arguments.grad_transport_cost(problem()) * unit : Real(0);
        for (int column = 0; column < (REGISTERS ? 1 : m); column += kColumns) {
            Real columns[CHUNKS] = {};
            for (int row = 0; row < (REGISTERS ? 1 : n); row += width) {
                const int first = row + i0;
#pragma unroll
                for (int part = 0; part < CHUNKS; part += kPart) {
                    Real sums[kRows][kPart] = {};
                    for (int d0 = 0; d0 < features; d0 += kFeatures) {
                        __syncthreads();
                        stage_source(left, row, width, n, d0, xs);
                        stage_source(right, column + 32 * part, 32 * kPart, m, d0, ys);
                        __syncthreads();
                        if (first >= n) continue;
                        for (int d = 0; d < kFeatures; ++d) {
                            Real from_left[kRows];
                            load_rows(from_left, xs + d * (width + 4) + i0);
#pragma unroll
                            for (int q = 0; q < kPart; ++q) {
                                const Real from_right = ys[d * (32 * kPart + 4) + lane + 32 * q];
#pragma unroll
                                for (int r = 0; r < kRows; ++r) sums[r][q] = fma(from_left[r], from_right, sums[r][q]);
                            }
                        }
                    }
                    if (first >= n) continue;
                    Real rows[kRows] = {};
                    Base::for_tile(dc, first, column, [&](Tile& tile) {
#pragma unroll
                        for (int q = 0; q < kPart; ++q)
#pragma unroll
                            for (int r = 0; r < kRows; ++r) {
                                const int i = first + r, j = column + lane + 32 * (part + q);
                                if (i >= n || j >= m) continue;
                                Real value = sums[r][q];
                                const Real c = s.c[opaque(i * pitch + j)];
                                if (of_plan) value = spent * c;
                                if (grad_plan) value += arguments.grad_plan(problem(), i, j);
                                value *= exp2_fast((kernel.row.group(first)[r] - c) + kernel.column[j]);
                                tile[r][part + q] -= value, rows[r] += value, columns[part + q] += value;
                            }
                    });
                    const Real sum = reduce_rows<Sum>(rows, lane);
                    if (first + lane / 4 < n && lane % 4 == 0) row_sums[first + lane / 4] += sum;
                }
            }
            __syncthreads();
            Base::write_slots(columns, s.slots);
            __syncthreads();
            for (int j = thread; j < kColumns && column + j < m; j += threads)
                column_sums[column + j] += add_slots(s.slots, shape.columns, j, shape.warps);
            __syncthreads();
        }
    }

    __device__ __forceinline__ void find_costs() const {
        if (arguments.cost == CostKind::matrix) {
            given_costs(arguments.cost_matrix, problem(), n, m, shape, s.c);
        } else {
            if (arguments.cost == CostKind::cosine) find_lengths();
            pairwise_costs(arguments.x, arguments.y, problem(), n, m, arguments.features, arguments.cost, s.h(), s.w(),
                           shape, s.slots, s.c);
        }
        const Real inverse = Real(1) / (arguments.scale(problem()) * unit);
        for (int i = warp; i < n; i += shape.warps)
            for (int j = lane; j < m; j += 32) s.c[i * shape.pitch + j] *= inverse;
    }

    __device__ __forceinline__ void find_lengths() const {
        inverse_lengths(arguments.x, problem(), n, arguments.features, shape.warps, s.h());
        inverse_lengths(arguments.y, problem(), m, arguments.features, shape.warps, s.w());
    }

    // The last potentials: F as stored, G by one more update from it, so that its sums cancel the rounding of F.
    __device__ __forceinline__ void start(Real eps) const {
        __syncthreads();
        read_weights(arguments.a, problem(), n, s.h(), s.alpha());
        read_weights(arguments.b, problem(), m, s.w(), s.last_G());
        for (int i = thread; i < shape.rows; i += threads) {
            s.F()[i] = i < n ? arguments.f(problem(), i) / unit : Real(0);
            s.extra_i()[i] = s.dlog_a()[i] = s.ddamp_i()[i] = s.q()[i] = 0;
            s.dF()[i] = i < n && arguments.grad_f ? arguments.grad_f(problem(), i) * eps : Real(0);
        }
        for (int j = thread; j < m; j += threads) {
            s.extra_j()[j] = s.dlog_b()[j] = s.ddamp_j()[j] = 0;
            s.dG()[j] = arguments.grad_g ? arguments.grad_g(problem(), j) * eps : Real(0);
        }
        __syncthreads();
        column_lse_parts(s.c, shape, n, m, s.F(), s.slots, s.more_slots);
        __syncthreads();
        for (int i = thread; i < n; i += threads) s.alpha()[i] = s.F()[i] - s.alpha()[i];
        for (int j = thread; j < m; j += threads) {
            s.beta()[j] = -damp_y * column_lse(s.slots, s.more_slots, shape, j);
            s.G()[j] = s.last_G()[j] = s.beta()[j] + s.last_G()[j];
        }
        __syncthreads();
    }

    // From dc (of C / eps), the gradient of C as given; puts that over the distances to s.c, its sums along the unit
    // vectors of cosines to q and p. Returns this thread's part of sum_ij dc_ij c_ij.
    __device__ __forceinline__ double finish_costs(Tile& dc, Real eps) const {
        const int lane = opaque(this->lane), i0 = opaque(this->i0), pitch = opaque(shape.pitch);
        const CostKind kind = arguments.cost;
        const Real scale = arguments.scale(problem()), by_eps = 1 / eps, by_scale = 1 / scale;
        const Real direct = arguments.grad_transport_cost ? arguments.grad_transport_cost(problem()) : Real(0);
        double total = 0;  // a sum that cancels
        Real* const slots = s.slots + warp * shape.columns;
        for (int i = thread; i < n; i += threads) s.F()[i] = arguments.f(problem(), i) / unit, s.q()[i] = 0;
        for (int j = lane; j < m; j += 32) slots[j] = 0;
        __syncthreads();
        for (int first = i0; first < n; first += shape.warps * kRows)
            Base::for_tiles(dc, first, [&](Tile& tile, int start) {
                Real rows[kRows] = {};
                if (arguments.deps)
#pragma unroll
                    for (int q = 0; q < CHUNKS; ++q) {
                        const int j = start + lane + 32 * q;
                        Real sum = 0;
#pragma unroll
                        for (int r = 0; r < kRows; ++r)
                            if (first + r < n && j < m) sum = fma(tile[r][q], s.c[(first + r) * pitch + j], sum);
                        total += sum;
                    }
#pragma unroll
                for (int q = 0; q < CHUNKS; ++q) {
                    const int j = start + lane + 32 * q;
                    Real sum = 0;
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        const int i = first + r;
                        if (i >= n || j >= m) continue;
                        Real& c = s.c[opaque(i * pitch + j)];
                        Real gradient = tile[r][q] * by_eps;
                        if (direct != 0) gradient = fma(direct, entry(plan(), i, j), gradient);
                        gradient *= by_scale;
                        if (arguments.dcost_matrix) arguments.dcost_matrix(problem(), i, j) = gradient;
                        const Real raw = c * (unit * scale), part = gradient * raw;
                        rows[r] += part, sum += part;
                        if (kind == CostKind::euclidean) gradient = raw > 0 ? gradient / raw : Real(0);
                        c = kind == CostKind::sqeuclidean ? gradient + gradient : gradient;
                    }
                    if (j < m) slots[j] += sum;
                }
                const Real sum = reduce_rows<Sum>(rows, lane);
                if (first + lane / 4 < n && lane % 4 == 0) s.q()[first + lane / 4] += sum;
            });
        __syncthreads();
        for (int j = thread; j < m; j += threads) s.p()[j] = add_slots(s.slots, shape.columns, j, shape.warps);
        __syncthreads();
        return total;
    }

    __device__ __forceinline__ void write_deps(double through_c, Real eps) const {
        double* const parts = reinterpret_cast<double*>(s.slots);
        through_c = reduce_lanes<Sum>(through_c);
        if (lane == 0) parts[warp] = through_c;
        __syncthreads();
        if (warp != 0) return;
        double sum = 0;
        const double by_x = arguments.balanced_x ? 0 : kLn2 * damp_x / (arguments.rho_x + eps);
        const double by_y = arguments.balanced_y ? 0 : kLn2 * damp_y / (arguments.rho_y + eps);
        for (int i = lane; i < n; i += 32) {
            if (arguments.grad_f) sum += double(arguments.grad_f(problem(), i)) * arguments.f(problem(), i) / eps;
            sum -= by_x * s.ddamp_i()[i];
        }
        for (int j = lane; j < m; j += 32) {
            if (arguments.grad_g) sum += kLn2 * arguments.grad_g(problem(), j) * s.last_G()[j];
            sum -= by_y * s.ddamp_j()[j];
        }
        sum = reduce_lanes<Sum>(sum);
        if (lane != 0) return;
        double total = 0;
        for (int i = 0; i < shape.warps; ++i) total += parts[i];
        arguments.deps(problem()) = static_cast<Real>(sum - kLn2 * total / eps);
    }

    __device__ __forceinline__ void through_iteration_and_cost() const {
        Tile dc = {};
        const Real eps = arguments.eps(problem());
        if constexpr (!REGISTERS)
            for (int first = i0; first < n; first += shape.warps * kRows)
                for (int column = 0; column < m; column += kColumns) Base::clear(first, column);
        if (arguments.unroll) {
            for (int part = 0; part < 3; ++part) {
                const bool of_y = part == 0, of_x = part == 1, of_plan = part == 2;
                if (!(of_y ? y_given() : of_x ? x_given() : arguments.grad_plan || arguments.grad_transport_cost))
                    continue;
                const Backward now = again();
                const auto& memory = now.s;
                const Kernel kernel{of_x ? memory.alpha() : memory.F(), of_y ? memory.beta() : memory.last_G()};
                now.through_kernel(dc, kernel, of_plan, {arguments, of_x, {}}, {arguments, of_y, {}},
                                   of_x ? memory.extra_i() : memory.dF(), of_y ? memory.extra_j() : memory.dG());
            }
            again().unroll(dc);
        }
        const double through_c = again().finish_costs(dc, eps);
        if (arguments.deps && arguments.unroll) write_deps(through_c, eps);
        __syncthreads();
    }

    __device__ __forceinline__ void write_padding(const Array<Real>& out, int first, int size, int width) const {
        if (!out) return;
        for (int i = first + warp; i < size; i += shape.warps)
            for (int d = lane; d < width; d += 32) out(problem(), i, d) = 0;
    }

    // Gradients of weights from those of their logarithms, zero below the floor and in the padding.
    template <typename Vector>
    __device__ __forceinline__ void write_weights(const Array<Real>& out, const Array<const Real>& weights,
                                                  const Vector& of_logarithm, int count, int size) const {
        if (!out) return;
        for (int i = thread; i < size; i += threads) {
            const Real weight = i < count && arguments.unroll ? weights(problem(), i) : Real(0);
            out(problem(), i) = weight >= Limits<Real>::tiny ? of_logarithm[i] / weight : Real(0);
        }
    }

    // What no other code writes.
    __device__ __forceinline__ void write_rest(bool empty) const {
        const int rows = empty ? 0 : n, columns = empty ? 0 : m;
        write_padding(arguments.dx, rows, arguments.N, arguments.features);
        write_padding(arguments.dy, columns, arguments.M, arguments.features);
        write_weights(arguments.da, arguments.a, s.dlog_a(), rows, arguments.N);
        write_weights(arguments.db, arguments.b, s.dlog_b(), columns, arguments.M);
        if (thread == 0 && arguments.deps && (empty || !arguments.unroll)) arguments.deps(problem()) = 0;
        if (!arguments.dcost_matrix) return;
        const int filled = arguments.through_cost ? rows : 0;
        write_padding(arguments.dcost_matrix, filled, arguments.N, arguments.M);
        for (int i = warp; i < filled; i += shape.warps)
            for (int j = columns + lane; j < arguments.M; j += 32) arguments.dcost_matrix(problem(), i, j) = 0;
    }

    // Before and after that: what does not depend on where dc is.
    __device__ __forceinline__ void begin() const {
        find_costs();
        start(arguments.eps(problem()));
        if (arguments.dx)
            again().template through_projections<true>(arguments.dx, n, m, arguments.grad_x_hadamard, to_x(), y_given(),
                                                       to_y());
        if (arguments.dy)
            again().template through_projections<false>(arguments.dy, m, n, arguments.grad_y_hadamard, to_y(),
                                                        x_given(), to_x());
        __syncthreads();
    }

    __device__ __forceinline__ void end() const {
        if (arguments.through_cost && arguments.cost != CostKind::matrix) {
            const bool cosine = arguments.cost == CostKind::cosine;
            if (cosine) find_lengths();
            __syncthreads();
            const X x = this->x_points(cosine ? s.h() : Rows{});
            const Y y = this->y_points(cosine ? s.w() : Columns{});
            if (arguments.dx) this->template through_distances<true>(arguments.dx, n, m, x, y, s.h(), s.q());
            if (arguments.dy) this->template through_distances<false>(arguments.dy, m, n, y, x, s.w(), s.p());
        }
        write_rest(false);
    }
};

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(32 * kBackwardWarps, 1)
    backward_kernel(const __grid_constant__ BackwardArguments<T> arguments) {
    PARROT_DYNAMIC_SHARED(memory);
    using Block = Backward<T, CHUNKS, true>;
    const Block first(arguments, memory);
    if (first.n == 0 || first.m == 0) return first.write_rest(true);
    first.begin();
    if (arguments.through_cost) {
        // Which way it goes depends on the valid rows and columns alone.
        const Block block(arguments, memory);
        if (block.fits_registers())
            block.through_iteration_and_cost();
        else
            Backward<T, 1, false>(arguments, memory).through_iteration_and_cost();
    }
    Block(arguments, memory).end();
}

template <typename T, int CHUNKS>
const char* launch_backward(const BackwardArguments<T>& arguments, int64_t batch, void* stream) {
    const Shape<Compute<T>> shape(arguments.N, arguments.M, kBackwardWarps);
    const size_t bytes = BackwardMemory<Compute<T>>().carve(nullptr, shape);
    auto* const kernel = backward_kernel<T, CHUNKS>;
    if (const char* failure = allow_shared_memory(kernel, bytes)) return failure;
    PARROT_LAUNCH_SHARED(kernel, dim3(static_cast<unsigned>(batch)), 32 * shape.warps, bytes, stream, arguments);
    return last_launch_error();
}

template <typename T>
const char* backward(const SinkhornHadamardBackward& params) {
    using Real = Compute<T>;
    BackwardArguments<T> p;
    p.x = Array<const T>(params.x), p.y = Array<const T>(params.y);
    p.a = Array<const Real>(params.a), p.b = Array<const Real>(params.b);
    p.cost_matrix = Array<const Real>(params.cost_matrix), p.eps = Array<const Real>(params.eps);
    p.x_lengths = Array<const int32_t>(params.x_lengths), p.y_lengths = Array<const int32_t>(params.y_lengths);
    p.f = Array<const Real>(params.f), p.g = Array<const Real>(params.g), p.scale = Array<const Real>(params.scale);
    p.iterations = Array<const int32_t>(params.iterations);
    p.f_history = Array<const Real>(params.f_history), p.g_history = Array<const Real>(params.g_history);
    p.grad_x_to_y = Array<const T>(params.grad_x_to_y), p.grad_y_to_x = Array<const T>(params.grad_y_to_x);
    p.grad_x_hadamard = Array<const T>(params.grad_x_hadamard);
    p.grad_y_hadamard = Array<const T>(params.grad_y_hadamard);
    p.grad_x_copy = Array<const T>(params.grad_x_copy), p.grad_y_copy = Array<const T>(params.grad_y_copy);
    p.grad_paired_hadamard = Array<const T>(params.grad_paired_hadamard);
    p.grad_f = Array<const Real>(params.grad_f), p.grad_g = Array<const Real>(params.grad_g);
    p.grad_plan = Array<const Real>(params.grad_plan);
    p.grad_transport_cost = Array<const Real>(params.grad_transport_cost);
    p.dx = Array<Real>(params.dx), p.dy = Array<Real>(params.dy), p.dcost_matrix = Array<Real>(params.dcost_matrix);
    p.da = Array<Real>(params.da), p.db = Array<Real>(params.db), p.deps = Array<Real>(params.deps);
    p.workspace = Array<Real>(params.workspace);
    p.cost = params.cost;
    p.N = static_cast<int>(params.x.size[1]), p.M = static_cast<int>(params.y.size[1]);
    p.features = static_cast<int>(params.x.size[2]);
    constexpr double infinity = std::numeric_limits<double>::infinity();
    p.balanced_x = params.rho_x == infinity, p.balanced_y = params.rho_y == infinity;
    p.rho_x = static_cast<Real>(params.rho_x), p.rho_y = static_cast<Real>(params.rho_y);
    const bool cost_wanted = params.dcost_matrix || (params.cost != CostKind::matrix && (params.dx || params.dy));
    p.unroll = params.unrolled && (cost_wanted || params.da || params.db || params.deps);
    p.through_cost = p.unroll || (cost_wanted && params.grad_transport_cost);

    const int64_t batch = params.x.size[0];
    if (batch == 0) return nullptr;
    if (p.M <= 32) return launch_backward<T, 1>(p, batch, params.stream);
    if (p.M <= 64) return launch_backward<T, 2>(p, batch, params.stream);
    return launch_backward<T, kBackwardChunks<Real>>(p, batch, params.stream);
}

}  // namespace sinkhorn
}  // namespace cuda
}  // namespace parrot
