"""HuBERT through transformers: the same code runs a published checkpoint and a small random one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Encoder

if TYPE_CHECKING:
    from transformers import HubertModel

# Never read at inference, and not in every checkpoint.
UNUSED_WEIGHTS = {"masked_spec_embed"}
# Parts of a transformers configuration that say where it came from, not what it computes.
BOOKKEEPING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


class Hubert(Encoder):
    """HuBERT (Hsu et al. 2021, arXiv 2106.07447): its last hidden states, and their mean over frames.

    Waveforms of one batch have one length and are never padded: the first layer of the base models normalises
    each channel over time (group norm), so that padding would change every frame.

    Args:
        model: the transformers model.
        do_normalize: whether the waveform is first brought to zero mean and unit variance,
            (x - mean) / sqrt(var + 1e-7), as the checkpoint's ``preprocessor_config.json`` says.
        sample_rate: in Hz.
        name: what reports call it.
    """

    def __init__(
        self, model: HubertModel, *, do_normalize: bool, sample_rate: int = 16_000, name: str = "hubert"
    ) -> None:
        super().__init__()
        self.model, self.do_normalize, self.sample_rate, self.name = model, do_normalize, sample_rate, name
        self.embedding_dim = model.config.hidden_size
        samples = 1
        for kernel, stride in reversed(list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))):
            samples = (samples - 1) * stride + kernel
        self.min_samples = samples  # those of one frame

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, *, download: bool = False, name: str | None = None) -> Hubert:
        """Load a folder, or a model id from the local cache of the Hugging Face Hub. The encoder is frozen.

        Args:
            checkpoint: a folder with ``config.json``, ``preprocessor_config.json`` and weights, or an id such as
                "facebook/hubert-base-ls960".
            download: fetch what is not on this machine; without it nothing touches the network.

        Raises:
            ImportError: transformers is not installed.
            ValueError: nothing there, another architecture, or weights are missing.
        """
        from transformers import AutoConfig, FeatureExtractionMixin, HubertModel

        where = {"local_files_only": not download}
        try:
            config = AutoConfig.from_pretrained(checkpoint, **where)
            if config.model_type != "hubert":
                raise ValueError(
                    f"hubert: {str(checkpoint)!r} must hold a HuBERT model; its config.json says {config.model_type!r}."
                )
            preprocessor, _ = FeatureExtractionMixin.get_feature_extractor_dict(checkpoint, **where)
            model, loading = HubertModel.from_pretrained(checkpoint, config=config, output_loading_info=True, **where)
        except OSError as error:
            raise ValueError(
                f"hubert: no complete checkpoint (config.json, preprocessor_config.json, weights) at "
                f"{str(checkpoint)!r} on this machine. Give the path of a folder, or allow the download with "
                f"download=True. transformers says: {error}"
            ) from error
        if missing := sorted(set(loading["missing_keys"]) - UNUSED_WEIGHTS):
            raise ValueError(f"hubert: {str(checkpoint)!r} lacks {len(missing)} weights, such as {missing[0]!r}.")
        encoder = cls(
            model.float(),
            do_normalize=preprocessor.get("do_normalize", True),  # transformers' own default
            sample_rate=preprocessor.get("sampling_rate", 16_000),
            name=name or f"hubert:{Path(checkpoint).name}",
        )
        return encoder.eval().requires_grad_(False)

    def configuration(self) -> dict[str, Any]:
        settings = self.model.config.to_diff_dict()
        settings = {key: value for key, value in settings.items() if key not in BOOKKEEPING}
        return {"do_normalize": self.do_normalize, "sample_rate": self.sample_rate, "model": settings}

    def timestamp_embeddings(self, waveforms: Tensor) -> Tensor:
        """The last hidden states, 50 frames per second: (B, samples) to (B, frames, embedding_dim)."""
        checked = self._checked(waveforms)
        if self.do_normalize:
            variance, mean = torch.var_mean(checked, dim=-1, correction=0, keepdim=True)
            checked = (checked - mean) / torch.sqrt(variance + 1e-7)
        frames = self.model(torch.atleast_2d(checked)).last_hidden_state
        return frames[0] if waveforms.dim() == 1 else frames
