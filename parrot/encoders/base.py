"""What all encoders share: the interface, the checks of a waveform, and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """A speech encoder: mono waveforms in, one vector per utterance out.

    Loaded encoders are in evaluation mode and frozen; ``requires_grad_(True)`` thaws them.

    Attributes:
        name: what reports call it.
        sample_rate: of the waveforms it takes, in Hz.
        min_samples: the shortest waveform it takes.
        embedding_dim: width of its vectors.
        threads: CPU threads that one clip is worth; None leaves it to torch. Small encoders lose by sharing.
    """

    name: str
    sample_rate: int
    min_samples: int
    embedding_dim: int
    threads: int | None = None

    def configuration(self) -> dict[str, Any]:
        """Everything beside the weights that an embedding depends on, as JSON-able values."""
        raise NotImplementedError

    def timestamp_embeddings(self, waveforms: Tensor) -> Tensor:
        """Embed each time step: (B, samples) to (B, steps, embedding_dim), or both without the batch dimension."""
        raise NotImplementedError

    def embed(self, waveforms: Tensor) -> Tensor:
        """Embed each utterance as the mean of its time steps.

        Args:
            waveforms: (B, samples) or (samples,), floating point, mono, at ``sample_rate``, in [-1, 1]. All of a
                batch have this length: pad none to make them so, since the encoders' statistics and attention
                would see the padding.

        Returns:
            (B, embedding_dim) or (embedding_dim,).

        Raises:
            TypeError, ValueError: not a floating-point tensor of that shape, shorter than ``min_samples``, not
                finite, or silent.
        """
        return self.timestamp_embeddings(waveforms).mean(-2)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the class, the configuration and every weight: equal fingerprints give equal embeddings."""
        digest = hashlib.sha256(json.dumps([type(self).__name__, self.configuration()], sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _checked(self, waveforms: Tensor) -> Tensor:
        """The waveforms, checked, in the dtype of the weights."""
        where = f"{type(self).__name__}: `waveforms` must be"
        if not isinstance(waveforms, Tensor) or not waveforms.is_floating_point():
            got = waveforms.dtype if isinstance(waveforms, Tensor) else type(waveforms).__name__
            raise TypeError(f"{where} a floating-point torch.Tensor; got {got}. Integer samples are divided by 2**15.")
        if waveforms.dim() not in (1, 2):
            raise ValueError(
                f"{where} (batch, samples) or (samples,); got {tuple(waveforms.shape)}. Mix channels down to mono."
            )
        if waveforms.shape[-1] < self.min_samples:
            seconds = self.min_samples / self.sample_rate
            raise ValueError(
                f"{where} of at least {self.min_samples} samples ({seconds:.4f} s at {self.sample_rate} Hz); "
                f"got {waveforms.shape[-1]}. Leave so short a clip out."
            )
        peaks = waveforms.abs().amax(-1)
        if not torch.isfinite(peaks).all():
            raise ValueError(f"{where} finite; got NaN or infinity. Leave the clip out, or decode it again.")
        if (peaks == 0).any():
            raise ValueError(f"{where} audible; got digital silence. Leave the clip out: its embedding means nothing.")
        return waveforms.to(next(self.parameters()).dtype)
