"""The Mamba-1 functions of mamba-ssm (2.x), keyword for keyword, on any device and without its extension.

`parrot_kernels.compat.install` makes them importable as ``mamba_ssm``. Beyond the original: any strides and state
size, a state to start from, and gradients of the last state, which the original ignores. A complex A runs through a
step loop in PyTorch.

Also the entry points of the forks behind Vim, SSAMBA and VideoMamba: `mamba_inner_fn_no_out_proj` and
`bimamba_inner_fn`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import selective_scan as ops
from ..ops.causal_conv1d import causal_conv1d
from ..ops.selective_state_update import selective_state_update as update
from ..reference import selective_scan as reference
from .complex_scan import complex_scan
from .mamba_layers import rms_norm


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    prev_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan; see `parrot_kernels.selective_scan`.

    Args:
        u, delta, z: (batch, dim, seqlen). Unlike in the original their dtypes may differ; out has that of u.
        A: (dim, dstate), real; or complex, see `complex_scan`.
        B, C: (dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen); with a complex A constant ones
            are complex and the others hold real and imaginary parts in turn, (..., 2 seqlen).
        D, delta_bias: (dim,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: return (out, last_state), the latter (batch, dim, dstate) in fp32 (fp64 for fp64).
        prev_state: (batch, dim, dstate), the last state of the piece of the sequence before.
    """
    scan = complex_scan if A.is_complex() else _scan
    out, last_state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, prev_state)
    return (out, last_state) if return_last_state else out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    prev_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` as a plain step loop in PyTorch that autograd goes through."""
    if A.is_complex():
        out, last_state = complex_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, prev_state)
    else:
        out, last_state = reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state=prev_state
        )
    return (out, last_state) if return_last_state else out


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
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the scan; ``state`` is updated in place.

    Args:
        state: (batch, dim, dstate) or (batch, nheads, dim, dstate).
        x, dt, z: (batch, dim) or (batch, nheads, dim).
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: (batch, dstate) or (batch, ngroups, dstate).
        D, dt_bias: (dim,) or (nheads, dim).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch,), int; the entry of ``state`` that belongs to each row of x. Where negative the
            row is padding: output 0, no state touched.

    Returns:
        out, of the shape and dtype of x.

    Unlike in the original, gradients reach all but ``state``, see `parrot_kernels.selective_state_update`.
    """
    batch, dtype = x.shape[0], _common_dtype(x, dt, B, C, z)

    def channels(t: Tensor) -> Tensor:  # heads and channels are one dimension of ours
        return t.reshape(batch, -1).to(dtype)

    flat = state if state.dim() == 3 else state.flatten(1, 2)
    out = update(
        flat,
        channels(x),
        channels(dt),
        A if A.dim() == 2 else A.flatten(0, 1),
        B.to(dtype),
        C.to(dtype),
        None if D is None else D.reshape(-1),
        None if z is None else channels(z),
        None if dt_bias is None else dt_bias.reshape(-1),
        dt_softplus,
        state_indices=state_batch_indices,
    )
    if state.dim() == 4 and state.stride(1) != state.shape[2] * state.stride(2):  # no view: flat is a copy
        with torch.no_grad():
            state.copy_(flat.view(state.shape))
    return out.view(x.shape).to(x.dtype)


def selective_state_update_ref(
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
) -> Tensor:
    """`selective_state_update` as a formula; like the kernel it computes out from the state before that is rounded."""
    batch, dstate = state.shape[0], state.shape[-1]
    rows = state.float().view(batch, -1, dstate)  # heads and channels as one dimension

    def per_channel(matrix: Tensor) -> Tensor:
        groups = matrix.float().view(batch, -1, dstate)
        return groups.repeat_interleave(rows.shape[1] // groups.shape[1], 1)

    u, dt = x.float().reshape(batch, -1), dt.float().reshape(batch, -1)
    dt = dt if dt_bias is None else dt + dt_bias.float().reshape(-1)
    dt = F.softplus(dt) if dt_softplus else dt
    decay = torch.exp(dt.unsqueeze(-1) * A.float().reshape(-1, dstate))
    rows = decay * rows + (dt * u).unsqueeze(-1) * per_channel(B)
    state.copy_(rows.view(state.shape))
    out = (rows * per_channel(C)).sum(-1) + (0 if D is None else D.float().reshape(-1) * u)
    out = out if z is None else out * F.silu(z.float().reshape(batch, -1))
    return out.view(x.shape).to(x.dtype)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block after its input projection: convolution, projections to delta, B and C, scan, output projection.

    Args:
        xz: (batch, 2 dim, seqlen), the output of the input projection.
        conv1d_weight: (dim, 1, width).
        conv1d_bias: (dim,).
        x_proj_weight: (rank + dstate for each of B, C that is not given, dim).
        delta_proj_weight: (dim, rank).
        out_proj_weight, out_proj_bias: (width of the model, dim), (width of the model,).
        A, D, delta_bias, delta_softplus: as in `selective_scan_fn`.
        B, C: constant, or None: projected from the input.
        B_proj_bias, C_proj_bias: (dstate,), added to what is projected.
        checkpoint_lvl: accepted; here autograd keeps the inputs of each op, whatever the level.
        b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps: normalise B, C and the low-rank delta (FalconMamba).

    Returns:
        (batch, seqlen, width of the model).
    """
    del checkpoint_lvl
    norms = [
        None if w is None else functools.partial(rms_norm, weight=w, eps=b_c_dt_rms_eps)
        for w in (b_rms_weight, c_rms_weight, dt_rms_weight)
    ]
    u, delta, z, B, C = _inner_inputs(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        B_proj_bias,
        C_proj_bias,
        *norms,
    )
    scan = complex_scan if A.is_complex() else _scan
    y, _ = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, None)
    return _out_projection(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """The same op by op, as in the original from the same convolution and scan: `mamba_inner_fn` is no other here."""
    return mamba_inner_fn(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` without the output projection: (batch, dim, seqlen)."""
    u, delta, z, B, C = _inner_inputs(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )
    scan = complex_scan if A.is_complex() else _scan
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, None)[0]


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` with a second scan from the end, of its own A (Vim's bidirectional block, version 1)."""
    u, delta, z, B, C = _inner_inputs(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias
    )
    shared = B, C, D, z, delta_bias, delta_softplus
    forth, _ = _scan(u, delta, A, *shared)
    back, _ = _scan(u, delta, A_b, *shared, reverse=True)
    return _out_projection(forth + back, out_proj_weight, out_proj_bias)


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op for activations of mixed dtypes, as autocast makes them: run in the widest, out in that of u."""
    per_step = [u, delta, z, *(m for m in (B, C) if m.dim() > 2)]
    dtype = _common_dtype(*per_step)
    B, C = (m.to(dtype) if m.dim() > 2 else m for m in (B, C))
    z = None if z is None else z.to(dtype)
    out, last_state = ops.selective_scan(
        u.to(dtype),
        delta.to(dtype),
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        reverse=reverse,
        initial_state=initial_state,
        return_final_state=True,
    )
    return out.to(u.dtype), last_state


Normalise = Callable[[Tensor], Tensor]


def _inner_inputs(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    normalise_B: Normalise | None = None,
    normalise_C: Normalise | None = None,
    normalise_dt: Normalise | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, delta, z, B, C of the scan inside a Mamba block."""
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    projected = F.linear(u.transpose(1, 2), x_proj_weight)  # (batch, seqlen, ...)

    def per_step(low_rank: Tensor, bias: Tensor | None, normalise: Normalise | None) -> Tensor:
        low_rank = low_rank if bias is None else low_rank + bias.to(low_rank.dtype)
        low_rank = low_rank if normalise is None else normalise(low_rank)
        if A.is_complex():  # real and imaginary parts in turn along time
            return low_rank.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2)
        return low_rank.transpose(1, 2)

    dt = projected[..., :rank] if normalise_dt is None else normalise_dt(projected[..., :rank])
    delta = F.linear(dt, delta_proj_weight).transpose(1, 2)
    if B is None:
        B = per_step(projected[..., rank : rank + states], B_proj_bias, normalise_B)
    if C is None:
        C = per_step(projected[..., -states:], C_proj_bias, normalise_C)
    return u, delta, z, B, C


def _out_projection(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(y.transpose(1, 2), weight, None if bias is None else bias.to(weight.dtype))


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))
