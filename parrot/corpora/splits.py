"""Speaker-disjoint cross-validation, by the procedure of PARROT's authors, and the check that nothing leaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


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
    if n_folds < 2:
        raise ValueError(f"speaker_folds: n_folds must be at least 2, got {n_folds}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"speaker_folds: validation_fraction must be in [0, 1), got {validation_fraction}")
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
        train_names = np.setdiff1d(names, test_names)
        validation_names = train_names[:0]
        if validation_fraction > 0:
            count = max(1, round(validation_fraction * len(train_names)))
            rng = np.random.default_rng(100 * seed + index)
            validation_names = rng.choice(train_names, size=count, replace=False)
        if len(validation_names) == len(train_names):
            raise ValueError(
                f"speaker_folds: fold {index}: all {len(train_names)} training speakers would be held out for "
                "validation. Add speakers or lower validation_fraction."
            )
        test = np.isin(speakers, test_names)
        validation = np.isin(speakers, validation_names)
        parts = (np.flatnonzero(part) for part in (~test & ~validation, validation, test))
        folds.append(Fold(index, *parts))
    return folds


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
    parts = {name: groups[getattr(fold, name)] for name in ("train", "validation", "test")}
    for (name_1, part_1), (name_2, part_2) in combinations(parts.items(), 2):
        shared = np.intersect1d(part_1, part_2)
        if len(shared):
            listed = ", ".join(map(str, shared[:5])) + (", ..." if len(shared) > 5 else "")
            raise ValueError(
                f"fold {fold.index}: {name_1} and {name_2} share {len(shared)} {what}(s): {listed}. "
                f"Make the folds with every {what} in one part only."
            )
