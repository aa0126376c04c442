"""Speaker-disjoint folds: the authors' draws, disjointness, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from parrot.corpora import splits
from parrot.corpora.splits import (
    Fold,
    assert_no_leakage,
    assert_no_leakage_in,
    check_classes_in,
    grouped_folds,
    leave_one_out_folds,
    name_copies,
    speaker_folds,
    stratified_folds,
)


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


def test_classes_that_folds_lack():
    folds = [Fold(0, np.array([0, 1]), np.array([2]), np.array([3, 4]))]
    check_classes_in(folds, np.array([0, 1, 0, 1, 0]), ("a", "b"))
    with pytest.warns(UserWarning, match=r"fold 0: no training utterance is of c, which is tested.*Drop the class"):
        check_classes_in(folds, np.array([0, 1, 2, 2, 0]), ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"two classes or more; got b\. Check the labels"):
        check_classes_in(folds, np.ones(5, dtype=int), ("a", "b"))


def test_copies_are_told_by_their_names():
    names = name_copies("xyxz", ["1.wav", "2.wav", "3.wav", "4.wav"])
    assert names == ["1.wav = 3.wav", "2.wav", "1.wav = 3.wav", "4.wav"]


def every_row_tested_once(folds: list[Fold], n: int) -> None:
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(n))
    for fold in folds:
        assert sorted(np.concatenate([fold.train, fold.validation, fold.test])) == list(range(n))


def test_grouped_folds_are_balanced():
    sizes = [31, 2, 9, 14, 3, 3, 22, 8, 8, 5]
    groups = [f"g{k}" for k, size in enumerate(sizes) for _ in range(size)]
    folds = grouped_folds(groups, 4)
    every_row_tested_once(folds, len(groups))
    assert_no_leakage_in(folds, {"group": groups})
    assert max(len(fold.test) for fold in folds) == 31
    assert min(len(fold.test) for fold in folds) >= 23
    assert [f.test.tolist() for f in grouped_folds(groups, 4)] == [f.test.tolist() for f in folds]
    equal = cast(10, 3)
    one, two = (grouped_folds(equal, 5, seed) for seed in (0, 1))
    assert [f.test.tolist() for f in one] != [f.test.tolist() for f in two]


def test_leave_one_out():
    speakers = cast(4, 3)
    folds = leave_one_out_folds(speakers)
    every_row_tested_once(folds, 12)
    assert [{speakers[i] for i in fold.test} for fold in folds] == [{"1001"}, {"1002"}, {"1003"}, {"1004"}]
    assert all(len(fold.validation) == 3 for fold in folds)


@pytest.mark.parametrize(("n_folds", "fraction"), [(5, 0.1), (3, 0.2), (2, 0.0)])
def test_stratified_folds(n_folds, fraction):
    labels = ["a"] * 31 + ["b"] * 12 + ["c"] * 57
    folds = stratified_folds(labels, n_folds, 2, fraction)
    every_row_tested_once(folds, 100)
    assert max(len(f.test) for f in folds) - min(len(f.test) for f in folds) <= 1
    for fold in folds:
        for label, count in (("a", 31), ("b", 12), ("c", 57)):
            tested = sum(labels[i] == label for i in fold.test)
            assert tested in (count // n_folds, count // n_folds + 1)
            held_out = sum(labels[i] == label for i in fold.validation)
            assert held_out == (max(1, round(fraction * (count - tested))) if fraction else 0)


def test_stratified_folds_keep_what_belongs_together():
    labels = np.array(["a", "b"] * 40)
    recording = np.arange(80)
    recording[10:30] = recording[50:70]  # 20 recordings are there twice, far apart
    folds = stratified_folds(labels, 4, together=recording)
    every_row_tested_once(folds, 80)
    assert_no_leakage_in(folds, {"recording": recording})
    with pytest.raises(ValueError, match=r"share \d+ recording\(s\)"):
        assert_no_leakage_in(stratified_folds(labels, 4), {"recording": recording})


def test_more_bad_arguments():
    with pytest.raises(ValueError, match=r"label b: wanted at least n_folds = 5 utterances, got 3"):
        stratified_folds(["a"] * 9 + ["b"] * 3)
    with pytest.raises(ValueError, match="wanted at least n_folds = 5 different groups, got 3"):
        grouped_folds(["a", "b", "c"])
    with pytest.raises(ValueError, match="number of groups must be at least 2, got 1"):
        leave_one_out_folds(["a", "a"])


class TestFiles:
    FILES = tuple(f"{k:02d}.wav" for k in range(30))

    def write(self, path):
        folds = speaker_folds(cast(6, 5), 3)
        return folds, splits.save(path, folds, self.FILES, {"procedure": "speaker_folds", "seed": 0})

    def test_they_come_back(self, tmp_path):
        folds, digest = self.write(tmp_path / "deep" / "folds.json")
        got, facts = splits.load(tmp_path / "deep" / "folds.json", self.FILES)
        assert facts == {"procedure": "speaker_folds", "seed": 0}
        for fold, other in zip(folds, got, strict=True):
            assert fold.index == other.index
            for part in splits.PARTS:
                np.testing.assert_array_equal(getattr(fold, part), getattr(other, part))
        assert digest == self.write(tmp_path / "again.json")[1]
        assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "folds.json"]

    def test_rows_are_found_by_name(self, tmp_path):
        folds, _ = self.write(tmp_path / "folds.json")
        turned = self.FILES[::-1]
        got, _ = splits.load(tmp_path / "folds.json", turned)
        for fold, other in zip(folds, got, strict=True):
            assert {self.FILES[i] for i in fold.test} == {turned[i] for i in other.test}
            assert (np.diff(other.test) > 0).all()

    def test_an_empty_part_comes_back(self, tmp_path):
        folds = speaker_folds(cast(6, 5), 3, validation_fraction=0)
        splits.save(tmp_path / "folds.json", folds, self.FILES)
        assert all(fold.validation.size == 0 for fold in splits.load(tmp_path / "folds.json", self.FILES)[0])

    def test_what_is_not_believed(self, tmp_path):
        path = tmp_path / "folds.json"
        self.write(path)
        whole = path.read_text()
        path.write_text(whole[:-40])
        with pytest.raises(ValueError, match="is not whole JSON"):
            splits.load(path)
        content = json.loads(whole)
        row = content["folds"][0]["test"].pop()
        content["folds"][0]["train"].append(row)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="was changed after it was written"):
            splits.load(path)
        path.write_text(whole.replace(splits.FORMAT, "parrot-folds-0"))
        with pytest.raises(ValueError, match="wanted the format 'parrot-folds-1', got 'parrot-folds-0'"):
            splits.load(path)
        path.write_text("[1, 2]")
        with pytest.raises(ValueError, match="got None"):
            splits.load(path)
        path.write_text(whole)
        with pytest.raises(ValueError, match=r"1 of its 30 are gone \(such as 29.wav\), 1 are new \(such as x.wav\)"):
            splits.load(path, (*self.FILES[:-1], "x.wav"))

    def test_what_is_not_written(self, tmp_path):
        folds = speaker_folds(cast(6, 5), 3)
        with pytest.raises(ValueError, match=r"01\.wav is there twice"):
            splits.save(tmp_path / "folds.json", folds, ("01.wav",) * 30)
        with pytest.raises(ValueError, match="rows beyond the 9 files"):
            splits.save(tmp_path / "folds.json", folds, self.FILES[:9])
        assert list(tmp_path.iterdir()) == []
