"""Published checkpoints as safetensors."""

from __future__ import annotations

import os
from pathlib import Path

from parrot.files import write_atomically

from .base import Encoder
from .checkpoint import read_state_dict
from .ssam import SSAM
from .ssamba import SSAMBA


def convert(source: str | os.PathLike, target: str | os.PathLike, *, force: bool = False) -> Encoder:
    """Write the weights of an official SSAM or SSAMBA checkpoint as safetensors; all its tensors keep their values.

    Args:
        source: the checkpoint; only its tensors are read and nothing in it is executed.
        target: the file to write, ending in ``.safetensors``.
        force: replace ``target`` if it is there.

    Returns:
        The encoder that the weights make.

    Raises:
        ValueError: ``target`` has another ending or is there already; ``source`` is no checkpoint, or neither
            encoder's. Nothing is written then.
        OSError: ``target`` can't be written; what was there stays.
    """
    from safetensors.torch import save

    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"convert: the output must end in .safetensors; got {target}.")
    if target.exists() and not force:
        raise ValueError(f"convert: {target} is there already. Name another file, or replace it with --force.")
    weights = read_state_dict(source, "convert")
    family = SSAMBA if any(key.startswith("v.") for key in weights) else SSAM
    try:
        encoder = family.from_state_dict(weights, name=f"{family.__name__.lower()}:{target.stem}")
    except ValueError as error:
        raise ValueError(f"convert: {source} holds neither encoder that is known here: {error}") from error
    metadata = {"format": "pt", "encoder": family.__name__, "source": source.name}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, save(weights, metadata))
    return encoder
