"""Speech encoders behind one interface, and the registry that loads them."""

from __future__ import annotations

from . import demo
from .base import Encoder
from .hubert import Hubert
from .ssam import SSAM

__all__ = ["SSAM", "Encoder", "Hubert", "available", "load"]

# A spec is a name, or a family and where its checkpoint lies: `family:checkpoint`.
SPECS = ("ssam-demo", "hubert-demo", "ssam:FILE", "hubert:FOLDER-OR-ID")


def available() -> tuple[str, ...]:
    """The specs that :func:`load` takes; capitals stand for what the caller names."""
    return SPECS


def load(spec: str, *, download: bool = False) -> Encoder:
    """An encoder in evaluation mode, its weights frozen.

    Args:
        spec: "ssam-demo" or "hubert-demo" (small, random weights, the same on every call), "ssam:FILE" (an official
            ``.pth`` or a ``.safetensors`` of its tensors), or "hubert:FOLDER-OR-ID" (a transformers checkpoint).
        download: fetch a checkpoint id that is not on this machine; without it nothing touches the network.

    Raises:
        ValueError: an unknown spec, or a checkpoint that is missing, unreadable or of another architecture.
    """
    family, _, checkpoint = spec.partition(":")
    if spec == "ssam-demo":
        return demo.ssam_demo()
    if spec == "hubert-demo":
        return demo.hubert_demo()
    if family == "ssam" and checkpoint:
        return SSAM.from_file(checkpoint)
    if family == "hubert" and checkpoint:
        return Hubert.from_pretrained(checkpoint, download=download)
    raise ValueError(f"encoders.load: `spec` must be one of {', '.join(SPECS)}; got {spec!r}.")
