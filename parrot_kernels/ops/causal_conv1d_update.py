"""New steps of the causal convolution, in place: checks, registration with torch.library, choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, native
from ..reference import causal_conv1d_update as reference
from . import eager

OP = "causal_conv1d_update"
ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cache_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`causal_conv1d` of the next steps of sequences, usually one; ``state`` is updated in place.

    Sizes below: batch b, channels d, steps l, taps w, inputs kept s, entries e.

    Args:
        x: input (b, d) or (b, d, l); fp32, fp64, fp16 or bf16. Sums are kept in fp32, for fp64 in fp64 (the compute
            dtype).
        state: the latest inputs (b, d, s), s >= w - 1, the newest last; with ``state_indices`` (e, d, s). Any floating
            dtype and strides.
        weight: (d, w), w >= 1. weight and bias may have any floating dtype and are converted to the compute dtype.
        bias: (d,).
        activation: None or "silu" (also called "swish").
        cache_seqlens: (b,), int32 or int64, the steps seen so far: ``state`` is then a ring in which step t lies at
            t % s.
        state_indices: (b,), int32 or int64: the entry of ``state`` of each row, none twice. Negative: the row is
            padding, its output is 0 and no state is touched. Values are checked on CPU tensors only.
        backend: "cpu", "cuda", "triton" or "torch"; by default chosen by device.

    Returns:
        out, of the shape and dtype of x.

    Gradients reach x, weight and bias, not ``state``, which counts as a constant: differentiate through time with
    `causal_conv1d`. Where autograd wants any, the formulas run in plain PyTorch, whatever the backend.

    Raises:
        ValueError: a shape, a device, the activation, or an index out of range.
        TypeError: a dtype.
        RuntimeError: the backend asked for can't serve this call.
    """
    _check(x, state, weight, bias, activation, cache_seqlens, state_indices)
    dtype = checks.compute_dtype(x.dtype)
    weight, bias = checks.cast(weight, dtype), checks.cast(bias, dtype)
    seen = cache_seqlens
    if seen is not None and seen.dtype != torch.int32:  # only where the ring stands matters: that fits
        seen = seen.remainder(state.shape[2]).to(torch.int32)
    indices = checks.to_int32(state_indices)
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    silu = activation is not None
    if state.dtype in (dtype, x.dtype, torch.float64):  # the kernels take these; others fit into dtype
        out = _step(state, steps, weight, bias, seen, indices, silu, backend)
    else:
        wide = state.detach().to(dtype)
        out = _step(wide, steps, weight, bias, seen, indices, silu, backend)
        with torch.no_grad():
            state.copy_(wide)
    return out.squeeze(-1) if x.dim() == 2 else out


def _step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    indices: Tensor | None,
    silu: bool,
    backend: str | None,
) -> Tensor:
    state = state.detach() if state.requires_grad else state
    if not eager.wants_gradients((x, weight, bias)):
        return _run(state, x, weight, bias, seen, indices, silu, backend)
    backends.select(OP, x.device.type, x.dtype, backend)
    checks.indices_in_range(OP, "state_indices", indices, state.shape[0])
    rows = state.clone() if indices is None else state[indices.clamp(min=0).long()]  # the backward reads them
    out, new_rows = reference.causal_conv1d_update(x, rows, weight, bias, "silu" if silu else None, seen)
    with torch.no_grad():
        if indices is None:
            state.copy_(new_rows)
            return out
        valid = indices >= 0
        state[indices[valid].long()] = new_rows[valid]
    return out.masked_fill(~valid.view(-1, 1, 1), 0)


def _check(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    sizes: dict[str, int] = {}
    shape = ("b", "d") if isinstance(x, Tensor) and x.dim() == 2 else ("b", "d", "l")
    checks.tensor(OP, "x", x, shape=shape, dtypes=checks.FLOATS, sizes=sizes)
    checks.tensor(OP, "weight", weight, shape=("d", "w"), like=x, dtypes=checks.FLOATS, sizes=sizes)
    if sizes["w"] < 1:
        raise checks.error(OP, "weight", "of at least one tap", tuple(weight.shape))
    entries = "b" if state_indices is None else "entries"
    checks.tensor(OP, "state", state, shape=(entries, "d", "inputs"), like=x, dtypes=checks.FLOATS, sizes=sizes)
    if sizes["inputs"] < sizes["w"] - 1 or (cache_seqlens is not None and sizes["inputs"] == 0):
        least = max(sizes["w"] - 1, int(cache_seqlens is not None))
        raise checks.error(OP, "state", f"of at least {least} inputs a channel", f"{sizes['inputs']}")
    if bias is not None:
        checks.tensor(OP, "bias", bias, shape=("d",), like=x, dtypes=checks.FLOATS, sizes=sizes)
    checks.choice(OP, "activation", activation, ACTIVATIONS)
    for name, vector in (("cache_seqlens", cache_seqlens), ("state_indices", state_indices)):
        if vector is not None:
            checks.tensor(OP, name, vector, shape=("b",), like=x, dtypes=checks.INTEGERS, sizes=sizes)


def _cpu(**arguments: Any) -> None:
    native.call_cpu(OP, **arguments)


def _cuda(**arguments: Any) -> None:
    native.call_cuda(f"{OP}_cuda", arguments["x"].device, **arguments)


def _triton(**arguments: Any) -> None:
    from ..triton_kernels import causal_conv1d_update as kernels  # imports triton, which may be absent

    kernels.update(**arguments)


KERNELS = {"torch": reference.update, "cpu": _cpu, "cuda": _cuda, "triton": _triton}


def _compute(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    indices: Tensor | None,
    silu: bool,
    backend: str | None,
) -> Tensor:
    checks.indices_in_range(OP, "state_indices", indices, state.shape[0])
    out = x.new_empty(x.shape)
    KERNELS[backends.select(OP, x.device.type, x.dtype, backend)](
        x=x, state=state, weight=weight, bias=bias, silu=silu, seen=seen, indices=indices, out=out
    )
    return out


_update = torch.library.custom_op(f"parrot_kernels::{OP}", _compute, mutates_args={"state"})


@_update.register_fake
def _(state, x, weight, bias, seen, indices, silu, backend):
    return x.new_empty(x.shape)


_run = eager.shortcut_in_place(_update, _compute)
