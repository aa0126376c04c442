// Products with the kernels of the projections of Sinkhorn-Hadamard, in its backward on CUDA.
//
// The two kernels, P / a and P / b, are made from the costs where they are needed, by all lanes of a warp for a few
// rows and columns at a time. The gradient of a distance goes to the points by their differences.
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

    struct Walks {
        Walk<T> points, direct, hadamard;

        __device__ __forceinline__ void next() { points.next(), direct.next(), hadamard.next(); }
    };
    __device__ __forceinline__ Walks from(int64_t b, int i, int d) const {
        return {{OF_Y ? p.y : p.x, b, i, d},
                {OF_Y ? p.grad_x_to_y : p.grad_y_to_x, b, i, d},
                {OF_Y ? p.grad_y_hadamard : p.grad_x_hadamard, b, i, d}};
    }

    // Feature d + 32 q of point i, where the walks are.
    __device__ __forceinline__ Real at(const Walks& now, int i, int q) const {
        if (!gradient) return factor ? now.points[q] * factor[i] : now.points[q];
        const Real value = now.direct ? now.direct[q] : Real(0);
        return now.hadamard ? fma(now.points[q], now.hadamard[q], value) : value;
    }
    __device__ __forceinline__ Real operator()(int64_t b, int i, int d) const { return at(from(b, i, d), i, 0); }
};

template <typename T, int CHUNKS, bool REGISTERS>
struct Projections : Adjoint<T, CHUNKS, REGISTERS> {
    using Base = Adjoint<T, CHUNKS, REGISTERS>;
    using X = Source<T, false>;
    using Y = Source<T, true>;

    using typename Base::Real;
    using Rows = typename BackwardMemory<Real>::Rows;
    using Base::arguments, Base::shape, Base::warp, Base::lane, Base::thread, Base::threads, Base::i0, Base::n, Base::m;
    using Base::unit, Base::damp_x, Base::damp_y, Base::s, Base::problem, Base::kColumns;
    using typename Base::Tile, typename Base::Columns;
    static constexpr int kSlice = 32;                       // of the inner dimension of a product
    static constexpr int kFeatureWidth = kWidth<Real> / 2;  // of a lane, which may hold its own points as well
    using Product = Real[kRows][kFeatureWidth];

    // Exponents of a kernel: 2^(row_i - c_ij + column_j); without a row the matrix at s.c itself.
    struct Kernel {
        Rows row;
        Columns column;
    };

    __device__ __forceinline__ Projections(const BackwardArguments<T>& given, char* memory) : Base(given, memory) {}

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
            auto point = source.from(problem(), start, first + lane);
            for (int k = 0; k < end; ++k, point.next()) {
                Real left[kRows];
                load_rows(left, slice + k * kRows);
#pragma unroll
                for (int q = 0; q < kFeatureWidth; ++q) {
                    const int d = first + lane + 32 * q;
                    const Real right = d < arguments.features ? source.at(point, start + k, q) : Real(0);
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
};

}  // namespace sinkhorn
}  // namespace cuda
}  // namespace parrot
