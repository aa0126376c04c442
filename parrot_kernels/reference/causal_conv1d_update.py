"""New steps of the causal convolution after a kept history, in plain PyTorch: as a function, and in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import silu


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (b, d, l) in the dtype of x and the new state in the dtype of ``state``; autograd goes through it.

    ``state`` (b, d, s) is left as it was. With ``seen`` (b,), the steps seen so far, it is a ring in which step t lies
    at t % s. Shapes and meaning are those of `parrot_kernels.causal_conv1d_update`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    width, size, steps = weight.shape[1], state.shape[-1], x.shape[-1]
    if seen is None:
        history = state[..., size - (width - 1) :]
        kept = torch.cat([state, x.to(state.dtype)], -1)
        new_state = kept[..., kept.shape[-1] - size :]
    else:

        def places(start: int, stop: int) -> Tensor:
            time = seen.long().view(-1, 1, 1) + torch.arange(start, stop, device=x.device)
            return time.remainder(size).expand(-1, x.shape[1], -1)

        history = state.gather(-1, places(1 - width, 0))
        first = max(0, steps - size)  # older ones would be overwritten at once
        new_state = state.scatter(-1, places(first, steps), x[..., first:].to(state.dtype))
    line = torch.cat([history.to(dtype), x.to(dtype)], -1)
    out = sum(line[..., k : k + steps] * weight[:, k : k + 1].to(dtype) for k in range(width))
    out = out if bias is None else out + bias.to(dtype).unsqueeze(-1)
    out = out if activation is None else silu(out)
    return out.to(x.dtype), new_state


def update(
    *,
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seen: Tensor | None,
    indices: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``out`` and the new ``state``; ``indices`` (b,): the entry of ``state`` of each row, negative for none."""
    rows = state if indices is None else state[indices.clamp(min=0).long()]
    result, new_rows = causal_conv1d_update(x, rows, weight, bias, "silu" if silu else None, seen)
    if indices is None:
        state.copy_(new_rows)
        out.copy_(result)
        return
    valid = indices >= 0
    state[indices[valid].long()] = new_rows[valid]
    out.copy_(result.masked_fill(~valid.view(-1, 1, 1), 0))
