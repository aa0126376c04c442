// From the gradient of a pairwise cost to those of its two sets of points (pairwise_cost.h).
//
// For distances, with E the gradient of C over the distance (twice the gradient, for squares): dx_i = sum_j E_ij (x_i -
// y_j), by matrix products about a common centre. Points that are near each other, compared to their distance from
// the centre, would cancel there: they are taken by differences, entry by entry. For cosine, the gradient of the unit
// vectors is projected onto the tangent of the sphere. It is zero at coincident points and for vectors of length zero.
#pragma once

#include "pairwise_cost.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T>
struct PairwiseGradient {
    static constexpr int L = kLanes<T>;
    static constexpr T kNear = T(1) / 256;  // squared distances below this part of |x|^2 + |y|^2 are near
    static constexpr int64_t kTile = 32;

    PairwiseCost<T> pairwise;  // prepared
    Blocked<T> cost;           // not scaled
    Blocked<T> gradient;       // of that, times `unit`; becomes E without the entries of points that are near
    Blocked<T> near;           // becomes those
    T unit;
    T *dx, *dy;              // as the points, added to; null if not wanted
    T *x_packed, *y_packed;  // x_rows and y_rows in panels
    T* sums;                 // (n_pad), of the rows of E
    int* has_near;           // (n_pad)

    int64_t stride() const { return pairwise.feature_stride; }

    void prepare(const Team& team) const {
        const auto& pc = pairwise;
        if (pc.by_differences()) {
            if (team.rank == 0 && team.size > 0) pc.find_centre();
            team.barrier();
        }
        const int64_t vectors = stride() / L;
        team.for_each(pc.n_pad / L, [&](int64_t group) {
            if (pc.by_differences()) pc.prepare_group(pc.x, pc.x_rows, pc.x_norms, group, pc.n);
            for (int64_t i = group * L; i < (group + 1) * L && i < pc.n; ++i)
                pack_row(x_packed, pc.x_rows + i * stride(), T(1), i, pc.n, vectors);
        });
        team.for_each(pc.m_pad / L, [&](int64_t group) {
            if (pc.by_differences()) pc.prepare_group(pc.y, pc.y_rows, pc.y_norms, group, pc.m);
            for (int64_t j = group * L; j < (group + 1) * L && j < pc.m; ++j)
                pack_row(y_packed, pc.y_rows + j * stride(), T(1), j, pc.m, vectors);
        });
    }

    // to += factor (from - other)
    PARROT_INLINE void add_difference(T factor, const T* from, const T* other, T* to) const {
        for (int64_t d = 0; d < stride(); d += L)
            store(to + d, load(to + d) + (load(from + d) - load(other + d)) * factor);
    }

    // to += tangent part of `gradient` at the unit vector of `point`, over its length
    PARROT_INLINE void add_tangent(const T* point, const T* unit_vector, const T* gradient_, T* to) const {
        Vec<T> squares{}, along{};
        for (int64_t d = 0; d < stride(); d += L) {
            squares += load(point + d) * load(point + d);
            along += load(unit_vector + d) * load(gradient_ + d);
        }
        const T square = sum_lanes<T>(squares), inner = sum_lanes<T>(along);
        if (!(square > 0)) return;
        const T inverse = T(1) / __builtin_sqrt(square);
        for (int64_t d = 0; d < stride(); d += L)
            store(to + d, load(to + d) + (load(gradient_ + d) - load(unit_vector + d) * inner) * inverse);
    }

    __attribute__((noinline)) void weigh_row(int64_t i) const {
        const auto& pc = pairwise;
        const bool cosine = pc.kind == CostKind::cosine, euclidean = pc.kind == CostKind::euclidean;
        Vec<T> sum{};
        has_near[i] = 0;
        for (int64_t j = 0; j < pc.m_pad; j += L) {
            const Vec<T> c = load(cost.at(i, j));
            Vec<T> e = load(gradient.at(i, j)) * unit;
            if (cosine)
                e = -e;
            else
                e = euclidean ? (c > T(0) ? e / c : Vec<T>{}) : e + e;
            if (!cosine) {
                const Vec<T> square = euclidean ? c * c : c;
                const IntVec<T> close = square < (load(pc.y_norms + j) + pc.x_norms[i]) * kNear;
                const Vec<T> apart = close ? e : Vec<T>{};
                store(near.at(i, j), apart);
                if (any(apart != T(0))) {
                    has_near[i] = 1;
                    for (int lane = 0; dx && lane < L && j + lane < pc.m; ++lane)
                        if (apart[lane] != 0)
                            add_difference(apart[lane], pc.x + i * stride(), pc.y + (j + lane) * stride(),
                                           dx + i * stride());
                    e = close ? Vec<T>{} : e;
                }
            }
            store(gradient.at(i, j), e);
            sum += e;
        }
        sums[i] = sum_lanes<T>(sum);
    }

    // Rows [begin, end), begin a multiple of kLanes, end - begin at most kTile; `product` holds kTile rows.
    void rows(int64_t begin, int64_t end, T* product) const {
        const auto& pc = pairwise;
        for (int64_t i = begin; i < end; ++i) weigh_row(i);
        if (!dx) return;
        matmul<T>(end - begin, pc.m, {gradient.at(begin, 0), L, L * pc.m_pad, 1, L * L}, y_packed, stride() / L,
                  {product, stride(), L * stride(), L});
        for (int64_t i = begin; i < end; ++i, product += stride())
            add_product(pc.x, pc.x_rows, sums[i], i, product, dx);
    }

    // The same for columns, after all rows.
    __attribute__((noinline)) void columns(int64_t begin, int64_t end, T* product) const {
        const auto& pc = pairwise;
        matmul<T>(end - begin, pc.n, {gradient.at(0, begin), 1, L * L, L, L * pc.m_pad}, x_packed, stride() / L,
                  {product, stride(), L * stride(), L});
        for (int64_t j = begin; j < end; j += L) {
            Vec<T> sum{};
            for (int64_t i = 0; i < pc.n; ++i) {
                sum += load(gradient.at(i, j));
                if (!has_near[i]) continue;
                const Vec<T> apart = load(near.at(i, j));
                if (!any(apart != T(0))) continue;
                for (int lane = 0; lane < L && j + lane < end; ++lane)
                    if (apart[lane] != 0)
                        add_difference(apart[lane], pc.y + (j + lane) * stride(), pc.x + i * stride(),
                                       dy + (j + lane) * stride());
            }
            for (int lane = 0; lane < L && j + lane < end; ++lane, product += stride())
                add_product(pc.y, pc.y_rows, sum[lane], j + lane, product, dy);
        }
    }

  private:
    PARROT_INLINE void add_product(const T* points, const T* rows, T sum, int64_t i, const T* product, T* to) const {
        const T* row = rows + i * stride();
        to += i * stride();
        if (pairwise.kind == CostKind::cosine) return add_tangent(points + i * stride(), row, product, to);
        for (int64_t d = 0; d < stride(); d += L)
            store(to + d, load(to + d) + (load(row + d) * sum - load(product + d)));
    }
};

}  // namespace PARROT_ISA
}  // namespace parrot
