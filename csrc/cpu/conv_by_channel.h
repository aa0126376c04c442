// The causal convolution with lanes along channels, for tensors whose channels are contiguous. Tasks are tiles of steps
// and channels; those that share rows read them again.
#pragma once

#include "conv_common.h"

namespace parrot {
namespace PARROT_ISA {

constexpr int kConvSteps = 64, kConvChannels = 128;  // of a tile

// The history of every batch entry as rows of contiguous channels.
template <typename T>
class ConvHistory {
  public:
    ConvHistory(const CausalConv1dInputs& p)
        : p_(p), dim_(p.x.size[1]), rows_(p.weight.size[1] - 1), copy_(p.x.size[0] * rows_ * dim_) {}

    void prepare(int64_t b) const {
        const TensorView& view = p_.initial_state;
        for (int64_t e = 0; e < rows_; ++e)
            for (int64_t d = 0; d < dim_; ++d)
                copy_[(b * rows_ + e) * dim_ + d] =
                    view ? view.ptr<const T>()[b * view.stride[0] + d * view.stride[1] + e * view.stride[2]] : T{};
    }
    const T* row(int64_t b, int64_t e) const { return copy_.get() + (b * rows_ + e) * dim_; }

  private:
    const CausalConv1dInputs& p_;
    int64_t dim_, rows_;
    Buffer<T> copy_;
};

// The rows and steps that a tile touches, and a filter.
template <typename T, typename F>
struct ConvTile {
    static constexpr int W = kLanes<F>;

    Buffer<const T*> rows, grads;  // of channel 0; grads: of the output
    Buffer<T*> to;
    Buffer<int32_t> ids;
    Buffer<F> weight, dpre, sums;

    ConvTile(int width)
        : rows(size(width)),
          grads(size(width)),
          to(size(width)),
          ids(size(width)),
          weight((width + 1) * W),
          dpre(size(width) * W),
          sums((width + 1) * W) {}
    static int64_t size(int width) { return kConvSteps + 4 * width; }

    // The filter and the bias of `count` channels from d on.
    void read_filter(const CausalConv1dInputs& p, int64_t d, int count) const {
        const TensorView &w = p.weight, &bias = p.bias;
        clear(weight.get(), (w.size[1] + 1) * W);
        for (int c = 0; c < count; ++c) {
            for (int64_t k = 0; k < w.size[1]; ++k)
                weight[k * W + c] = w.ptr<const F>()[(d + c) * w.stride[0] + k * w.stride[1]];
            if (bias) weight[w.size[1] * W + c] = bias.ptr<const F>()[(d + c) * bias.stride[0]];
        }
    }

    // Rows e..e + count - 1 of the line. Whether they belong to several packed sequences.
    bool read_rows(const CausalConv1dInputs& p, const ConvLine& line, const ConvHistory<T>& history, int64_t b,
                   int64_t e, int64_t count) const {
        bool mixed = false;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t step = e + i - (line.width - 1);
            rows[i] = step < 0 ? history.row(b, e + i)
                               : p.x.ptr<const T>() + b * p.x.stride[0] + line.time(step) * p.x.stride[2];
            if (line.ids) mixed |= (ids[i] = line.id(e + i)) != ids[0];
        }
        return mixed;
    }

    // The sum over the taps at the output whose first row is rows[i].
    template <int WIDTH, bool MIXED>
    PARROT_INLINE Vec<F> convolve(int width, const F* weight, int64_t i, int64_t d, int count) const {
        Vec<F> total = load(weight + width * W);
        for_taps<WIDTH>(width, [&](int k) {
            if (!MIXED || ids[i + k] == ids[i + width - 1])
                total += load(weight + k * W) * load_some<T, F>(rows[i + k] + d, count);
        });
        return total;
    }
};

template <typename T, typename F, int WIDTH, bool MIXED>
void forward_tile(const ConvTile<T, F>& tile, int width, bool silu_after, int64_t steps, int64_t d, int count) {
    constexpr int W = kLanes<F>;
    F weight[(WIDTH > 0 ? WIDTH + 1 : 1) * W];
    if (WIDTH > 0) std::memcpy(weight, tile.weight.get(), sizeof(weight));
    const F* const filter = WIDTH > 0 ? weight : tile.weight.get();
    for (int64_t i = 0; i < steps; ++i) {
        __builtin_prefetch(tile.rows[i + width - 1] + d + W);  // for the next channels
        __builtin_prefetch(tile.to[i] + d + W, 1);
        const Vec<F> pre = tile.template convolve<WIDTH, MIXED>(width, filter, i, d, count);
        store_some<T, F>(tile.to[i] + d, silu_after ? silu<F>(pre) : pre, count);
    }
}

// Visits the vectors of channels of chunk `index`: body(first channel, channels).
template <typename F, typename Body>
PARROT_INLINE void for_channels(int64_t dim, int64_t index, Body&& body) {
    const int64_t stop = (index + 1) * kConvChannels < dim ? (index + 1) * kConvChannels : dim;
    for (int64_t d = index * kConvChannels; d < stop; d += kLanes<F>)
        body(d, static_cast<int>(stop - d < kLanes<F> ? stop - d : kLanes<F>));
}

inline int64_t conv_chunks(const CausalConv1dInputs& p) { return (p.x.size[1] + kConvChannels - 1) / kConvChannels; }
// Tiles of steps; the last one also holds what follows the sequence.
inline int64_t conv_tiles(const CausalConv1dInputs& p) {
    return p.x.size[2] > 0 ? (p.x.size[2] + kConvSteps - 1) / kConvSteps : 1;
}

template <typename T, typename F, int WIDTH, bool PACKED>
void forward_task(const CausalConv1dForward& p, const ConvTile<T, F>& tile, const ConvHistory<T>& history, int64_t b,
                  int64_t index, int64_t chunk) {
    const ConvLine line(p, b);
    const int64_t dim = p.x.size[1], first = index * kConvSteps, past = first + kConvSteps;
    auto at = [&](int64_t time) { return p.out.ptr<T>() + b * p.out.stride[0] + time * p.out.stride[2]; };
    const int64_t stop = past < line.length ? past : line.length, steps = stop > first ? stop - first : 0;
    const bool mixed = steps > 0 && tile.read_rows(p, line, history, b, first, steps + line.width - 1);
    for (int64_t i = 0; i < steps; ++i) tile.to[i] = at(line.time(first + i));
    const int64_t end = past < p.x.size[2] ? past : p.x.size[2];
    for_channels<F>(dim, chunk, [&](int64_t d, int count) {
        tile.read_filter(p, d, count);
        PACKED&& mixed ? forward_tile<T, F, WIDTH, true>(tile, line.width, p.silu, steps, d, count)
                       : forward_tile<T, F, WIDTH, false>(tile, line.width, p.silu, steps, d, count);
        for (int64_t t = stop > first ? stop : first; t < end; ++t) store_some<T, F>(at(t) + d, Vec<F>{}, count);
    });
    if (index > 0) return;
    const TensorView& view = p.final_state;
    for (int k = 0; k < line.width - 1; ++k) {
        tile.read_rows(p, line, history, b, line.length + k, 1);
        const bool dropped = line.dropped(line.length + k);
        for_channels<F>(dim, chunk, [&](int64_t d, int count) {
            for (int c = 0; c < count; ++c)
                view.ptr<T>()[b * view.stride[0] + (d + c) * view.stride[1] + k * view.stride[2]] =
                    dropped ? T{} : tile.rows[0][d + c];
        });
    }
}

// The gradients dpre before the activation of the outputs at tile.grads, the i-th of which reads tile.rows[i] on, with
// W-1 zeros on either side. Outputs from `own` on count in the sums: the gradients of the filter, by tap, and the bias.
template <typename T, typename F, int WIDTH, bool MIXED>
void backward_outputs(const ConvTile<T, F>& tile, int width, bool silu_after, int64_t steps, int64_t own, int64_t d,
                      int count) {
    constexpr int W = kLanes<F>, kKept = WIDTH > 0 ? WIDTH + 1 : 1;
    F kept_weight[kKept * W], kept_sums[kKept * W];
    F* const filter = WIDTH > 0 ? kept_weight : tile.weight.get();
    F* const sums = WIDTH > 0 ? kept_sums : tile.sums.get();
    if (WIDTH > 0) std::memcpy(kept_weight, tile.weight.get(), sizeof(kept_weight));
    clear(sums, (width + 1) * W);
    F* const dpre = tile.dpre.get() + (width - 1) * W;
    clear(tile.dpre.get(), (width - 1) * W);
    clear(dpre + steps * W, (width - 1) * W);
    for (int64_t i = 0; i < steps; ++i) {
        __builtin_prefetch(tile.rows[i + width - 1] + d + W);  // for the next channels
        Vec<F> value{};
        if (tile.grads[i]) {
            __builtin_prefetch(tile.grads[i] + d + W);
            value = load_some<T, F>(tile.grads[i] + d, count);
        }
        if (silu_after) value *= silu_derivative<F>(tile.template convolve<WIDTH, MIXED>(width, filter, i, d, count));
        store(dpre + i * W, value);
        if (i < own) continue;
        store(sums + width * W, load(sums + width * W) + value);
        for_taps<WIDTH>(width, [&](int k) {
            if (!MIXED || tile.ids[i + k] == tile.ids[i + width - 1])
                store(sums + k * W, load(sums + k * W) + value * load_some<T, F>(tile.rows[i + k] + d, count));
        });
    }
    if (WIDTH > 0) std::memcpy(tile.sums.get(), kept_sums, sizeof(kept_sums));
}

// The gradient of the row that the output `i` of backward_outputs reads through its last tap.
template <typename T, typename F, int WIDTH, bool MIXED>
PARROT_INLINE Vec<F> backward_row(const ConvTile<T, F>& tile, int width, const F* filter, int64_t steps, int64_t i) {
    constexpr int W = kLanes<F>;
    const F* const dpre = tile.dpre.get() + (width - 1) * W;
    Vec<F> total{};
    for_taps<WIDTH>(width, [&](int k) {
        const int64_t output = i + width - 1 - k;
        if (MIXED && (output < 0 || output >= steps || tile.ids[output + k] != tile.ids[output + width - 1])) return;
        total += load(filter + k * W) * load(dpre + output * W);
    });
    return total;
}

template <typename T, typename F, int WIDTH, bool PACKED>
void backward_task(const CausalConv1dBackward& p, const ConvTile<T, F>& tile, const ConvHistory<T>& history, int64_t b,
                   int64_t index, int64_t chunk, F* sums) {
    constexpr int W = kLanes<F>;
    const ConvLine line(p, b);
    const int width = line.width, before = width - 1;
    const int64_t dim = p.x.size[1];
    // Rows first..stop - 1 of the line get their gradients here, from the outputs low..high - 1.
    const int64_t start = index * kConvSteps, end = start + kConvSteps;
    const bool last = end >= line.length;
    const int64_t first = index == 0 ? 0 : start + before, stop = last ? line.rows() : end + before;
    const int64_t low = first - before < 0 ? 0 : first - before, high = stop < line.length ? stop : line.length;
    const int64_t steps = start < line.length && high > low ? high - low : 0,
                  rows = start < line.length || index == 0 ? stop - first : 0;
    const int64_t own = index == 0 ? 0 : before;  // outputs low..low + own - 1 are counted by the tile before
    const bool mixed = steps > 0 && tile.read_rows(p, line, history, b, low, steps + before);
    for (int64_t i = 0; i < steps; ++i)
        tile.grads[i] = p.grad_out ? p.grad_out.ptr<const T>() + b * p.grad_out.stride[0] +
                                         line.time(low + i) * p.grad_out.stride[2]
                                   : nullptr;
    const TensorView &dx = p.dx, &dstate = p.dinitial_state, &grad = p.grad_final_state;
    auto at = [&](int64_t time) { return dx.ptr<T>() + b * dx.stride[0] + time * dx.stride[2]; };
    for_channels<F>(dim, chunk, [&](int64_t d, int count) {
        tile.read_filter(p, d, count);
        PACKED&& mixed ? backward_outputs<T, F, WIDTH, true>(tile, width, p.silu, steps, own, d, count)
                       : backward_outputs<T, F, WIDTH, false>(tile, width, p.silu, steps, own, d, count);
        for (int c = 0; c < count; ++c)
            for (int k = 0; k <= width; ++k) sums[(d + c) * (width + 1) + k] = tile.sums[k * W + c];
        F filter[(WIDTH > 0 ? WIDTH : 1) * W];
        if (WIDTH > 0) std::memcpy(filter, tile.weight.get(), sizeof(filter));
        const F* const weight = WIDTH > 0 ? filter : tile.weight.get();
        for (int64_t e = first; e < first + rows; ++e) {
            const int64_t i = e - before - low;
            Vec<F> total = PACKED && mixed ? backward_row<T, F, WIDTH, true>(tile, width, weight, steps, i)
                                           : backward_row<T, F, WIDTH, false>(tile, width, weight, steps, i);
            if (grad && e >= line.length && !line.dropped(e)) {
                F lanes[W] = {};
                for (int c = 0; c < count; ++c)
                    lanes[c] = to_real<F>(grad.ptr<const T>()[b * grad.stride[0] + (d + c) * grad.stride[1] +
                                                              (e - line.length) * grad.stride[2]]);
                total += load(lanes);
            }
            if (e >= before) {
                T* const to = at(line.time(e - before)) + d;
                __builtin_prefetch(to + W, 1);
                store_some<T, F>(to, total, count);
            } else if (dstate) {
                for (int c = 0; c < count; ++c)
                    dstate.ptr<T>()[b * dstate.stride[0] + (d + c) * dstate.stride[1] + e * dstate.stride[2]] =
                        from_real<T, F>(total[c]);
            }
        }
        const int64_t past = end < p.x.size[2] ? end : p.x.size[2];
        for (int64_t t = start > line.length ? start : line.length; t < past; ++t)
            store_some<T, F>(at(t) + d, Vec<F>{}, count);
    });
}

// run(tile, history, b, tile of steps, chunk of channels), shared by threads.
template <typename T, typename F, typename Run>
void for_tiles(const CausalConv1dInputs& p, int num_threads, Run&& run) {
    const int64_t batch = p.x.size[0], tiles = conv_tiles(p), chunks = conv_chunks(p);
    const ConvHistory<T> history(p);
#pragma omp parallel num_threads(num_threads)
    {
        const FlushDenormals flush;
        const ConvTile<T, F> tile(static_cast<int>(p.weight.size[1]));
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; ++b) history.prepare(b);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * tiles * chunks; ++i)
            run(tile, history, i / chunks / tiles, i / chunks % tiles, i % chunks);
    }
}

template <typename T, typename F>
void conv_forward_by_channel(const CausalConv1dForward& p) {
    for_width(p, [&](auto width, auto packed) {
        for_tiles<T, F>(p, p.num_threads, [&](const auto& tile, const auto& history, int64_t b, int64_t i, int64_t c) {
            forward_task<T, F, width.value, packed.value>(p, tile, history, b, i, c);
        });
    });
}

// sums: by (batch, tile of steps), channel, tap and, last, bias.
template <typename T, typename F>
void conv_backward_by_channel(const CausalConv1dBackward& p, F* sums) {
    const int64_t stride = p.x.size[1] * (p.weight.size[1] + 1), tiles = conv_tiles(p);
    for_width(p, [&](auto width, auto packed) {
        for_tiles<T, F>(p, p.num_threads, [&](const auto& tile, const auto& history, int64_t b, int64_t i, int64_t c) {
            backward_task<T, F, width.value, packed.value>(p, tile, history, b, i, c, sums + (b * tiles + i) * stride);
        });
    });
}

}  // namespace PARROT_ISA
}  // namespace parrot
