"""A problem in the registers of one program: its tile of costs, its kernel matrix, their sums.

Notation as in sinkhorn_hadamard.py.

*Absorption* (Schmitzer 2019, arXiv 1610.06519, section 3). Between absorptions a half-step takes no exponentials of
the tile: with offsets alpha, beta and K_ij = 2^(alpha_i + beta_j - c_ij),

    r_i = log2(sum_j K_ij 2^(g_j - beta_j)) - alpha_i,     s_j = log2(sum_i K_ij 2^(f_i - alpha_i)) - beta_j.

Entries of K below 2^-126 are lost. With scalings 2^(g - beta), 2^(f - alpha) of at most 2^58 that is less than rounding
in sums within [2^-29, 2^29]. Where a half-step's sums or scalings leave this range (at the start the sums are zero; at
small eps; beside outliers), its offsets are set anew, alpha_i = -max_j(g_j - c_ij) or beta_j = -max_i(f_i - c_ij), and
K with them: a log-domain step with the maximum as shift. Since K is a density with respect to the weights, they may be
near zero. Where K then has an entry above 2^58, which takes that on both sides, the other side's offsets become its
potentials: K is right for this half-step at least. The last column update is made once more in the log domain, so that
its sums cancel the rounding of f in the projections. There a log-sum-exp takes a shift that is near it, -beta, rather
than the maximum, which spares a pass; if a sum leaves [2^-64, 2^64] it is redone with the maximum. Where K does not fit
beside the costs (tiles of more than 8192), all half-steps are done so, with the shifts of the iteration before.

*Costs by direct differences*, one feature at a time: |x|^2 + |y|^2 - 2 x.y would lose near-coincident points.
Padding never enters: masked loads replace it, and c = inf off the valid block makes every power there exactly 0.

*The tiles* of costs and of K are shaped (column patch, row patch, column warps, row warps, 4, 8): the last two axes
are the lanes of a warp, the two before them the warps. What a thread holds is a nearly square patch of rows and columns
instead of the slice of columns that Triton gives a two-dimensional tile; so sums run first inside threads, few numbers
cross lanes or warps, and the copies of row and column vectors that a thread needs are few as well. A row vector is
shaped (row patch, row warps, 4), a column vector (column patch, column warps, 8).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

EUCLIDEAN: tl.constexpr = tl.constexpr(0)
SQEUCLIDEAN: tl.constexpr = tl.constexpr(1)
COSINE: tl.constexpr = tl.constexpr(2)
MATRIX: tl.constexpr = tl.constexpr(3)
TINY: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)
LN2: tl.constexpr = tl.constexpr(math.log(2.0))
LARGEST_SUM: tl.constexpr = tl.constexpr(2.0**64)
SMALLEST_SUM: tl.constexpr = tl.constexpr(2.0**-64)
LARGEST_TRUSTED: tl.constexpr = tl.constexpr(2.0**29)  # of sums with the kernel matrix
SMALLEST_TRUSTED: tl.constexpr = tl.constexpr(2.0**-29)
LARGEST_SCALING: tl.constexpr = tl.constexpr(2.0**58)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def index(BLOCK: tl.constexpr, WARPS: tl.constexpr, LANES: tl.constexpr):
    """Indices 0 .. BLOCK - 1 of rows or columns, shaped (BLOCK / (WARPS LANES), WARPS, LANES)."""
    SPAN: tl.constexpr = WARPS * LANES
    patch = tl.arange(0, BLOCK // SPAN)[:, None, None] * SPAN
    return patch + tl.arange(0, WARPS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]


@triton.jit
def patches_of_columns(M, j):
    """How many patches of the columns j hold the first M."""
    return tl.cdiv(M, j.shape[1] * j.shape[2])


@triton.jit
def patch_of_columns(k, j):
    """The k-th patch of the columns j, kept three-dimensional."""
    return k * (j.shape[1] * j.shape[2]) + index(j.shape[1] * j.shape[2], j.shape[1], j.shape[2])


@triton.jit
def spread(vector, ROWS: tl.constexpr):
    """A row vector or a column vector, broadcast against the tile."""
    if ROWS:
        return vector[None, :, None, :, :, None]
    else:
        return vector[:, None, :, None, None, :]


@triton.jit
def sum_tile(tile, ROWS: tl.constexpr):
    """Row sums or column sums of a tile: inside threads, then lanes, then warps."""
    if ROWS:
        return tl.sum(tl.sum(tl.sum(tile, 0), 4), 1)
    else:
        return tl.sum(tl.sum(tl.sum(tile, 1), 3), 2)


@triton.jit
def sum_inside(tile, ROWS: tl.constexpr):
    """The part of row sums or column sums that needs no other thread."""
    return tl.sum(tile, 0 if ROWS else 1)


@triton.jit
def sum_across(partial, ROWS: tl.constexpr):
    """The rest of the sums that `sum_inside` began."""
    if ROWS:
        return tl.sum(tl.sum(partial, 4), 1)
    else:
        return tl.sum(tl.sum(partial, 3), 2)


@triton.jit
def spread_inside(vector, ROWS: tl.constexpr):
    """A row vector or a column vector, broadcast against what `sum_inside` returns."""
    if ROWS:
        return vector[:, None, :, :, None]
    else:
        return vector[:, :, None, None, :]


@triton.jit
def max_tile(tile, ROWS: tl.constexpr):
    if ROWS:
        return tl.max(tl.max(tl.max(tile, 0), 4), 1)
    else:
        return tl.max(tl.max(tl.max(tile, 1), 3), 2)


@triton.jit
def sum_vector(vector, ROWS: tl.constexpr):
    if ROWS:
        return tl.sum(tl.sum(tl.sum(vector, 0), 1), 0)
    else:
        return tl.sum(tl.sum(tl.sum(vector, 0), 1), 0)


@triton.jit
def max_vector(vector, ROWS: tl.constexpr):
    if ROWS:
        return tl.max(tl.max(tl.max(vector, 0), 1), 0)
    else:
        return tl.max(tl.max(tl.max(vector, 0), 1), 0)


@triton.jit
def log_sum_exp(c, other, shift, valid, nothing, ROWS: tl.constexpr):
    """log2 of the row (or column) sums of 2^(other - c), with a shift that should be near the result.

    ``nothing`` is a zero that the compiler can't know. Added to ``other``, it makes other - c a new value in each
    pass; else one (N, M) tile of them would be held in registers from the first pass to the last.
    """
    sums = sum_tile(tl.exp2((spread(other, not ROWS) - c) - spread(shift, ROWS)), ROWS)
    sums = tl.where(valid, sums, 1.0)
    outside = (sums < SMALLEST_SUM) | (sums > LARGEST_SUM)
    if max_vector(outside.to(tl.int32), ROWS) > 0:
        other += nothing
        shift = tl.where(valid, max_tile(spread(other, not ROWS) - c, ROWS), 0.0)
        other += nothing
        sums = sum_tile(tl.exp2((spread(other, not ROWS) - c) - spread(shift, ROWS)), ROWS)
        sums = tl.where(valid, sums, 1.0)
    return shift + tl.log2(sums)


@triton.jit
def sums_of(K, scaling, valid, ROWS: tl.constexpr):
    return tl.where(valid, sum_tile(K * spread(scaling, not ROWS), ROWS), 1.0)


@triton.jit
def untrusted(sums, ROWS: tl.constexpr):
    return max_vector(((sums < SMALLEST_TRUSTED) | (sums > LARGEST_TRUSTED)).to(tl.int32), ROWS)


@triton.jit
def too_large(scaling, ROWS: tl.constexpr):
    return max_vector((scaling > LARGEST_SCALING).to(tl.int32), ROWS)


@triton.jit
def offsets(c, potential, valid, ROWS: tl.constexpr):
    """Minus the largest of potential - c in each row (or column)."""
    return tl.where(valid, -max_tile(spread(potential, not ROWS) - c, ROWS), 0.0)


@triton.jit
def kernel_tile(c, offset, other_offset, ROWS: tl.constexpr):
    """In the order of `offsets`, whose rounding then cancels: it alone may be more than the range of exponents."""
    return tl.exp2((spread(other_offset, not ROWS) - c) + spread(offset, ROWS))


@triton.jit
def scalings(potential, offset, valid):
    return tl.where(valid, tl.exp2(potential - offset), 0.0)


@triton.jit
def absorbed_log_sum_exp(c, K, offset, other_offset, other, valid, other_valid, nothing, ROWS: tl.constexpr):
    """As `log_sum_exp`, by sums with K = 2^(offset + other_offset - c), which is set anew where it does not serve."""
    scaling = scalings(other, other_offset, other_valid)
    sums = sums_of(K, scaling, valid, ROWS)
    if (untrusted(sums, ROWS) > 0) | (too_large(scaling, not ROWS) > 0):
        offset = offsets(c, other, valid, ROWS)
        K = kernel_tile(c, offset, other_offset, ROWS)
        if (too_large(max_tile(K, True), True) > 0) | (too_large(scaling, not ROWS) > 0):
            other_offset = other + nothing  # see log_sum_exp
            K = kernel_tile(c, offset, other_offset, ROWS)
        scaling = scalings(other, other_offset, other_valid)
        sums = sums_of(K, scaling, valid, ROWS)
    return tl.log2(sums) - offset, K, offset, other_offset


@triton.jit
def load_vector(pointer, index, valid):
    """A vector in fp32, zero where it is not valid or not given."""
    if pointer is None:
        return tl.zeros_like(index).to(tl.float32)
    else:
        return tl.load(pointer + index, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def store_vector(pointer, index, values, valid):
    """Store where valid, if there is a place."""
    if pointer is not None:
        tl.store(pointer + index, values, mask=valid)


@triton.jit
def advance(pointer, elements):
    if pointer is None:
        return pointer
    else:
        return pointer + elements


@triton.jit
def log2_weights(weights, index, valid, count):
    """log2 of the floored weights, uniform if there are none; 0 in the padding."""
    if weights is None:
        return tl.where(valid, -tl.log2(tl.maximum(count, 1).to(tl.float32)), 0.0)
    else:
        loaded = tl.load(weights + index, mask=valid, other=1.0).to(tl.float32)
        return tl.log2(tl.maximum(loaded, TINY))


@triton.jit
def load_tile(matrix, i, j, valid_i, m, M):
    """A tile of one problem's (N, M) matrix: rows that are valid, columns before m, zero elsewhere."""
    tile = spread(tl.zeros_like(i).to(tl.float32), True) + spread(tl.zeros_like(j).to(tl.float32), False)
    patch = tl.arange(0, j.shape[0])[:, None, None, None, None, None]
    for k in range(patches_of_columns(M, j)):  # at once, the pointers to all would fill the registers
        columns = patch_of_columns(k, j)
        mask = spread(valid_i, True) & spread(columns < m, False)
        part = tl.load(matrix + (spread(i * M, True) + spread(columns, False)), mask=mask, other=0.0)
        tile = tl.where(patch == k, part.to(tl.float32), tile)
    return tile


@triton.jit
def store_tile(matrix, tile, i, j, N, M):
    """Write one problem's (N, M) matrix, padding included."""
    patch = tl.arange(0, j.shape[0])[:, None, None, None, None, None]
    for k in range(patches_of_columns(M, j)):
        columns = patch_of_columns(k, j)
        mask = spread(i < N, True) & spread(columns < M, False)
        part = tl.sum(tl.where(patch == k, tile, 0.0), 0)[None]
        tl.store(matrix + (spread(i * M, True) + spread(columns, False)), part, mask=mask)


@triton.jit
def inverse_norms(points, index, valid, D):
    """1 / |x_i|, zero for a zero vector."""
    squares = tl.zeros_like(index).to(tl.float32)
    for d in range(D):
        value = load_vector(points, index * D + d, valid)
        squares += value * value
    return tl.where(squares > 0.0, 1.0 / tl.sqrt(squares), 0.0)


@triton.jit
def cost_tile(x, y, cost_matrix, i, j, valid_i, valid_j, m, M, D, COST: tl.constexpr):
    """Unscaled costs of one problem; what stands outside the valid block is unspecified but finite."""
    if COST == MATRIX:
        tile = load_tile(cost_matrix, i, j, valid_i, m, M)
    else:
        norm_x = tl.zeros_like(i).to(tl.float32)
        norm_y = tl.zeros_like(j).to(tl.float32)
        tile = spread(norm_x, True) + spread(norm_y, False)
        for d in range(D):
            x_d = tl.load(x + (i * D + d), mask=valid_i, other=0.0).to(tl.float32)
            y_d = tl.load(y + (j * D + d), mask=valid_j, other=0.0).to(tl.float32)
            if COST == COSINE:
                tile += spread(x_d, True) * spread(y_d, False)
                norm_x += x_d * x_d
                norm_y += y_d * y_d
            else:
                difference = spread(x_d, True) - spread(y_d, False)
                tile += difference * difference
        if COST == EUCLIDEAN:
            tile = tl.sqrt(tile)
        if COST == COSINE:
            norm_x = tl.where(norm_x > 0.0, tl.sqrt(norm_x), 1.0)
            norm_y = tl.where(norm_y > 0.0, tl.sqrt(norm_y), 1.0)
            tile = 1.0 - (tile / spread(norm_x, True)) / spread(norm_y, False)
    return tile
