// What the backward of Sinkhorn-Hadamard on the CPU holds of one problem: its memory, inputs, costs and last
// potentials.
#pragma once

#include "batch.h"
#include "dispatch.h"
#include "pairwise_gradient.h"
#include "sinkhorn_streaming_backward.h"

namespace parrot {
namespace PARROT_ISA {
namespace {  // of the one file that includes this, whose compiler may inline what is called once

template <typename T>
struct BackwardProblem {
    static constexpr int L = kLanes<T>;
    static constexpr int64_t kRowTile = SinkhornAdjoint<T>::kRowTile, kColumnTile = SinkhornAdjoint<T>::kColumnTile;
    const SinkhornHadamardBackward& p;
    int64_t problem, N, M, features, stride;
    bool to_x_given, to_y_given;  // gradients of y_to_x or x_hadamard, and of x_to_y or y_hadamard
    bool through_cost;            // some gradient of the cost is wanted, and there is one
    bool unroll;                  // some gradient through the iteration is wanted
    int64_t steps;
    SinkhornAdjoint<T> adjoint;
    SinkhornStreamingAdjoint<T> stream;
    bool streaming;  // decided by the problem alone
    // Whether each thread of a team has the points, the gradients of what was transported to them and what is packed
    // of both to itself: for few points making them costs less than fetching what another thread made.
    bool replicated;
    char* copies;  // (threads, copy_bytes) if replicated
    size_t copy_bytes;
    static constexpr int64_t kReplicated = 32768;  // coordinates of all points up to which they are
    static constexpr int64_t kFolds = 8;           // parts of the rows that add to dy apart
    T *last_F, *last_G;
    T *dy_parts, *tile_packed, *other_packed;  // (kFolds, m_pad, stride), (threads, kRowTile, stride), (features, m)
    PairwiseCost<T> pairwise;
    PairwiseGradient<T> pairwise_gradient;
    T *x, *y, *to_x, *to_y;  // the points and the gradients of y_to_x and x_to_y, padded with zeros
    T *dx, *dy;
    T *rows_packed, *columns_packed;  // in panels: (m, features) for sums over columns, (n, features) over rows
    T* transposed_packed;             // (features, m)
    T* products;                      // (threads, kRowTile, stride or kColumnTile)
    T *spent, *eps_rows;              // (n_pad): sum_j P_ij c_ij, and sum_j dc_ij c_ij
    T scale, grad_cost;
    T deps_of_potentials;  // thread 0's

    BackwardProblem(const SinkhornHadamardBackward& params, int64_t index) : p(params), problem(index) {
        N = p.x.size[1], M = p.y.size[1], features = p.x.size[2];
        stride = round_up<T>(features);
        adjoint.problem = index;
        to_x_given = p.grad_y_to_x || p.grad_x_hadamard;
        to_y_given = p.grad_x_to_y || p.grad_y_hadamard;
        const bool cost_wanted = p.dcost_matrix || (p.cost != CostKind::matrix && (p.dx || p.dy));
        unroll = p.unrolled && (cost_wanted || p.da || p.db || p.deps);
        through_cost = unroll || (cost_wanted && p.grad_transport_cost);
        steps = unroll ? element<int32_t>(p.iterations, index) : 0;
    }

    static int64_t length(const TensorView& lengths, int64_t index, int64_t limit) {
        return lengths ? element<int32_t>(lengths, index) : limit;
    }

    size_t carve(char* memory, int threads) {
        Carver carver(memory);
        auto& it = adjoint;
        it.set_shape(length(p.x_lengths, problem, N), length(p.y_lengths, problem, M));
        streaming = 3.0 * sizeof(T) * double(it.n_pad) * double(it.m_pad) > double(p.workspace_limit);
        it.carve(carver, threads, steps, through_cost, !streaming);
        replicated = !streaming && (it.n_pad + it.m_pad) * stride <= kReplicated;
        copy_bytes = carve_points(nullptr);
        copies = carver.take<char>((replicated ? threads : 1) * copy_bytes);
        carve_points(copies);
        dx = carver.take<T>(it.n_pad * stride), dy = carver.take<T>(it.m_pad * stride);
        products = carver.take<T>(threads * kRowTile * (stride > kColumnTile ? stride : kColumnTile));
        spent = carver.take<T>(it.n_pad);
        eps_rows = carver.take<T>(it.n_pad);
        pairwise_gradient.has_near = carver.take<int>(it.n_pad);
        if (streaming) {
            stream.adjoint = &adjoint;
            stream.by_rows = {pairwise, p.cost_matrix, problem, it.m, it.m_pad};
            stream.by_columns = stream.by_rows.transposed(carver.take<T>(it.n_pad * stride));
            stream.carve(carver, threads, steps);
            dy_parts = carver.take<T>(kFolds * it.m_pad * stride);
            tile_packed = carver.take<T>(threads * kRowTile * stride);
            other_packed = carver.take<T>(it.m_pad * stride);
            last_F = carver.take<T>(it.n_pad), last_G = carver.take<T>(it.m_pad);
        }
        return carver.used();
    }

    size_t carve_points(char* memory) {
        Carver carver(memory);
        const auto& it = adjoint;
        for (T** array : {&x, &to_x, &columns_packed}) *array = carver.take<T>(it.n_pad * stride);
        for (T** array : {&y, &to_y, &rows_packed, &transposed_packed}) *array = carver.take<T>(it.m_pad * stride);
        pairwise.kind = p.cost;
        pairwise.n = it.n, pairwise.m = it.m, pairwise.n_pad = it.n_pad, pairwise.m_pad = it.m_pad;
        pairwise.features = features, pairwise.feature_stride = stride;
        pairwise.x = x, pairwise.y = y;
        if (p.cost != CostKind::matrix) pairwise.carve(carver);
        return carver.used();
    }

    // Who prepares the points that this thread reads.
    Team preparing(const Team& team) const { return replicated ? Team{} : team; }

    bool empty() const { return adjoint.n == 0 || adjoint.m == 0; }

    void write_empty() const {
        write_padding(0, 0);
        const T* none = nullptr;
        if (p.da) write_row(RowView(p.da, problem), none, 0, N);
        if (p.db) write_row(RowView(p.db, problem), none, 0, M);
        if (p.deps) element<T>(p.deps, problem) = 0;
    }

    // Zero gradients of rows from n and columns from m on.
    void write_padding(int64_t n, int64_t m) const {
        const T* none = nullptr;
        for (int64_t i = n; i < N; ++i) {
            if (p.dx) write_row(RowView(p.dx, problem, i), none, 0, features);
            if (p.dcost_matrix) write_row(RowView(p.dcost_matrix, problem, i), none, 0, M);
        }
        for (int64_t j = m; j < M; ++j)
            if (p.dy) write_row(RowView(p.dy, problem, j), none, 0, features);
    }

    // Points, and the gradients of what was transported to them: direct + points * hadamard.
    void read_side(const Team& team, const TensorView& from, const TensorView& direct, const TensorView& hadamard,
                   int64_t count, int64_t padded, T* points, T* gradients, T* scratch) const {
        team.for_each(padded / L, [&](int64_t group) {
            const int64_t begin = group * L, end = begin + L < count ? begin + L : count;
            read_group(from, problem, begin, count, features, points + begin * stride, stride);
            read_group(direct, problem, begin, count, features, gradients + begin * stride, stride);
            for (int64_t i = begin; hadamard && i < end; ++i) {
                read_row(RowView(hadamard, problem, i), features, scratch);
                for (int64_t d = features; d < stride; ++d) scratch[d] = 0;
                const T* point = points + i * stride;
                T* gradient = gradients + i * stride;
                for (int64_t d = 0; d < stride; d += L)
                    store(gradient + d, load(gradient + d) + load(point + d) * load(scratch + d));
            }
        });
    }

    T* my_product(const Team& team) const {
        return products + team.rank * kRowTile * (stride > kColumnTile ? stride : kColumnTile);
    }

    __attribute__((noinline)) void cost_rows(int64_t begin, int64_t end) const {
        const auto& it = adjoint;
        if (p.cost != CostKind::matrix) {
            pairwise.rows(begin, end, it.cost);
        } else {
            for (int64_t i = begin; i < end; ++i)
                for (int64_t j = 0; j < it.m_pad; j += L) {
                    T values[L] = {};
                    read_row(RowView(p.cost_matrix, problem, i).from(j), it.m - j < L ? it.m - j : L, values);
                    store(it.cost.at(i, j), load(values));
                }
        }
        if (!through_cost) return;
        for (int64_t i = begin; i < end; ++i)
            for (int64_t j = 0; j < it.m_pad; j += L) store(it.dc.at(i, j), Vec<T>{});
    }

    // body(begin, end) for tiles of at most kRowTile rows of a block.
    template <typename Body>
    PARROT_INLINE void tiles(int64_t block, Body&& body) const {
        const int64_t last = adjoint.block_end(block) < adjoint.n ? adjoint.block_end(block) : adjoint.n;
        for (int64_t i = adjoint.block_begin(block); i < last; i += kRowTile)
            body(i, i + kRowTile < last ? i + kRowTile : last);
    }

    void prepare(const Team& team) {
        auto& it = adjoint;
        T* scratch = my_product(team);
        const Team readers = preparing(team);
        read_side(readers, p.x, p.grad_y_to_x, p.grad_x_hadamard, it.n, it.n_pad, x, to_x, scratch);
        read_side(readers, p.y, p.grad_x_to_y, p.grad_y_hadamard, it.m, it.m_pad, y, to_y, scratch);
        team.for_each(it.n_pad / L, it.m_pad / L, [&](bool rows, int64_t group) {
            T* zeroed = (rows ? dx : dy) + group * L * stride;
            for (int64_t d = 0; d < L * stride; d += L) store(zeroed + d, Vec<T>{});
        });
        scale = element<T>(p.scale, problem);
        grad_cost = p.grad_transport_cost ? element<T>(p.grad_transport_cost, problem) : T(0);
        constexpr double infinity = std::numeric_limits<double>::infinity();
        it.eps = element<T>(p.eps, problem);
        it.inverse = T(1) / (scale * it.eps);
        it.balanced_x = p.rho_x == infinity, it.balanced_y = p.rho_y == infinity;
        it.damp_x = it.balanced_x ? T(1) : T(p.rho_x / (p.rho_x + it.eps));
        it.damp_y = it.balanced_y ? T(1) : T(p.rho_y / (p.rho_y + it.eps));
        it.f_history = p.f_history, it.g_history = p.g_history;
        if (p.cost != CostKind::matrix) pairwise.prepare(readers, readers.share(it.n_pad / L));
        if (streaming) {
            if (p.cost != CostKind::matrix && !pairwise.by_differences())
                team.for_each(it.n_pad / L, [&](int64_t group) { stream.by_columns.pairwise.pack_columns(group); });
            return;
        }
        team.for_each(it.blocks,
                      [&](int64_t block) { tiles(block, [&](int64_t begin, int64_t end) { cost_rows(begin, end); }); });
    }

    // Makes the thread's tiles stand for rows [begin, end) of the matrices, with the costs of these and dc zero.
    void window(const Team& team, int64_t begin, int64_t end) {
        auto& it = adjoint;
        if (!streaming) return;
        Blocked<T>* matrices[] = {&it.cost, &it.kernel, &it.dc};
        for (int which = 0; which < 3; ++which) {
            *matrices[which] = stream.tile(team, which, it.m_pad);
            matrices[which]->first -= begin * it.m_pad;
        }
        cost_rows(begin, end);
    }

    // body(begin, end, costs, kernel) for tiles of the transposed cost.
    template <typename Body>
    void stream_columns(const Team& team, Body&& body) const {
        const auto& it = adjoint;
        team.for_each((it.m + kRowTile - 1) / kRowTile, [&](int64_t tile) {
            const int64_t begin = tile * kRowTile, end = begin + kRowTile < it.m ? begin + kRowTile : it.m;
            const Blocked<T> cost = stream.tile(team, 0, it.n_pad);
            stream.by_columns.rows(begin, end, cost);
            body(begin, end, cost, stream.tile(team, 1, it.n_pad));
        });
    }

    // The last potentials, F as stored and G by one more update from it, so that its sums cancel the rounding of F.
    void find_potentials(const Team& team) {
        auto& it = adjoint;
        if (team.rank == 0) {
            read_row(RowView(p.f, problem), it.n, it.F);
            for (int64_t i = 0; i < it.n; ++i) {
                it.F[i] /= it.eps;
                it.alpha[i] = it.F[i] - it.log_a[i];
            }
        }
        team.barrier();
        if (streaming)
            stream_columns(team, [&](int64_t begin, int64_t end, Blocked<T> cost, Blocked<T>) {
                for (int64_t j = begin; j < end; ++j) {
                    it.beta[j] = -it.damp_y * row_lse(cost, j - begin, it.F, it.inverse);
                    it.G[j] = it.beta[j] + it.log_b[j];
                }
            });
        team.for_each(streaming ? 0 : it.chunks, [&](int64_t chunk) {
            for (int64_t j = it.chunk_begin(chunk); j < it.chunk_end(chunk); j += L) {
                const IntVec<T> padding = load(it.column_tail + j) > T(0);
                const Vec<T> lse = padding ? broadcast(T(__builtin_huge_val())) : it.column_lse(j);
                store(it.beta + j, lse * -it.damp_y);
                store(it.G + j, load(it.beta + j) + load(it.log_b + j));
            }
        });
        if (team.rank == 0) {
            deps_of_potentials = read_gradient(p.grad_f, it.n, it.F, it.dF);
            deps_of_potentials += read_gradient(p.grad_g, it.m, it.G, it.dG);
        }
        team.barrier();
    }

    // The gradient of a potential in units of eps into `out`; returns what it gives to eps.
    T read_gradient(const TensorView& given, int64_t count, const T* potential, T* out) const {
        T sum = 0;
        if (!given || !unroll) return sum;
        read_row(RowView(given, problem), count, out);
        for (int64_t i = 0; i < count; ++i) {
            sum += out[i] * potential[i];
            out[i] *= adjoint.eps;
        }
        return sum;
    }

    // The iteration's adjoint overwrites F and G, and dc is made after it.
    void keep_potentials(const Team& team) {
        const auto& it = adjoint;
        team.for_each(it.n_pad / L, [&](int64_t group) { store(last_F + group * L, load(it.F + group * L)); });
        team.for_each(it.m_pad / L, [&](int64_t group) { store(last_G + group * L, load(it.G + group * L)); });
    }
};

}  // namespace
}  // namespace PARROT_ISA
}  // namespace parrot
