// The adjoint of the Sinkhorn iteration of one problem, from the potentials that the forward stored.
//
// In units of eps, with c = C / eps, F = f / eps, G = g / eps and dF, dG the gradients of F, G, an iteration backwards
// is
//     dlog b_j += dG_j,   dc_ij += W_ij dG_j,   dF_i -= sum_j W_ij dG_j,   W_ij = damp_y softmax_i(F_i - c_ij),
//     dlog a_i += dF_i,   dc_ij += V_ij dF_i,   dG_j  = -sum_i V_ij dF_i,  V_ij = damp_x softmax_j(G_j - c_ij),
// with the F of this iteration and the G of the one before. Kept are offsets alpha, beta and the matrix
// K_ij = exp(alpha_i + beta_j - c_ij). With h = exp(F - alpha), w = exp(G - beta), t = K^T h and s = K w,
//     W_ij = damp_y K_ij h_i / t_j,   V_ij = damp_x K_ij w_j / s_i:
// no exponential of an (n, m) matrix. A pass over K takes the products with p = damp_y dG / t and w, whence dF and
// q = damp_x dF / s, then adds K^T q and the next K^T h, while a few rows are in the first-level cache. The weights
// are normalised by sums over the very K in use, so that rounding neither makes nor loses mass.
// The p, q, h, w of many iterations are kept, and dc += K o (H^T P + Q^T W) is one matrix product.
//
// Exactness. Entries of K below the least normal number, e^-87, are lost. With h and w at most e^40 that is less than
// rounding in sums s and t within [e^-20, e^20]. Where they leave this range, offsets are set anew, so that every row
// of K w and every column of K^T h has a largest term of one. Where K then has an entry above e^40, which takes
// weights near zero on both sides, this iteration is done with softmax weights in the log domain.
#pragma once

#include "sinkhorn_iteration.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T>
struct SinkhornAdjoint {
    static constexpr int L = kLanes<T>;
    static constexpr T kTrusted = T(485165195.4);                                       // e^20
    static constexpr T kLargestLog = T(40), kLargestScaling = T(2.353852668370200e17);  // and e^40
    static constexpr int64_t kMaxBlocks = 64, kChunkVectors = 4;
    static constexpr int64_t kRowTile = 32, kColumnTile = 4 * kTileVectors<T> * L;  // of the matrix products
    static constexpr int kKept = 64;  // iterations whose p, q, h, w are kept until they go into dc

    int64_t n, m, n_pad, m_pad;
    int64_t block_rows, blocks, chunks;
    T eps, damp_x, damp_y, inverse;  // inverse = 1 / (scale eps)
    bool balanced_x, balanced_y;
    TensorView f_history, g_history;
    int64_t problem;

    Blocked<T> cost, kernel, dc;   // (n_pad, m_pad), the cost not yet scaled; zero in padded columns
    T *a, *log_a, *alpha, *F, *s;  // (n_pad)
    T *b, *log_b, *beta, *G, *t;   // (m_pad); in the padding log_b, beta and G are -infinity
    T *row_tail, *column_tail;     // one in the padding, zero elsewhere
    T* h_next;                     // (n_pad), h of the iteration that is next, the one before in time
    T *dF, *dF_new, *dG;           // gradients of the potentials but for that part of the last ones' which comes
    T *row_extra, *column_extra;   // from y_to_x (x_to_y), where log a (log b) cancels
    T *dlog_a, *dlog_b;
    T *row_damping, *column_damping;  // gradients of damp_x and damp_y, by rows and by columns
    T *partial_dG, *partial_t;        // (blocks, m_pad): what each block of rows adds
    T *left, *right, *right_packed;   // (2 kKept, n_pad) and (2 kKept, m_pad): h and q, p and w in turn
    T* products;                      // (threads, kRowTile, kColumnTile)
    int* flags;                       // one for each check, set by whoever meets what K can't hold
    // Copies of each thread, always equal:
    int checks = 0, kept = 0;
    bool have_kernel = false, have_t = false;

    void set_shape(int64_t n_, int64_t m_) {
        n = n_, m = m_;
        n_pad = round_up<T>(n), m_pad = round_up<T>(m);
        // Threads share out blocks, so that small problems need small ones.
        const int64_t rows = (n_pad + kMaxBlocks - 1) / kMaxBlocks, least = n_pad <= 128 ? 32 : 64;
        block_rows = round_up<T>(rows > least ? rows : least);
        blocks = (n_pad + block_rows - 1) / block_rows;
        chunks = (m_pad / L + kChunkVectors - 1) / kChunkVectors;
    }

    // `steps` is 0 where there is no iteration to go back through.
    // Without matrices, and products of them, for sinkhorn_streaming_backward.h.
    void carve(Carver& carver, int threads, int64_t steps, bool with_cost_gradient, bool matrices) {
        const int64_t size = matrices ? n_pad * m_pad : 0;
        cost = {carver.take<T>(size), m_pad};
        kernel = {carver.take<T>(size), m_pad};
        dc = {carver.take<T>(with_cost_gradient ? size : 0), m_pad};
        if (!matrices) steps = 0;
        for (T** array :
             {&a, &log_a, &alpha, &F, &s, &row_tail, &h_next, &dF, &dF_new, &row_extra, &dlog_a, &row_damping})
            *array = carver.take<T>(n_pad);
        for (T** array : {&b, &log_b, &beta, &G, &t, &column_tail, &dG, &column_extra, &dlog_b, &column_damping})
            *array = carver.take<T>(m_pad);
        partial_dG = carver.take<T>(blocks * m_pad);
        partial_t = carver.take<T>(blocks * m_pad);
        const int64_t depth = 2 * (steps < kKept ? steps : kKept);
        left = carver.take<T>(depth * n_pad);
        right = carver.take<T>(depth * m_pad);
        right_packed = carver.take<T>(depth * m_pad);
        products = carver.take<T>(steps ? threads * kRowTile * kColumnTile : 0);
        flags = carver.take<int>(flag_count(steps));
    }

    static int64_t flag_count(int64_t steps) { return 8 * steps; }

    int64_t block_begin(int64_t block) const { return block * block_rows; }
    int64_t block_end(int64_t block) const { return block + 1 < blocks ? block_begin(block + 1) : n_pad; }
    int64_t chunk_begin(int64_t chunk) const { return chunk * kChunkVectors * L; }
    int64_t chunk_end(int64_t chunk) const { return chunk + 1 < chunks ? chunk_begin(chunk + 1) : m_pad; }

    // Of the iteration at hand; p, q, h, w stay where the product with all of them will look for them.
    T* h() const { return left + 2 * kept * n_pad; }
    T* q() const { return h() + n_pad; }
    T* p() const { return right + 2 * kept * m_pad; }
    T* w() const { return p() + m_pad; }

    // By one thread, before anything else.
    void start(const TensorView& given_a, const TensorView& given_b, int64_t steps) {
        const T infinity = __builtin_huge_val();
        using Iteration = SinkhornIteration<T>;
        Iteration::log_weights(a, log_a, row_tail, given_a, problem, n, n_pad, 0);
        Iteration::log_weights(b, log_b, column_tail, given_b, problem, m, m_pad, -infinity);
        for (int64_t i = 0; i < n_pad; ++i)
            alpha[i] = F[i] = dF[i] = row_extra[i] = dlog_a[i] = row_damping[i] = h_next[i] = 0;
        for (int64_t j = 0; j < m_pad; ++j) {
            beta[j] = G[j] = j < m ? 0 : -infinity;
            dG[j] = column_extra[j] = dlog_b[j] = column_damping[j] = 0;
        }
        for (int64_t i = 0; i < flag_count(steps); ++i) flags[i] = 0;
    }

    void flag_if(bool bad) const {
        if (bad) __atomic_store_n(flags + checks, 1, __ATOMIC_RELAXED);
    }

    // After a barrier, by every thread: whether one raised the flag since the last call.
    bool flagged() { return __atomic_load_n(flags + checks++, __ATOMIC_RELAXED) != 0; }

    PARROT_INLINE static bool untrusted(Vec<T> sums) {
        return any(~((sums >= T(1) / kTrusted) & (sums <= kTrusted)));  // NaN is untrusted too
    }

    // Potentials [begin, end) of iteration k in units of eps; before the first they are zero.
    void read_history(const TensorView& history, int64_t k, int64_t begin, int64_t end, T* out) const {
        if (k < 0) {
            for (int64_t i = begin; i < end; ++i) out[i] = 0;
            return;
        }
        if (k > 0) RowView(history, problem, k - 1).from(begin).prefetch(end - begin);
        read_row(RowView(history, problem, k).from(begin), end - begin, out + begin);
        for (int64_t i = begin; i < end; ++i) out[i] /= eps;
    }

    void read_rows(int64_t block, int64_t k, T* out) const {
        const int64_t end = block_end(block) < n ? block_end(block) : n;
        if (block_begin(block) < end) read_history(f_history, k, block_begin(block), end, out);
    }

    void read_columns(int64_t chunk, int64_t k) const {
        const int64_t end = chunk_end(chunk) < m ? chunk_end(chunk) : m;
        if (chunk_begin(chunk) < end) read_history(g_history, k, chunk_begin(chunk), end, G);
    }

    // exp(potential - offset), zero in the padding.
    PARROT_INLINE void scalings(const T* potential, const T* offset, const T* tail, int64_t i, T* out) const {
        const IntVec<T> padding = load(tail + i) > T(0);
        const Vec<T> exponent = padding ? Vec<T>{} : load(potential + i) - load(offset + i);
        flag_if(any(~(exponent <= kLargestLog)));
        store(out + i, padding ? Vec<T>{} : exp<T>(exponent));
    }

    // The largest F_i - c_ij of kLanes columns.
    PARROT_INLINE Vec<T> largest_in_columns(int64_t j) const {
        Vec<T> largest = broadcast(-T(__builtin_huge_val()));
        for (int64_t i = 0; i < n; ++i) largest = vmax(broadcast(F[i]) - load(cost.at(i, j)) * inverse, largest);
        return largest;
    }

    PARROT_INLINE T largest_in_row(int64_t i) const {
        const T* c = cost.at(i, 0);
        Vec<T> largest = broadcast(-T(__builtin_huge_val()));
        for (int64_t j = 0; j < m_pad; j += L) largest = vmax(load(G + j) - load(c + j * L) * inverse, largest);
        return max_lanes<T>(largest);
    }

    // LSE_i(F_i - c_ij) of kLanes columns.
    __attribute__((noinline)) Vec<T> column_lse(int64_t j) const {
        const Vec<T> largest = largest_in_columns(j);
        Vec<T> sum{};
        for (int64_t i = 0; i < n; ++i) sum += exp<T>((broadcast(F[i]) - load(cost.at(i, j)) * inverse) - largest);
        return largest + log<T>(sum);
    }

    __attribute__((noinline)) T row_lse(int64_t i) const {
        const T *c = cost.at(i, 0), largest = largest_in_row(i);
        Vec<T> sum{};
        for (int64_t j = 0; j < m_pad; j += L) sum += exp<T>((load(G + j) - load(c + j * L) * inverse) - largest);
        return largest + log_one(sum_lanes<T>(sum));
    }

    // Row i of the kernel: exp(row + columns_j - c_ij). Returns its largest exponent.
    PARROT_INLINE T fill_row(int64_t i, T row, const T* columns) const {
        const T* c = cost.at(i, 0);
        T* out = kernel.at(i, 0);
        Vec<T> largest = broadcast(-T(__builtin_huge_val()));
        for (int64_t j = 0; j < m_pad; j += L) {
            const Vec<T> exponent = (load(columns + j) + row) - load(c + j * L) * inverse;
            largest = vmax(exponent, largest);
            store(out + j * L, exp<T>(exponent));
        }
        return max_lanes<T>(largest);
    }

    // Offsets and kernel anew for iteration k. False if the kernel can't hold them.
    bool refresh(const Team& team, int64_t k) {
        team.for_each(blocks + chunks, [&](int64_t i) {
            if (i < blocks)
                read_rows(i, k, F);
            else
                read_columns(i - blocks, k - 1);
        });
        team.for_each(chunks, [&](int64_t chunk) {
            for (int64_t j = chunk_begin(chunk); j < chunk_end(chunk); j += L) {
                const IntVec<T> padding = load(column_tail + j) > T(0);
                store(beta + j, padding ? broadcast(-T(__builtin_huge_val())) : -largest_in_columns(j));
            }
        });
        team.for_each(blocks, [&](int64_t block) {
            for (int64_t i = block_begin(block); i < block_end(block); ++i) {
                if (i < n) {
                    alpha[i] = -largest_in_row(i);
                    flag_if(!(fill_row(i, alpha[i], beta) <= kLargestLog));
                } else {
                    for (int64_t j = 0; j < m_pad; j += L) store(kernel.at(i, j), Vec<T>{});
                }
            }
        });
        have_t = false;
        have_kernel = !flagged();
        return have_kernel;
    }

    static constexpr int kStep = kTileRows<T>;  // rows whose sums are in registers together

    // Sums of kLanes rows of the kernel from i on times p, and times w.
    PARROT_INLINE void dot_rows(int64_t i, Vec<T>& with_p, Vec<T>& with_w) const {
        const T* rows = kernel.at(i, 0);
        n - i > L / 2 ? dot_rows<L>(rows, with_p, with_w) : dot_rows<L / 2>(rows, with_p, with_w);
    }

    template <int valid>  // what comes after these rows is padding
    PARROT_INLINE void dot_rows(const T* rows, Vec<T>& with_p, Vec<T>& with_w) const {
        constexpr int step = valid < kStep ? valid : kStep;
        Vec<T> sums_p[L] = {}, sums_w[L] = {};
        const T *p_ = p(), *w_ = w();
        PARROT_UNROLL
        for (int first = 0; first < valid; first += step) {
            Vec<T> sum_p[step] = {}, sum_w[step] = {};
            const T* entry = rows + first * L;
            for (int64_t j = 0; j < m_pad; j += L, entry += L * L) {
                const Vec<T> pj = load(p_ + j), wj = load(w_ + j);
                PARROT_UNROLL
                for (int r = 0; r < step; ++r) {
                    const Vec<T> k = load(entry + r * L);
                    sum_p[r] += k * pj;
                    sum_w[r] += k * wj;
                }
            }
            PARROT_UNROLL
            for (int r = 0; r < step; ++r) sums_p[first + r] = sum_p[r], sums_w[first + r] = sum_w[r];
        }
        with_p = sum_each<T>(sums_p);
        with_w = sum_each<T>(sums_w);
    }

    // Adds kLanes rows from i on times q and times the next h.
    PARROT_INLINE void add_rows(int64_t i, T* to_dG, T* to_t) const {
        n - i > L / 2 ? add_rows<L>(i, to_dG, to_t) : add_rows<L / 2>(i, to_dG, to_t);
    }

    template <int valid>
    PARROT_INLINE void add_rows(int64_t i, T* to_dG, T* to_t) const {
        constexpr int step = valid < kStep ? valid : kStep;
        const T *rows = kernel.at(i, 0), *q_ = q() + i, *h_ = h_next + i;
        PARROT_UNROLL
        for (int first = 0; first < valid; first += step) {
            Vec<T> by_q[step], by_h[step];
            PARROT_UNROLL
            for (int r = 0; r < step; ++r) by_q[r] = broadcast(q_[first + r]), by_h[r] = broadcast(h_[first + r]);
            const T* entry = rows + first * L;
            for (int64_t j = 0; j < m_pad; j += L, entry += L * L) {
                Vec<T> with_q = load(to_dG + j), with_h = load(to_t + j);
                PARROT_UNROLL
                for (int r = 0; r < step; ++r) {
                    const Vec<T> k = load(entry + r * L);
                    with_q += k * by_q[r];
                    with_h += k * by_h[r];
                }
                store(to_dG + j, with_q);
                store(to_t + j, with_h);
            }
        }
    }

    void clear_partials(int64_t block) const {
        for (int64_t j = 0; j < m_pad; j += L) {
            store(partial_dG + block * m_pad + j, Vec<T>{});
            store(partial_t + block * m_pad + j, Vec<T>{});
        }
    }

    PARROT_INLINE Vec<T> total(const T* partial, int64_t j) const {
        Vec<T> sum{};
        for (int64_t block = 0; block < blocks; ++block) sum += load(partial + block * m_pad + j);
        return sum;
    }

    // h of iteration k and of the next; the block's part of t where the last pass didn't leave it.
    __attribute__((noinline)) void prepare_rows(int64_t block, int64_t k) const {
        const int64_t begin = block_begin(block), end = block_end(block);
        if (have_t) {  // so is h
            for (int64_t i = begin; i < end; i += L) {
                flag_if(any(~(load(h_next + i) <= kLargestScaling)));
                store(h() + i, load(h_next + i));
            }
        } else {
            read_rows(block, k, F);
            for (int64_t i = begin; i < end; i += L) scalings(F, alpha, row_tail, i, h());
            clear_partials(block);
            T* to_t = partial_t + block * m_pad;
            for (int64_t i = begin; i < end; ++i)
                for (int64_t j = 0; j < m_pad; j += L) store(to_t + j, load(to_t + j) + load(kernel.at(i, j)) * h()[i]);
        }
        if (k == 0) return;
        read_rows(block, k - 1, s);  // not in use yet
        for (int64_t i = begin; i < end; i += L) {
            const IntVec<T> padding = load(row_tail + i) > T(0);
            store(h_next + i, padding ? Vec<T>{} : exp<T>(load(s + i) - load(alpha + i)));
        }
    }

    __attribute__((noinline)) void prepare_columns(int64_t chunk, int64_t k) const {
        read_columns(chunk, k - 1);
        for (int64_t j = chunk_begin(chunk); j < chunk_end(chunk); j += L) {
            scalings(G, beta, column_tail, j, w());
            const Vec<T> sum = load(column_tail + j) + total(partial_t, j);
            flag_if(untrusted(sum));
            store(t + j, sum);
            store(p() + j, (load(dG + j) + load(column_extra + j)) * damp_y / sum);
        }
    }

    __attribute__((noinline)) void row_block(int64_t block) const {
        clear_partials(block);
        const int64_t end = block_end(block);
        Vec<T> next_p, next_w;  // taken before the group before is added, so that neither waits for the divisions
        dot_rows(block_begin(block), next_p, next_w);
        for (int64_t i = block_begin(block); i < end; i += L) {
            const Vec<T> with_p = next_p, with_w = next_w + load(row_tail + i);
            flag_if(untrusted(with_w));
            store(s + i, with_w);
            // dF itself changes when it is certain that the kernel can be trusted.
            const Vec<T> gradient = load(dF + i) - load(h() + i) * with_p;
            store(dF_new + i, gradient);
            store(q() + i, (gradient + load(row_extra + i)) * damp_x / with_w);
            if (i + L < end) dot_rows(i + L, next_p, next_w);
            add_rows(i, partial_dG + block * m_pad, partial_t + block * m_pad);
        }
    }

    // Whether iteration k could be done with the kernel at hand.
    bool attempt(const Team& team, int64_t k) {
        team.for_each(blocks, [&](int64_t block) { prepare_rows(block, k); });
        team.for_each(chunks, [&](int64_t chunk) { prepare_columns(chunk, k); });
        if (flagged()) return false;
        team.for_each(blocks, [&](int64_t block) { row_block(block); }, k & 1);
        if (flagged()) return false;
        team.for_each(blocks + chunks, [&](int64_t i) {
            if (i < blocks)
                finish_rows(i);
            else
                finish_columns(i - blocks);
        });
        have_t = true;
        if (++kept == kKept) flush(team);
        return true;
    }

    __attribute__((noinline)) void finish_rows(int64_t block) const {
        for (int64_t i = block_begin(block); i < block_end(block); i += L) {
            const Vec<T> gradient = load(dF_new + i);
            store(dlog_a + i, load(dlog_a + i) + gradient);
            if (!balanced_x) {
                const Vec<T> lse = log<T>(load(s + i)) - load(alpha + i);
                store(row_damping + i, load(row_damping + i) - (gradient + load(row_extra + i)) * lse);
            }
            store(dF + i, Vec<T>{});
            store(row_extra + i, Vec<T>{});
        }
    }

    __attribute__((noinline)) void finish_columns(int64_t chunk) const {
        for (int64_t j = chunk_begin(chunk); j < chunk_end(chunk); j += L) {
            const Vec<T> gradient = load(dG + j);
            store(dlog_b + j, load(dlog_b + j) + gradient);
            if (!balanced_y) {
                const IntVec<T> padding = load(column_tail + j) > T(0);
                const Vec<T> lse = padding ? Vec<T>{} : log<T>(load(t + j)) - load(beta + j);
                store(column_damping + j, load(column_damping + j) - (gradient + load(column_extra + j)) * lse);
            }
            store(dG + j, -load(w() + j) * total(partial_dG, j));
            store(column_extra + j, Vec<T>{});
        }
    }

    // dc += K o (sum of the outer products that were kept).
    void flush(const Team& team) {
        if (kept == 0) return;
        const int64_t depth = 2 * kept, vectors = m_pad / L;
        team.for_each(depth,
                      [&](int64_t row) { pack_row(right_packed, right + row * m_pad, T(1), row, depth, vectors); });
        T* product = products + team.rank * kRowTile * kColumnTile;
        team.for_each(blocks, [&](int64_t block) {
            for (int64_t j = 0; j < m_pad; j += kColumnTile)
                for (int64_t i = block_begin(block); i < block_end(block); i += kRowTile)
                    flush_tile(i, i + kRowTile < n ? i + kRowTile : n, j, depth, product);
        });
        kept = 0;
    }

    __attribute__((noinline)) void flush_tile(int64_t begin, int64_t end, int64_t column, int64_t depth,
                                              T* product) const {
        if (begin >= end) return;
        const int64_t width = column + kColumnTile < m_pad ? kColumnTile : m_pad - column;
        matmul<T>(end - begin, depth, {left + begin, 1, L, n_pad, L * n_pad},
                  right_packed + panel_offset<T>(column / L / kTileVectors<T>, depth), width / L,
                  {product, kColumnTile, L * kColumnTile, L});
        for (int64_t i = begin; i < end; ++i, product += kColumnTile)
            for (int64_t j = 0; j < width; j += L) {
                T* out = dc.at(i, column + j);
                store(out, load(out) + load(kernel.at(i, column + j)) * load(product + j));
            }
    }

    // Iteration k in the log domain; s and t hold the logarithms of the sums.
    void log_step(const Team& team, int64_t k) {
        team.for_each(blocks + chunks, [&](int64_t i) {
            if (i < blocks)
                read_rows(i, k, F);
            else
                read_columns(i - blocks, k - 1);
        });
        team.for_each(chunks, [&](int64_t chunk) {
            for (int64_t j = chunk_begin(chunk); j < chunk_end(chunk); j += L) {
                const Vec<T> gradient = load(dG + j), all = gradient + load(column_extra + j), lse = column_lse(j);
                store(t + j, lse);
                store(p() + j, all * damp_y);
                store(dlog_b + j, load(dlog_b + j) + gradient);
                store(column_damping + j, load(column_damping + j) - all * lse);
            }
        });
        team.for_each(blocks, [&](int64_t block) {
            clear_partials(block);
            for (int64_t i = block_begin(block); i < block_end(block) && i < n; ++i)
                log_row(i, partial_dG + block * m_pad);
        });
        team.for_each(chunks, [&](int64_t chunk) {
            for (int64_t j = chunk_begin(chunk); j < chunk_end(chunk); j += L) {
                store(dG + j, -total(partial_dG, j));
                store(column_extra + j, Vec<T>{});
            }
        });
        have_kernel = false;
    }

    __attribute__((noinline)) void log_row(int64_t i, T* to_dG) const {
        const T* c = cost.at(i, 0);
        T* out = dc.at(i, 0);
        const T *p_ = p(), lse = row_lse(i);
        Vec<T> sum{};
        for (int64_t j = 0; j < m_pad; j += L) {
            const Vec<T> part = exp<T>((F[i] - load(c + j * L) * inverse) - load(t + j)) * load(p_ + j);
            store(out + j * L, load(out + j * L) + part);
            sum += part;
        }
        const T gradient = dF[i] - sum_lanes<T>(sum), all = gradient + row_extra[i];
        dlog_a[i] += gradient;
        row_damping[i] -= all * lse;
        dF[i] = row_extra[i] = 0;
        for (int64_t j = 0; j < m_pad; j += L) {
            const Vec<T> part = exp<T>((load(G + j) - load(c + j * L) * inverse) - lse) * (all * damp_x);
            store(out + j * L, load(out + j * L) + part);
            store(to_dG + j, load(to_dG + j) + part);
        }
    }

    // All iterations, from the last to the first: adds to dc, dlog_a, dlog_b and the gradients of the dampings.
    void run(const Team& team, int64_t steps) {
        for (int64_t k = steps - 1; k >= 0; --k) {
            if (have_kernel && attempt(team, k)) continue;
            flush(team);
            if (!refresh(team, k) || !attempt(team, k)) log_step(team, k);
        }
        flush(team);
    }
};

}  // namespace PARROT_ISA
}  // namespace parrot
