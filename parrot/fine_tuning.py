"""A model that takes waveforms and trains its encoders with its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parrot.encoders import Encoder, load
from parrot.sharing import Shareable


class FineTuned(Shareable, nn.Module):
    """Encoders and a head on their utterance embeddings, all trained.

    The encoders' parameters are thawed; the encoders stay in evaluation mode, without dropout, layer drop or masking,
    and see each clip by itself and unpadded. So before the first step the head gets the embeddings that the frozen
    encoders give. :class:`parrot.training.TrainingConfig` has a learning rate of their own.

    Args:
        encoders: one per stream of the head, or specs that :func:`parrot.encoders.load` takes. Encoders are not copied,
            and a model that was given them can't be saved: specs say how to build them.
        head: takes embeddings, such as :class:`parrot.Parrot`; saved and loaded only if it is one.
        checkpointing: keep no activations of the encoders for the backward but compute them again, one clip at a
            time: the same gradients, for one more forward of the encoders.

    Raises:
        ValueError: the head transports among stored rows or between frames.
    """

    inputs = "waveforms"

    def __init__(self, encoders: Sequence[str | Encoder], head: nn.Module, *, checkpointing: bool = False) -> None:
        super().__init__()
        transport = getattr(getattr(head, "config", None), "transport", "batch")
        if transport != "batch":
            raise ValueError(f"FineTuned: `head` must have `transport` 'batch'; got {transport!r}.")
        self.specs = [encoder if isinstance(encoder, str) else None for encoder in encoders]
        loaded = [load(encoder) if isinstance(encoder, str) else encoder for encoder in encoders]
        self.encoders = nn.ModuleList(loaded).requires_grad_(True)
        self.head, self.checkpointing = head, checkpointing
        self.train(self.training)

    def train(self, mode: bool = True) -> FineTuned:
        """Set the head's mode; the encoders stay in evaluation mode."""
        super().train(mode)
        self.encoders.eval()
        return self

    @property
    def batch_dependent(self) -> bool:
        """Whether the head's is, in evaluation."""
        return self.head.batch_dependent

    def arguments(self) -> dict[str, Any]:
        if None in self.specs:
            raise ValueError("FineTuned: only encoders that were given by their specs can be saved. Build it so.")
        head = self.head.arguments()
        return {
            "encoders": self.specs,
            "n_classes": self.head.n_classes,
            "head": head,
            "checkpointing": self.checkpointing,
        }

    @classmethod
    def build(cls, arguments: dict[str, Any]) -> FineTuned:
        from parrot.model import Parrot

        with torch.device("cpu"):  # encoders come with their weights, wherever the head is
            return cls(arguments["encoders"], Parrot.build(arguments["head"]), checkpointing=arguments["checkpointing"])

    @property
    def row_modules(self) -> tuple[nn.Module, ...]:
        """Those of the head."""
        return self.head.row_modules

    def embeddings(self, *waveforms: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
        """(B, d_k) of one tensor (B, samples), or pair of it and the lengths (B,), per encoder."""
        if len(waveforms) != len(self.encoders):
            raise ValueError(f"FineTuned: wanted waveforms for {len(self.encoders)} encoders; got {len(waveforms)}.")
        found = []
        for encoder, given in zip(self.encoders, waveforms, strict=True):
            clips, lengths = given if isinstance(given, tuple) else (given, None)
            sizes = [clips.shape[1]] * len(clips) if lengths is None else lengths.tolist()
            rows = [self._embed(encoder, clip[None, :n]) for clip, n in zip(clips, sizes, strict=True)]
            found.append(torch.cat(rows) if rows else clips.new_zeros(0, encoder.embedding_dim))
        return found

    def _embed(self, encoder: Encoder, clip: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(encoder.embed, clip, use_reentrant=False)
        return encoder.embed(clip)

    def forward(self, *waveforms: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Logits (B, n_classes) of one tensor (B, samples), or pair of it and the lengths (B,), per encoder."""
        return self.head(*self.embeddings(*waveforms))

    def plan(self, *waveforms: Tensor | tuple[Tensor, Tensor]) -> Tensor | None:
        """The head's transport plan."""
        return self.head.plan(*self.embeddings(*waveforms))

    def set_epoch(self, epoch: int) -> None:
        """Tell the head which epoch, from 1, begins."""
        self.head.set_epoch(epoch)
