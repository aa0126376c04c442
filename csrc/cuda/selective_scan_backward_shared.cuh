// What the kernels of the backward of the selective scan share: arguments, and the sums over blocks and over the batch.
#pragma once

#include "selective_scan.cuh"

namespace parrot {
namespace cuda {
namespace scan_backward {

// The channels that a block takes: those of 128 threads, four to a channel, or eight where there are many states.
inline int block_channels(DType dtype, int64_t state) {
    return dtype != DType::f64 && state > 32 && state <= 64 ? 16 : 32;
}

template <typename T>
struct Arguments : ScanInputs<T> {
    using Real = Compute<T>;
    const T* grad_out;
    const Real* grad_final_state;
    T *du, *ddelta, *dz, *dB, *dC;
    Real *dA, *dB_constant, *dC_constant, *dD, *ddelta_bias, *dinitial_state;
    int64_t grad_out_stride[3], grad_final_stride[3], du_stride[3], ddelta_stride[3], dz_stride[3], dinitial_stride[3];
    int64_t dA_stride[2], dD_stride, dbias_stride, dB_stride[4], dC_stride[4];
    // The workspace. rows: (batch, channel, columns): dA, dD, ddelta_bias, then constant dB and dC. steps: of dB, then
    // of dC where they are not constant, (batch, block, scan step, state). adjoint: (batch, channel, state), generic.
    Real *rows, *steps[2], *adjoint;
    int columns, blocks_per_batch;

    Arguments(const SelectiveScanBackward& params, int block_channels)
        : ScanInputs<T>(params, params.checkpoints, block_channels) {
        auto real = [](const TensorView& view) { return view ? view.ptr<Real>() : nullptr; };
        auto typed = [](const TensorView& view) { return view ? view.ptr<T>() : nullptr; };
        grad_out = typed(params.grad_out), grad_final_state = real(params.grad_final_state);
        du = typed(params.du), ddelta = typed(params.ddelta), dz = typed(params.dz);
        dB = this->B_constant ? nullptr : typed(params.dB), dC = this->C_constant ? nullptr : typed(params.dC);
        dB_constant = this->B_constant ? real(params.dB) : nullptr;
        dC_constant = this->C_constant ? real(params.dC) : nullptr;
        dA = real(params.dA), dD = real(params.dD), ddelta_bias = real(params.ddelta_bias);
        dinitial_state = real(params.dinitial_state);
        for (int i = 0; i < 3; ++i) {
            grad_out_stride[i] = params.grad_out.stride[i], grad_final_stride[i] = params.grad_final_state.stride[i];
            du_stride[i] = params.du.stride[i], ddelta_stride[i] = params.ddelta.stride[i];
            dz_stride[i] = params.dz.stride[i], dinitial_stride[i] = params.dinitial_state.stride[i];
        }
        for (int i = 0; i < 2; ++i) dA_stride[i] = params.dA.stride[i];
        dD_stride = params.dD.stride[0], dbias_stride = params.ddelta_bias.stride[0];
        this->matrix_strides(params.dB, dB_stride), this->matrix_strides(params.dC, dC_stride);
        columns = this->state * (1 + this->B_constant + this->C_constant) + 2;
        blocks_per_batch = this->groups * this->blocks_per_group;
        const int64_t channels = static_cast<int64_t>(this->batch) * this->dim;
        const int64_t size = static_cast<int64_t>(this->batch) * blocks_per_batch * this->length * this->state;
        rows = params.workspace.ptr<Real>();
        adjoint = rows + channels * columns;
        steps[0] = adjoint + channels * this->state;
        steps[1] = steps[0] + (this->B_constant ? 0 : size);
    }
};

// The channels of a block.
template <int CHANNELS>
struct Block {
    int b, index, group, d0, channels;

    template <typename T>
    __device__ __forceinline__ explicit Block(const Arguments<T>& p) {
        b = blockIdx.x / p.blocks_per_batch, index = blockIdx.x % p.blocks_per_batch;
        group = index / p.blocks_per_group;
        const int first = index % p.blocks_per_group * CHANNELS;
        d0 = group * p.group_dim + first, channels = min(CHANNELS, p.group_dim - first);
    }
};

template <typename T>
__device__ __forceinline__ void store_zeros(T* base, const int64_t (&stride)[3], int channels, int from, int to) {
    const bool channels_last = stride[1] == 1;
    const int minor = channels_last ? channels : to - from, count = channels * max(to - from, 0);
    for (int i = threadIdx.x; i < count; i += kThreads) {
        const int c = channels_last ? i % minor : i / minor, t = from + (channels_last ? i / minor : i % minor);
        base[c * stride[1] + t * stride[2]] = from_compute<T>(0);
    }
}

// dB (C = 0) or dC (C = 1) by step: the sum over the blocks that share its rows. A block takes a tile of steps of one
// batch entry and group, and up to 32 states.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_blocks(const Arguments<T> p, int C) {
    using Real = Compute<T>;
    __shared__ Real tile[32][kTile + 1];
    const int shared_groups = C ? p.groups_per_C : p.groups_per_B, groups = p.groups / shared_groups;
    const int tiles = (p.length + kTile - 1) / kTile;
    const int s0 = blockIdx.x % tiles * kTile, group = blockIdx.x / tiles % groups, b = blockIdx.x / tiles / groups;
    const int n0 = blockIdx.y * 32, states = min(32, p.state - n0);
    const int length = length_of(p, b), steps = min(kTile, length - s0);
    const int blocks = shared_groups * p.blocks_per_group;
    const Real* const first =
        p.steps[C] + ((static_cast<int64_t>(b) * p.blocks_per_batch + group * blocks) * p.length + s0) * p.state + n0;
    for (int i = threadIdx.x; i < steps * states; i += kThreads) {
        const Real* from = first + static_cast<int64_t>(i / states) * p.state + i % states;
        Real total = 0;
        for (int block = 0; block < blocks; ++block, from += static_cast<int64_t>(p.length) * p.state) total += *from;
        tile[i % states][i / states] = total;
    }
    __syncthreads();
    const int64_t (&stride)[4] = C ? p.dC_stride : p.dB_stride;
    T* const to = (C ? p.dC : p.dB) + b * stride[0] + group * stride[1] + n0 * stride[2];
    const bool states_last = stride[2] == 1;
    for (int i = threadIdx.x; i < kTile * states; i += kThreads) {
        const int n = states_last ? i % states : i / kTile, s = states_last ? i / states : i % kTile;
        if (s0 + s < p.length)
            to[n * stride[2] + time_of(p, s0 + s, length) * stride[3]] =
                from_compute<T>(s < steps ? tile[n][s] : Real(0));
    }
}

// dA, dD, ddelta_bias and constant dB and dC: sums over the batch, a thread each.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_batch(const Arguments<T> p) {
    using Real = Compute<T>;
    const int64_t size = static_cast<int64_t>(p.dim) * p.columns;
    const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (entry >= size) return;
    Real total = 0;
    for (int b = 0; b < p.batch; ++b) total += p.rows[b * size + entry];
    const int d = entry / p.columns, column = entry % p.columns;
    if (column < p.state) {
        p.dA[d * p.dA_stride[0] + column * p.dA_stride[1]] = total;
    } else if (column == p.state) {
        if (p.dD) p.dD[d * p.dD_stride] = total;
    } else if (column == p.state + 1) {
        if (p.ddelta_bias) p.ddelta_bias[d * p.dbias_stride] = total;
    } else {
        const int n = (column - 2) % p.state;
        if (p.B_constant && column - 2 < 2 * p.state)
            p.dB_constant[n * p.dB_stride[2] + d * p.dB_stride[3]] = total;
        else
            p.dC_constant[n * p.dC_stride[2] + d * p.dC_stride[3]] = total;
    }
}

template <typename T>
void launch_sums(const Arguments<T>& p, void* stream) {
    for (int C = 0; C < 2; ++C) {
        if ((C ? p.C_constant : p.B_constant) || p.length == 0 || p.state == 0 || p.batch == 0) continue;
        const int64_t groups = p.groups / (C ? p.groups_per_C : p.groups_per_B), tiles = (p.length + kTile - 1) / kTile;
        const dim3 grid(static_cast<unsigned>(p.batch * groups * tiles), (p.state + 31) / 32);
        PARROT_LAUNCH(sum_blocks<T>, grid, kThreads, stream, p, C);
    }
    const int64_t entries = static_cast<int64_t>(p.dim) * p.columns;
    PARROT_LAUNCH(sum_batch<T>, dim3(static_cast<unsigned>((entries + kThreads - 1) / kThreads)), kThreads, stream, p);
}

}  // namespace scan_backward
}  // namespace cuda
}  // namespace parrot
