"""Causal depthwise convolution: checks, registration with torch.library, gradients and the choice of the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import backends, checks, native
from ..reference import causal_conv1d as reference
from . import eager

OP = "causal_conv1d"
ACTIVATIONS = (None, "silu", "swish")


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Short causal convolution of every channel with its own filter, as in Mamba (Gu and Dao 2023, section 3.4).

    ::

        out_t = act(bias + sum_{k=0..w-1} weight_k x_{t-(w-1)+k})         reverse: ... x_{t+(w-1)-k}

    Sizes below: batch b, channels d, steps l, taps w.

    Args:
        x: input (b, d, l); fp32, fp64, fp16 or bf16. Sums are kept in fp32, for fp64 in fp64 (the compute dtype).
            Any strides: channels-last and sliced tensors are read in place.
        weight: (d, w), w >= 1. weight and bias may have any floating dtype and are converted to the compute dtype.
        bias: (d,).
        activation: None or "silu" (also called "swish").
        reverse: run from the last valid step to the first.
        lengths: valid steps of each sequence (b,), int32 or int64, 0 <= lengths <= l. At the other steps the output
            is 0 and every gradient exactly 0, whatever the input holds there. Values are checked on CPU tensors only.
        seq_idx: (b, l), int32 or int64, values within int32: taps that reach into a step of another index are
            dropped, so that packed sequences do not meet. The initial state belongs to the sequence of the first step
            (in scan order).
        initial_state: the w-1 inputs before the first step (b, d, w-1), the oldest first; zero by default. Any
            floating dtype, converted to that of x.
        return_final_state: return the last w-1 inputs too, the initial state of what follows.
        backend: "cpu", "cuda", "triton" or "torch"; by default chosen by device.

    Returns:
        out (b, d, l) in the dtype of x; with ``return_final_state`` also the final state (b, d, w-1) in the dtype of
        x: the last w-1 inputs in scan order, the oldest first, with zeros in place of those of another sequence.

    Gradients reach x, weight, bias and initial_state, from both outputs. Memory kept for the backward: the inputs.
    Differentiating twice or forward raises RuntimeError.

    Raises:
        ValueError: a shape, a device, the activation, or a length out of range.
        TypeError: a dtype.
        RuntimeError: the backend asked for can't serve this call.
    """
    _check(x, weight, bias, activation, lengths, seq_idx, initial_state)
    dtype = checks.compute_dtype(x.dtype)
    out, final_state = _run_forward(
        x,
        checks.cast(weight, dtype),
        checks.cast(bias, dtype),
        checks.to_int32(lengths),
        checks.to_int32(seq_idx),
        checks.cast(initial_state, x.dtype),
        activation is not None,
        reverse,
        backend,
    )
    return (out, final_state) if return_final_state else out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    sizes: dict[str, int] = {}
    checks.tensor(OP, "x", x, shape=("b", "d", "l"), dtypes=checks.FLOATS, sizes=sizes)
    _check_filter(OP, x, weight, bias, activation, sizes)
    if lengths is not None:
        checks.tensor(OP, "lengths", lengths, shape=("b",), like=x, dtypes=checks.INTEGERS, sizes=sizes)
    if seq_idx is not None:
        checks.tensor(OP, "seq_idx", seq_idx, shape=("b", "l"), like=x, dtypes=checks.INTEGERS, sizes=sizes)
        if eager.is_plain((seq_idx,)):
            checks.fits_int32(OP, "seq_idx", seq_idx)
    if initial_state is not None:
        shape = ("b", "d", sizes["w"] - 1)
        checks.tensor(OP, "initial_state", initial_state, shape=shape, like=x, dtypes=checks.FLOATS, sizes=sizes)


def _check_filter(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, sizes: dict[str, int]
) -> None:
    checks.tensor(op, "weight", weight, shape=("d", "w"), like=x, dtypes=checks.FLOATS, sizes=sizes)
    if sizes["w"] < 1:
        raise checks.error(op, "weight", "of at least one tap", tuple(weight.shape))
    if bias is not None:
        checks.tensor(op, "bias", bias, shape=("d",), like=x, dtypes=checks.FLOATS, sizes=sizes)
    checks.choice(op, "activation", activation, ACTIVATIONS)


class Kernels(NamedTuple):
    """A backend's launchers; keywords as in `reference.causal_conv1d`."""

    forward: Callable[..., None]
    backward: Callable[..., None]


def _cpu_forward(**arguments: Any) -> None:
    native.call_cpu("causal_conv1d_forward", **arguments)


def _cpu_backward(**arguments: Any) -> None:
    native.call_cpu("causal_conv1d_backward", **arguments)


def _cuda_forward(**arguments: Any) -> None:
    native.call_cuda("causal_conv1d_forward_cuda", arguments["x"].device, **arguments)


def _cuda_backward(**arguments: Any) -> None:
    x, weight = arguments["x"], arguments["weight"]
    workspace = weight.new_empty(native.workspace_size("causal_conv1d_workspace_cuda", x=x, weight=weight))
    native.call_cuda("causal_conv1d_backward_cuda", x.device, workspace=workspace, **arguments)


def _triton_forward(**arguments: Any) -> None:
    from ..triton_kernels import causal_conv1d as kernels  # imports triton, which may be absent

    kernels.forward(**arguments)


def _triton_backward(**arguments: Any) -> None:
    from ..triton_kernels import causal_conv1d as kernels

    kernels.backward(**arguments)


KERNELS = {
    "torch": Kernels(reference.forward, reference.backward),
    "cpu": Kernels(_cpu_forward, _cpu_backward),
    "cuda": Kernels(_cuda_forward, _cuda_backward),
    "triton": Kernels(_triton_forward, _triton_backward),
}


def _kernels(x: Tensor, backend: str | None) -> Kernels:
    return KERNELS[backends.select(OP, x.device.type, x.dtype, backend)]


def _allocate(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[1], weight.shape[1] - 1)


def _compute_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    checks.lengths_in_range(OP, "lengths", lengths, x.shape[2])
    out, final_state = _allocate(x, weight)
    _kernels(x, backend).forward(
        x=x,
        weight=weight,
        bias=bias,
        silu=silu,
        reverse=reverse,
        lengths=lengths,
        seq_idx=seq_idx,
        initial_state=initial_state,
        out=out,
        final_state=final_state,
    )
    return out, final_state


_forward = torch.library.custom_op("parrot_kernels::causal_conv1d_forward", _compute_forward, mutates_args=())


@_forward.register_fake
def _(x, weight, bias, lengths, seq_idx, initial_state, silu, reverse, backend):
    return _allocate(x, weight)


def _allocate_gradients(inputs: list[Tensor | None]) -> list[Tensor]:
    """One gradient per input; an input that was not given gets an empty tensor, ops return no None."""
    like = next(t for t in inputs if t is not None)
    return [like.new_empty(0) if t is None else torch.empty_like(t) for t in inputs]


def _compute_backward(
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    reverse: bool,
    backend: str | None,
) -> list[Tensor]:
    inputs = [x, weight, bias, initial_state]
    gradients = _allocate_gradients(inputs)
    dx, dweight, dbias, dinitial_state = (None if t is None else g for t, g in zip(inputs, gradients, strict=True))
    _kernels(x, backend).backward(
        grad_out=grad_out,
        grad_final_state=grad_final_state,
        x=x,
        weight=weight,
        bias=bias,
        silu=silu,
        reverse=reverse,
        lengths=lengths,
        seq_idx=seq_idx,
        initial_state=initial_state,
        dx=dx,
        dweight=dweight,
        dbias=dbias,
        dinitial_state=dinitial_state,
    )
    return gradients


_backward = torch.library.custom_op("parrot_kernels::causal_conv1d_backward", _compute_backward, mutates_args=())


@_backward.register_fake
def _(grad_out, grad_final_state, x, weight, bias, lengths, seq_idx, initial_state, silu, reverse, backend):
    return _allocate_gradients([x, weight, bias, initial_state])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, silu, reverse, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.options = silu, reverse, backend


def _autograd(ctx, grad_out, grad_final_state):
    x, weight, bias, lengths, seq_idx, initial_state = ctx.saved_tensors
    gradients = _run_backward(
        grad_out, grad_final_state, x, weight, bias, lengths, seq_idx, initial_state, *ctx.options
    )
    dx, dweight, dbias, dinitial_state = (
        g if t is not None else None for t, g in zip((x, weight, bias, initial_state), gradients, strict=True)
    )
    return dx, dweight, dbias, None, None, dinitial_state, None, None, None


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        f"{OP}: differentiating twice is not supported. Detach what the second derivative need not pass through, or "
        "use parrot_kernels.reference.causal_conv1d.causal_conv1d, which autograd goes through."
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)
_vmap = eager.looping(lambda *arguments: _run_forward(*arguments))
_vmap_backward = eager.looping(lambda *arguments: _run_backward(*arguments))
_forward.register_vmap(_vmap)
_backward.register_vmap(_vmap_backward)
_run_forward: Callable[..., Any] = eager.shortcut(
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
