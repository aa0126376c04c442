"""Scan order: where step s = 0, 1, ... of a recurrence lies in time, for padded and reversed sequences.

Step s of a sequence of length n is time s, or time n-1-s in reverse; steps s >= n are padding in both. So a
reversed or padded problem becomes a plain left-to-right one whose padding, if any, comes last.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ScanOrder:
    """Takes (B, ..., L) tensors to scan order with zeroed padding, and back: the map is its own inverse."""

    def __init__(self, batch: int, length: int, lengths: Tensor | None, reverse: bool, device: torch.device) -> None:
        self.reverse = reverse
        self.lengths = lengths
        self.padding = self.index = None
        if lengths is not None:
            step, end = torch.arange(length, device=device), lengths.long().unsqueeze(1)
            self.padding = step >= end  # (B, L)
            if reverse:
                self.index = torch.where(self.padding, step, end - 1 - step)

    def __call__(self, x: Tensor) -> Tensor:
        if self.padding is not None:
            x = x.masked_fill(self._per_step(self.padding, x), 0)
        if self.index is not None:
            return x.gather(-1, self._per_step(self.index, x).expand(x.shape))
        return x.flip(-1) if self.reverse else x

    def same_sequence(self, seq_idx: Tensor) -> Tensor:
        """(B, L) bool: whether step s continues the sequence of step s - 1 (true at step 0 and at padding)."""
        seq_idx = self(seq_idx)
        same = torch.ones_like(seq_idx, dtype=torch.bool)
        same[:, 1:] = seq_idx[:, 1:] == seq_idx[:, :-1]
        return same if self.padding is None else same | self.padding

    @staticmethod
    def _per_step(steps: Tensor, x: Tensor) -> Tensor:
        return steps.view(steps.shape[0], *(1,) * (x.dim() - 2), steps.shape[1])
