"""Speech models of transformers that take spectral features: Whisper's encoder, Wav2Vec2-BERT and their like."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, SequenceFeatureExtractor


class FeatureModel(Encoder):
    """A transformers model behind its own feature extractor; of an encoder and decoder, the encoder.

    The extractor computes in NumPy on the CPU, one clip at a time, so gradients do not reach the waveforms. Where it
    pads a clip to a fixed length (Whisper: 30 s), the model sees the padding, as it does in transformers, and the
    frames of the padding are dropped.

    Args:
        model: the transformers model, without a head, which takes ``input_features``.
        extractor: the checkpoint's feature extractor.
        name: what reports call it.
    """

    def __init__(self, model: PreTrainedModel, extractor: SequenceFeatureExtractor, *, name: str | None = None) -> None:
        super().__init__()
        self.model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.extractor, self.name = extractor, name or model.config.model_type
        self.sample_rate = extractor.sampling_rate
        self.min_samples = self.sample_rate // 40  # one window of 25 ms
        self.max_samples = getattr(extractor, "n_samples", None)
        self.normalisation = f"that of {type(extractor).__name__}"
        self.embedding_dim, self.n_layers = model.config.hidden_size, model.config.num_hidden_layers

    @functools.cached_property
    def frame_rate(self) -> float:
        """Frames per second, counted on a tone: runs the model twice, the first time it is asked for."""
        tone = torch.arange(2 * self.sample_rate, device=next(self.parameters()).device).div(10).sin()
        with torch.no_grad():
            one, two = (len(self._one(tone[: n * self.sample_rate], False)[0]) for n in (1, 2))
        return float(two - one)

    def configuration(self) -> dict[str, Any]:
        from .speech import model_settings

        return {"extractor": json.loads(self.extractor.to_json_string()), "model": model_settings(self.model.config)}

    def _states(self, waveforms: Tensor, every: bool) -> list[Tensor]:
        clips = [self._one(waveform, every) for waveform in waveforms]
        return [torch.stack(states) for states in zip(*clips, strict=True)]

    def _one(self, waveform: Tensor, every: bool) -> list[Tensor]:
        """The states (frames, embedding_dim) of one waveform."""
        if self.max_samples and len(waveform) > self.max_samples:
            raise ValueError(
                f"{self.name}: `waveforms` must be of at most {self.max_samples} samples "
                f"({self.max_samples / self.sample_rate:g} s), which is all this model hears; got {len(waveform)}. "
                "Cut the clip."
            )
        inputs = self.extractor(
            waveform.detach().float().cpu().numpy(), sampling_rate=self.sample_rate, return_tensors="pt",
            return_attention_mask=True,
        ).to(waveform.device)  # fmt: skip
        features, mask = inputs["input_features"].to(waveform.dtype), inputs["attention_mask"]
        output = self.model(features, attention_mask=mask, output_hidden_states=every)
        states = [*(output.hidden_states[:-1] if every else ()), output.last_hidden_state]
        valid = -(-int(mask.sum()) * states[-1].shape[1] // mask.shape[1])  # the model may have strides of its own
        return [state[0, :valid] for state in states]
