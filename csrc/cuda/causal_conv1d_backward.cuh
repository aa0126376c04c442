// Backward of the causal convolution on CUDA; see causal_conv1d.cuh.
#pragma once

#include "causal_conv1d.cuh"

namespace parrot {
namespace cuda {
namespace conv {

template <typename T, int WIDTH, int CHANNELS>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor<T>) backward(const Arguments<T> p) {
    using Real = Compute<T>;
    using S = Shape<CHANNELS>;
    constexpr int kOutputs = kSteps + WIDTH - 1;  // the outputs that the steps of a tile reach
    __shared__ Real sums[S::kTileLanes][WIDTH + 1][S::kBlockChannels];
    const Place<CHANNELS> place(p);
    const Line<T> line(p, place.b, min(place.d, p.dim - 1));
    Real taps[WIDTH][CHANNELS], bias[CHANNELS], dtaps[WIDTH][CHANNELS] = {}, dbias[CHANNELS] = {};
    load_filter<T>(taps, bias, p, place.d);

    if (place.stretch == 0 && p.dinitial_state.data)
        for (int i = place.tile_lane; i < (WIDTH - 1) * CHANNELS; i += S::kTileLanes)
            if (place.d + i % CHANNELS < p.dim)
                Line<T>(p, place.b, place.d + i % CHANNELS).write_dinitial_state(i / CHANNELS);

    // A tile sums the taps' gradients over its first kSteps outputs, which reversed lie W - 1 steps before its steps:
    // then the last stretch has a tile past the end.
    const int reach = p.length + (p.reverse ? WIDTH - 1 : 0);
#pragma unroll 1
    for (int k = 0; k < kIterations && place.d < p.dim; ++k) {
        const int t0 = place.stretch * S::kStretch + (k * S::kTileLanes + place.tile_lane) * kSteps;
        if (t0 >= reach) break;
        Real tile[kSteps][CHANNELS] = {};
        const int first = t0 - (WIDTH - 1), output = p.reverse ? first : t0;
        if (output < line.length) {
            Real window[kOutputs + WIDTH - 1][CHANNELS], dpre[kOutputs][CHANNELS];
            unsigned kept[WIDTH];
            const bool whole = kept_taps<WIDTH, kOutputs>(kept, line, first);
            load_steps<WIDTH - 1>(window, p.x, place.b, place.d, p.dim, first, line.length);
            load_history(window, line, first);
            auto run = [&](auto cut) {
                constexpr bool CUT = decltype(cut)::value;
                Real gradient[kOutputs][CHANNELS];
                if (!p.grad_out.data) {
#pragma unroll
                    for (int i = 0; i < kOutputs * CHANNELS; ++i) gradient[i / CHANNELS][i % CHANNELS] = 0;
                } else if (p.reverse) {
                    load_steps<WIDTH - 1>(gradient, p.grad_out, place.b, place.d, p.dim, output, line.length);
                } else {
                    load_steps<0>(gradient, p.grad_out, place.b, place.d, p.dim, output, line.length);
                }
                if (p.silu) convolve<CUT>(dpre, window, taps, bias, kept);
#pragma unroll
                for (int i = 0; i < kOutputs; ++i)
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c)
                        dpre[i][c] = p.silu ? gradient[i][c] * silu_derivative(dpre[i][c]) : gradient[i][c];
#pragma unroll
                for (int i = 0; i < kSteps; ++i)
#pragma unroll
                    for (int c = 0; c < CHANNELS; ++c) {
                        dbias[c] += dpre[i][c];
#pragma unroll
                        for (int j = 0; j < WIDTH; ++j) {
                            // Output i + j reaches this tile's step i by tap W - 1 - j.
                            if (!CUT || (kept[j] >> i & 1u))
                                dtaps[j][c] = fma(dpre[i][c], window[i + j][c], dtaps[j][c]);
                            if (!CUT || (kept[WIDTH - 1 - j] >> (i + j) & 1u))
                                tile[i][c] = fma(taps[WIDTH - 1 - j][c], dpre[i + j][c], tile[i][c]);
                        }
                    }
            };
            if (whole)
                run(std::false_type{});
            else
                run(std::true_type{});
        }
        if (p.grad_final_state.data && t0 < line.length &&
            (p.reverse ? t0 < WIDTH - 1 : t0 + kSteps > line.length - (WIDTH - 1))) {
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                const int s = static_cast<int>(line.time(t0 + i));
                if (s < 0 || s >= line.length) continue;
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c)
                    if (place.d + c < p.dim)
                        tile[i][c] += Line<T>(p, place.b, place.d + c).final_gradient(s + WIDTH - 1);
            }
        }
        if (t0 + kSteps > line.length) {  // reversed, the history lies there
#pragma unroll
            for (int i = 0; i < kSteps; ++i)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) tile[i][c] = t0 + i < line.length ? tile[i][c] : Real(0);
        }
        store_steps(tile, p.out, place.b, place.d, p.dim, t0, p.length);
    }

#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        const int channel = place.channel_lane * CHANNELS + c;
        sums[place.tile_lane][WIDTH][channel] = dbias[c];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sums[place.tile_lane][j][channel] = dtaps[j][c];
    }
    __syncthreads();
    const int d0 = place.d - place.channel_lane * CHANNELS;
    for (int i = threadIdx.x; i < S::kBlockChannels * (WIDTH + 1); i += kThreads) {
        const int channel = i % S::kBlockChannels, j = i / S::kBlockChannels;
        if (d0 + channel >= p.dim) continue;
        Real total = 0;
        for (int lane = 0; lane < S::kTileLanes; ++lane) total += sums[lane][j][channel];
        const int k = j < WIDTH && p.reverse ? WIDTH - 1 - j : j;
        const int64_t row = (static_cast<int64_t>(place.stretch) * p.batch + place.b) * p.dim + d0 + channel;
        p.partials[row * (WIDTH + 1) + k] = total;
    }
}

// Any width: a warp per channel and batch entry.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) backward_any_width(const Arguments<T> p) {
    using Real = Compute<T>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (row >= static_cast<int64_t>(p.batch) * p.dim) return;  // whole warps
    const int lane = threadIdx.x % 32, history = p.width - 1;
    const Line<T> line(p, row / p.dim, row % p.dim);
    for (int t = lane; t < p.length; t += 32)
        p.out.at(line.b, line.d, t) =
            from_compute<T>(t < line.length ? line.dline(static_cast<int>(line.time(t)) + history) : Real(0));
    for (int j = lane; j < history && p.dinitial_state.data; j += 32) line.write_dinitial_state(j);
    for (int k = 0; k <= p.width; ++k) {
        Real total = 0;
        for (int s = lane; s < line.length; s += 32)
            if (k == p.width)
                total += line.dpre(s);
            else if (line.same(s + k, s + history))
                total = fma(line.dpre(s), line.value(s + k), total);
        for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(0xffffffffu, total, by);
        if (lane == 0) p.partials[row * (p.width + 1) + k] = total;
    }
}

template <typename Real>
struct FilterGradient {
    const Real* partials;
    Real *dweight, *dbias;
    int64_t weight_stride[2], bias_stride;
    int rows, dim, width;  // rows: stretches of all batch entries
};

// One warp per 32 entries of (channel, tap), so that it reads along them.
template <typename Real>
__global__ void __launch_bounds__(kThreads) sum_partials(const FilterGradient<Real> p) {
    __shared__ Real sums[kThreads];
    const int64_t size = static_cast<int64_t>(p.dim) * (p.width + 1);
    const int64_t entry = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
    Real total = 0;
    for (int row = threadIdx.x / 32; row < p.rows && entry < size; row += kThreads / 32)
        total += p.partials[row * size + entry];
    sums[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x >= 32 || entry >= size) return;
    for (int i = 32; i < kThreads; i += 32) total += sums[threadIdx.x + i];
    const int64_t d = entry / (p.width + 1), k = entry % (p.width + 1);
    if (k < p.width)
        p.dweight[d * p.weight_stride[0] + k * p.weight_stride[1]] = total;
    else if (p.dbias)
        p.dbias[d * p.bias_stride] = total;
}

template <typename T, int CHANNELS>
void launch_backward(Arguments<T>& p, void* stream) {
    for_width(p.width, [&](auto width) {
        if constexpr (constexpr int WIDTH = decltype(width)::value; WIDTH > 0) {
            auto* const kernel = backward<T, WIDTH, CHANNELS>;
            PARROT_LAUNCH(kernel, tile_grid<CHANNELS>(p), kThreads, stream, p);
        } else {
            PARROT_LAUNCH(backward_any_width<T>, row_grid(p), kThreads, stream, p);
        }
    });
}

template <typename T>
const char* backward_launch(const CausalConv1dBackward& params) {
    using Real = Compute<T>;
    const bool last = channels_last(params.x);
    const int channels = last ? kBackwardChannels : 1;
    Arguments<T> p = arguments<T>(params, channels);
    p.out = Plane<T>(params.dx, channels), p.dinitial_state = Plane<T>(params.dinitial_state, channels);
    p.grad_out = Plane<T>(params.grad_out, channels);
    p.grad_final_state = Plane<T>(params.grad_final_state, channels);
    p.partials = params.workspace.ptr<Real>();
    if (p.dim == 0) return nullptr;
    if (p.batch > 0) {
        if (last)
            launch_backward<T, kBackwardChannels>(p, params.stream);
        else
            launch_backward<T, 1>(p, params.stream);
    }
    FilterGradient<Real> g{p.partials,
                           params.dweight.ptr<Real>(),
                           params.dbias ? params.dbias.ptr<Real>() : nullptr,
                           {params.dweight.stride[0], params.dweight.stride[1]},
                           params.dbias.stride[0],
                           p.stretches * p.batch,
                           p.dim,
                           p.width};
    const int64_t entries = static_cast<int64_t>(p.dim) * (p.width + 1);
    PARROT_LAUNCH(sum_partials<Real>, dim3(static_cast<unsigned>((entries + 31) / 32)), kThreads, params.stream, g);
    return last_launch_error();
}

}  // namespace conv
}  // namespace cuda
}  // namespace parrot
