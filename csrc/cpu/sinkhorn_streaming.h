// The Sinkhorn iteration of a problem whose matrices are too large to be kept, in the terms of sinkhorn_iteration.h.
//
// Offsets are the potentials of the iteration before: K_ij = exp(alpha_i + beta_j - c_ij) with alpha = F - log a,
// beta = G - log b is made tile after tile, one exponential for each entry and iteration. A tile gives its rows' sums
// s_i = sum_j K_ij b_j, hence the new F, and adds K_ij h_i with the new h to the columns' sums t_j.
//
// Exactness. Sums are trusted within [e^-20, e^20] as in sinkhorn_iteration.h. A row outside is redone in the log
// domain with its maximum while its costs are at hand, and its kernel made again about the new F; so is every row of
// the first iteration. Columns outside are redone in the log domain from tiles of the transposed cost; all of them,
// where a row's kernel has an entry that exp can't hold.
#pragma once

#include "cost_tiles.h"
#include "sinkhorn_iteration.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T>
struct SinkhornStreaming {
    static constexpr int L = kLanes<T>;
    static constexpr int64_t kRows = CostTiles<T>::kRows;
    using Iteration = SinkhornIteration<T>;
    using Result = typename Iteration::Result;

    Iteration* iteration;              // whose vectors are used, not its matrices
    CostTiles<T> by_rows, by_columns;  // of the cost and of its transpose
    T* tiles;                          // (threads, 2, kRows, the larger of n_pad and m_pad)
    bool log_domain = false;           // trust no sum

    void carve(Carver& carver, int threads) { tiles = carver.take<T>(threads * tile_size() * 2); }

    int64_t tile_size() const {
        return kRows * (iteration->n_pad > iteration->m_pad ? iteration->n_pad : iteration->m_pad);
    }

    // A thread's tile of costs and its tile of the kernel.
    Blocked<T> costs(const Team& team, int64_t columns) const { return {tiles + 2 * team.rank * tile_size(), columns}; }
    Blocked<T> kernel(const Team& team, int64_t columns) const {
        return {tiles + (2 * team.rank + 1) * tile_size(), columns};
    }

    static bool trusted(T sum) { return sum >= T(1) / Iteration::kTrusted && sum <= Iteration::kTrusted; }

    // The row update of iteration k for rows [begin, end) and, unless `last`, their part of t. Returns their part of
    // the error after iteration k - 1.
    __attribute__((noinline)) T row_tile(const Team& team, int64_t begin, int64_t end, int k, bool last, T* t) const {
        auto& it = *iteration;
        const Blocked<T> cost = costs(team, it.m_pad), K = kernel(team, it.m_pad);
        by_rows.rows(begin, end, cost);
        const T *F_before = it.F[(k - 1) & 1], largest_exponent = Iteration::kLargestEntry;
        T* F_now = it.F[k & 1];
        T error = 0;
        for (int64_t i = begin; i < end; ++i) {
            const T offset = F_before[i] - it.log_a[i];
            bool good =
                k > 1 && !log_domain && fill_row(cost, i - begin, offset, it.beta, it.inverse, K) <= largest_exponent;
            const T s = good ? dot_row(K, i - begin, it.b) : T(0);
            T potential = 0, u = 1;
            if (good && trusted(s)) {
                potential = (offset - log_one(s)) * it.damp_x;
                u = it.balanced_x ? T(1) / s : exp_one(potential - offset);
                good = trusted(u);
                const T gap = it.a[i] * s * (T(1) - u);
                error += good ? (gap < 0 ? -gap : gap) : T(0);
            } else {
                good = false;
            }
            if (!good) {
                const T lse = row_lse(cost, i - begin, it.G, it.inverse);
                potential = -it.damp_x * lse, u = 1;
                const T gap = exp_one(F_before[i] + lse) - exp_one(potential + it.log_a[i] + lse);
                error += gap < 0 ? -gap : gap;
                if (!last)
                    it.flag_if(!(fill_row(cost, i - begin, potential, it.beta, it.inverse, K) <= largest_exponent), k);
            }
            F_now[i] = potential + it.log_a[i];
            it.h[i] = it.a[i] * u;
        }
        if (!last) add_rows(K, end - begin, it.h + begin, t);
        return error;
    }

    void row_block(const Team& team, int64_t block, int k, bool last) const {
        auto& it = *iteration;
        T* t = it.partial + block * it.m_pad;
        for (int64_t j = 0; j < it.m_pad; j += L) store(t + j, block == 0 ? load(it.column_tail + j) : Vec<T>{});
        const int64_t end = it.block_end(block) < it.n ? it.block_end(block) : it.n;
        T error = 0;
        for (int64_t i = it.block_begin(block); i < end; i += kRows)
            error += row_tile(team, i, i + kRows < end ? i + kRows : end, k, last, t);
        it.block_error[block] = error;
        if (!last) it.write_history(it.f_history, k, it.F[k & 1], it.block_begin(block), end);
    }

    // kLanes columns from their sums, or in the log domain.
    void column_group(const Team& team, int64_t group, int k, bool all_in_log_domain) const {
        auto& it = *iteration;
        const int64_t j = group * L, end = j + L < it.m ? j + L : it.m;
        Vec<T> t{};
        for (int64_t block = 0; block < it.blocks; ++block) t += load(it.partial + block * it.m_pad + j);
        Vec<T> potential = (load(it.beta + j) - log<T>(t)) * it.damp_y;
        if (all_in_log_domain || any(Iteration::untrusted(t))) {
            const Blocked<T> cost = costs(team, it.n_pad);
            by_columns.rows(j, end, cost);
            for (int64_t column = j; column < end; ++column)
                potential[column - j] = -it.damp_y * row_lse(cost, column - j, it.F[k & 1], it.inverse);
        }
        store(it.beta + j, potential);
        store(it.G + j, potential + load(it.log_b + j));
        it.write_history(it.g_history, k, it.G, j, end);
    }

    void start() {
        auto& it = *iteration;
        const T infinity = __builtin_huge_val();
        for (int64_t j = 0; j < it.m_pad; ++j) {
            it.v[j] = 1, it.w[j] = it.log_b[j];  // of w the logarithm
            it.G[j] = j < it.m ? T(0) : -infinity;
            it.beta[j] = j < it.m ? -it.log_b[j] : -infinity;
        }
        for (int64_t i = 0; i < it.n_pad; ++i) it.F[0][i] = it.F[1][i] = i < it.n ? T(0) : -infinity;
    }

    // Ends with F and G of the last iteration, beta among them.
    Result run(const Team& team) {
        auto& it = *iteration;
        log_domain = !it.usual_masses();
        if (team.rank == 0) start();
        team.barrier();
        for (int k = 1;; ++k) {
            const bool last = k > it.n_iters;
            if (team.rank == 0) it.unrepresentable[(k + 1) & 1] = 0;  // last read two barriers ago
            team.for_each(it.blocks, [&](int64_t block) { row_block(team, block, k, last); });
            if (k > 1 && (last || it.tolerance)) {
                const T error = it.total(it.block_error);
                if (last || error <= it.tol) return {k - 1, error};
            }
            const bool all = log_domain || __atomic_load_n(it.unrepresentable + (k & 1), __ATOMIC_RELAXED);
            team.for_each(it.m_pad / L, [&](int64_t group) { column_group(team, group, k, all); });
        }
    }
};

}  // namespace PARROT_ISA
}  // namespace parrot
