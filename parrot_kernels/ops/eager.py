"""The ways into an op: straight to its kernels where nothing but autograd has to see the op, and through torch.func.

A differentiable custom op can be compiled, traced and faked, and the dispatch which that takes costs about 0.1 ms a
call, more than many of our kernels. Plain tensors in plain eager mode get the same results without it. And a
differentiable custom op can't be differentiated by torch.func, which wants its own kind of `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, nn.Parameter)
_legacy_batched = torch._C._functorch.is_legacy_batchedtensor  # what torch.autograd.grad(is_grads_batched=True) makes


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether neither the compiler, nor vmap and its kin, nor a dispatch mode, nor a subclass wants to see the op."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and all(t is None or (type(t) in _PLAIN and not _legacy_batched(t)) for t in tensors)
    )


def differentiable(
    compute: Callable[..., tuple[Tensor, ...]], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., tuple[Tensor, ...]]:
    """An op's functions, as registered with torch.library, as one `torch.autograd.Function`."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            outputs = compute(*arguments)
            setup_context(ctx, arguments, outputs)
            return outputs

    Op.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Op.apply


def transformable(
    op: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., tuple[Any, Any]],
) -> Callable[..., Any]:
    """``op`` for the transforms of torch.func, from its functions as registered with torch.library."""

    class Op(torch.autograd.Function):  # of flat arguments: tensors inside of lists would pass unseen
        @staticmethod
        def forward(spec: pytree.TreeSpec, *flat: Any) -> Any:
            outputs = op(*pytree.tree_unflatten(flat, spec))
            return tuple(outputs) if isinstance(outputs, list) else outputs

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            spec, *flat = inputs
            ctx.spec = spec
            setup_context(ctx, pytree.tree_unflatten(flat, spec), output)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            arguments = pytree.tree_unflatten(ctx.needs_input_grad[1:], ctx.spec)
            results = zip(arguments, backward(_Context(ctx), *gradients), strict=True)
            return None, *(t for each, result in results for t in ([None] * len(each) if _is_list(each) else [result]))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], spec: pytree.TreeSpec, *flat: Any) -> tuple[Any, Any]:
            outputs, dims = vmap(info, pytree.tree_unflatten(in_dims[1:], spec), *pytree.tree_unflatten(flat, spec))
            return tuple(outputs), tuple(dims)

    def apply(*arguments: Any) -> Any:
        flat, spec = pytree.tree_flatten(arguments)
        return Op.apply(spec, *flat)

    return apply


class _Context:
    """A context whose inputs are those of the op again, without the first of ``Op.forward``."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @property
    def needs_input_grad(self) -> tuple[Any, ...]:
        return tuple(pytree.tree_unflatten(self._ctx.needs_input_grad[1:], self._ctx.spec))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """The ``setup_context`` of an op whose backward reads nothing."""


def folding(call: Callable[..., Iterable[Tensor]]) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of an op whose tensors all have the batch in front: the mapped dimension becomes part of it."""

    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)

        out = tuple(call(*_map(fold, arguments, in_dims)))
        return tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in out), (0,) * len(out)

    return vmap


def looping(call: Callable[..., Iterable[Tensor]]) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of any op: one call after the other."""

    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        def one(i: int) -> tuple[Tensor, ...]:
            def pick(value: Any, dim: int | None) -> Any:
                return value if dim is None or not isinstance(value, Tensor) else value.select(dim, i)

            return tuple(call(*_map(pick, arguments, in_dims)))

        out = tuple(torch.stack(each) for each in zip(*map(one, range(info.batch_size)), strict=True))
        return out, (0,) * len(out)

    return vmap


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _map(function: Callable[[Any, int | None], Any], arguments: Any, in_dims: Any) -> list[Any]:
    def apply(value: Any, dim: Any) -> Any:
        if _is_list(value):
            dims = dim if _is_list(dim) else [dim] * len(value)
            return [apply(*pair) for pair in zip(value, dims, strict=True)]
        return function(value, dim)

    return [apply(*pair) for pair in zip(arguments, in_dims, strict=True)]


def shortcut(
    op: Callable[..., Any],
    compute: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
    transformable: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """``op`` by the way that the moment asks for.

    In plain eager mode that is its ``compute``, by way of ``differentiable`` where autograd has to see it; under the
    transforms of torch.func it is ``transformable``.
    """

    def call(*arguments: Any) -> Any:
        tensors = []
        for t in arguments:
            if isinstance(t, list):
                tensors += [each for each in t if isinstance(each, Tensor)]
            elif t is not None and isinstance(t, Tensor):
                tensors.append(t)
        if not torch.compiler.is_compiling():
            _refuse_tangents(op, tensors)
            if transformable is not None and torch._C._are_functorch_transforms_active():
                return transformable(*arguments)
        if not is_plain(tensors):
            return op(*arguments)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return compute(*arguments)
        return (differentiable or transformable or op)(*arguments)  # `op` would overlook tensors beside None in a list

    return call


def _refuse_tangents(op: Any, tensors: Iterable[Tensor]) -> None:
    """PyTorch takes the tangents of a custom op's outputs for zero without a word."""
    if forward_ad._current_level < 0 or all(forward_ad.unpack_dual(t).tangent is None for t in tensors):
        return
    name = op._qualname.partition("::")[2].removesuffix("_forward").removesuffix("_backward")
    raise RuntimeError(
        f"{name}: forward-mode differentiation (torch.func.jvp, dual tensors) is not supported. Use reverse mode, or "
        f"the functions of parrot_kernels.reference, which autograd goes through."
    )


def shortcut_in_place(op: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """`shortcut` for an op that writes to its first argument, whose inputs want no gradients."""

    def call(state: Tensor, *arguments: Any) -> Any:
        tensors = (state, *(t for t in arguments if isinstance(t, Tensor)))
        if not torch.compiler.is_compiling():
            _refuse_tangents(op, tensors)
        if not is_plain(tensors):
            return op(state, *arguments)
        out = compute(state, *arguments)
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)  # a backward that needs what was overwritten must notice
        return out

    return call


def wants_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd has to see what is done to these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
