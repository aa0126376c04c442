"""What a corpus is: utterances with a speaker, a label and a sentence each; and what a reader of corpora does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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
class Problem:
    """What is wrong with one file; ``kind`` is missing, extra, misnamed, silent, truncated, LFS pointer, ..."""

    kind: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


@dataclass(frozen=True)
class Utterance:
    """One recording: ``label`` is the emotion, ``sentence`` the text's code in its corpus, "" where unknown."""

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
    def sentences(self) -> tuple[str, ...]:
        """The sentence of each utterance, "" where unknown."""
        return tuple(u.sentence for u in self.utterances)

    @property
    def targets(self) -> np.ndarray:
        """The class of each utterance, (n,) int64: the place of its label in ``labels``."""
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place[u.label] for u in self.utterances], dtype=np.int64)


class Reader:
    """Reads one kind of corpus.

    Attributes:
        name: what `parrot.corpora.load` calls it.
        labels: its classes; None if the data say.
        counts: utterances of each label in the complete corpus, if known.
        note: what a user should know of it before using it.
    """

    name: str
    labels: tuple[str, ...] | None = None
    counts: dict[str, int] | None = None
    note: str = ""

    def scan(self, root: Path) -> tuple[list[Utterance], list[Problem]]:
        """The utterances in a fixed order, and what can't be taken for one.

        Raises:
            CorpusError: there is no such corpus at all.
        """
        raise NotImplementedError

    def expected(self) -> frozenset[str] | None:
        """File names of the complete corpus, if known."""
        return None

    def canonical(self, file_name: str) -> str:
        """The name in `expected` of a file that also goes by another."""
        return file_name

    def recognises(self, root: Path) -> bool:
        """Whether the folder holds such a corpus, more or less."""
        try:
            utterances, problems = self.scan(root)
        except (CorpusError, OSError):
            return False
        return len(utterances) > len(problems)

    def read(self, root: str | os.PathLike) -> Corpus:
        """The corpus; raises `CorpusError`, which lists every file that can't be taken for an utterance."""
        utterances, problems = self.scan(Path(root))
        if problems:
            raise CorpusError(self.name, root, [str(problem) for problem in problems])
        labels = self.labels or tuple(sorted({u.label for u in utterances}))
        return Corpus(self.name, Path(root), tuple(utterances), labels)


@dataclass(frozen=True, kw_only=True)
class NamedFilesReader(Reader):
    """A corpus of WAV files whose names tell everything.

    Attributes:
        name, labels, note: as in `Reader`.
        title: the corpus's own name.
        folders: patterns of the folders, below the root, that may hold the files; the first with WAV files counts.
        example: a file name of it.
        parse: a path's utterance; raises `ValueError`, which says what is wrong with the name.
        names: the file names of the complete corpus.
        renamed: older file names and what they are called now.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    example: str
    parse: Callable[[Path], Utterance]
    labels: tuple[str, ...]
    names: Callable[[], list[str]]
    renamed: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def scan(self, root: Path) -> tuple[list[Utterance], list[Problem]]:
        if not root.is_dir():
            what = "is a file" if root.exists() else "no such folder"
            raise CorpusError(self.name, root, [f"{what}: give the folder that holds {self.folders[0]}"])
        paths = next(filter(None, (_wav_files(root, pattern) for pattern in self.folders)), [])
        if not paths:
            places = ", ".join("the folder itself" if f == "." else f for f in self.folders)
            found = sorted(p.name + "/" * p.is_dir() for p in root.iterdir() if not p.name.startswith("."))[:5]
            raise CorpusError(
                self.name, root,
                [f"no WAV files such as {self.example} in {places}; found {', '.join(found) or 'nothing'}"],
            )  # fmt: skip
        utterances, problems = [], []
        for path in paths:
            try:
                utterances.append(self.parse(path))
            except ValueError as error:
                problems.append(Problem("misnamed", path.name, str(error)))
        if not utterances:
            raise CorpusError(
                self.name, root,
                [f"not {self.title}: wanted files such as {self.example}; "
                 f"found {len(paths)} WAV file(s) with other names, such as {paths[0].name}"],
            )  # fmt: skip
        return utterances, problems

    def expected(self) -> frozenset[str]:
        return frozenset(self.names())

    def canonical(self, file_name: str) -> str:
        return dict(self.renamed).get(file_name, file_name)


def _wav_files(root: Path, pattern: str) -> list[Path]:
    folders = [root] if pattern == "." else [p for p in root.glob(pattern) if p.is_dir()]
    files = (p for folder in folders for p in folder.iterdir())
    return sorted(p for p in files if p.suffix.lower() == ".wav" and not p.name.startswith("."))


def is_file(path: Path) -> bool:
    """Also for what is no possible file name, of which `Path.is_file` raises OSError or ValueError."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
