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
Memory: p and q, the potentials in other units, and a few fp32 copies of the points. Time: 2 n_iters passes with two
exponentials an entry each, and 2 n_iters exponentials an entry in part 3, by rows and by columns, for each block of
features.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .sinkhorn_cost_gradient import (
    _sinkhorn_cost_gradient,
    _sinkhorn_eps_gradient,
    _sinkhorn_finish_points,
    _sinkhorn_points_gradient,
)
from .sinkhorn_sweep import (
    _sinkhorn_plan_sums,
    _sinkhorn_start_adjoint,
    _sinkhorn_sweep,
    _sinkhorn_sweep_update,
)
from .sinkhorn_tiles import COSTS, SIZES
from .sinkhorn_workspace import Side, Tiles, Workspace, compiled, over_tiles
from .specialization import Specialization

TINY = torch.finfo(torch.float32).tiny


@dataclass
class Adjoint:
    """What the backward keeps of one side, `side` being what the forward knows of it."""

    side: Side
    lag: int  # in iterations, of the potentials in the exponents of an iteration's weights
    history: Tensor | None  # (B, n_iters, size), in units of eps ln 2
    gradient: Tensor | None  # (B, size, padded features), of what is transported to these points
    hadamard: Tensor | None  # (B, size, D), of its product with them
    of_potential: Tensor | None  # (B, size)
    wide: Tensor | None  # (B, size, padded features): the points in fp32
    weights: Tensor | None  # (B, n_iters, size): q or p
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
        unrolled = history is not None
        weights = torch.empty_like(history) if unrolled else None
        hadamard, of_potential = (t if t is None else t.contiguous() for t in (hadamard, of_potential))
        # Divided here once and to the last bit: a division in the loops would take more time than the rest of them.
        history = (history / (w.eps * math.log(2.0))[:, None, None]).contiguous() if unrolled else None
        gradient = padded(sum(terms[1:], terms[0])) if terms else None
        wide = padded(side.points.float()) if unrolled else None
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
                w.project(a, b, a, b.points, own.transported)
            if other.gradient is not None:
                own.returned = torch.empty_like(a.points, dtype=torch.float32)
                w.project(a, b, b, other.gradient, own.returned)

    def start(self) -> None:
        """The gradients of the potentials through the final plan."""
        w, tiles = self.w, self.w.tiles
        through_plan = self.grad_plan is not None or self.grad_transport_cost is not None
        for own, other in ((self.x, self.y), (self.y, self.x)):
            a, b = own.side, other.side
            if through_plan:
                kernel, blocks = w.by_blocks(_sinkhorn_plan_sums, a, tiles.own, a.chunks)
                kernel(
                    *w.geometry(a, b, blocks), w.factors, w.eps, *w.exponents(a), self.grad_plan,
                    self.grad_transport_cost, a.partial, OWN_IS_X=a is w.x, **w.tile(_sinkhorn_plan_sums),
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

        def half_step(own: Adjoint, other: Adjoint, own_step: int, step: int, last: bool = False) -> None:
            w, tiles, a, b = self.w, self.w.tiles, own.side, other.side
            kernel, blocks = w.by_blocks(_sinkhorn_sweep, a, tiles.own, a.chunks)
            kernel(
                *w.geometry(a, b, blocks), w.factors, w.eps, self.iterations, own.history, other.history,
                a.log_weights, b.log_weights, other.weights, a.partial, a.sums, n_iters, own_step, step,
                a.inverse_rho, b.inverse_rho, LAST=last, **w.tile(_sinkhorn_sweep),
            )  # fmt: skip
            kernel, blocks = w.by_blocks(_sinkhorn_sweep_update, a, tiles.vector)
            kernel(
                a.partial, a.sums, a.counts, b.counts, a.log_weights, w.eps, self.iterations, own.history,
                own.adjoint, own.weights, own.log_gradient, own.damping_gradient, a.size, blocks, a.chunks, n_iters,
                own_step, step, a.inverse_rho, LAST=last, BLOCK=tiles.vector, CHUNK=tiles.chunk, **w.options,
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
            *(*self.w.exponents(a), own.gradient, other.gradient, own.wide, other.wide),
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
                *self.cost_arguments(own, other, blocks), through, OWN_IS_X=a is w.x, DETACHED=self.detached,
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
        if "OWN_IS_X" in kernel.arg_names:
            yield from over_tiles(kernel, types, " x", OWN_IS_X=True, own_rest=None, **modes)
            yield from over_tiles(kernel, types, " y", OWN_IS_X=False, other_rest=None, **modes)
        else:
            yield from over_tiles(kernel, types, **last, **modes)
    blocks = {"BLOCK": tiles.own, "DEPTH": tiles.depth}
    yield compiled(_sinkhorn_start_adjoint, str(tiles.own), types, {**blocks, "CHUNK": tiles.chunk})
    for cost in ("euclidean", "cosine"):
        yield compiled(_sinkhorn_finish_points, f"{tiles.own} {cost}", types, {"COST": COSTS[cost], **blocks})
    vectors = {"BLOCK": tiles.vector, "CHUNK": tiles.chunk}
    yield compiled(_sinkhorn_sweep_update, str(tiles.vector), types, {"LAST": False, **vectors})
    yield compiled(_sinkhorn_eps_gradient, str(tiles.vector), types, vectors)
