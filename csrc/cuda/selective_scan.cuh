// What the forward and the backward of the selective scan on CUDA share: arguments, tiles of the inputs.
#pragma once

#include <numeric>

#include "common.cuh"
#include "selective_scan.h"

namespace parrot {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kTile = 32;  // steps staged at a time, one per lane of a warp; also between two checkpoints

template <typename T>
struct ScanInputs {
    using Real = Compute<T>;
    const T *u, *delta, *z;
    const Real *A, *initial_state;
    Real* checkpoints;  // the states before every kTile-th step: (batch, tile, channel, state), contiguous
    Operand<T> B, C, D, delta_bias;
    Integers lengths, seq_idx;
    int64_t u_stride[3], delta_stride[3], z_stride[3];  // batch, channel, time
    int64_t A_stride[2], D_stride, bias_stride, initial_stride[3], lengths_stride, seq_stride[2];
    // batch, group, state, time; for constant B or C: -, -, state, channel.
    int64_t B_stride[4], C_stride[4];
    bool B_constant, C_constant, delta_softplus, reverse;
    int batch, dim, length, state;
    // Groups of channels that share B and C rows, how many of them share a row of B and of C alone, their channels,
    // and the blocks that cover them.
    int groups, groups_per_B, groups_per_C, group_dim, blocks_per_group;

    ScanInputs() = default;
    ScanInputs(const SelectiveScanInputs& params, const TensorView& kept, int block_channels)
        : u(params.u.ptr<const T>()),
          delta(params.delta.ptr<const T>()),
          z(params.z ? params.z.ptr<const T>() : nullptr),
          A(params.A.ptr<const Real>()),
          initial_state(params.initial_state ? params.initial_state.ptr<const Real>() : nullptr),
          checkpoints(kept ? kept.ptr<Real>() : nullptr),
          B(params.B),
          C(params.C),
          D(params.D),
          delta_bias(params.delta_bias),
          lengths(params.lengths),
          seq_idx(params.seq_idx) {
        for (int i = 0; i < 3; ++i) {
            u_stride[i] = params.u.stride[i], delta_stride[i] = params.delta.stride[i];
            z_stride[i] = params.z.stride[i], initial_stride[i] = params.initial_state.stride[i];
        }
        for (int i = 0; i < 2; ++i) A_stride[i] = params.A.stride[i], seq_stride[i] = params.seq_idx.stride[i];
        D_stride = params.D.stride[0], bias_stride = params.delta_bias.stride[0];
        lengths_stride = params.lengths.stride[0];
        matrix_strides(params.B, B_stride), matrix_strides(params.C, C_stride);
        B_constant = params.B.ndim == 2, C_constant = params.C.ndim == 2;
        delta_softplus = params.delta_softplus, reverse = params.reverse;
        batch = static_cast<int>(params.u.size[0]), dim = static_cast<int>(params.u.size[1]);
        length = static_cast<int>(params.u.size[2]), state = static_cast<int>(params.A.size[1]);
        const int B_groups = scan_groups(params.B), C_groups = scan_groups(params.C);
        groups = std::lcm(B_groups, C_groups);
        groups_per_B = groups / B_groups, groups_per_C = groups / C_groups;
        group_dim = dim / groups;
        blocks_per_group = (group_dim + block_channels - 1) / block_channels;
    }

    static void matrix_strides(const TensorView& m, int64_t (&stride)[4]) {
        if (m.ndim == 2) {
            stride[0] = stride[1] = 0, stride[2] = m.stride[1], stride[3] = m.stride[0];
        } else {
            stride[0] = m.stride[0], stride[1] = m.ndim == 4 ? m.stride[1] : 0;
            stride[2] = m.stride[m.ndim - 2], stride[3] = m.stride[m.ndim - 1];
        }
    }
};

// The time at which scan step s of a sequence lies; padding stays where it is.
template <typename T>
__device__ __forceinline__ int64_t time_of(const ScanInputs<T>& p, int s, int length) {
    return p.reverse && s < length ? length - 1 - s : s;
}

template <typename T>
__device__ __forceinline__ int length_of(const ScanInputs<T>& p, int b) {
    return p.lengths.data ? static_cast<int>(p.lengths[b * p.lengths_stride]) : p.length;
}

template <typename T>
__device__ __forceinline__ Compute<T>* checkpoint(const ScanInputs<T>& p, int b, int tile, int d) {
    const int64_t tiles = (p.length + kTile - 1) / kTile;
    return p.checkpoints + ((opaque(b) * tiles + tile) * p.dim + d) * p.state;
}

// Whether scan step s (s > 0) belongs to another packed sequence than step s - 1.
template <typename T>
__device__ __forceinline__ bool starts_sequence(const ScanInputs<T>& p, int b, int s, int length) {
    const int64_t row = b * p.seq_stride[0], step = p.seq_stride[1];
    return p.seq_idx[row + time_of(p, s, length) * step] != p.seq_idx[row + time_of(p, s - 1, length) * step];
}

// A tile (CHANNELS x kTile steps) of a (batch, channel, time) tensor: each thread holds kItems<CHANNELS> elements,
// neighbouring threads along whichever axis is contiguous.
template <int CHANNELS>
constexpr int kItems = CHANNELS * kTile / kThreads;

template <int CHANNELS>
struct TileWalk {
    int channel, step;        // of this thread's first element
    int channel_by, step_by;  // to its next one

    __device__ __forceinline__ explicit TileWalk(bool channels_last) {
        const int thread = opaque(static_cast<int>(threadIdx.x));  // cheaper to derive again than to keep
        const int width = channels_last ? CHANNELS : kTile;
        const int minor = thread % width, major = thread / width, by = kThreads / width;
        channel = channels_last ? minor : major, step = channels_last ? major : minor;
        channel_by = channels_last ? 0 : by, step_by = channels_last ? by : 0;
    }
};

template <typename T, int CHANNELS>
__device__ __forceinline__ void load_tile(T (&items)[kItems<CHANNELS>], const T* base, const int64_t (&stride)[3],
                                          const TileWalk<CHANNELS>& walk, int64_t first_time, int direction,
                                          int channels, int steps) {
    const T* item = base + walk.channel * stride[1] + (first_time + direction * walk.step) * stride[2];
    const int64_t by = opaque(walk.channel_by * stride[1] + direction * walk.step_by * stride[2]);
#pragma unroll
    for (int i = 0; i < kItems<CHANNELS>; ++i, item += by) {
        const bool valid = walk.channel + i * walk.channel_by < channels && walk.step + i * walk.step_by < steps;
        items[i] = valid ? *item : from_compute<T>(0);
    }
}

template <int STATES>
__device__ __forceinline__ void load_row(float (&row)[STATES], const float* shared) {
    if constexpr (STATES % 4 == 0) {
#pragma unroll
        for (int i = 0; i < STATES; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(shared + i);
            row[i] = v.x, row[i + 1] = v.y, row[i + 2] = v.z, row[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < STATES; i += 2) {
            const float2 v = *reinterpret_cast<const float2*>(shared + i);
            row[i] = v.x, row[i + 1] = v.y;
        }
    }
}

__device__ __forceinline__ float4 as_float4(const float (&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); }

// Four entries of B or C, from state n on.
template <typename T>
__device__ __forceinline__ void load_quad(float (&quad)[4], const ScanInputs<T>& p, bool C, int64_t origin, int n) {
    const Operand<T>& matrix = C ? p.C : p.B;
    const int64_t by = opaque(C ? p.C_stride[2] : p.B_stride[2]);
    origin += n * by;
#pragma unroll
    for (int i = 0; i < 4; ++i, origin += by) quad[i] = n + i < p.state ? matrix[origin] : 0.0f;
}

}  // namespace cuda
}  // namespace parrot
