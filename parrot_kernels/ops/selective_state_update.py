"""One step of the selective scan, in place: checks, registration with torch.library and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, native
from ..reference import selective_state_update as reference
from . import eager

OP = "selective_state_update"


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of `selective_scan` (arXiv 2312.00752), to generate token by token; ``state`` is updated in place.

    With dt = softplus(dt + dt_bias) (``dt_softplus``) or dt + dt_bias, for every channel d::

        h = exp(dt_d A_d) h + dt_d B x_d            out_d = (<C, h> + D_d x_d) * silu(z_d)

    Sizes below: batch b, channels d, states n, groups g (d is a multiple of g; group i serves the channels from
    i*d/g on), entries e.

    Args:
        state: (b, d, n), with ``state_indices`` (e, d, n). Any floating dtype and strides; computed in fp32, for fp64
            inputs in fp64 (the compute dtype), which is also what a state should be kept in.
        x: input (b, d); fp32, fp64, fp16 or bf16.
        dt, z: step size and gate (b, d), dtype of x.
        A: (d, n), real. A, D and dt_bias may have any floating dtype and are converted to the compute dtype.
        B, C: (b, n) or (b, g, n), dtype of x.
        D, dt_bias: (d,).
        dt_softplus: apply softplus to dt + dt_bias.
        state_indices: (b,), int32 or int64: the entry of ``state`` of each row, none twice. Negative: the row is
            padding, its output is 0 and no state is touched. Values are checked on CPU tensors only.
        backend: "cpu", "cuda", "triton" or "torch"; by default chosen by device.

    Returns:
        out (b, d) in the dtype of x, from the state before that is rounded to its dtype.

    Gradients reach everything but ``state``, which counts as a constant: differentiate through time with
    `selective_scan`. Where autograd wants any, the formulas run in plain PyTorch, whatever the backend.

    Raises:
        ValueError: a shape, a device, or an index out of range.
        TypeError: a dtype; complex A.
        RuntimeError: the backend asked for can't serve this call.
    """
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_indices)
    dtype = checks.compute_dtype(x.dtype)
    A, D, dt_bias = checks.cast(A, dtype), checks.cast(D, dtype), checks.cast(dt_bias, dtype)
    indices = checks.to_int32(state_indices)
    if state.dtype not in (dtype, x.dtype, torch.float64):  # the kernels take these; others fit into dtype
        wide = state.detach().to(dtype)
        out = _step(wide, x, dt, A, B, C, D, z, dt_bias, indices, dt_softplus, backend)
        with torch.no_grad():
            state.copy_(wide)
        return out
    return _step(state, x, dt, A, B, C, D, z, dt_bias, indices, dt_softplus, backend)


def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    dt_softplus: bool,
    backend: str | None,
) -> Tensor:
    state = state.detach() if state.requires_grad else state
    if not eager.wants_gradients((x, dt, A, B, C, D, z, dt_bias)):
        return _run(state, x, dt, A, B, C, D, z, dt_bias, indices, dt_softplus, backend)
    backends.select(OP, x.device.type, x.dtype, backend)
    checks.indices_in_range(OP, "state_indices", indices, state.shape[0])
    inputs: dict[str, Any] = {
        "x": x,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "dt_softplus": dt_softplus,
    }
    rows = state.clone() if indices is None else state[indices.clamp(min=0).long()]  # the backward reads them
    out, new_rows = reference.selective_state_update(rows, **inputs)
    with torch.no_grad():
        if indices is None:
            state.copy_(new_rows)
            return out
        valid = indices >= 0
        state[indices[valid].long()] = new_rows[valid].to(state.dtype)
    return out.masked_fill(~valid.unsqueeze(1), 0)


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    sizes: dict[str, int] = {}
    checks.tensor(OP, "x", x, shape=("b", "d"), dtypes=checks.FLOATS, sizes=sizes)
    own = (x.dtype,)
    checks.tensor(OP, "dt", dt, shape=("b", "d"), like=x, dtypes=own, sizes=sizes)
    if isinstance(A, Tensor) and A.is_complex():
        fix = "Complex state matrices (S4D-Lin and the like) are not supported; Mamba-1 models use real ones."
        raise checks.error(OP, "A", "real", str(A.dtype).removeprefix("torch."), fix, TypeError)
    checks.tensor(OP, "A", A, shape=("d", "n"), like=x, dtypes=checks.FLOATS, sizes=sizes)
    entries = "b" if state_indices is None else "entries"
    checks.tensor(OP, "state", state, shape=(entries, "d", "n"), like=x, dtypes=checks.FLOATS, sizes=sizes)
    for name, matrix in (("B", B), ("C", C)):
        groups = f"groups of {name}"
        if isinstance(matrix, Tensor) and matrix.dim() not in (2, 3):
            raise checks.error(OP, name, f"of shape (b, n) or (b, {groups}, n)", tuple(matrix.shape))
        shape = ("b", "n") if isinstance(matrix, Tensor) and matrix.dim() == 2 else ("b", groups, "n")
        checks.tensor(OP, name, matrix, shape=shape, like=x, dtypes=own, sizes=sizes)
        if groups in sizes and (sizes[groups] == 0 or sizes["d"] % sizes[groups] != 0):
            raise checks.error(OP, name, f"in groups that divide d = {sizes['d']}", f"{sizes[groups]} groups")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            checks.tensor(OP, name, vector, shape=("d",), like=x, dtypes=checks.FLOATS, sizes=sizes)
    if z is not None:
        checks.tensor(OP, "z", z, shape=("b", "d"), like=x, dtypes=own, sizes=sizes)
    if state_indices is not None:
        checks.tensor(OP, "state_indices", state_indices, shape=("b",), like=x, dtypes=checks.INTEGERS, sizes=sizes)


def _cpu(**arguments: Any) -> None:
    native.call_cpu(OP, **arguments)


def _cuda(**arguments: Any) -> None:
    native.call_cuda(f"{OP}_cuda", arguments["x"].device, **arguments)


def _triton(**arguments: Any) -> None:
    from ..triton_kernels import selective_state_update as kernels  # imports triton, which may be absent

    kernels.update(**arguments)


KERNELS = {"torch": reference.update, "cpu": _cpu, "cuda": _cuda, "triton": _triton}


def _compute(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    dt_softplus: bool,
    backend: str | None,
) -> Tensor:
    checks.indices_in_range(OP, "state_indices", indices, state.shape[0])
    out = x.new_empty(x.shape)
    KERNELS[backends.select(OP, x.device.type, x.dtype, backend)](
        state=state,
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        indices=indices,
        out=out,
    )
    return out


_update = torch.library.custom_op(f"parrot_kernels::{OP}", _compute, mutates_args={"state"})


@_update.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, indices, dt_softplus, backend):
    return x.new_empty(x.shape)


_run = eager.shortcut_in_place(_update, _compute)
