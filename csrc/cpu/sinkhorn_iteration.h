// The Sinkhorn iteration of one problem, by scalings of a kernel matrix that is kept in memory.
//
// In units of eps, with c = C / eps, F = f / eps, G = g / eps, an iteration is
//     F_i = log a_i - damp_x LSE_j(G_j - c_ij),    G_j = log b_j - damp_y LSE_i(F_i - c_ij).
// Kept are offsets alpha, beta, the matrix K_ij = exp(alpha_i + beta_j - c_ij), and scalings u, v, so that
//     F_i = alpha_i + log u_i + log a_i,    G_j = beta_j + log v_j + log b_j,    P_ij = a_i u_i K_ij v_j b_j:
// K is a density with respect to a x b, of order one whatever the weights, and the projections need no division by
// weights. With s_i = sum_j K_ij w_j, w = b v, and t_j = sum_i K_ij h_i, h = a u, balanced updates are u = 1 / s,
// v = 1 / t (Schmitzer 2019, arXiv 1610.06519, section 3). One pass over K does both: a few rows are dotted with w,
// then added to t with their new h, while they are in the first-level cache.
//
// Exactness. Entries of K below the least normal number are lost. Sums s and t are trusted within [e^-20, e^20] only,
// where what was lost is less than rounding: it is at most e^-87 times the sum of weights. A row outside is redone
// in the log domain, with its maximum, and its offset and its row of K set anew; so is a vector of columns. At the
// start no row has an offset, so the first pass is such a refresh of all rows. This covers small eps and outliers,
// where many iterations refresh. What it can't represent (a kernel entry above e^40, as beside weights near zero)
// makes the problem start again with plain log-domain steps.
#pragma once

#include "pairwise_cost.h"
#include "tensor_rows.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T>
struct SinkhornIteration {
    static constexpr int L = kLanes<T>;
    static constexpr T kTrusted = T(485165195.4);  // e^20
    static constexpr T kLargestLog = T(20), kLargestEntry = T(40);
    static constexpr T kLargestMass = T(1e6);
    static constexpr int64_t kBlockRows = 64, kMaxBlocks = 64, kChunkVectors = 4;

    int64_t n, m, n_pad, m_pad;
    int64_t block_rows, blocks, chunks;
    int n_iters;
    T eps, tol, damp_x, damp_y, inverse;  // inverse = 1 / (scale eps)
    bool balanced_x, balanced_y, tolerance;
    TensorView f_history, g_history;
    int64_t problem;

    Blocked<T> cost, kernel;          // (n_pad, m_pad), the cost not yet scaled; zero in padded columns
    T *a, *log_a, *alpha, *h;         // (n_pad); a and h are zero in the padding
    T *u[2], *F[2];                   // (n_pad), after odd and after even iterations
    T *b, *log_b, *beta, *v, *w, *G;  // (m_pad); in the padding b and w are zero, log_b, beta and G -infinity
    T *row_tail, *column_tail;        // one in the padding, zero elsewhere: added to sums, to keep divisions finite
    T* partial;                       // (blocks, m_pad): what each block of rows adds to t
    T* block_error;                   // (blocks)
    T* column_scratch;                // (threads, n_pad)
    int* unrepresentable;  // [parity of the iteration]: set by whoever meets an entry that the kernel can't hold
    int* last_refresh;     // of a row: the iteration
    // Copies of each thread, always equal:
    bool keep_potentials = false;  // F and G are needed after every iteration
    bool potentials_ready = true;  // whether G belongs to the last v

    struct Result {
        int iterations;
        T error;
    };

    void set_shape(int64_t n_, int64_t m_) {
        n = n_, m = m_;
        n_pad = round_up<T>(n), m_pad = round_up<T>(m);
        const int64_t rows = (n_pad + kMaxBlocks - 1) / kMaxBlocks;
        block_rows = round_up<T>(rows > kBlockRows ? rows : kBlockRows);
        blocks = (n_pad + block_rows - 1) / block_rows;
        chunks = (m_pad / L + kChunkVectors - 1) / kChunkVectors;
    }

    // Without matrices for sinkhorn_streaming.h.
    void carve(Carver& carver, int threads, bool matrices) {
        cost = {carver.take<T>(matrices ? n_pad * m_pad : 0), m_pad};
        kernel = {carver.take<T>(matrices ? n_pad * m_pad : 0), m_pad};
        for (T** array : {&a, &log_a, &alpha, &h, &u[0], &u[1], &F[0], &F[1], &row_tail})
            *array = carver.take<T>(n_pad);
        for (T** array : {&b, &log_b, &beta, &v, &w, &G, &column_tail}) *array = carver.take<T>(m_pad);
        partial = carver.take<T>(blocks * m_pad);
        block_error = carver.take<T>(blocks);
        column_scratch = carver.take<T>(threads * n_pad);
        unrepresentable = carver.take<int>(2);
        last_refresh = carver.take<int>(1);
    }

    int64_t block_begin(int64_t block) const { return block * block_rows; }
    int64_t block_end(int64_t block) const {
        const int64_t end = (block + 1) * block_rows;
        return end < n_pad ? end : n_pad;
    }

    static void log_weights(T* weights, T* logs, T* tail, const TensorView& given, int64_t index, int64_t count,
                            int64_t padded, T log_padding) {
        if (given) read_row(RowView(given, index), count, weights);
        for (int64_t i = 0; i < padded; ++i) {
            if (i >= count)
                weights[i] = 0;
            else if (!given)
                weights[i] = T(1) / count;
            else if (weights[i] < Exponent<T>::tiny)
                weights[i] = Exponent<T>::tiny;
            tail[i] = i < count ? 0 : 1;
        }
        for (int64_t i = 0; i < padded; i += L) {
            const IntVec<T> padding = load(tail + i) > T(0);
            store(logs + i, padding ? broadcast(log_padding) : log<T>(load(weights + i)));
        }
    }

    // By one thread, before anything else.
    void set_weights(const TensorView& given_a, const TensorView& given_b) {
        log_weights(a, log_a, row_tail, given_a, problem, n, n_pad, 0);
        log_weights(b, log_b, column_tail, given_b, problem, m, m_pad, -T(__builtin_huge_val()));
        unrepresentable[0] = unrepresentable[1] = *last_refresh = 0;
    }

    T mass(const T* weights, int64_t padded) const {
        Vec<T> sum{};
        for (int64_t i = 0; i < padded; i += L) sum += load(weights + i);
        return sum_lanes<T>(sum);
    }

    void write_history(const TensorView& history, int k, const T* potential, int64_t begin, int64_t end) const {
        if (!history || k > n_iters) return;
        const RowView row(history, problem, k - 1);
        T* plain = row.plain<T>();
        T scaled[L];
        for (int64_t i = begin; i < end; i += L) {
            if (plain && i + L <= end) {
                store(plain + i, load(potential + i) * eps);
            } else {
                store(scaled, load(potential + i) * eps);
                write_row(row.from(i), scaled, end - i < L ? end - i : L, 0);
            }
        }
    }

    // By parity: a thread may enter the next iteration while another still reads this one's flag.
    void flag_if(bool bad, int k) const {
        if (bad) __atomic_store_n(unrepresentable + (k & 1), 1, __ATOMIC_RELAXED);
    }

    // Row i anew from the cost: its maximum into alpha, its row of K; returns its sum s.
    __attribute__((noinline)) T refresh_row(int64_t i, int k) {
        const T *c = cost.at(i, 0), scale = inverse;
        Vec<T> largest = broadcast(-T(__builtin_huge_val()));
        for (int64_t j = 0; j < m_pad; j += L) largest = vmax(load(G + j) - load(c + j * L) * scale, largest);
        const T offset = -max_lanes<T>(largest);
        if (k > 1) {  // the last iteration's u with respect to the new offset
            T& before = u[(k - 1) & 1][i];
            const T potential = keep_potentials ? F[(k - 1) & 1][i] - log_a[i] : alpha[i] + log_one(before);
            before = exp_one(potential - offset);
            __atomic_store_n(last_refresh, k, __ATOMIC_RELAXED);
        }
        alpha[i] = offset;
        Vec<T> sum{};
        largest = Vec<T>{};
        T* row = kernel.at(i, 0);
        for (int64_t j = 0; j < m_pad; j += L) {
            const Vec<T> exponent = (load(beta + j) + offset) - load(c + j * L) * scale;
            const Vec<T> entry = exp<T>(exponent);
            largest = vmax(exponent, largest);
            store(row + j * L, entry);
            sum += entry * load(w + j);
        }
        flag_if(max_lanes<T>(largest) > kLargestEntry, k);
        return sum_lanes<T>(sum);
    }

    PARROT_INLINE static IntVec<T> untrusted(Vec<T> sums) {
        return ~((sums >= T(1) / kTrusted) & (sums <= kTrusted));  // NaN is untrusted too
    }

    // The row update of iteration k for one block, and the block's part of t. In `check` also the block's part of
    // the error after iteration k - 1. With `last` nothing but the error is wanted of iteration k.
    __attribute__((noinline)) void row_block(int64_t block, int k, bool check, bool last) {
        T* t = partial + block * m_pad;
        for (int64_t j = 0; j < m_pad; j += L) store(t + j, block == 0 ? load(column_tail + j) : Vec<T>{});
        T *u_now = u[k & 1], *u_before = u[(k - 1) & 1], *F_now = F[k & 1];
        const bool want_potentials = keep_potentials || k == n_iters;
        Vec<T> error{};
        // The sums of a group are taken before the group before it is added, so that neither waits for the divisions.
        Vec<T> sums = k > 1 ? dot_rows(block_begin(block)) : Vec<T>{};
        for (int64_t i = block_begin(block); i < block_end(block); i += L) {
            Vec<T> s = load(row_tail + i) + sums;
            const IntVec<T> bad = k > 1 ? untrusted(s) : IntVec<T>{} - 1;
            if (any(bad)) {
                if (!potentials_ready) update_column_potentials();
                for (int lane = 0; lane < L && i + lane < n; ++lane)
                    if (bad[lane]) s[lane] = refresh_row(i + lane, k);
            }
            Vec<T> u_new;
            if (balanced_x) {
                u_new = T(1) / s;
                if (want_potentials) store(F_now + i, (load(alpha + i) + log<T>(u_new)) + load(log_a + i));
            } else {
                const Vec<T> offset = load(alpha + i), potential = (offset - log<T>(s)) * damp_x;
                flag_if(any(potential - offset > kLargestLog), k);
                u_new = exp<T>(potential - offset);
                store(F_now + i, potential + load(log_a + i));
            }
            const Vec<T> h_new = load(a + i) * u_new;
            if (check) error += magnitude(load(u_before + i) - u_new) * (load(a + i) * s);
            store(u_now + i, u_new);
            store(h + i, h_new);
            if (k > 1 && i + L < block_end(block)) sums = dot_rows(i + L);
            if (!last) add_rows(i, t);
        }
        block_error[block] = sum_lanes<T>(error);
        if (!last) write_history(f_history, k, F_now, block_begin(block), block_end(block) < n ? block_end(block) : n);
    }

    PARROT_INLINE static Vec<T> magnitude(Vec<T> x) { return x < T(0) ? -x : x; }

    // The rows of a group of kLanes whose sums are in registers together.
    static constexpr int kStep = kVectorBytes == 64 || L < 8 ? L : 8;

    // Sums of kLanes rows of K from i on, times w.
    PARROT_INLINE Vec<T> dot_rows(int64_t i) const {
        const T* rows = kernel.at(i, 0);
        return n - i > L / 2 ? dot_rows<L>(rows) : dot_rows<L / 2>(rows);
    }

    template <int valid>  // what comes after these rows is padding
    PARROT_INLINE Vec<T> dot_rows(const T* rows) const {
        constexpr int step = valid < kStep ? valid : kStep;
        Vec<T> sums[L] = {};
        PARROT_UNROLL
        for (int first = 0; first < valid; first += step) {
            Vec<T> sum[step] = {};
            const T* p = rows + first * L;
            for (int64_t j = 0; j < m_pad; j += L, p += L * L) {
                const Vec<T> wj = load(w + j);
                PARROT_UNROLL
                for (int r = 0; r < step; ++r) sum[r] += load(p + r * L) * wj;
            }
            PARROT_UNROLL
            for (int r = 0; r < step; ++r) sums[first + r] = sum[r];
        }
        return sum_each<T>(sums);
    }

    // Adds kLanes rows of K from i on, times h, to t.
    PARROT_INLINE void add_rows(int64_t i, T* t) const {
        const T* rows = kernel.at(i, 0);
        n - i > L / 2 ? add_rows<L>(rows, h + i, t) : add_rows<L / 2>(rows, h + i, t);
    }

    template <int valid>
    PARROT_INLINE void add_rows(const T* rows, const T* factors, T* t) const {
        constexpr int step = valid < kStep ? valid : kStep;
        PARROT_UNROLL
        for (int first = 0; first < valid; first += step) {
            Vec<T> factor[step];
            PARROT_UNROLL
            for (int r = 0; r < step; ++r) factor[r] = broadcast(factors[first + r]);
            const T* p = rows + first * L;
            for (int64_t j = 0; j < m_pad; j += L, p += L * L) {
                Vec<T> sum[2] = {load(t + j)};
                PARROT_UNROLL
                for (int r = 0; r < step; ++r) sum[r % 2] += load(p + r * L) * factor[r];
                store(t + j, sum[0] + sum[1]);
            }
        }
    }

    // G of the last column update; where it is not kept, a row that refreshes asks for it.
    void update_column_potentials() {
        for (int64_t j = 0; j < m_pad; j += L) store(G + j, (load(beta + j) + log<T>(load(v + j))) + load(log_b + j));
        potentials_ready = true;
    }

    // kLanes columns from j on anew from the cost, as refresh_row; F are the row potentials.
    __attribute__((noinline)) Vec<T> refresh_columns(int64_t j, int k, const T* potentials) {
        const T scale = inverse;
        const T infinity = __builtin_huge_val();
        Vec<T> largest = broadcast(-infinity);
        for (int64_t i = 0; i < n; ++i) largest = vmax(broadcast(potentials[i]) - load(cost.at(i, j)) * scale, largest);
        const IntVec<T> padding = load(column_tail + j) > T(0);
        const Vec<T> offset = padding ? broadcast(-infinity) : -largest;
        store(beta + j, offset);
        Vec<T> sum = load(column_tail + j);
        largest = Vec<T>{};
        for (int64_t i = 0; i < n; ++i) {
            const Vec<T> exponent = (offset + alpha[i]) - load(cost.at(i, j)) * scale;
            const Vec<T> entry = exp<T>(exponent);
            largest = vmax(exponent, largest);
            store(kernel.at(i, j), entry);
            sum += entry * h[i];
        }
        flag_if(max_lanes<T>(largest) > kLargestEntry, k);
        return sum;
    }

    __attribute__((noinline)) const T* row_potentials(int k, T* scratch) const {
        if (keep_potentials) return F[k & 1];
        for (int64_t i = 0; i < n_pad; i += L)
            store(scratch + i, (load(alpha + i) + log<T>(load(u[k & 1] + i))) + load(log_a + i));
        return scratch;
    }

    __attribute__((noinline)) void column_chunk(int64_t chunk, int k, bool want_potentials, int rank) {
        const int64_t begin = chunk * kChunkVectors * L;
        const int64_t end = begin + kChunkVectors * L < m_pad ? begin + kChunkVectors * L : m_pad;
        const T* potentials = nullptr;
        for (int64_t j = begin; j < end; j += L) {
            Vec<T> t{};
            for (int64_t block = 0; block < blocks; ++block) t += load(partial + block * m_pad + j);
            if (any(untrusted(t))) {
                if (!potentials) potentials = row_potentials(k, column_scratch + rank * n_pad);
                t = refresh_columns(j, k, potentials);
            }
            Vec<T> v_new;
            if (balanced_y) {
                v_new = T(1) / t;
                if (want_potentials) store(G + j, (load(beta + j) + log<T>(v_new)) + load(log_b + j));
            } else {
                const IntVec<T> padding = load(column_tail + j) > T(0);
                const Vec<T> offset = padding ? Vec<T>{} : load(beta + j);
                const Vec<T> potential = (offset - log<T>(t)) * damp_y;
                flag_if(any(potential - offset > kLargestLog), k);
                v_new = exp<T>(potential - offset);
                store(G + j, potential + load(log_b + j));
            }
            store(v + j, v_new);
            store(w + j, load(b + j) * v_new);
        }
        if (want_potentials) write_history(g_history, k, G, begin, end < m ? end : m);
    }

    T total(const T* parts) const {
        T sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += parts[block];
        return sum;
    }

    void start(const Team& team) {
        if (team.rank == 0) {
            const T infinity = __builtin_huge_val();
            for (int64_t j = 0; j < m_pad; j += L) {
                const IntVec<T> padding = load(column_tail + j) > T(0);
                const Vec<T> zero = padding ? broadcast(-infinity) : Vec<T>{};
                store(beta + j, zero), store(G + j, zero);
                store(w + j, T(1) - load(column_tail + j));  // g = 0
            }
            for (int64_t i = 0; i < n_pad; ++i) alpha[i] = 0;
            for (int64_t i = n; i < n_pad; ++i) {
                u[0][i] = u[1][i] = 1, h[i] = 0;
                for (int64_t j = 0; j < m_pad; j += L) store(kernel.at(i, j), Vec<T>{});
            }
        }
        team.barrier();
    }

    Result run_scaling(const Team& team) {
        start(team);
        for (int k = 1;; ++k) {
            const bool last = k > n_iters, check = last || (tolerance && k > 1);
            team.for_each(blocks, [&](int64_t block) { row_block(block, k, check, last); }, k & 1);
            if (check) {
                const T error = total(block_error);
                if (last || error <= tol) {
                    if (balanced_y && __atomic_load_n(last_refresh, __ATOMIC_RELAXED) == k)
                        update_columns_again(team, k - 1);
                    return {k - 1, error};
                }
            }
            const bool want_potentials = keep_potentials || team.size > 1 || k == n_iters;
            team.for_each(chunks, [&](int64_t chunk) { column_chunk(chunk, k, want_potentials, team.rank); });
            potentials_ready = want_potentials;
            if (__atomic_load_n(unrepresentable + (k & 1), __ATOMIC_RELAXED)) return {k, 0};
        }
    }

    // The pass that only looked at the error may have set rows anew. Sums of these cancel the rounding of their
    // offsets.
    __attribute__((noinline)) void update_columns_again(const Team& team, int k) {
        team.for_each(blocks, [&](int64_t block) {
            T* t = partial + block * m_pad;
            for (int64_t j = 0; j < m_pad; j += L) store(t + j, block == 0 ? load(column_tail + j) : Vec<T>{});
            for (int64_t i = block_begin(block); i < block_end(block); i += L) {
                store(h + i, load(a + i) * load(u[k & 1] + i));
                add_rows(i, t);
            }
        });
        team.for_each(chunks, [&](int64_t chunk) { fill_columns(chunk); });
    }

    // ---- plain log-domain steps

    __attribute__((noinline)) void log_row_block(int64_t block, int k, bool check) {
        T error = 0;
        const T scale = inverse;
        for (int64_t i = block_begin(block); i < block_end(block) && i < n; ++i) {
            const T* c = cost.at(i, 0);
            Vec<T> largest = broadcast(-T(__builtin_huge_val())), sum{};
            for (int64_t j = 0; j < m_pad; j += L) largest = vmax(load(G + j) - load(c + j * L) * scale, largest);
            const T offset = max_lanes<T>(largest);
            for (int64_t j = 0; j < m_pad; j += L) sum += exp<T>((load(G + j) - load(c + j * L) * scale) - offset);
            const T lse = offset + log_one(sum_lanes<T>(sum));
            const T before = F[(k - 1) & 1][i], now = log_a[i] - damp_x * lse;
            if (check) {
                const T gap = exp_one(before + lse) - exp_one(now + lse);
                error += gap < 0 ? -gap : gap;
            }
            F[k & 1][i] = now;
        }
        block_error[block] = error;
        write_history(f_history, k, F[k & 1], block_begin(block), block_end(block) < n ? block_end(block) : n);
    }

    __attribute__((noinline)) void log_column_chunk(int64_t chunk, int k) {
        const int64_t begin = chunk * kChunkVectors * L;
        const int64_t end = begin + kChunkVectors * L < m_pad ? begin + kChunkVectors * L : m_pad;
        const T *potentials = F[k & 1], scale = inverse;
        for (int64_t j = begin; j < end; j += L) {
            Vec<T> largest = broadcast(-T(__builtin_huge_val())), sum{};
            for (int64_t i = 0; i < n; ++i)
                largest = vmax(broadcast(potentials[i]) - load(cost.at(i, j)) * scale, largest);
            for (int64_t i = 0; i < n; ++i)
                sum += exp<T>((broadcast(potentials[i]) - load(cost.at(i, j)) * scale) - largest);
            store(G + j, load(log_b + j) - (largest + log<T>(sum)) * damp_y);
        }
        write_history(g_history, k, G, begin, end < m ? end : m);
    }

    // Ends as run_scaling does, with K, u, v, w of the last iteration.
    Result run_log_domain(const Team& team) {
        start(team);
        Result result{};
        for (int k = 1;; ++k) {
            const bool last = k > n_iters, check = last || (tolerance && k > 1);
            team.for_each(blocks, [&](int64_t block) { log_row_block(block, k, check); }, k & 1);
            if (check) {
                result = {k - 1, total(block_error)};
                if (last || result.error <= tol) break;
            }
            team.for_each(chunks, [&](int64_t chunk) { log_column_chunk(chunk, k); });
        }
        // Offsets are the potentials themselves. The last column update is made again, so that its sums cancel the
        // rounding of the offsets.
        const int done = result.iterations;
        if (team.rank == 0) {
            for (int64_t j = 0; j < m_pad; j += L) {
                const IntVec<T> padding = load(column_tail + j) > T(0);
                store(beta + j, padding ? load(log_b + j) : load(G + j) - load(log_b + j));
            }
        }
        team.barrier();
        team.for_each(blocks, [&](int64_t block) { fill_kernel(block, done); });
        team.for_each(chunks, [&](int64_t chunk) { fill_columns(chunk); });
        return result;
    }

    __attribute__((noinline)) void fill_kernel(int64_t block, int k) {
        T* t = partial + block * m_pad;
        for (int64_t j = 0; j < m_pad; j += L) store(t + j, block == 0 ? load(column_tail + j) : Vec<T>{});
        for (int64_t i = block_begin(block); i < block_end(block) && i < n; ++i) {
            alpha[i] = F[k & 1][i] - log_a[i];
            u[k & 1][i] = 1, h[i] = a[i];
            for (int64_t j = 0; j < m_pad; j += L) {
                const Vec<T> entry = exp<T>((alpha[i] - load(cost.at(i, j)) * inverse) + load(beta + j));
                store(kernel.at(i, j), entry);
                store(t + j, load(t + j) + entry * h[i]);
            }
        }
    }

    __attribute__((noinline)) void fill_columns(int64_t chunk) {
        const int64_t begin = chunk * kChunkVectors * L;
        const int64_t end = begin + kChunkVectors * L < m_pad ? begin + kChunkVectors * L : m_pad;
        for (int64_t j = begin; j < end; j += L) {
            Vec<T> t{};
            for (int64_t block = 0; block < blocks; ++block) t += load(partial + block * m_pad + j);
            const Vec<T> v_new = balanced_y ? T(1) / t : broadcast(T(1));
            store(v + j, v_new);
            store(w + j, load(b + j) * v_new);
        }
    }

    // Whether the ranges in which sums are trusted fit the weights.
    bool usual_masses() const {
        const auto usual = [](T mass) { return mass > 1 / kLargestMass && mass < kLargestMass; };
        return usual(mass(a, n_pad)) && usual(mass(b, m_pad));
    }

    Result run(const Team& team) {
        if (usual_masses()) {
            const Result result = run_scaling(team);
            if (!unrepresentable[0] && !unrepresentable[1]) return result;
        }
        return run_log_domain(team);
    }
};

}  // namespace PARROT_ISA
}  // namespace parrot
