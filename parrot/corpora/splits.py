"""Folds: speaker-disjoint (by the procedure of PARROT's authors, balanced, one speaker at a time) or stratified;
kept in files that are believed only if they are whole; and the check that nothing leaks.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from parrot.files import write_atomically

FORMAT = "parrot-folds-1"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Fold:
    """One fold: int64 arrays of utterance numbers, each in ascending order. Folds count from 0."""

    index: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def speaker_folds(
    speakers: Sequence[str], n_folds: int = 5, seed: int = 0, validation_fraction: float = 0.1
) -> list[Fold]:
    """Folds in which every speaker is tested once and never shared between train, validation and test.

    The authors' procedure, draw for draw: the sorted speaker names, shuffled by ``default_rng(seed)``, are cut
    by ``array_split`` into the test speakers of each fold; of the other speakers, sorted,
    ``max(1, round(validation_fraction * count))`` are chosen by ``default_rng(100 * seed + fold)`` for
    validation.

    Args:
        speakers: the speaker of each utterance.
        n_folds: number of folds, at least 2.
        seed: seed of the assignment.
        validation_fraction: share of the training speakers held out for validation, in [0, 1); 0 for none.

    Raises:
        ValueError: an argument is out of range, there are fewer speakers than folds, or no speaker would be
            left to train on.
    """
    _check_arguments("speaker_folds", n_folds, validation_fraction)
    speakers = np.asarray(speakers, dtype=str)
    names = np.unique(speakers)
    if len(names) < n_folds:
        raise ValueError(
            f"speaker_folds: speakers: wanted at least n_folds = {n_folds} different speakers, got {len(names)}"
            f" ({', '.join(names)}). Ask for fewer folds or add speakers."
        )
    np.random.default_rng(seed).shuffle(names)
    folds = []
    for index, test_names in enumerate(np.array_split(names, n_folds)):
        folds.append(_group_fold("speaker_folds", index, speakers, test_names, seed, validation_fraction))
    return folds


def grouped_folds(
    groups: Sequence[str], n_folds: int = 5, seed: int = 0, validation_fraction: float = 0.1
) -> list[Fold]:
    """Folds that never share a group (speaker, session, ...), with test parts of nearly the same size.

    The groups, largest first, go each to the fold with the fewest utterances; ``default_rng(seed)`` decides among
    groups of one size. Arguments, validation and errors as for `speaker_folds`.
    """
    _check_arguments("grouped_folds", n_folds, validation_fraction)
    groups = np.asarray(groups, dtype=str)
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < n_folds:
        raise ValueError(
            f"grouped_folds: groups: wanted at least n_folds = {n_folds} different groups, got {len(names)}. "
            "Ask for fewer folds."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    parts: list[list[str]] = [[] for _ in range(n_folds)]
    filled = np.zeros(n_folds, dtype=np.int64)
    for place in order[np.argsort(-sizes[order], kind="stable")]:
        fold = int(np.argmin(filled))
        parts[fold].append(names[place])
        filled[fold] += sizes[place]
    return [_group_fold("grouped_folds", k, groups, part, seed, validation_fraction) for k, part in enumerate(parts)]


def leave_one_out_folds(groups: Sequence[str], seed: int = 0, validation_fraction: float = 0.1) -> list[Fold]:
    """One fold for each group (speaker), in sorted order, that tests it alone; validation as in `speaker_folds`.

    Raises:
        ValueError: there are fewer than 2 groups, or none would be left to train on.
    """
    groups = np.asarray(groups, dtype=str)
    names = np.unique(groups)
    _check_arguments("leave_one_out_folds", len(names), validation_fraction, "number of groups")
    return [
        _group_fold("leave_one_out_folds", k, groups, [name], seed, validation_fraction) for k, name in enumerate(names)
    ]


def stratified_folds(
    labels: Sequence, n_folds: int = 5, seed: int = 0, validation_fraction: float = 0.1,
    together: Sequence | None = None,
) -> list[Fold]:  # fmt: skip
    """Folds with the same mix of labels; speakers are on both sides.

    The rows of each label, shuffled by ``default_rng(seed)``, are dealt to the folds in turn, one label going on
    where the last ended. Validation is ``validation_fraction`` of each label's training rows, at least one, by
    ``default_rng(100 * seed + fold)``.

    Args:
        labels: the label of each utterance.
        n_folds, seed, validation_fraction: as for `speaker_folds`.
        together: rows with the same value here (the hash of their file, say) are never parted.

    Raises:
        ValueError: an argument is out of range, or a label has fewer utterances than there are folds.
    """
    _check_arguments("stratified_folds", n_folds, validation_fraction)
    labels = np.asarray(labels)
    unit_of = np.arange(len(labels))
    if together is not None:
        _, first, unit_of = np.unique(np.asarray(together), return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first))  # units in the order of the rows
        unit_of = order[unit_of]
    _, first = np.unique(unit_of, return_index=True)
    strata = labels[first]
    rng = np.random.default_rng(seed)
    fold_of = np.empty(len(strata), dtype=np.int64)
    dealt = 0
    for label in np.unique(strata):
        units = np.flatnonzero(strata == label)
        if len(units) < n_folds:
            raise ValueError(
                f"stratified_folds: label {label!s}: wanted at least n_folds = {n_folds} utterances, got {len(units)}. "
                "Ask for fewer folds."
            )
        rng.shuffle(units)
        fold_of[units] = (dealt + np.arange(len(units))) % n_folds
        dealt += len(units)
    folds = []
    for index in range(n_folds):
        test, rest = np.flatnonzero(fold_of == index), np.flatnonzero(fold_of != index)
        validation = hold_out(rest, strata[rest], validation_fraction, 100 * seed + index)
        parts = (np.setdiff1d(rest, validation), validation, test)
        folds.append(Fold(index, *(np.flatnonzero(np.isin(unit_of, part)) for part in parts)))
    return folds


def hold_out(rows: np.ndarray, strata: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """``fraction`` of the rows of each stratum with two rows or more, at least one of them; sorted."""
    rng, held_out = np.random.default_rng(seed), [rows[:0]]
    for stratum in np.unique(strata):
        candidates = rows[strata == stratum]
        if fraction > 0 and len(candidates) > 1:
            held_out.append(rng.choice(candidates, size=max(1, round(fraction * len(candidates))), replace=False))
    return np.sort(np.concatenate(held_out))


def _check_arguments(name: str, n_folds: int, validation_fraction: float, what: str = "n_folds") -> None:
    if n_folds < 2:
        raise ValueError(f"{name}: {what} must be at least 2, got {n_folds}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"{name}: validation_fraction must be in [0, 1), got {validation_fraction}")


def _group_fold(
    name: str, index: int, groups: np.ndarray, test_names: Sequence[str], seed: int, validation_fraction: float
) -> Fold:
    """The fold that tests ``test_names``; the validation groups are drawn from the others."""
    train_names = np.setdiff1d(groups, test_names)
    validation_names = train_names[:0]
    if validation_fraction > 0:
        count = max(1, round(validation_fraction * len(train_names)))
        rng = np.random.default_rng(100 * seed + index)
        validation_names = rng.choice(train_names, size=count, replace=False)
    if len(validation_names) == len(train_names):
        raise ValueError(
            f"{name}: fold {index}: all {len(train_names)} training speakers would be held out for "
            "validation. Add speakers or lower validation_fraction."
        )
    test = np.isin(groups, test_names)
    validation = np.isin(groups, validation_names)
    return Fold(index, *(np.flatnonzero(part) for part in (~test & ~validation, validation, test)))


def assert_no_leakage(fold: Fold, groups: Sequence[str], what: str = "speaker") -> None:
    """Make sure that no group is in two parts of a fold.

    Args:
        fold: the fold to check.
        groups: the group of each utterance: its speaker, its sentence, the hash of its file, ...
        what: what a group is, for the message.

    Raises:
        ValueError: train, validation and test share a group (an utterance in two parts shares its own).
    """
    groups = np.asarray(groups)
    parts = {name: groups[getattr(fold, name)] for name in PARTS}
    for (name_1, part_1), (name_2, part_2) in combinations(parts.items(), 2):
        shared = np.intersect1d(part_1, part_2)
        if len(shared):
            listed = ", ".join(map(str, shared[:5])) + (", ..." if len(shared) > 5 else "")
            raise ValueError(
                f"fold {fold.index}: {name_1} and {name_2} share {len(shared)} {what}(s): {listed}. "
                f"Make the folds with every {what} in one part only."
            )


def assert_no_leakage_in(folds: Sequence[Fold], groups: Mapping[str, Sequence[str]]) -> None:
    """`assert_no_leakage` for every fold and every kind of group: {"speaker": ..., "recording": hashes, ...}."""
    for fold in folds:
        for what, values in groups.items():
            assert_no_leakage(fold, values, what)


def check_classes_in(folds: Sequence[Fold], labels: np.ndarray, names: Sequence[str]) -> None:
    """Make sure that there are classes to tell apart; warn of those that a fold tests and does not train.

    Args:
        folds: the folds to check.
        labels: (n,) class of each utterance, an index into ``names``.
        names: of the classes.

    Raises:
        ValueError: all utterances are of one class.
    """
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        found = ", ".join(str(names[label]) for label in np.unique(labels)) or "none"
        raise ValueError(f"classification needs utterances of two classes or more; got {found}. Check the labels.")
    for fold in folds:
        untrained = np.setdiff1d(labels[fold.test], labels[fold.train])
        if len(untrained):
            warnings.warn(
                f"fold {fold.index}: no training utterance is of {', '.join(str(names[k]) for k in untrained)}, which "
                "is tested: it can't be recognised. Drop the class, or add speakers of it.",
                stacklevel=3,
            )


def name_copies(hashes: Sequence[str], files: Sequence[str]) -> list[str]:
    """What tells recordings apart, readably: the file's name, or those of all files of the same hash, "a = b"."""
    copies: dict[str, list[str]] = {}
    for key, file in zip(hashes, files, strict=True):
        copies.setdefault(key, []).append(file)
    return [" = ".join(copies[key]) for key in hashes]


def save(
    path: str | os.PathLike, folds: Sequence[Fold], files: Sequence[str], facts: Mapping[str, Any] | None = None
) -> str:
    """Write folds to a JSON file, whole or not at all, and return its content's hash.

    Args:
        path: the file; its folder is made if missing.
        folds: the folds.
        files: what row i is, by name (a path in the corpus): `load` makes sure that they have not changed.
        facts: how the folds were made (procedure, seed, ...), to be kept with them; JSON values.

    Raises:
        ValueError: a file name is there twice, or a fold has a row that ``files`` does not name.
    """
    files = [str(file) for file in files]
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise ValueError(f"splits.save: `files` must be different names; {twice[0]} is there twice.")
    content = {"format": FORMAT, "facts": dict(facts or {}), "files": files, "folds": []}
    for fold in folds:
        parts = {part: np.asarray(getattr(fold, part)).tolist() for part in PARTS}
        if any(not 0 <= row < len(files) for rows in parts.values() for row in rows):
            raise ValueError(f"splits.save: fold {fold.index} has rows beyond the {len(files)} files.")
        content["folds"].append({"index": fold.index, **parts})
    digest = _digest(content)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({**content, "sha256": digest}) + "\n").encode())
    return digest


def load(path: str | os.PathLike, files: Sequence[str] | None = None) -> tuple[list[Fold], dict[str, Any]]:
    """The folds, and the facts, that `save` wrote.

    Args:
        path: the file.
        files: what row i is now. Rows are found by name, so their order may have changed; the names may not.

    Raises:
        ValueError: the file is no folds file, of another version, was changed or cut short, or is about other files.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"splits.load: {path} is not whole JSON ({error}): make the folds again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"splits.load: {path}: wanted the format {FORMAT!r}, got {found!r}: make the folds again.")
    if content.pop("sha256", None) != _digest(content):
        raise ValueError(f"splits.load: {path} was changed after it was written: its hash does not match.")
    try:
        return _from_content(content, path, files)
    except (KeyError, TypeError, IndexError, OverflowError, AttributeError) as error:
        raise ValueError(f"splits.load: {path} is no folds file of ours ({error!r}): make the folds again.") from error


def _from_content(
    content: dict[str, Any], path: str | os.PathLike, files: Sequence[str] | None
) -> tuple[list[Fold], dict[str, Any]]:
    place = np.arange(len(content["files"]))
    if files is not None:
        row_of = {str(file): row for row, file in enumerate(files)}
        gone = [file for file in content["files"] if file not in row_of]
        new = set(row_of) - set(content["files"])
        if gone or new:
            raise ValueError(
                f"splits.load: {path} is about other files: {len(gone)} of its {len(place)} are gone"
                f"{f' (such as {gone[0]})' if gone else ''}, {len(new)} are new"
                f"{f' (such as {min(new)})' if new else ''}. Make the folds for these files."
            )
        place = np.array([row_of[file] for file in content["files"]], dtype=np.int64)
    folds = [
        Fold(fold["index"], *(np.sort(place[np.array(fold[part], dtype=np.int64)]) for part in PARTS))
        for fold in content["folds"]
    ]
    return folds, content["facts"]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
