// Costs between two sets of points: |x - y|^2, |x - y| or 1 - cos.
//
// By one matrix product, C = |x|^2 + |y|^2 - 2 <x, y> about a common centre, except where C is small against its first
// two terms and rounding would show: there by differences of the points as given. The choice is made entry by entry
// and depends on the problem alone.
#pragma once

#include "matmul.h"
#include "parallel.h"
#include "sinkhorn_hadamard.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T>
struct PairwiseCost {
    // C below this part of |x|^2 + |y|^2 is computed by differences.
    static constexpr T kCancels = T(0.25);
    static constexpr int64_t kFewFeatures = 16;  // up to here always by differences

    CostKind kind;
    int64_t n, m, features;
    int64_t n_pad, m_pad;    // multiples of kLanes
    int64_t feature_stride;  // multiple of kLanes; what lies past `features` is zero
    const T *x, *y;          // (n_pad, feature_stride) and (m_pad, feature_stride), zero past n and m
    T *x_rows, *y_rows;      // the same, centred; for cosine of unit length
    T *x_norms, *y_norms;    // (n_pad), (m_pad)
    T* centre;               // (feature_stride)
    T* y_packed;             // y_rows transposed, in panels

    void carve(Carver& carver) {
        x_rows = carver.take<T>(n_pad * feature_stride);
        y_rows = carver.take<T>(m_pad * feature_stride);
        x_norms = carver.take<T>(n_pad);
        y_norms = carver.take<T>(m_pad);
        centre = carver.take<T>(feature_stride);
        y_packed = carver.take<T>(m_pad * feature_stride);
    }

    bool by_differences() const { return kind != CostKind::cosine && features <= kFewFeatures; }

    // The mean of a few points: any centre is right, one inside the cloud leaves fewer entries to differences.
    void find_centre() const {
        constexpr int64_t samples = 16;
        const int64_t x_step = (n + samples - 1) / samples, y_step = (m + samples - 1) / samples;
        for (int64_t d = 0; d < feature_stride; d += kLanes<T>) {
            Vec<T> x_sum{}, y_sum{};
            int64_t x_count = 0, y_count = 0;
            for (int64_t i = 0; i < n; i += x_step, ++x_count) x_sum += load(x + i * feature_stride + d);
            for (int64_t j = 0; j < m; j += y_step, ++y_count) y_sum += load(y + j * feature_stride + d);
            store(centre + d, x_sum * (T(0.5) / x_count) + y_sum * (T(0.5) / y_count));
        }
    }

    // A group of kLanes rows of x_rows or y_rows, and their terms of the cost.
    void prepare_group(const T* points, T* rows, T* norms, int64_t group, int64_t count) const {
        const int64_t begin = group * kLanes<T>;
        const bool cosine = kind == CostKind::cosine;
        const T* in = points + begin * feature_stride;
        T* out = rows + begin * feature_stride;
        Vec<T> squares[kLanes<T>] = {};
        for (int64_t d = 0; d < feature_stride; d += kLanes<T>) {
            const Vec<T> origin = cosine ? Vec<T>{} : load(centre + d);
            PARROT_UNROLL
            for (int lane = 0; lane < kLanes<T>; ++lane) {
                const Vec<T> point = load(in + lane * feature_stride + d);
                const Vec<T> value = begin + lane < count ? point - origin : Vec<T>{};
                squares[lane] += value * value;
                store(out + lane * feature_stride + d, value);
            }
        }
        store(norms + begin, sum_each<T>(squares));
        for (int64_t i = begin; cosine && i < begin + kLanes<T>; ++i, out += feature_stride) {
            const T norm = norms[i];
            norms[i] = T(0.5);
            if (norm == 0) continue;
            const T length = __builtin_sqrt(norm);  // a division, so that vectors of one feature become 1 or -1
            for (int64_t d = 0; d < feature_stride; d += kLanes<T>) store(out + d, load(out + d) / length);
        }
    }

    // `of_x` are the groups of rows of x that this thread is to prepare; what others prepare it sees after the barrier.
    void prepare(const Team& team, Team::Range of_x) const {
        if (by_differences()) return;
        if (kind != CostKind::cosine) {
            if (team.rank == 0) find_centre();
            team.barrier();
        }
        for (int64_t group = of_x.begin; group < of_x.end; ++group) prepare_group(x, x_rows, x_norms, group, n);
        team.for_each(m_pad / kLanes<T>, [&](int64_t group) {
            prepare_group(y, y_rows, y_norms, group, m);
            pack_columns(group);
        });
    }

    // kLanes rows of y into the right factor of the product.
    void pack_columns(int64_t group) const {
        for (int64_t d = 0; d < features; d += kLanes<T>) {
            Vec<T> tile[kLanes<T>];
            PARROT_UNROLL
            for (int lane = 0; lane < kLanes<T>; ++lane)
                tile[lane] = load(y_rows + (group * kLanes<T> + lane) * feature_stride + d);
            transpose<T>(tile);
            for (int lane = 0; lane < kLanes<T> && d + lane < features; ++lane)
                store(y_packed + packed_index<T>(d + lane, group, features, m_pad / kLanes<T>), tile[lane]);
        }
    }

    // Of the same costs, with row `begin` the first; begin is a multiple of kLanes.
    PairwiseCost from_row(int64_t begin) const {
        PairwiseCost rest = *this;
        rest.n -= begin, rest.n_pad -= begin;
        rest.x += begin * feature_stride, rest.x_rows += begin * feature_stride, rest.x_norms += begin;
        return rest;
    }

    // With x and y in each other's place; `packed` is for x and to be filled by the result's pack_columns.
    PairwiseCost transposed(T* packed) const {
        PairwiseCost other = *this;
        other.n = m, other.m = n, other.n_pad = m_pad, other.m_pad = n_pad;
        other.x = y, other.y = x, other.x_rows = y_rows, other.y_rows = x_rows;
        other.x_norms = y_norms, other.y_norms = x_norms, other.y_packed = packed;
        return other;
    }

    // Squared distances of x_i to kLanes rows of y from j on.
    __attribute__((noinline)) Vec<T> differences(int64_t i, int64_t j) const {
        const bool cosine = kind == CostKind::cosine;
        const T* xi = (cosine ? x_rows : x) + i * feature_stride;
        const T* yj = (cosine ? y_rows : y) + j * feature_stride;
        Vec<T> sums[kLanes<T>] = {};
        for (int64_t d = 0; d < feature_stride; d += kLanes<T>) {
            const Vec<T> xd = load(xi + d);
            PARROT_UNROLL
            for (int lane = 0; lane < kLanes<T>; ++lane) {
                const Vec<T> difference = xd - load(yj + lane * feature_stride + d);
                sums[lane] += difference * difference;
            }
        }
        return sum_each<T>(sums);
    }

    // Rows [begin, end) of the cost, begin a multiple of kLanes; zero in padded columns. Returns the largest entry.
    __attribute__((noinline)) T rows(int64_t begin, int64_t end, Blocked<T> cost) const {
        const bool direct = by_differences(), cosine = kind == CostKind::cosine;
        if (!direct)
            matmul<T>(end - begin, features,
                      {x_rows + begin * feature_stride, feature_stride, kLanes<T> * feature_stride, 1, kLanes<T>},
                      y_packed, m_pad / kLanes<T>,
                      {cost.at(begin, 0), kLanes<T>, kLanes<T> * m_pad, kLanes<T> * kLanes<T>});
        const T product = cosine ? T(-1) : T(-2), difference = cosine ? T(0.5) : T(1);
        Vec<T> largest{};
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t j = 0; j < m_pad; j += kLanes<T>) {
                T* out = cost.at(i, j);
                Vec<T> value;
                if (direct) {
                    value = differences(i, j);
                } else {
                    const Vec<T> norms = load(y_norms + j) + x_norms[i];
                    value = norms + load(out) * product;
                    const IntVec<T> cancels = value < norms * kCancels;
                    if (any(cancels)) value = cancels ? differences(i, j) * difference : value;
                }
                if (kind == CostKind::euclidean) value = sqrt_each<T>(value);
                if (j + kLanes<T> > m)
                    for (int64_t lane = m - j; lane < kLanes<T>; ++lane) value[lane] = 0;
                store(out, value);
                largest = vmax(value, largest);
            }
        }
        return max_lanes<T>(largest);
    }
};

}  // namespace PARROT_ISA
}  // namespace parrot
