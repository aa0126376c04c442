// Gradients of Sinkhorn-Hadamard on the CPU: through the projections, the iteration (sinkhorn_adjoint.h) and the cost
// (pairwise_gradient.h) of each problem of a batch.
#include "sinkhorn_backward_problem.h"

namespace parrot {
namespace PARROT_ISA {
namespace {

template <typename T>
struct Backward : BackwardProblem<T> {
    using Base = BackwardProblem<T>;
    using Base::adjoint, Base::stream, Base::pairwise, Base::pairwise_gradient;
    using Base::dy_parts, Base::tile_packed, Base::other_packed, Base::rows_packed, Base::columns_packed;
    using Base::L, Base::kRowTile, Base::kColumnTile, Base::kFolds;
    using Base::my_product, Base::tiles, Base::window, Base::stream_columns, Base::write_padding;
    using Base::p, Base::problem, Base::N, Base::M, Base::features, Base::stride;
    using Base::to_x_given, Base::to_y_given, Base::through_cost, Base::unroll, Base::steps, Base::streaming;
    using Base::transposed_packed, Base::spent, Base::eps_rows, Base::grad_cost, Base::deps_of_potentials;
    using Base::x, Base::y, Base::to_x, Base::to_y, Base::dx, Base::dy, Base::last_F, Base::last_G;

    Backward(const SinkhornHadamardBackward& params, int64_t index) : Base(params, index) {}

    // One of the projections, by the kernel P / b ("to y": x_to_y, whose gradient is to_y) or P / a ("to x").
    // transported_j = sum_i kernel_ij left_i, or transported_i = sum_j kernel_ij right_j.
    struct Side {
        bool to_y, through_kernel, by_rows, by_columns, plan;
        const T *left, *right;
        TensorView row_factor, column_factor;  // by which the sums count in dx and dy, or absent

        bool needed() const { return through_kernel || by_rows || by_columns || plan; }
    };

    Side side_y() const {
        return {true, unroll && to_y_given, p.dx && to_y_given, p.dy && p.grad_y_hadamard, false, x, to_y,
                {},   p.grad_y_hadamard};
    }
    Side side_x() const {
        const bool plan = through_cost && (p.grad_transport_cost || (unroll && p.grad_plan));
        return {false,
                unroll && to_x_given,
                p.dx && p.grad_x_hadamard,
                p.dy && to_x_given,
                plan,
                to_x,
                y,
                p.grad_x_hadamard,
                {}};
    }

    void pack(const Team& team, const Side& side) const {
        const auto& it = adjoint;
        const int64_t vectors = stride / L;
        team.for_each(it.m_pad / L, [&](int64_t group) {
            if (side.by_rows)
                for (int64_t j = group * L; j < (group + 1) * L && j < it.m; ++j)
                    pack_row(rows_packed, side.right + j * stride, T(1), j, it.m, vectors);
            for (int64_t d = 0; side.through_kernel && d < features; d += L) {
                Vec<T> tile[L];
                PARROT_UNROLL
                for (int lane = 0; lane < L; ++lane) tile[lane] = load(side.right + (group * L + lane) * stride + d);
                transpose<T>(tile);
                for (int lane = 0; lane < L && d + lane < features; ++lane)
                    store(transposed_packed + packed_index<T>(d + lane, group, features, it.m_pad / L), tile[lane]);
            }
        });
        team.for_each(it.n, [&](int64_t i) {
            if (side.by_columns) pack_row(columns_packed, side.left + i * stride, T(1), i, it.n, vectors);
        });
    }

    // to_i += factor_i product_i
    void add_rows(int64_t begin, int64_t end, const TensorView& factor, const T* product, T* to) const {
        T values[L];
        for (int64_t i = begin; i < end; ++i, product += stride)
            for (int64_t d = 0; d < stride; d += L) {
                T* out = to + i * stride + d;
                if (factor) {
                    for (T& value : values) value = 0;
                    read_row(RowView(factor, problem, i).from(d), features - d < L ? features - d : L, values);
                    store(out, load(out) + load(values) * load(product + d));
                } else {
                    store(out, load(out) + load(product + d));
                }
            }
    }

    // What reaches log P through kernel_ij <left_i, right_j>, into dc, its sums by rows, and by columns in `partial`.
    __attribute__((noinline)) void kernel_gradient(int64_t begin, int64_t end, const Side& side, T* row_sums,
                                                   T* partial, T* product) const {
        const auto& it = adjoint;
        for (int64_t column = 0; column < it.m_pad; column += kColumnTile) {
            const int64_t width = column + kColumnTile < it.m_pad ? kColumnTile : it.m_pad - column;
            matmul<T>(end - begin, features, {side.left + begin * stride, stride, L * stride, 1, L},
                      transposed_packed + panel_offset<T>(column / L / kTileVectors<T>, features), width / L,
                      {product, kColumnTile, L * kColumnTile, L});
            for (int64_t i = begin; i < end; ++i) {
                Vec<T> sum{};
                for (int64_t j = 0; j < width; j += L) {
                    const Vec<T> value =
                        load(product + (i - begin) * kColumnTile + j) * load(it.kernel.at(i, column + j));
                    T *out = it.dc.at(i, column + j), *columns = partial + column + j;
                    store(out, load(out) - value);
                    store(columns, load(columns) + value);
                    sum += value;
                }
                row_sums[i] += sum_lanes<T>(sum);
            }
        }
    }

    // The same for what the plan and the transport cost give; dc also takes the latter's direct part.
    __attribute__((noinline)) void plan_gradient(int64_t i, T* partial) const {
        const auto& it = adjoint;
        const T direct = grad_cost * it.eps;
        Vec<T> sum{}, cost_sum{};
        for (int64_t j = 0; j < it.m_pad; j += L) {
            const Vec<T> c = load(it.cost.at(i, j)) * it.inverse, plan = load(it.kernel.at(i, j)) * it.a[i];
            Vec<T> value{};
            if (unroll) {
                T values[L] = {};
                if (p.grad_plan)
                    read_row(RowView(p.grad_plan, problem, i).from(j), it.m - j < L ? it.m - j : L, values);
                value = plan * (load(values) + c * direct);
                store(partial + j, load(partial + j) + value);
            }
            store(it.dc.at(i, j), load(it.dc.at(i, j)) + (plan * direct - value));
            sum += value;
            cost_sum += plan * c;
        }
        it.dF[i] += sum_lanes<T>(sum);
        spent[i] = sum_lanes<T>(cost_sum);
    }

    void through_side(const Team& team, const Side& side) {
        if (!side.needed()) return;
        auto& it = adjoint;
        pack(this->preparing(team), side);
        T* product = my_product(team);
        team.for_each(it.blocks, [&](int64_t block) {
            it.clear_partials(block);
            T* partial = it.partial_dG + block * it.m_pad;
            tiles(block, [&](int64_t begin, int64_t end) {
                window(team, begin, end);
                for (int64_t i = begin; i < end; ++i)
                    it.fill_row(i, side.to_y ? it.F[i] : it.alpha[i], side.to_y ? it.beta : it.G);
                if (side.through_kernel)
                    kernel_gradient(begin, end, side, side.to_y ? it.dF : it.row_extra, partial, product);
                if (side.plan)
                    for (int64_t i = begin; i < end; ++i) plan_gradient(i, partial);
                if (!side.by_rows) return;
                matmul<T>(end - begin, it.m, {it.kernel.at(begin, 0), L, L * it.m_pad, 1, L * L}, rows_packed,
                          stride / L, {product, stride, L * stride, L});
                add_rows(begin, end, side.row_factor, product, dx);
            });
        });
        team.for_each((it.m_pad + kRowTile - 1) / kRowTile, [&](int64_t tile) {
            const int64_t begin = tile * kRowTile, end = begin + kRowTile < it.m ? begin + kRowTile : it.m;
            if (side.by_columns && begin < end && !streaming) {
                matmul<T>(end - begin, it.n, {it.kernel.at(0, begin), 1, L * L, L, L * it.m_pad}, columns_packed,
                          stride / L, {product, stride, L * stride, L});
                add_rows(begin, end, side.column_factor, product, dy);
            }
            T* sums = side.to_y ? it.column_extra : it.dG;
            for (int64_t j = begin; j < begin + kRowTile && j < it.m_pad; j += L)
                store(sums + j, load(sums + j) + it.total(it.partial_dG, j));
        });
        if (side.by_columns && streaming)
            stream_columns(team, [&](int64_t begin, int64_t end, Blocked<T> cost, Blocked<T> kernel) {
                for (int64_t j = begin; j < end; ++j)
                    fill_row(cost, j - begin, side.to_y ? it.beta[j] : it.G[j], side.to_y ? it.F : it.alpha, it.inverse,
                             kernel);
                matmul<T>(end - begin, it.n, {kernel.first, L, L * it.n_pad, 1, L * L}, columns_packed, stride / L,
                          {product, stride, L * stride, L});
                add_rows(begin, end, side.column_factor, product, dy);
            });
    }

    void write_cost_row(int64_t i) const {
        const auto& it = adjoint;
        Vec<T> sum{};
        for (int64_t j = 0; j < it.m_pad; j += L) sum += load(it.dc.at(i, j)) * (load(it.cost.at(i, j)) * it.inverse);
        eps_rows[i] = sum_lanes<T>(sum);
        if (!p.dcost_matrix) return;
        T values[L] = {};
        for (int64_t j = 0; j < M; j += L) {
            if (j < it.m) store(values, load(it.dc.at(i, j)) * it.inverse);
            const int64_t valid = j > it.m ? 0 : it.m - j;
            write_row(RowView(p.dcost_matrix, problem, i).from(j), values, valid < L ? valid : L,
                      M - j < L ? M - j : L);
        }
    }

    // All of dc of rows [begin, end), again for the side by which the plan depends on the potentials.
    void stream_gradient(const Team& team, int64_t begin, int64_t end, T* unused) {
        auto& it = adjoint;
        window(team, begin, end);
        for (const Side& side : {side_y(), side_x()}) {
            if (!side.through_kernel && !side.plan) continue;
            T* const packed = transposed_packed;
            if (side.to_y) transposed_packed = other_packed;
            for (int64_t i = begin; i < end; ++i)
                it.fill_row(i, side.to_y ? last_F[i] : it.alpha[i], side.to_y ? it.beta : last_G);
            if (side.through_kernel) kernel_gradient(begin, end, side, it.dF, unused, my_product(team));
            if (side.plan)
                for (int64_t i = begin; i < end; ++i) plan_gradient(i, unused);
            transposed_packed = packed;
        }
        if (unroll) stream.add_gradient(begin, end, steps, unused);
    }

    // through_costs, tile by tile.
    void stream_costs(const Team& team) {
        auto& it = adjoint;
        auto& gradient = pairwise_gradient;
        const bool points = prepare_gradient(team);
        T *product = my_product(team), *mine = tile_packed + team.rank * kRowTile * stride;
        team.for_each(kFolds, [&](int64_t fold) {
            T* part = dy_parts + fold * it.m_pad * stride;
            for (int64_t d = 0; d < it.m_pad * stride; d += L) store(part + d, Vec<T>{});
            for (int64_t block = fold * it.blocks / kFolds; block < (fold + 1) * it.blocks / kFolds; ++block)
                tiles(block, [&](int64_t begin, int64_t end) {
                    stream_gradient(team, begin, end, it.partial_dG + block * it.m_pad);
                    for (int64_t i = begin; i < end; ++i) write_cost_row(i);
                    if (!points) return;
                    gradient.cost = it.cost, gradient.gradient = it.dc, gradient.near = it.kernel;
                    gradient.rows(begin, end, product);
                    if (!p.dy) return;
                    PairwiseGradient<T> of_tile = gradient;
                    of_tile.pairwise = pairwise.from_row(begin);
                    of_tile.pairwise.n = end - begin;
                    of_tile.gradient = stream.tile(team, 2, it.m_pad), of_tile.near = stream.tile(team, 1, it.m_pad);
                    of_tile.has_near += begin, of_tile.dy = part, of_tile.x_packed = mine;
                    for (int64_t i = begin; i < end; ++i)
                        pack_row(mine, pairwise.x_rows + i * stride, T(1), i - begin, end - begin, stride / L);
                    for (int64_t j = 0; j < it.m; j += kRowTile)
                        of_tile.columns(j, j + kRowTile < it.m ? j + kRowTile : it.m, product);
                });
        });
        team.for_each(points && p.dy ? it.m : 0, [&](int64_t j) {
            for (int64_t d = j * stride; d < (j + 1) * stride; d += L)
                for (int64_t fold = 0; fold < kFolds; ++fold)
                    store(dy + d, load(dy + d) + load(dy_parts + fold * it.m_pad * stride + d));
        });
    }

    // Whether there are gradients of points.
    bool prepare_gradient(const Team& team) {
        const auto& it = adjoint;
        const bool points = p.cost != CostKind::matrix && (p.dx || p.dy);
        auto& gradient = pairwise_gradient;
        gradient.pairwise = pairwise;
        gradient.cost = it.cost, gradient.gradient = it.dc, gradient.near = it.kernel;
        gradient.unit = it.inverse, gradient.dx = p.dx ? dx : nullptr, gradient.dy = p.dy ? dy : nullptr;
        gradient.x_packed = columns_packed, gradient.y_packed = rows_packed, gradient.sums = it.s;
        if (points) gradient.prepare(this->preparing(team));
        return points;
    }

    void through_costs(const Team& team) {
        auto& it = adjoint;
        auto& gradient = pairwise_gradient;
        const bool points = prepare_gradient(team);
        T* product = my_product(team);
        team.for_each(it.blocks, [&](int64_t block) {
            tiles(block, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) write_cost_row(i);
                if (points) gradient.rows(begin, end, product);
            });
        });
        if (!points || !p.dy) return;
        team.for_each((it.m + kRowTile - 1) / kRowTile, [&](int64_t tile) {
            const int64_t begin = tile * kRowTile;
            gradient.columns(begin, begin + kRowTile < it.m ? begin + kRowTile : it.m, product);
        });
    }

    // Gradients of weights, from those of their logarithms; zero where the weight is below the floor.
    void write_weights(const TensorView& out, const TensorView& weights, const T* of_logarithm, int64_t count,
                       int64_t total, T* scratch) const {
        if (!out) return;
        if (unroll) read_row(RowView(weights, problem), count, scratch);
        for (int64_t i = 0; i < count; ++i)
            scratch[i] = unroll && scratch[i] >= Exponent<T>::tiny ? of_logarithm[i] / scratch[i] : T(0);
        write_row(RowView(out, problem), scratch, count, total);
    }

    T deps() const {
        const auto& it = adjoint;
        if (!unroll) return 0;
        double through_plan = 0, through_c = 0, damping_x = 0, damping_y = 0;  // sums that cancel
        for (int64_t i = 0; i < it.n; ++i) {
            if (p.grad_transport_cost) through_plan += spent[i];
            through_c += eps_rows[i];
            damping_x += it.row_damping[i];
        }
        for (int64_t j = 0; j < it.m; ++j) damping_y += it.column_damping[j];
        double sum = deps_of_potentials + (grad_cost * through_plan - through_c / it.eps);
        // The derivative of rho / (rho + eps).
        if (!it.balanced_x) sum -= damping_x * it.damp_x / (p.rho_x + it.eps);
        if (!it.balanced_y) sum -= damping_y * it.damp_y / (p.rho_y + it.eps);
        return static_cast<T>(sum);
    }

    void finish(const Team& team) {
        auto& it = adjoint;
        team.for_each(p.dx ? it.n : 0,
                      [&](int64_t i) { write_row(RowView(p.dx, problem, i), dx + i * stride, features, features); });
        team.for_each(p.dy ? it.m : 0,
                      [&](int64_t j) { write_row(RowView(p.dy, problem, j), dy + j * stride, features, features); });
        if (team.rank != 0) return;
        write_padding(it.n, it.m);
        write_weights(p.da, p.a, it.dlog_a, it.n, N, it.s);
        write_weights(p.db, p.b, it.dlog_b, it.m, M, it.t);
        if (p.deps) element<T>(p.deps, problem) = deps();
    }

    // On memory that `carve` was given; every thread of the team calls it on its own copy of this object.
    void run(const Team& team) {
        if (this->replicated) this->carve_points(this->copies + team.rank * this->copy_bytes);
        if (team.rank == 0) {
            adjoint.start(p.a, p.b, streaming ? 0 : steps);
            if (streaming)
                for (int64_t i = adjoint.n; i < adjoint.n_pad; ++i) adjoint.F[i] = -T(__builtin_huge_val());
        }
        team.barrier();
        this->prepare(team);
        this->find_potentials(team);
        if (streaming) this->keep_potentials(team);
        T* const packed = transposed_packed;
        if (streaming) transposed_packed = other_packed;
        through_side(team, side_y());
        transposed_packed = packed;
        through_side(team, side_x());
        const Team iterating = adjoint.n * adjoint.m >= kShared ? team : team.alone();
        if (iterating.size > 0 && streaming) stream.run(iterating, steps);
        if (iterating.size > 0 && !streaming) adjoint.run(iterating, steps);
        team.barrier();
        if (through_cost && streaming) stream_costs(team);
        if (through_cost && !streaming) through_costs(team);
        finish(team);
    }
};

template <typename T>
void backward(const SinkhornHadamardBackward& p) {
    const int64_t costs = p.x.size[1] * p.y.size[1], iterations = p.f_history ? p.f_history.size[1] : 0;
    const double work = double(costs) * double(2 * iterations + 4 * p.x.size[2]);
    run_batch<Backward<T>>(p, {p.x.size[0], work, 2e9, costs}, "sinkhorn_hadamard");
}

}  // namespace

void sinkhorn_hadamard_backward(const SinkhornHadamardBackward& params) {
    if (params.x.dtype == DType::f64)
        backward<double>(params);
    else
        backward<float>(params);
}

}  // namespace PARROT_ISA
}  // namespace parrot
