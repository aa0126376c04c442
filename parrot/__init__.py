"""PARROT: speech emotion recognition by fusing two encoders through optimal transport and products."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parrot import corpora as corpora
    from parrot import distributed as distributed
    from parrot import encoders as encoders
    from parrot import evaluation as evaluation
    from parrot import features as features
    from parrot import model as model
    from parrot import prediction as prediction
    from parrot import store as store
    from parrot import training as training
    from parrot.model import Parrot, SingleEncoderClassifier, from_pretrained
    from parrot.model_config import ParrotConfig

    __version__: str

__all__ = ["Parrot", "ParrotConfig", "SingleEncoderClassifier", "from_pretrained"]
_MODULES = (
    "corpora", "distributed", "encoders", "evaluation", "features", "model", "prediction", "store", "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the model and the modules when they are asked for: the command line answers `--help` without torch."""
    if name in __all__:
        from parrot import model

        return getattr(model, name)
    if name in _MODULES:
        return importlib.import_module(f"parrot.{name}")
    if name == "__version__":
        return importlib.metadata.version("parrot-kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
