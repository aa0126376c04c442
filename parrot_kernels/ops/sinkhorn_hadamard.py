"""Sinkhorn-Hadamard: checks, registration with torch.library, gradients and the choice of the backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import eager, sinkhorn_options
from .sinkhorn_kernels import KERNELS, OP, Kernels, choose_backend
from .sinkhorn_options import COSTS, Numbers


class SinkhornHadamardOutput(NamedTuple):
    """What `sinkhorn_hadamard` returns; without the batch dimension B for 2-D inputs.

    Attributes:
        x_to_y: (B, M, D), the x transported to each row of y, in the inputs' dtype.
        y_to_x: (B, N, D), the y transported to each row of x, likewise.
        x_hadamard: (B, N, D), x * y_to_x, or None if it was not asked for.
        y_hadamard: (B, M, D), y * x_to_y, likewise.
        f, g: (B, N) and (B, M), the dual potentials, in the compute dtype and in units of the scaled cost.
        plan: (B, N, M) in the compute dtype, or None if it was not asked for.
        cost: (B,), the transport cost <P, C> of the scaled cost.
        error: (B,), sum_i |r_i - r+_i|, r the plan's row sums and r+ those after one more update of f. For balanced
            marginals r+ = a: the L1 error of the marginal of x.
        n_iters: (B,) int32, the iterations done.
        converged: (B,) bool, error <= tol (1e-3 if ``tol`` is None).
    """

    x_to_y: Tensor
    y_to_x: Tensor
    x_hadamard: Tensor | None
    y_hadamard: Tensor | None
    f: Tensor
    g: Tensor
    plan: Tensor | None
    cost: Tensor
    error: Tensor
    n_iters: Tensor
    converged: Tensor


def sinkhorn_hadamard(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    cost: str | Tensor = "euclidean",
    cost_scale: float | str = "max",
    eps: float | Tensor = 0.05,
    n_iters: int = 50,
    tol: float | None = None,
    reach: float | tuple[float | None, float | None] | None = None,
    gradient: str = "unrolled",
    backend: str | None = None,
    return_plan: bool = False,
    return_hadamard: bool = True,
) -> SinkhornHadamardOutput:
    r"""Entropic transport between two sets of features, the features it carries over, and their Hadamard products.

    For each problem of the batch, in the log domain (Cuturi 2013, arXiv 1306.0895; with ``reach`` the damped updates
    of Chizat et al. 2018, arXiv 1607.05816, section 4), from g = 0::

        f_i = eps log a_i - t_x eps LSE_j[(g_j - C_ij) / eps]        t_x = 1 / (1 + eps / reach_x^p), or 1
        g_j = eps log b_j - t_y eps LSE_i[(f_i - C_ij) / eps]        t_y = 1 / (1 + eps / reach_y^p), or 1

    and at the end::

        P_ij = exp((f_i + g_j - C_ij) / eps)
        y_to_x_i = (1 / a_i) sum_j P_ij y_j      x_hadamard_i = x_i * y_to_x_i
        x_to_y_j = (1 / b_j) sum_i P_ij x_i      y_hadamard_j = y_j * x_to_y_j

    Args:
        x: points (B, N, D), or (N, D) for one problem; fp32, fp64, fp16 or bf16, any strides. Everything is computed
            in fp32, for fp64 in fp64 (the compute dtype).
        y: points (B, M, D) or (M, D), dtype of x.
        a, b: weights (B, N) and (B, M), or (N,) and (M,): finite, not negative, used as they are (balanced problems
            want equal sums). Uniform over the valid rows by default. A weight below the smallest normal number of
            the compute dtype counts as that number: a point without mass gets the transported features that a point
            with a little mass would get.
        x_lengths, y_lengths: valid rows of each problem, (B,) or () of int32 or int64. Rows past them take no part:
            outputs there are 0 and gradients exactly 0, whatever the inputs hold. A problem without valid rows on
            either side has outputs 0 and counts as converged after 0 iterations.
        cost: "euclidean" \|x_i - y_j\|, "sqeuclidean" \|x_i - y_j\|^2, "cosine" 1 - cos(x_i, y_j) (cos is 0 for a zero
            vector), or a tensor (B, N, M) or (N, M).
        cost_scale: the cost is divided by this number, or for "max" by the largest valid cost of its own problem (at
            least 1e-8), which is a constant to the gradient. C is the result.
        eps: regularisation in units of C: a positive number or a tensor, () or (B,). Where eps is below the rounding of
            C gradients are rounding errors times 1 / eps; below 1e-10 in fp32 they may be NaN.
        n_iters: iterations, each one update of f and one of g.
        tol: a problem stops by itself after the first iteration whose error (see `SinkhornHadamardOutput`) is at
            most tol; nothing else of the batch matters to it.
        reach: None for balanced marginals. Else a problem may create and destroy mass, at a cost of reach^p times the
            Kullback-Leibler divergence from the weights, p = 2 for "sqeuclidean" and 1 otherwise, in units of C. A
            pair (reach_x, reach_y) treats the sides apart; None in it keeps that side balanced.
        gradient: "unrolled" is the exact derivative of the iterations that were run. "implicit" is the derivative of
            the fixed point, right once the problem has converged; if balanced, that of the problem with a rescaled to
            the mass of b and potentials shifted to sum f = sum g. "detached" takes plan, f and g for constants:
            gradients flow to x and y where the plan multiplies them and to C in ``cost``.
        backend: "cpu", "cuda", "triton" or "torch"; by default chosen by device.
        return_plan: also return the plan.
        return_hadamard: return the Hadamard products; without them less is computed and written.

    Returns:
        SinkhornHadamardOutput. Differentiable outputs: x_to_y, y_to_x, x_hadamard, y_hadamard and cost; except in
        "detached" mode also f, g and plan. They have gradients to x, y, a cost tensor, and, except in "detached"
        mode, a, b and an eps tensor. Those of "euclidean" take the subgradient 0 at coincident points; a weight below
        the floor has gradient 0. Differentiating twice raises RuntimeError.

    Memory for the backward: the inputs and, if "unrolled", the potentials of each iteration, n_iters (N + M) numbers
    per problem. The backward of "implicit" solves a dense system of N + M unknowns in fp64.

    On CPUs matrices of N M numbers are kept up to `parrot_kernels.set_workspace_limit` only.

    Under autocast nothing is cast: x and y must have one dtype, and half-precision inputs are computed in fp32 anyway.
    ``torch.compile(fullgraph=True)``, ``torch.vmap``, ``torch.func.grad`` and checkpointing work; forward-mode
    differentiation raises RuntimeError.
    Values (lengths, weights, eps) are checked on CPU tensors only, where reading them does not stall a device. A NaN
    or infinity among the valid inputs reaches the outputs of its own problem only; so does an overflow, of squared
    distances (also for "euclidean") or lengths in the compute dtype: in fp32, of points beyond about 1e18.

    Raises:
        ValueError: a shape, a device or a value.
        TypeError: a dtype or the type of an argument.
        RuntimeError: the backend asked for can't serve this call.
    """
    single = isinstance(x, Tensor) and x.dim() == 2
    cost_matrix: Tensor | None = None
    if isinstance(cost, str):
        kind = cost
        checks.choice(OP, "cost", kind, COSTS)
    else:
        kind, cost_matrix = "matrix", cost
        checks.tensor(OP, "cost", cost_matrix)
    check_tensors(single, x, y, a, b, x_lengths, y_lengths, cost_matrix, eps)
    numbers = sinkhorn_options.check(
        cost=kind, cost_scale=cost_scale, eps=eps, n_iters=n_iters, tol=tol, reach=reach, gradient=gradient,
        backend=backend, return_plan=return_plan, return_hadamard=return_hadamard,
    )  # fmt: skip

    dtype = checks.compute_dtype(x.dtype)
    a, b, cost_matrix = (checks.cast(t, dtype) for t in (a, b, cost_matrix))
    x_lengths, y_lengths = checks.to_int32(x_lengths), checks.to_int32(y_lengths)
    inputs: Iterable[Tensor | None] = (x, y, a, b, x_lengths, y_lengths, cost_matrix)
    if single:
        inputs = (None if t is None else t.unsqueeze(0) for t in inputs)
        x = x.unsqueeze(0)

    out = _call(*inputs, eps_per_problem(eps, x), kind, gradient, backend, numbers)
    products = out[2:4] if return_hadamard else (None, None)
    plan = out.plan if return_plan else None
    results: Iterable[Any] = (
        *out[:2],
        *products,
        out.f,
        out.g,
        plan,
        out.transport_cost,
        out.error,
        out.iterations,
        out.converged,
    )
    if single:
        results = (None if t is None else t.squeeze(0) for t in results)
    return SinkhornHadamardOutput(*results)


def eps_per_problem(eps: float | Tensor, x: Tensor) -> Tensor:
    """(B,), in the compute dtype."""
    dtype = checks.compute_dtype(x.dtype)
    if isinstance(eps, Tensor):
        return checks.cast(eps, dtype).expand(x.shape[0])
    return x.new_full((x.shape[0],), eps, dtype=dtype)


def check_tensors(single, x, y, a=None, b=None, x_lengths=None, y_lengths=None, cost_matrix=None, eps=None) -> None:
    sizes: dict[str, int] = {}
    batch = () if single else ("B",)
    checks.tensor(OP, "x", x, shape=(*batch, "N", "D"), dtypes=checks.FLOATS, sizes=sizes)
    checks.tensor(OP, "y", y, shape=(*batch, "M", "D"), like=x, dtypes=(x.dtype,), sizes=sizes)
    if sizes["D"] == 0:
        raise checks.error(OP, "x", "of at least one feature", tuple(x.shape))
    for name, value, shape, dtypes in (
        ("a", a, (*batch, "N"), checks.FLOATS),
        ("b", b, (*batch, "M"), checks.FLOATS),
        ("x_lengths", x_lengths, batch, checks.INTEGERS),
        ("y_lengths", y_lengths, batch, checks.INTEGERS),
        ("cost", cost_matrix, (*batch, "N", "M"), checks.FLOATS),
    ):
        if value is not None:
            checks.tensor(OP, name, value, shape=shape, like=x, dtypes=dtypes, sizes=sizes)
    if isinstance(eps, Tensor):
        checks.tensor(OP, "eps", eps, shape=batch if eps.dim() else (), like=x, dtypes=checks.FLOATS, sizes=sizes)


class _Forward(NamedTuple):
    """Outputs of the op; None for those that were not asked for."""

    x_to_y: Tensor
    y_to_x: Tensor
    x_hadamard: Tensor | None
    y_hadamard: Tensor | None
    f: Tensor
    g: Tensor
    plan: Tensor | None
    transport_cost: Tensor  # up to here differentiable
    error: Tensor
    iterations: Tensor
    converged: Tensor
    scale: Tensor
    f_history: Tensor | None
    g_history: Tensor | None


DIFFERENTIABLE = _Forward._fields[:8]


def allocate(x, y, eps, gradient, options) -> _Forward:
    (batch, n, dim), m, steps = x.shape, y.shape[1], options.n_iters
    history = options.keep and gradient == "unrolled"
    return _Forward(
        x_to_y=x.new_empty(batch, m, dim),
        y_to_x=x.new_empty(batch, n, dim),
        x_hadamard=x.new_empty(batch, n, dim) if options.return_hadamard else None,
        y_hadamard=x.new_empty(batch, m, dim) if options.return_hadamard else None,
        f=eps.new_empty(batch, n),  # eps has the compute dtype
        g=eps.new_empty(batch, m),
        plan=eps.new_empty(batch, n, m) if options.return_plan else None,
        transport_cost=eps.new_empty(batch),
        error=eps.new_empty(batch),
        iterations=eps.new_empty(batch, dtype=torch.int32),
        converged=eps.new_empty(batch, dtype=torch.bool),
        scale=eps.new_empty(batch),
        f_history=eps.new_empty(batch, steps, n) if history else None,
        g_history=eps.new_empty(batch, steps, m) if history else None,
    )


def without_none(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """With tensors of shape (B, 0) for None, which a registered op can't return."""
    return tuple(like.new_empty(like.shape[0], 0) if t is None else t for t in outputs)


def check_values(x, y, a, b, x_lengths, y_lengths, eps) -> None:
    """Read from CPU tensors only: elsewhere this would synchronise."""
    if x.device.type != "cpu" or x.shape[0] == 0:
        return
    low, high = (eps.item(),) * 2 if len(eps) == 1 else (t.item() for t in torch.aminmax(eps))
    if not (low > 0 and high < math.inf):
        raise checks.error(OP, "eps", "positive and finite", f"values from {low} to {high}")
    for side, points, weights, lengths in (("x", x, a, x_lengths), ("y", y, b, y_lengths)):
        checks.lengths_in_range(OP, f"{side}_lengths", lengths, points.shape[1])
        if weights is not None and weights.numel():
            if lengths is not None:
                weights = weights.masked_fill(torch.arange(points.shape[1]) >= lengths[:, None], 0)
            low, high = (t.item() for t in torch.aminmax(weights))
            if not (low >= 0 and high < math.inf):
                name = "a" if side == "x" else "b"
                raise checks.error(OP, name, "finite and not negative", f"values from {low} to {high}")


_TENSORS = ("x", "y", "a", "b", "x_lengths", "y_lengths", "cost_matrix", "eps")
_INPUTS = (
    "Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor? x_lengths, Tensor? y_lengths, Tensor? cost_matrix, Tensor eps"
)
_OPTIONS = "str cost, str gradient, str? backend, float[] numbers"


def launch_forward(
    kernels: Kernels, inputs: tuple[Tensor | None, ...], cost: str, options: Numbers, out: _Forward, **row: Any
) -> None:
    """Run a backend's forward; ``inputs`` are those of the op, in its order; ``row``: see `Kernels`."""
    kernels.forward(
        **dict(zip(_TENSORS, inputs, strict=True)),
        cost=cost,
        cost_scale=options.cost_scale,
        n_iters=options.n_iters,
        tol=options.tol,
        rho_x=options.rho_x,
        rho_y=options.rho_y,
        **out._asdict(),
        **row,
    )


def _compute_forward(x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, cost, gradient, backend, numbers):
    check_values(x, y, a, b, x_lengths, y_lengths, eps)
    kernels, options = KERNELS[choose_backend(x, y, backend)], Numbers.unpack(numbers)
    out = allocate(x, y, eps, gradient, options)
    if x.shape[0] * x.shape[1] * y.shape[1] == 0:
        for tensor in out:
            if tensor is not None:
                tensor.zero_()
        out.converged.fill_(True)
        return tuple(out)
    launch_forward(kernels, (x, y, a, b, x_lengths, y_lengths, cost_matrix, eps), cost, options, out)
    return tuple(out)


def _op_forward(*arguments):
    return without_none(_compute_forward(*arguments), like=arguments[7])


_forward = torch.library.custom_op(
    "parrot_kernels::sinkhorn_hadamard_forward",
    _op_forward,
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * len(_Forward._fields))})",
)


@_forward.register_fake
def _(x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, cost, gradient, backend, numbers):
    return without_none(allocate(x, y, eps, gradient, Numbers.unpack(numbers)), like=eps)


def _allocate_gradients(inputs: Sequence[Any], needed: Sequence[bool]) -> list[Tensor]:
    """Gradients of x, y, a, b, cost_matrix and eps; (B, 0) for those not needed."""
    x = inputs[0]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(x.shape[0], 0)
        for t, need in zip(inputs, needed, strict=True)
    ]


def compute_backward(
    gradients, x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, saved, cost, gradient, backend, numbers, needed,
    **row,
):  # fmt: skip
    results = _allocate_gradients((x, y, a, b, cost_matrix, eps), needed)
    if x.shape[0] * x.shape[1] * y.shape[1] == 0:
        return [t.zero_() for t in results]
    options = Numbers.unpack(numbers)
    dx, dy, da, db, dcost_matrix, deps = (t if need else None for t, need in zip(results, needed, strict=True))
    f, g, scale, iterations, f_history, g_history = (t if t is not None and t.numel() else None for t in saved)
    inputs = (x, y, a, b, x_lengths, y_lengths, cost_matrix, eps)
    KERNELS[choose_backend(x, y, backend)].backward(
        **dict(zip(_TENSORS, inputs, strict=True)),
        cost=cost,
        rho_x=options.rho_x,
        rho_y=options.rho_y,
        gradient=gradient,
        f=f,
        g=g,
        scale=scale,
        iterations=iterations,
        f_history=f_history,
        g_history=g_history,
        **{f"grad_{name}": t for name, t in zip(DIFFERENTIABLE, gradients, strict=True)},
        dx=dx,
        dy=dy,
        dcost_matrix=dcost_matrix,
        da=da,
        db=db,
        deps=deps,
        **row,
    )
    return results


_backward = torch.library.custom_op(
    "parrot_kernels::sinkhorn_hadamard_backward",
    compute_backward,
    mutates_args=(),
    schema=f"(Tensor?[] gradients, {_INPUTS}, Tensor?[] saved, {_OPTIONS}, bool[] needed) -> Tensor[]",
)


@_backward.register_fake
def _(gradients, x, y, a, b, x_lengths, y_lengths, cost_matrix, eps, saved, cost, gradient, backend, numbers, needed):
    return _allocate_gradients((x, y, a, b, cost_matrix, eps), needed)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, cost, gradient, backend, numbers = inputs
    out = _Forward._make(output)
    constants = [out.error, out.iterations, out.converged, out.scale, out.f_history, out.g_history]
    if gradient == "detached":
        constants += [out.f, out.g, out.plan]
    ctx.mark_non_differentiable(*(t for t in constants if t is not None))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out.f, out.g, out.scale, out.iterations, out.f_history, out.g_history)
    ctx.options = cost, gradient, backend, numbers


def _autograd(ctx: Any, *given: Any) -> tuple[Any, ...]:
    gradient, numbers = ctx.options[1], ctx.options[3]
    if not Numbers.unpack(numbers).keep:
        raise RuntimeError(f"{OP}: the op was called without keeping what its backward needs.")
    x, y, a, b, _, _, cost_matrix, eps, *_ = ctx.needs_input_grad
    gradients = [None if t is None or t.numel() == 0 else t for t in given[: len(DIFFERENTIABLE)]]
    if gradient == "detached":  # the cost counts in the transport cost only
        a = b = eps = False
        cost_matrix = cost_matrix and gradients[DIFFERENTIABLE.index("transport_cost")] is not None
    needed = [x, y, a, b, cost_matrix, eps]
    tensors = ctx.saved_tensors  # once: checkpointing hands them out once
    inputs, saved = tensors[:8], tensors[8:]
    results = _run_backward(gradients, *inputs, list(saved), *ctx.options, needed)
    x, y, a, b, cost_matrix, eps = (t if need else None for t, need in zip(results, needed, strict=True))
    return x, y, a, b, None, None, cost_matrix, eps, None, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        f"{OP}: differentiating twice is not supported. Detach what the second derivative need not pass through, or "
        "use parrot_kernels.reference.sinkhorn_hadamard.sinkhorn_hadamard, which autograd goes through."
    )


def _call(*arguments: Any) -> _Forward:
    """The forward op, told whether a backward may follow: of torch.func's levels, only some show that."""
    *inputs, cost, gradient, backend, numbers = arguments
    keep = numbers[-1] or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs))
    return _Forward._make(_run_forward(*inputs, cost, gradient, backend, [*numbers[:-1], float(keep)]))


_vmap = eager.folding(lambda *arguments: without_none(_call(*arguments), like=arguments[7]))
_vmap_backward = eager.folding(lambda *arguments: _run_backward(*arguments))
_forward.register_autograd(_autograd, setup_context=_setup_context)
_forward.register_vmap(_vmap)
_backward.register_autograd(_no_double_backward)
_backward.register_vmap(_vmap_backward)
_run_forward = eager.shortcut(
    _forward,
    _compute_forward,
    eager.differentiable(_compute_forward, _setup_context, _autograd),
    eager.transformable(_forward, _setup_context, _autograd, _vmap),
)
_run_backward: Callable[..., Any] = eager.shortcut(
    _backward,
    compute_backward,
    transformable=eager.transformable(_backward, eager.keep_nothing, _no_double_backward, _vmap_backward),
)
