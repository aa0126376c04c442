"""Parallel branch fusion: the kernels of Sinkhorn-Hadamard, writing into PARROT's fused row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import eager, sinkhorn_kernels, sinkhorn_options
from . import sinkhorn_hadamard as sinkhorn
from .sinkhorn_options import COSTS, Numbers

OP = "parallel_branch_fusion"
PARTS = ("hadamard", "x_to_y", "y", "y_to_x", "x")
TRANSPORTED = ("x_to_y", "y_to_x")
OTHERS = {"x_copy": "x", "y_copy": "y", "paired_hadamard": "hadamard"}  # by their names among a kernel's arguments


def parallel_branch_fusion(
    x: Tensor,
    y: Tensor,
    *,
    parts: Sequence[str] = PARTS,
    cost: str = "euclidean",
    cost_scale: float | str = "max",
    eps: float | Tensor = 0.05,
    n_iters: int = 50,
    tol: float | None = None,
    reach: float | tuple[float | None, float | None] | None = None,
    gradient: str = "unrolled",
    backend: str | None = None,
) -> Tensor:
    r"""PARROT's fused row of two paired feature matrices, in one pass (arXiv 2506.01138, section 3).

    Rows x_i and y_i belong together; the N rows of either side are the points of one entropic transport problem (see
    :func:`parrot_kernels.sinkhorn_hadamard`, whose options these are). By default::

        row_i = [x_i * y_i, x_to_y_i, y_i, y_to_x_i, x_i]

    Args:
        x, y: (B, N, D), or (N, D) for one problem; fp32, fp64, fp16 or bf16, any strides.
        parts: the parts of the row, in its order: "hadamard" (x * y), "x_to_y", "y", "y_to_x", "x".
        cost, cost_scale, eps, n_iters, tol, reach, gradient, backend: as of `sinkhorn_hadamard`.

    Returns:
        (B, N, len(parts) * D) or (N, len(parts) * D) in the inputs' dtype, with gradients to x, y and, except in
        "detached" mode, an eps tensor. Differentiating twice raises RuntimeError.

    Memory for the backward: the inputs and, if "unrolled", 2 N n_iters numbers per problem. Nothing that is
    concatenated is held a second time.

    Raises:
        ValueError, TypeError, RuntimeError: as `sinkhorn_hadamard`; ValueError if x and y differ in shape.
    """
    for part in parts if parts else [None]:
        checks.choice(OP, "parts", part, PARTS)
    checks.choice(OP, "cost", cost, COSTS)
    single = isinstance(x, Tensor) and x.dim() == 2
    sinkhorn.check_tensors(single, x, y, eps=eps)
    if x.shape != y.shape:
        raise checks.error(OP, "y", f"of x's shape {tuple(x.shape)}", tuple(y.shape))
    numbers = sinkhorn_options.check(
        cost=cost, cost_scale=cost_scale, eps=eps, n_iters=n_iters, tol=tol, reach=reach, gradient=gradient,
        backend=backend, return_hadamard=False,
    )  # fmt: skip
    if single:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    eps = sinkhorn.eps_per_problem(eps, x)
    once = list(dict.fromkeys(parts))
    row, *_ = _call(x, y, eps, cost, gradient, backend, numbers, once)
    if len(once) < len(parts):  # a kernel writes each part to one place
        written = _slices(row, once)
        row = torch.cat([written[part] for part in parts], dim=-1)
    return row.squeeze(0) if single else row


def _slices(row: Tensor, parts: Sequence[str]) -> dict[str, Tensor]:
    return dict(zip(parts, row.chunk(len(parts), dim=-1), strict=True))


def _allocate(x, y, eps, gradient, numbers, parts) -> tuple[Tensor | None, ...]:
    """The fused row and what its backward needs: f, g, scale, iterations and the histories."""
    out = sinkhorn.allocate(x, y, eps, gradient, Numbers.unpack(numbers))
    row = x.new_empty(*x.shape[:2], len(parts) * x.shape[2])
    return row, out.f, out.g, out.scale, out.iterations, out.f_history, out.g_history


def _compute_forward(x, y, eps, cost, gradient, backend, numbers, parts):
    sinkhorn.check_values(x, y, None, None, None, None, eps)
    options = Numbers.unpack(numbers)
    out = sinkhorn.allocate(x, y, eps, gradient, options)
    row = x.new_empty(*x.shape[:2], len(parts) * x.shape[2])
    results = (row, out.f, out.g, out.scale, out.iterations, out.f_history, out.g_history)
    if x.shape[0] * x.shape[1] == 0:
        for tensor in results:
            if tensor is not None:
                tensor.zero_()
        return results
    kernels, written = sinkhorn_kernels.KERNELS[sinkhorn_kernels.choose_backend(x, y, backend)], _slices(row, parts)
    transported: dict[str, Any] = {part: written.get(part) for part in TRANSPORTED}
    out = out._replace(**transported)
    others = {name: written.get(part) for name, part in OTHERS.items()}
    inputs = (x, y, *[None] * 5, eps)
    sinkhorn.launch_forward(kernels, inputs, cost, options, out, **others, row_stride=row.shape[2])
    return results


def _op_forward(*arguments):
    return sinkhorn.without_none(_compute_forward(*arguments), like=arguments[2])


_forward = torch.library.custom_op(
    "parrot_kernels::parallel_branch_fusion_forward",
    _op_forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor y, Tensor eps, str cost, str gradient, str? backend, float[] numbers, str[] parts) -> "
    f"({', '.join(['Tensor'] * 7)})",
)


@_forward.register_fake
def _(x, y, eps, cost, gradient, backend, numbers, parts):
    return sinkhorn.without_none(_allocate(x, y, eps, gradient, numbers, parts), like=eps)


def _compute_backward(grad_row, x, y, eps, saved, cost, gradient, backend, numbers, parts, needed):
    given = _slices(grad_row.contiguous(), parts)
    gradients = [given.get(part) for part in TRANSPORTED] + [None] * (len(sinkhorn.DIFFERENTIABLE) - 2)
    others = {f"grad_{name}": given.get(part) for name, part in OTHERS.items()}
    inputs = (x, y, None, None, None, None, None, eps)
    every = [needed[0], needed[1], False, False, False, needed[2]]
    results = sinkhorn.compute_backward(
        gradients, *inputs, saved, cost, gradient, backend, numbers, every, **others, row_stride=grad_row.shape[2]
    )
    return [results[0], results[1], results[5]]


_backward = torch.library.custom_op(
    "parrot_kernels::parallel_branch_fusion_backward",
    _compute_backward,
    mutates_args=(),
    schema="(Tensor grad_row, Tensor x, Tensor y, Tensor eps, Tensor?[] saved, str cost, str gradient, str? backend, "
    "float[] numbers, str[] parts, bool[] needed) -> Tensor[]",
)


@_backward.register_fake
def _(grad_row, x, y, eps, saved, cost, gradient, backend, numbers, parts, needed):
    return [
        torch.empty_like(t) if need else x.new_empty(x.shape[0], 0) for t, need in zip((x, y, eps), needed, strict=True)
    ]


def _setup_context(ctx, inputs, output) -> None:
    x, y, eps, *ctx.options = inputs
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, eps, *output[1:])


def _autograd(ctx, grad_row, *_):
    _, gradient, _, numbers, _ = ctx.options
    if not Numbers.unpack(numbers).keep:
        raise RuntimeError(f"{OP}: the op was called without keeping what its backward needs.")
    if grad_row is None:
        return (None,) * 8
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2] and gradient != "detached"]
    x, y, eps, *saved = ctx.saved_tensors
    results = _run_backward(grad_row, x, y, eps, saved, *ctx.options, needed)
    return *(t if need else None for t, need in zip(results, needed, strict=True)), *[None] * 5


def _no_double_backward(ctx, *_):
    raise RuntimeError(f"{OP}: differentiating twice is not supported.")


def _call(*arguments: Any) -> tuple[Tensor, ...]:
    """The forward op, told whether a backward may follow: of torch.func's levels, only some show that."""
    *inputs, cost, gradient, backend, numbers, parts = arguments
    keep = numbers[-1] or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
    return _run_forward(*inputs, cost, gradient, backend, [*numbers[:-1], float(keep)], parts)


_vmap = eager.folding(lambda *arguments: sinkhorn.without_none(_call(*arguments), like=arguments[2]))
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
    _compute_backward,
    transformable=eager.transformable(_backward, eager.keep_nothing, _no_double_backward, _vmap_backward),
)
