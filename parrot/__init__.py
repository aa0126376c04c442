"""PARROT: speech emotion recognition by fusing two encoders through optimal transport and products."""

from __future__ import annotations

from parrot.model import Parrot, ParrotConfig, SingleEncoderClassifier

__all__ = ["Parrot", "ParrotConfig", "SingleEncoderClassifier"]
