"""The paper's tables: every row, beside the published figures, the same after kills and on any number of processes."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reproduce_small as small
from filelock import FileLock
from scipy.stats import ttest_rel, wilcoxon
from synthetic_trees import make_tree

from parrot import published, reproduce, reproduce_report
from parrot.cli import main
from parrot.corpora.splits import speaker_folds
from parrot.evaluation import metrics
from parrot.training import TrainingConfig


def contents(folder):
    """Path and bytes of every file, hidden ones included, but for the locks."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run on one process: its folder and its result."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, small.run(folder)


def test_every_row_of_table_2(finished):
    folder, result = finished
    pairs = {(row.encoders, row.kind) for row in result.rows}
    assert pairs == {
        (("wav2vec2", "mms"), "homogeneous"),
        (("audio-mamba-base", "wav2vec2"), "heterogeneous"),
        (("audio-mamba-base", "mms"), "heterogeneous"),
    }
    assert [row.system for row in result.rows] == ["concat", "hadamard", "ot", "parrot"] * 3
    assert result.rows[0].kind == "homogeneous"
    assert len(list((folder / "results").glob("*.json"))) == small.RUNS == len(result.rows) * 6


def test_every_row_of_table_1(tmp_path):
    result = small.run(tmp_path, table="table1", seeds=1)
    assert [(row.encoders, row.system) for row in result.rows] == [
        ((name,), system) for name in small.DIMS for system in ("fcn", "cnn")
    ]
    entries = {(*e["encoders"], e["system"]): e for e in reproduce_report.summary(result)}
    assert entries["audio-mamba-base", "cnn"]["published"] == {"wa": 69.91, "macro_f1": 69.90}
    assert entries["mms", "cnn"]["published"] is None
    assert entries["hubert", "cnn"]["ours"] is None  # published, and no such encoder was given
    text = (tmp_path / "table1.md").read_text()
    assert "| HuBERT | CNN | not run | 69.95 | not run | 68.23 | – |" in text


def test_figures_are_those_of_the_runs(finished):
    _, result = finished
    data = small.corpus()
    for (corpus, row), runs in result.runs.items():
        assert corpus == "crema-d"
        for seed in range(small.SEEDS):
            for fold in speaker_folds(data.speakers, small.FOLDS, seed):
                record = runs[seed * small.FOLDS + fold.index]
                assert (record["seed"], record["fold"], record["system"]) == (seed, fold.index, row.system)
                assert record["metrics"] == metrics(data.labels[fold.test], np.array(record["predictions"]))
        values = result.values(corpus, row, "wa")
        assert values.shape == (small.SEEDS, small.FOLDS)
        entry = next(
            e for e in reproduce_report.summary(result)
            if (tuple(e["encoders"]), e["system"]) == (row.encoders, row.system)
        )  # fmt: skip
        assert entry["ours"]["wa"]["mean"] == pytest.approx(100 * np.mean([r["metrics"]["wa"] for r in runs]))
        assert entry["ours"]["wa"]["std"] == pytest.approx(100 * np.std([r["metrics"]["wa"] for r in runs]))
        if row.system != "parrot":
            best = result.values(corpus, reproduce.Row(row.encoders, "parrot", row.kind), "wa")
            assert entry["test"]["wa"]["difference"] == pytest.approx(best.mean() - values.mean())
    assert len({record["metrics"]["wa"] for runs in result.runs.values() for record in runs}) > 10


def test_documents_have_ours_beside_the_published(finished):
    folder, result = finished
    markdown, latex = (folder / "table2.md").read_text(), (folder / "table2.tex").read_text()
    for row in result.rows:
        title = reproduce_report.encoders_title(row.encoders)
        values = result.values("crema-d", row, "wa")
        cell = f"{values.mean():.2f} ± {values.std():.2f}"
        assert f"| {title} | {reproduce.TITLES[row.system]} | {cell} |" in markdown
        assert f"{title} & {reproduce.TITLES[row.system]} & {cell.replace('±', '$' + chr(92) + 'pm$')} &" in latex
        for seed, folds in enumerate(values):
            line = " | ".join(f"{value:.2f}" for value in folds)
            assert f"| {title} | {reproduce.TITLES[row.system]} | {seed} | {line} |" in markdown
    assert "| Audio-Mamba base + HuBERT | PARROT | not run | 73.68 | not run | 72.90 | – |" in markdown
    assert "RANDOM" not in markdown
    with open(folder / "table2.csv") as file:
        lines = list(csv.DictReader(file))
    w2_mms = next(line for line in lines if (line["encoders"], line["system"]) == ("wav2vec2+mms", "parrot"))
    assert (w2_mms["wa_published"], w2_mms["macro_f1_published"]) == ("65.21", "65.01")
    with open(folder / "table2_folds.csv") as file:
        assert len(list(csv.DictReader(file))) == small.RUNS
    document = json.loads((folder / "table2.json").read_text())
    assert document["source"] == published.SOURCE
    assert (folder / "table2.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(finished, tmp_path):
    small.run(tmp_path, jobs=2)
    assert contents(tmp_path) == contents(finished[0])


def test_a_second_run_trains_nothing(finished):
    before = contents(finished[0])
    assert small.run(finished[0]).reused == small.RUNS
    assert contents(finished[0]) == before


def killed_and_resumed(folder, kills, seed):
    """Start, kill by SIGKILL after a random number of runs and a random moment more, and again; then let it end.

    Returns how many processes were killed while runs were neither all done nor all to do.
    """
    random = np.random.default_rng(seed)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    results, hits = Path(folder) / "results", 0

    def done():
        return sum(not path.name.startswith(".") for path in results.glob("*.json"))

    for number, target in enumerate([*np.sort(random.integers(0, small.RUNS - 4, kills)), None]):
        command = [sys.executable, small.__file__, str(folder), str(1 + number % 2)]
        with subprocess.Popen(command, env=environment) as process:
            if target is None:
                assert process.wait(300) == 0
                break
            while process.poll() is None and done() < target:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.1))
            hits += process.poll() is None and 0 < done() < small.RUNS
            process.send_signal(signal.SIGKILL)
    return hits


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(finished, tmp_path):
    assert killed_and_resumed(tmp_path, kills=10, seed=10) >= 5
    assert contents(tmp_path) == contents(finished[0])


def test_a_damaged_result_is_made_again(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    path = sorted((tmp_path / "results").glob("*.json"))[5]
    path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "results" / f".{path.name}.99.tmp").write_text("half")
    assert small.run(tmp_path).reused == small.RUNS - 1
    assert contents(tmp_path) == before


def test_a_full_disk_is_told_and_loses_nothing(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0] / "results", tmp_path / "results")
    for path in sorted((tmp_path / "results").glob("*.json"))[::6]:
        path.unlink()
    sync, written, kept = os.fsync, [], small.RUNS - 12

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left on device: '.*json'") as caught:
            small.run(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert len([path for path in (tmp_path / "results").iterdir() if path.name != "lock"]) == kept + 7
    assert small.run(tmp_path).reused == kept + 7
    assert contents(tmp_path) == contents(finished[0])


def test_two_runs_of_one_folder_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "LOCK_SECONDS", 0.1)
    (tmp_path / "results").mkdir()
    held, message = (
        FileLock(tmp_path / "results" / "lock"),
        r"another run uses .*results\. Wait for it, or name another",
    )
    with held, pytest.raises(RuntimeError, match=message):
        small.run(tmp_path)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["lock"]


@pytest.mark.parametrize("recordings", [True, False])
def test_copies_of_a_recording_on_both_sides_are_refused(recordings, tmp_path):
    """One recording under two names and speakers: said by its names, or, without any, found by its embedding."""
    data, names = small.corpus(), [f"{k}.wav" for k in range(144)]
    for matrix in data.features.values():
        matrix[40] = matrix[3]
    if recordings:
        names[3] = names[40] = "3.wav = 40.wav"
        data = dataclasses.replace(data, recordings=tuple(names))
    with pytest.raises(
        ValueError, match=r"share 1 recording\(s\): " + (r"3.wav = 40.wav\." if recordings else "[0-9a-f]{64}")
    ):
        small.run(tmp_path, corpora=[data])
    assert not (tmp_path / "results").exists()


def test_one_class_is_refused_and_an_untrained_one_told(tmp_path):
    data = small.corpus()
    one = dataclasses.replace(data, labels=np.zeros_like(data.labels))
    with pytest.raises(ValueError, match="two classes or more; got anger"):
        small.run(tmp_path, corpora=[one])
    rare = data.labels % 2
    rare[:16] = 2  # of the first speaker alone
    with pytest.warns(UserWarning, match="no training utterance is of sad, which is tested"):
        small.run(tmp_path, corpora=[dataclasses.replace(data, labels=rare)], table="table1", seeds=1)


def test_what_determines_a_result_is_in_its_key():
    def keys(data=None, config=None, folds=small.FOLDS):
        rows = reproduce.rows_of("table2", small.streams())[:1]
        config = config or TrainingConfig(epochs=3, device="cpu")
        experiments = reproduce.Experiments([data or small.corpus()], rows, 2, folds, config)
        return [experiments.key(job) for job in experiments.jobs]

    first = keys()
    assert len(set(first)) == 2 * small.FOLDS
    assert keys() == first
    moved = small.corpus()
    moved.features["mms"][7, 2] += 1e-3
    relabelled = small.corpus()
    relabelled.labels[0] = 2
    for other in (keys(moved), keys(relabelled), keys(config=TrainingConfig(epochs=4, device="cpu"))):
        assert not set(other) & set(first)
    assert not set(keys(folds=2)) & set(first)
    unused = small.corpus()
    unused.features["audio-mamba-base"][0] = 0  # the first row is wav2vec2 + mms
    assert keys(unused) == first


def test_a_corpus_of_few_speakers_needs_the_stratified_split(tmp_path):
    data = small.corpus("mesd")
    few = reproduce.CorpusData(
        "mesd", data.features, data.labels, tuple("CFM"[k % 3] for k in range(144)), ("a", "b", "c")
    )
    with pytest.raises(ValueError, match="MESD tells 3 speakers apart, too few for 5 speaker-disjoint folds"):
        small.run(tmp_path, corpora=[few], folds=5)
    assert not (tmp_path / "results").exists()
    for matrix in few.features.values():
        matrix[3] = matrix[0]  # a copy of a recording, of the same label
    result = small.run(tmp_path, corpora=[few], folds=5, seeds=1, split="stratified", table="table1")
    assert [result.values("mesd", row, "wa").size for row in result.rows] == [5] * 6
    assert "SPEAKERS ARE ON BOTH SIDES" in (tmp_path / "table1.md").read_text()
    for fold in reproduce._folds(few, "stratified", 5, 0):
        assert (0 in fold.test) == (3 in fold.test)


def test_paired_tests_are_scipys():
    ours, other = np.array([[71.0, 69.5], [73.0, 68.0]]), np.array([[70.0, 70.0], [71.5, 66.0]])
    got = reproduce.paired_test(ours, other)
    assert got["difference"] == pytest.approx(1.0)
    assert got["t_test"] == pytest.approx(ttest_rel(ours.ravel(), other.ravel()).pvalue)
    assert got["wilcoxon"] == pytest.approx(wilcoxon(ours.ravel(), other.ravel()).pvalue)
    assert reproduce.paired_test(ours, ours) == {"difference": 0.0, "t_test": 1.0, "wilcoxon": 1.0}
    assert reproduce.paired_test(ours[:1, :1], other[:1, :1])["t_test"] is None
    assert reproduce.paired_test(ours, ours - 1)["t_test"] == 0.0


def test_published_figures():
    assert len(published.ROWS) == 8 * 3
    best = published.find(("hubert", "audio-mamba-base"), "parrot", "emo-db")
    assert (best.accuracy, best.macro_f1) == (92.24, 91.53)
    assert published.find(("hubert",), "fcn", "crema-d") is None
    assert {name for row in published.ROWS for name in row.encoders} <= set(published.ENCODERS)


@pytest.mark.parametrize(
    ("spec", "dim", "role"),
    [
        ("ssam-demo", 160, "audio-mamba-base"),
        ("hubert-demo", 96, "hubert"),
        ("ssam:/models/a.pth", 3840, "audio-mamba-base"),
        ("ssam:/models/a.pth", 960, "audio-mamba-tiny"),
        ("hubert:facebook/hubert-base-ls960", 768, "hubert"),
        ("hubert:/models/wavlm/mms-1b/", 1280, "mms"),
        ("transformers:microsoft/unispeech-sat-base", 768, "unispeech-sat"),
        ("transformers:someone/whisper", 768, None),
        ("mms:facebook/mms-1b", 1280, "mms"),
        ("wavlm:microsoft/wavlm-base#9", 768, None),
        ("ssamba:/models/base.pth", 768, None),
    ],
)
def test_roles_follow_from_specs(spec, dim, role):
    assert published.role(spec, dim) == role


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: reproduce.rows_of("table3", small.streams()), "must be one of table1, table2; got 'table3'"),
        (lambda t: reproduce.rows_of("table2", small.streams()[:1]), "needs two, at least one of attention; got audio"),
        (lambda t: reproduce.rows_of("table2", small.streams()[:1] * 2), "two encoders are called 'audio-mamba-base'"),
        (lambda t: small.run(t, seeds=0), "`seeds` and `jobs` must be 1 or more; got 0"),
        (lambda t: small.run(t, jobs=0), "got 2 and 0"),
        (lambda t: small.run(t, folds=10), "CREMA-D tells 9 speakers apart, too few for 10"),
        (lambda t: small.run(t, split="random"), "`split` must be one of speaker, stratified; got 'random'"),
        (lambda t: small.run(t, corpora=[small.corpus()] * 2), "different corpora, at least one; got .'crema-d'"),
    ],
)
def test_what_is_wrong_is_said(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_the_command_ends_and_prints_every_row(tmp_path, capsys):
    corpus = make_tree("crema-d", tmp_path / "corpus", limit=3 * 82, seconds=0.1, step=3)
    command = [
        "reproduce", "table2", "--corpus", f"crema-d:{corpus}", "--encoders", "ssam-demo",
        "hubert-demo", "mms=hubert-demo", "--seeds", "1", "--folds", "3", "--epochs", "1", "--jobs", "1",
        "--device", "cpu", "--output", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    assert main(command) == 0
    out = capsys.readouterr().out
    for pair in ("HuBERT + MMS", "Audio-Mamba base + HuBERT", "Audio-Mamba base + MMS"):
        lines = [line for line in out.splitlines() if f"│ {pair} (RANDOM)" in line]
        assert [line.split("│")[2].strip() for line in lines] == [
            reproduce.TITLES[s] for s in reproduce.SYSTEMS["table2"]
        ]
        assert len([line for line in out.splitlines() if f"│ {pair} " in line]) == 8  # the figures, and every fold
    assert "73.68" in out
    assert "RANDOM ENCODERS: ssam-demo (as Audio-Mamba base), hubert-demo (as HuBERT), hubert-demo (as MMS)" in out
    assert "Trained  36 runs, reused 0" in out
    before = contents(tmp_path / "run")
    assert main(command) == 0
    assert "Trained  0 runs, reused 36" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    start = ["reproduce", "table2", "--output", str(tmp_path), "--corpus"]
    assert main([*start, "crema-d", "--encoders", "ssam-demo"]) == 2
    assert "table2 needs two, at least one of attention" in capsys.readouterr().err
    assert main([*start, "crema-d", "--encoders", "ssam-demo", "hubert-demo"]) == 2
    assert "--corpus wants NAME:DIR" in capsys.readouterr().err
    assert main([*start, "crema-d:", "--encoders", "ssam-demo", "hubert-demo"]) == 2
    assert "--corpus wants NAME:DIR" in capsys.readouterr().err
    assert main([*start, "crema-d", "/nowhere", "--encoders", "ssam-demo", "hubert-demo"]) == 2
    assert "corpus 'crema-d' in /nowhere" in capsys.readouterr().err
    assert main([*start, "demo:/nowhere", "--encoders", "hubert-demo", "hubert-demo"]) == 2
    assert "two encoders are called 'hubert'. Name one of them: --encoders NAME=SPEC" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
