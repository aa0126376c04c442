"""The functions of causal-conv1d (1.5), keyword for keyword, on any device and without its extension.

`parrot_kernels.compat.install` makes them importable as ``causal_conv1d``. Beyond the original: any strides, any
filter width, packed sequences together with an initial state, and gradients of the final states.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..ops import causal_conv1d as ops
from ..ops.causal_conv1d_update import causal_conv1d_update as update


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution; see `parrot_kernels.causal_conv1d`.

    Args:
        x: (batch, dim, seqlen).
        weight: (dim, width).
        bias: (dim,).
        seq_idx: (batch, seqlen), int; sequences packed along time. A negative index marks padding: output 0.
        initial_states: (batch, dim, width - 1).
        return_final_states: return (out, final_states).
        final_states_out: (batch, dim, width - 1), written to and returned as the final states.
        activation: None, "silu" or "swish".
    """
    out, final_states = ops.causal_conv1d(
        x,
        weight,
        bias,
        activation,
        seq_idx=seq_idx,
        initial_state=initial_states,
        return_final_state=True,
    )
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if not return_final_states:
        return out
    if final_states_out is not None:
        shape = tuple(final_states.shape)
        checks.tensor("causal_conv1d_fn", "final_states_out", final_states_out, shape=shape, like=x)
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve new steps after those in ``conv_state``, which is updated in place.

    Args:
        x: (batch, dim) or (batch, dim, seqlen).
        conv_state: (batch, dim, state_len), state_len >= width - 1, the newest input last; with
            ``conv_state_indices`` (entries, dim, state_len).
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: (batch,), int32; steps seen so far. ``conv_state`` is then a circular buffer, in which step s
            lies at s % state_len.
        conv_state_indices: (batch,), int32; the entry of ``conv_state`` that belongs to each row of x. At -1 the row
            is padding: output 0, no state touched.

    Returns:
        out, of the shape of x.
    """
    return update(
        x, conv_state, weight, bias, activation, cache_seqlens=cache_seqlens, state_indices=conv_state_indices
    )


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of packed sequences, for `causal_conv1d_update`.

    Args:
        x: (total_tokens, dim), the sequences one after the other.
        cu_seqlens: (batch + 1,), where they start, and the total.
        state_len: inputs to keep of each.

    Returns:
        (batch, dim, state_len), the newest last; zero where a sequence is shorter.
    """
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    tokens = ends + torch.arange(-state_len, 0, device=x.device)  # (batch, state_len)
    states = x[tokens.clamp(min=0)].masked_fill((tokens < starts).unsqueeze(-1), 0)
    return states.transpose(1, 2)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` through torch's own convolution."""
    width, (batch, dim, _) = weight.shape[1], x.shape
    history = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states.to(x.dtype)
    line = torch.cat([history, x], -1)
    pre = F.conv1d(line.to(weight.dtype), weight.unsqueeze(1), bias, groups=dim)
    out = (pre if activation is None else F.silu(pre)).to(x.dtype)
    if not return_final_states:
        return out
    final_states = line[..., line.shape[-1] - (width - 1) :]
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` one step at a time."""
    if x.dim() == 2:
        return causal_conv1d_update_ref(x.unsqueeze(-1), conv_state, weight, bias, activation, cache_seqlens).squeeze(
            -1
        )
    size, width = conv_state.shape[-1], weight.shape[1]
    rows, before = torch.arange(x.shape[0], device=x.device), conv_state.clone()
    if cache_seqlens is None:
        lines = list(before.unbind(-1))[size - (width - 1) :]
    else:
        lines = [before[rows, :, (cache_seqlens + s) % size] for s in range(1 - width, 0)]
    outs = []
    for s, step in enumerate(x.unbind(-1)):
        lines.append(step)
        taps = torch.stack(lines[-width:], -1).to(weight.dtype)
        pre = (taps * weight).sum(-1)
        pre = pre if bias is None else pre + bias
        outs.append(pre if activation is None else F.silu(pre))
        if cache_seqlens is None:
            conv_state.copy_(conv_state.roll(-1, -1))
            conv_state[..., -1] = step
        else:
            conv_state[rows, :, (cache_seqlens + s) % size] = step
    return torch.stack(outs, -1).to(x.dtype)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states` one sequence at a time."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        kept = min(end - start, state_len)
        states[i, :, state_len - kept :] = x[end - kept : end].t()
    return states
