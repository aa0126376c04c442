// The causal convolution on CUDA, forward and backward (formulas: parrot_kernels/reference/causal_conv1d.py).
//
// A thread computes a tile of kSteps steps of one channel or, where the channels are contiguous, of CHANNELS channels,
// from a window of W - 1 steps more, held in registers. In the order of time, which is what vectors are read in, the
// reversed convolution is the plain one with its taps in reverse and its window on the other side. A block sums the
// gradient of the taps over a fixed stretch of time, a second kernel over stretches and the batch: no atomics, and no
// sum whose order depends on the batch or on the padding.
#pragma once

#include <type_traits>

#include "causal_conv1d.h"
#include "common.cuh"

namespace parrot {
namespace cuda {
namespace conv {

constexpr int kThreads = 128;
constexpr int kSteps = 8;       // steps of a tile
constexpr int kIterations = 8;  // tiles of a thread

// How the threads of a block share its tiles: along time first, or along channels first.
template <int CHANNELS>
struct Shape {
    static constexpr int kTileLanes = CHANNELS > 1 ? kThreads / 32 : 32;
    static constexpr int kChannelLanes = kThreads / kTileLanes;
    static constexpr int kBlockChannels = kChannelLanes * CHANNELS;
    static constexpr int kStretch = kTileLanes * kSteps * kIterations;  // steps of a block
};

// Bounds the registers of a thread (65536 per multiprocessor).
template <typename T>
constexpr int blocks_per_multiprocessor = sizeof(T) == 8 ? 1 : 3;

// Channels of a thread where they are contiguous: a warp reads 128 bytes or more at a time.
template <typename T>
constexpr int kForwardChannels = sizeof(T) == 8 ? 2 : 4;
constexpr int kBackwardChannels = 2;

// A (batch, channel, time) tensor; `vectors`: rows along the contiguous axis are aligned for vector access.
template <typename T>
struct Plane {
    T* data = nullptr;
    int64_t stride[3] = {};
    bool vectors = false;

    Plane() = default;
    Plane(const TensorView& view, int channels) : data(view ? view.ptr<T>() : nullptr) {
        if (!view) return;
        const int64_t bytes = channels > 1 ? sizeof(T) * channels : 16;
        const int contiguous = channels > 1 ? 1 : 2;
        vectors = reinterpret_cast<uintptr_t>(data) % bytes == 0;
        for (int i = 0; i < 3; ++i) {
            stride[i] = view.stride[i];
            vectors &= i == contiguous ? stride[i] == 1 : stride[i] * static_cast<int64_t>(sizeof(T)) % bytes == 0;
        }
    }
    __device__ __forceinline__ T& at(int64_t b, int64_t d, int64_t t) const {
        return data[b * stride[0] + d * stride[1] + t * stride[2]];
    }
};

template <typename T>
struct Arguments {
    using Real = Compute<T>;
    Plane<T> x, out, final_state, initial_state;  // out: dx in the backward
    Plane<T> grad_out, grad_final_state, dinitial_state;
    const Real *weight, *bias;
    Real* partials;  // (stretch, batch, channel, W + 1): of the taps, then of the bias
    int64_t weight_stride[2], bias_stride, lengths_stride, seq_stride[2];
    Integers lengths, seq_idx;
    bool silu, reverse;
    int batch, dim, length, width, stretches, channel_blocks;
};

// One sequence of one channel. Row e of its line is step e - (W - 1) in scan order, the history comes first.
template <typename T>
struct Line {
    using Real = Compute<T>;
    const Arguments<T>& p;
    const int b, d, length;

    __device__ __forceinline__ Line(const Arguments<T>& arguments, int batch_entry, int channel)
        : p(arguments),
          b(batch_entry),
          d(channel),
          length(p.lengths.data ? static_cast<int>(p.lengths[b * p.lengths_stride]) : p.length) {}

    __device__ __forceinline__ int64_t time(int s) const { return p.reverse ? length - 1 - s : s; }
    __device__ __forceinline__ int64_t id_at(int64_t t) const {
        return p.seq_idx[b * p.seq_stride[0] + t * p.seq_stride[1]];
    }
    __device__ __forceinline__ int64_t id(int e) const { return id_at(time(max(e - (p.width - 1), 0))); }
    __device__ __forceinline__ bool same(int e, int f) const { return !p.seq_idx.data || id(e) == id(f); }
    __device__ __forceinline__ Real weight(int k) const {
        return p.weight[d * p.weight_stride[0] + k * p.weight_stride[1]];
    }
    __device__ __forceinline__ Real bias() const { return p.bias ? p.bias[d * p.bias_stride] : Real(0); }
    __device__ __forceinline__ Real value(int e) const {
        if (e >= p.width - 1) return to_compute(p.x.at(b, d, time(e - (p.width - 1))));
        return p.initial_state.data ? to_compute(p.initial_state.at(b, d, e)) : Real(0);
    }
    // What follows takes any width, reads every tap from memory, and serves the few rows at the ends of a line.
    __device__ Real pre(int s) const {
        Real total = bias();
        for (int k = 0; k < p.width; ++k)
            if (same(s + k, s + p.width - 1)) total = fma(weight(k), value(s + k), total);
        return total;
    }
    __device__ Real dpre(int s) const {
        if (!p.grad_out.data) return Real(0);
        const Real gradient = to_compute(p.grad_out.at(b, d, time(s)));
        return p.silu ? gradient * silu_derivative(pre(s)) : gradient;
    }
    // Whether the final state drops row e.
    __device__ bool dropped(int e) const { return length > 0 && !same(e, length + p.width - 2); }
    __device__ Real final_gradient(int e) const {
        if (!p.grad_final_state.data || e < length || dropped(e)) return Real(0);
        return to_compute(p.grad_final_state.at(b, d, e - length));
    }
    __device__ Real dline(int e) const {
        Real total = final_gradient(e);
        for (int k = 0; k < p.width; ++k)
            if (e - k >= 0 && e - k < length && same(e, e - k + p.width - 1))
                total = fma(weight(k), dpre(e - k), total);
        return total;
    }
    __device__ void write_final_state(int j) const {
        const int e = length + j;
        p.final_state.at(b, d, j) = dropped(e) ? from_compute<T>(Real(0)) : from_compute<T>(value(e));
    }
    __device__ void write_dinitial_state(int j) const { p.dinitial_state.at(b, d, j) = from_compute<T>(dline(j)); }
};

template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T)) Vector {
    T values[COUNT];
};

// COUNT steps from time `first` on, of the channels from d on. Zero outside the times 0..stop - 1 and outside the
// channels. AHEAD: steps before those that vectors along time may be aligned to.
template <int AHEAD, typename T, int COUNT, int CHANNELS>
__device__ __forceinline__ void load_steps(Compute<T> (&window)[COUNT][CHANNELS], const Plane<T>& plane, int64_t b,
                                           int d, int dim, int first, int stop) {
    const T* const base = plane.data + b * plane.stride[0] + d * plane.stride[1];
    const bool inside = first >= 0 && first + COUNT <= stop;
    if constexpr (CHANNELS == 1) {
        constexpr int kVector = 16 / sizeof(T);
        const bool vectors = inside && plane.vectors;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i >= AHEAD && i < AHEAD + kSteps && vectors) continue;
            window[i][0] =
                first + i >= 0 && first + i < stop ? to_compute(base[(first + i) * plane.stride[2]]) : Compute<T>(0);
        }
        if (!vectors) return;
#pragma unroll
        for (int i = AHEAD; i < AHEAD + kSteps; i += kVector) {
            const auto vector = *reinterpret_cast<const Vector<T, kVector>*>(base + first + i);
#pragma unroll
            for (int j = 0; j < kVector; ++j) window[i + j][0] = to_compute(vector.values[j]);
        }
    } else {
        const bool vectors = plane.vectors && d + CHANNELS <= dim;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool valid = inside || (first + i >= 0 && first + i < stop);
            const T* const row = base + (first + i) * plane.stride[2];
            if (valid && vectors) {
                const auto vector = *reinterpret_cast<const Vector<T, CHANNELS>*>(row);
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) window[i][c] = to_compute(vector.values[c]);
            } else {
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c)
                    window[i][c] = valid && d + c < dim ? to_compute(row[c * plane.stride[1]]) : Compute<T>(0);
            }
        }
    }
}

// Writes a tile; times past the end of the tensor are left out.
template <typename T, int CHANNELS>
__device__ __forceinline__ void store_steps(const Compute<T> (&tile)[kSteps][CHANNELS], const Plane<T>& plane,
                                            int64_t b, int d, int dim, int first, int stop) {
    T* const base = plane.data + b * plane.stride[0] + d * plane.stride[1];
    constexpr int kVector = CHANNELS == 1 ? 16 / sizeof(T) : CHANNELS;
    if (plane.vectors && (CHANNELS == 1 ? first + kSteps <= stop : d + CHANNELS <= dim)) {
#pragma unroll
        for (int i = 0; i < kSteps * CHANNELS; i += kVector) {
            const int step = i / CHANNELS;
            Vector<T, kVector> vector;
#pragma unroll
            for (int j = 0; j < kVector; ++j)
                vector.values[j] = from_compute<T>(tile[(i + j) / CHANNELS][(i + j) % CHANNELS]);
            if (first + step < stop)
                *reinterpret_cast<Vector<T, kVector>*>(base + (first + step) * plane.stride[2]) = vector;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            if (first + i < stop && d + c < dim)
                base[(first + i) * plane.stride[2] + c * plane.stride[1]] = from_compute<T>(tile[i][c]);
}

// Puts the history where a window reaches before the first step, in scan order.
template <typename T, int COUNT, int CHANNELS>
__device__ __forceinline__ void load_history(Compute<T> (&window)[COUNT][CHANNELS], const Line<T>& line, int first) {
    const Arguments<T>& p = line.p;
    if (!p.initial_state.data || (p.reverse ? first + COUNT <= line.length : first >= 0)) return;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int row = (p.reverse ? line.length - 1 - (first + i) : first + i) + p.width - 1;
        if (row < 0 || row >= p.width - 1) continue;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            if (line.d + c < p.dim) window[i][c] = to_compute(p.initial_state.at(line.b, line.d + c, row));
    }
}

// Which taps of COUNT outputs stay in their packed sequence: bit i of word j for tap j (in the order of time) of
// output i, whose window begins at time first + i. Returns whether all do.
template <int WIDTH, int COUNT, typename T>
__device__ __forceinline__ bool kept_taps(unsigned (&kept)[WIDTH], const Line<T>& line, int first) {
    constexpr unsigned all = (1u << COUNT) - 1;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) kept[j] = all;
    if (!line.p.seq_idx.data || line.length == 0) return true;
    int64_t ids[COUNT + WIDTH - 1];
#pragma unroll
    for (int i = 0; i < COUNT + WIDTH - 1; ++i) ids[i] = line.id_at(min(max(first + i, 0), line.length - 1));
    unsigned missing = 0;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool same = ids[i + j] == (line.p.reverse ? ids[i] : ids[i + WIDTH - 1]);
            if (!same) kept[j] &= ~(1u << i);
        }
        missing |= kept[j] ^ all;
    }
    return missing == 0;
}

// pre[i] = bias + sum_j taps[j] window[i + j]. CUT: taps that leave their sequence are dropped.
template <bool CUT, typename Real, int WIDTH, int COUNT, int WINDOW, int CHANNELS>
__device__ __forceinline__ void convolve(Real (&pre)[COUNT][CHANNELS], const Real (&window)[WINDOW][CHANNELS],
                                         const Real (&taps)[WIDTH][CHANNELS], const Real (&bias)[CHANNELS],
                                         const unsigned (&kept)[WIDTH]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            pre[i][c] = bias[c];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j)
                if (!CUT || (kept[j] >> i & 1u)) pre[i][c] = fma(taps[j][c], window[i + j][c], pre[i][c]);
        }
}

// Where a block and a thread work.
template <int CHANNELS>
struct Place {
    int b, stretch, tile_lane, channel_lane, d;

    template <typename T>
    __device__ __forceinline__ explicit Place(const Arguments<T>& p) {
        using S = Shape<CHANNELS>;
        const int tid = threadIdx.x;
        tile_lane = CHANNELS > 1 ? tid / S::kChannelLanes : tid % S::kTileLanes;
        channel_lane = CHANNELS > 1 ? tid % S::kChannelLanes : tid / S::kTileLanes;
        const unsigned block = blockIdx.x / p.channel_blocks;
        d = (blockIdx.x % p.channel_blocks * S::kChannelLanes + channel_lane) * CHANNELS;
        b = block % p.batch, stretch = block / p.batch;
    }
};

// The taps in the order of time.
template <typename T, int WIDTH, int CHANNELS>
__device__ __forceinline__ void load_filter(Compute<T> (&taps)[WIDTH][CHANNELS], Compute<T> (&bias)[CHANNELS],
                                            const Arguments<T>& p, int d) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        const int64_t channel = min(d + c, p.dim - 1);
        bias[c] = p.bias ? p.bias[channel * p.bias_stride] : Compute<T>(0);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
            taps[j][c] = p.weight[channel * p.weight_stride[0] + (p.reverse ? WIDTH - 1 - j : j) * p.weight_stride[1]];
    }
}

inline bool channels_last(const TensorView& x) { return x.stride[1] == 1 && x.stride[2] != 1 && x.size[1] > 1; }
inline bool fast_width(const TensorView& weight) { return weight.size[1] >= 2 && weight.size[1] <= 4; }

inline int64_t stretches(const TensorView& x, const TensorView& weight) {
    if (!fast_width(weight)) return 1;
    // Channels-last stretches are as long for every number of channels of a thread.
    const int64_t stretch = channels_last(x) ? Shape<2>::kStretch : Shape<1>::kStretch;
    return (x.size[2] + weight.size[1] - 1 + stretch - 1) / stretch;
}

template <typename T>
Arguments<T> arguments(const CausalConv1dInputs& params, int channels) {
    using Real = Compute<T>;
    Arguments<T> p{};
    p.x = Plane<T>(params.x, channels);
    p.initial_state = Plane<T>(params.initial_state, channels);
    p.weight = params.weight.ptr<const Real>(), p.bias = params.bias ? params.bias.ptr<const Real>() : nullptr;
    p.lengths = Integers(params.lengths), p.seq_idx = Integers(params.seq_idx);
    for (int i = 0; i < 2; ++i) {
        p.weight_stride[i] = params.weight.stride[i], p.seq_stride[i] = params.seq_idx.stride[i];
    }
    p.bias_stride = params.bias.stride[0], p.lengths_stride = params.lengths.stride[0];
    p.silu = params.silu, p.reverse = params.reverse;
    p.batch = static_cast<int>(params.x.size[0]), p.dim = static_cast<int>(params.x.size[1]);
    p.length = static_cast<int>(params.x.size[2]), p.width = static_cast<int>(params.weight.size[1]);
    p.stretches = static_cast<int>(stretches(params.x, params.weight));
    return p;
}

// Calls run(width), an integral constant for the fast widths and 0 for the others.
template <typename Run>
void for_width(int width, Run&& run) {
    switch (width) {
        case 2:
            return run(std::integral_constant<int, 2>{});
        case 3:
            return run(std::integral_constant<int, 3>{});
        case 4:
            return run(std::integral_constant<int, 4>{});
        default:
            return run(std::integral_constant<int, 0>{});
    }
}

template <int CHANNELS, typename T>
dim3 tile_grid(Arguments<T>& p) {
    p.channel_blocks = (p.dim + Shape<CHANNELS>::kBlockChannels - 1) / Shape<CHANNELS>::kBlockChannels;
    return dim3(static_cast<unsigned>(static_cast<int64_t>(p.channel_blocks) * p.batch * p.stretches));
}

template <typename T>
dim3 row_grid(const Arguments<T>& p) {
    const int64_t rows = static_cast<int64_t>(p.batch) * p.dim, per_block = kThreads / 32;
    return dim3(static_cast<unsigned>((rows + per_block - 1) / per_block));
}

}  // namespace conv
}  // namespace cuda
}  // namespace parrot
