"""Selective scan: checks, registration with torch.library, gradients and the choice of the backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import backends, checks, native
from ..reference import selective_scan as reference
from . import eager

OP = "selective_scan"
CHUNK_SIZE = 32  # steps between two states kept for the backward: N / 32 of the size of u


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state-space recurrence of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, section 3.2).

    With dt = softplus(delta + delta_bias) (``delta_softplus``) or delta + delta_bias, for every channel d::

        h_t = exp(dt_t A_d) h_{t-1} + dt_t B_t u_t
        out_t = (<C_t, h_t> + D_d u_t) * silu(z_t)

    Sizes below: batch b, channels d, steps l, states n, groups g (d is a multiple of g; group i serves the
    channels from i*d/g on).

    Args:
        u: input (b, d, l); fp32, fp64, fp16 or bf16. States and sums are kept in fp32, for fp64 in fp64
            (the compute dtype). Any strides: channels-last and sliced tensors are read in place.
        delta: step size (b, d, l), dtype of u.
        A: (d, n), real. A, D, delta_bias, initial_state and constant B, C may have any floating dtype and are
            converted to the compute dtype.
        B, C: constant (d, n), or per step (b, n, l) or (b, g, n, l) in the dtype of u.
        D: skip connection (d,).
        z: gate (b, d, l), dtype of u.
        delta_bias: (d,).
        delta_softplus: apply softplus to delta + delta_bias.
        reverse: run from the last valid step to the first.
        lengths: valid steps of each sequence (b,), int32 or int64, 0 <= lengths <= l. At the other steps the output
            is 0 and every gradient exactly 0, whatever the inputs hold there. Values are checked on CPU tensors only.
        seq_idx: (b, l), int32 or int64, values within int32: the state restarts from zero where it differs
            from the step before (in scan order), so that packed sequences do not meet.
        initial_state: state before the first step (b, d, n); zero by default.
        return_final_state: return the state after the last valid step too (the initial one if there is none).
        backend: "cpu", "cuda", "triton" or "torch"; by default chosen by device.

    Returns:
        out (b, d, l) in the dtype of u; with ``return_final_state`` also the final state (b, d, n) in the compute
        dtype, so that a sequence can be run in pieces.

    Gradients reach every floating input, from both outputs. Memory kept for the backward: the inputs and n / 32 of
    the size of u in the compute dtype. Differentiating twice or forward raises RuntimeError.

    Raises:
        ValueError: a shape, a device, or a length out of range.
        TypeError: a dtype; complex A.
        RuntimeError: the backend asked for can't serve this call.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, lengths, seq_idx, initial_state)
    dtype = checks.compute_dtype(u.dtype)
    A, D, delta_bias = checks.cast(A, dtype), checks.cast(D, dtype), checks.cast(delta_bias, dtype)
    initial_state = checks.cast(initial_state, dtype)
    B, C = (checks.cast(t, dtype) if t.dim() == 2 else t for t in (B, C))
    lengths, seq_idx = checks.to_int32(lengths), checks.to_int32(seq_idx)
    inputs = (u, delta, A, B, C, D, z, delta_bias, lengths, seq_idx, initial_state)
    out, final_state, _ = _call(*inputs, delta_softplus, reverse, False, backend)
    return (out, final_state) if return_final_state else out


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    sizes: dict[str, int] = {}
    checks.tensor(OP, "u", u, shape=("b", "d", "l"), dtypes=checks.FLOATS, sizes=sizes)
    checks.tensor(OP, "delta", delta, shape=("b", "d", "l"), like=u, dtypes=(u.dtype,), sizes=sizes)
    _check_A(OP, A, u, sizes)
    for name, matrix in (("B", B), ("C", C)):
        groups = f"groups of {name}"
        _check_matrix(OP, name, matrix, u, sizes, {2: ("d", "n"), 3: ("b", "n", "l"), 4: ("b", groups, "n", "l")})
    if D is not None:
        checks.tensor(OP, "D", D, shape=("d",), like=u, dtypes=checks.FLOATS, sizes=sizes)
    if z is not None:
        checks.tensor(OP, "z", z, shape=("b", "d", "l"), like=u, dtypes=(u.dtype,), sizes=sizes)
    if delta_bias is not None:
        checks.tensor(OP, "delta_bias", delta_bias, shape=("d",), like=u, dtypes=checks.FLOATS, sizes=sizes)
    if lengths is not None:
        checks.tensor(OP, "lengths", lengths, shape=("b",), like=u, dtypes=checks.INTEGERS, sizes=sizes)
    if seq_idx is not None:
        checks.tensor(OP, "seq_idx", seq_idx, shape=("b", "l"), like=u, dtypes=checks.INTEGERS, sizes=sizes)
        if eager.is_plain((seq_idx,)):
            checks.fits_int32(OP, "seq_idx", seq_idx)
    if initial_state is not None:
        shape = ("b", "d", "n")
        checks.tensor(OP, "initial_state", initial_state, shape=shape, like=u, dtypes=checks.FLOATS, sizes=sizes)


def _check_A(op: str, A: Tensor, u: Tensor, sizes: dict[str, int]) -> None:
    if isinstance(A, Tensor) and A.is_complex():
        fix = "Complex state matrices (S4D-Lin and the like) are not supported; Mamba-1 models use real ones."
        raise checks.error(op, "A", "real", str(A.dtype).removeprefix("torch."), fix, TypeError)
    checks.tensor(op, "A", A, shape=("d", "n"), like=u, dtypes=checks.FLOATS, sizes=sizes)


def _check_matrix(
    op: str, name: str, matrix: Tensor, u: Tensor, sizes: dict[str, int], shapes: dict[int, tuple[str, ...]]
) -> None:
    """Check B or C: its shape among ``shapes`` by dimension, its dtype, and that its groups divide the channels."""
    if not isinstance(matrix, Tensor):
        raise checks.error(op, name, "a torch.Tensor", type(matrix).__name__, kind=TypeError)
    if matrix.dim() not in shapes:
        wanted = " or ".join(f"({', '.join(shape)})" for shape in shapes.values())
        raise checks.error(op, name, f"of shape {wanted}", tuple(matrix.shape))
    shape = shapes[matrix.dim()]
    dtypes = checks.FLOATS if shape == ("d", "n") else (u.dtype,)
    checks.tensor(op, name, matrix, shape=shape, like=u, dtypes=dtypes, sizes=sizes)
    groups = f"groups of {name}"
    if groups in shape and (sizes[groups] == 0 or sizes["d"] % sizes[groups] != 0):
        raise checks.error(op, name, f"in groups that divide d = {sizes['d']}", f"{sizes[groups]} groups")


class Kernels(NamedTuple):
    """A backend's launchers; keywords as in `reference.selective_scan`."""

    forward: Callable[..., None]
    backward: Callable[..., None]
    checkpoints: bool  # whether the forward writes the states that the backward starts from


def _cuda_forward(**arguments: Any) -> None:
    u, final_state = arguments["u"], arguments["final_state"]
    groups = (m.shape[1] if m.dim() == 4 else 1 for m in (arguments["B"], arguments["C"]))
    with torch.cuda.device(u.device):
        size = native.extension().selective_scan_workspace_cuda(
            batch=u.shape[0], dim=u.shape[1], groups=math.lcm(*groups), length=u.shape[2], state=final_state.shape[2]
        )
    workspace = final_state.new_empty(size) if size else None
    native.call_cuda("selective_scan_forward_cuda", u.device, workspace=workspace, **arguments)


def _cuda_backward(*, checkpoints: Tensor | None, **arguments: Any) -> None:
    u, A = arguments["u"], arguments["A"]
    if checkpoints is None:  # none were kept: run forward again
        (batch, dim, length), states = u.shape, A.shape[1]
        checkpoints = A.new_empty(batch, -(-length // CHUNK_SIZE), dim, states)
        names = ("delta", "B", "C", "D", "delta_bias", "delta_softplus", "reverse", "lengths", "seq_idx", "chunk_size")
        inputs = {name: arguments[name] for name in (*names, "initial_state")}
        out, final_state = torch.empty_like(u), A.new_empty(batch, dim, states)
        _cuda_forward(u=u, A=A, z=None, **inputs, out=out, final_state=final_state, checkpoints=checkpoints)
    matrices = {name: arguments[name] for name in ("u", "A", "B", "C")}
    workspace = A.new_empty(native.workspace_size("selective_scan_backward_workspace_cuda", **matrices))
    native.call_cuda(
        "selective_scan_backward_cuda", u.device, checkpoints=checkpoints, workspace=workspace, **arguments
    )


def _cpu_forward(**arguments: Any) -> None:
    native.call_cpu("selective_scan_forward", **arguments)


def _cpu_backward(**arguments: Any) -> None:
    native.call_cpu("selective_scan_backward", **arguments)


def _triton_forward(**arguments: Any) -> None:
    from ..triton_kernels import selective_scan as kernels  # imports triton, which may be absent

    kernels.forward(**arguments)


def _triton_backward(**arguments: Any) -> None:
    from ..triton_kernels import selective_scan_backward as kernels

    kernels.backward(**arguments)


KERNELS = {
    "torch": Kernels(reference.forward, reference.backward, checkpoints=True),
    "cpu": Kernels(_cpu_forward, _cpu_backward, checkpoints=True),
    "triton": Kernels(_triton_forward, _triton_backward, checkpoints=True),
    "cuda": Kernels(_cuda_forward, _cuda_backward, checkpoints=True),
}


def _kernels(u: Tensor, backend: str | None) -> Kernels:
    return KERNELS[backends.select(OP, u.device.type, u.dtype, backend)]


def _allocate(u: Tensor, A: Tensor, keep: bool, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """out, final_state and checkpoints (b, chunks * d, n), of no chunk when none are kept.

    Chunks and channels are one dimension, because a compiler has to know whether a dimension is 1: of the number of
    chunks alone it would make a condition on the length, and compile again, or refuse to export, across 32.
    """
    (batch, dim, length), states, dtype = u.shape, A.shape[1], checks.compute_dtype(u.dtype)
    chunks = -(-length // CHUNK_SIZE) if keep and _kernels(u, backend).checkpoints else 0
    final_state = u.new_empty(batch, dim, states, dtype=dtype)
    return torch.empty_like(u), final_state, u.new_empty(batch, chunks * dim, states, dtype=dtype)


def _by_chunk(checkpoints: Tensor, u: Tensor) -> Tensor | None:
    """(b, chunks, d, n), None if none were kept."""
    return checkpoints.unflatten(1, (-1, u.shape[1])) if checkpoints.shape[1] else None


def _compute_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.lengths_in_range(OP, "lengths", lengths, u.shape[2])
    out, final_state, checkpoints = _allocate(u, A, keep, backend)
    _kernels(u, backend).forward(
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        reverse=reverse,
        lengths=lengths,
        seq_idx=seq_idx,
        initial_state=initial_state,
        chunk_size=CHUNK_SIZE,
        out=out,
        final_state=final_state,
        checkpoints=_by_chunk(checkpoints, u),
    )
    return out, final_state, checkpoints


_forward = torch.library.custom_op("parrot_kernels::selective_scan_forward", _compute_forward, mutates_args=())


@_forward.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, lengths, seq_idx, initial_state, delta_softplus, reverse, keep, backend):
    return _allocate(u, A, keep, backend)


def _allocate_gradients(inputs: list[Tensor | None]) -> list[Tensor]:
    """One gradient per input; an input that was not given gets an empty tensor, ops return no None."""
    like = next(t for t in inputs if t is not None)
    return [like.new_empty(0) if t is None else torch.empty_like(t) for t in inputs]


def _compute_backward(
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    reverse: bool,
    backend: str | None,
) -> list[Tensor]:
    inputs = [u, delta, A, B, C, D, z, delta_bias, initial_state]
    gradients = _allocate_gradients(inputs)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = (
        None if t is None else g for t, g in zip(inputs, gradients, strict=True)
    )
    _kernels(u, backend).backward(
        grad_out=grad_out,
        grad_final_state=grad_final_state,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        reverse=reverse,
        lengths=lengths,
        seq_idx=seq_idx,
        initial_state=initial_state,
        chunk_size=CHUNK_SIZE,
        checkpoints=_by_chunk(checkpoints, u),
        du=du,
        ddelta=ddelta,
        dA=dA,
        dB=dB,
        dC=dC,
        dD=dD,
        dz=dz,
        ddelta_bias=ddelta_bias,
        dinitial_state=dinitial_state,
    )
    return gradients


_backward = torch.library.custom_op("parrot_kernels::selective_scan_backward", _compute_backward, mutates_args=())


@_backward.register_fake
def _(
    grad_out,
    grad_final_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    lengths,
    seq_idx,
    initial_state,
    checkpoints,
    delta_softplus,
    reverse,
    backend,
):
    return _allocate_gradients([u, delta, A, B, C, D, z, delta_bias, initial_state])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, delta_softplus, reverse, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = delta_softplus, reverse, backend


def _autograd(ctx, grad_out, grad_final_state, _):
    *tensors, lengths, seq_idx, initial_state, checkpoints = ctx.saved_tensors
    gradients = _run_backward(
        grad_out, grad_final_state, *tensors, lengths, seq_idx, initial_state, checkpoints, *ctx.options
    )
    *gradients, dinitial_state = (
        g if t is not None else None for t, g in zip((*tensors, initial_state), gradients, strict=True)
    )
    return (*gradients, None, None, dinitial_state, None, None, None, None)


def _no_double_backward(ctx, *_):
    raise RuntimeError(
        f"{OP}: differentiating twice is not supported. Detach what the second derivative need not pass through, or "
        "use parrot_kernels.reference.selective_scan.selective_scan, which autograd goes through."
    )


def _call(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op, told whether a backward may follow: of torch.func's levels, only some show that."""
    *inputs, delta_softplus, reverse, keep, backend = arguments
    keep = keep or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs))
    return _run_forward(*inputs, delta_softplus, reverse, keep, backend)


_forward.register_autograd(_autograd, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)
_vmap = eager.looping(_call)
_vmap_backward = eager.looping(lambda *arguments: _run_backward(*arguments))
_forward.register_vmap(_vmap)
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
