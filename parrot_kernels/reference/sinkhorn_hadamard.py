"""Entropic optimal transport with transported features, in plain PyTorch and in the log domain.

With scaled potentials u = f / eps, v = g / eps and K = C / eps, from v = 0, n_iters times (or until the error of a
problem is at most tol; each problem stops by itself):

    u_i = log a_i - t_x R_i,  R_i = LSE_j(v_j - K_ij)        v_j = log b_j - t_y S_j,  S_j = LSE_i(u_i - K_ij)

with damping t = 1 (balanced marginals) or t = 1 / (1 + eps / rho). Then

    P_ij = exp(u_i - K_ij + v_j)        y_to_x_i = sum_j P_ij / a_i y_j        x_to_y_j = sum_i P_ij / b_j x_i
    error = sum_i |r_i - r+_i|,  r_i = sum_j P_ij the row sums and r+_i = a_i exp((1 - t_x) R_i) those after one more u

P / b is computed as exp((u_i - K_ij) + w_j), w = v - log b = -t_y S, where the rounding of S cancels: the columns of a
balanced plan sum to b, and x_to_y averages the x, for any eps. Sources: Cuturi 2013 (arXiv 1306.0895); Chizat et al.
2018 (arXiv 1607.05816) for the damped updates; Schmitzer 2019 (arXiv 1610.06519) for the log domain.

`sinkhorn_hadamard` is differentiable by autograd: the oracle. `forward` and `backward` are its explicit pair. The
adjoint of v = log b - t_y S with weights W_ij = softmax_i(u_i - K_ij), and likewise of u, is

    d log b_j += dv_j    dt_y -= <dv, S>    dK_ij += t_y W_ij dv_j    du_i -= sum_j t_y W_ij dv_j

The weights are recomputed from the stored potentials: the backward holds a few (B, N, M) tensors, never (K, N, M).
The implicit derivative replaces the loop by one adjoint step from multipliers that solve the linearised fixed point.

Every problem is computed by itself: no result depends on the other problems of the batch, bit for bit on a CPU
(products run problem by problem, since a batched one may round differently), except where a problem alone in its
batch has one row or column of more than 32768 entries, whose sum PyTorch then splits over threads.
Shapes as in `parrot_kernels.ops.sinkhorn_hadamard`, always batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SCALE = 1e-8  # the least cost scale: below it all points of a problem count as equal
CONVERGED = 1e-3  # error up to which a problem counts as converged when no tolerance is asked for
_RIDGE = 1e-12  # keeps the fp64 system of the implicit gradient regular where the plan splits into components


class Outputs(NamedTuple):
    """What the launch contract calls its outputs, without the histories."""

    x_to_y: Tensor
    y_to_x: Tensor
    x_hadamard: Tensor
    y_hadamard: Tensor
    f: Tensor
    g: Tensor
    plan: Tensor
    transport_cost: Tensor
    error: Tensor
    iterations: Tensor
    converged: Tensor
    scale: Tensor


def sinkhorn_hadamard(
    *,
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    cost_matrix: Tensor | None = None,
    eps: Tensor,
    cost: str = "euclidean",
    cost_scale: float | None = None,
    n_iters: int = 50,
    tol: float | None = None,
    rho_x: float | None = None,
    rho_y: float | None = None,
    gradient: str = "unrolled",
    record: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Outputs:
    """Differentiable in the three gradient modes.

    Args: as the launch contract, with ``eps`` (B,) in the compute dtype.
        record: called as ``record(k, f, g)`` with the potentials after iteration k = 0, 1, ...
    """
    p = _Problem(x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, cost, cost_scale, rho_x, rho_y)
    enabled = torch.is_grad_enabled()
    with torch.set_grad_enabled(enabled and gradient == "unrolled"):
        u, v, w, row_lse, iterations = _iterate(p, n_iters, tol, record)
    with torch.set_grad_enabled(enabled and gradient != "detached"):
        if gradient == "implicit":
            u, v, w = _differentiate_fixed_point(p, u, v, w)
        plan, to_x, to_y = p.plans(u, w)
        f, g = p.potentials(u, v)
    y_to_x, x_to_y = _bmm(to_x, p.y), _bmm(to_y.mT, p.x)
    error = p.error(u, row_lse).detach()
    return Outputs(
        x_to_y=x_to_y.to(x.dtype),
        y_to_x=y_to_x.to(x.dtype),
        x_hadamard=(p.x * y_to_x).to(x.dtype),
        y_hadamard=(p.y * x_to_y).to(x.dtype),
        f=f,
        g=g,
        plan=plan,
        transport_cost=_sum(plan * p.cost),
        error=error,
        iterations=iterations,
        converged=error <= (CONVERGED if tol is None else tol),
        scale=p.scale,
    )


@torch.no_grad()
def forward(*, f_history: Tensor | None, g_history: Tensor | None, **arguments: Any) -> None:
    """Fill the outputs, preallocated and named as the fields of `Outputs`; ``plan`` may be None.

    Args:
        f_history, g_history: (B, K, N) and (B, K, M) receive the potentials after each iteration, or None. What lies
            past a problem's iterations is unspecified.
        arguments: the outputs, and the inputs and options of `sinkhorn_hadamard`.
    """
    targets = {name: arguments.pop(name) for name in Outputs._fields}

    def record(k: int, f: Tensor, g: Tensor) -> None:
        f_history[:, k], g_history[:, k] = f, g

    result = sinkhorn_hadamard(**arguments, record=None if f_history is None else record)
    for target, value in zip(targets.values(), result, strict=True):
        if target is not None:
            target.copy_(value)


@torch.no_grad()
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
) -> None:
    """Fill the gradients ``d*`` of the inputs of `forward` that are asked for.

    Args:
        f, g, scale, iterations, f_history, g_history: outputs of the forward; histories for "unrolled" only.
        grad_*: gradients of its outputs; None stands for zero. With "detached" those of f, g and plan are not read.
    """
    p = _Problem(x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, cost, scale, rho_x, rho_y)
    u = p.scaled(f, p.active_rows)
    v, w = p.update_y(p.col_lse(u))  # not from g / eps, which would not cancel the rounding of u
    plan, to_x, to_y = p.plans(u, w)

    def wide(gradient: Tensor | None, like: Tensor, valid: Tensor | None) -> Tensor:
        return torch.zeros_like(like) if gradient is None else _fill(gradient.to(like.dtype), valid, 0)

    grad_y_to_x, grad_x_hadamard = (wide(t, p.x, _last(p.rows)) for t in (grad_y_to_x, grad_x_hadamard))
    grad_x_to_y, grad_y_hadamard = (wide(t, p.y, _last(p.cols)) for t in (grad_x_to_y, grad_y_hadamard))
    grad_cost = wide(grad_transport_cost, p.eps, p.live)[:, None, None]
    x_gradient = grad_x_hadamard * _bmm(to_x, p.y)
    y_gradient = grad_y_hadamard * _bmm(to_y.mT, p.x)
    grad_y_to_x = grad_y_to_x + p.x * grad_x_hadamard
    grad_x_to_y = grad_x_to_y + p.y * grad_y_hadamard
    x_gradient += _bmm(to_y, grad_x_to_y)
    y_gradient += _bmm(to_x.mT, grad_y_to_x)
    cost_gradient = grad_cost * plan
    through_cost = gradient != "detached" or grad_transport_cost is not None

    if gradient != "detached":
        row_part = _bmm(grad_y_to_x, p.y.mT) * to_x
        col_part = _bmm(p.x, grad_x_to_y.mT) * to_y
        log_plan = row_part + col_part + (grad_cost * p.cost + wide(grad_plan, plan, p.pairs)) * plan
        grad_f, grad_g = wide(grad_f, u, p.rows), wide(grad_g, v, p.cols)
        du = log_plan.sum(2) + grad_f * p.eps[:, None]
        dv = log_plan.sum(1) + grad_g * p.eps[:, None]
        adjoint = _Adjoint(p, -log_plan, -row_part.sum(2), -col_part.sum(1))
        if gradient == "implicit":
            du, dv = _fixed_point_multipliers(p, u, v, du, dv)
            adjoint.update_x(du, v)
            adjoint.update_y(dv, u)
        else:
            adjoint.unroll(du, dv, iterations, f_history, g_history)
        cost_gradient += adjoint.k / p.eps[:, None, None]
        if deps is not None:
            u, v = (_fill(t, valid, 0) for t, valid in ((u, p.rows), (v, p.cols)))
            deps.copy_((grad_f * u).sum(1) + (grad_g * v).sum(1) + adjoint.eps())
        for target, weights, log_gradient, valid in ((da, a, adjoint.log_a, p.rows), (db, b, adjoint.log_b, p.cols)):
            if target is not None:
                floored = weights < torch.finfo(weights.dtype).tiny
                target.copy_(_fill((log_gradient / weights).masked_fill(floored, 0), valid, 0))
    else:
        for target in (da, db, deps):
            if target is not None:
                target.zero_()

    cost_gradient = _fill(cost_gradient / p.scale[:, None, None], p.pairs, 0)
    if dcost_matrix is not None:
        dcost_matrix.copy_(cost_gradient)
    if through_cost and cost != "matrix" and (dx is not None or dy is not None):
        through_x, through_y = _pairwise_backward(cost_gradient, p.x, p.y, p.cost * p.scale[:, None, None], cost)
        x_gradient += through_x
        y_gradient += through_y
    if dx is not None:
        dx.copy_(_fill(x_gradient, _last(p.rows), 0))
    if dy is not None:
        dy.copy_(_fill(y_gradient, _last(p.cols), 0))


class _Problem:
    """The inputs in the compute dtype and the half-steps on them.

    Padding is cut off by potentials of -inf; its features, costs and weights are replaced, never read. A problem
    without rows or without columns runs as if its zeroed rows and columns were valid, so that nothing divides by
    zero; its outputs are cleared. Masks are True at what counts, None when everything does: ``rows`` and ``cols``
    in the results, ``active_rows`` and ``active_cols`` in the iteration.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        x_lengths: Tensor | None,
        y_lengths: Tensor | None,
        cost_matrix: Tensor | None,
        eps: Tensor,
        cost: str,
        scale: float | Tensor | None,
        rho_x: float | None,
        rho_y: float | None,
    ) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.rows = self.cols = self.active_rows = self.active_cols = self.pairs = self.live = None
        if x_lengths is not None or y_lengths is not None:
            rows, cols = _valid(x, x_lengths), _valid(y, y_lengths)
            self.live = rows.any(1) & cols.any(1)
            self.rows, self.cols = rows & self.live[:, None], cols & self.live[:, None]
            self.active_rows, self.active_cols = (t | ~self.live[:, None] for t in (self.rows, self.cols))
            self.pairs = self.rows[:, :, None] & self.cols[:, None]
        self.x, self.y = _fill(x.to(dtype), _last(self.rows), 0), _fill(y.to(dtype), _last(self.cols), 0)
        self.log_a, self.log_b = _log_weights(a, self.x, self.rows), _log_weights(b, self.y, self.cols)

        raw = _pairwise(self.x, self.y, cost) if cost_matrix is None else _fill(cost_matrix.to(dtype), self.pairs, 0)
        if scale is None:
            scale = _fill(raw.detach(), self.pairs, 0).amax((1, 2)).clamp(min=MIN_SCALE)
        self.scale = scale if isinstance(scale, Tensor) else torch.full_like(eps, scale)
        self.eps = eps
        self.cost = raw / self.scale[:, None, None]
        self.k = self.cost / eps[:, None, None]
        self.rho = rho_x, rho_y
        self.damping_x, self.damping_y = (1.0 if r is None else (r / (r + eps))[:, None] for r in self.rho)

    def row_lse(self, v: Tensor) -> Tensor:
        return torch.logsumexp(v[:, None] - self.k, 2)

    def col_lse(self, u: Tensor) -> Tensor:
        return torch.logsumexp(u[:, :, None] - self.k, 1)

    def update_x(self, row_lse: Tensor) -> Tensor:
        return _fill(self.log_a - self.damping_x * row_lse, self.active_rows, -torch.inf)

    def update_y(self, col_lse: Tensor) -> tuple[Tensor, Tensor]:
        """v and w = v - log b."""
        w = _fill(-self.damping_y * col_lse, self.active_cols, -torch.inf)
        return self.log_b + w, w

    def scaled(self, potential: Tensor, active: Tensor | None) -> Tensor:
        return _fill(potential / self.eps[:, None], active, -torch.inf)

    def potentials(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """f and g, zero at padding."""
        return self.eps[:, None] * _fill(u, self.rows, 0), self.eps[:, None] * _fill(v, self.cols, 0)

    def error(self, u: Tensor, row_lse: Tensor) -> Tensor:
        after = torch.exp(self.log_a + (1 - self.damping_x) * row_lse)
        return _fill(torch.exp(u + row_lse) - after, self.rows, 0).abs().sum(1)

    def plans(self, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P, P / a and P / b, in the log domain: a weight may be too small to divide by."""
        log_to_y = (u[:, :, None] - self.k) + w[:, None]
        log_plan = log_to_y + self.log_b[:, None]
        to_x = (log_plan - self.log_a[:, :, None]).exp()
        return _fill(log_plan.exp(), self.pairs, 0), to_x, log_to_y.exp()


def _iterate(
    p: _Problem, n_iters: int, tol: float | None, record: Callable[[int, Tensor, Tensor], None] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(u, v, w = v - log b, R of the last v, iterations done)."""
    u, v = torch.zeros_like(p.log_a), _fill(torch.zeros_like(p.log_b), p.active_cols, -torch.inf)
    w = torch.zeros_like(v)
    row_lse = p.row_lse(v)
    running = torch.ones_like(p.eps, dtype=torch.bool) if p.live is None else p.live
    iterations = torch.zeros_like(running, dtype=torch.int32)
    for k in range(n_iters):
        iterations = iterations + running
        next_u = p.update_x(row_lse)
        latest = (next_u, *p.update_y(p.col_lse(next_u)))
        if tol is not None:
            latest = (torch.where(running[:, None], new, old) for new, old in zip(latest, (u, v, w), strict=True))
        u, v, w = latest
        if record is not None:
            record(k, *p.potentials(u, v))
        row_lse = p.row_lse(v)
        if tol is not None:
            running = running & ~(p.error(u, row_lse) <= tol)
            if running.device.type == "cpu" and not running.any():  # on a GPU this would synchronise
                break
    return u, v, w, row_lse, iterations


class _Adjoint:
    """Gradients of log a, log b, K and the dampings, summed over half-steps."""

    def __init__(self, p: _Problem, k: Tensor, log_a: Tensor, log_b: Tensor) -> None:
        self.p, self.k, self.log_a, self.log_b = p, k, log_a, log_b
        self.damping_x, self.damping_y = torch.zeros_like(p.eps), torch.zeros_like(p.eps)

    def update_x(self, du: Tensor, v: Tensor) -> Tensor:
        """Adjoint of u = update_x(row_lse(v)); returns dv."""
        exponents = v[:, None] - self.p.k
        lse = torch.logsumexp(exponents, 2)
        weighted = exponents.sub_(lse[:, :, None]).exp_().mul_((self.p.damping_x * du)[:, :, None])
        self.log_a += du
        self.damping_x -= (du * lse).sum(1)
        self.k += weighted
        return -weighted.sum(1)

    def update_y(self, dv: Tensor, u: Tensor) -> Tensor:
        """Adjoint of v = update_y(col_lse(u)); returns du."""
        exponents = u[:, :, None] - self.p.k
        lse = torch.logsumexp(exponents, 1)
        weighted = exponents.sub_(lse[:, None]).exp_().mul_((self.p.damping_y * dv)[:, None])
        self.log_b += dv
        self.damping_y -= (dv * lse).sum(1)
        self.k += weighted
        return -weighted.sum(2)

    def unroll(self, du: Tensor, dv: Tensor, iterations: Tensor, f_history: Tensor, g_history: Tensor) -> None:
        """Adjoint of the whole iteration, problem by problem from its own last step."""
        p = self.p
        steps = int(iterations.max()) if iterations.device.type == "cpu" else f_history.shape[1]
        for k in reversed(range(steps)):
            active = (k < iterations)[:, None]  # what a history holds past a problem's last step is unspecified
            u = p.scaled(_fill(f_history[:, k], active, 0), p.active_rows)
            du = du + self.update_y(_fill(dv, active, 0), u)
            before = _fill(g_history[:, k - 1], active, 0) if k > 0 else torch.zeros_like(dv)
            dv = torch.where(active, self.update_x(_fill(du, active, 0), p.scaled(before, p.active_cols)), dv)
            du = du.masked_fill(active, 0)

    def eps(self) -> Tensor:
        """The gradient of eps through K = C / eps and through the dampings t = rho / (rho + eps)."""
        p = self.p
        total = -_sum(_fill(self.k * p.k, p.pairs, 0)) / p.eps
        for rho, gradient in zip(p.rho, (self.damping_x, self.damping_y), strict=True):
            if rho is not None:
                total = total - gradient * rho / (rho + p.eps) ** 2
        return total


def _fixed_point_system(p: _Problem, u: Tensor, v: Tensor) -> Tensor:
    """The linearised fixed point, (B, N+M+1, N+M+1) in fp64.

    A (du, dv) = (d log a, d log b) + ... with A = [[I, t_x W'], [t_y W^T, I]], W' = softmax_j(v_j - K_ij),
    W = softmax_i(u_i - K_ij). For balanced marginals A is singular: potentials are determined up to a constant
    (c, -c), and only perturbations that keep the masses of a and b equal are feasible. The border picks the
    potentials with sum_i du_i = sum_j dv_j, and rescales a to the mass of b.
    """
    n, m = p.k.shape[1:]
    k, u, v = (t.double() for t in (p.k, u, v))
    row_weights = _fill(torch.softmax(v[:, None] - k, 2), _last(p.active_rows), 0)
    col_weights = _fill(torch.softmax(u[:, :, None] - k, 1).mT, _last(p.active_cols), 0)
    identity = torch.eye(n + m + 1, dtype=k.dtype, device=k.device)
    system = (identity * (1 + _RIDGE)).repeat(len(k), 1, 1)
    system[:, :n, n:-1] = _last(_double(p.damping_x)) * row_weights
    system[:, n:-1, :n] = _last(_double(p.damping_y)) * col_weights
    if p.rho == (None, None):
        rows, cols = (1.0 if t is None else t.double() for t in (p.active_rows, p.active_cols))
        system[:, :n, -1] = system[:, -1, :n] = rows
        system[:, -1, n:-1] = -cols
        system[:, -1, -1] = 0
    return system


def _fixed_point_multipliers(p: _Problem, u: Tensor, v: Tensor, du: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of log a and log b in the two updates, from those of the fixed point's potentials."""
    right = torch.cat([du, dv, torch.zeros_like(du[:, :1])], 1).double()
    solution = torch.linalg.solve(_fixed_point_system(p, u, v).mT, right).to(du.dtype)
    return solution[:, : du.shape[1]], solution[:, du.shape[1] : -1]


def _differentiate_fixed_point(p: _Problem, u: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and w = v - log b as they are, with the fixed point's derivative attached for autograd."""
    with torch.no_grad():
        system = _fixed_point_system(p, u, v)
    step_x = _fill(p.log_a - p.damping_x * p.row_lse(v), p.active_rows, 0)
    step_y = _fill(p.log_b - p.damping_y * p.col_lse(u), p.active_cols, 0)
    steps = torch.cat([step_x, step_y, torch.zeros_like(step_x[:, :1])], 1).double()
    change = torch.linalg.solve(system, steps - steps.detach()).to(u.dtype)
    du, dv = change[:, : u.shape[1]], change[:, u.shape[1] : -1]
    return u + du, v + dv, w + dv - (p.log_b - p.log_b.detach())


def _pairwise(x: Tensor, y: Tensor, cost: str) -> Tensor:
    if cost == "cosine":
        return 1 - _bmm(_unit(x)[0], _unit(y)[0].mT)
    # By differences: the expanded square would cancel for points far from the origin.
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if cost == "euclidean" else distance * distance


def _pairwise_backward(gradient: Tensor, x: Tensor, y: Tensor, raw: Tensor, cost: str) -> tuple[Tensor, Tensor]:
    if cost == "cosine":
        (ux, x_norm), (uy, y_norm) = _unit(x), _unit(y)

        def through_unit(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
            tangent = gradient - (gradient * unit).sum(2, keepdim=True) * unit
            return torch.where(norm > 0, tangent / norm, 0)

        return through_unit(-_bmm(gradient, uy), ux, x_norm), through_unit(-_bmm(gradient.mT, ux), uy, y_norm)
    distance = raw if cost == "euclidean" else raw.sqrt()
    if cost == "sqeuclidean":
        gradient = 2 * distance * gradient
    # What autograd calls for torch.cdist: the gradient is zero at coincident points.
    backward, x, y = torch.ops.aten._cdist_backward, x.contiguous(), y.contiguous()
    return (
        backward(gradient.contiguous(), x, y, 2.0, distance),
        backward(gradient.mT.contiguous(), y, x, 2.0, distance.mT.contiguous()),
    )


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length one, or zero for a zero row; and the lengths."""
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1), 0), norm


def _log_weights(weights: Tensor | None, points: Tensor, valid: Tensor | None) -> Tensor:
    if weights is not None:
        return _fill(weights, valid, 1).clamp(min=torch.finfo(weights.dtype).tiny).log()
    batch, size, _ = points.shape
    count = points.new_full((batch,), size) if valid is None else valid.sum(1).clamp(min=1).to(points.dtype)
    return -count.log()[:, None].expand(batch, size)


def _valid(points: Tensor, lengths: Tensor | None) -> Tensor:
    batch, size, _ = points.shape
    if lengths is None:
        return torch.ones(batch, size, dtype=torch.bool, device=points.device)
    return torch.arange(size, device=points.device) < lengths[:, None]


def _fill(t: Tensor, valid: Tensor | None, value: float) -> Tensor:
    return t if valid is None else t.masked_fill(~valid, value)


def _last(t: Tensor | float | None) -> Tensor | float | None:
    return t[..., None] if isinstance(t, Tensor) else t


def _double(t: Tensor | float) -> Tensor | float:
    return t.double() if isinstance(t, Tensor) else t


def _sum(t: Tensor) -> Tensor:
    """Over the last two dimensions, one at a time: together their order would depend on the batch."""
    return t.sum(2).sum(1)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([one @ other for one, other in zip(left, right, strict=True)])
