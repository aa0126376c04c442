// The adjoint of the Sinkhorn iteration of a problem whose matrices are too large to be kept, in the terms of
// sinkhorn_adjoint.h, in the log domain.
//
// Each half-step is a pass over tiles of the cost, or of its transpose, whose softmax weights are normalised by their
// own sums: one exponential for each entry. Kept of every half-step are the gradients p = damp_y dG, q = damp_x dF and
// the offsets of the exponents, 2 (n + m) numbers for an iteration, from which dc of any tile can be made when it is
// wanted, by the same weights to the bit: p and q are over the sums of these.
#pragma once

#include "cost_tiles.h"
#include "sinkhorn_adjoint.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T>
struct SinkhornStreamingAdjoint {
    static constexpr int L = kLanes<T>;
    static constexpr int64_t kRows = CostTiles<T>::kRows, kColumnBlocks = 16;

    SinkhornAdjoint<T>* adjoint;            // whose vectors are used
    CostTiles<T> by_rows, by_columns;       // of the cost and of its transpose
    T* tiles;                               // (threads, 3, kRows, the larger of n_pad and m_pad): costs, kernel, dc
    T* partial_dF;                          // (kColumnBlocks, n_pad)
    T *p, *column_offset, *q, *row_offset;  // (steps, m_pad) and (steps, n_pad)

    void carve(Carver& carver, int threads, int64_t steps) {
        const auto& it = *adjoint;
        tiles = carver.take<T>(3 * threads * tile_size());
        partial_dF = carver.take<T>(kColumnBlocks * it.n_pad);
        for (T** array : {&p, &column_offset}) *array = carver.take<T>(steps * it.m_pad);
        for (T** array : {&q, &row_offset}) *array = carver.take<T>(steps * it.n_pad);
    }

    int64_t tile_size() const { return kRows * (adjoint->n_pad > adjoint->m_pad ? adjoint->n_pad : adjoint->m_pad); }

    Blocked<T> tile(const Team& team, int which, int64_t columns) const {
        return {tiles + (3 * team.rank + which) * tile_size(), columns};
    }

    // Row i of `kernel` becomes exp(potential_j - c_ij - offset), offset the maximum. Returns its sum.
    T softmax_row(Blocked<T> cost, int64_t i, const T* potential, Blocked<T> kernel, T& offset) const {
        const T* c = cost.at(i, 0);
        Vec<T> largest = broadcast(-T(__builtin_huge_val()));
        for (int64_t j = 0; j < cost.columns; j += L)
            largest = vmax(load(potential + j) - load(c + j * L) * adjoint->inverse, largest);
        offset = max_lanes<T>(largest);
        fill_row(cost, i, -offset, potential, adjoint->inverse, kernel);
        return sum_row(kernel, i);
    }

    static void clear(T* values, int64_t count) {
        for (int64_t i = 0; i < count; i += L) store(values + i, Vec<T>{});
    }

    // The step of G: dF -= W p.
    void column_block(const Team& team, int64_t block, int64_t k) const {
        auto& it = *adjoint;
        T* to_dF = partial_dF + block * it.n_pad;
        clear(to_dF, it.n_pad);
        const int64_t groups = it.m_pad / L, last = (block + 1) * groups / kColumnBlocks * L;
        const int64_t limit = last < it.m ? last : it.m;
        const Blocked<T> cost = tile(team, 0, it.n_pad), kernel = tile(team, 1, it.n_pad);
        for (int64_t begin = block * groups / kColumnBlocks * L; begin < limit; begin += kRows) {
            const int64_t end = begin + kRows < limit ? begin + kRows : limit;
            by_columns.rows(begin, end, cost);
            T factors[kRows];
            for (int64_t j = begin; j < end; ++j) {
                T& offset = column_offset[k * it.m_pad + j];
                const T sum = softmax_row(cost, j - begin, it.F, kernel, offset);
                const T all = it.dG[j] + it.column_extra[j];
                it.dlog_b[j] += it.dG[j];
                it.column_damping[j] -= all * (offset + log_one(sum));
                factors[j - begin] = p[k * it.m_pad + j] = all * it.damp_y / sum;
            }
            add_rows(kernel, end - begin, factors, to_dF);
        }
    }

    // The step of F: dG = -V^T q.
    void row_block(const Team& team, int64_t block, int64_t k) const {
        auto& it = *adjoint;
        T* to_dG = it.partial_dG + block * it.m_pad;
        clear(to_dG, it.m_pad);
        const int64_t limit = it.block_end(block) < it.n ? it.block_end(block) : it.n;
        const Blocked<T> cost = tile(team, 0, it.m_pad), kernel = tile(team, 1, it.m_pad);
        for (int64_t begin = it.block_begin(block); begin < limit; begin += kRows) {
            const int64_t end = begin + kRows < limit ? begin + kRows : limit;
            by_rows.rows(begin, end, cost);
            T factors[kRows];
            for (int64_t i = begin; i < end; ++i) {
                T &offset = row_offset[k * it.n_pad + i], through_G = 0;
                for (int64_t part = 0; part < kColumnBlocks; ++part) through_G += partial_dF[part * it.n_pad + i];
                const T sum = softmax_row(cost, i - begin, it.G, kernel, offset);
                const T gradient = it.dF[i] - through_G, all = gradient + it.row_extra[i];
                it.dlog_a[i] += gradient;
                it.row_damping[i] -= all * (offset + log_one(sum));
                it.dF[i] = it.row_extra[i] = 0;
                factors[i - begin] = q[k * it.n_pad + i] = all * it.damp_x / sum;
            }
            add_rows(kernel, end - begin, factors, to_dG);
        }
    }

    // All iterations, from the last to the first. The padding of F is -infinity.
    void run(const Team& team, int64_t steps) {
        auto& it = *adjoint;
        for (int64_t k = steps - 1; k >= 0; --k) {
            team.for_each(it.blocks, [&](int64_t block) { it.read_rows(block, k, it.F); });
            team.for_each(kColumnBlocks, [&](int64_t block) { column_block(team, block, k); });
            team.for_each(it.chunks, [&](int64_t chunk) { it.read_columns(chunk, k - 1); });
            team.for_each(it.blocks, [&](int64_t block) { row_block(team, block, k); });
            team.for_each(it.m_pad / L, [&](int64_t group) {
                store(it.dG + group * L, -it.total(it.partial_dG, group * L));
                store(it.column_extra + group * L, Vec<T>{});
            });
        }
    }

    // Adds what all iterations give to dc of rows [begin, end), whose windows of the cost and of dc are the adjoint's.
    // `columns` holds m_pad numbers.
    void add_gradient(int64_t begin, int64_t end, int64_t steps, T* columns) const {
        const auto& it = *adjoint;
        for (int64_t k = 0; k < steps; ++k) {
            const T *p_k = p + k * it.m_pad, *offsets = column_offset + k * it.m_pad;
            T F[kRows];
            read_row(RowView(it.f_history, it.problem, k).from(begin), end - begin, F);
            for (int64_t j = it.m; j < it.m_pad; ++j) columns[j] = -T(__builtin_huge_val());
            it.read_history(it.g_history, k - 1, 0, it.m, columns);
            for (int64_t i = begin; i < end; ++i) {
                const T Fi = F[i - begin] / it.eps, offset = row_offset[k * it.n_pad + i], q_i = q[k * it.n_pad + i];
                for (int64_t j = 0; j < it.m_pad; j += L) {
                    const Vec<T> c = load(it.cost.at(i, j)) * it.inverse;
                    const IntVec<T> padding = load(it.column_tail + j) > T(0);
                    const Vec<T> by_G = exp<T>((Fi - load(offsets + j)) - c) * load(p_k + j);
                    const Vec<T> by_F = exp<T>((load(columns + j) - offset) - c) * q_i;
                    T* out = it.dc.at(i, j);
                    store(out, load(out) + (padding ? Vec<T>{} : by_G + by_F));
                }
            }
        }
    }
};

}  // namespace PARROT_ISA
}  // namespace parrot
