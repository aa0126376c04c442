// Backward of the selective scan on CUDA for any number of states and any dtype: right rather than fast.
//
// A warp takes the channels of a block one after the other; its lanes are steps where the inputs are prepared and the
// gradients finished, states where the recurrences run.
#pragma once

#include "selective_scan_backward_shared.cuh"

namespace parrot {
namespace cuda {
namespace scan_backward {

constexpr int kGenericChannels = 32;

template <typename Real>
__device__ __forceinline__ Real sum_warp(Real x) {
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

template <typename T>
__global__ void __launch_bounds__(32, 1) run_generic(const Arguments<T> p) {
    using Real = Compute<T>;
    __shared__ Real states[kTile + 1][32], decays[kTile][32], delta[kTile], u[kTile], dy[kTile];
    const int lane = threadIdx.x;
    const Block<kGenericChannels> block(p);
    const int b = block.b, length = length_of(p, b);
    auto matrix_origin = [&](bool C, int d) {
        const int64_t (&stride)[4] = C ? p.C_stride : p.B_stride;
        if (C ? p.C_constant : p.B_constant) return d * stride[3];
        return b * stride[0] + block.group / (C ? p.groups_per_C : p.groups_per_B) * stride[1];
    };
    const int64_t B_by = p.B_constant ? 0 : p.B_stride[3], C_by = p.C_constant ? 0 : p.C_stride[3];
    const int64_t first_row = (static_cast<int64_t>(b) * p.blocks_per_batch + block.index) * p.length;

    for (int c = 0; c < block.channels; ++c) {
        const int d = block.d0 + c;
        const int64_t B_origin = matrix_origin(false, d), C_origin = matrix_origin(true, d);
        Real* const row = p.rows + (static_cast<int64_t>(b) * p.dim + d) * p.columns;
        Real* const adjoint = p.adjoint + (static_cast<int64_t>(b) * p.dim + d) * p.state;
        Real* const dB_constant = row + p.state + 2;
        Real* const dC_constant = dB_constant + (p.B_constant ? p.state : 0);
        for (int n = lane; n < p.state; n += 32) {
            adjoint[n] = p.grad_final_state
                             ? p.grad_final_state[b * p.grad_final_stride[0] + d * p.grad_final_stride[1] +
                                                  n * p.grad_final_stride[2]]
                             : Real(0);
            row[n] = 0;
            if (p.B_constant) dB_constant[n] = 0;
            if (p.C_constant) dC_constant[n] = 0;
        }
        const Real skip = p.D.data ? p.D[d * p.D_stride] : Real(0);
        const Real bias = p.delta_bias.data ? p.delta_bias[d * p.bias_stride] : Real(0);
        Real dD = 0, dbias = 0;
        auto address = [&](auto* data, const int64_t (&stride)[3], int64_t t) {
            return data + b * stride[0] + d * stride[1] + t * stride[2];
        };

        for (int tile = (length - 1 + kTile) / kTile - 1; tile >= 0; --tile) {
            const int s0 = tile * kTile, steps = min(kTile, length - s0);
            const int64_t time = time_of(p, s0 + min(lane, steps - 1), length);
            const Real raw = to_compute(*address(p.delta, p.delta_stride, time)) + bias;
            const Real dt = p.delta_softplus ? softplus(raw) : raw, x = to_compute(*address(p.u, p.u_stride, time));
            const Real gate = p.z ? to_compute(*address(p.z, p.z_stride, time)) : Real(0);
            const Real dout = p.grad_out ? to_compute(*address(p.grad_out, p.grad_out_stride, time)) : Real(0);
            const Real slope = p.z ? dout * silu(gate) : dout;
            const int s_own = s0 + lane;
            const bool reset = p.seq_idx.data && lane < steps && s_own > 0 && starts_sequence(p, b, s_own, length);
            const unsigned resets = __ballot_sync(0xffffffffu, reset);
            __syncwarp();
            delta[lane] = dt, u[lane] = x, dy[lane] = slope;
            __syncwarp();

            Real y = skip * x, dinput = 0, ddt = 0;  // of this lane's step
            for (int n0 = 0; n0 < p.state; n0 += 32) {
                const int n = n0 + lane;
                const bool valid = n < p.state;
                const Real A = valid ? p.A[d * p.A_stride[0] + n * p.A_stride[1]] : Real(0);
                Real h = valid ? checkpoint(p, b, tile, d)[n] : Real(0);
                auto entry = [&](bool C, int s) {
                    const int64_t by = C ? C_by : B_by;
                    const int64_t at = (C ? C_origin : B_origin) + n * (C ? p.C_stride[2] : p.B_stride[2]) +
                                       time_of(p, s0 + s, length) * by;
                    return !valid ? Real(0) : C ? p.C[at] : p.B[at];
                };
                for (int s = 0; s < steps; ++s) {
                    const bool starts = resets >> s & 1u;
                    decays[s][lane] = starts ? Real(0) : exp2_fast(delta[s] * A * static_cast<Real>(kLog2e));
                    states[s][lane] = h;
                    h = fma(decays[s][lane], starts ? Real(0) : h, delta[s] * u[s] * entry(false, s));
                }
                Real g_before = valid ? adjoint[n] : Real(0), dA = 0, dB_sum = 0, dC_sum = 0;
                for (int s = steps - 1; s >= 0; --s) {
                    const Real B = entry(false, s), C = entry(true, s), input = delta[s] * u[s];
                    const Real g = fma(dy[s], C, g_before), last = resets >> s & 1u ? Real(0) : states[s][lane];
                    const Real e = decays[s][lane] * g * last;
                    const Real y_step = sum_warp(h * C), dinput_step = sum_warp(g * B), ddt_step = sum_warp(e * A);
                    if (lane == s) y += y_step, dinput += dinput_step, ddt += ddt_step;
                    g_before = decays[s][lane] * g;
                    dA = fma(e, delta[s], dA);
                    for (int C = 0; C < 2 && valid; ++C) {
                        const Real product = C ? h * dy[s] : g * input;
                        if (C ? p.C_constant : p.B_constant) {
                            (C ? dC_sum : dB_sum) += product;
                        } else {
                            Real& total = p.steps[C][(first_row + s0 + s) * p.state + n];
                            total = c == 0 ? product : total + product;
                        }
                    }
                    h = states[s][lane];
                }
                if (!valid) continue;
                adjoint[n] = g_before, row[n] += dA;
                if (p.B_constant) dB_constant[n] += dB_sum;
                if (p.C_constant) dC_constant[n] += dC_sum;
            }

            if (lane >= steps) continue;
            Real gradient = fma(dinput, x, ddt);
            if (p.delta_softplus && raw <= Real(20)) gradient *= sigmoid(raw);
            dbias += gradient, dD = fma(slope, x, dD);
            *address(p.ddelta, p.ddelta_stride, time) = from_compute<T>(gradient);
            *address(p.du, p.du_stride, time) = from_compute<T>(fma(dinput, dt, skip * slope));
            if (p.z) *address(p.dz, p.dz_stride, time) = from_compute<T>(dout * y * silu_derivative(gate));
        }

        dD = sum_warp(dD), dbias = sum_warp(dbias);
        if (lane == 0) row[p.state] = dD, row[p.state + 1] = dbias;
        for (int n = lane; n < p.state && p.dinitial_state; n += 32)
            p.dinitial_state[b * p.dinitial_stride[0] + d * p.dinitial_stride[1] + n * p.dinitial_stride[2]] =
                adjoint[n];
        for (int t = length + lane; t < p.length; t += 32) {
            *address(p.ddelta, p.ddelta_stride, t) = *address(p.du, p.du_stride, t) = from_compute<T>(Real(0));
            if (p.z) *address(p.dz, p.dz_stride, t) = from_compute<T>(Real(0));
        }
    }
}

}  // namespace scan_backward
}  // namespace cuda
}  // namespace parrot
