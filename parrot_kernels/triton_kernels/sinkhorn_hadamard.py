"""Resident Sinkhorn-Hadamard: one program per problem, the whole loop and every output in one launch.

Derivation. With C the scaled cost, eps the regularisation and L(.) a log-sum-exp, an iteration is

    f_i = eps log a_i - damp_x eps L_j[(g_j - C_ij) / eps]
    g_j = eps log b_j - damp_y eps L_i[(f_i - C_ij) / eps],     damp = 1 / (1 + eps / rho)  (1 when balanced).

Inside the kernel everything is in units of eps ln 2, so that the exponentials are bare powers of two: with
c = C / (eps ln 2), and f, g likewise, f_i = log2 a_i - damp_x r_i, where r_i = log2 sum_j 2^(g_j - c_ij), and
g_j = log2 b_j - damp_y s_j, where s_j = log2 sum_i 2^(f_i - c_ij).

*The error is free.* The row sums of the plan are 2^(f_i + r_i) with r of the *next* row update, which the next
iteration needs anyway. So r is computed after each column update: the loop runs K column updates and K + 1 row
updates, and after the last one both the marginal error and the row sums are at hand.

*Weights near zero.* y_to_x_i = sum_j 2^(f_i - log2 a_i + g_j - c_ij) y_j: the division by a_i is a difference of
exponents, finite for every weight down to the floor of `tiny`. Likewise x_to_y.

*Costs, absorption, and how a tile lies in registers*: sinkhorn_resident.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sinkhorn_resident import (
    LN2,
    SMALLEST_SCALE,
    absorbed_log_sum_exp,
    cost_tile,
    index,
    log2_weights,
    log_sum_exp,
    max_tile,
    max_vector,
    spread,
    store_tile,
    store_vector,
    sum_tile,
    sum_vector,
)
from .specialization import Specialization, launch_options

MAX_POINTS = 256
MAX_TILE = 128 * 128  # costs that the registers of one program hold: 64 in each of 256 threads
MAX_ABSORBED = 128 * 64  # costs of a problem whose kernel matrix the registers hold beside the costs
MAX_REGISTERS = 255  # all that a thread can have
DEFAULT_THRESHOLD = 1e-3  # `converged` when no tolerance was asked for

COSTS = {"euclidean": 0, "sqeuclidean": 1, "cosine": 2, "matrix": 3}


@triton.jit(do_not_specialize=["N", "M", "D", "ROW", "n_iters"])
def _sinkhorn_hadamard_forward(
    x,  # (B, N, D)
    y,  # (B, M, D)
    a,  # (B, N) or None
    b,  # (B, M) or None
    x_lengths,  # (B,) or None
    y_lengths,  # (B,) or None
    cost_matrix,  # (B, N, M) or None
    eps,  # (B,)
    x_to_y,  # (B, M, D) with rows ROW apart, as the five below; each may be None
    y_to_x,  # (B, N, D)
    x_hadamard,  # (B, N, D)
    y_hadamard,  # (B, M, D)
    x_copy,  # (B, N, D)
    y_copy,  # (B, M, D)
    paired_hadamard,  # (B, N, D), x * y
    f,  # (B, N)
    g,  # (B, M)
    plan,  # (B, N, M) or None
    transport_cost,  # (B,)
    error,  # (B,)
    iterations,  # (B,)
    converged,  # (B,), bytes
    scale,  # (B,)
    f_history,  # (B, n_iters, N) or None
    g_history,  # (B, n_iters, M) or None
    N,
    M,
    D,
    ROW,
    n_iters,
    cost_scale,  # None: the largest valid cost
    tol,  # None: no early stop
    threshold,
    inverse_rho_x,
    inverse_rho_y,
    COST: tl.constexpr,
    ABSORB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_M: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    i = index(BLOCK_N, WARPS_N, 4)
    j = index(BLOCK_M, WARPS_M, 8)
    n = N
    m = M
    if x_lengths is not None:
        n = tl.minimum(tl.load(x_lengths + problem), N)
    if y_lengths is not None:
        m = tl.minimum(tl.load(y_lengths + problem), M)
    empty = (n <= 0) | (m <= 0)  # nothing to transport: every row counts as padding
    n = tl.where(empty, 0, n)
    m = tl.where(empty, 0, m)
    remaining = tl.where(empty, 0, n_iters)
    valid_i = i < n
    valid_j = j < m
    x += problem * N * D
    y += problem * M * D
    if cost_matrix is not None:
        cost_matrix += problem * N * M
    if a is not None:
        a += problem * N
    if b is not None:
        b += problem * M

    c = cost_tile(x, y, cost_matrix, i, j, valid_i, valid_j, m, M, D, COST)
    valid = spread(valid_i, True) & spread(valid_j, False)
    if cost_scale is None:
        largest = max_vector(max_tile(tl.where(valid, c, 0.0), True), True)
        divisor = tl.maximum(largest, SMALLEST_SCALE)
    else:
        divisor = cost_scale * 1.0
    epsilon = tl.load(eps + problem)
    unit = epsilon * LN2  # of the potentials and of c, below
    nothing = tl.minimum(epsilon, 0.0)
    c = tl.where(valid, c / divisor / unit, float("inf"))
    log_a = log2_weights(a, i, valid_i, n)
    log_b = log2_weights(b, j, valid_j, m)
    damp_x = 1.0 / (1.0 + epsilon * inverse_rho_x)
    damp_y = 1.0 / (1.0 + epsilon * inverse_rho_y)

    f_now = tl.zeros_like(log_a)
    g_now = tl.zeros_like(log_b)
    s = tl.zeros_like(log_b)
    if ABSORB:
        alpha = tl.zeros_like(log_a)
        beta = tl.zeros_like(log_b)
        K = tl.zeros_like(c)  # does not serve
        r, K, alpha, beta = absorbed_log_sum_exp(c, K, alpha, beta, g_now, valid_i, valid_j, nothing, True)
    else:
        r = log_sum_exp(c, g_now, f_now, valid_i, nothing, True)
    done = remaining * 0
    while done < remaining:
        f_now = tl.where(valid_i, log_a - damp_x * r, 0.0)
        if ABSORB:
            s, K, beta, alpha = absorbed_log_sum_exp(c, K, beta, alpha, f_now, valid_j, valid_i, nothing, False)
        else:
            s = log_sum_exp(c, f_now, s, valid_j, nothing, False)
        g_now = tl.where(valid_j, log_b - damp_y * s, 0.0)
        if ABSORB:
            r, K, alpha, beta = absorbed_log_sum_exp(c, K, alpha, beta, g_now, valid_i, valid_j, nothing, True)
        else:
            r = log_sum_exp(c, g_now, r, valid_i, nothing, True)
        if f_history is not None:
            step = problem * n_iters + done
            tl.store(f_history + step * N + i, f_now * unit, mask=i < N)
            tl.store(g_history + step * M + j, g_now * unit, mask=j < M)
        done += 1
        if tol is not None:
            gap = tl.abs(tl.exp2(f_now + r) - tl.exp2(log_a - damp_x * r + r))
            remaining = tl.where(sum_vector(tl.where(valid_i, gap, 0.0), True) <= tol, done, remaining)
    if ABSORB:  # the last column update again, without K: its sums cancel the rounding of f in what follows
        s = log_sum_exp(c, f_now, s, valid_j, nothing, False)
        g_now = tl.where(valid_j, log_b - damp_y * s, 0.0)
        r = log_sum_exp(c, g_now, r, valid_i, nothing, True)

    # Zero, which the compiler can't know: offsets and masks are made again here, not held in registers above.
    zero = tl.minimum(done, 0)
    i += zero
    j += zero
    valid_i = i < n
    valid_j = j < m
    valid = spread(valid_i, True) & spread(valid_j, False)
    gap = tl.abs(tl.exp2(f_now + r) - tl.exp2(log_a - damp_x * r + r))
    final_error = sum_vector(tl.where(valid_i, gap, 0.0), True)
    tl.store(error + problem, final_error)
    tl.store(converged + problem, (final_error <= threshold).to(tl.int8))
    tl.store(iterations + problem, done)
    tl.store(scale + problem, divisor)
    tl.store(f + problem * N + i, f_now * unit, mask=i < N)
    tl.store(g + problem * M + j, g_now * unit, mask=j < M)

    # P / b, in the order in which the rounding of f - c cancels. If y is balanced, that of s is all by which its sums
    # differ from one, and is divided out.
    to_y = tl.exp2((spread(f_now, True) - c) - spread(damp_y * s, False))
    sums = tl.where(valid_j & (inverse_rho_y == 0.0), sum_tile(to_y, False), 1.0)
    on_y = problem * M * ROW
    for d in range(D):
        x_d = tl.load(x + (i * D + d), mask=valid_i, other=0.0).to(tl.float32)
        y_d = tl.load(y + (j * D + d), mask=valid_j, other=0.0).to(tl.float32)
        moved = sum_tile(to_y * spread(x_d, True), False) / sums
        at_j = on_y + (j * ROW + d)
        store_vector(x_to_y, at_j, moved, j < M)
        store_vector(y_hadamard, at_j, y_d * moved, j < M)
        store_vector(y_copy, at_j, y_d, j < M)

    log_b = log2_weights(b, j, valid_j, m) - tl.log2(sums)  # read again, not held in registers above
    f_now += nothing  # see log_sum_exp
    probability = tl.exp2(((spread(f_now, True) - c) - spread(damp_y * s, False)) + spread(log_b, False))
    spent = probability * tl.where(valid, c, 0.0)
    tl.store(transport_cost + problem, sum_vector(sum_tile(spent, True), True) * unit)
    if plan is not None:
        store_tile(plan + problem * N * M, probability, i, j, N, M)

    f_now += nothing
    log_a = log2_weights(a, i, valid_i, n)
    to_x = (spread(f_now, True) - c) - spread(damp_y * s, False)
    to_x = tl.exp2((to_x + spread(log_b, False)) - spread(log_a, True))
    on_x = problem * N * ROW
    for d in range(D):
        x_d = tl.load(x + (i * D + d), mask=valid_i, other=0.0).to(tl.float32)
        y_d = tl.load(y + (j * D + d), mask=valid_j, other=0.0).to(tl.float32)
        moved = sum_tile(to_x * spread(y_d, False), True)
        at_i = on_x + (i * ROW + d)
        store_vector(y_to_x, at_i, moved, i < N)
        store_vector(x_hadamard, at_i, x_d * moved, i < N)
        store_vector(x_copy, at_i, x_d, i < N)
        if paired_hadamard is not None:
            partner = tl.load(y + (i * D + d), mask=valid_i, other=0.0).to(tl.float32)
            tl.store(paired_hadamard + at_i, x_d * partner, mask=i < N)


def tile_of(N: int, M: int, costs_per_warp: int = 1024) -> tuple[int, int, int, int]:
    """(rows, columns, warps along rows, warps along columns) of the program that holds an N x M problem."""
    rows, columns = (max(16, triton.next_power_of_2(size)) for size in (N, M))
    warps = min(8, max(1, rows * columns // costs_per_warp))
    # Patches near square: a thread also holds copies of the row and column vectors of its patch.
    warps_n = next(w for w in (1, 2, 4, 8) if w == warps or (rows // (4 * w)) <= columns // (8 * (warps // w)))
    return rows, columns, warps_n, warps // warps_n


def why_not(N: int, M: int) -> str | None:
    """None if the resident kernel holds an N x M problem, else the reason."""
    rows, columns, *_ = tile_of(N, M)
    if max(N, M) > MAX_POINTS or rows * columns > MAX_TILE:
        return (
            f"the triton kernel holds a problem in the registers of one program: at most {MAX_POINTS} points a side, "
            f"and at most {MAX_TILE} costs with both sides rounded up to powers of two; this one is {N} x {M}"
        )
    return None


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
    x_to_y: Tensor | None,
    y_to_x: Tensor | None,
    x_hadamard: Tensor | None,
    y_hadamard: Tensor | None,
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
    x_copy: Tensor | None = None,
    y_copy: Tensor | None = None,
    paired_hadamard: Tensor | None = None,
    row_stride: int | None = None,
) -> None:
    """Launch the resident forward; shapes and meaning as in ``ops/sinkhorn_hadamard.py``.

    ``x_copy``, ``y_copy`` and ``paired_hadamard``, x * y, complete a fused row (x and y of one shape). Inputs of any
    strides, outputs contiguous; those with features may be slices of one tensor with rows of ``row_stride``. x and y in
    fp32, fp16 or bf16; everything else in fp32 (int32 lengths and iterations, bool ``converged``). Histories beyond a
    problem's ``iterations`` are left unwritten. Nothing synchronises, and the launch depends on shapes only, so it can
    be captured in a CUDA graph.
    """
    B, N, D = x.shape
    M = y.shape[1]
    if (why := why_not(N, M)) is not None:
        raise ValueError(f"sinkhorn_hadamard: {why}.")
    if n_iters < 1:
        raise ValueError(f"sinkhorn_hadamard: `n_iters` must be at least 1; got {n_iters}.")
    if B == 0:
        return
    rows, columns, warps_n, warps_m = tile_of(N, M)
    inputs = (t if t is None else t.contiguous() for t in (x, y, a, b, x_lengths, y_lengths, cost_matrix, eps))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _sinkhorn_hadamard_forward[(B,)](
            *inputs,
            x_to_y,
            y_to_x,
            x_hadamard,
            y_hadamard,
            x_copy,
            y_copy,
            paired_hadamard,
            f,
            g,
            plan,
            transport_cost,
            error,
            iterations,
            converged.view(torch.int8),
            scale,
            f_history,
            g_history,
            N,
            M,
            D,
            D if row_stride is None else row_stride,
            n_iters,
            cost_scale if cost_scale is None else float(cost_scale),
            tol if tol is None else float(tol),
            DEFAULT_THRESHOLD if tol is None else float(tol),
            0.0 if rho_x is None else 1.0 / rho_x,
            0.0 if rho_y is None else 1.0 / rho_y,
            COST=COSTS[cost],
            ABSORB=rows * columns <= MAX_ABSORBED,
            BLOCK_N=rows,
            BLOCK_M=columns,
            WARPS_N=warps_n,
            WARPS_M=warps_m,
            **launch_options(warps_n * warps_m, MAX_REGISTERS, amd=torch.version.hip is not None),
        )


def specializations() -> Iterator[Specialization]:
    """What the launcher can ask for: every tile and cost in fp32, the largest tiles in fp16 and bf16 as well.

    With all optional arguments, which takes most registers; for one cost also with none of them, and as a fused row.
    """
    sizes, variants = (16, 32, 64, 128, 256), ("", " all options", " fused row")
    for N, M, dtype, cost, variant in itertools.product(sizes, sizes, ("fp32", "fp16", "bf16"), COSTS, variants):
        full, largest, plain = variant == " all options", N * M == MAX_TILE, (dtype, cost) == ("fp32", "euclidean")
        if why_not(N, M) is not None or not (plain or (full and (largest or dtype == "fp32" or cost == "euclidean"))):
            continue
        rows, columns, warps_n, warps_m = tile_of(N, M)
        optional = {
            **dict.fromkeys(("a", "b", "plan", "f_history", "g_history"), "*fp32"),
            **dict.fromkeys(("x_lengths", "y_lengths"), "*i32"),
            **dict.fromkeys(("tol", "cost_scale"), "fp32"),
        }
        products, parts = ("x_hadamard", "y_hadamard"), ("x_copy", "y_copy", "paired_hadamard")
        given, absent = (parts, products) if variant == " fused row" else (products, parts)
        yield Specialization(
            kernel=_sinkhorn_hadamard_forward,
            tile=f"{rows}x{columns} {dtype} {cost}{variant}",
            arguments={
                **dict.fromkeys(("x", "y", "x_to_y", "y_to_x", *given), f"*{dtype}"),
                **dict.fromkeys(("eps", "f", "g", "transport_cost", "error", "scale"), "*fp32"),
                **{"iterations": "*i32", "converged": "*i8"},
                **dict.fromkeys(("N", "M", "D", "ROW", "n_iters"), "i32"),
                **dict.fromkeys(("threshold", "inverse_rho_x", "inverse_rho_y"), "fp32"),
                **(optional if full else {}),
                **({"cost_matrix": "*fp32"} if cost == "matrix" else {}),
            },
            constants={
                **dict.fromkeys(absent),
                **({} if full else dict.fromkeys(optional)),
                **({} if cost == "matrix" else {"cost_matrix": None}),
                "ABSORB": rows * columns <= MAX_ABSORBED,
                **{"COST": COSTS[cost], "BLOCK_N": rows, "BLOCK_M": columns, "WARPS_N": warps_n, "WARPS_M": warps_m},
            },
            num_warps=warps_n * warps_m,
            max_registers=MAX_REGISTERS,
            quick=((N, M) == (128, 128) and (dtype == "fp32" or cost == "euclidean")) or (plain and (N, M) == (32, 32)),
        )
