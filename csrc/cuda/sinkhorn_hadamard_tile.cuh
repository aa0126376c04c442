// What the forward and the backward of Sinkhorn-Hadamard share: one block per problem, its costs in shared memory.
//
// Rows go in groups of kRows to the warps in turn, columns to the lanes: column j belongs to lane j % 32. Which thread
// adds what in which order depends on the index of the row and the column alone, and what padding adds is zero: no
// result depends on the size that a problem is padded to.
//
// Inside, everything is in units of eps ln 2, so that exponentials are bare powers of two: c = C / (eps ln 2), and the
// potentials F, G likewise.
#pragma once

#include "common.cuh"
#include "sinkhorn_hadamard.h"

namespace parrot {
namespace cuda {
namespace sinkhorn {

constexpr int kRows = 8;  // of a group; four lanes hold the sum of one of them
constexpr int kLeastWarps = 4;
template <typename Real>
constexpr int kMostWarps = sizeof(Real) == 8 ? 8 : 16;  // so many that a thread has the registers it needs
constexpr int kBackwardWarps = 8;                       // likewise: it holds two matrices
template <typename Real>
constexpr int kBackwardChunks = sizeof(Real) == 8 ? 2 : 4;  // of 32 columns, in registers
constexpr int kFeatures = 16;                               // staged at a time for the costs
constexpr int kStagedColumns = 128;                         // likewise
constexpr int kStagedChunks = kStagedColumns / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kLeastScale = 1e-8;  // below it all points of a problem count as equal
constexpr double kConverged = 1e-3;   // error up to which a problem counts as converged when no tolerance is asked for

// A strided tensor of at most three dimensions, the first of them the batch.
template <typename T>
struct Array {
    T* data = nullptr;
    int64_t stride[3] = {};

    Array() = default;
    explicit Array(const TensorView& view) : data(static_cast<T*>(view.data)) {
        for (int i = 0; i < 3 && i < view.ndim; ++i) stride[i] = view.stride[i];
    }
    __host__ __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
    __device__ __forceinline__ T& operator()(int64_t b, int64_t i = 0, int64_t j = 0) const {
        return data[b * stride[0] + i * stride[1] + j * stride[2]];
    }
};

template <typename Real>
struct Limits;
template <>
struct Limits<float> {
    static constexpr float tiny = 1.17549435e-38f;
};
template <>
struct Limits<double> {
    static constexpr double tiny = 2.2250738585072014e-308;
};

template <typename Real>
struct Shape {
    int rows, pitch, columns, warps;  // N and M rounded up to groups of rows, M also to whole warps

    __host__ __device__ Shape(int64_t N, int64_t M, int most_warps = kMostWarps<Real>) {
        rows = static_cast<int>((N + kRows - 1) / kRows * kRows);
        pitch = static_cast<int>((M + 7) / 8 * 8);
        columns = static_cast<int>((M + 31) / 32 * 32);
        const int groups = rows / kRows;
        warps = groups < kLeastWarps ? kLeastWarps : groups < most_warps ? groups : most_warps;
    }
    __host__ __device__ __forceinline__ int staging() const {
        return kFeatures * (warps * kRows + 4 + kStagedColumns + 4);
    }
};

// Hands out pieces of shared memory, or counts them.
struct Carver {
    char* memory;
    size_t used = 0;

    // Multiples of four elements keep all pieces on boundaries of 16 bytes.
    template <typename Real>
    __host__ __device__ Real* take(int count) {
        Real* piece = reinterpret_cast<Real*>(memory + used);
        used += static_cast<size_t>(count) * sizeof(Real);
        return piece;
    }
};

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

struct Sum {
    template <typename Real>
    __device__ __forceinline__ Real operator()(Real a, Real b) const {
        return a + b;
    }
};
struct Largest {
    template <typename Real>
    __device__ __forceinline__ Real operator()(Real a, Real b) const {
        return a > b ? a : b;
    }
};

template <typename Operation, typename Real>
__device__ __forceinline__ Real reduce_lanes(Real value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value = Operation{}(value, __shfl_xor_sync(kAllLanes, value, mask));
    return value;
}

// Each of the values over all lanes; lane l gets that of number l / 4.
template <typename Operation, typename Real>
__device__ __forceinline__ Real reduce_rows(Real (&values)[kRows], int lane) {
#pragma unroll
    for (int half = kRows / 2, mask = 16; half > 0; half /= 2, mask /= 2) {
        const bool upper = lane & mask;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const Real give = upper ? values[i] : values[i + half], keep = upper ? values[i + half] : values[i];
            values[i] = Operation{}(keep, __shfl_xor_sync(kAllLanes, give, mask));
        }
    }
#pragma unroll
    for (int mask = 2; mask > 0; mask /= 2)
        values[0] = Operation{}(values[0], __shfl_xor_sync(kAllLanes, values[0], mask));
    return values[0];
}

// Eight neighbours of shared memory, on a boundary of 16 bytes.
__device__ __forceinline__ void load_rows(float (&out)[kRows], const float* from) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}
__device__ __forceinline__ void load_rows(double (&out)[kRows], const double* from) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) out[i] = from[i];
}

// What the warps found for one column, added in an order that does not depend on how many warps there are.
template <typename Real>
__device__ __forceinline__ Real add_slots(const Real* slots, int columns, int j, int warps) {
    Real sum[4] = {};
    for (int slot = 0; slot < warps; slot += 4)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (slot + i < warps) sum[i] += slots[(slot + i) * columns + j];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The block's largest value; `scratch` holds one number per warp.
template <typename Real>
__device__ __forceinline__ Real largest_of_block(Real value, Real* scratch, int warps) {
    value = reduce_lanes<Largest>(value);
    __syncthreads();
    if (lane_index() == 0) scratch[warp_index()] = value;
    __syncthreads();
    Real largest = scratch[0];
    for (int warp = 1; warp < warps; ++warp) largest = Largest{}(largest, scratch[warp]);
    __syncthreads();
    return largest;
}

// Weights with their floor, and their logarithms.
template <typename Real, typename Vector>
__device__ __forceinline__ void read_weights(const Array<const Real>& given, int64_t b, int count,
                                             const Vector& weights, const Vector& logs) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
        Real weight = given ? given(b, i) : Real(1) / static_cast<Real>(count);
        if (weight < Limits<Real>::tiny) weight = Limits<Real>::tiny;
        weights[i] = weight, logs[i] = log2(weight);
    }
}

// log2 sum_j 2^(potential(j) - c_ij) of row lane / 4 of the group that `c` points to.
template <typename Real, typename Potential>
__device__ __forceinline__ Real row_lse(const Real* c, int pitch, int m, const Potential& potential, int lane) {
    Real values[kRows], shift[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = -static_cast<Real>(INFINITY);
#pragma unroll 1
    for (int j = lane; j < m; j += 32) {
        const Real g = potential(j);
#pragma unroll
        for (int r = 0; r < kRows; ++r) values[r] = Largest{}(g - c[r * pitch + j], values[r]);
    }
    const Real largest = reduce_rows<Largest>(values, lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r) shift[r] = __shfl_sync(kAllLanes, largest, 4 * r), values[r] = 0;
#pragma unroll 1
    for (int j = lane; j < m; j += 32) {
        const Real g = potential(j);
#pragma unroll
        for (int r = 0; r < kRows; ++r) values[r] += exp2_fast((g - c[r * pitch + j]) - shift[r]);
    }
    return largest + log2(reduce_rows<Sum>(values, lane));
}

// Of the warp's rows, for each column: the largest F_i - c_ij, and the sum of the powers of the rest.
template <typename Real, typename Vector>
__device__ __forceinline__ void column_lse_parts(const Real* c, const Shape<Real>& shape, int n, int m, const Vector& F,
                                                 Real* largest_slots, Real* sum_slots) {
    const int warp = warp_index(), step = shape.warps * kRows;
#pragma unroll 1
    for (int j = lane_index(); j < m; j += 32) {
        Real largest = -static_cast<Real>(INFINITY), sum = 0;
        for (int first = warp * kRows; first < n; first += step)
            for (int i = first; i < first + kRows && i < n; ++i)
                largest = Largest{}(F[i] - c[i * shape.pitch + j], largest);
        for (int first = warp * kRows; first < n; first += step)
            for (int i = first; i < first + kRows && i < n; ++i)
                sum += exp2_fast((F[i] - c[i * shape.pitch + j]) - largest);
        largest_slots[warp * shape.columns + j] = largest, sum_slots[warp * shape.columns + j] = sum;
    }
}

template <typename Real>
__device__ __forceinline__ Real column_lse(const Real* largest_slots, const Real* sum_slots, const Shape<Real>& shape,
                                           int j) {
    Real largest = largest_slots[j], sum = 0;
    for (int slot = 1; slot < shape.warps; ++slot)
        largest = Largest{}(largest_slots[slot * shape.columns + j], largest);
    for (int slot = 0; slot < shape.warps; ++slot)
        sum += sum_slots[slot * shape.columns + j] * exp2_fast(largest_slots[slot * shape.columns + j] - largest);
    return largest + log2(sum);
}

// 1 / |point| of each row, zero for a vector of length zero.
template <typename T, typename Vector>
__device__ __forceinline__ void inverse_lengths(const Array<const T>& points, int64_t b, int count, int features,
                                                int warps, const Vector& out) {
    using Real = Compute<T>;
    for (int i = warp_index(); i < count; i += warps) {
        Real sum = 0;
        for (int d = lane_index(); d < features; d += 32) {
            const Real value = to_compute(points(b, i, d));
            sum += value * value;
        }
        sum = reduce_lanes<Sum>(sum);
        if (lane_index() == 0) out[i] = sum > 0 ? Real(1) / sqrt(sum) : Real(0);
    }
}

// Rows [first, first + kFeatures of each) of points into shared memory, transposed, as zeros past the end.
template <typename T, typename Vector>
__device__ __forceinline__ void stage(const Array<const T>& points, int64_t b, int first, int width, int count, int d0,
                                      int features, const Vector& factor, Compute<T>* staged) {
    for (int item = static_cast<int>(threadIdx.x); item < width * kFeatures; item += static_cast<int>(blockDim.x)) {
        const int i = item / kFeatures, d = item % kFeatures;
        Compute<T> value = 0;
        if (first + i < count && d0 + d < features) {
            value = to_compute(points(b, first + i, d0 + d));
            if (factor) value *= factor[first + i];
        }
        staged[d * (width + 4) + i] = value;
    }
}

// The costs of all valid pairs, not scaled, by differences of the points (for cosine of the unit vectors, 1 - cos =
// |x - y|^2 / 2): a product |x|^2 + |y|^2 - 2 <x, y> would cancel for points that are near each other. Returns this
// thread's largest one. x_length, y_length: inverse lengths of the points, for cosine.
template <typename T, typename Rows, typename Columns>
__device__ __forceinline__ Compute<T> pairwise_costs(const Array<const T>& x, const Array<const T>& y, int64_t b, int n,
                                                     int m, int features, CostKind kind, const Rows& x_length,
                                                     const Columns& y_length, const Shape<Compute<T>>& shape,
                                                     Compute<T>* staging, Compute<T>* c) {
    using Real = Compute<T>;
    const int lane = lane_index(), warp = warp_index(), width = shape.warps * kRows;
    const bool cosine = kind == CostKind::cosine;
    Real *const xs = staging, *const ys = staging + kFeatures * (width + 4), largest = 0;
    for (int column = 0; column < m; column += kStagedColumns) {
        for (int row = 0; row < n; row += width) {
            const int i0 = row + warp * kRows;
            Real sums[kRows][kStagedChunks] = {};
            for (int d0 = 0; d0 < features; d0 += kFeatures) {
                __syncthreads();
                stage(x, b, row, width, n, d0, features, cosine ? x_length : Rows{}, xs);
                stage(y, b, column, kStagedColumns, m, d0, features, cosine ? y_length : Columns{}, ys);
                __syncthreads();
                if (i0 >= n) continue;
                for (int d = 0; d < kFeatures; ++d) {
                    Real left[kRows];
                    load_rows(left, xs + d * (width + 4) + warp * kRows);
#pragma unroll
                    for (int q = 0; q < kStagedChunks; ++q) {
                        if (column + 32 * q >= m) break;
                        const Real right = ys[d * (kStagedColumns + 4) + lane + 32 * q];
#pragma unroll
                        for (int r = 0; r < kRows; ++r) {
                            const Real difference = left[r] - right;
                            sums[r][q] = fma(difference, difference, sums[r][q]);
                        }
                    }
                }
            }
#pragma unroll
            for (int q = 0; q < kStagedChunks; ++q) {
                const int j = column + lane + 32 * q;
                if (j >= m) break;
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    if (i0 + r >= n) break;
                    Real value = sums[r][q];
                    if (kind == CostKind::euclidean) value = sqrt(value);
                    if (cosine) {  // the cosine with a zero vector is zero
                        const int zeros = (x_length[i0 + r] == 0) + (y_length[j] == 0);
                        value = Real(0.5) * (value + static_cast<Real>(zeros));
                    }
                    c[(i0 + r) * shape.pitch + j] = value;
                    largest = Largest{}(value, largest);
                }
            }
        }
    }
    __syncthreads();
    return largest;
}

// The same from a given matrix.
template <typename Real>
__device__ __forceinline__ Real given_costs(const Array<const Real>& matrix, int64_t b, int n, int m,
                                            const Shape<Real>& shape, Real* c) {
    Real largest = 0;
    for (int i = warp_index(); i < n; i += shape.warps)
        for (int j = lane_index(); j < m; j += 32) {
            const Real value = matrix(b, i, j);
            c[i * shape.pitch + j] = value;
            largest = Largest{}(value, largest);
        }
    __syncthreads();
    return largest;
}

// This lane's features of the points from `i` on, one point after the other: pointers that move, as addresses made anew
// for each would take more instructions than the products.
template <typename T>
struct Walk {
    const T* now = nullptr;
    int64_t by_point = 0, by_lanes = 0;

    __device__ __forceinline__ Walk(const Array<const T>& points, int64_t b, int i, int d) {
        if (points) now = &points(b, i, d), by_point = points.stride[1], by_lanes = 32 * points.stride[2];
    }
    __device__ __forceinline__ explicit operator bool() const { return now != nullptr; }
    __device__ __forceinline__ Compute<T> operator[](int q) const { return to_compute(now[q * by_lanes]); }
    __device__ __forceinline__ void next() { now += by_point; }
};

// A block of a product with a matrix in shared memory: sums[r][q] = sum_k left_rk points_k,d, d = first + lane + 32 q.
// BY_ROWS: left_rk = kernel[r][k] w_k, else kernel[k][r] w_k; `kernel` points to the first row (column) of a group.
template <bool BY_ROWS, typename T, int WIDTH>
__device__ __forceinline__ void multiply(const Compute<T>* kernel, int pitch, int count, const Compute<T>* w,
                                         const Array<const T>& points, int64_t b, int first, int features,
                                         Compute<T> (&sums)[kRows][WIDTH]) {
    using Real = Compute<T>;
    Walk<T> point(points, b, 0, first + lane_index());
    for (int k = 0; k < count; ++k, point.next()) {
        Real left[kRows];
        if constexpr (BY_ROWS) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) left[r] = kernel[r * pitch + k];
        } else {
            load_rows(left, kernel + k * pitch);
        }
        const Real factor = w ? w[k] : Real(1);
#pragma unroll
        for (int q = 0; q < WIDTH; ++q) {
            const int d = first + lane_index() + 32 * q;
            const Real right = d < features ? point[q] * factor : Real(0);
#pragma unroll
            for (int r = 0; r < kRows; ++r) sums[r][q] = fma(left[r], right, sums[r][q]);
        }
    }
}

// Features that a lane of `multiply` holds.
template <typename Real>
constexpr int kWidth = sizeof(Real) == 8 ? 2 : 4;

}  // namespace sinkhorn
}  // namespace cuda
}  // namespace parrot
