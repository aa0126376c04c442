// Sinkhorn-Hadamard on the CPU: cost, iteration (sinkhorn_iteration.h, or sinkhorn_streaming.h where the matrices are
// too large to be kept) and projections of each problem of a batch.
#include "sinkhorn_hadamard.h"

#include "batch.h"
#include "dispatch.h"
#include "sinkhorn_streaming.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

constexpr double kConverged = 1e-3;  // error that counts as converged when no tolerance is asked for
constexpr double kLeastScale = 1e-8;

template <typename T>
struct ForwardProblem {
    static constexpr int L = kLanes<T>;
    const SinkhornHadamardForward& p;
    int64_t problem, N, M, features, feature_stride;
    T scale;
    PairwiseCost<T> pairwise;
    SinkhornIteration<T> iteration;
    SinkhornStreaming<T> stream;
    bool streaming;  // decided by the problem alone, so that its bits don't depend on threads or batch
    // Whether each thread of a team has points, packed points and their preparation to itself: for few points making
    // them costs less than fetching what another thread made.
    bool replicated;
    char* copies;  // (threads, copy_bytes) if replicated
    size_t copy_bytes;
    T *x, *y;                // in the compute type, rows and columns padded with zeros
    T *x_packed, *y_packed;  // times h and w (as they are when streaming), in panels: right factors of the projections
    T* products;             // (threads, block_rows or columns of a chunk, feature_stride)
    T* shared;               // scale; error and iterations, where one thread iterates for all
    T* tile_parts;           // (row_tiles), largest costs, then parts of the transport cost
    int64_t row_tiles;
    static constexpr int64_t kRowTile = 32, kColumnTile = 32;  // of the matrix products
    static constexpr int64_t kReplicated = 65536;              // coordinates of all points up to which they are

    ForwardProblem(const SinkhornHadamardForward& params, int64_t index) : p(params), problem(index) {
        N = p.x.size[1], M = p.y.size[1], features = p.x.size[2];
        feature_stride = round_up<T>(features);
        iteration.problem = index;
    }

    static int64_t length(const TensorView& lengths, int64_t index, int64_t limit) {
        return lengths ? element<int32_t>(lengths, index) : limit;
    }

    size_t carve(char* memory, int threads) {
        Carver carver(memory);
        iteration.set_shape(length(p.x_lengths, problem, N), length(p.y_lengths, problem, M));
        const int64_t n_pad = iteration.n_pad, m_pad = iteration.m_pad;
        streaming = 2.0 * sizeof(T) * double(n_pad) * double(m_pad) > double(p.workspace_limit);
        iteration.carve(carver, threads, !streaming);
        replicated = !streaming && (n_pad + m_pad) * feature_stride <= kReplicated;
        copy_bytes = carve_points(nullptr);
        copies = carver.take<char>((replicated ? threads : 1) * copy_bytes);
        carve_points(copies);
        products = carver.take<T>(threads * kRowTile * feature_stride);
        row_tiles = (iteration.n + kRowTile - 1) / kRowTile;
        tile_parts = carver.take<T>(row_tiles);
        shared = carver.take<T>(3);
        if (streaming) {
            x_packed = carver.take<T>(n_pad * feature_stride);
            y_packed = carver.take<T>(m_pad * feature_stride);
            stream.iteration = &iteration;
            stream.by_rows = {pairwise, p.cost_matrix, problem, iteration.m, m_pad};
            stream.by_columns = stream.by_rows.transposed(carver.take<T>(n_pad * feature_stride));
            stream.carve(carver, threads);
        }
        return carver.used();
    }

    size_t carve_points(char* memory) {
        Carver carver(memory);
        x = carver.take<T>(iteration.n_pad * feature_stride);
        y = carver.take<T>(iteration.m_pad * feature_stride);
        pairwise.kind = p.cost;
        pairwise.n = iteration.n, pairwise.m = iteration.m;
        pairwise.n_pad = iteration.n_pad, pairwise.m_pad = iteration.m_pad;
        pairwise.features = features, pairwise.feature_stride = feature_stride;
        pairwise.x = x, pairwise.y = y;
        pairwise.carve(carver);
        x_packed = pairwise.x_rows, y_packed = pairwise.y_rows;  // not needed at the same time
        return carver.used();
    }

    // Who prepares the points that this thread reads.
    Team preparing(const Team& team) const { return replicated ? Team{} : team; }

    // Those of the rows of the cost that this thread computes, where points are replicated.
    Team::Range groups_of_x(const Team& team) const {
        const int64_t groups = iteration.n_pad / L, each = kRowTile / L;
        if (!replicated) return team.share(groups);
        const auto [begin, end] = team.share(row_tiles);
        return {begin * each, end * each < groups ? end * each : groups};
    }

    bool empty() const { return iteration.n == 0 || iteration.m == 0; }

    void write_empty() const {
        const T* none = nullptr;
        for (int64_t i = 0; i < N; ++i) {
            write_row(RowView(p.y_to_x, problem, i), none, 0, features);
            if (p.x_hadamard) write_row(RowView(p.x_hadamard, problem, i), none, 0, features);
            if (p.plan) write_row(RowView(p.plan, problem, i), none, 0, M);
        }
        for (int64_t j = 0; j < M; ++j) {
            write_row(RowView(p.x_to_y, problem, j), none, 0, features);
            if (p.y_hadamard) write_row(RowView(p.y_hadamard, problem, j), none, 0, features);
        }
        write_row(RowView(p.f, problem), none, 0, N);
        write_row(RowView(p.g, problem), none, 0, M);
        write_scalars({0, 0}, 0, p.cost_scale > 0 ? T(p.cost_scale) : T(kLeastScale));
    }

    void write_scalars(typename SinkhornIteration<T>::Result result, T transport_cost, T scale) const {
        element<T>(p.transport_cost, problem) = transport_cost;
        element<T>(p.error, problem) = result.error;
        element<int32_t>(p.iterations, problem) = result.iterations;
        element<bool>(p.converged, problem) = result.error <= T(p.tol >= 0 ? p.tol : kConverged);
        element<T>(p.scale, problem) = scale;
    }

    __attribute__((noinline)) void cost_tile(const Team& team, int64_t tile) {
        auto& it = iteration;
        const int64_t begin = tile * kRowTile, end = begin + kRowTile < it.n ? begin + kRowTile : it.n;
        if (streaming) {  // for the scale only
            tile_parts[tile] = p.cost_scale > 0 ? T(0) : stream.by_rows.rows(begin, end, stream.costs(team, it.m_pad));
            return;
        }
        if (p.cost != CostKind::matrix) {
            tile_parts[tile] = pairwise.rows(begin, end, it.cost);
            return;
        }
        Vec<T> largest{};
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t j = 0; j < it.m_pad; j += L) {
                T values[L] = {};
                read_row(RowView(p.cost_matrix, problem, i).from(j), it.m - j < L ? it.m - j : L, values);
                store(it.cost.at(i, j), load(values));
                largest = vmax(load(values), largest);
            }
        }
        tile_parts[tile] = max_lanes<T>(largest);
    }

    T find_scale() const {
        if (p.cost_scale > 0) return T(p.cost_scale);
        T largest = T(kLeastScale);
        for (int64_t tile = 0; tile < row_tiles; ++tile)
            if (tile_parts[tile] > largest) largest = tile_parts[tile];
        return largest;
    }

    void prepare(const Team& team) {
        auto& it = iteration;
        preparing(team).for_each(it.n_pad / L, it.m_pad / L, [&](bool rows, int64_t group) {
            if (rows)
                read_group(p.x, problem, group * L, it.n, features, x + group * L * feature_stride, feature_stride);
            else
                read_group(p.y, problem, group * L, it.m, features, y + group * L * feature_stride, feature_stride);
        });
        if (p.cost != CostKind::matrix) pairwise.prepare(preparing(team), groups_of_x(team));
        if (streaming && p.cost != CostKind::matrix && !pairwise.by_differences())
            team.for_each(it.n_pad / L, [&](int64_t group) { stream.by_columns.pairwise.pack_columns(group); });
        team.for_each(row_tiles, [&](int64_t tile) { cost_tile(team, tile); });
        scale = find_scale();
        team.barrier();  // tile_parts is written again
        it.n_iters = p.n_iters;
        it.eps = element<T>(p.eps, problem);
        it.tol = T(p.tol), it.tolerance = p.tol >= 0;
        it.inverse = T(1) / (scale * it.eps);
        constexpr double infinity = std::numeric_limits<double>::infinity();
        it.balanced_x = p.rho_x == infinity, it.balanced_y = p.rho_y == infinity;
        it.damp_x = it.balanced_x ? T(1) : T(p.rho_x / (p.rho_x + it.eps));
        it.damp_y = it.balanced_y ? T(1) : T(p.rho_y / (p.rho_y + it.eps));
        it.f_history = p.f_history, it.g_history = p.g_history;
        it.keep_potentials = it.tolerance || p.f_history || p.g_history || !it.balanced_x || !it.balanced_y;
    }

    // One row of a projection, sums * factor, and its product with the points if that is wanted.
    PARROT_INLINE void write_projection(const TensorView& projected, const TensorView& hadamard, int64_t row, T* sums,
                                        T factor, const T* point) const {
        const RowView to(projected, problem, row);
        if (!hadamard) {
            for (int64_t d = 0; d < features; d += L) store(sums + d, load(sums + d) * factor);
            return write_row(to, sums, features, features);
        }
        const RowView product(hadamard, problem, row);
        T *to_plain = to.plain<T>(), *product_plain = product.plain<T>();
        int64_t d = 0;
        if (to_plain && product_plain)
            for (; d + L <= features; d += L) {
                const Vec<T> value = load(sums + d) * factor;
                store(to_plain + d, value);
                store(product_plain + d, value * load(point + d));
            }
        for (int64_t rest = d; rest < features; rest += L) store(sums + rest, load(sums + rest) * factor);
        write_row(to.from(d), sums + d, features - d, features - d);
        for (int64_t rest = d; rest < features; rest += L) store(sums + rest, load(sums + rest) * load(point + rest));
        write_row(product.from(d), sums + d, features - d, features - d);
    }

    // Rows of y_to_x, of the plan, and their part of the transport cost.
    __attribute__((noinline)) void finish_rows(int64_t tile, const T* u, T* product) {
        auto& it = iteration;
        const int64_t begin = tile * kRowTile, end = begin + kRowTile < it.n ? begin + kRowTile : it.n;
        matmul<T>(end - begin, it.m, {it.kernel.at(begin, 0), L, L * it.m_pad, 1, L * L}, y_packed, feature_stride / L,
                  {product, feature_stride, L * feature_stride, L});
        Vec<T> spent{};
        for (int64_t i = begin; i < end; ++i, product += feature_stride) {
            const T h = it.a[i] * u[i];
            Vec<T> row_cost{};
            for (int64_t j = 0; j < it.m_pad; j += L)
                row_cost += load(it.kernel.at(i, j)) * h * load(it.w + j) * load(it.cost.at(i, j));
            spent += row_cost;
            write_projection(p.y_to_x, p.x_hadamard, i, product, u[i], x + i * feature_stride);
            if (!p.plan) continue;
            T values[L];
            for (int64_t j = 0; j < M; j += L) {
                if (j < it.m) store(values, load(it.kernel.at(i, j)) * h * load(it.w + j));
                const int64_t valid = j > it.m ? 0 : it.m - j;
                write_row(RowView(p.plan, problem, i).from(j), values, valid < L ? valid : L, M - j < L ? M - j : L);
            }
        }
        tile_parts[tile] = sum_lanes<T>(spent);
    }

    __attribute__((noinline)) void finish_columns(int64_t tile, T* product) {
        auto& it = iteration;
        const int64_t begin = tile * kColumnTile, end = begin + kColumnTile < it.m ? begin + kColumnTile : it.m;
        matmul<T>(end - begin, it.n, {it.kernel.at(0, begin), 1, L * L, L, L * it.m_pad}, x_packed, feature_stride / L,
                  {product, feature_stride, L * feature_stride, L});
        for (int64_t j = begin; j < end; ++j, product += feature_stride)
            write_projection(p.x_to_y, p.y_hadamard, j, product, it.v[j], y + j * feature_stride);
    }

    // Columns of x_to_y from a tile of the transposed kernel P / b, whose sums make up for the rounding of G.
    __attribute__((noinline)) void stream_columns(const Team& team, int64_t tile, const T* F, T* product) {
        auto& it = iteration;
        const int64_t begin = tile * kColumnTile, end = begin + kColumnTile < it.m ? begin + kColumnTile : it.m;
        const Blocked<T> cost = stream.costs(team, it.n_pad), kernel = stream.kernel(team, it.n_pad);
        stream.by_columns.rows(begin, end, cost);
        for (int64_t j = begin; j < end; ++j) {
            fill_row(cost, j - begin, it.beta[j], F, it.inverse, kernel);
            const T sum = it.balanced_y ? sum_row(kernel, j - begin) : T(1);
            it.v[j] = T(1) / sum;
            it.w[j] = it.log_b[j] - log_one(sum);
        }
        matmul<T>(end - begin, it.n, {kernel.first, L, L * it.n_pad, 1, L * L}, x_packed, feature_stride / L,
                  {product, feature_stride, L * feature_stride, L});
        for (int64_t j = begin; j < end; ++j, product += feature_stride)
            write_projection(p.x_to_y, p.y_hadamard, j, product, it.v[j], y + j * feature_stride);
    }

    // As finish_rows, from a tile of the kernel P / a; after all columns.
    __attribute__((noinline)) void stream_rows(const Team& team, int64_t tile, const T* F, T* product) {
        auto& it = iteration;
        const int64_t begin = tile * kRowTile, end = begin + kRowTile < it.n ? begin + kRowTile : it.n;
        const Blocked<T> cost = stream.costs(team, it.m_pad), kernel = stream.kernel(team, it.m_pad);
        stream.by_rows.rows(begin, end, cost);
        T spent = 0;
        for (int64_t i = begin; i < end; ++i) {
            Vec<T> row_cost{};
            for (int64_t j = 0; j < it.m_pad; j += L) {
                // log P / b as the columns had it, for the rounding that their sums cancelled.
                const Vec<T> c = load(cost.at(i - begin, j)), to_y = (load(it.beta + j) + F[i]) - c * it.inverse;
                const Vec<T> entry = exp<T>(to_y + (load(it.w + j) - it.log_a[i]));
                store(kernel.at(i - begin, j), entry);
                row_cost += entry * it.a[i] * c;
            }
            spent += sum_lanes<T>(row_cost);
        }
        tile_parts[tile] = spent;
        matmul<T>(end - begin, it.m, {kernel.first, L, L * it.m_pad, 1, L * L}, y_packed, feature_stride / L,
                  {product, feature_stride, L * feature_stride, L});
        for (int64_t i = begin; i < end; ++i, product += feature_stride) {
            write_projection(p.y_to_x, p.x_hadamard, i, product, T(1), x + i * feature_stride);
            T values[L];
            for (int64_t j = 0; p.plan && j < M; j += L) {
                if (j < it.m) store(values, load(kernel.at(i - begin, j)) * it.a[i]);
                const int64_t valid = j > it.m ? 0 : it.m - j;
                write_row(RowView(p.plan, problem, i).from(j), values, valid < L ? valid : L, M - j < L ? M - j : L);
            }
        }
    }

    void write_potentials(const T* potential, const TensorView& out, const TensorView& history, int steps,
                          int64_t count, int64_t total, T* scratch) const {
        for (int64_t i = 0; i < count; ++i) scratch[i] = potential[i] * iteration.eps;
        write_row(RowView(out, problem), scratch, count, total);
        if (!history) return;
        for (int k = 0; k < steps; ++k) {
            write_row(RowView(history, problem, k).from(count), scratch, 0, total - count);
        }
    }

    void finish(const Team& team, typename SinkhornIteration<T>::Result result) {
        auto& it = iteration;
        const int64_t vectors = feature_stride / L;
        const T* u = it.u[result.iterations & 1];
        preparing(team).for_each(it.n_pad / L, it.m_pad / L, [&](bool rows, int64_t group) {
            const int64_t count = rows ? it.n : it.m;
            for (int64_t i = group * L; i < (group + 1) * L && i < count; ++i)
                if (rows)
                    pack_row(x_packed, x + i * feature_stride, streaming ? T(1) : it.a[i] * u[i], i, it.n, vectors);
                else
                    pack_row(y_packed, y + i * feature_stride, streaming ? T(1) : it.w[i], i, it.m, vectors);
        });
        T* product = products + team.rank * kRowTile * feature_stride;
        const T* F = it.F[result.iterations & 1];
        const int64_t column_tiles = (it.m + kColumnTile - 1) / kColumnTile;
        if (streaming) {
            team.for_each(column_tiles, [&](int64_t tile) { stream_columns(team, tile, F, product); });
            team.for_each(row_tiles, [&](int64_t tile) { stream_rows(team, tile, F, product); });
        } else {
            team.for_each(row_tiles, column_tiles, [&](bool rows, int64_t tile) {
                if (rows)
                    finish_rows(tile, u, product);
                else
                    finish_columns(tile, product);
            });
        }
        if (team.rank != 0) return;
        T transport_cost = 0;
        for (int64_t tile = 0; tile < row_tiles; ++tile) transport_cost += tile_parts[tile];
        const T* none = nullptr;
        for (int64_t i = it.n; i < N; ++i) {
            write_row(RowView(p.y_to_x, problem, i), none, 0, features);
            if (p.x_hadamard) write_row(RowView(p.x_hadamard, problem, i), none, 0, features);
            if (p.plan) write_row(RowView(p.plan, problem, i), none, 0, M);
        }
        for (int64_t j = it.m; j < M; ++j) {
            write_row(RowView(p.x_to_y, problem, j), none, 0, features);
            if (p.y_hadamard) write_row(RowView(p.y_hadamard, problem, j), none, 0, features);
        }
        write_potentials(F, p.f, p.f_history, result.iterations, it.n, N, it.h);
        write_potentials(it.G, p.g, p.g_history, result.iterations, it.m, M, it.w);
        write_scalars(result, transport_cost / scale, scale);
    }

    // On memory that `carve` was given; every thread of the team calls it on its own copy of this object.
    void run(const Team& team) {
        if (replicated) carve_points(copies + team.rank * copy_bytes);
        if (team.rank == 0) iteration.set_weights(p.a, p.b);
        team.barrier();
        prepare(team);
        const bool share = iteration.n * iteration.m >= kShared;
        const Team iterating = share ? team : team.alone();
        typename SinkhornIteration<T>::Result result{};
        if (iterating.size > 0) {
            result = streaming ? stream.run(iterating) : iteration.run(iterating);
            if (team.rank == 0) shared[0] = T(result.iterations), shared[1] = result.error;
        }
        team.barrier();
        result.iterations = static_cast<int>(shared[0]), result.error = shared[1];
        finish(team, result);
    }
};

template <typename T>
void forward(const SinkhornHadamardForward& p) {
    const int64_t costs = p.x.size[1] * p.y.size[1];
    const double work = double(costs) * double(p.n_iters + p.x.size[2]);
    run_batch<ForwardProblem<T>>(p, {p.x.size[0], work, 1e9, costs}, "sinkhorn_hadamard");
}

}  // namespace

void sinkhorn_hadamard_forward(const SinkhornHadamardForward& params) {
    if (params.x.dtype == DType::f64)
        forward<double>(params);
    else
        forward<float>(params);
}

}  // namespace PARROT_ISA
}  // namespace parrot
