"""Kernels of the streaming Sinkhorn backward that make the gradient of the cost, tile by tile, and what comes of it.
`sinkhorn_streaming_backward` derives and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from .sinkhorn_sweep import stored_potential, stored_shift
from .sinkhorn_tiles import (
    COSINE,
    EUCLIDEAN,
    LN2,
    PRECISION,
    SIZES,
    add_chunks,
    cost_tile,
    locate,
    log_ratio,
    product_tile,
)

# Squared distances below this part of |x|^2 + |y|^2 are near: here less, for their sums one by one are slow.
NEAR: tl.constexpr = tl.constexpr(1 / 256)


@triton.jit
def cost_gradient_tile(
    c,  # in units of eps ln 2
    own_exponent, other_exponent, own_rest, other_rest,  # of P
    own_gradient, other_gradient,  # (B, size, depths * DEPTH) or None
    own_wide, other_wide,  # (B, size, depths * DEPTH): the points in fp32
    grad_plan, grad_transport_cost, eps, iterations, own_history, other_history, own_log_weights, other_log_weights,
    own_weights, other_weights,  # (B, n_iters, size)
    own_inverse_rho, other_inverse_rho, own_lag, other_lag,
    own_size, other_size, own_stride, other_stride, depths, n_iters, problem, start, at, own_left, other_left,
    OWN_IS_X: tl.constexpr, DETACHED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr,
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
    own = tl.load(own_exponent + own_at + i, mask=valid_i, other=0.0)
    other = tl.load(other_exponent + other_at + j, mask=valid_j, other=0.0)
    exponent = log_ratio(own, other, c, OWN_IS_X)
    if OWN_IS_X:
        exponent += tl.load(other_rest + other_at + j, mask=valid_j, other=0.0)[None, :]
    else:
        exponent += tl.load(own_rest + own_at + i, mask=valid_i, other=0.0)[:, None]
    probability = tl.exp2(exponent)
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
        own_log_weights += start
        other_log_weights += at
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
            log_weight = tl.load(own_log_weights + (problem * own_size + i), mask=valid_i, other=0.0)
            through -= products * tl.exp2(exponent - log_weight[:, None])
        if other_gradient is not None:
            products = product_tile(
                own_wide + own_first, other_gradient + other_first, own_left, other_left, depths, OWN, OTHER, DEPTH
            )
            log_weight = tl.load(other_log_weights + (problem * other_size + j), mask=valid_j, other=0.0)
            through -= products * tl.exp2(exponent - log_weight[None, :])
        own_history += start
        other_history += at
        own_weights += start
        other_weights += at
        own_stretch = 1.0 + epsilon * own_inverse_rho
        other_stretch = 1.0 + epsilon * other_inverse_rho
        for k in tl.range(0, tl.load(iterations + problem), num_stages=1):
            own = stored_potential(own_history, problem, k - own_lag, n_iters, own_size, i, valid_i, 0.0)
            other = stored_potential(other_history, problem, k - other_lag, n_iters, other_size, j, valid_j, 0.0)
            own_k = stored_shift(
                own_history, own_log_weights, problem, k, n_iters, own_size, i, valid_i, own_stretch, 0.0
            )
            other_k = stored_shift(
                other_history, other_log_weights, problem, k, n_iters, other_size, j, valid_j, other_stretch, 0.0
            )
            own_weight = tl.load(own_weights + (problem * n_iters + k) * own_size + i, mask=valid_i, other=0.0)
            other_weight = tl.load(other_weights + (problem * n_iters + k) * other_size + j, mask=valid_j, other=0.0)
            through += tl.exp2((own[:, None] - c) + other_k[None, :]) * other_weight[None, :]
            through += tl.exp2((other[None, :] - c) + own_k[:, None]) * own_weight[:, None]
    return direct, through


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_cost_gradient(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    own_exponent, other_exponent, own_rest, other_rest, own_gradient, other_gradient, own_wide, other_wide,
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
            c, own_exponent, other_exponent, own_rest, other_rest, own_gradient, other_gradient, own_wide, other_wide,
            grad_plan, grad_transport_cost, eps, iterations, own_history, other_history, own_log_weights,
            other_log_weights, own_weights, other_weights, own_inverse_rho, other_inverse_rho, own_lag, other_lag,
            own_size, other_size, own_stride, other_stride, depths, n_iters, problem, start, at, own_left, others - at,
            True, DETACHED, OWN, OTHER, DEPTH,
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
    own_exponent, other_exponent, own_rest, other_rest, own_gradient, other_gradient, own_wide, other_wide,
    grad_plan, grad_transport_cost, eps, iterations, own_history, other_history, own_log_weights, other_log_weights,
    own_weights, other_weights, own_inverse_rho, other_inverse_rho, own_lag, other_lag, n_iters,
    factors,
    scale,
    through_cost,  # (B, own_size, D); for cosines, of the points of length one
    OWN_IS_X: tl.constexpr,
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
            cost * factor, own_exponent, other_exponent, own_rest, other_rest, own_gradient, other_gradient,
            own_wide, other_wide, grad_plan, grad_transport_cost, eps, iterations, own_history, other_history,
            own_log_weights, other_log_weights, own_weights, other_weights, own_inverse_rho, other_inverse_rho,
            own_lag, other_lag, own_size, other_size, own_stride, other_stride, depths, n_iters, problem, start, at,
            own_left, others - at, OWN_IS_X, DETACHED, OWN, OTHER, DEPTH,
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
            near = squares < (own_norm[:, None] + other_norm[None, :]) * NEAR
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
