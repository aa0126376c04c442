// Forward of the causal convolution on CUDA; see causal_conv1d.cuh.
#pragma once

#include "causal_conv1d.cuh"

namespace parrot {
namespace cuda {
namespace conv {

template <typename T, int WIDTH, int CHANNELS>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor<T>) forward(const Arguments<T> p) {
    using Real = Compute<T>;
    using S = Shape<CHANNELS>;
    const Place<CHANNELS> place(p);
    if (place.d >= p.dim) return;
    const Line<T> line(p, place.b, place.d);
    Real taps[WIDTH][CHANNELS], bias[CHANNELS];
    load_filter<T>(taps, bias, p, place.d);

    if (place.stretch == 0)
        for (int i = place.tile_lane; i < (WIDTH - 1) * CHANNELS; i += S::kTileLanes)
            if (place.d + i % CHANNELS < p.dim)
                Line<T>(p, place.b, place.d + i % CHANNELS).write_final_state(i / CHANNELS);

#pragma unroll 1
    for (int k = 0; k < kIterations; ++k) {
        const int t0 = place.stretch * S::kStretch + (k * S::kTileLanes + place.tile_lane) * kSteps;
        if (t0 >= p.length) break;
        Real tile[kSteps][CHANNELS] = {};
        if (t0 < line.length) {
            const int first = p.reverse ? t0 : t0 - (WIDTH - 1);
            Real window[kSteps + WIDTH - 1][CHANNELS];
            if (p.reverse)
                load_steps<0>(window, p.x, place.b, place.d, p.dim, first, line.length);
            else
                load_steps<WIDTH - 1>(window, p.x, place.b, place.d, p.dim, first, line.length);
            load_history(window, line, first);
            unsigned kept[WIDTH];
            if (kept_taps<WIDTH, kSteps>(kept, line, first))
                convolve<false>(tile, window, taps, bias, kept);
            else
                convolve<true>(tile, window, taps, bias, kept);
#pragma unroll
            for (int i = 0; i < kSteps; ++i)
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    if (p.silu) tile[i][c] = silu(tile[i][c]);
                    if (t0 + i >= line.length) tile[i][c] = 0;
                }
        }
        store_steps(tile, p.out, place.b, place.d, p.dim, t0, p.length);
    }
}

// Any width: a warp per channel and batch entry.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) forward_any_width(const Arguments<T> p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (row >= static_cast<int64_t>(p.batch) * p.dim) return;
    const int lane = threadIdx.x % 32;
    const Line<T> line(p, row / p.dim, row % p.dim);
    for (int t = lane; t < p.length; t += 32) {
        Compute<T> y = t < line.length ? line.pre(static_cast<int>(line.time(t))) : Compute<T>(0);
        if (p.silu) y = silu(y);
        p.out.at(line.b, line.d, t) = from_compute<T>(y);
    }
    for (int j = lane; j < p.width - 1; j += 32) line.write_final_state(j);
}

template <typename T, int CHANNELS>
void launch_forward(Arguments<T>& p, void* stream) {
    for_width(p.width, [&](auto width) {
        if constexpr (constexpr int WIDTH = decltype(width)::value; WIDTH > 0) {
            auto* const kernel = forward<T, WIDTH, CHANNELS>;
            PARROT_LAUNCH(kernel, tile_grid<CHANNELS>(p), kThreads, stream, p);
        } else {
            PARROT_LAUNCH(forward_any_width<T>, row_grid(p), kThreads, stream, p);
        }
    });
}

template <typename T>
const char* forward_launch(const CausalConv1dForward& params) {
    const bool last = channels_last(params.x);
    const int channels = last ? kForwardChannels<T> : 1;
    Arguments<T> p = arguments<T>(params, channels);
    p.out = Plane<T>(params.out, channels), p.final_state = Plane<T>(params.final_state, channels);
    if (p.batch == 0 || p.dim == 0) return nullptr;
    if (last)
        launch_forward<T, kForwardChannels<T>>(p, params.stream);
    else
        launch_forward<T, 1>(p, params.stream);
    return last_launch_error();
}

}  // namespace conv
}  // namespace cuda
}  // namespace parrot
