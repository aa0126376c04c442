"""What the streaming kernels of Sinkhorn-Hadamard share: cost tiles and the steps over them.

Symmetry. Rows and columns play the same part, so a kernel sees one side as its `own`, whose points its programs share
out in blocks, and loops over the `other` side. The step of the columns is the step of the rows with the sides swapped.

Cost tiles are recomputed by matrix products wherever they are needed. |x|^2 + |y|^2 - 2 x.y cancels for points that
are near each other, compared to their distance from the origin. So points are first moved to have the first x for an
origin, and what is near even then (`NEAR`) is computed once more from differences, entry by entry: an entry has the
same value in every kernel, whatever the tiling. So are all entries where one step of a product holds all features:
differences cost no more then. For cosines the points are first brought to length one.

Units. As in the resident kernel potentials and costs are in units of eps ln 2, so that exponentials are bare powers
of two. Log-weights and potentials read -infinity in the padding, which makes every power there exactly 0. What the
padding of the inputs holds is never read.

Order. Others are taken in chunks of fixed length, each by a program of its own; the chunks' results are combined in
their order. Neither the tiles nor the chunks depend on the batch or on how far a problem is padded, and there are
no atomics: results are the same bit for bit, run to run and in any batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

COSTS = {"euclidean": 0, "sqeuclidean": 1, "cosine": 2, "matrix": 3}
EUCLIDEAN: tl.constexpr = tl.constexpr(0)
COSINE: tl.constexpr = tl.constexpr(2)
MATRIX: tl.constexpr = tl.constexpr(3)
TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
LN2: tl.constexpr = tl.constexpr(math.log(2.0))
NEAR: tl.constexpr = tl.constexpr(1 / 16)  # squared distances below this part of |x|^2 + |y|^2 are near
PRECISION: tl.constexpr = tl.constexpr("ieee")

# Sizes of problems, for which no kernel is compiled anew.
SIZES = ["size", "own_size", "other_size", "centre_size", "own_stride", "other_stride", "D", "blocks", "chunks"]
SIZES += ["depths", "value_stride", "n_iters", "own_step", "step", "own_lag", "other_lag", "steps", "N", "M"]


@triton.jit
def locate(blocks, BLOCK: tl.constexpr):
    """(problem, first point) of this program; 64 bits."""
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * BLOCK


@triton.jit
def differences_tile(own_points, other_points, valid_i, valid_j, D, OWN: tl.constexpr, OTHER: tl.constexpr):
    """(OWN, OTHER) squared distances, one feature at a time; pointers at the tile's first points."""
    i = tl.arange(0, OWN) * D
    j = tl.arange(0, OTHER) * D
    tile = tl.zeros((OWN, OTHER), tl.float32)
    for d in tl.range(D, num_stages=1):
        own = tl.load(own_points + (i + d), mask=valid_i, other=0.0).to(tl.float32)
        other = tl.load(other_points + (j + d), mask=valid_j, other=0.0).to(tl.float32)
        difference = own[:, None] - other[None, :]
        tile += difference * difference
    return tile


@triton.jit
def product_tile(own, other, own_left, other_left, depths, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr):
    """(OWN, OTHER) inner products of rows of depths * DEPTH features; pointers at the tile's first rows.

    In place of rows past the last valid one that one is read again, which takes no masks. Not pipelined: that takes
    registers for the addresses of the next step, and other warps hide the latency.
    """
    d = tl.arange(0, DEPTH)
    i = tl.minimum(tl.arange(0, OWN), tl.maximum(own_left - 1, 0)).to(tl.int32)
    j = tl.minimum(tl.arange(0, OTHER), tl.maximum(other_left - 1, 0)).to(tl.int32)
    left = own + (i[:, None] * (depths * DEPTH) + d[None, :])
    right = other + (j[None, :] * (depths * DEPTH) + d[:, None])
    tile = tl.zeros((OWN, OTHER), tl.float32)
    for k in tl.range(0, depths, num_stages=1):
        tile = tl.dot(tl.load(left + k * DEPTH), tl.load(right + k * DEPTH), tile, input_precision=PRECISION)
    return tile


@triton.jit
def cost_tile(
    own_points,  # (B, own_size, D)
    other_points,  # (B, other_size, D)
    own_rows,  # (B, own_size, depths * DEPTH), see `_sinkhorn_prepare`
    other_rows,
    own_norms,  # (B, own_size)
    other_norms,
    cost_matrix,
    own_size,
    other_size,
    own_stride,  # of cost_matrix
    other_stride,
    D,
    depths,
    problem,
    start,  # the tile's first own point
    at,  # the tile's first other point
    own_left,  # valid points from there on
    other_left,
    COST: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """(OWN, OTHER) unscaled costs. Where no own or no other point is valid they are anything, else finite."""
    i = tl.arange(0, OWN)
    j = tl.arange(0, OTHER)
    valid_i = i < own_left
    valid_j = j < other_left
    own_first = problem * own_size + start
    other_first = problem * other_size + at
    if COST == MATRIX:
        cost_matrix += problem * own_size * other_size + start * own_stride + at * other_stride
        offsets = i[:, None] * own_stride + j[None, :] * other_stride
        tile = tl.load(cost_matrix + offsets, mask=valid_i[:, None] & valid_j[None, :], other=0.0).to(tl.float32)
    else:
        own_rows += own_first * (depths * DEPTH)
        other_rows += other_first * (depths * DEPTH)
        tile = product_tile(own_rows, other_rows, own_left, other_left, depths, OWN, OTHER, DEPTH)
        if COST == COSINE:
            tile = 1.0 - tile
        else:
            own_norm = tl.load(own_norms + own_first + i, mask=valid_i, other=0.0)
            other_norm = tl.load(other_norms + other_first + j, mask=valid_j, other=0.0)
            squares = own_norm[:, None] + other_norm[None, :]
            tile = squares - 2.0 * tile
            near = (tile < squares * NEAR) | (depths == 1)
            if tl.max(tl.max(tl.where(near, 1.0, 0.0), 1), 0) > 0.0:
                own_points += own_first * D
                other_points += other_first * D
                exact = differences_tile(own_points, other_points, valid_i, valid_j, D, OWN, OTHER)
                tile = tl.where(near, exact, tile)
            if COST == EUCLIDEAN:
                tile = tl.sqrt(tile)
    return tile


@triton.jit
def log_ratio(own, other, c, OWN_IS_X: tl.constexpr):
    """log2 P_ij / b_j as (f_i - c_ij) + shift_j, where `rest` of y is still to be added.

    Whichever side is own, this is the order of the last update's sums, whose largest exponent f_i - c_ij is -shift_j:
    so the rounding of f - c cancels, which where costs are thousands of eps is more than rest.
    """
    if OWN_IS_X:
        return (own[:, None] - c) + other[None, :]
    else:
        return (other[None, :] - c) + own[:, None]


@triton.jit
def combine(partial, sums, size, chunks, valid):
    """log2 of the sum over the chunks of sums 2^partial, as the largest exponent and what is to be added to it."""
    largest = tl.load(partial, mask=valid, other=0.0)
    total = tl.zeros_like(largest)
    at = partial
    for _ in range(1, chunks):
        at += size
        largest = tl.maximum(largest, tl.load(at, mask=valid, other=0.0))
    for _ in range(chunks):
        total += tl.load(sums, mask=valid, other=1.0) * tl.exp2(tl.load(partial, mask=valid, other=0.0) - largest)
        partial += size
        sums += size
    return largest, tl.log2(total)


@triton.jit
def add_chunks(partial, size, chunks, valid):
    """The sum over the chunks, in their order."""
    total = tl.load(partial, mask=valid, other=0.0)
    for _ in range(1, chunks):
        partial += size
        total += tl.load(partial, mask=valid, other=0.0)
    return total


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_prepare(
    points,  # (B, size, D)
    weights,  # (B, size) or None
    lengths,  # (B,) or None
    other_lengths,  # (B,) or None
    centres,  # (B, centre_size, D); the first of each problem is its origin
    rows,  # (B, size, depths * DEPTH): the points moved, or of length one; zero features at the end
    norms,  # (B, size) or None: their squared lengths; for cosines, the lengths of the points
    log_weights,  # (B, size)
    potential,  # (B, size): 0
    counts,  # (B,): valid points, 0 if either side has none
    size,
    other_size,
    centre_size,
    D,
    depths,
    blocks,
    COST: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    problem, start = locate(blocks, BLOCK)
    count = size
    other_count = other_size
    if lengths is not None:
        count = tl.minimum(tl.load(lengths + problem), size)
    if other_lengths is not None:
        other_count = tl.minimum(tl.load(other_lengths + problem), other_size)
    count = tl.where((count <= 0) | (other_count <= 0), 0, count)
    tl.store(counts + problem, count)  # every program of the problem the same
    i = tl.arange(0, BLOCK)
    valid = start + i < count
    at = problem * size + start
    if weights is None:
        log_weight = tl.zeros((BLOCK,), tl.float32) - tl.log2(tl.maximum(count, 1).to(tl.float32))
    else:
        log_weight = tl.log2(tl.maximum(tl.load(weights + at + i, mask=valid, other=1.0).to(tl.float32), TINY))
    tl.store(log_weights + at + i, log_weight, mask=valid)
    tl.store(potential + at + i, tl.zeros_like(log_weight), mask=valid)
    if COST != MATRIX:
        points += at * D
        rows += at * (depths * DEPTH)
        centres += problem * centre_size * D
        centred = tl.where(count > 0, D, 0)
        square = tl.zeros((BLOCK,), tl.float32)
        for k in range(depths):
            d = k * DEPTH + tl.arange(0, DEPTH)
            mask = valid[:, None] & (d < D)[None, :]
            row = tl.load(points + (i[:, None] * D + d[None, :]), mask=mask, other=0.0).to(tl.float32)
            if COST != COSINE:
                centre = tl.load(centres + d, mask=d < centred, other=0.0).to(tl.float32)
                row = tl.where(mask, row - centre[None, :], 0.0)
                tl.store(rows + (i[:, None] * (depths * DEPTH) + d[None, :]), row, mask=valid[:, None])
            square += tl.sum(row * row, 1)
        if COST == COSINE:
            square = tl.sqrt_rn(square)
            length = tl.where(square == 0.0, 1.0, square)
            for k in range(depths):
                d = k * DEPTH + tl.arange(0, DEPTH)
                mask = valid[:, None] & (d < D)[None, :]
                row = tl.load(points + (i[:, None] * D + d[None, :]), mask=mask, other=0.0).to(tl.float32)
                row = tl.div_rn(row, tl.broadcast_to(length[:, None], (BLOCK, DEPTH)))
                tl.store(rows + (i[:, None] * (depths * DEPTH) + d[None, :]), row, mask=valid[:, None])
        tl.store(norms + at + i, square, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_reduce_costs(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    factors,  # (B,), from unscaled costs to units of eps ln 2; None for the largest cost
    running,  # (B,) or None: what does not run is left as it is
    potential,  # (B, other_size)
    partial,  # (B, chunks, own_size): the largest exponent potential_j - c_ij of each chunk of others
    sums,  # (B, chunks, own_size): of the powers of two of all, relative to it
    COST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The log-sum-exps over others, in two parts; without ``factors`` the largest unscaled costs."""
    problem, start = locate(blocks, OWN)
    own_left = tl.load(own_counts + problem) - start
    others = tl.load(other_counts + problem)
    first = tl.program_id(1) * CHUNK
    active = (own_left > 0) & (first < others)
    if running is not None:
        active = active & (tl.load(running + problem) != 0)
    if active:
        i = tl.arange(0, OWN)
        j = tl.arange(0, OTHER)
        factor = 1.0
        if factors is not None:
            factor = tl.load(factors + problem)
        largest = tl.full((OWN,), float("-inf"), tl.float32)
        total = tl.zeros((OWN,), tl.float32)
        for step in range(first, tl.minimum(first + CHUNK, others), OTHER):
            at = problem * 0 + step  # 64 bits
            c = cost_tile(
                own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix,
                own_size, other_size, own_stride, other_stride, D, depths,
                problem, start, at, own_left, others - at, COST, OWN, OTHER, DEPTH,
            )  # fmt: skip
            valid_j = j < others - at
            if factors is None:
                c = tl.where((i < own_left)[:, None] & valid_j[None, :], c, 0.0)
                largest = tl.maximum(largest, tl.max(c, 1))
            else:
                other = tl.load(potential + problem * other_size + at + j, mask=valid_j, other=float("-inf"))
                shifted = other[None, :] - c * factor
                above = tl.maximum(largest, tl.max(shifted, 1))
                total = total * tl.exp2(largest - above) + tl.sum(tl.exp2(shifted - above[:, None]), 1)
                largest = above
        own = (problem * chunks + tl.program_id(1)) * own_size + start
        tl.store(partial + own + i, largest, mask=i < own_left)
        if factors is not None:
            tl.store(sums + own + i, total, mask=i < own_left)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_update(
    partial,  # (B, chunks, size), as the following
    sums,
    counts,
    other_counts,
    log_weights,
    eps,  # (B,)
    running,  # (B,)
    potential,  # (B, size)
    shift,  # (B, size): what of the potential comes from the largest exponent, without rounding if balanced
    rest,  # (B, size): potential - log weight - shift
    history,  # (B, n_iters, size) or None: the potentials after each iteration, in units of C
    size,
    blocks,
    chunks,
    n_iters,
    step,
    inverse_rho,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """potential_i = log2 weight_i - damping lse_i."""
    problem, start = locate(blocks, BLOCK)
    if tl.load(running + problem) != 0:
        count = tl.load(counts + problem)
        epsilon = tl.load(eps + problem)
        i = start + tl.arange(0, BLOCK)
        valid = i < count
        used = tl.cdiv(tl.load(other_counts + problem), CHUNK)
        first = problem * chunks * size + i
        largest, more = combine(partial + first, sums + first, size, used, valid)
        stretch = 1.0 + epsilon * inverse_rho
        value = tl.load(log_weights + problem * size + i, mask=valid, other=0.0) - (largest + more) / stretch
        tl.store(potential + problem * size + i, value, mask=valid)
        tl.store(shift + problem * size + i, -largest / stretch, mask=valid)
        tl.store(rest + problem * size + i, -more / stretch, mask=valid)
        if history is not None:
            value = tl.where(valid, value * (epsilon * LN2), 0.0)
            tl.store(history + (problem * n_iters + step) * size + i, value, mask=i < size)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_project(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    factors,
    own_exponent,  # (B, own_size), as of `log_ratio`
    other_exponent,  # (B, other_size)
    own_rest,  # (B, own_size) or None: what is to be added to it
    other_rest,  # (B, other_size) or None
    values,  # (B, other_size, value_stride), of which D are taken
    value_stride,
    projected,  # (B, own_size, D)
    hadamard,  # (B, own_size, D) or None: own_points * projected
    OWN_IS_X: tl.constexpr,
    COST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """projected_i = sum_j 2^(log_ratio_ij + own_rest_i + other_rest_j) values_j."""
    problem, start = locate(blocks, OWN)
    own_left = tl.load(own_counts + problem) - start
    others = tl.where(own_left > 0, tl.load(other_counts + problem), 0)
    factor = tl.load(factors + problem)
    i = tl.arange(0, OWN)
    j = tl.arange(0, OTHER)
    d = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    own = problem * own_size + start
    own_first = tl.load(own_exponent + own + i, mask=i < own_left, other=float("-inf"))
    if own_rest is not None:
        own_more = tl.load(own_rest + own + i, mask=i < own_left, other=0.0)
    total = tl.zeros((OWN, FEATURES), tl.float32)
    for step in tl.range(0, others, OTHER, num_stages=1):  # prefetching would spill
        at = problem * 0 + step
        c = cost_tile(
            own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix,
            own_size, other_size, own_stride, other_stride, D, depths,
            problem, start, at, own_left, others - at, COST, OWN, OTHER, DEPTH,
        )  # fmt: skip
        valid_j = j < others - at
        other = problem * other_size + at
        other_first = tl.load(other_exponent + other + j, mask=valid_j, other=float("-inf"))
        exponent = log_ratio(own_first, other_first, c * factor, OWN_IS_X)
        if other_rest is not None:
            exponent += tl.load(other_rest + other + j, mask=valid_j, other=0.0)[None, :]
        if own_rest is not None:
            exponent += own_more[:, None]
        weight = tl.exp2(exponent)
        mask = valid_j[:, None] & (d < D)[None, :]
        value = tl.load(values + other * value_stride + (j[:, None] * value_stride + d[None, :]), mask=mask, other=0.0)
        total = tl.dot(weight, value.to(tl.float32), total, input_precision=PRECISION)
    offsets = own * D + (i[:, None] * D + d[None, :])
    mask = (i < own_size - start)[:, None] & (d < D)[None, :]
    tl.store(projected + offsets, total, mask=mask)
    if hadamard is not None:
        inside = (i < own_left)[:, None] & (d < D)[None, :]
        tl.store(hadamard + offsets, tl.load(own_points + offsets, mask=inside, other=0.0) * total, mask=mask)
