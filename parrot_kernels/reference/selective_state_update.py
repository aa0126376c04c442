"""One step of the selective scan in plain PyTorch: as a function, and in place as the kernels run it."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import silu, softplus


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
) -> tuple[Tensor, Tensor]:
    """out (b, d) in the dtype of x and the new state (b, d, n) in the compute dtype; autograd goes through it.

    ``state`` is left as it was; shapes and meaning are those of `parrot_kernels.selective_state_update`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, dt, h, A = (t.to(dtype) for t in (x, dt, state, A))
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    dt = softplus(dt) if dt_softplus else dt
    B, C = (_spread(matrix.to(dtype), x.shape[1]) for matrix in (B, C))
    h = torch.exp(dt.unsqueeze(-1) * A) * h + (dt * u).unsqueeze(-1) * B
    out = (h * C).sum(-1)
    out = out if D is None else out + D.to(dtype) * u
    out = out if z is None else out * silu(z.to(dtype))
    return out.to(x.dtype), h


def update(*, state: Tensor, indices: Tensor | None, out: Tensor, **inputs: Tensor | bool | None) -> None:
    """Write ``out`` and the new ``state``; ``indices`` (b,): the entry of ``state`` of each row, negative for none."""
    if indices is None:
        result, new_state = selective_state_update(state, **inputs)
        state.copy_(new_state)
        out.copy_(result)
        return
    valid = indices >= 0
    result, new_rows = selective_state_update(state[indices.clamp(min=0).long()], **inputs)
    state[indices[valid].long()] = new_rows[valid].to(state.dtype)
    out.copy_(result.masked_fill(~valid.unsqueeze(1), 0))


def _spread(matrix: Tensor, dim: int) -> Tensor:
    """(b, n) or (b, g, n) to what broadcasts against (b, d, n)."""
    if matrix.dim() == 2:
        return matrix.unsqueeze(1)
    return matrix.repeat_interleave(dim // matrix.shape[1], 1)
