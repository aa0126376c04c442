"""Streaming Sinkhorn-Hadamard, backward: the adjoint of the iterations that were run, tile by tile.

In units of eps, with c = C / eps, F = f / eps and G = g / eps, an iteration backwards is (`reference` derives it)

    dlog b_j += dG_j,   dc_ij += W_ij dG_j,   dF_i -= sum_j W_ij dG_j,   W_ij = damp_y softmax_i(F_i - c_ij),
    dlog a_i += dF_i,   dc_ij += V_ij dF_i,   dG_j  = -sum_i V_ij dF_i,  V_ij = damp_x softmax_j(G_j - c_ij),

with the F of this iteration and the G of the one before. Three parts:

1. *The gradients of F and G* through the final plan. With gy = grad_y_to_x + x grad_x_hadamard and likewise gx, those
   of log P have the row sums <gy_i, y_to_x_i> + <x_i, sum_j P_ij / b_j gx_j>, vectors that dx takes anyway.
2. *The sweep* back through the iterations moves vectors only. From the stored potentials softmax weights are known up
   to rounding, W_ij = damp_y 2^(F_i - c_ij + sigma_j) with sigma = (G - log b) / damp_y, but their sums must be one
   to the last digit, or mass is made or lost. So a pass over the tiles takes the sums together with the products:
   by rows sum_j W_ij dG_j and the sums of V, by columns sum_i V_ij dF_i and the sums of the W of the iteration
   before. What is left of each iteration are p = damp_y dG / sum and q = damp_x dF / sum, n_iters (N + M) numbers.
3. *The gradient of the cost*, sum_k 2^(F - c + sigma) p + 2^(rho - c + G) q less the gradient of log P, is made tile by
   tile for all iterations at once, by rows for dx and by columns for dy, and goes through the distance into them.

As in the forward sides are `own` and `other`; a step of the rows is one of the columns with the sides swapped.
Memory: p and q, and a few fp32 copies of the points. Time: 2 n_iters passes with two exponentials an entry each, and
2 n_iters exponentials an entry in part 3, by rows and by columns, for each block of features.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sinkhorn_tiles import (
    COSINE,
    COSTS,
    EUCLIDEAN,
    LN2,
    PRECISION,
    SIZES,
    Side,
    Tiles,
    Workspace,
    add_chunks,
    compiled,
    cost_tile,
    is_near,
    locate,
    over_tiles,
    product_tile,
)
from .specialization import Specialization

TINY = torch.finfo(torch.float32).tiny


@triton.jit
def stored_potential(history, problem, step, n_iters, size, i, valid, unit, padding):
    """The potential after iteration ``step``, 0 before the first, in units of eps ln 2."""
    at = history + (problem * n_iters + tl.maximum(step, 0)) * size + i
    value = tl.load(at, mask=valid, other=0.0) / unit
    return tl.where(valid, tl.where(step < 0, 0.0, value), padding)


@triton.jit
def stored_shift(history, log_weights, problem, step, n_iters, size, i, valid, unit, stretch, padding):
    """Minus the log-sum-exp from which that potential came; ``stretch`` is 1 / damping."""
    value = stored_potential(history, problem, step, n_iters, size, i, valid, unit, 0.0)
    value = (value - tl.load(log_weights + problem * size + i, mask=valid, other=0.0)) * stretch
    return tl.where(valid, value, padding)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_plan_sums(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    factors, eps, own_potential, other_potential,
    grad_plan,  # (B, N, M) or None
    grad_transport_cost,  # (B,) or None
    partial,  # (B, chunks, own_size)
    COST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sum_j P_ij (grad_plan_ij + grad_transport_cost C_ij) over each chunk."""
    problem, start = locate(blocks, OWN)
    own_left = tl.load(own_counts + problem) - start
    others = tl.load(other_counts + problem)
    first = tl.program_id(1) * CHUNK
    if (own_left > 0) & (first < others):
        i = tl.arange(0, OWN)
        j = tl.arange(0, OTHER)
        valid_i = i < own_left
        factor = tl.load(factors + problem)
        own_exponent = tl.load(own_potential + problem * own_size + start + i, mask=valid_i, other=0.0)
        total = tl.zeros((OWN,), tl.float32)
        for step in tl.range(first, tl.minimum(first + CHUNK, others), OTHER, num_stages=1):
            at = problem * 0 + step
            c = factor * cost_tile(
                own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix,
                own_size, other_size, own_stride, other_stride, D, depths,
                problem, start, at, own_left, others - at, COST, OWN, OTHER, DEPTH,
            )  # fmt: skip
            valid_j = j < others - at
            valid = valid_i[:, None] & valid_j[None, :]
            exponent = tl.load(other_potential + problem * other_size + at + j, mask=valid_j, other=float("-inf"))
            gradient = tl.zeros((OWN, OTHER), tl.float32)
            if grad_transport_cost is not None:
                unit = tl.load(eps + problem) * LN2
                gradient += c * (unit * tl.load(grad_transport_cost + problem))
            if grad_plan is not None:
                corner = grad_plan + problem * own_size * other_size + start * own_stride + at * other_stride
                offsets = i[:, None] * own_stride + j[None, :] * other_stride
                gradient += tl.load(corner + offsets, mask=valid, other=0.0)
            weighted = gradient * tl.exp2((own_exponent[:, None] - c) + exponent[None, :])
            total += tl.sum(tl.where(valid, weighted, 0.0), 1)
        tl.store(partial + (problem * chunks + tl.program_id(1)) * own_size + start + i, total, mask=valid_i)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_start_adjoint(
    points,  # (B, size, D)
    gradient,  # (B, size, depths * DEPTH) or None: of what is transported to these points
    transported,  # (B, size, D), with a gradient
    returned,  # (B, size, D) or None: what the gradients of the other side bring
    partial,  # (B, chunks, size) or None, sums from `_sinkhorn_plan_sums`
    grad_potential,  # (B, size) or None
    counts,
    other_counts,
    eps,
    adjoint,  # (B, size), of the potentials in units of eps
    log_gradient,  # (B, size), of the logarithms of the weights
    damping_gradient,  # (B, size)
    size,
    D,
    depths,
    blocks,
    chunks,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    problem, start = locate(blocks, BLOCK)
    i = tl.arange(0, BLOCK)
    valid = i < tl.load(counts + problem) - start
    at = problem * size + start
    own = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(depths):
        d = k * DEPTH + tl.arange(0, DEPTH)
        mask = valid[:, None] & (d < D)[None, :]
        offsets = i[:, None] * D + d[None, :]
        if gradient is not None:
            padded = at * (depths * DEPTH) + (i[:, None] * (depths * DEPTH) + d[None, :])
            left = tl.load(gradient + padded, mask=mask, other=0.0)
            own += tl.sum(left * tl.load(transported + at * D + offsets, mask=mask, other=0.0), 1)
        if returned is not None:
            left = tl.load(points + at * D + offsets, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(left * tl.load(returned + at * D + offsets, mask=mask, other=0.0), 1)
    total += own
    if partial is not None:
        used = tl.cdiv(tl.load(other_counts + problem), CHUNK)
        total += add_chunks(partial + problem * chunks * size + start + i, size, used, valid)
    if grad_potential is not None:
        total += tl.load(grad_potential + at + i, mask=valid, other=0.0) * tl.load(eps + problem)
    inside = i < size - start
    tl.store(adjoint + at + i, tl.where(valid, total, 0.0), mask=inside)
    tl.store(log_gradient + at + i, tl.where(valid, -own, 0.0), mask=inside)
    tl.store(damping_gradient + at + i, tl.zeros_like(own), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_sweep(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    factors, eps, iterations,
    own_history,  # (B, n_iters, own_size)
    other_history,
    own_log_weights,
    other_log_weights,
    weights,  # (B, n_iters, other_size): p or q
    products,  # (B, chunks, own_size): sum_j of the others' softmax weights times theirs
    sums,  # (B, chunks, own_size): of the own softmax weights
    n_iters,
    own_step,  # of the own potentials and of these sums
    step,  # of the others' weights; their potentials are of the iteration before
    own_inverse_rho,
    other_inverse_rho,
    LAST: tl.constexpr,  # each problem's last iteration: only the sums
    COST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    problem, start = locate(blocks, OWN)
    own_left = tl.load(own_counts + problem) - start
    others = tl.load(other_counts + problem)
    first = tl.program_id(1) * CHUNK
    done = tl.load(iterations + problem)
    active = (own_left > 0) & (first < others)
    if LAST:
        own_step = done - 1
        step = done
    else:
        active = active & (step < done)
    if active:
        i = tl.arange(0, OWN)
        j = tl.arange(0, OTHER)
        valid_i = i < own_left
        own_history += start
        own_log_weights += start
        epsilon = tl.load(eps + problem)
        unit = epsilon * LN2
        factor = tl.load(factors + problem)
        stretch = 1.0 + epsilon * own_inverse_rho
        own = stored_potential(own_history, problem, own_step, n_iters, own_size, i, valid_i, unit, 0.0)
        own_shift = stored_shift(
            own_history, own_log_weights, problem, own_step, n_iters, own_size, i, valid_i, unit, stretch, 0.0
        )
        stretch = 1.0 + epsilon * other_inverse_rho
        product = tl.zeros((OWN,), tl.float32)
        total = tl.zeros((OWN,), tl.float32)
        for position in tl.range(first, tl.minimum(first + CHUNK, others), OTHER, num_stages=1):
            at = problem * 0 + position
            c = factor * cost_tile(
                own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix,
                own_size, other_size, own_stride, other_stride, D, depths,
                problem, start, at, own_left, others - at, COST, OWN, OTHER, DEPTH,
            )  # fmt: skip
            valid_j = j < others - at
            other = stored_potential(
                other_history + at, problem, step - 1, n_iters, other_size, j, valid_j, unit, float("-inf")
            )
            total += tl.sum(tl.exp2((own_shift[:, None] - c) + other[None, :]), 1)
            if not LAST:
                shift = stored_shift(
                    other_history + at, other_log_weights + at, problem, step, n_iters, other_size, j, valid_j, unit,
                    stretch, float("-inf"),
                )  # fmt: skip
                weight = tl.load(weights + (problem * n_iters + step) * other_size + at + j, mask=valid_j, other=0.0)
                product += tl.sum(tl.exp2((own[:, None] - c) + shift[None, :]) * weight[None, :], 1)
        at = (problem * chunks + tl.program_id(1)) * own_size + start + i
        tl.store(sums + at, total, mask=valid_i)
        if not LAST:
            tl.store(products + at, product, mask=valid_i)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_sweep_update(
    products,
    sums,
    counts,
    other_counts,
    log_weights,
    eps,
    iterations,
    history,
    adjoint,  # (B, size), enters at the last iteration
    weights,  # (B, n_iters, size): p or q
    log_gradient,
    damping_gradient,
    size,
    blocks,
    chunks,
    n_iters,
    own_step,
    step,
    inverse_rho,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    problem, start = locate(blocks, BLOCK)
    done = tl.load(iterations + problem)
    active = step < done
    if LAST:
        own_step = done - 1
        active = done > 0
    if active:
        i = start + tl.arange(0, BLOCK)
        valid = i < tl.load(counts + problem)
        epsilon = tl.load(eps + problem)
        stretch = 1.0 + epsilon * inverse_rho
        used = tl.cdiv(tl.load(other_counts + problem), CHUNK)
        partial = problem * chunks * size + i
        total = tl.where(valid, add_chunks(sums + partial, size, used, valid), 1.0)
        gradient = tl.zeros((BLOCK,), tl.float32)
        if not LAST:
            gradient -= add_chunks(products + partial, size, used, valid)
        if own_step == done - 1:
            gradient += tl.load(adjoint + problem * size + i, mask=valid, other=0.0)
        at = problem * size + i
        tl.store(weights + (problem * n_iters + own_step) * size + i, gradient / (stretch * total), mask=valid)
        tl.store(log_gradient + at, tl.load(log_gradient + at, mask=valid, other=0.0) + gradient, mask=valid)
        shift = stored_shift(
            history, log_weights, problem, own_step, n_iters, size, i, valid, epsilon * LN2, stretch, 0.0
        )
        lse = (tl.log2(total) - shift) * LN2
        tl.store(damping_gradient + at, tl.load(damping_gradient + at, mask=valid, other=0.0) - gradient * lse, valid)


@triton.jit
def cost_gradient_tile(
    c,  # in units of eps ln 2
    own_potential, other_potential, own_shift, other_shift,
    own_gradient, other_gradient,  # (B, size, depths * DEPTH) or None
    own_wide, other_wide,  # (B, size, depths * DEPTH): the points in fp32
    grad_plan, grad_transport_cost, eps, iterations, own_history, other_history, own_log_weights, other_log_weights,
    own_weights, other_weights,  # (B, n_iters, size)
    own_inverse_rho, other_inverse_rho, own_lag, other_lag,
    own_size, other_size, own_stride, other_stride, depths, n_iters, problem, start, at, own_left, other_left,
    DETACHED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradients of C by <P, C> with P held fixed, and of c by everything else; unspecified in the padding.

    The potentials in the exponents of an iteration's weights lag by one iteration on the side of y.
    """
    i = tl.arange(0, OWN)
    j = tl.arange(0, OTHER)
    valid_i = i < own_left
    valid_j = j < other_left
    own_at = problem * own_size + start
    other_at = problem * other_size + at
    own = tl.load(own_potential + own_at + i, mask=valid_i, other=0.0)
    other = tl.load(other_potential + other_at + j, mask=valid_j, other=0.0)
    probability = tl.exp2((own[:, None] - c) + other[None, :])
    epsilon = tl.load(eps + problem)
    unit = epsilon * LN2
    direct = tl.zeros((OWN, OTHER), tl.float32)
    through = tl.zeros((OWN, OTHER), tl.float32)
    if grad_transport_cost is not None:
        grad_cost = tl.load(grad_transport_cost + problem)
        direct = grad_cost * probability
        if not DETACHED:
            through -= direct * c * unit
    if not DETACHED:
        own_first = own_at * (depths * DEPTH)
        other_first = other_at * (depths * DEPTH)
        if grad_plan is not None:
            corner = grad_plan + problem * own_size * other_size + start * own_stride + at * other_stride
            offsets = i[:, None] * own_stride + j[None, :] * other_stride
            mask = valid_i[:, None] & valid_j[None, :]
            through -= tl.load(corner + offsets, mask=mask, other=0.0) * probability
        if own_gradient is not None:
            products = product_tile(
                own_gradient + own_first, other_wide + other_first, own_left, other_left, depths, OWN, OTHER, DEPTH
            )
            shift = tl.load(own_shift + own_at + i, mask=valid_i, other=0.0)
            through -= products * tl.exp2((shift[:, None] - c) + other[None, :])
        if other_gradient is not None:
            products = product_tile(
                own_wide + own_first, other_gradient + other_first, own_left, other_left, depths, OWN, OTHER, DEPTH
            )
            shift = tl.load(other_shift + other_at + j, mask=valid_j, other=0.0)
            through -= products * tl.exp2((own[:, None] - c) + shift[None, :])
        own_history += start
        other_history += at
        own_log_weights += start
        other_log_weights += at
        own_weights += start
        other_weights += at
        own_stretch = 1.0 + epsilon * own_inverse_rho
        other_stretch = 1.0 + epsilon * other_inverse_rho
        for k in tl.range(0, tl.load(iterations + problem), num_stages=1):
            own = stored_potential(own_history, problem, k - own_lag, n_iters, own_size, i, valid_i, unit, 0.0)
            other = stored_potential(other_history, problem, k - other_lag, n_iters, other_size, j, valid_j, unit, 0.0)
            own_k = stored_shift(
                own_history, own_log_weights, problem, k, n_iters, own_size, i, valid_i, unit, own_stretch, 0.0
            )
            other_k = stored_shift(
                other_history, other_log_weights, problem, k, n_iters, other_size, j, valid_j, unit, other_stretch, 0.0
            )
            own_weight = tl.load(own_weights + (problem * n_iters + k) * own_size + i, mask=valid_i, other=0.0)
            other_weight = tl.load(other_weights + (problem * n_iters + k) * other_size + j, mask=valid_j, other=0.0)
            through += tl.exp2((own[:, None] - c) + other_k[None, :]) * other_weight[None, :]
            through += tl.exp2((own_k[:, None] - c) + other[None, :]) * own_weight[:, None]
    return direct, through


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_cost_gradient(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    own_potential, other_potential, own_shift, other_shift, own_gradient, other_gradient, own_wide, other_wide,
    grad_plan, grad_transport_cost, eps, iterations, own_history, other_history, own_log_weights, other_log_weights,
    own_weights, other_weights, own_inverse_rho, other_inverse_rho, own_lag, other_lag, n_iters,
    factors,
    scale,
    dcost_matrix,  # (B, own_size, other_size) or None
    partial,  # (B, chunks, own_size) or None: sum_j C_ij dC_ij but for <P, C>, for the gradient of eps
    DETACHED: tl.constexpr,
    COST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    problem, start = locate(blocks, OWN)
    own_left = tl.load(own_counts + problem) - start
    others = tl.load(other_counts + problem)
    first = tl.program_id(1) * CHUNK
    stop = others
    if dcost_matrix is not None:  # its padding is written as well
        stop = other_size
    i = tl.arange(0, OWN)
    j = tl.arange(0, OTHER)
    factor = tl.load(factors + problem)
    epsilon = tl.load(eps + problem)
    total = tl.zeros((OWN,), tl.float32)
    for position in tl.range(first, tl.minimum(first + CHUNK, stop), OTHER, num_stages=1):
        at = problem * 0 + position
        c = factor * cost_tile(
            own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix,
            own_size, other_size, own_stride, other_stride, D, depths,
            problem, start, at, own_left, others - at, COST, OWN, OTHER, DEPTH,
        )  # fmt: skip
        direct, through = cost_gradient_tile(
            c, own_potential, other_potential, own_shift, other_shift, own_gradient, other_gradient, own_wide,
            other_wide, grad_plan, grad_transport_cost, eps, iterations, own_history, other_history, own_log_weights,
            other_log_weights, own_weights, other_weights, own_inverse_rho, other_inverse_rho, own_lag, other_lag,
            own_size, other_size, own_stride, other_stride, depths, n_iters, problem, start, at, own_left, others - at,
            DETACHED, OWN, OTHER, DEPTH,
        )  # fmt: skip
        valid = (i < own_left)[:, None] & (j < others - at)[None, :]
        total += tl.sum(tl.where(valid, through * c, 0.0), 1)
        if dcost_matrix is not None:
            gradient = (direct + through / epsilon) / tl.load(scale + problem)
            target = dcost_matrix + (problem * own_size + start) * other_size + at
            offsets = i[:, None] * other_size + j[None, :]
            mask = (i < own_size - start)[:, None] & (j < other_size - at)[None, :]
            tl.store(target + offsets, tl.where(valid, gradient, 0.0), mask=mask)
    if partial is not None:
        partial += (problem * chunks + tl.program_id(1)) * own_size + start
        tl.store(partial + i, total * LN2, mask=i < own_left)


@triton.jit
def near_differences(own, other, weights, valid_i, valid_j, D, first, OWN: tl.constexpr, FEATURES: tl.constexpr):
    """(OWN, FEATURES) sum_j weights_ij (own_i - other_j), one feature at a time."""
    i = tl.arange(0, weights.shape[0])
    j = tl.arange(0, weights.shape[1])
    d = tl.arange(0, FEATURES)
    total = tl.zeros((OWN, FEATURES), tl.float32)
    for k in tl.range(0, tl.minimum(FEATURES, D - first), num_stages=1):
        from_own = tl.load(own + (i * D + first + k), mask=valid_i, other=0.0).to(tl.float32)
        from_other = tl.load(other + (j * D + first + k), mask=valid_j, other=0.0).to(tl.float32)
        moved = tl.sum(weights * (from_own[:, None] - from_other[None, :]), 1)
        total += tl.where((d == k)[None, :], moved[:, None], 0.0)
    return total


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_points_gradient(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    own_potential, other_potential, own_shift, other_shift, own_gradient, other_gradient, own_wide, other_wide,
    grad_plan, grad_transport_cost, eps, iterations, own_history, other_history, own_log_weights, other_log_weights,
    own_weights, other_weights, own_inverse_rho, other_inverse_rho, own_lag, other_lag, n_iters,
    factors,
    scale,
    through_cost,  # (B, own_size, D); for cosines, of the points of length one
    DETACHED: tl.constexpr,
    COST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The gradient of the own points through the cost."""
    problem, start = locate(blocks, OWN)
    own_left = tl.load(own_counts + problem) - start
    others = tl.where(own_left > 0, tl.load(other_counts + problem), 0)
    i = tl.arange(0, OWN)
    j = tl.arange(0, OTHER)
    valid_i = i < own_left
    feature = tl.program_id(1) * FEATURES
    d = feature + tl.arange(0, FEATURES)
    width = depths * DEPTH
    factor = tl.load(factors + problem)
    epsilon = tl.load(eps + problem)
    own_first = problem * own_size + start
    total = tl.zeros((OWN, FEATURES), tl.float32)
    sums = tl.zeros((OWN,), tl.float32)
    for position in tl.range(0, others, OTHER, num_stages=1):
        at = problem * 0 + position
        cost = cost_tile(
            own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix,
            own_size, other_size, own_stride, other_stride, D, depths,
            problem, start, at, own_left, others - at, COST, OWN, OTHER, DEPTH,
        )  # fmt: skip
        direct, through = cost_gradient_tile(
            cost * factor, own_potential, other_potential, own_shift, other_shift, own_gradient, other_gradient,
            own_wide, other_wide, grad_plan, grad_transport_cost, eps, iterations, own_history, other_history,
            own_log_weights, other_log_weights, own_weights, other_weights, own_inverse_rho, other_inverse_rho,
            own_lag, other_lag, own_size, other_size, own_stride, other_stride, depths, n_iters, problem, start, at,
            own_left, others - at, DETACHED, OWN, OTHER, DEPTH,
        )  # fmt: skip
        valid_j = j < others - at
        gradient = (direct + through / epsilon) / tl.load(scale + problem)
        gradient = tl.where(valid_i[:, None] & valid_j[None, :], gradient, 0.0)
        other_first = problem * other_size + at
        if COST == COSINE:
            gradient = -gradient
        else:
            squares = cost
            if COST == EUCLIDEAN:
                gradient = tl.where(cost == 0.0, 0.0, gradient / cost)
                squares = cost * cost
            else:
                gradient = gradient * 2.0
            own_norm = tl.load(own_norms + own_first + i, mask=valid_i, other=0.0)
            other_norm = tl.load(other_norms + other_first + j, mask=valid_j, other=0.0)
            near = is_near(squares, own_norm, other_norm)
            apart = tl.where(near, gradient, 0.0)
            if tl.max(tl.max(tl.abs(apart), 1), 0) > 0.0:
                total -= near_differences(
                    own_points + own_first * D, other_points + other_first * D, apart, valid_i, valid_j, D, feature,
                    OWN, FEATURES,
                )  # fmt: skip
                gradient = tl.where(near, 0.0, gradient)
            sums += tl.sum(gradient, 1)
        mask = valid_j[:, None] & (d < width)[None, :]
        row = tl.load(other_rows + other_first * width + (j[:, None] * width + d[None, :]), mask=mask, other=0.0)
        total = tl.dot(gradient, row, total, input_precision=PRECISION)
    mask = valid_i[:, None] & (d < D)[None, :]
    if COST != COSINE:
        row = tl.load(own_rows + own_first * width + (i[:, None] * width + d[None, :]), mask=mask, other=0.0)
        total = sums[:, None] * row - total
    tl.store(through_cost + own_first * D + (i[:, None] * D + d[None, :]), total, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_finish_points(
    rows,  # (B, size, depths * DEPTH)
    norms,
    counts,
    transported,  # (B, size, D) or None, with grad_hadamard
    grad_hadamard,  # (B, size, D) or None
    returned,  # (B, size, D) or None
    through_cost,  # (B, size, D) or None
    gradient,  # (B, size, D), written
    size,
    D,
    depths,
    blocks,
    COST: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The sum of the gradients of the points; zero in the padding."""
    problem, start = locate(blocks, BLOCK)
    i = tl.arange(0, BLOCK)
    valid = i < tl.load(counts + problem) - start
    at = problem * size + start
    norm = tl.full((BLOCK,), 1.0, tl.float32)
    inner = tl.zeros((BLOCK,), tl.float32)
    width = depths * DEPTH
    if COST == COSINE and through_cost is not None:
        norm = tl.load(norms + at + i, mask=valid, other=0.0)
        for k in range(depths):
            d = k * DEPTH + tl.arange(0, DEPTH)
            mask = valid[:, None] & (d < D)[None, :]
            row = tl.load(rows + at * width + (i[:, None] * width + d[None, :]), mask=mask, other=0.0)
            inner += tl.sum(
                row * tl.load(through_cost + at * D + (i[:, None] * D + d[None, :]), mask=mask, other=0.0), 1
            )
    for k in range(depths):
        d = k * DEPTH + tl.arange(0, DEPTH)
        mask = valid[:, None] & (d < D)[None, :]
        offsets = at * D + (i[:, None] * D + d[None, :])
        total = tl.zeros((BLOCK, DEPTH), tl.float32)
        if through_cost is not None:
            total += tl.load(through_cost + offsets, mask=mask, other=0.0)
            if COST == COSINE:
                row = tl.load(rows + at * width + (i[:, None] * width + d[None, :]), mask=mask, other=0.0)
                total = tl.where(norm[:, None] == 0.0, 0.0, (total - inner[:, None] * row) / norm[:, None])
        if returned is not None:
            total += tl.load(returned + offsets, mask=mask, other=0.0)
        if grad_hadamard is not None:
            outer = tl.load(grad_hadamard + offsets, mask=mask, other=0.0).to(tl.float32)
            total += outer * tl.load(transported + offsets, mask=mask, other=0.0)
        inside = (i < size - start)[:, None] & (d < D)[None, :]
        tl.store(gradient + offsets, tl.where(mask, total, 0.0), mask=inside)


@triton.jit
def eps_terms(
    potential, grad_potential, damping_gradient, problem, count, size, epsilon, inverse_rho, BLOCK: tl.constexpr
):
    """What comes through the units of the potentials and through the damping of one side."""
    damping = 1.0 / (1.0 + epsilon * inverse_rho)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = problem * size + i
        if grad_potential is not None:
            outer = tl.load(grad_potential + at, mask=i < count, other=0.0)
            total += outer * tl.load(potential + at, mask=i < count, other=0.0) * LN2
        changed = tl.load(damping_gradient + at, mask=i < count, other=0.0)
        total -= changed * (damping * damping * inverse_rho)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_eps_gradient(
    partial,  # (B, chunks, N): sum_j C_ij dC_ij
    x_counts,
    y_counts,
    eps,
    f,
    g,
    grad_f,
    grad_g,
    x_damping_gradient,
    y_damping_gradient,
    deps,
    N,
    M,
    chunks,
    x_inverse_rho,
    y_inverse_rho,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    n = tl.load(x_counts + problem)
    m = tl.load(y_counts + problem)
    epsilon = tl.load(eps + problem)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += add_chunks(partial + problem * chunks * N + i, N, tl.cdiv(m, CHUNK), i < n)
    result = -tl.sum(total, 0) / epsilon
    result += eps_terms(f, grad_f, x_damping_gradient, problem, n, N, epsilon, x_inverse_rho, BLOCK)
    result += eps_terms(g, grad_g, y_damping_gradient, problem, m, M, epsilon, y_inverse_rho, BLOCK)
    tl.store(deps + problem, result)


@dataclass
class Adjoint:
    """What the backward keeps of one side, `side` being what the forward knows of it."""

    side: Side
    lag: int  # in iterations, of the potentials in the exponents of an iteration's weights
    history: Tensor | None  # (B, n_iters, size)
    gradient: Tensor | None  # (B, size, padded features), of what is transported to these points
    hadamard: Tensor | None  # (B, size, D), of its product with them
    of_potential: Tensor | None  # (B, size)
    wide: Tensor  # (B, size, padded features): the points in fp32
    weights: Tensor  # (B, n_iters, size): q or p
    adjoint: Tensor  # (B, size), as the following two
    log_gradient: Tensor
    damping_gradient: Tensor
    transported: Tensor | None = None  # (B, size, D)
    returned: Tensor | None = None  # (B, size, D): what the gradients of the other side bring

    @classmethod
    def of(cls, w: Workspace, side: Side, lag: int, history, direct, hadamard, of_potential) -> Adjoint:
        def padded(t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, (0, w.depths * w.tiles.depth - w.D)).contiguous()

        terms = [] if direct is None else [direct.float()]
        terms += [] if hadamard is None else [hadamard.float() * side.points.float()]
        vectors = w.eps.new_empty(3, *side.potential.shape)
        weights = w.eps if history is None else torch.empty_like(history)
        history, hadamard, of_potential = (
            t if t is None else t.contiguous() for t in (history, hadamard, of_potential)
        )
        gradient = padded(sum(terms[1:], terms[0])) if terms else None
        wide = padded(side.points.float())
        return cls(side, lag, history, gradient, hadamard, of_potential, wide, weights, *vectors)


class _Backward:
    """The launches of the backward of a batch."""

    def __init__(
        self, w: Workspace, x: Adjoint, y: Adjoint, scale: Tensor, iterations: Tensor, detached: bool,
        grad_plan: Tensor | None, grad_transport_cost: Tensor | None,
    ) -> None:  # fmt: skip
        self.w, self.x, self.y, self.scale, self.iterations = w, x, y, scale, iterations
        self.detached, self.grad_plan, self.grad_transport_cost = detached, grad_plan, grad_transport_cost

    def project(self) -> None:
        """What moves with the final plan: the features, and the gradients back."""
        w = self.w
        for own, other in ((self.x, self.y), (self.y, self.x)):
            a, b = own.side, other.side
            if own.hadamard is not None or (own.gradient is not None and not self.detached):
                own.transported = torch.empty_like(a.points, dtype=torch.float32)
                w.project(a, b, a.shift, b.potential, b.points, own.transported)
            if other.gradient is not None:
                own.returned = torch.empty_like(a.points, dtype=torch.float32)
                w.project(a, b, a.potential, b.shift, other.gradient, own.returned)

    def start(self) -> None:
        """The gradients of the potentials through the final plan."""
        w, tiles = self.w, self.w.tiles
        through_plan = self.grad_plan is not None or self.grad_transport_cost is not None
        for own, other in ((self.x, self.y), (self.y, self.x)):
            a, b = own.side, other.side
            if through_plan:
                kernel, blocks = w.by_blocks(_sinkhorn_plan_sums, a, tiles.own, a.chunks)
                kernel(
                    *w.geometry(a, b, blocks), w.factors, w.eps, a.potential, b.potential, self.grad_plan,
                    self.grad_transport_cost, a.partial, **w.tile(_sinkhorn_plan_sums),
                )  # fmt: skip
            kernel, blocks = w.by_blocks(_sinkhorn_start_adjoint, a, tiles.own)
            kernel(
                a.points, own.gradient, own.transported, own.returned, a.partial if through_plan else None,
                own.of_potential, a.counts, b.counts, w.eps, own.adjoint, own.log_gradient, own.damping_gradient,
                a.size, w.D, w.depths, blocks, a.chunks,
                BLOCK=tiles.own, DEPTH=tiles.depth, CHUNK=tiles.chunk, **w.options,
            )  # fmt: skip

    def sweep(self) -> None:
        """Back through the iterations, each problem from its own last one."""
        n_iters = self.x.history.shape[1]
        sums = {id(t): torch.empty_like(t.side.partial) for t in (self.x, self.y)}

        def half_step(own: Adjoint, other: Adjoint, own_step: int, step: int, last: bool = False) -> None:
            w, tiles, a, b = self.w, self.w.tiles, own.side, other.side
            constants = {"CHUNK": tiles.chunk, "LAST": last, **w.options}
            kernel, blocks = w.by_blocks(_sinkhorn_sweep, a, tiles.own, a.chunks)
            kernel(
                *w.geometry(a, b, blocks), w.factors, w.eps, self.iterations, own.history, other.history,
                a.log_weights, b.log_weights, other.weights, a.partial, sums[id(own)], n_iters, own_step, step,
                a.inverse_rho, b.inverse_rho, LAST=last, **w.tile(_sinkhorn_sweep),
            )  # fmt: skip
            kernel, blocks = w.by_blocks(_sinkhorn_sweep_update, a, tiles.vector)
            kernel(
                a.partial, sums[id(own)], a.counts, b.counts, a.log_weights, w.eps, self.iterations, own.history,
                own.adjoint, own.weights, own.log_gradient, own.damping_gradient, a.size, blocks, a.chunks, n_iters,
                own_step, step, a.inverse_rho, BLOCK=tiles.vector, **constants,
            )  # fmt: skip

        half_step(self.y, self.x, 0, 0, last=True)
        for step in reversed(range(n_iters)):
            half_step(self.x, self.y, step, step)
            if step > 0:
                half_step(self.y, self.x, step - 1, step)

    def cost_arguments(self, own: Adjoint, other: Adjoint, blocks: int) -> tuple[Any, ...]:
        """The first arguments of the kernels that make the gradient of the cost."""
        a, b = own.side, other.side
        n_iters = 0 if own.history is None else own.history.shape[1]
        return (
            *self.w.geometry(a, b, blocks),
            *(a.potential, b.potential, a.shift, b.shift, own.gradient, other.gradient, own.wide, other.wide),
            *(self.grad_plan, self.grad_transport_cost, self.w.eps, self.iterations, own.history, other.history),
            *(a.log_weights, b.log_weights, own.weights, other.weights, a.inverse_rho, b.inverse_rho),
            *(own.lag, other.lag, n_iters, self.w.factors, self.scale),
        )

    def cost_gradient(self, dcost_matrix: Tensor | None, for_eps: bool) -> None:
        w, a = self.w, self.x.side
        kernel, blocks = w.by_blocks(_sinkhorn_cost_gradient, a, w.tiles.own, a.chunks)
        kernel(
            *self.cost_arguments(self.x, self.y, blocks), dcost_matrix, a.partial if for_eps else None,
            DETACHED=self.detached, **w.tile(_sinkhorn_cost_gradient),
        )  # fmt: skip

    def points(self, own: Adjoint, other: Adjoint, through_cost: bool, gradient: Tensor) -> None:
        w, tiles, a = self.w, self.w.tiles, own.side
        through = torch.empty_like(a.points, dtype=torch.float32) if through_cost else None
        if through_cost:
            kernel, blocks = w.by_blocks(_sinkhorn_points_gradient, a, tiles.own, triton.cdiv(w.D, tiles.features))
            kernel(
                *self.cost_arguments(own, other, blocks), through, DETACHED=self.detached,
                **w.tile(_sinkhorn_points_gradient),
            )  # fmt: skip
        kernel, blocks = w.by_blocks(_sinkhorn_finish_points, a, tiles.own)
        kernel(
            a.rows, a.norms, a.counts, own.transported, own.hadamard, own.returned, through, gradient,
            a.size, w.D, w.depths, blocks, COST=w.cost, BLOCK=tiles.own, DEPTH=tiles.depth, **w.options,
        )  # fmt: skip

    def eps(self, deps: Tensor) -> None:
        w, x, y = self.w, self.x, self.y
        _sinkhorn_eps_gradient[(len(w.eps),)](
            x.side.partial, x.side.counts, y.side.counts, w.eps, x.side.potential, y.side.potential, x.of_potential,
            y.of_potential, x.damping_gradient, y.damping_gradient, deps, x.side.size, y.side.size, x.side.chunks,
            x.side.inverse_rho, y.side.inverse_rho, BLOCK=w.tiles.vector, CHUNK=w.tiles.chunk, **w.options,
        )  # fmt: skip


def weight_gradient(of: Adjoint, weights: Tensor, target: Tensor) -> None:
    """From the logarithm to the weight: zero below the floor and in the padding."""
    valid = torch.arange(of.side.size, device=weights.device) < of.side.counts[:, None]
    target.copy_(torch.where(valid & (weights >= TINY), of.log_gradient / weights, 0.0))


def backward(
    *,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    cost_matrix: Tensor | None,
    eps: Tensor,
    cost: str,
    rho_x: float | None,
    rho_y: float | None,
    gradient: str,
    f: Tensor,
    g: Tensor,
    scale: Tensor,
    iterations: Tensor,
    f_history: Tensor | None,
    g_history: Tensor | None,
    grad_x_to_y: Tensor | None,
    grad_y_to_x: Tensor | None,
    grad_x_hadamard: Tensor | None,
    grad_y_hadamard: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    grad_plan: Tensor | None,
    grad_transport_cost: Tensor | None,
    dx: Tensor | None,
    dy: Tensor | None,
    dcost_matrix: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    deps: Tensor | None,
    tiles: Tiles | None = None,
) -> None:
    """Launch the streaming backward; arguments as in ``reference/sinkhorn_hadamard.py``, and the sizes of the tiles.

    For the gradients "unrolled" and "detached". Nothing synchronises.
    """
    detached = gradient == "detached"
    if not detached and gradient != "unrolled":
        raise ValueError(f"sinkhorn_hadamard: the triton backward is of 'unrolled' and 'detached'; got {gradient!r}.")
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        w = Workspace(x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, cost, rho_x, rho_y, tiles or Tiles())
        unit = w.eps * math.log(2.0)
        w.factors = 1.0 / (scale * unit)
        torch.div(f, unit[:, None], out=w.x.potential)
        torch.sub(w.x.potential, w.x.log_weights, out=w.x.shift)
        w.reduce(w.y, w.x, w.y.counts, w.factors)  # g once more from f: their rounding then cancels in P / b
        w.update(w.y, w.x, w.y.counts)
        if detached:
            f_history = g_history = grad_f = grad_g = grad_plan = None
        rows = Adjoint.of(w, w.x, 0, f_history, grad_y_to_x, grad_x_hadamard, grad_f)
        columns = Adjoint.of(w, w.y, 1, g_history, grad_x_to_y, grad_y_hadamard, grad_g)
        grad_plan, grad_transport_cost = (t if t is None else t.contiguous() for t in (grad_plan, grad_transport_cost))
        run = _Backward(w, rows, columns, scale, iterations, detached, grad_plan, grad_transport_cost)
        run.project()
        if not detached:
            run.start()
            run.sweep()
        if dcost_matrix is not None or (deps is not None and not detached):
            run.cost_gradient(dcost_matrix, deps is not None)
        through_cost = cost != "matrix" and (not detached or grad_transport_cost is not None)
        for own, other, target in ((rows, columns, dx), (columns, rows, dy)):
            if target is not None:
                run.points(own, other, through_cost, target)
        for own, weights, target in ((rows, a, da), (columns, b, db)):
            if target is not None:
                target.zero_() if detached else weight_gradient(own, weights, target)
        if deps is not None:
            deps.zero_() if detached else run.eps(deps)


def specializations() -> Iterator[Specialization]:
    """What the launcher can ask for, with every optional argument."""
    tiles = Tiles()
    kernels = (_sinkhorn_plan_sums, _sinkhorn_sweep, _sinkhorn_cost_gradient, _sinkhorn_points_gradient)
    others = (_sinkhorn_start_adjoint, _sinkhorn_finish_points, _sinkhorn_sweep_update, _sinkhorn_eps_gradient)
    names = {name for kernel in kernels + others for name in kernel.arg_names}
    types = dict.fromkeys(names - set(SIZES), "*fp32")
    types |= dict.fromkeys(("counts", "other_counts", "x_counts", "y_counts", "iterations"), "*i32")
    types |= {name: "fp32" for name in names if name.endswith("inverse_rho")}
    for kernel in kernels:
        last = {"LAST": False} if kernel is _sinkhorn_sweep else {}
        modes = {"DETACHED": False} if "DETACHED" in kernel.arg_names else {}
        yield from over_tiles(kernel, types, **last, **modes)
    blocks = {"BLOCK": tiles.own, "DEPTH": tiles.depth}
    yield compiled(_sinkhorn_start_adjoint, str(tiles.own), types, {**blocks, "CHUNK": tiles.chunk})
    for cost in ("euclidean", "cosine"):
        yield compiled(_sinkhorn_finish_points, f"{tiles.own} {cost}", types, {"COST": COSTS[cost], **blocks})
    vectors = {"BLOCK": tiles.vector, "CHUNK": tiles.chunk}
    yield compiled(_sinkhorn_sweep_update, str(tiles.vector), types, {"LAST": False, **vectors})
    yield compiled(_sinkhorn_eps_gradient, str(tiles.vector), types, vectors)
