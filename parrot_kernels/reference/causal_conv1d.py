"""The short causal depthwise convolution of Mamba in plain PyTorch.

In scan order, with the history h (W-1 inputs before the first step, oldest first) put before x:

    pre_s = bias + sum_{k=0..W-1} w_k [h, x]_{s+k}        out_s = pre_s or silu(pre_s)

so w_{W-1} meets the present input. A tap is dropped where it reaches into another packed sequence; the history
belongs to the sequence of the first step. The final state is the history of the step after the last, without what
belongs to another sequence than the last.

`causal_conv1d` is differentiable by autograd: the oracle. `forward` and `backward` are its explicit pair.
Shapes as in `parrot_kernels.ops.causal_conv1d`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import activations
from .scan_order import ScanOrder


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
) -> tuple[Tensor, Tensor]:
    """Differentiable; returns (out, final_state)."""
    line = _Line(x, weight.shape[1], reverse, lengths, seq_idx)
    extended = line.extend(x, initial_state)
    pre = line.convolve(extended, weight, bias)
    out = activations.silu(pre) if activation is not None else pre
    return line.order(out).to(x.dtype), line.final_state(extended).to(x.dtype)


def forward(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    out: Tensor,
    final_state: Tensor,
) -> None:
    """Fill ``out`` and ``final_state``."""
    result, state = causal_conv1d(
        x,
        weight,
        bias,
        "silu" if silu else None,
        reverse=reverse,
        lengths=lengths,
        seq_idx=seq_idx,
        initial_state=initial_state,
    )
    out.copy_(result)
    final_state.copy_(state)


def backward(
    *,
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial_state: Tensor | None,
) -> None:
    """Fill the gradients ``d*`` of the inputs of `forward`, given those of its outputs (None stands for zero)."""
    width = weight.shape[1]
    line = _Line(x, width, reverse, lengths, seq_idx)
    extended = line.extend(x, initial_state)
    dpre = torch.zeros(x.shape, dtype=line.dtype, device=x.device)
    if grad_out is not None:
        dpre = line.order(grad_out.to(line.dtype))
        if silu:
            dpre = dpre * activations.silu_derivative(line.convolve(extended, weight, bias))

    dextended = torch.zeros_like(extended)
    weight = weight.to(line.dtype)
    for k in range(width):
        dtap = line.drop_foreign(dpre, k)
        dextended[..., k : k + line.length].addcmul_(dtap, weight[:, k, None])
        dweight[:, k] = (dtap * extended[..., k : k + line.length]).sum((0, 2))
    if grad_final_state is not None:
        line.add_final_state_gradient(dextended, grad_final_state.to(line.dtype))
    if bias is not None:
        dbias.copy_(dpre.sum((0, 2)))
    if initial_state is not None:
        dinitial_state.copy_(dextended[..., : width - 1])
    dx.copy_(line.order(dextended[..., width - 1 :]))


class _Line:
    """Sequences in scan order with their history in front: (B, D, W-1+L)."""

    def __init__(self, x: Tensor, width: int, reverse: bool, lengths: Tensor | None, seq_idx: Tensor | None) -> None:
        self.batch, self.dim, self.length = x.shape
        self.width = width
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.order = ScanOrder(self.batch, self.length, lengths, reverse, x.device)
        ends = x.new_full((self.batch,), self.length, dtype=torch.long) if lengths is None else lengths.long()
        # (B, W-1): where the final state lies
        self.final = ends.unsqueeze(1) + torch.arange(width - 1, device=x.device)
        self.ids = self.final_foreign = None
        if seq_idx is not None and self.length > 0:
            ids = self.order(seq_idx)
            self.ids = torch.cat([ids[:, :1].expand(-1, width - 1), ids], 1)  # (B, W-1+L)
            last = self.ids.gather(1, ends.unsqueeze(1) + width - 2) if width > 1 else None
            if last is not None:
                self.final_foreign = (self.ids.gather(1, self.final) != last).unsqueeze(1)

    def extend(self, x: Tensor, initial_state: Tensor | None) -> Tensor:
        if initial_state is None:
            initial_state = x.new_zeros(self.batch, self.dim, self.width - 1)
        return torch.cat([initial_state.to(self.dtype), self.order(x.to(self.dtype))], -1)

    def drop_foreign(self, taps: Tensor, k: int) -> Tensor:
        """Zero the steps whose tap k lies in another sequence."""
        if self.ids is None or k == self.width - 1:
            return taps
        foreign = self.ids[:, k : k + self.length] != self.ids[:, self.width - 1 :]
        return taps.masked_fill(foreign.unsqueeze(1), 0)

    def convolve(self, extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(self.dtype)
        pre = torch.zeros_like(extended[..., : self.length])
        if bias is not None:
            pre = pre + bias.to(self.dtype).unsqueeze(-1)
        for k in range(self.width):
            taps = self.drop_foreign(extended[..., k : k + self.length], k)
            pre = torch.addcmul(pre, taps, weight[:, k, None])
        return pre

    def final_state(self, extended: Tensor) -> Tensor:
        state = extended.gather(-1, self._final_index())
        return state if self.final_foreign is None else state.masked_fill(self.final_foreign, 0)

    def add_final_state_gradient(self, dextended: Tensor, gradient: Tensor) -> None:
        if self.final_foreign is not None:
            gradient = gradient.masked_fill(self.final_foreign, 0)
        dextended.scatter_add_(-1, self._final_index(), gradient)

    def _final_index(self) -> Tensor:
        return self.final.unsqueeze(1).expand(-1, self.dim, -1)
