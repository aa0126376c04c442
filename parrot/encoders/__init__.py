"""Speech encoders behind one interface, and the registry that loads them."""

from __future__ import annotations

import re

from parrot_kernels.modules import accelerate_linear

from . import demo
from .base import Encoder
from .feature_model import FeatureModel
from .speech import FAMILIES, SpeechModel
from .ssam import SSAM
from .ssamba import SSAMBA

__all__ = ["SSAM", "SSAMBA", "Encoder", "FeatureModel", "SpeechModel", "available", "load"]

# A spec is a name, or a family and where its checkpoint lies: `family:checkpoint`.
SPECS = ("ssam-demo", "hubert-demo", "ssam:FILE", "ssamba:FILE", *(f"{family}:FOLDER-OR-ID" for family in FAMILIES))
LAYER = re.compile(r"(?P<spec>.+)#(?P<layer>-?\d+|last|mean|weighted)")


def available() -> tuple[str, ...]:
    """The specs that :func:`load` takes; capitals stand for what the caller names."""
    return SPECS


def load(spec: str, *, layer: str | int = "last", download: bool = False) -> Encoder:
    """An encoder in evaluation mode, its weights frozen.

    Args:
        spec: "ssam-demo" or "hubert-demo" (small, random weights, the same on every call); "ssam:FILE" or
            "ssamba:FILE" (an official ``.pth``, or a ``.safetensors`` of its tensors as ``parrot convert`` writes it);
            or "FAMILY:FOLDER-OR-ID", a transformers checkpoint, FAMILY one of hubert, wavlm, wav2vec2, unispeech-sat,
            mms, or transformers for any. A layer may follow: "wavlm:microsoft/wavlm-base#9".
        layer: which hidden state embeddings are made of, see :meth:`Encoder.use_layer`.
        download: fetch a checkpoint id that is not on this machine; without it nothing touches the network.

    Raises:
        ValueError: an unknown spec or layer, or a checkpoint that is missing, unreadable or of another architecture.
    """
    if match := LAYER.fullmatch(spec):
        if layer != "last":
            raise ValueError(f"encoders.load: `layer` is given twice: {layer!r} beside {spec!r}.")
        spec, layer = match["spec"], match["layer"]
        layer = layer if layer in ("last", "mean", "weighted") else int(layer)
    encoder = accelerate_linear(_load(spec, download)).use_layer(layer)
    if layer != "last":
        encoder.name += f"#{encoder.layer}"
    return encoder


def _load(spec: str, download: bool) -> Encoder:
    family, _, checkpoint = spec.partition(":")
    if spec == "ssam-demo":
        return demo.ssam_demo()
    if spec == "hubert-demo":
        return demo.hubert_demo()
    if family == "ssam" and checkpoint:
        return SSAM.from_file(checkpoint)
    if family == "ssamba" and checkpoint:
        return SSAMBA.from_file(checkpoint)
    if family in FAMILIES and checkpoint:
        return SpeechModel.from_pretrained(checkpoint, family=family, download=download)
    raise ValueError(f"encoders.load: `spec` must be one of {', '.join(SPECS)}; got {spec!r}.")
