"""Metrics, and cross-validation that resumes and does not depend on the number of workers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from parrot import evaluation, model
from parrot.evaluation import cross_validate, final_fold, metrics, model_digest, train_final
from parrot.model import Parrot, ParrotConfig
from parrot.ragged import Ragged
from parrot.sharing import CONFIG, Shareable
from parrot.training import TrainingConfig
from parrot.workers import run_all

QUICK = TrainingConfig(epochs=3, device="cpu")
NAMES = ("anger", "neutral", "sad")


class Net(Shareable, nn.Module):
    def __init__(self, width, dims, n_classes):
        super().__init__()
        self.given = {"width": width, "dims": list(dims), "n_classes": n_classes}
        self.hidden = nn.Linear(sum(dims), width)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(width, n_classes)

    def arguments(self):
        return self.given

    @classmethod
    def build(cls, arguments):
        return cls(**arguments)

    def forward(self, *features):
        return self.out(self.dropout(torch.relu(self.hidden(torch.cat(features, dim=1)))))


def build(name, dims, n_classes):  # at module level: workers import it
    return Net({"small": 8, "large": 32}[name], dims, n_classes)


def broken_build(name, dims, n_classes):
    if name == "large":
        raise RuntimeError("the large model does not build")
    return build(name, dims, n_classes)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 30)
    features = [(rng.standard_normal((3, d))[labels] + rng.standard_normal((90, d))).astype(np.float32) for d in (5, 4)]
    speakers = np.repeat(np.arange(6), 15)
    folds = [
        SimpleNamespace(
            index=k,
            train=np.flatnonzero((speakers % 3 != k) & (speakers != (k + 1) % 3)),
            validation=np.flatnonzero(speakers == (k + 1) % 3),
            test=np.flatnonzero(speakers % 3 == k),
        )
        for k in range(3)
    ]
    return features, labels, folds


def validate(data, systems=("small", "large"), **options):
    features, labels, folds = data
    options = {"config": QUICK, "workers": 1, "build": build, "progress": False, **options}
    return cross_validate(systems, features, labels, folds, NAMES, **options)


def test_leaking_folds_are_refused_before_anything_is_trained(data, tmp_path):
    _, labels, folds = data
    row, other = folds[1].train[0], folds[1].test[0]
    recordings = [f"hash {k}" for k in range(len(labels))]
    validate(data, ("small",), groups={"recording": recordings})
    recordings[row] = recordings[other]
    with pytest.raises(ValueError, match=rf"share 1 recording\(s\): hash {other}\."):
        validate(data, groups={"recording": recordings}, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match=rf"`groups\['speaker'\]` must have {len(labels)} values; got 3"):
        validate(data, groups={"speaker": ["a", "b", "c"]})


def same(a, b):
    return all(
        np.array_equal(x.training.test_logits, y.training.test_logits) and x.training.history == y.training.history
        for system in a.systems
        for x, y in zip(a.systems[system], b.systems[system], strict=True)
    )


def test_metrics_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 0, 0, 1, 1, 0, 2, 2])
    got = metrics(labels, predictions)
    f1 = [2 * 3 / (2 * 3 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 1), 1.0]
    assert got == pytest.approx({"wa": 6 / 8, "ua": (3 / 4 + 1 / 2 + 1) / 3, "macro_f1": sum(f1) / 3})


def test_unweighted_accuracy_counts_only_classes_that_are_present():
    got = metrics(np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1]))
    assert got["ua"] == pytest.approx(0.75)


def test_metrics_refuse_nothing_and_misaligned():
    for labels, predictions in ((np.array([]), np.array([])), (np.array([1]), np.array([1, 2]))):
        with pytest.raises(ValueError, match="equally long and not empty"):
            metrics(labels, predictions)


def test_summary_is_mean_and_population_deviation(data):
    results = validate(data)
    assert list(results.systems) == ["small", "large"]
    for system, folds in results.systems.items():
        values = [metrics(f.labels, f.training.predictions)["ua"] for f in folds]
        entry = results.summary()[system]["ua"]
        assert entry["folds"] == values
        assert entry["mean"] == pytest.approx(np.mean(values))
        assert entry["std"] == pytest.approx(np.sqrt(np.mean((np.array(values) - np.mean(values)) ** 2)))
        confusion = results.confusion(system)
        assert confusion.sum() == 90
        assert np.trace(confusion) == sum((f.labels == f.training.predictions).sum() for f in folds)
        assert confusion.sum(axis=1).tolist() == [30, 30, 30]
    assert [f.fold for f in results.systems["small"]] == [0, 1, 2]
    assert results.fold_sizes[0] == {"train": 45, "validation": 15, "test": 30}


@pytest.mark.slow
def test_workers_and_store_do_not_change_the_figures(data, tmp_path):
    serial = validate(data)
    parallel = validate(data, workers=2, store=tmp_path)
    assert parallel.reused == 0
    assert same(serial, parallel)
    again = validate(data, workers=2, store=tmp_path)
    assert again.reused == 6
    assert same(serial, again)
    assert again.summary() == serial.summary()


def test_finished_runs_survive_a_failure(data, tmp_path, monkeypatch):
    fit, calls = evaluation.Task.fit, []

    def interrupted(task, system, fold, group):
        calls.append((system, fold))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(task, system, fold, group)

    monkeypatch.setattr(evaluation.Task, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate(data, store=tmp_path)
    assert calls == [("large", 0), ("large", 1), ("large", 2), ("small", 0)]  # the longest first
    monkeypatch.setattr(evaluation.Task, "fit", fit)
    resumed = validate(data, store=tmp_path)
    assert resumed.reused == 3
    assert same(resumed, validate(data))


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_caller(data):
    features, labels, folds = data
    task = evaluation.Task(tuple(features), labels, 3, tuple(folds), QUICK, 0, broken_build)
    runs = [("small", 0), ("large", 0)]
    with pytest.raises(RuntimeError, match="the large model does not build"):
        list(run_all(task.result, runs, workers=2))


def test_anything_that_matters_makes_a_new_run(data, tmp_path):
    features, labels, folds = data
    assert validate(data, ("small",), store=tmp_path).reused == 0
    assert validate(data, ("small",), store=tmp_path).reused == 3
    assert validate(data, ("small",), store=tmp_path, seed=1).reused == 0
    assert validate(data, ("small",), store=tmp_path, config=TrainingConfig(epochs=2, device="cpu")).reused == 0
    moved = [features[0], features[1].copy()]
    moved[1][0, 0] += 1e-3
    assert validate((moved, labels, folds), ("small",), store=tmp_path).reused == 0
    relabelled = labels.copy()
    relabelled[0] = 2
    assert validate((features, relabelled, folds), ("small",), store=tmp_path).reused == 0
    other = [SimpleNamespace(**{**vars(f)}) for f in folds]
    other[1].train = other[1].train[:-1]
    assert validate((features, labels, other), ("small",), store=tmp_path).reused == 2
    wider = validate(data, ("small",), store=tmp_path, build=lambda name, dims, n: Net(9, dims, n))
    assert wider.reused == 0


def test_a_damaged_file_is_trained_again(data, tmp_path):
    first = validate(data, ("small",), store=tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(RuntimeWarning, match="trained again"):
        second = validate(data, ("small",), store=tmp_path)
    assert second.reused == 2
    assert same(first, second)


def test_stored_results_are_whole(data, tmp_path):
    result = validate(data, ("small",)).systems["small"][0].training
    result.plan = np.eye(4, dtype=np.float32)
    path = tmp_path / "deep" / "run.safetensors"
    evaluation.save_result(path, result)
    loaded = evaluation.load_result(path)
    assert np.array_equal(loaded.test_logits, result.test_logits)
    assert np.array_equal(loaded.plan, result.plan)
    assert (loaded.history, loaded.best_epoch, loaded.seconds) == (result.history, result.best_epoch, result.seconds)
    assert evaluation.load_result(tmp_path / "none.safetensors") is None


def test_bad_arguments(data):
    features, labels, folds = data
    with pytest.raises(ValueError, match="`systems` and `folds` must not be empty"):
        validate(data, ())
    with pytest.raises(ValueError, match=r"indices into `label_names` \(0 to 2\); got 0 to 5"):
        validate((features, np.where(labels == 2, 5, labels), folds))


def test_final_fold_trains_all_but_the_held_out_speakers():
    speakers = np.repeat([f"s{k:02d}" for k in range(20)], 3)
    fold = final_fold(speakers, index=5, seed=1)
    held_out = {speakers[i] for i in fold.validation}
    assert held_out == set(np.random.default_rng(105).choice(np.unique(speakers), size=2, replace=False))
    assert sorted([*fold.train, *fold.validation]) == list(range(60))
    assert len(fold.test) == 0
    with pytest.raises(ValueError, match="at least 2 speakers; got 1"):
        final_fold(["s"] * 4, index=5)


def test_final_model_is_kept_until_something_changes(data, tmp_path):
    features, labels, _ = data
    fold = final_fold(np.repeat(list("abcdef"), 15), index=3)

    def save(seed=0):
        train_final(
            "small", features, labels, fold, NAMES, tmp_path, {"corpus": "c"}, config=QUICK, seed=seed, build=build
        )
        return (tmp_path / "model.safetensors").stat().st_ino

    first = save()
    description = Net.from_pretrained(tmp_path).description
    assert description["system"] == "small"
    assert description["labels"] == list(NAMES)
    assert description["dims"] == [5, 4]
    assert (description["corpus"], description["batch_size"]) == ("c", 32)
    assert save() == first
    assert save(seed=1) != first
    (tmp_path / CONFIG).unlink()
    save()
    assert Net.from_pretrained(tmp_path).description == description


def test_workers_end_with_a_killed_parent():
    program = (
        "import os, signal, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from parrot.workers import _start_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), _start_worker, (None,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "killed.py"
        script.write_text(program)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, check=False)
        worker = Path("/proc") / done.stdout.decode().strip()
    for _ in range(100):
        if not worker.exists():
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent by 10 s")


def test_what_neither_weights_nor_layers_show_is_in_the_key():
    def annealed(epochs):
        return build_seeded(Parrot, (8, 8), 3, ParrotConfig(eps_start=0.5, eps_epochs=epochs))

    def tuned(spec):
        return build_seeded(model.build, "parrot-finetuned", (), 3, ("ssam-demo", spec))

    def build_seeded(make, *arguments):
        torch.manual_seed(0)
        return model_digest(make(*arguments))

    assert annealed(5) == annealed(5) != annealed(20)
    assert tuned("hubert-demo") == tuned("hubert-demo") != tuned("hubert-demo#0")


def test_the_key_of_sequences_tells_dtype_shape_order_and_values():
    values = np.arange(12, dtype=np.float32).reshape(6, 2)

    def key(*ends, values=values):
        return evaluation.digest(Ragged.join(np.split(values, ends)))

    distinct = [
        key(2, 3),
        key(2, 4),
        key(2),
        key(2, 3, values=values + 1),
        key(2, 3, values=values[::-1]),
        key(2, 3, values=values.astype(np.float64)),
        key(2, 3, values=values.view(np.int32)),
        key(2, 3, values=values[:, :, None]),
        evaluation.digest(values),
    ]
    assert key(2, 3) == key(2, 3) == key(2, 3, values=np.asfortranarray(values))
    assert len(set(distinct)) == len(distinct)
    zeros = [key(2, 3, values=np.zeros(shape, dtype)) for shape, dtype in (((6, 2), np.float32), ((6, 1), np.float64))]
    assert zeros[0] != zeros[1]  # equal bytes

    sequences = Ragged.join(np.split(values, (2, 3)))
    assert evaluation.digest(sequences.select([2, 0])) == evaluation.digest(Ragged.join(sequences[[2, 0]]))
    assert evaluation.digest(sequences.select([2, 0])) != evaluation.digest(sequences.select([0, 2]))
