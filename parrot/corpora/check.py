"""Is the corpus in this folder complete and sound? Which files are missing, extra, silent, truncated, unreadable?"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from parrot.corpora.audio import AudioError, decode_waveform, read_audio_file
from parrot.corpora.base import Problem, Utterance

SAMPLE_RATE = 16_000


@dataclass(frozen=True)
class CheckReport:
    """What a corpus folder holds and what is wrong with it.

    Attributes:
        name, root: the corpus, and where it is.
        found: utterances found.
        expected: utterances of the complete corpus; None if unknown.
        labels, speakers: utterances of each label and of each speaker.
        problems: everything wrong, sorted by kind and file.
        remarks: what to know that is nobody's fault, such as identical recordings.
    """

    name: str
    root: Path
    found: int
    expected: int | None
    labels: dict[str, int]
    speakers: dict[str, int]
    problems: tuple[Problem, ...]
    remarks: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The files with this kind of problem."""
        return tuple(problem.file for problem in self.problems if problem.kind == kind)


def check(name: str, root: str | os.PathLike) -> CheckReport:
    """Compare a folder with the complete corpus ``name`` and decode every recording.

    Args:
        name: one of `parrot.corpora.available()`.
        root: as for `parrot.corpora.load`.

    Raises:
        ValueError: ``name`` is unknown.
        CorpusError: there is no such corpus at all; the error says what was wanted and what was found.
    """
    from parrot.corpora import reader

    corpus, root = reader(name), Path(root)
    utterances, problems = corpus.scan(root)
    expected = corpus.expected()
    if expected is not None:
        present = {corpus.canonical(u.path.name) for u in utterances}
        problems += [Problem("missing", file, "not there") for file in sorted(expected - present)]
        problems += [Problem("extra", file, f"no recording of {name}") for file in sorted(present - expected)]
    labels = dict(sorted(Counter(u.label for u in utterances).items()))
    for label, count in sorted((corpus.counts or {}).items()):
        if labels.get(label, 0) != count:
            problems.append(Problem("count", label, f"wanted {count} utterances, found {labels.get(label, 0)}"))
    told = {problem.file for problem in problems}
    by_content: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        for utterance, outcome in zip(utterances, pool.map(_decode, utterances), strict=True):
            if not isinstance(outcome, AudioError):
                by_content[outcome].append(utterance.path.name)
            elif str(utterance.path) not in told:
                problems.append(Problem(outcome.kind, utterance.path.name, outcome.reason))
    remarks = [f"identical recordings: {', '.join(files)}" for files in by_content.values() if len(files) > 1]
    if corpus.note:
        remarks.insert(0, corpus.note)
    return CheckReport(
        name, root, len(utterances), len(expected) if expected is not None else _total(corpus.counts), labels,
        dict(sorted(Counter(u.speaker for u in utterances).items())),
        tuple(sorted(problems, key=lambda problem: (problem.kind, problem.file))), tuple(remarks),
    )  # fmt: skip


def _total(counts: dict[str, int] | None) -> int | None:
    return None if counts is None else sum(counts.values())


def _decode(utterance: Utterance) -> str | AudioError:
    """The hash of a good recording's content; else what is wrong with it."""
    try:
        data = read_audio_file(utterance.path)
        decode_waveform(data, utterance.path, SAMPLE_RATE)
    except AudioError as error:
        return error
    return hashlib.sha256(data).hexdigest()
