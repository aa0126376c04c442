"""What all encoders share: the interface, the checks of a waveform, and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

LAYERS = ("last", "mean", "weighted")


class Encoder(nn.Module):
    """A speech encoder: mono waveforms in, one vector per utterance or per frame out.

    Loaded encoders are in evaluation mode and frozen; ``requires_grad_(True)`` thaws them.

    Attributes:
        name: what reports call it.
        sample_rate: of the waveforms it takes, in Hz.
        normalisation: what it does to its input, in words.
        min_samples: the shortest waveform it takes.
        frame_rate: its frames per second.
        embedding_dim: width of its vectors, of utterances as of frames.
        n_layers: its layers; hidden state 0 is their input and state ``n_layers`` the encoder's output.
        layer: what :meth:`use_layer` chose.
        threads: CPU threads that one clip is worth; None leaves it to torch. Small encoders lose by sharing.
    """

    name: str
    sample_rate: int
    normalisation: str
    min_samples: int
    frame_rate: float
    embedding_dim: int
    n_layers: int
    layer: str | int = "last"
    threads: int | None = None

    def configuration(self) -> dict[str, Any]:
        """Everything beside the weights that an embedding depends on, as JSON-able values."""
        raise NotImplementedError

    def _states(self, waveforms: Tensor, every: bool) -> Sequence[Tensor]:
        """The hidden states (B, frames, embedding_dim) of checked waveforms (B, samples), or the last one alone."""
        raise NotImplementedError

    def use_layer(self, layer: str | int) -> Self:
        """Choose the hidden state that embeddings are made of.

        Args:
            layer: "last" (the encoder's output), an int from 0 (the input of the first layer) to ``n_layers`` or
                negative from the end, "mean" (over all states), or "weighted": sum_k softmax(w)_k state_k with a
                parameter w, ``layer_weights``, that starts at zero and can be trained while the encoder is frozen
                (SUPERB, Yang et al. 2021, arXiv 2105.01051).

        Returns:
            The encoder itself.

        Raises:
            ValueError: there is no such layer.
        """
        number = isinstance(layer, int) and not isinstance(layer, bool)
        if not (-self.n_layers - 1 <= layer <= self.n_layers if number else layer in LAYERS):
            raise ValueError(
                f"{type(self).__name__}: `layer` must be one of {', '.join(LAYERS)}, or an int from "
                f"{-self.n_layers - 1} to {self.n_layers}; got {layer!r}."
            )
        self.layer = layer % (self.n_layers + 1) if number else layer
        weights = torch.zeros(self.n_layers + 1, device=next(self.parameters()).device)
        self.register_parameter("layer_weights", nn.Parameter(weights) if layer == "weighted" else None)
        return self

    def _chosen(self, waveforms: Tensor, *options: Any) -> Tensor:
        if self.layer == "last":
            return self._states(waveforms, False, *options)[-1]
        states = self._states(waveforms, True, *options)
        return states[self.layer] if isinstance(self.layer, int) else self._combined(states)

    def _combined(self, states: Sequence[Tensor]) -> Tensor:
        shares = self.layer_weights.softmax(0) if self.layer == "weighted" else [1 / len(states)] * len(states)
        return sum(share * state for share, state in zip(shares, states, strict=True))

    def hidden_states(self, waveforms: Tensor) -> tuple[Tensor, ...]:
        """All ``n_layers + 1`` states, whatever the chosen layer: each (B, frames, embedding_dim) of (B, samples).

        Both without the batch dimension where ``waveforms`` has none.
        """
        states = self._states(torch.atleast_2d(self._checked(waveforms)), True)
        return tuple(state[0] if waveforms.dim() == 1 else state for state in states)

    def timestamp_embeddings(self, waveforms: Tensor) -> Tensor:
        """Embed each time step: (B, samples) to (B, frames, embedding_dim), or both without the batch dimension."""
        frames = self._chosen(torch.atleast_2d(self._checked(waveforms)))
        return frames[0] if waveforms.dim() == 1 else frames

    def frames(self, waveforms: Tensor, lengths: Tensor | Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Embed each time step of clips of different lengths.

        Each clip goes through the encoder by itself and unpadded, since the encoders' statistics would see the
        padding: a clip's frames don't depend on the batch, and what lies beyond its length is not read.

        Args:
            waveforms: (B, samples), as :meth:`embed` takes them.
            lengths: (B,) valid samples of each; None where all are valid.

        Returns:
            Frames (B, T, embedding_dim), zero past the end of a clip, and the number of each clip's frames, (B,)
            int64 on the same device.

        Raises:
            TypeError, ValueError: as :meth:`embed`; or ``lengths`` is not one per clip, within the waveforms.
        """
        lengths = self._checked_lengths(waveforms, lengths)
        if len(set(lengths)) == 1:
            rows = list(self.timestamp_embeddings(waveforms[:, : lengths[0]]))
        else:
            rows = [self.timestamp_embeddings(clip[:n]) for clip, n in zip(waveforms, lengths, strict=True)]
        frames = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return frames, torch.tensor([len(row) for row in rows], device=frames.device)

    def embed(self, waveforms: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Embed each utterance as the mean of its time steps.

        Args:
            waveforms: (B, samples) or (samples,), floating point, mono, at ``sample_rate``, in [-1, 1]. Without
                ``lengths`` all of a batch have this length.
            lengths: (B,) valid samples of each, see :meth:`frames`.

        Returns:
            (B, embedding_dim) or (embedding_dim,).

        Raises:
            TypeError, ValueError: not a floating-point tensor of that shape, shorter than ``min_samples``, not
                finite, or silent.
        """
        if lengths is None:
            return self.timestamp_embeddings(waveforms).mean(-2)
        frames, counts = self.frames(waveforms, lengths)
        return frames.sum(1) / counts[:, None]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the class, the configuration and every weight: equal fingerprints give equal embeddings."""
        description = [type(self).__name__, self.configuration(), self.layer]
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _checked_lengths(self, waveforms: Tensor, lengths: Tensor | Sequence[int] | None) -> list[int]:
        where = f"{type(self).__name__}.frames:"
        if not isinstance(waveforms, Tensor) or waveforms.dim() != 2 or not len(waveforms):
            got = tuple(waveforms.shape) if isinstance(waveforms, Tensor) else type(waveforms).__name__
            raise ValueError(f"{where} `waveforms` must be a tensor (batch, samples), batch 1 or more; got {got}.")
        batch, samples = waveforms.shape
        if lengths is None:
            return [samples] * batch
        lengths = torch.as_tensor(lengths)
        if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.min() < 0 or lengths.max() > samples:
            raise ValueError(f"{where} `lengths` must be {batch} integers from 0 to {samples}; got {lengths.tolist()}.")
        return lengths.tolist()

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
