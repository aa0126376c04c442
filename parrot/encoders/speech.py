"""Speech models of transformers: HuBERT, WavLM, wav2vec 2.0, UniSpeech-SAT, MMS and their like, in one class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Encoder
from .checkpoint import check_file, first
from .feature_model import FeatureModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The prefix of a spec, and the model type it stands for; None takes any that reads waveforms.
FAMILIES = {
    "hubert": "hubert",
    "wavlm": "wavlm",
    "wav2vec2": "wav2vec2",
    "unispeech-sat": "unispeech-sat",
    "mms": "wav2vec2",
    "transformers": None,
}
# Models whose frames don't see what an attention mask hides, given layer norm in the convolutions.
MASKABLE = {"hubert", "wavlm", "wav2vec2", "unispeech", "unispeech-sat"}
# Never read at inference, and not in every checkpoint.
UNUSED_WEIGHTS = {"masked_spec_embed"}
# Parts of a transformers configuration that say where it came from, not what it computes.
BOOKKEEPING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def model_settings(config: PretrainedConfig) -> dict[str, Any]:
    """What a model's outputs depend on, as JSON-able values."""
    return {key: value for key, value in config.to_diff_dict().items() if key not in BOOKKEEPING}


class SpeechModel(Encoder):
    """A transformers model that takes waveforms: its hidden states, and their mean over frames.

    The models share an interface: a stack of strided convolutions (50 frames per second as published) under a
    transformer encoder. Those with group norm in the first convolution (the base models) normalise each channel over
    time, so padding changes every frame; those with layer norm (MMS, the large models) can hide it by a mask.

    Args:
        model: the transformers model, without a head.
        do_normalize: whether the waveform is first brought to zero mean and unit variance,
            (x - mean) / sqrt(var + 1e-7), as the checkpoint's ``preprocessor_config.json`` says.
        sample_rate: in Hz.
        name: what reports call it.
    """

    def __init__(
        self, model: PreTrainedModel, *, do_normalize: bool, sample_rate: int = 16_000, name: str | None = None
    ) -> None:
        super().__init__()
        config = model.config
        if not hasattr(config, "conv_kernel") or model.main_input_name != "input_values":
            raise ValueError(
                f"SpeechModel: `model` must take waveforms, as {', '.join(sorted(MASKABLE))} and their like do; "
                f"got {config.model_type!r}, which takes {model.main_input_name!r} made by a feature extractor."
            )
        self.model, self.do_normalize, self.sample_rate = model, do_normalize, sample_rate
        self.name = name or config.model_type
        self.normalisation = "waveform of zero mean and unit variance" if do_normalize else "none"
        self.embedding_dim, self.n_layers = config.hidden_size, config.num_hidden_layers
        samples = 1
        for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
            samples = (samples - 1) * stride + kernel
        self.min_samples = samples * getattr(config, "squeeze_factor", 1)  # those of one frame
        self.frame_rate = sample_rate / math.prod(config.conv_stride)
        self.maskable = config.model_type in MASKABLE and config.feat_extract_norm == "layer"

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, *, family: str = "transformers", download: bool = False, name: str | None = None
    ) -> SpeechModel | FeatureModel:
        """Load a folder, or a model id from the local cache of the Hugging Face Hub. The encoder is frozen.

        Heads of pretraining or recognition are dropped. A model that takes spectral features instead of waveforms
        becomes a :class:`FeatureModel`. No code of the checkpoint's own is run.

        Args:
            checkpoint: a folder with ``config.json``, ``preprocessor_config.json`` and weights, or an id such as
                "facebook/hubert-base-ls960".
            family: one of ``FAMILIES``; "transformers" takes any.
            download: fetch what is not on this machine; without it nothing touches the network.

        Raises:
            ImportError: transformers is not installed.
            ValueError: nothing there, a broken file, another architecture, or weights that are missing, left over or
                of another size.
        """
        import transformers

        where = {"local_files_only": not download}
        given = f"{family}: {str(checkpoint)!r}"
        for file in Path(checkpoint).glob("*"):
            if file.suffix in (".safetensors", ".bin"):
                check_file(file, family)
        try:
            config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **where)
            wanted = FAMILIES[family]
            if wanted not in (None, config.model_type):
                raise ValueError(
                    f"{given} must hold a model of type {wanted!r}; its config.json says {config.model_type!r}. "
                    "Name its own family, or 'transformers:' for any."
                )
            preprocessor, _ = transformers.FeatureExtractionMixin.get_feature_extractor_dict(checkpoint, **where)
            # Sizes are compared below: transformers prints a table of them instead of saying what to do.
            model, loading = transformers.AutoModel.from_pretrained(
                checkpoint, config=config, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True, **where,
            )  # fmt: skip
        except OSError as error:
            raise ValueError(
                f"{family}: no complete checkpoint (config.json, preprocessor_config.json, weights) at "
                f"{str(checkpoint)!r} on this machine. Give the path of a folder, or allow the download with "
                f"download=True. transformers says: {error}"
            ) from error
        fix = "Its config.json and its weights belong to different models, or a file is of another version."
        if sizes := [
            f"{key} of shape {tuple(got)}, wanted {tuple(want)}" for key, got, want in loading["mismatched_keys"]
        ]:
            raise ValueError(f"{given} has {len(sizes)} weights of other sizes than its config.json says: "
                             f"{first(sorted(sizes), 3)}. {fix}")  # fmt: skip
        if missing := sorted(set(loading["missing_keys"]) - UNUSED_WEIGHTS):
            raise ValueError(f"{given} lacks {len(missing)} weights, such as {missing[0]!r}. {fix}")
        parts = tuple(f"{part}." for part, _ in model.named_children())
        inner = [key.removeprefix(f"{model.base_model_prefix}.") for key in loading["unexpected_keys"]]
        if extra := sorted(key for key in inner if key.startswith(parts)):
            raise ValueError(f"{given} holds {len(extra)} weights too many, such as {extra[0]!r}. {fix}")
        name = name or f"{family}:{Path(checkpoint).name}"
        if model.main_input_name == "input_features":
            extractor = transformers.AutoFeatureExtractor.from_pretrained(checkpoint, trust_remote_code=False, **where)
            return FeatureModel(model.float(), extractor, name=name).eval().requires_grad_(False)
        encoder = cls(
            model.float(),
            do_normalize=preprocessor.get("do_normalize", True),  # transformers' own default
            sample_rate=preprocessor.get("sampling_rate", 16_000),
            name=name,
        )
        return encoder.eval().requires_grad_(False)

    def configuration(self) -> dict[str, Any]:
        settings = {"do_normalize": self.do_normalize, "sample_rate": self.sample_rate}
        return {**settings, "model": model_settings(self.model.config)}

    def _states(self, waveforms: Tensor, every: bool, mask: Tensor | None = None) -> Sequence[Tensor]:
        if mask is None:
            waveforms = self._normalised(waveforms)
        output = self.model(waveforms, attention_mask=mask, output_hidden_states=every)
        # Versions of transformers differ in whether the last of these has gone through a final norm: this one has.
        return [*(output.hidden_states[:-1] if every else ()), output.last_hidden_state]

    def _normalised(self, waveforms: Tensor) -> Tensor:
        if not self.do_normalize:
            return waveforms
        variance, mean = torch.var_mean(waveforms, dim=-1, correction=0, keepdim=True)
        return (waveforms - mean) / torch.sqrt(variance + 1e-7)

    def frames(
        self,
        waveforms: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        *,
        padded: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed each time step of clips of different lengths; see :meth:`Encoder.frames`.

        Args:
            padded: run the batch at once, padded with zeros after normalisation, under an attention mask. For models
                with layer norm (``maskable``) the frames are those of the clips by themselves, up to rounding; they
                run so by default. With group norm every frame of a shorter clip changes, so only on request.
        """
        lengths = self._checked_lengths(waveforms, lengths)
        if not (self.maskable if padded is None else padded) or len(set(lengths)) == 1:
            return super().frames(waveforms, lengths)
        clips = [self._normalised(self._checked(clip[:n])) for clip, n in zip(waveforms, lengths, strict=True)]
        batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        sizes = torch.tensor(lengths, device=batch.device)
        mask = (torch.arange(batch.shape[1], device=batch.device) < sizes[:, None]).long()
        frames = self._chosen(batch, mask)
        counts = self.model._get_feat_extract_output_lengths(sizes)
        hidden = torch.arange(frames.shape[1], device=frames.device) >= counts[:, None]
        return frames.masked_fill(hidden[..., None], 0), counts
