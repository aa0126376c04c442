"""Gradients of the resident Sinkhorn-Hadamard: one program per problem, one launch, from the stored potentials.

Derivation. With c = C / eps, F = f / eps, G = g / eps and dF, dG the gradients of F, G, an iteration backwards is

    dlog b_j += dG_j    dc_ij += W_ij dG_j    dF_i -= sum_j W_ij dG_j    W_ij = damp_y softmax_i(F_i - c_ij)
    dlog a_i += dF_i    dc_ij += V_ij dF_i    dG_j  = -sum_i V_ij dF_i   V_ij = damp_x softmax_j(G_j - c_ij)

with the F of this iteration and the G of the one before. (Potentials and c are kept in units of eps ln 2, as in the
forward; gradients are with respect to F, G and c above.)

*No exponentials of the tile* in the iteration: sinkhorn_resident_adjoint.py.

*Gradients of the plan.* With A_ij = <dy_to_x_i, y_j> and B_ij = <x_i, dx_to_y_j>, d log P = A P/a + B P/b + dP P. What
reaches F through A cancels in log a (P/a does not depend on it): it is kept apart, so that the gradient of a small
weight is no difference of large numbers. Likewise B and log b.

*Registers.* Three tiles are held at a time: c, A, B at first; c, K and dc in the loop; in the end P/a, P/b and dc, from
which one pass over the features writes dx and dy.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sinkhorn_hadamard import COSTS, MAX_POINTS, MAX_REGISTERS, tile_of
from .sinkhorn_resident import (
    COSINE,
    EUCLIDEAN,
    LN2,
    MATRIX,
    TINY,
    advance,
    cost_tile,
    index,
    inverse_norms,
    load_tile,
    load_vector,
    log2_weights,
    log_sum_exp,
    spread,
    spread_inside,
    store_tile,
    sum_across,
    sum_inside,
    sum_tile,
    sum_vector,
)
from .sinkhorn_resident_adjoint import unroll
from .specialization import Specialization, launch_options

MAX_TILE = 64 * 64  # costs of a problem whose three tiles the registers of one program hold
COSTS_PER_WARP = 512


@triton.jit
def transported(direct, hadamard, point, index, valid):
    """The gradient of a projection: its own, and that of its product with the points."""
    gradient = load_vector(direct, index, valid)
    if hadamard is not None:
        gradient += point * load_vector(hadamard, index, valid)
    return gradient


@triton.jit
def computed(tile, once):
    """The same tile, from a loop of one step. Else its last operation would be put off, and all operands held."""
    for _ in range(once):
        tile += 0.0
    return tile


@triton.jit
def finite(c):
    """The costs, zero instead of infinity in the padding."""
    return tl.where(c < float("inf"), c, 0.0)


@triton.jit
def store_weights(gradient, weights, dlog, index, valid, size):
    """From the gradient of a weight's logarithm; zero where the weight is below the floor."""
    if gradient is not None:
        weight = tl.load(weights + index, mask=valid, other=0.0).to(tl.float32)
        floored = weight < TINY
        tl.store(gradient + index, tl.where(floored, 0.0, dlog / tl.where(floored, 1.0, weight)), mask=index < size)


@triton.jit(do_not_specialize=["N", "M", "D", "ROW", "n_iters"])
def _sinkhorn_hadamard_backward(
    x,  # (B, N, D)
    y,  # (B, M, D)
    a,  # (B, N) or None
    b,  # (B, M) or None
    x_lengths,  # (B,) or None
    y_lengths,  # (B,) or None
    cost_matrix,  # (B, N, M) or None
    eps,  # (B,)
    f,  # (B, N)
    scale,  # (B,)
    iterations,  # (B,)
    f_history,  # (B, n_iters, N), None unless UNROLL
    g_history,  # (B, n_iters, M), None unless UNROLL
    grad_x_to_y,  # gradients of the outputs, each may be None; the seven with features have rows ROW apart
    grad_y_to_x,
    grad_x_hadamard,
    grad_y_hadamard,
    grad_x_copy,
    grad_y_copy,
    grad_paired_hadamard,
    grad_f,
    grad_g,
    grad_plan,
    grad_transport_cost,
    dx,  # gradients of the inputs, each may be None
    dy,
    dcost_matrix,
    da,
    db,
    deps,
    N,
    M,
    D,
    ROW,
    n_iters,
    inverse_rho_x,
    inverse_rho_y,
    UNROLL: tl.constexpr,  # some gradient through the iteration is wanted
    THROUGH_COST: tl.constexpr,  # some gradient of the cost is wanted, and there is one
    COST: tl.constexpr,
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
    empty = (n <= 0) | (m <= 0)
    n = tl.where(empty, 0, n)
    m = tl.where(empty, 0, m)
    valid_i = i < n
    valid_j = j < m
    valid = spread(valid_i, True) & spread(valid_j, False)
    on_x = problem * N * D
    on_y = problem * M * D
    on_pairs = problem * N * M
    x += on_x
    y += on_y
    TO_X: tl.constexpr = (grad_y_to_x is not None) or (grad_x_hadamard is not None)
    TO_Y: tl.constexpr = (grad_x_to_y is not None) or (grad_y_hadamard is not None)
    if cost_matrix is not None:
        cost_matrix += on_pairs
    if a is not None:
        a += problem * N
    if b is not None:
        b += problem * M
    grad_y_to_x = advance(grad_y_to_x, problem * N * ROW)
    grad_x_hadamard = advance(grad_x_hadamard, problem * N * ROW)
    grad_x_copy = advance(grad_x_copy, problem * N * ROW)
    grad_paired_hadamard = advance(grad_paired_hadamard, problem * N * ROW)
    grad_x_to_y = advance(grad_x_to_y, problem * M * ROW)
    grad_y_hadamard = advance(grad_y_hadamard, problem * M * ROW)
    grad_y_copy = advance(grad_y_copy, problem * M * ROW)

    divisor = tl.load(scale + problem)
    epsilon = tl.load(eps + problem)
    unit = epsilon * LN2  # of the potentials and of c, below
    # Zeros that the compiler can't know. Added to what is used again, they keep it from holding what follows (a tile of
    # F - c, say) in registers till then.
    zero = tl.minimum(N, 0)
    nothing = tl.minimum(epsilon, 0.0)
    damp_x = 1.0 / (1.0 + epsilon * inverse_rho_x)
    damp_y = 1.0 / (1.0 + epsilon * inverse_rho_y)
    c = cost_tile(x, y, cost_matrix, i, j, valid_i, valid_j, m, M, D, COST)
    c = tl.where(valid, c / divisor / unit, float("inf"))
    # The last F is as stored; G follows by one more update, whose sums cancel the rounding of F.
    F = load_vector(f + problem * N, i, valid_i) / unit
    minus_s = -damp_y * log_sum_exp(c, F, tl.zeros_like(j).to(tl.float32), valid_j, nothing, False)
    direct = epsilon * 0.0
    if grad_transport_cost is not None:
        direct = tl.load(grad_transport_cost + problem) * epsilon
    direct = tl.where(empty, 0.0, direct)
    through_eps = epsilon * 0.0
    dc = tl.zeros_like(c)
    if UNROLL:
        F += nothing
        once = tl.minimum(N, 1)
        G = tl.where(valid_j, minus_s + log2_weights(b, j, valid_j, m), 0.0)
        dF = load_vector(grad_f if grad_f is None else grad_f + problem * N, i, valid_i)
        dG = load_vector(grad_g if grad_g is None else grad_g + problem * M, j, valid_j)
        through_eps += (sum_vector(dF * F, True) + sum_vector(dG * G, False)) * LN2
        dF *= epsilon
        dG *= epsilon
        extra_i = tl.zeros_like(dF)
        extra_j = tl.zeros_like(dG)
        if (grad_plan is not None) or (grad_transport_cost is not None):
            if grad_plan is not None:
                dc -= load_tile(grad_plan + on_pairs, i, j, valid_i, m, M)
            if grad_transport_cost is not None:
                dc -= finite(c) * (direct * LN2)
            dc *= tl.exp2((spread(F, True) - c) + spread(G, False))
            dF -= sum_tile(dc, True)
            dG -= sum_tile(dc, False)
        if TO_Y:
            A = tl.zeros_like(c)
            F += nothing
            dc = computed(dc, once)
            for d in range(D):
                y_d = load_vector(y, j * D + d, valid_j)
                to_y_d = transported(grad_x_to_y, grad_y_hadamard, y_d, j * ROW + d, valid_j)
                A += spread(load_vector(x, i * D + d, valid_i), True) * spread(to_y_d, False)
            A *= tl.exp2((spread(F, True) - c) + spread(minus_s, False))
            dF += sum_tile(A, True)
            extra_j = sum_tile(A, False)
            dc -= A
        if TO_X:
            A = tl.zeros_like(c)
            dc = computed(dc, once)
            for d in range(D):
                x_d = load_vector(x, i * D + d, valid_i)
                to_x_d = transported(grad_y_to_x, grad_x_hadamard, x_d, i * ROW + d, valid_i)
                A += spread(to_x_d, True) * spread(load_vector(y, j * D + d, valid_j), False)
            A *= tl.exp2((spread(F - log2_weights(a, i, valid_i, n), True) - c) + spread(G, False))
            extra_i = sum_tile(A, True)
            dG += sum_tile(A, False)
            dc -= A
    if UNROLL:
        steps = tl.where(empty, 0, tl.load(iterations + problem))
        f_history += problem * n_iters * N
        g_history += problem * n_iters * M
        dc, dlog_a, dlog_b, ddamp_x, ddamp_y = unroll(
            c, dc, dF, dG, extra_i, extra_j, f_history, g_history, steps,
            i, j, valid_i, valid_j, m, N, M, unit, damp_x, damp_y, nothing,
        )  # fmt: skip
        c += nothing
        i += zero
        j += zero
        valid_i = i < n
        valid_j = j < m
        store_weights(da if da is None else da + problem * N, a, dlog_a, i, valid_i, N)
        store_weights(db if db is None else db + problem * M, b, dlog_b, j, valid_j, M)
        if deps is not None:
            through_c = sum_vector(sum_tile(dc * finite(c), True), True) * LN2
            through_eps -= through_c / epsilon
            through_eps -= inverse_rho_x * damp_x * damp_x * ddamp_x + inverse_rho_y * damp_y * damp_y * ddamp_y
            tl.store(deps + problem, through_eps)

    F = load_vector(f + problem * N, i, valid_i) / unit
    if THROUGH_COST:
        if grad_transport_cost is not None:
            G = tl.where(valid_j, minus_s + log2_weights(b, j, valid_j, m), 0.0)
            dc += direct * tl.exp2((spread(F, True) - c) + spread(G, False))
        dc = dc / epsilon / divisor  # the gradient of the cost before it is scaled
        if dcost_matrix is not None:
            store_tile(dcost_matrix + on_pairs, dc, i, j, N, M)
    if (dx is not None) or (dy is not None):
        BY_POINTS: tl.constexpr = THROUGH_COST and COST != MATRIX
        inverse_x = tl.zeros_like(F)
        inverse_y = tl.zeros_like(minus_s)
        along_x = tl.zeros_like(F)
        along_y = tl.zeros_like(minus_s)
        if BY_POINTS:
            if COST == COSINE:
                inverse_x = inverse_norms(x, i, valid_i, D)
                inverse_y = inverse_norms(y, j, valid_j, D)
                A = dc * (1.0 - finite(c) * (unit * divisor))
                along_x = sum_tile(A, True)
                along_y = sum_tile(A, False)
            elif COST == EUCLIDEAN:
                dc = tl.where(c > 0.0, dc / tl.where(c > 0.0, c * (unit * divisor), 1.0), 0.0)
            else:
                dc += dc
        T = tl.exp2(
            (spread(F - log2_weights(a, i, valid_i, n), True) - c)
            + spread(tl.where(valid_j, minus_s + log2_weights(b, j, valid_j, m), 0.0), False)
        )
        U = tl.exp2((spread(F, True) - c) + spread(minus_s, False))
        for d in range(D):
            at_i = i * ROW + d
            at_j = j * ROW + d
            x_d = load_vector(x, i * D + d, valid_i)
            y_d = load_vector(y, j * D + d, valid_j)
            part_x = tl.zeros_like(sum_inside(c, True))
            part_y = tl.zeros_like(sum_inside(c, False))
            if TO_X:
                part_y += sum_inside(
                    T * spread(transported(grad_y_to_x, grad_x_hadamard, x_d, at_i, valid_i), True), False
                )
            if grad_x_hadamard is not None:
                had = load_vector(grad_x_hadamard, at_i, valid_i)
                part_x += sum_inside(T * spread(y_d, False), True) * spread_inside(had, True)
            if TO_Y:
                part_x += sum_inside(
                    U * spread(transported(grad_x_to_y, grad_y_hadamard, y_d, at_j, valid_j), False), True
                )
            if grad_y_hadamard is not None:
                had = load_vector(grad_y_hadamard, at_j, valid_j)
                part_y += sum_inside(U * spread(x_d, True), False) * spread_inside(had, False)
            if BY_POINTS:
                if COST == COSINE:
                    part_x -= sum_inside(dc * spread(y_d * inverse_y, False), True) * spread_inside(inverse_x, True)
                    part_y -= sum_inside(dc * spread(x_d * inverse_x, True), False) * spread_inside(inverse_y, False)
                else:
                    moved = dc * (spread(x_d, True) - spread(y_d, False))
                    part_x += sum_inside(moved, True)
                    part_y -= sum_inside(moved, False)
            dx_d = sum_across(part_x, True)
            dy_d = sum_across(part_y, False)
            if COST == COSINE:
                dx_d += along_x * inverse_x * inverse_x * x_d
                dy_d += along_y * inverse_y * inverse_y * y_d
            if dx is not None:
                dx_d += load_vector(grad_x_copy, at_i, valid_i)
                if grad_paired_hadamard is not None:
                    partner = load_vector(y, i * D + d, valid_i)
                    dx_d += load_vector(grad_paired_hadamard, at_i, valid_i) * partner
                tl.store(dx + on_x + (i * D + d), dx_d, mask=i < N)
            if dy is not None:
                dy_d += load_vector(grad_y_copy, at_j, valid_j)
                if grad_paired_hadamard is not None:
                    partner = load_vector(x, j * D + d, valid_j)
                    dy_d += load_vector(grad_paired_hadamard, at_j, valid_j) * partner
                tl.store(dy + on_y + (j * D + d), dy_d, mask=j < M)


def why_not(N: int, M: int) -> str | None:
    """None if the resident backward holds an N x M problem, else the reason."""
    rows, columns, *_ = tile_of(N, M, COSTS_PER_WARP)
    if max(N, M) > MAX_POINTS or rows * columns > MAX_TILE:
        return (
            f"the triton backward holds three tiles of a problem in the registers of one program: at most {MAX_POINTS} "
            f"points a side, and at most {MAX_TILE} costs with both sides rounded up to powers of two; this one is "
            f"{N} x {M}"
        )
    return None


def _contiguous(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


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
    grad_x_copy: Tensor | None = None,
    grad_y_copy: Tensor | None = None,
    grad_paired_hadamard: Tensor | None = None,
    row_stride: int | None = None,
) -> None:
    """Launch the resident backward, "unrolled" or "detached"; arguments as of ``reference.sinkhorn_hadamard.backward``.

    The gradients of x, y and x * y as parts of a fused row are added to ``dx`` and ``dy``. Inputs of any strides, but
    with ``row_stride`` the seven gradients with features are slices of one contiguous tensor with rows of that size;
    outputs contiguous. Nothing synchronises, and the launch depends on shapes and on which arguments are None only, so
    it can be captured in a CUDA graph. No memory is needed besides the gradients.
    """
    B, N, D = x.shape
    M = y.shape[1]
    if (why := why_not(N, M)) is not None:
        raise ValueError(f"sinkhorn_hadamard: {why}.")
    if gradient not in ("unrolled", "detached"):
        raise ValueError(f"sinkhorn_hadamard: the triton backward is for 'unrolled' and 'detached'; got {gradient!r}.")
    cost_wanted = dcost_matrix is not None or (cost != "matrix" and (dx is not None or dy is not None))
    unrolled = gradient == "unrolled" and (cost_wanted or any(t is not None for t in (da, db, deps)))
    through_cost = unrolled or (cost_wanted and grad_transport_cost is not None)
    if not unrolled:
        for target in (da, db, deps):
            if target is not None:
                target.zero_()
        da = db = deps = f_history = g_history = grad_f = grad_g = grad_plan = None
    if not through_cost and dcost_matrix is not None:
        dcost_matrix.zero_()
    if B == 0 or all(t is None for t in (dx, dy, dcost_matrix, da, db, deps)):
        return
    rows, columns, warps_n, warps_m = tile_of(N, M, COSTS_PER_WARP)
    inputs = (x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, f, scale, iterations, f_history, g_history)
    given = (grad_x_to_y, grad_y_to_x, grad_x_hadamard, grad_y_hadamard)
    given += (grad_x_copy, grad_y_copy, grad_paired_hadamard)
    if row_stride is None:
        given = _contiguous(given)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _sinkhorn_hadamard_backward[(B,)](
            *_contiguous(inputs),
            *given,
            *_contiguous((grad_f, grad_g, grad_plan, grad_transport_cost)),
            dx,
            dy,
            dcost_matrix,
            da,
            db,
            deps,
            N,
            M,
            D,
            D if row_stride is None else row_stride,
            0 if f_history is None else f_history.shape[1],
            0.0 if rho_x is None else 1.0 / rho_x,
            0.0 if rho_y is None else 1.0 / rho_y,
            UNROLL=unrolled,
            THROUGH_COST=through_cost,
            COST=COSTS[cost],
            BLOCK_N=rows,
            BLOCK_M=columns,
            WARPS_N=warps_n,
            WARPS_M=warps_m,
            **launch_options(warps_n * warps_m, MAX_REGISTERS, amd=torch.version.hip is not None),
        )


def specializations() -> Iterator[Specialization]:
    """What training asks for: square and oblong tiles, with every gradient and with those of x and y alone."""
    # Gradients of every output, weights and lengths; or as layers use the op.
    variants = {
        "everything": ("fp32", True, True),
        "plain": ("fp32", True, False),
        "plain bf16": ("bf16", True, False),
        "fused row": ("fp32", True, False),
        "detached": ("fp32", False, False),
    }
    sizes = ((32, 32), (64, 64), (128, 32), (32, 128))
    for (N, M), cost, (variant, (dtype, unrolled, full)) in itertools.product(sizes, COSTS, variants.items()):
        if ((N, M) != (64, 64) or variant != "everything") and cost != "euclidean":
            continue
        if (N, M) != (64, 64) and variant not in ("everything", "plain", "fused row"):
            continue
        rows, columns, warps_n, warps_m = tile_of(N, M, COSTS_PER_WARP)
        pointers = dict.fromkeys(("x", "y", "dx", "dy"), f"*{dtype}")
        products, parts = ("x_hadamard", "y_hadamard"), ("x_copy", "y_copy", "paired_hadamard")
        given = ("x_to_y", "y_to_x", *(parts if variant == "fused row" else products))
        pointers |= dict.fromkeys([f"grad_{name}" for name in given], f"*{dtype}")
        pointers |= dict.fromkeys(("eps", "f", "scale"), "*fp32") | {"iterations": "*i32"}
        optional = dict.fromkeys(("a", "b", "da", "db", "deps", "grad_f", "grad_g", "grad_plan"), "*fp32")
        optional |= dict.fromkeys(("x_lengths", "y_lengths"), "*i32") | {"grad_transport_cost": "*fp32"}
        histories = dict.fromkeys(("f_history", "g_history"), "*fp32")
        matrices = dict.fromkeys(("cost_matrix", "dcost_matrix"), "*fp32")
        present = pointers | (optional if full else {}) | (histories if unrolled else {})
        present |= matrices if cost == "matrix" else {}
        absent = {f"grad_{name}" for name in (*products, *parts)} | optional.keys() | histories.keys() | matrices.keys()
        absent -= present.keys()
        yield Specialization(
            kernel=_sinkhorn_hadamard_backward,
            tile=f"{rows}x{columns} {cost} {variant}",
            arguments={
                **present,
                **dict.fromkeys(("N", "M", "D", "ROW", "n_iters"), "i32"),
                **dict.fromkeys(("inverse_rho_x", "inverse_rho_y"), "fp32"),
            },
            constants={
                **dict.fromkeys(absent),
                **{"UNROLL": unrolled, "THROUGH_COST": unrolled},
                **{"COST": COSTS[cost], "BLOCK_N": rows, "BLOCK_M": columns, "WARPS_N": warps_n, "WARPS_M": warps_m},
            },
            num_warps=warps_n * warps_m,
            max_registers=MAX_REGISTERS,
            quick=full and ((N, M) == (32, 32) or cost in ("euclidean", "matrix")),
        )
