"""Corpora of emotional speech: readers by name, the spoken demo corpus, speaker-disjoint folds."""

from __future__ import annotations

import os

from parrot.corpora import crema_d, demo
from parrot.corpora.base import Corpus, CorpusError, Utterance

__all__ = ["Corpus", "CorpusError", "Utterance", "available", "load"]

_READERS = {"crema-d": crema_d.read, "demo": demo.read}


def available() -> tuple[str, ...]:
    """Names that `load` knows."""
    return tuple(_READERS)


def load(name: str, root: str | os.PathLike) -> Corpus:
    """Read the corpus ``name`` from the folder ``root``.

    Args:
        name: one of `available()`: ``"crema-d"``, or ``"demo"`` for the synthetic corpus.
        root: the corpus folder.

    Raises:
        ValueError: ``name`` is unknown.
        CorpusError: the folder is not that corpus; the error lists everything that is wrong with it.
    """
    if name not in _READERS:
        raise ValueError(f"corpora.load: name must be one of {', '.join(_READERS)}, got {name!r}")
    return _READERS[name](root)
