"""The short way into an op: straight to its kernels where nothing but autograd has to see the op.

A differentiable custom op can be compiled, traced, mapped and faked, and the dispatch which that takes costs about
0.1 ms a call, more than many of our kernels. Plain tensors in plain eager mode get the same results without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether neither the compiler, nor vmap and its kin, nor a dispatch mode, nor a subclass wants to see the op."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
        and all(t is None or type(t) in _PLAIN for t in tensors)
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

    Op.backward = staticmethod(backward)
    return Op.apply


def shortcut(
    op: Callable[..., Any], compute: Callable[..., Any], differentiable: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``op``, or in plain eager mode its ``compute``, by way of ``differentiable`` where autograd has to see it."""

    def call(*arguments: Any) -> Any:
        tensors = [t for t in arguments if isinstance(t, Tensor)]
        if not is_plain(tensors):
            return op(*arguments)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return compute(*arguments)
        return op(*arguments) if differentiable is None else differentiable(*arguments)

    return call
