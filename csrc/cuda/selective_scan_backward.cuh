// Backward of the selective scan on CUDA (formulas: parrot_kernels/reference/selective_scan.py).
//
// As in the forward, LANES threads share a channel and hold its states in registers. A block takes the tiles of the
// time axis from the last to the first, each from the state that the forward kept at its start: once forward through
// the tile, noting the state every kStretch steps, then the stretches in reverse, each computed again with its decays
// and states in registers. That is one and three quarters of an exponential per state and step.
//
// dB and dC are sums over channels: over those of a warp by folding (eight steps take seven shuffles, not 24), over
// the warps in shared memory, over the blocks of a group by a second kernel; dA, dD and ddelta_bias are summed over
// the batch by a third. No atomics, and no sum whose order depends on the padding.
#pragma once

#include "selective_scan_backward_generic.cuh"

namespace parrot {
namespace cuda {
namespace scan_backward {

constexpr int kStretch = 8;  // steps whose states and decays are in registers
constexpr int kStretches = kTile / kStretch;
constexpr int kWarps = kThreads / 32;

// One level of a sum of COUNT values over lanes: this lane keeps the upper or the lower half of them.
template <int COUNT>
__device__ __forceinline__ void fold(float (&v)[kStretch], int mask, bool upper) {
#pragma unroll
    for (int k = 0; k < COUNT / 2; ++k) {
        const float mine = upper ? v[k + COUNT / 2] : v[k], others = upper ? v[k] : v[k + COUNT / 2];
        v[k] = mine + __shfl_xor_sync(0xffffffffu, others, mask);
    }
}

// Sums of kStretch values over 2^LEVELS lanes, `mask` and its halves apart. Of these lanes number j ends with those of
// the kStretch >> LEVELS values from j * (kStretch >> LEVELS) on.
template <int LEVELS>
__device__ __forceinline__ void sum_lanes(float (&v)[kStretch], int mask) {
    const int lane = threadIdx.x;
    fold<8>(v, mask, lane & mask);
    fold<4>(v, mask / 2, lane & mask / 2);
    if constexpr (LEVELS == 3) fold<2>(v, mask / 4, lane & mask / 4);
}

// Bounds the registers of a thread (65536 per multiprocessor).
constexpr int blocks_per_multiprocessor(int states) { return states <= 4 ? 3 : 2; }

// Calls body(FIRST), body(FIRST + BY), ... with integral constants.
template <int FIRST, int STOP, int BY, typename Body>
__device__ __forceinline__ void for_each(const Body& body) {
    if constexpr (FIRST < STOP) {
        body(std::integral_constant<int, FIRST>{});
        for_each<FIRST + BY, STOP, BY>(body);
    }
}

// CONSTANT: B or C is.
template <typename T, int STATES, int LANES, bool CONSTANT>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(STATES)) run(const Arguments<T> p) {
    constexpr int N = STATES * LANES, kRow = N + 4, kChannels = kThreads / LANES;
    constexpr int kGroup = 2;                     // states that walk a stretch together
    constexpr int kBuffers = LANES == 4 ? 2 : 1;  // where two fit, one barrier is enough
    constexpr int kStateLevels = LANES == 4 ? 2 : 3, kChannelLevels = 5 - kStateLevels;
    constexpr int kMine = kStretch >> kStateLevels;  // steps of a stretch that a thread finishes
    using Walk = TileWalk<kChannels>;
    __shared__ float2 inputs[kChannels][kTile + 1];  // delta, u; then their gradients
    __shared__ float dy[kChannels][kTile + 1], y[kChannels][kTile + 1];
    __shared__ float before[kStretches - 1][STATES][kThreads];  // the states before the later stretches
    __shared__ __align__(16) float rows[2][kTile][kRow];        // of B and C, by step; constant ones by channel
    __shared__ __align__(16) float sums[kBuffers][2][kWarps][kStretch][kGroup * LANES];
    __shared__ float bias[kChannels], skip[kChannels];

    const int tid = threadIdx.x, lane = tid % LANES, channel = tid / LANES;
    const Block<kChannels> block(p);
    const int b = block.b, channels = block.channels, d = block.d0 + channel;
    const bool active = channel < channels;
    const int length = length_of(p, b), direction = p.reverse ? -1 : 1;

    // Where the block's channels begin; derived again where it is needed, not kept in registers.
    auto plane = [&](auto* data, const int64_t (&stride)[3]) {
        return data + opaque(b) * stride[0] + opaque(block.d0) * stride[1];
    };
    auto zero_padding = [&](T* data, const int64_t (&stride)[3]) {
        if (data) store_zeros(plane(data, stride), stride, channels, length, p.length);
    };
    zero_padding(p.du, p.du_stride), zero_padding(p.ddelta, p.ddelta_stride), zero_padding(p.dz, p.dz_stride);

    float A2[STATES], adjoint[STATES], dA[STATES] = {}, dD = 0.0f, dbias = 0.0f;
    [[maybe_unused]] float dmatrix[2][CONSTANT ? STATES : 1] = {};  // constant dB and dC
    auto valid = [&](int i) { return active && lane * STATES + i < p.state; };
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
        const int n = lane * STATES + i;
        A2[i] = valid(i) ? p.A[d * p.A_stride[0] + n * p.A_stride[1]] * static_cast<float>(kLog2e) : 0.0f;
        adjoint[i] = p.grad_final_state && valid(i)
                         ? p.grad_final_state[b * p.grad_final_stride[0] + d * p.grad_final_stride[1] +
                                              n * p.grad_final_stride[2]]
                         : 0.0f;
    }
    if (tid < kChannels) {
        bias[tid] = p.delta_bias.data && tid < channels ? p.delta_bias[(block.d0 + tid) * p.bias_stride] : 0.0f;
        skip[tid] = p.D.data && tid < channels ? p.D[(block.d0 + tid) * p.D_stride] : 0.0f;
    }

    // The rows of B and C: by step, or `constant` ones, by channel.
    auto load_rows = [&](int s0, int steps, bool constant) {
#pragma unroll
        for (int C = 0; C < 2; ++C) {
            if ((C ? p.C_constant : p.B_constant) != constant) continue;
            const int64_t (&stride)[4] = C ? p.C_stride : p.B_stride;
            const int64_t origin =
                constant ? block.d0 * stride[3]
                         : b * stride[0] + block.group / (C ? p.groups_per_C : p.groups_per_B) * stride[1];
#pragma unroll 1
            for (int i = opaque(tid); i < kTile * N / 4; i += kThreads) {
                const int row = i % kTile, n = i / kTile * 4;
                float quad[4] = {};
                if (row < (constant ? channels : steps))
                    load_quad(quad, p, C, origin + (constant ? row : time_of(p, s0 + row, length)) * stride[3], n);
                *reinterpret_cast<float4*>(&rows[C][row][n]) = as_float4(quad);
            }
        }
    };
    if constexpr (CONSTANT) load_rows(0, 0, true);
    const bool B_constant = CONSTANT && p.B_constant, C_constant = CONSTANT && p.C_constant;
    const float* const B_row = &rows[0][B_constant ? channel : 0][lane * STATES];
    const float* const C_row = &rows[1][C_constant ? channel : 0][lane * STATES];
    const int B_by = B_constant ? 0 : kRow, C_by = C_constant ? 0 : kRow;

#pragma unroll 1
    for (int tile = (length - 1 + kTile) / kTile - 1; tile >= 0; --tile) {
        const int s0 = tile * kTile, steps = min(kTile, length - s0);
        const int64_t time = time_of(p, s0, length);
        // Visits this thread's elements of a tile of a tensor: (channel, step, its address).
        auto visit = [&](T* data, const int64_t (&stride)[3], auto&& body) {
            const Walk walk(stride[1] == 1);
            T* item = plane(data, stride) + walk.channel * stride[1] + (time + direction * walk.step) * stride[2];
            const int64_t by = opaque(walk.channel_by * stride[1] + direction * walk.step_by * stride[2]);
#pragma unroll
            for (int i = 0; i < kItems<kChannels>; ++i, item += by) {
                const int c = walk.channel + i * walk.channel_by, s = walk.step + i * walk.step_by;
                if (c < channels && s < steps) body(c, s, item);
            }
        };
        auto read = [&](const T* data, const int64_t (&stride)[3], auto&& body) {
            T items[kItems<kChannels>];
            const Walk walk(stride[1] == 1);
            load_tile(items, plane(data, stride), stride, walk, time, direction, channels, steps);
#pragma unroll
            for (int i = 0; i < kItems<kChannels>; ++i)
                body(walk.channel + i * walk.channel_by, walk.step + i * walk.step_by, to_compute(items[i]));
        };

        __syncthreads();  // the tile before has been written
        read(p.delta, p.delta_stride, [&](int c, int s, float value) {
            float dt = value + bias[c];
            if (p.delta_softplus) dt = softplus(dt);
            inputs[c][s].x = c < channels && s < steps ? dt : 0.0f;  // a step of zero leaves the state as it is
        });
        read(p.u, p.u_stride, [&](int c, int s, float value) { inputs[c][s].y = value; });
        if (p.z) {
            read(p.z, p.z_stride, [&](int c, int s, float value) { dy[c][s] = silu(value); });
            __syncthreads();
        }
        if (p.grad_out)
            read(p.grad_out, p.grad_out_stride,
                 [&](int c, int s, float value) { dy[c][s] = p.z ? dy[c][s] * value : value; });
        else
            for (int i = tid; i < kChannels * kTile; i += kThreads) dy[i / kTile][i % kTile] = 0.0f;
        load_rows(s0, steps, false);
        unsigned resets = 0;  // bit s: step s0 + s starts a packed sequence
        if (p.seq_idx.data) {
            const int s = s0 + tid % 32;
            resets = __ballot_sync(0xffffffffu, s > 0 && s < length && starts_sequence(p, b, s, length));
        }
        const float* const kept = checkpoint(p, b, tile, d);
        auto kept_state = [&](int i) { return valid(i) ? kept[opaque(lane * STATES) + i] : 0.0f; };
        __syncthreads();

        float h[STATES];
#pragma unroll
        for (int i = 0; i < STATES; ++i) h[i] = kept_state(i);
#pragma unroll 1
        for (int q = 0; q < kStretches - 1; ++q) {
#pragma unroll 4
            for (int s = q * kStretch; s < (q + 1) * kStretch; ++s) {
                const float2 in = inputs[channel][s];
                float B[STATES];
                load_row(B, B_row + s * B_by);
                if (resets >> s & 1u) {
#pragma unroll
                    for (int i = 0; i < STATES; ++i) h[i] = 0.0f;
                }
#pragma unroll
                for (int i = 0; i < STATES; ++i) h[i] = fmaf(exp2_fast(in.x * A2[i]), h[i], in.x * in.y * B[i]);
            }
#pragma unroll
            for (int i = 0; i < STATES; ++i) before[q][i][tid] = h[i];
        }

        // kGroup states from i0 on through stretch q and back; adds to the sums over states.
        auto walk_stretch = [&](int q, auto first_state, float (&ysum)[kStretch], float (&dinput)[kStretch],
                                float (&ddt)[kStretch], auto has_resets) {
            constexpr int i0 = decltype(first_state)::value;
            constexpr bool RESETS = decltype(has_resets)::value;
            float start[kGroup], states[kGroup][kStretch] = {}, decays[kGroup][kStretch];
#pragma unroll
            for (int i = 0; i < kGroup; ++i) start[i] = q > 0 ? before[max(q - 1, 0)][i0 + i][tid] : kept_state(i0 + i);
            auto starts = [&](int k) { return RESETS && (resets >> (q * kStretch + k) & 1u); };
            auto before_step = [&](int k, int i) {
                return starts(k) ? 0.0f : k > 0 ? states[i][k > 0 ? k - 1 : 0] : start[i];
            };
#pragma unroll
            for (int k = 0; k < kStretch; ++k) {
                const int s = q * kStretch + k;
                const float2 in = inputs[channel][s];
                float B[kGroup];
                load_row(B, B_row + s * B_by + i0);
#pragma unroll
                for (int i = 0; i < kGroup; ++i) {
                    decays[i][k] = exp2_fast(in.x * A2[i0 + i]);
                    if (starts(k)) decays[i][k] = 0.0f;
                    const float last = before_step(k, i);
                    states[i][k] = fmaf(decays[i][k], last, in.x * in.y * B[i]);
                }
            }
#pragma unroll
            for (int k = kStretch - 1; k >= 0; --k) {  // the products for dC and dB take the place of states and decays
                const int s = q * kStretch + k;
                const float2 in = inputs[channel][s];
                const float slope = dy[channel][s], input = in.x * in.y;
                float B[kGroup], C[kGroup];
                load_row(B, B_row + s * B_by + i0);
                load_row(C, C_row + s * C_by + i0);
#pragma unroll
                for (int i = 0; i < kGroup; ++i) {
                    const float last = before_step(k, i);
                    const float g = fmaf(slope, C[i], adjoint[i0 + i]);
                    ysum[k] = fmaf(states[i][k], C[i], ysum[k]);
                    dinput[k] = fmaf(g, B[i], dinput[k]);
                    adjoint[i0 + i] = decays[i][k] * g;
                    const float e = adjoint[i0 + i] * last;
                    ddt[k] = fmaf(e, A2[i0 + i], ddt[k]);
                    dA[i0 + i] = fmaf(e, in.x, dA[i0 + i]);
                    decays[i][k] = g * input, states[i][k] *= slope;
                }
            }
            if constexpr (CONSTANT) {
#pragma unroll
                for (int i = 0; i < kGroup; ++i)
#pragma unroll
                    for (int k = kStretch - 1; k >= 0; --k)
                        dmatrix[0][i0 + i] += decays[i][k], dmatrix[1][i0 + i] += states[i][k];
            }

            const int buffer = kBuffers == 2 ? (q * (STATES / kGroup) + i0 / kGroup) % 2 : 0;
            const int thread = opaque(tid), warp = thread / 32,
                      step = thread % 32 / LANES * (kStretch >> kChannelLevels);
            if (kBuffers == 1) __syncthreads();  // the sums of before have been read
#pragma unroll
            for (int C = 0; C < 2; ++C) {
#pragma unroll
                for (int i = 0; i < kGroup; ++i) sum_lanes<kChannelLevels>(C ? states[i] : decays[i], 16);
#pragma unroll
                for (int k = 0; k < kStretch >> kChannelLevels; ++k) {
                    auto& v = C ? states : decays;
                    float* const row = &sums[buffer][C][warp][step + k][lane * kGroup];
                    *reinterpret_cast<float2*>(row) = make_float2(v[0][k], v[1][k]);
                }
            }
            __syncthreads();
            for (int e = opaque(tid); e < 2 * kStretch * kGroup * LANES; e += kThreads) {
                const int C = e / (kStretch * kGroup * LANES), k = e / (kGroup * LANES) % kStretch;
                const int column = e % (kGroup * LANES), n = column / kGroup * STATES + i0 + column % kGroup;
                const int s = q * kStretch + k;
                if ((C ? p.C_constant : p.B_constant) || s >= steps || n >= p.state) continue;
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < kWarps; ++w) total += sums[buffer][C][w][k][column];
                const int64_t row = (static_cast<int64_t>(b) * p.blocks_per_batch + block.index) * p.length + s0 + s;
                p.steps[C][row * p.state + n] = total;
            }
        };

#pragma unroll 1
        for (int q = kStretches - 1; q >= 0; --q) {
            float ysum[kStretch] = {}, dinput[kStretch] = {}, ddt[kStretch] = {};
            auto all_states = [&](auto has_resets) {
                for_each<0, STATES, kGroup>([&](auto first) { walk_stretch(q, first, ysum, dinput, ddt, has_resets); });
            };
            if (resets >> (q * kStretch) & ((1u << kStretch) - 1))
                all_states(std::true_type{});
            else
                all_states(std::false_type{});

            if (p.z) sum_lanes<kStateLevels>(ysum, LANES / 2);
            sum_lanes<kStateLevels>(dinput, LANES / 2);
            sum_lanes<kStateLevels>(ddt, LANES / 2);
            __syncwarp();
#pragma unroll
            for (int k = 0; k < kMine; ++k) {
                const int s = q * kStretch + lane * kMine + k;
                const float2 in = inputs[channel][s];
                const float slope = dy[channel][s];
                float gradient = fmaf(ddt[k], static_cast<float>(1 / kLog2e), dinput[k] * in.y);
                if (p.delta_softplus) gradient *= -expm1f(-in.x);  // the sigmoid of what softplus took
                if (s < steps) dbias += gradient;                  // past the end the state still has a gradient
                dD = fmaf(slope, in.y, dD);
                if (p.z) y[channel][s] = fmaf(skip[channel], in.y, ysum[k]);
                inputs[channel][s] = make_float2(gradient, fmaf(dinput[k], in.x, skip[channel] * slope));
            }
        }

        __syncthreads();
        visit(p.ddelta, p.ddelta_stride, [&](int c, int s, T* to) { *to = from_compute<T>(inputs[c][s].x); });
        visit(p.du, p.du_stride, [&](int c, int s, T* to) { *to = from_compute<T>(inputs[c][s].y); });
        if (p.z) {
            if (p.grad_out)
                read(p.grad_out, p.grad_out_stride, [&](int c, int s, float value) { y[c][s] *= value; });
            else
                for (int i = tid; i < kChannels * kTile; i += kThreads) y[i / kTile][i % kTile] = 0.0f;
            __syncthreads();
            read(p.z, p.z_stride, [&](int c, int s, float value) { y[c][s] *= silu_derivative(value); });
            if ((p.z_stride[1] == 1) != (p.dz_stride[1] == 1)) __syncthreads();
            visit(p.dz, p.dz_stride, [&](int c, int s, T* to) { *to = from_compute<T>(y[c][s]); });
        }
    }

#pragma unroll
    for (int by = LANES / 2; by > 0; by /= 2) {
        dD += __shfl_xor_sync(0xffffffffu, dD, by);
        dbias += __shfl_xor_sync(0xffffffffu, dbias, by);
    }
    if (!active) return;
    float* const row = p.rows + (static_cast<int64_t>(b) * p.dim + d) * p.columns;
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
        const int n = lane * STATES + i;
        if (n >= p.state) continue;
        row[n] = dA[i];
        if (p.dinitial_state)
            p.dinitial_state[b * p.dinitial_stride[0] + d * p.dinitial_stride[1] + n * p.dinitial_stride[2]] =
                adjoint[i];
        if constexpr (CONSTANT) {
            if (p.B_constant) row[p.state + 2 + n] = dmatrix[0][i];
            if (p.C_constant) row[p.state * (1 + p.B_constant) + 2 + n] = dmatrix[1][i];
        }
    }
    if (lane == 0) row[p.state] = dD, row[p.state + 1] = dbias;
}

template <typename T, int STATES, int LANES>
void launch_fast(const SelectiveScanBackward& params) {
    const Arguments<T> p(params, kThreads / LANES);
    const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(p.batch) * p.blocks_per_batch));
    if (p.batch > 0) {
        auto* const kernel = p.B_constant || p.C_constant ? run<T, STATES, LANES, true> : run<T, STATES, LANES, false>;
        PARROT_LAUNCH(kernel, grid, kThreads, params.stream, p);
    }
    launch_sums(p, params.stream);
}

template <typename T>
void launch_generic(const SelectiveScanBackward& params) {
    const Arguments<T> p(params, kGenericChannels);
    const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(p.batch) * p.blocks_per_batch));
    if (p.batch > 0) PARROT_LAUNCH(run_generic<T>, grid, 32, params.stream, p);
    launch_sums(p, params.stream);
}

template <typename T>
const char* launch(const SelectiveScanBackward& params) {
    const int64_t state = params.A.size[1];
    if (params.u.size[1] == 0) return nullptr;
    if (params.chunk_size != kTile) return "checkpoints must be 32 steps apart";
    if (sizeof(T) == 8 || state > 64)
        launch_generic<T>(params);
    else if constexpr (sizeof(T) < 8) {
        if (state <= 8)
            launch_fast<T, 2, 4>(params);
        else if (state <= 16)
            launch_fast<T, 4, 4>(params);
        else if (state <= 24)
            launch_fast<T, 6, 4>(params);
        else if (state <= 32)
            launch_fast<T, 8, 4>(params);
        else
            launch_fast<T, 8, 8>(params);
    }
    return last_launch_error();
}

}  // namespace scan_backward
}  // namespace cuda
}  // namespace parrot
