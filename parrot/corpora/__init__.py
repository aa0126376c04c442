"""Corpora of emotional speech: readers by name, the spoken demo corpus, folds that don't leak, checks."""

from __future__ import annotations

import os
from pathlib import Path

from parrot.corpora import crema_d, demo, emo_db, emobox, iemocap, manifest, mesd, ravdess
from parrot.corpora.base import Corpus, CorpusError, Problem, Reader, Utterance

__all__ = [
    "Corpus", "CorpusError", "Problem", "Reader", "Utterance", "available", "check", "load", "reader", "recognise",
]  # fmt: skip

_READERS: dict[str, Reader] = {
    module.READER.name: module.READER
    for module in (crema_d, emo_db, mesd, ravdess, iemocap, emobox, manifest, demo)
}  # fmt: skip


def available() -> tuple[str, ...]:
    """Names that `load` knows."""
    return tuple(_READERS)


def reader(name: str) -> Reader:
    """The reader of the corpus ``name``; ValueError if there is none."""
    if name not in _READERS:
        raise ValueError(f"corpora.load: name must be one of {', '.join(_READERS)}, got {name!r}")
    return _READERS[name]


def load(name: str, root: str | os.PathLike) -> Corpus:
    """Read the corpus ``name`` from ``root``.

    Args:
        name: one of `available()`; "manifest" is your own data, "demo" the synthetic corpus.
        root: the corpus folder; a manifest's file; for "emobox" the folder ``data/<corpus>`` of its metadata.

    Raises:
        ValueError: ``name`` is unknown.
        CorpusError: that is not the corpus; the error says what was wanted and found, and lists all that is wrong.
    """
    chosen = reader(name)
    try:
        return chosen.read(root)
    except CorpusError as error:
        other = recognise(root)
        if other is None or other == name:
            raise
        raise CorpusError(name, root, [f"this looks like the corpus {other!r}", *error.problems]) from None


def recognise(root: str | os.PathLike) -> str | None:
    """The name of the corpus that a folder (or manifest) seems to hold, None if that can't be told."""
    names = ("demo", *(name for name in _READERS if name != "demo"))  # a demo corpus has the names of CREMA-D
    return next((name for name in names if _READERS[name].recognises(Path(root))), None)


from parrot.corpora.check import check  # noqa: E402 (it uses `reader`)
