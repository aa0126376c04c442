"""Speaker-disjoint folds: the authors' draws, disjointness, errors."""

from __future__ import annotations

import numpy as np
import pytest

from parrot.corpora.splits import Fold, assert_no_leakage, speaker_folds


def cast(n_speakers: int, per_speaker: int) -> list[str]:
    """Utterances of ``n_speakers`` speakers, interleaved."""
    return [f"{1001 + i}" for _ in range(per_speaker) for i in range(n_speakers)]


def authors_procedure(subjects: list[str], n_folds: int, seed: int, fraction: float):
    """The procedure in plain loops, from its description."""
    unique = sorted(set(subjects))
    shuffled = [unique[i] for i in permuted(len(unique), seed)]
    sizes = [len(unique) // n_folds + (k < len(unique) % n_folds) for k in range(n_folds)]
    for fold in range(n_folds):
        start = sum(sizes[:fold])
        test = set(shuffled[start : start + sizes[fold]])
        rest = [name for name in unique if name not in test]
        count = max(1, round(fraction * len(rest)))
        held_out = set(np.random.default_rng(seed * 100 + fold).choice(rest, size=count, replace=False).tolist())
        yield (
            [i for i, s in enumerate(subjects) if s not in test and s not in held_out],
            [i for i, s in enumerate(subjects) if s in held_out],
            [i for i, s in enumerate(subjects) if s in test],
        )


def permuted(n: int, seed: int) -> list[int]:
    order = list(range(n))
    np.random.default_rng(seed).shuffle(order)
    return order


@pytest.mark.parametrize("n_speakers", [5, 7, 10, 24, 91])
@pytest.mark.parametrize(("n_folds", "seed", "fraction"), [(5, 0, 0.1), (5, 3, 0.25), (3, 1, 0.1)])
def test_folds_are_the_authors_draws(n_speakers, n_folds, seed, fraction):
    speakers = cast(n_speakers, 3)
    folds = speaker_folds(speakers, n_folds, seed, fraction)
    wanted = list(authors_procedure(speakers, n_folds, seed, fraction))
    assert [fold.index for fold in folds] == list(range(n_folds))
    for fold, parts in zip(folds, wanted, strict=True):
        for got, part in zip((fold.train, fold.validation, fold.test), parts, strict=True):
            assert got.tolist() == part
            assert got.dtype == np.int64


def test_assignment_is_pinned():
    speakers = cast(10, 1)
    folds = speaker_folds(speakers)
    assert [sorted(speakers[i] for i in fold.test) for fold in folds] == [
        ["1005", "1007"],
        ["1003", "1008"],
        ["1004", "1006"],
        ["1001", "1010"],
        ["1002", "1009"],
    ]
    assert [[speakers[i] for i in fold.validation] for fold in folds] == [
        ["1009"],
        ["1005"],
        ["1009"],
        ["1008"],
        ["1007"],
    ]


def test_every_utterance_is_tested_once_and_nothing_leaks():
    speakers = cast(13, 4)
    folds = speaker_folds(speakers)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(len(speakers)))
    for fold in folds:
        assert_no_leakage(fold, speakers)
        assert_no_leakage(fold, range(len(speakers)), what="utterance")
        parts = np.concatenate([fold.train, fold.validation, fold.test])
        assert sorted(parts) == list(range(len(speakers)))


def test_order_of_utterances_does_not_move_speakers():
    speakers = cast(10, 2)
    shuffled = list(reversed(speakers))
    for fold, other in zip(speaker_folds(speakers), speaker_folds(shuffled), strict=True):
        assert {speakers[i] for i in fold.test} == {shuffled[i] for i in other.test}


def test_seeds_differ():
    speakers = cast(10, 1)
    tests = [[fold.test.tolist() for fold in speaker_folds(speakers, seed=seed)] for seed in (0, 1)]
    assert tests[0] != tests[1]


def test_no_validation():
    for fold in speaker_folds(cast(5, 2), validation_fraction=0):
        assert fold.validation.size == 0
        assert len(fold.train) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speakers": cast(4, 2)}, r"at least n_folds = 5 different speakers, got 4 \(1001, 1002, 1003, 1004\)"),
        ({"speakers": []}, "got 0"),
        ({"speakers": cast(5, 2), "n_folds": 1}, "n_folds must be at least 2, got 1"),
        ({"speakers": cast(5, 2), "validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"speakers": cast(2, 2), "n_folds": 2}, "all 1 training speakers would be held out"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        speaker_folds(**arguments)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (([0, 1], [2], [1, 3]), r"train and test share 2 speaker\(s\): a, b\."),
        (([0], [1, 3], [4]), "train and validation share 1 speaker"),
        (([2], [0], [3]), "validation and test share 1 speaker"),
    ],
)
def test_leakage_is_found(parts, names):
    speakers = np.array(["a", "b", "c", "a", "d"])
    parts = [np.array(part) for part in parts]
    with pytest.raises(ValueError, match=names):
        assert_no_leakage(Fold(0, *parts), speakers)
