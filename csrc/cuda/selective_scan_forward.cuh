// Forward of the selective scan on CUDA (formulas: parrot_kernels/ops/selective_scan.py).
//
// Four lanes share a channel; each holds a quarter of its states in registers and walks the time axis. A block of 128
// threads serves 32 channels of one batch entry and one group, so a tile of B and C rows, staged in shared memory, is
// read by all of them. One exponential and five multiply-adds per state and step; y is the sum over the four lanes,
// transposed so that four steps cost three shuffles.
//
// The time axis is cut into chunks of kChunk steps. A chunk is summarised by (sum of delta, e), where e is the state
// it would end in had it started from zero: h_end = exp(A sum delta) h_start + e. Every chunk hands the next one its
// state in this form, also within one block. So where the batch and the channels cannot fill the device, chunks run
// in parallel (summaries, a scan over them, then the outputs) with bitwise the same result: it never depends on the
// batch size or on the padding.
#pragma once

#include <type_traits>

#include "selective_scan.cuh"

namespace parrot {
namespace cuda {

constexpr int kLanes = 4;                     // threads per channel
constexpr int kChannels = kThreads / kLanes;  // channels per block
constexpr int kChunk = 256;                   // steps between hand-overs; a multiple of kTile
constexpr int kTileItems = kItems<kChannels>;
static_assert(kChannels == kTile, "tiles are square, constant B and C reuse the tile of steps");

template <typename T>
struct ScanArguments : ScanInputs<T> {
    using Real = Compute<T>;
    T* out;
    Real *final_state, *chunk_state,
        *chunk_sum;  // chunk_*: the workspace, (chunks, batch, dim, state), (chunks, batch, dim)
    int64_t out_stride[3], final_stride[3];
    int segment;  // steps per block of the grid's y axis; a multiple of kChunk if there are several

    explicit ScanArguments(const SelectiveScanForward& params)
        : ScanInputs<T>(params, params.checkpoints, kChannels),
          out(params.out.ptr<T>()),
          final_state(params.final_state.ptr<Real>()),
          chunk_state(nullptr),
          chunk_sum(nullptr),
          segment(this->length > 0 ? this->length : 1) {
        for (int i = 0; i < 3; ++i)
            out_stride[i] = params.out.stride[i], final_stride[i] = params.final_state.stride[i];
    }
};

// The state after a chunk from the state before it.
template <typename Real>
__device__ __forceinline__ Real hand_over(Real sum, Real A2, Real start, Real e) {
    return isinf(sum) ? e : fma(exp2_fast(A2 * sum), start, e);
}

// Bounds the registers of a thread (65536 per multiprocessor).
constexpr int blocks_per_multiprocessor(int states) { return states <= 4 ? 4 : states <= 6 ? 3 : 2; }

using Walk = TileWalk<kChannels>;

// SUMMARY: only the chunks' (sum, e) of this block's segment. Otherwise: outputs, starting from the state before the
// segment, which `scan_chunks` left in place of e.
template <typename T, int STATES, bool SUMMARY>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(STATES)) scan_forward(const ScanArguments<T> p) {
    constexpr int N = kLanes * STATES, kRow = N + 4;      // padded: quads of neighbouring rows meet different banks
    constexpr int kQuads = 2 * kTile * N / 4 / kThreads;  // groups of four entries of B and C rows per thread
    __shared__ float2 inputs[kChannels][kTile + 1];       // delta, delta * u
    __shared__ float outputs[kChannels][kTile + 4];
    __shared__ float start[STATES][kThreads];  // the state the chunk began with: rarely needed, too dear for registers
    __shared__ float bias[kChannels], skip[kChannels];    // delta_bias and D
    __shared__ __align__(16) float rows[2][kTile][kRow];  // of B and C, by step; constant ones by channel

    const int tid = threadIdx.x, lane = tid % kLanes, channel = tid / kLanes;
    const int blocks_per_batch = p.groups * p.blocks_per_group;
    const int b = blockIdx.x / blocks_per_batch;
    const int group = blockIdx.x % blocks_per_batch / p.blocks_per_group;
    const int first = (blockIdx.x % p.blocks_per_group) * kChannels;  // in the group
    const int channels = min(kChannels, p.group_dim - first);
    const int d0 = group * p.group_dim + first, d = d0 + channel;
    const bool active = channel < channels;

    const int length = length_of(p, b);
    const int begin = blockIdx.y * p.segment;
    const int end = min(begin + p.segment, length);

    const bool u_last = p.u_stride[1] == 1, z_last = p.z_stride[1] == 1, out_last = p.out_stride[1] == 1;
    const bool delta_last = p.delta_stride[1] == 1;
    const T* const u = p.u + b * p.u_stride[0] + d0 * p.u_stride[1];
    const T* const delta = p.delta + b * p.delta_stride[0] + d0 * p.delta_stride[1];
    const T* const z = p.z ? p.z + b * p.z_stride[0] + d0 * p.z_stride[1] : nullptr;
    T* const out = p.out + b * p.out_stride[0] + d0 * p.out_stride[1];

    if (!SUMMARY) {  // padding
        const Walk walk(out_last);
        const int stop = min(begin + p.segment, p.length);
        for (int t = max(begin, length) + walk.step; t - walk.step < stop; t += kTile)
            for (int i = 0; i < kTileItems; ++i)
                if (walk.channel + i * walk.channel_by < channels && t + i * walk.step_by < stop)
                    out[(walk.channel + i * walk.channel_by) * p.out_stride[1] +
                        (t + i * walk.step_by) * p.out_stride[2]] = from_compute<T>(0.0f);
    }
    if (begin >= length && (begin > 0 || SUMMARY)) return;

    float A2[STATES], h[STATES], e[STATES];
    float sum = 0.0f;  // of delta since the chunk began; infinite once a packed sequence started in it
    const int64_t chunk_by = static_cast<int64_t>(p.batch) * p.dim;
    int64_t chunk = static_cast<int64_t>(begin / kChunk) * chunk_by + static_cast<int64_t>(b) * p.dim + d;
#pragma unroll
    for (int i = 0; i < STATES; ++i) {
        const int n = lane * STATES + i;
        const bool valid = active && n < p.state;
        A2[i] = valid ? p.A[d * p.A_stride[0] + n * p.A_stride[1]] * static_cast<float>(kLog2e) : 0.0f;
        h[i] = 0.0f, e[i] = 0.0f;
        if (!SUMMARY && valid) {
            if (begin > 0)
                h[i] = p.chunk_state[chunk * p.state + n];
            else if (p.initial_state)
                h[i] = p.initial_state[b * p.initial_stride[0] + d * p.initial_stride[1] + n * p.initial_stride[2]];
        }
        if (!SUMMARY) start[i][tid] = h[i];
    }

    // The row tiles of B and C in groups of four states; group k of this thread is at row tid % kTile.
    auto is_C = [&](int k) { return (k * kThreads + tid) / kTile >= N / 4; };
    auto first_state = [&](int k) { return (k * kThreads + tid) / kTile * 4 % N; };
    auto by_step = [&](bool C) { return C ? !p.C_constant && !SUMMARY : !p.B_constant; };
    if (tid < kChannels) {
        bias[tid] = p.delta_bias.data && tid < channels ? p.delta_bias[(d0 + tid) * p.bias_stride] : 0.0f;
        skip[tid] = p.D.data && tid < channels ? p.D[(d0 + tid) * p.D_stride] : 0.0f;
    }
    for (int k = 0; k < kQuads; ++k) {
        const bool C = is_C(k);
        if (!(C ? p.C_constant : p.B_constant)) continue;
        float quad[4] = {};
        const int c = tid % kTile;
        if (c < channels) load_quad(quad, p, C, (d0 + c) * (C ? p.C_stride[3] : p.B_stride[3]), first_state(k));
        *reinterpret_cast<float4*>(&rows[C][c][first_state(k)]) = as_float4(quad);
    }
    const float* const B_row = &rows[0][p.B_constant ? channel : 0][lane * STATES];
    const float* const C_row = &rows[1][p.C_constant ? channel : 0][lane * STATES];
    const int B_by = p.B_constant ? 0 : kRow, C_by = p.C_constant ? 0 : kRow;

    const int direction = p.reverse ? -1 : 1;
    T next_u[kTileItems], next_delta[kTileItems], gate[kTileItems];
    // A tile ahead is loaded into registers. With more states there is no room, and more work to hide the wait behind.
    constexpr bool kRowsAhead = STATES < 6, kAhead = STATES <= 8;
    float quads[kRowsAhead ? kQuads : 1][4];
    auto load_step = [&](float (&quad)[4], int k, int s0) {
        const bool C = is_C(k);
        const int s = tid % kTile;
        quad[0] = quad[1] = quad[2] = quad[3] = 0.0f;
        if (!by_step(C) || s0 + s >= end) return;
        const int64_t (&stride)[4] = C ? p.C_stride : p.B_stride;
        load_quad(quad, p, C,
                  b * stride[0] + group / (C ? p.groups_per_C : p.groups_per_B) * stride[1] +
                      time_of(p, s0 + s, length) * stride[3],
                  first_state(k));
    };
    auto prefetch = [&](int s0) {
        const int64_t time = time_of(p, s0, length);
        load_tile(next_u, u, p.u_stride, Walk(u_last), time, direction, channels, end - s0);
        load_tile(next_delta, delta, p.delta_stride, Walk(delta_last), time, direction, channels, end - s0);
        if constexpr (kRowsAhead) {
#pragma unroll
            for (int k = 0; k < kQuads; ++k) load_step(quads[k], k, s0);
        }
    };

    if (kAhead) prefetch(begin);
    for (int s0 = begin; s0 < end; s0 += kTile) {
        const int steps = min(kTile, end - s0);
        if (!kAhead) prefetch(s0);
        __syncthreads();  // the previous tile has been read
        // delta goes first, then u, so that each may have its own layout.
        const Walk delta_walk(delta_last);
#pragma unroll
        for (int i = 0; i < kTileItems; ++i) {
            const int c = delta_walk.channel + i * delta_walk.channel_by, s = delta_walk.step + i * delta_walk.step_by;
            float dt = to_compute(next_delta[i]);
            dt += bias[c];
            if (p.delta_softplus) dt = softplus(dt);
            inputs[c][s].x = c < channels && s < steps ? dt : 0.0f;  // a step of zero leaves the state as it is
        }
        if (u_last != delta_last) __syncthreads();
        const Walk u_walk(u_last);
#pragma unroll
        for (int i = 0; i < kTileItems; ++i) {
            const int c = u_walk.channel + i * u_walk.channel_by, s = u_walk.step + i * u_walk.step_by;
            const float x = to_compute(next_u[i]);
            inputs[c][s].y = inputs[c][s].x * x;
            if (!SUMMARY) outputs[c][s] = skip[c] * x;
        }
#pragma unroll(kRowsAhead ? kQuads : 1)
        for (int k = 0; k < kQuads; ++k) {
            float (&quad)[4] = quads[kRowsAhead ? k : 0];
            if (!kRowsAhead) load_step(quad, k, s0);
            if (by_step(is_C(k)))
                *reinterpret_cast<float4*>(&rows[is_C(k)][tid % kTile][first_state(k)]) = as_float4(quad);
        }
        unsigned resets = 0;  // bit s: step s0 + s starts a packed sequence
        if (p.seq_idx.data) {
            const int s = s0 + tid % 32;
            resets = __ballot_sync(0xffffffffu, s > 0 && s < end && starts_sequence(p, b, s, length));
        }
        __syncthreads();
        if (!SUMMARY && p.checkpoints) {
            const int thread = opaque(tid), c = thread / kLanes, n0 = thread % kLanes * STATES;
            float* const kept = checkpoint(p, b, s0 / kTile, opaque(d0) + c) + n0;
#pragma unroll
            for (int i = 0; i < STATES; ++i)
                if (c < channels && n0 + i < p.state) kept[i] = h[i];
        }
        if (!SUMMARY && z)
            load_tile(gate, z, p.z_stride, Walk(z_last), time_of(p, s0, length), direction, channels, steps);
        if (kAhead && s0 + kTile < end) prefetch(s0 + kTile);

        auto four_steps = [&](int s, auto has_resets) {
            [[maybe_unused]] float y[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float2 in = inputs[channel][s + k];
                if (STATES > 8) __syncwarp();  // keeps the loads of several steps from crowding the registers
                [[maybe_unused]] float B[STATES], C[STATES];
                load_row(B, B_row + (s + k) * B_by);
                if constexpr (!SUMMARY) load_row(C, C_row + (s + k) * C_by);
                if constexpr (decltype(has_resets)::value) {
                    if (resets >> (s + k) & 1u) {
#pragma unroll
                        for (int i = 0; i < STATES; ++i) h[i] = 0.0f, e[i] = 0.0f;
                        sum = INFINITY;
                    }
                }
                sum += in.x;
                y[k] = 0.0f;
#pragma unroll
                for (int i = 0; i < STATES; ++i) {
                    const float decay = exp2_fast(in.x * A2[i]), input = in.y * B[i];
                    e[i] = fmaf(decay, e[i], input);
                    if constexpr (!SUMMARY) {
                        h[i] = fmaf(decay, h[i], input);
                        y[k] = fmaf(h[i], C[i], y[k]);
                    }
                }
            }
            if constexpr (!SUMMARY) {  // lane j of the four ends with the sum for step s + j
                const bool upper = lane & 2, odd = lane & 1;
                const float y0 = (upper ? y[2] : y[0]) + __shfl_xor_sync(0xffffffffu, upper ? y[0] : y[2], 2);
                const float y1 = (upper ? y[3] : y[1]) + __shfl_xor_sync(0xffffffffu, upper ? y[1] : y[3], 2);
                outputs[channel][s + lane] += (odd ? y1 : y0) + __shfl_xor_sync(0xffffffffu, odd ? y0 : y1, 1);
            }
        };
#pragma unroll 1
        for (int s = 0; s < kTile; s += 4) {  // whole warps take the same branch: `resets` is one value per block
            if (resets >> s & 15u)
                four_steps(s, std::true_type{});
            else
                four_steps(s, std::false_type{});
        }

        if ((s0 + kTile) % kChunk == 0 && (SUMMARY || s0 + kTile < end)) {
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                if (SUMMARY) {
                    if (active && lane * STATES + i < p.state)
                        p.chunk_state[chunk * p.state + lane * STATES + i] = e[i];
                } else {
                    h[i] = start[i][tid] = hand_over(sum, A2[i], start[i][tid], e[i]);
                }
                e[i] = 0.0f;
            }
            if (SUMMARY && active && lane == 0) p.chunk_sum[chunk] = sum;
            sum = 0.0f, chunk += chunk_by;
        }

        if (!SUMMARY) {
            __syncthreads();
            const Walk walk(z ? z_last : out_last);  // the gate's elements lie where they were loaded
            const int64_t time = time_of(p, s0, length) + direction * walk.step;
            const int64_t by = opaque(walk.channel_by * p.out_stride[1] + direction * walk.step_by * p.out_stride[2]);
            T* item = out + walk.channel * p.out_stride[1] + time * p.out_stride[2];
#pragma unroll
            for (int i = 0; i < kTileItems; ++i, item += by) {
                const int c = walk.channel + i * walk.channel_by, s = walk.step + i * walk.step_by;
                float y = outputs[c][s];
                if (z) y *= silu(to_compute(gate[i]));
                if (c < channels && s < steps) *item = from_compute<T>(y);
            }
        }
    }

    if (!SUMMARY && active && length <= begin + p.segment) {
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
            const int n = lane * STATES + i;
            if (n < p.state)
                p.final_state[b * p.final_stride[0] + d * p.final_stride[1] + n * p.final_stride[2]] = h[i];
        }
    }
}

// In place of each chunk's e, the state before the chunk. One thread per batch entry, channel and state.
template <typename T>
__global__ void __launch_bounds__(kThreads) scan_chunks(const ScanArguments<T> p) {
    const int64_t per_chunk = static_cast<int64_t>(p.batch) * p.dim;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= per_chunk * p.state) return;
    const int64_t row = index / p.state;
    const int n = index % p.state, d = row % p.dim, b = row / p.dim;
    const float A2 = p.A[d * p.A_stride[0] + n * p.A_stride[1]] * static_cast<float>(kLog2e);
    float state = 0.0f;
    if (p.initial_state)
        state = p.initial_state[b * p.initial_stride[0] + d * p.initial_stride[1] + n * p.initial_stride[2]];
    const int chunks = (length_of(p, b) + kChunk - 1) / kChunk;
    for (int c = 0; c < chunks; ++c) {
        float& e = p.chunk_state[c * per_chunk * p.state + index];
        const float next = (c + 1) < chunks ? hand_over(p.chunk_sum[c * per_chunk + row], A2, state, e) : 0.0f;
        e = state;
        state = next;
    }
}

// Any number of states, any dtype: a warp per channel, lanes over states, which live in `final_state`.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) scan_forward_generic(const ScanArguments<T> p) {
    using Real = Compute<T>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (row >= static_cast<int64_t>(p.batch) * p.dim) return;  // whole warps
    const int lane = threadIdx.x % 32, d = row % p.dim, b = row / p.dim, group = d / p.group_dim;
    const int length = length_of(p, b);
    Real* const state = p.final_state + b * p.final_stride[0] + d * p.final_stride[1];
    const int64_t B_origin =
        p.B_constant ? d * p.B_stride[3] : b * p.B_stride[0] + group / p.groups_per_B * p.B_stride[1];
    const int64_t C_origin =
        p.C_constant ? d * p.C_stride[3] : b * p.C_stride[0] + group / p.groups_per_C * p.C_stride[1];
    for (int n = lane; n < p.state; n += 32)
        state[n * p.final_stride[2]] =
            p.initial_state
                ? p.initial_state[b * p.initial_stride[0] + d * p.initial_stride[1] + n * p.initial_stride[2]]
                : Real(0);
    for (int s = 0; s < length; ++s) {
        const int64_t t = time_of(p, s, length);
        Real dt = to_compute(p.delta[b * p.delta_stride[0] + d * p.delta_stride[1] + t * p.delta_stride[2]]);
        if (p.delta_bias.data) dt += p.delta_bias[d * p.bias_stride];
        if (p.delta_softplus) dt = softplus(dt);
        const Real x = to_compute(p.u[b * p.u_stride[0] + d * p.u_stride[1] + t * p.u_stride[2]]);
        const bool reset = p.seq_idx.data && s > 0 && starts_sequence(p, b, s, length);
        Real y = 0;
        for (int n = lane; n < p.state; n += 32) {
            const Real A2 = p.A[d * p.A_stride[0] + n * p.A_stride[1]] * static_cast<Real>(kLog2e);
            const Real B = p.B[B_origin + n * p.B_stride[2] + (p.B_constant ? 0 : t * p.B_stride[3])];
            const Real C = p.C[C_origin + n * p.C_stride[2] + (p.C_constant ? 0 : t * p.C_stride[3])];
            const Real before = reset ? Real(0) : state[n * p.final_stride[2]];
            if (p.checkpoints && s % kTile == 0) checkpoint(p, b, s / kTile, d)[n] = state[n * p.final_stride[2]];
            const Real h = fma(exp2_fast(dt * A2), before, dt * x * B);
            state[n * p.final_stride[2]] = h;
            y = fma(h, C, y);
        }
        for (int by = 16; by > 0; by /= 2) y += __shfl_xor_sync(0xffffffffu, y, by);
        if (p.D.data) y = fma(p.D[d * p.D_stride], x, y);
        if (p.z) y *= silu(to_compute(p.z[b * p.z_stride[0] + d * p.z_stride[1] + t * p.z_stride[2]]));
        if (lane == 0) p.out[b * p.out_stride[0] + d * p.out_stride[1] + t * p.out_stride[2]] = from_compute<T>(y);
    }
    for (int t = length + lane; t < p.length; t += 32)
        p.out[b * p.out_stride[0] + d * p.out_stride[1] + t * p.out_stride[2]] = from_compute<T>(0);
}

// Blocks of the time axis that let the grid fill the device; 1 where one is enough, or three are not to be had: a
// second pass over the exponentials must pay.
inline int time_segments(int64_t blocks, int64_t length) {
    const int64_t chunks = (length + kChunk - 1) / kChunk;
    const int64_t wanted = blocks > 0 ? (2 * multiprocessors() + blocks - 1) / blocks : 1;
    const int64_t segments = wanted < chunks ? wanted : chunks;
    return segments >= 3 ? static_cast<int>(segments) : 1;
}

inline int64_t channel_blocks(int64_t batch, int64_t dim, int64_t groups) {
    return batch * groups * ((dim / groups + kChannels - 1) / kChannels);
}

template <typename T, int STATES>
void launch_scan(ScanArguments<T>& p, int segments, void* stream) {
    const unsigned blocks = static_cast<unsigned>(channel_blocks(p.batch, p.dim, p.groups));
    if (segments > 1) {
        const int chunks = (p.length + kChunk - 1) / kChunk;
        p.segment = (chunks + segments - 1) / segments * kChunk;
        segments = (p.length + p.segment - 1) / p.segment;
        auto* const summarise = scan_forward<T, STATES, true>;
        PARROT_LAUNCH(summarise, dim3(blocks, segments), kThreads, stream, p);
        const int64_t states = static_cast<int64_t>(p.batch) * p.dim * p.state;
        PARROT_LAUNCH(scan_chunks<T>, dim3(static_cast<unsigned>((states + kThreads - 1) / kThreads)), kThreads, stream,
                      p);
    }
    auto* const run = scan_forward<T, STATES, false>;
    PARROT_LAUNCH(run, dim3(blocks, segments), kThreads, stream, p);
}

template <typename T>
const char* scan_forward_launch(const SelectiveScanForward& params) {
    ScanArguments<T> p(params);
    if (p.checkpoints && params.chunk_size != kTile) return "checkpoints must be 32 steps apart";
    if (p.batch == 0 || p.dim == 0) return nullptr;
    int segments = 1;
    const int64_t workspace = selective_scan_workspace(p.batch, p.dim, p.groups, p.length, p.state);
    if (params.workspace && workspace > 0 && params.workspace.size[0] >= workspace) {
        segments = time_segments(channel_blocks(p.batch, p.dim, p.groups), p.length);
        const int64_t chunks = (p.length + kChunk - 1) / kChunk;
        p.chunk_state = params.workspace.ptr<Compute<T>>();
        p.chunk_sum = p.chunk_state + chunks * p.batch * p.dim * p.state;
    }
    if constexpr (sizeof(T) < 8) {
        if (p.state <= 64) {
            if (p.state <= 8)
                launch_scan<T, 2>(p, segments, params.stream);
            else if (p.state <= 16)
                launch_scan<T, 4>(p, segments, params.stream);
            else if (p.state <= 24)
                launch_scan<T, 6>(p, segments, params.stream);
            else if (p.state <= 32)
                launch_scan<T, 8>(p, segments, params.stream);
            else
                launch_scan<T, 16>(p, segments, params.stream);
            return last_launch_error();
        }
    }
    const int64_t rows = static_cast<int64_t>(p.batch) * p.dim, per_block = kThreads / 32;
    PARROT_LAUNCH(scan_forward_generic<T>, dim3(static_cast<unsigned>((rows + per_block - 1) / per_block)), kThreads,
                  params.stream, p);
    return last_launch_error();
}

}  // namespace cuda
}  // namespace parrot
