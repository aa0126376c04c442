"""Kernels of the streaming Sinkhorn backward that move vectors: the start of the adjoint, and the sweep back through
the iterations. `sinkhorn_streaming_backward` derives and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from .sinkhorn_tiles import LN2, SIZES, add_chunks, cost_tile, locate, log_ratio


@triton.jit
def stored_potential(history, problem, step, n_iters, size, i, valid, padding):
    """The potential after iteration ``step``, 0 before the first; like the history in units of eps ln 2."""
    at = history + (problem * n_iters + tl.maximum(step, 0)) * size + i
    value = tl.load(at, mask=valid, other=0.0)
    return tl.where(valid, tl.where(step < 0, 0.0, value), padding)


@triton.jit
def stored_shift(history, log_weights, problem, step, n_iters, size, i, valid, stretch, padding):
    """Minus the log-sum-exp from which that potential came; ``stretch`` is 1 / damping."""
    value = stored_potential(history, problem, step, n_iters, size, i, valid, 0.0)
    value = (value - tl.load(log_weights + problem * size + i, mask=valid, other=0.0)) * stretch
    return tl.where(valid, value, padding)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_plan_sums(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    factors, eps, own_exponent, other_exponent, own_rest, other_rest,
    grad_plan,  # (B, N, M) or None
    grad_transport_cost,  # (B,) or None
    partial,  # (B, chunks, own_size)
    OWN_IS_X: tl.constexpr,
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
        own_first = tl.load(own_exponent + problem * own_size + start + i, mask=valid_i, other=0.0)
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
            other_first = tl.load(other_exponent + problem * other_size + at + j, mask=valid_j, other=float("-inf"))
            exponent = log_ratio(own_first, other_first, c, OWN_IS_X)
            if OWN_IS_X:
                exponent += tl.load(other_rest + problem * other_size + at + j, mask=valid_j, other=0.0)[None, :]
            else:
                exponent += tl.load(own_rest + problem * own_size + start + i, mask=valid_i, other=0.0)[:, None]
            gradient = tl.zeros((OWN, OTHER), tl.float32)
            if grad_transport_cost is not None:
                unit = tl.load(eps + problem) * LN2
                gradient += c * (unit * tl.load(grad_transport_cost + problem))
            if grad_plan is not None:
                corner = grad_plan + problem * own_size * other_size + start * own_stride + at * other_stride
                offsets = i[:, None] * own_stride + j[None, :] * other_stride
                gradient += tl.load(corner + offsets, mask=valid, other=0.0)
            weighted = gradient * tl.exp2(exponent)
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
        factor = tl.load(factors + problem)
        stretch = 1.0 + epsilon * own_inverse_rho
        own = stored_potential(own_history, problem, own_step, n_iters, own_size, i, valid_i, 0.0)
        own_shift = stored_shift(
            own_history, own_log_weights, problem, own_step, n_iters, own_size, i, valid_i, stretch, 0.0
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
                other_history + at, problem, step - 1, n_iters, other_size, j, valid_j, float("-inf")
            )
            total += tl.sum(tl.exp2((other[None, :] - c) + own_shift[:, None]), 1)
            if not LAST:
                shift = stored_shift(
                    other_history + at, other_log_weights + at, problem, step, n_iters, other_size, j, valid_j, stretch,
                    float("-inf"),
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
        shift = stored_shift(history, log_weights, problem, own_step, n_iters, size, i, valid, stretch, 0.0)
        lse = (tl.log2(total) - shift) * LN2
        tl.store(damping_gradient + at, tl.load(damping_gradient + at, mask=valid, other=0.0) - gradient * lse, valid)
