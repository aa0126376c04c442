// The causal convolution with lanes along time: for tensors whose time axis is contiguous, and any other strides.
//
// A row of (batch, channel) is walked in the order of time. Place q of its line in that order is time q - (W-1) or, in
// reverse, where the history lies behind the end, time q; the output at time t reads the places t to t + W-1.
#pragma once

#include "conv_common.h"

namespace parrot {
namespace PARROT_ISA {

template <typename T, typename F>
class ConvRow {
  public:
    static constexpr int W = kLanes<F>;
    static constexpr int kTile = 1024;  // places at a time: what they need stays in the first cache

    ConvRow(const CausalConv1dInputs& params, const ConvLine& line, int64_t batch_entry, int64_t channel)
        : p(params), line(line), b(batch_entry), d(channel), before(line.reverse ? 0 : line.width - 1) {}

    // The offset of tap k from the first place that an output reads.
    int tap(int k) const { return line.reverse ? line.width - 1 - k : k; }

    T* row(const TensorView& view) const { return view.ptr<T>() + b * view.stride[0] + d * view.stride[1]; }

    // to[i] = the element at time first + i, zero outside the sequence.
    void read_times(const TensorView& view, F* to, int64_t first, int64_t count) const {
        const int64_t start = first < 0 ? 0 : first, stop = first + count < line.length ? first + count : line.length;
        if (start >= stop) return clear(to, count);
        clear(to, start - first);
        clear(to + (stop - first), first + count - stop);
        const T* from = row(view) + start * view.stride[2];
        F* const out = to + (start - first);
        int64_t i = 0;
        if (view.stride[2] == 1)
            for (; i + W <= stop - start; i += W) store(out + i, load_as<T, F>(from + i));
        for (; i < stop - start; ++i) out[i] = to_real<F>(from[i * view.stride[2]]);
    }

    // The places first..first + count - 1 of the line, zero outside it.
    void read_line(F* to, int64_t first, int64_t count) const {
        read_times(p.x, to, first - before, count);
        for (int j = 0; p.initial_state && j < line.width - 1; ++j) {
            const int64_t q = place_of_history(j);
            if (q >= first && q < first + count)
                to[q - first] = to_real<F>(row(p.initial_state)[j * p.initial_state.stride[2]]);
        }
    }
    int64_t place_of_history(int j) const { return line.reverse ? line.length + line.width - 2 - j : j; }
    // Of row e of the scan.
    int64_t place(int64_t e) const { return line.reverse ? line.rows() - 1 - e : e; }

    // Writes values[i], of the times first..first + count - 1; the steps after the sequence become zero at its end.
    void write_times(const TensorView& view, const F* values, int64_t first, int64_t count) const {
        T* const to = row(view) + first * view.stride[2];
        int64_t i = 0;
        if (view.stride[2] == 1)
            for (; i + W <= count; i += W) store_as<T, F>(to + i, load(values + i));
        for (; i < count; ++i) to[i * view.stride[2]] = from_real<T, F>(values[i]);
    }
    void clear_padding(const TensorView& view) const {
        for (int64_t t = line.length; t < p.x.size[2]; ++t) row(view)[t * view.stride[2]] = T{};
    }

    // The sums over the taps of W outputs, the first of which reads places[0] on; of packed sequences, taps of
    // another one than `own` are dropped.
    template <int WIDTH, bool PACKED>
    PARROT_INLINE Vec<F> convolve(const F* places, const F* weight, F bias, const int32_t* ids, int own) const {
        Vec<F> total = broadcast(bias);
        for_taps<WIDTH>(line.width, [&](int k) {
            const Vec<F> x = load(places + tap(k));
            total += weight[k] * (PACKED ? same(ids + tap(k), ids + own) ? x : Vec<F>{} : x);
        });
        return total;
    }
    static PARROT_INLINE IntVec<F> same(const int32_t* a, const int32_t* b) {
        typedef int32_t Ids __attribute__((vector_size(4 * W)));
        Ids left, right;
        std::memcpy(&left, a, sizeof(left));
        std::memcpy(&right, b, sizeof(right));
        return __builtin_convertvector(left == right, IntVec<F>);
    }

    const CausalConv1dInputs& p;
    const ConvLine& line;
    int64_t b, d;
    int before;  // places before time 0
};

// The ids of all places of the lines of a batch, W-1 more in front and enough behind for whole vectors.
class PackedIds {
  public:
    PackedIds(const CausalConv1dInputs& p)
        : front_(p.weight.size[1] - 1),
          size_(p.seq_idx ? p.x.size[2] + 4 * front_ + 64 : 0),
          ids_(p.x.size[0] * size_) {}

    void prepare(const ConvLine& line, int64_t b) const {
        int32_t* const to = ids_.get() + b * size_;
        const int64_t before = line.reverse ? 0 : front_;
        for (int64_t i = 0; i < size_; ++i) {
            const int64_t t = i - front_ - before;
            to[i] = line.length == 0 ? 0
                                     : line.ids[(t < 0             ? 0
                                                 : t < line.length ? t
                                                                   : line.length - 1) *
                                                line.id_stride];
        }
    }
    // Of place 0.
    const int32_t* of(int64_t b) const { return size_ ? ids_.get() + b * size_ + front_ : nullptr; }

  private:
    int64_t front_, size_;
    Buffer<int32_t> ids_;
};

template <typename F>
struct ConvTap {
    const F* weight;
    F bias;
    Buffer<F> copy;

    ConvTap(int width) : weight(nullptr), bias(0), copy(width) {}
    void read(const CausalConv1dInputs& p, int64_t d) {
        for (int64_t k = 0; k < p.weight.size[1]; ++k)
            copy[k] = p.weight.ptr<const F>()[d * p.weight.stride[0] + k * p.weight.stride[1]];
        weight = copy.get();
        bias = p.bias ? p.bias.ptr<const F>()[d * p.bias.stride[0]] : F(0);
    }
};

template <typename T, typename F, int WIDTH, bool PACKED>
void forward_row(const CausalConv1dForward& p, const ConvRow<T, F>& row, const ConvTap<F>& filter, const int32_t* ids,
                 F* places, F* out) {
    constexpr int W = kLanes<F>;
    const ConvLine& line = row.line;
    const int own = row.tap(line.width - 1);
    for (int64_t t = 0; t < line.length; t += row.kTile) {
        const int64_t count = line.length - t < row.kTile ? line.length - t : row.kTile;
        row.read_line(places, t, count + line.width - 1 + W);
        for (int64_t i = 0; i < count; i += W) {
            const Vec<F> pre = row.template convolve<WIDTH, PACKED>(places + i, filter.weight, filter.bias,
                                                                    ids + (PACKED ? t + i : 0), own);
            store(out + i, p.silu ? silu<F>(pre) : pre);
        }
        row.write_times(p.out, out, t, count);
    }
}

// What is left of a row: the steps after the sequence, and the final state.
template <typename T, typename F>
void finish_row(const CausalConv1dForward& p, const ConvRow<T, F>& row) {
    const ConvLine& line = row.line;
    row.clear_padding(p.out);
    T* const to = row.row(p.final_state);
    for (int k = 0; k < line.width - 1; ++k) {
        const int64_t e = line.length + k, step = e - (line.width - 1);
        T value{};
        if (line.dropped(e))
            value = T{};
        else if (step >= 0)
            value = row.row(p.x)[line.time(step) * p.x.stride[2]];
        else if (p.initial_state)
            value = row.row(p.initial_state)[e * p.initial_state.stride[2]];
        to[k * p.final_state.stride[2]] = value;
    }
}

// sums[0..W-1], sums[W]: the gradients of the filter and of the bias from this row.
template <typename T, typename F, int WIDTH, bool PACKED>
void backward_row(const CausalConv1dBackward& p, const ConvRow<T, F>& row, const ConvTap<F>& filter, const int32_t* ids,
                  F* places, F* dpre, F* dplaces, F* sums, F* totals) {
    constexpr int W = kLanes<F>;
    const ConvLine& line = row.line;
    const int width = line.width, history = width - 1, own = row.tap(history);
    clear(totals, (width + 1) * W);
    Vec<F> dbias{};
    for (int64_t q = 0; q < line.rows(); q += row.kTile) {
        const int64_t count = line.rows() - q < row.kTile ? line.rows() - q : row.kTile;
        // dpre[i]: of the output at time q - history + i.
        row.read_line(places, q - history, count + 2 * history + W);
        if (p.grad_out)
            row.read_times(p.grad_out, dpre, q - history, count + history + W);
        else
            clear(dpre, count + history + W);
        auto finish = [&](int64_t i) {
            const Vec<F> dout = load(dpre + i);
            if (!p.silu) return dout;
            return dout * silu_derivative<F>(row.template convolve<WIDTH, PACKED>(
                              places + i, filter.weight, filter.bias, ids + (PACKED ? q - history + i : 0), own));
        };
        if (history > 0) {  // of the tile before, again
            for (int64_t i = 0; i < history; i += W) {
                const Vec<F> again = finish(i);
                F lanes[W];
                store(lanes, again);
                for (int j = 0; j < W && i + j < history; ++j) dpre[i + j] = lanes[j];
            }
        }
        for (int64_t i = history; i < count + history; i += W) {
            const Vec<F> d = finish(i);
            store(dpre + i, d);
            dbias += d;
            for_taps<WIDTH>(width, [&](int k) {
                const Vec<F> x = load(places + i + row.tap(k));
                const int32_t* const at = ids + (PACKED ? q - history + i : 0);
                store(totals + k * W,
                      load(totals + k * W) + d * (PACKED ? row.same(at + row.tap(k), at + own) ? x : Vec<F>{} : x));
            });
        }
        for (int64_t i = 0; i < count; i += W) {
            Vec<F> total{};
            for_taps<WIDTH>(width, [&](int k) {
                const int from = history - row.tap(k);  // tap k of the output that lies there reads this place
                const Vec<F> d = load(dpre + i + from);
                const int32_t* const at = ids + (PACKED ? q + i : 0);
                total += filter.weight[k] * (PACKED ? row.same(at, at + from - history + own) ? d : Vec<F>{} : d);
            });
            store(dplaces + i, total);
        }
        for (int k = 0; p.grad_final_state && k < history; ++k) {
            const int64_t e = line.length + k, at = row.place(e) - q;
            if (at >= 0 && at < count && !line.dropped(e))
                dplaces[at] += to_real<F>(row.row(p.grad_final_state)[k * p.grad_final_state.stride[2]]);
        }
        const int64_t first = q - row.before, start = first < 0 ? 0 : first;
        const int64_t stop = first + count < line.length ? first + count : line.length;
        if (start < stop) row.write_times(p.dx, dplaces + (start - first), start, stop - start);
        for (int j = 0; p.dinitial_state && j < history; ++j) {
            const int64_t at = row.place_of_history(j) - q;
            if (at >= 0 && at < count)
                row.row(p.dinitial_state)[j * p.dinitial_state.stride[2]] = from_real<T, F>(dplaces[at]);
        }
    }
    for (int k = 0; k < width; ++k) sums[k] = sum_lanes<F>(load(totals + k * W));
    sums[width] = sum_lanes<F>(dbias);
}

// W lanes of two vectors in a row, from `count` lanes before the second on.
template <typename F, int count>
PARROT_INLINE Vec<F> shifted(Vec<F> before, Vec<F> v) {
    constexpr int W = kLanes<F>;
#if defined(__clang__)
    F lanes[2 * W];
    store(lanes, before), store(lanes + W, v);
    return load(lanes + W - count);
#else
    IntVec<F> index;
    PARROT_UNROLL
    for (int i = 0; i < W; ++i) index[i] = W - count + i;
    return __builtin_shuffle(before, v, index);
#endif
}

// The plain case, one sequence in the order of time along contiguous memory, in registers: every element is read once,
// and the taps are shuffles of two neighbouring vectors.
template <typename F, int WIDTH>
struct Taps {
    static constexpr int W = kLanes<F>;
    F weight[WIDTH], bias;

    explicit Taps(const ConvTap<F>& filter) : bias(filter.bias) {
        for (int k = 0; k < WIDTH; ++k) weight[k] = filter.weight[k];
    }
    // tap(k, vector of the inputs that tap k reads)
    template <int k = 0, typename Body>
    static PARROT_INLINE void each(Vec<F> before, Vec<F> x, Body&& body) {
        body(k, shifted<F, WIDTH - 1 - k>(before, x));
        if constexpr (k + 1 < WIDTH) each<k + 1>(before, x, body);
    }
    PARROT_INLINE Vec<F> convolve(Vec<F> before, Vec<F> x) const {
        Vec<F> total = broadcast(bias);
        each(before, x, [&](int k, Vec<F> v) { total += weight[k] * v; });
        return total;
    }
    // The W - 1 inputs before time 0, in the last lanes.
    template <typename T>
    static Vec<F> history(const ConvRow<T, F>& row) {
        F lanes[W] = {};
        for (int j = 0; row.p.initial_state && j < WIDTH - 1; ++j)
            lanes[W - (WIDTH - 1) + j] = to_real<F>(row.row(row.p.initial_state)[j * row.p.initial_state.stride[2]]);
        return load(lanes);
    }
};

// The outputs that read the inputs at the place of `before` through tap k.
template <typename F, int WIDTH, int k = 0, typename Body>
PARROT_INLINE void each_after(Vec<F> before, Vec<F> after, Body&& body) {
    body(k, shifted<F, kLanes<F> - (WIDTH - 1 - k)>(before, after));
    if constexpr (k + 1 < WIDTH) each_after<F, WIDTH, k + 1>(before, after, body);
}

template <typename T, typename F, int WIDTH>
void forward_plain(const CausalConv1dForward& p, const ConvRow<T, F>& row, const ConvTap<F>& filter) {
    constexpr int W = kLanes<F>;
    const Taps<F, WIDTH> taps(filter);
    const T* const x = row.row(p.x);
    T* const out = row.row(p.out);
    Vec<F> before = taps.history(row);
    auto step = [&](int64_t t, Vec<F> now) {
        const Vec<F> pre = taps.convolve(before, now);
        before = now;
        return p.silu ? silu<F>(pre) : pre;
    };
    int64_t t = 0;
    for (; t + W <= row.line.length; t += W) store_as<T, F>(out + t, step(t, load_as<T, F>(x + t)));
    const int rest = static_cast<int>(row.line.length - t);
    if (rest > 0) store_some<T, F>(out + t, step(t, load_some<T, F>(x + t, rest)), rest);
}

template <typename T, typename F, int WIDTH>
void backward_plain(const CausalConv1dBackward& p, const ConvRow<T, F>& row, const ConvTap<F>& filter, F* sums) {
    constexpr int W = kLanes<F>, history = WIDTH - 1;
    const Taps<F, WIDTH> taps(filter);
    const T *const x = row.row(p.x), *const grad_out = row.row(p.grad_out);
    T* const dx = row.row(p.dx);
    Vec<F> before = taps.history(row), dbefore{}, dbias{}, dweight[WIDTH] = {};
    // The gradient of the vector of inputs before the outputs whose gradients are dpre.
    auto input_gradient = [&](Vec<F> dpre) {
        Vec<F> total{};
        each_after<F, WIDTH>(dbefore, dpre, [&](int k, Vec<F> d) { total += taps.weight[k] * d; });
        dbefore = dpre;
        return total;
    };
    auto step = [&](Vec<F> now, Vec<F> dout) {
        const Vec<F> dpre = p.silu ? dout * silu_derivative<F>(taps.convolve(before, now)) : dout;
        taps.each(before, now, [&](int k, Vec<F> v) { dweight[k] += dpre * v; });
        dbias += dpre;
        before = now;
        return input_gradient(dpre);
    };
    const int64_t length = row.line.length;
    int64_t t = 0;
    for (; t < length; t += W) {
        const int count = static_cast<int>(length - t < W ? length - t : W);
        const Vec<F> d = step(load_some<T, F>(x + t, count), load_some<T, F>(grad_out + t, count));
        if (t > 0) {
            store_as<T, F>(dx + t - W, d);
        } else if (p.dinitial_state) {
            for (int j = 0; j < history; ++j)
                row.row(p.dinitial_state)[j * p.dinitial_state.stride[2]] = from_real<T, F>(d[W - history + j]);
        }
    }
    store_some<T, F>(dx + t - W, input_gradient(Vec<F>{}), static_cast<int>(length - (t - W)));
    for (int k = 0; k < WIDTH; ++k) sums[k] = sum_lanes<F>(dweight[k]);
    sums[WIDTH] = sum_lanes<F>(dbias);
}

template <typename F>
struct ConvScratch {
    Buffer<F> places, dpre, dplaces, totals;
    ConvScratch(int64_t size, int width) : places(size), dpre(size), dplaces(size), totals((width + 1) * kLanes<F>) {}
};

// run(row, filter, ids, scratch) for every (batch, channel), which threads share.
template <typename T, typename F, typename Run>
void for_rows(const CausalConv1dInputs& p, int num_threads, Run&& run) {
    const int64_t batch = p.x.size[0], dim = p.x.size[1];
    const int width = static_cast<int>(p.weight.size[1]);
    const PackedIds ids(p);
#pragma omp parallel num_threads(num_threads)
    {
        const FlushDenormals flush;
        const ConvScratch<F> scratch(ConvRow<T, F>::kTile + 3 * width + 3 * kLanes<F>, width);
        ConvTap<F> filter(width);
        if (p.seq_idx) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < batch; ++b) ids.prepare(ConvLine(p, b), b);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * dim; ++i) {
            const int64_t b = i / dim, d = i % dim;
            const ConvLine line(p, b);
            filter.read(p, d);
            run(ConvRow<T, F>(p, line, b, d), filter, ids.of(b), scratch);
        }
    }
}

template <typename T, typename F>
void conv_forward_by_time(const CausalConv1dForward& p) {
    const bool contiguous = !p.reverse && p.x.stride[2] == 1 && p.out.stride[2] == 1;
    for_width(p, [&](auto width, auto packed) {
        for_rows<T, F>(p, p.num_threads, [&](const auto& row, const auto& filter, auto ids, const auto& s) {
            if constexpr (width.value > 0 && width.value <= kLanes<F> && !packed.value) {
                if (contiguous) {
                    forward_plain<T, F, width.value>(p, row, filter);
                    return finish_row(p, row);
                }
            }
            forward_row<T, F, width.value, packed.value>(p, row, filter, ids, s.places.get(), s.dpre.get());
            finish_row(p, row);
        });
    });
}

// sums: by batch entry, channel, tap and, last, bias.
template <typename T, typename F>
void conv_backward_by_time(const CausalConv1dBackward& p, F* sums) {
    const int64_t dim = p.x.size[1], width = p.weight.size[1];
    const bool contiguous = !p.reverse && p.x.stride[2] == 1 && p.dx.stride[2] == 1 && p.grad_out &&
                            p.grad_out.stride[2] == 1 && !p.grad_final_state;
    for_width(p, [&](auto known, auto packed) {
        for_rows<T, F>(p, p.num_threads, [&](const auto& row, const auto& filter, auto ids, const auto& s) {
            F* const to = sums + (row.b * dim + row.d) * (width + 1);
            row.clear_padding(p.dx);
            if constexpr (known.value > 0 && known.value <= kLanes<F> && !packed.value) {
                if (contiguous && row.line.length > 0) return backward_plain<T, F, known.value>(p, row, filter, to);
            }
            backward_row<T, F, known.value, packed.value>(p, row, filter, ids, s.places.get(), s.dpre.get(),
                                                          s.dplaces.get(), to, s.totals.get());
        });
    });
}

}  // namespace PARROT_ISA
}  // namespace parrot
