// Backward of Sinkhorn-Hadamard on CUDA, for the problems that its forward takes (formulas: reference/
// sinkhorn_hadamard.py): through the projections, the iteration (sinkhorn_hadamard_adjoint.cuh) and the cost.
//
// The two kernels of the projections, P / a and P / b, are made from the costs where they are needed, by all lanes of
// a warp for a few rows and columns at a time. The gradient of a distance goes to the points by their differences.
#pragma once

#include "sinkhorn_hadamard_adjoint.cuh"

namespace parrot {
namespace cuda {
namespace sinkhorn {

// Points of y (else x), times a factor each; or the gradient of what was transported to them: direct + points *
// hadamard.
template <typename T, bool OF_Y>
struct Source {
    using Real = Compute<T>;
    using Vector =
        std::conditional_t<OF_Y, typename BackwardMemory<Real>::Columns, typename BackwardMemory<Real>::Rows>;
    const BackwardArguments<T>& p;
    bool gradient;
    Vector factor;  // or none

    __device__ __forceinline__ Real operator()(int64_t b, int i, int d) const {
        const Array<const T>&points = OF_Y ? p.y : p.x, &direct = OF_Y ? p.grad_x_to_y : p.grad_y_to_x,
                          &hadamard = OF_Y ? p.grad_y_hadamard : p.grad_x_hadamard;
        if (!gradient) {
            const Real value = to_compute(points(b, i, d));
            return factor ? value * factor[i] : value;
        }
        Real value = direct ? to_compute(direct(b, i, d)) : Real(0);
        if (hadamard) value = fma(to_compute(points(b, i, d)), to_compute(hadamard(b, i, d)), value);
        return value;
    }
};

template <typename T, int CHUNKS, bool REGISTERS>
struct Backward : Adjoint<T, CHUNKS, REGISTERS> {
    using Base = Adjoint<T, CHUNKS, REGISTERS>;
    using X = Source<T, false>;
    using Y = Source<T, true>;

    using typename Base::Real;
    using Rows = typename BackwardMemory<Real>::Rows;
    using Base::arguments, Base::shape, Base::warp, Base::lane, Base::thread, Base::threads, Base::i0, Base::n, Base::m;
    using Base::unit, Base::damp_x, Base::damp_y, Base::s, Base::problem, Base::kColumns;
    using typename Base::Tile, typename Base::Columns;
    static constexpr int kPart = CHUNKS < 2 ? CHUNKS : 2;   // chunks whose products are made together
    static constexpr int kSlice = 32;                       // of the inner dimension of a product
    static constexpr int kFeatureWidth = kWidth<Real> / 2;  // of a lane, which may hold its own points as well
    using Product = Real[kRows][kFeatureWidth];

    // Exponents of a kernel: 2^(row_i - c_ij + column_j); without a row the matrix at s.c itself.
    struct Kernel {
        Rows row;
        Columns column;
    };

    __device__ __forceinline__ Backward(const BackwardArguments<T>& given, char* memory) : Base(given, memory) {}

    __device__ __forceinline__ Backward again() const { return Backward(arguments, reinterpret_cast<char*>(s.c)); }

    __device__ __forceinline__ Kernel to_x() const { return {s.alpha(), s.G()}; }  // P / a
    __device__ __forceinline__ Kernel to_y() const { return {s.F(), s.beta()}; }   // P / b
    __device__ __forceinline__ Kernel plan() const { return {s.F(), s.last_G()}; }
    __device__ __forceinline__ Real entry(const Kernel& kernel, int i, int j) const {
        const Real c = s.c[i * shape.pitch + j];
        return kernel.row ? exp2_fast((kernel.row[i] - c) + kernel.column[j]) : c;
    }

    __device__ __forceinline__ bool x_given() const { return arguments.grad_y_to_x || arguments.grad_x_hadamard; }
    __device__ __forceinline__ bool y_given() const { return arguments.grad_x_to_y || arguments.grad_y_hadamard; }
    __device__ __forceinline__ X x_points(Rows factor = {}) const { return {arguments, false, factor}; }
    __device__ __forceinline__ Y y_points(Columns factor = {}) const { return {arguments, false, factor}; }

    // sums[r][q] += sum_k kernel_rk source_k,d, d = first + lane + 32 q, for a group of rows (BY_ROWS) or columns; with
    // DIFFERENCES of (own_rd - source_kd).
    template <bool BY_ROWS, bool DIFFERENCES, typename Points>
    __device__ __forceinline__ void multiply_kernel(const Kernel& kernel, int group, int count, int inner,
                                                    const Points& source, int first, const Product& own,
                                                    Product& sums) const {
        const int lane = opaque(this->lane);
        Real* const slice = s.slots + warp * kRows * kSlice;
        for (int start = 0; start < inner; start += kSlice) {
            __syncwarp();
            for (int item = lane; item < kRows * kSlice; item += 32) {
                const int r = BY_ROWS ? item / kSlice : item % kRows, k = BY_ROWS ? item % kSlice : item / kRows;
                const bool valid = group + r < count && start + k < inner;
                const int i = BY_ROWS ? group + r : start + k, j = BY_ROWS ? start + k : group + r;
                slice[k * kRows + r] = valid ? entry(kernel, i, j) : Real(0);
            }
            __syncwarp();
            const int end = inner - start < kSlice ? inner - start : kSlice;
            for (int k = 0; k < end; ++k) {
                Real left[kRows];
                load_rows(left, slice + k * kRows);
#pragma unroll
                for (int q = 0; q < kFeatureWidth; ++q) {
                    const int d = first + lane + 32 * q;
                    const Real right = d < arguments.features ? source(problem(), start + k, d) : Real(0);
#pragma unroll
                    for (int r = 0; r < kRows; ++r)
                        sums[r][q] = fma(left[r], DIFFERENCES ? own[r][q] - right : right, sums[r][q]);
                }
            }
        }
    }

    // body(first of a group of rows or columns, first feature) for this warp's part of the points of one side.
    template <typename Body>
    __device__ __forceinline__ void for_points(int count, const Body& body) const {
        const int step = 32 * kFeatureWidth, blocks = (arguments.features + step - 1) / step;
        const int groups = (count + kRows - 1) / kRows;
        for (int task = warp; task < groups * blocks; task += shape.warps)
            body(task / blocks * kRows, task % blocks * step);
    }

    // The gradients of the points that the plan multiplies: hadamard * (kernel points) + other kernel * gradients.
    template <bool BY_ROWS>
    __device__ __forceinline__ void through_projections(const Array<Real>& out, int count, int inner,
                                                        const Array<const T>& hadamard, const Kernel& of_points,
                                                        bool given, const Kernel& of_gradients) const {
        for_points(count, [&](int group, int first) {
            Product sums = {};
            for (int term = hadamard ? 0 : 1; term < (given ? 2 : 1); ++term) {
                const bool leading = term == 0;
                const Source<T, BY_ROWS> source{arguments, !leading, {}};
                const Kernel kernel{leading ? of_points.row : of_gradients.row,
                                    leading ? of_points.column : of_gradients.column};
                multiply_kernel<BY_ROWS, false>(kernel, group, count, inner, source, first, sums, sums);
                if (leading)
                    for_outputs(group, count, first, [&](int r, int q, int i, int d) {
                        sums[r][q] *= to_compute(hadamard(problem(), i, d));
                    });
            }
            for_outputs(group, count, first, [&](int r, int q, int i, int d) {
                out(problem(), i, d) = sums[r][q] + beside_transport<BY_ROWS>(i, d);
            });
        });
    }

    // The gradient of a point from the parts of a fused row in which nothing is transported.
    template <bool BY_ROWS>
    __device__ __forceinline__ Real beside_transport(int i, int d) const {
        const Array<const T>&copy = BY_ROWS ? arguments.grad_x_copy : arguments.grad_y_copy,
                          &paired = arguments.grad_paired_hadamard, &partner = BY_ROWS ? arguments.y : arguments.x;
        Real value = copy ? to_compute(copy(problem(), i, d)) : Real(0);
        if (paired) value = fma(to_compute(paired(problem(), i, d)), to_compute(partner(problem(), i, d)), value);
        return value;
    }

    template <typename Body>
    __device__ __forceinline__ void for_outputs(int group, int count, int first, const Body& body) const {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int q = 0; q < kFeatureWidth; ++q) {
                const int d = first + lane + 32 * q;
                if (group + r < count && d < arguments.features) body(r, q, group + r, d);
            }
    }

    // The gradients of the points through the cost, from the matrix at s.c; `lengths` (inverse) and `along` (the
    // gradient along the unit vectors) for cosine.
    template <bool BY_ROWS, typename Mine, typename Others, typename Vector>
    __device__ __forceinline__ void through_distances(const Array<Real>& out, int count, int inner, const Mine& mine,
                                                      const Others& others, const Vector& lengths,
                                                      const Vector& along) const {
        const bool cosine = arguments.cost == CostKind::cosine;
        for_points(count, [&](int group, int first) {
            Product own = {}, sums = {};
            for_outputs(group, count, first, [&](int r, int q, int i, int d) { own[r][q] = mine(problem(), i, d); });
            multiply_kernel<BY_ROWS, true>(Kernel{}, group, count, inner, others, first, own, sums);
            for_outputs(group, count, first, [&](int r, int q, int i, int d) {
                const Real value = cosine ? (sums[r][q] - along[i] * own[r][q]) * lengths[i] : sums[r][q];
                out(problem(), i, d) += value;
            });
        });
    }

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
            const X x = x_points(cosine ? s.h() : Rows{});
            const Y y = y_points(cosine ? s.w() : Columns{});
            if (arguments.dx) through_distances<true>(arguments.dx, n, m, x, y, s.h(), s.q());
            if (arguments.dy) through_distances<false>(arguments.dy, m, n, y, x, s.w(), s.p());
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
