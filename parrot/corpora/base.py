"""What a corpus is: utterances with a speaker, a label and a sentence each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class CorpusError(ValueError):
    """A corpus folder is not what it should be; ``problems`` lists everything that is wrong with it."""

    def __init__(self, name: str, root: str | os.PathLike, problems: Sequence[str]):
        self.name, self.root, self.problems = name, Path(root), tuple(problems)
        shown = list(self.problems[:20])
        if len(self.problems) > len(shown):
            shown.append(f"... and {len(self.problems) - len(shown)} more")
        super().__init__(f"corpus {name!r} in {root}: " + "\n  ".join(shown))


@dataclass(frozen=True)
class Utterance:
    """One recording: ``label`` is the emotion, ``sentence`` the text's code in its corpus."""

    path: Path
    speaker: str
    label: str
    sentence: str


@dataclass(frozen=True)
class Corpus:
    """Utterances in a fixed order and the sorted label names that number their classes.

    Raises:
        CorpusError: no utterance, or an utterance with a label that is not in ``labels``.
    """

    name: str
    root: Path
    utterances: tuple[Utterance, ...]
    labels: tuple[str, ...]

    def __post_init__(self):
        known = set(self.labels)
        problems = [
            f"{u.path}: unknown label {u.label!r}, wanted one of {', '.join(self.labels)}"
            for u in self.utterances
            if u.label not in known
        ]
        if not self.utterances:
            problems.append("no utterances in it")
        if problems:
            raise CorpusError(self.name, self.root, problems)

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def speakers(self) -> tuple[str, ...]:
        """The speaker of each utterance."""
        return tuple(u.speaker for u in self.utterances)

    @property
    def targets(self) -> np.ndarray:
        """The class of each utterance, (n,) int64: the place of its label in ``labels``."""
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place[u.label] for u in self.utterances], dtype=np.int64)
