"""The adjoint of the resident Sinkhorn iteration, from the stored potentials.

Notation and equations as in sinkhorn_hadamard_backward.py.

*No exponentials of the tile.* Kept are offsets alpha, beta and K_ij = 2^(alpha_i + beta_j - c_ij). With
h = 2^(F - alpha), w = 2^(G - beta), t = K^T h and s = K w,

    W_ij = damp_y K_ij h_i / t_j    V_ij = damp_x K_ij w_j / s_i,

multiplications only. The weights are normalised by sums over the very K in use, so that rounding neither makes nor
loses mass. Entries of K below 2^-126 are lost; with h and w at most 2^58 that is less than rounding in sums within
[2^-29, 2^29]. Where they leave this range (at the start they are zero) the offsets are set anew, so that every row of
K w and every column of K^T h has a largest term of one. Where K then has an entry above 2^58, which takes weights
near zero on both sides, the two half-steps of this iteration take an offset, and a K, each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sinkhorn_resident import (
    LN2,
    kernel_tile,
    load_vector,
    max_tile,
    offsets,
    scalings,
    spread,
    sum_tile,
    sums_of,
    too_large,
    untrusted,
)


@triton.jit
def unroll(
    c,
    dc,
    dF,
    dG,
    extra_i,
    extra_j,
    f_history,
    g_history,
    steps,
    i,
    j,
    valid_i,
    valid_j,
    m,
    N,
    M,
    unit,
    damp_x,
    damp_y,
    nothing,
):
    """All iterations, from the last to the first: dc, and the gradients of log a, log b and of each damping.

    ``extra_i`` and ``extra_j`` are what reaches F and G of the last iteration, but not log a and log b.
    """
    dlog_a = tl.zeros_like(dF)
    dlog_b = tl.zeros_like(dG)
    ddamp_x = tl.sum(dlog_a, 0)  # each thread's part
    ddamp_y = tl.sum(dlog_b, 0)
    alpha = tl.zeros_like(dF)
    beta = tl.zeros_like(dG)
    K = tl.zeros_like(c)  # not to be trusted
    while steps > 0:
        steps -= 1
        F_now = f_history + steps.to(tl.int64) * N
        G_before = g_history + (steps.to(tl.int64) - 1) * M
        known_j = j < tl.where(steps > 0, m, 0)  # G is zero before the first iteration

        h = scalings(load_vector(F_now, i, valid_i) / unit, alpha, valid_i)
        t = sums_of(K, h, valid_j, False)
        if (untrusted(t, False) > 0) | (too_large(h, True) > 0):
            F = load_vector(F_now, i, valid_i) / unit
            alpha = offsets(c, load_vector(G_before, j, known_j) / unit, valid_i, True)
            beta = offsets(c, F, valid_j, False)
            K = kernel_tile(c, beta, alpha, False)
            if (too_large(max_tile(K, True), True) > 0) | (too_large(scalings(F, alpha, valid_i), True) > 0):
                alpha = F + nothing
                K = kernel_tile(c, beta, alpha, False)
            h = scalings(F, alpha, valid_i)
            t = sums_of(K, h, valid_j, False)
        dlog_b += dG
        dG += extra_j
        ddamp_y -= tl.sum(dG * tl.where(valid_j, tl.log2(t) - beta, 0.0), 0)
        part = K * spread(dG * damp_y / t, False)
        dc += part * spread(h, True)
        dF -= h * sum_tile(part, True)

        w = scalings(load_vector(G_before, j, known_j) / unit, beta, valid_j)
        s = sums_of(K, w, valid_i, True)
        if (untrusted(s, True) > 0) | (too_large(w, False) > 0):
            beta = load_vector(G_before, j, known_j) / unit
            alpha = offsets(c, beta, valid_i, True)
            beta += nothing
            K = kernel_tile(c, alpha, beta, True)
            w = tl.where(valid_j, 1.0, 0.0)
            s = sums_of(K, w, valid_i, True)
        dlog_a += dF
        dF += extra_i
        ddamp_x -= tl.sum(dF * tl.where(valid_i, tl.log2(s) - alpha, 0.0), 0)
        part = K * spread(dF * damp_x / s, True)
        dc += part * spread(w, False)
        dG = -w * sum_tile(part, False)
        dF = tl.zeros_like(dF)
        extra_i = tl.zeros_like(dF)
        extra_j = tl.zeros_like(dG)
    ddamp_x = tl.sum(tl.sum(ddamp_x, 0), 0) * LN2
    ddamp_y = tl.sum(tl.sum(ddamp_y, 0), 0) * LN2
    return dc, dlog_a, dlog_b, ddamp_x, ddamp_y
