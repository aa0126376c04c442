"""Streaming Sinkhorn-Hadamard, forward: problems of any size, with cost tiles recomputed in every half-step.

An iteration is four launches: log-sum-exps over the columns of the cost (the heavy one, see `sinkhorn_tiles`), the
update of g from them, and the same over the rows for f. As in the resident kernel the row sums of the plan come from
the log-sum-exps that the next update of f needs, so the marginal error costs nothing but one program per problem;
with a tolerance it is launched in each iteration and clears the problem's flag in `running`, which every later launch
reads. Nothing synchronises, and the launches depend on shapes and options only: a CUDA graph can hold them.

Memory beside the outputs: fp32 copies of the points, and 7 + 2 ceil(other side / chunk) numbers per point. Time: a
half-step takes N M D multiply-adds and N M exponentials; the outputs take two more, times ceil(D / features).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sinkhorn_workspace
from .sinkhorn_tiles import LN2, SIZES, add_chunks, combine, cost_tile, locate, log_ratio
from .sinkhorn_workspace import Tiles, Workspace, compiled, over_tiles
from .specialization import Specialization

DEFAULT_THRESHOLD = 1e-3  # `converged` when no tolerance was asked for
SMALLEST_SCALE: tl.constexpr = tl.constexpr(1e-8)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_start(
    largest,  # (B, chunks, N), largest costs of the rows
    x_counts,
    y_counts,
    eps,
    scale,  # (B,)
    factors,  # (B,)
    running,  # (B,)
    error,  # (B,)
    iterations,  # (B,)
    converged,  # (B,)
    N,
    chunks,
    cost_scale,  # None: the largest valid cost
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What belongs to the whole of each problem, before the first iteration."""
    problem = tl.program_id(0).to(tl.int64)
    n = tl.load(x_counts + problem)
    if cost_scale is None:
        used = tl.cdiv(tl.load(y_counts + problem), CHUNK)
        divisor = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            at = largest + problem * chunks * N + i
            for _ in range(used):
                divisor = tl.maximum(divisor, tl.load(at, mask=i < n, other=0.0))
                at += N
        divisor = tl.maximum(tl.max(divisor, 0), SMALLEST_SCALE)
    else:
        divisor = cost_scale * 1.0
    tl.store(scale + problem, divisor)
    tl.store(factors + problem, 1.0 / (divisor * (tl.load(eps + problem) * LN2)))
    tl.store(running + problem, (n > 0).to(tl.int32))
    tl.store(error + problem, 0.0)
    tl.store(iterations + problem, 0)
    tl.store(converged + problem, 1)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_check(
    partial,  # (B, chunks, N), log-sum-exps of the rows, as the following
    sums,
    x_counts,
    y_counts,
    log_a,
    f,
    eps,
    running,
    error,
    iterations,
    converged,
    N,
    chunks,
    steps,
    tol,  # None: no early stop
    threshold,
    inverse_rho,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The marginal error, after ``steps`` more iterations; whether it is small enough to stop."""
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(running + problem) != 0:
        n = tl.load(x_counts + problem)
        used = tl.cdiv(tl.load(y_counts + problem), CHUNK)
        # Undamped, what is left of the log-sum-exp after the next update is exactly 0.
        damped = tl.load(eps + problem) * inverse_rho
        kept = damped / (1.0 + damped)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            valid = i < n
            first = problem * chunks * N + i
            largest, more = combine(partial + first, sums + first, N, used, valid)
            lse = largest + more
            now = tl.exp2(tl.load(f + problem * N + i, mask=valid, other=0.0) + lse)
            after = tl.exp2(tl.load(log_a + problem * N + i, mask=valid, other=0.0) + kept * lse)
            total += tl.where(valid, tl.abs(now - after), 0.0)
        gap = tl.sum(total, 0)
        tl.store(error + problem, gap)
        tl.store(converged + problem, (gap <= threshold).to(tl.int8))
        tl.store(iterations + problem, tl.load(iterations + problem) + steps)
        if tol is not None:
            tl.store(running + problem, 1 - (gap <= tol).to(tl.int32))


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_plan(
    own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix, own_counts, other_counts,
    own_size, other_size, own_stride, other_stride, D, depths, blocks, chunks,
    factors,
    own_exponent,  # (B, N), as of `log_ratio`
    other_exponent,  # (B, M)
    other_rest,  # (B, M): what is to be added to it
    plan,  # (B, N, M) or None
    partial,  # (B, chunks, N): sum_j P_ij c_ij
    COST: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    problem, start = locate(blocks, OWN)
    own_left = tl.load(own_counts + problem) - start
    others = tl.load(other_counts + problem)
    first = tl.program_id(1) * CHUNK
    stop = others
    if plan is not None:  # its padding is written as well
        stop = other_size
    factor = tl.load(factors + problem)
    i = tl.arange(0, OWN)
    j = tl.arange(0, OTHER)
    own_first = tl.load(own_exponent + problem * own_size + start + i, mask=i < own_left, other=0.0)
    total = tl.zeros((OWN,), tl.float32)
    for step in range(first, tl.minimum(first + CHUNK, stop), OTHER):
        at = problem * 0 + step
        c = factor * cost_tile(
            own_points, other_points, own_rows, other_rows, own_norms, other_norms, cost_matrix,
            own_size, other_size, own_stride, other_stride, D, depths,
            problem, start, at, own_left, others - at, COST, OWN, OTHER, DEPTH,
        )  # fmt: skip
        valid = (i < own_left)[:, None] & (j < others - at)[None, :]
        other = problem * other_size + at + j
        other_first = tl.load(other_exponent + other, mask=j < others - at, other=0.0)
        rest = tl.load(other_rest + other, mask=j < others - at, other=0.0)
        probability = tl.where(valid, tl.exp2(log_ratio(own_first, other_first, c, True) + rest[None, :]), 0.0)
        total += tl.sum(tl.where(valid, probability * c, 0.0), 1)
        if plan is not None:
            rows = plan + (problem * own_size + start) * other_size + at
            mask = (i < own_size - start)[:, None] & (j < other_size - at)[None, :]
            tl.store(rows + (i[:, None] * other_size + j[None, :]), probability, mask=mask)
    partial += (problem * chunks + tl.program_id(1)) * own_size + start
    tl.store(partial + i, total, mask=i < own_left)


@triton.jit(do_not_specialize=SIZES)
def _sinkhorn_finish(
    partial,  # (B, chunks, N): sum_j P_ij c_ij
    x_counts,
    y_counts,
    eps,
    scaled_f,
    scaled_g,
    f,
    g,
    transport_cost,
    N,
    M,
    chunks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Potentials in units of C, zero in the padding; the transport cost."""
    problem = tl.program_id(0).to(tl.int64)
    n = tl.load(x_counts + problem)
    m = tl.load(y_counts + problem)
    unit = tl.load(eps + problem) * LN2
    used = tl.cdiv(m, CHUNK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        potential = tl.load(scaled_f + problem * N + i, mask=i < n, other=0.0)
        tl.store(f + problem * N + i, potential * unit, mask=i < N)
        if used > 0:
            total += add_chunks(partial + problem * chunks * N + i, N, used, i < n)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        potential = tl.load(scaled_g + problem * M + j, mask=j < m, other=0.0)
        tl.store(g + problem * M + j, potential * unit, mask=j < M)
    tl.store(transport_cost + problem, tl.sum(total, 0) * unit)


def forward(
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
    cost_scale: float | None,
    n_iters: int,
    tol: float | None,
    rho_x: float | None,
    rho_y: float | None,
    x_to_y: Tensor,
    y_to_x: Tensor,
    x_hadamard: Tensor,
    y_hadamard: Tensor,
    f: Tensor,
    g: Tensor,
    plan: Tensor | None,
    transport_cost: Tensor,
    error: Tensor,
    iterations: Tensor,
    converged: Tensor,
    scale: Tensor,
    f_history: Tensor | None,
    g_history: Tensor | None,
    tiles: Tiles | None = None,
) -> None:
    """Launch the streaming forward; arguments as for the resident one, and the sizes of the tiles."""
    if n_iters < 1:
        raise ValueError(f"sinkhorn_hadamard: `n_iters` must be at least 1; got {n_iters}.")
    if 0 in (*x.shape, y.shape[1]):
        raise ValueError(f"sinkhorn_hadamard: nothing to launch for x {tuple(x.shape)} and y {tuple(y.shape)}.")
    tiles = tiles or Tiles()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        w = Workspace(x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, cost, rho_x, rho_y, tiles)
        rows, columns = w.x, w.y
        running = torch.empty_like(iterations)
        each = (len(eps),)
        blocks = {"BLOCK": tiles.vector, "CHUNK": tiles.chunk, **w.options}
        results = (running, error, iterations, converged.view(torch.int8))
        if cost_scale is None:
            w.reduce(rows, columns, None, None)
        _sinkhorn_start[each](
            rows.partial, rows.counts, columns.counts, w.eps, scale, w.factors, *results, rows.size, rows.chunks,
            cost_scale if cost_scale is None else float(cost_scale), **blocks,
        )  # fmt: skip
        threshold = DEFAULT_THRESHOLD if tol is None else float(tol)

        def check(steps: int) -> None:
            _sinkhorn_check[each](
                rows.partial, rows.sums, rows.counts, columns.counts, rows.log_weights, rows.potential, w.eps,
                *results, rows.size, rows.chunks, steps, None if tol is None else threshold, threshold,
                rows.inverse_rho, **blocks,
            )  # fmt: skip

        w.reduce(rows, columns, running, w.factors)
        for step in range(n_iters):
            w.update(rows, columns, running, f_history, step)
            w.reduce(columns, rows, running, w.factors)
            w.update(columns, rows, running, g_history, step)
            w.reduce(rows, columns, running, w.factors)
            if tol is not None:
                check(1)
        if tol is None:
            check(n_iters)

        w.project(rows, columns, rows, columns.points, y_to_x, x_hadamard)
        w.project(columns, rows, columns, rows.points, x_to_y, y_hadamard)
        kernel, count = w.by_blocks(_sinkhorn_plan, rows, tiles.own, rows.chunks)
        of_rows, of_columns, _, rest = w.exponents(rows)
        kernel(
            *w.geometry(rows, columns, count), w.factors, of_rows, of_columns, rest, plan, rows.partial,
            **w.tile(_sinkhorn_plan),
        )  # fmt: skip
        _sinkhorn_finish[each](
            rows.partial, rows.counts, columns.counts, w.eps, rows.potential, columns.potential, f, g, transport_cost,
            rows.size, columns.size, rows.chunks, **blocks,
        )  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """What the launcher can ask for, with every optional argument; the kernels of `sinkhorn_workspace` among them."""
    yield from sinkhorn_workspace.specializations()
    tiles = Tiles()
    types = {name: "*fp32" for name in ("largest", "partial", "factors", "eps", "scale", "error", "log_a", "f", "g")}
    types |= dict.fromkeys(("sums", "own_exponent", "other_exponent", "other_rest"), "*fp32")
    types |= dict.fromkeys(("scaled_f", "scaled_g", "transport_cost", "plan"), "*fp32")
    types |= dict.fromkeys(("x_counts", "y_counts", "running", "iterations"), "*i32")
    types |= {"converged": "*i8"} | dict.fromkeys(("cost_scale", "tol", "threshold", "inverse_rho"), "fp32")
    yield from over_tiles(_sinkhorn_plan, types)
    for kernel in (_sinkhorn_start, _sinkhorn_check, _sinkhorn_finish):
        yield compiled(kernel, str(tiles.vector), types, {"BLOCK": tiles.vector, "CHUNK": tiles.chunk})
