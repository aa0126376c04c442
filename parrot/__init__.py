"""PARROT: speech emotion recognition by fusing two encoders through optimal transport and products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parrot.model import Parrot, SingleEncoderClassifier, from_pretrained
    from parrot.model_config import ParrotConfig

__all__ = ["Parrot", "ParrotConfig", "SingleEncoderClassifier", "from_pretrained"]


def __getattr__(name: str) -> Any:
    """Import the model when it is asked for: the command line answers `--help` without torch."""
    if name in __all__:
        from parrot import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
