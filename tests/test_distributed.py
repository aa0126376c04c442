"""Two processes, joined by gloo, do what one does: the same bits of features, the same training up to rounding."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import distributed_cases as cases
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from parrot import cli
from parrot.distributed import Group, join
from parrot.features import Extraction, extract
from parrot.workers import launched

ROOT = Path(__file__).parents[1]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # on a free port


def launch(*command: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*LAUNCHER, *map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def run(case: str, folder: Path) -> None:
    """In two processes, as a launcher starts them: its own start takes seconds."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in ("0", "1"):
        with (folder / f"{case}-{rank}.log").open("w") as log:
            command, ranks = [sys.executable, cases.__file__, case, str(folder)], {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env={**common, **ranks}, cwd=ROOT, stdout=log, stderr=log))
    try:
        for rank, process in enumerate(processes):
            assert process.wait(300) == 0, (folder / f"{case}-{rank}.log").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()


pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_extraction_by_two_processes_is_that_of_one(tmp_path):
    cases.corpus_of(tmp_path)
    run("extraction", tmp_path)
    for clips in (1, 4):
        one = cases.embedded(tmp_path, "alone", Group(), Extraction(clips))
        assert [path.name for path, _ in one.failures] == ["004.wav", "017.wav"]
        for rank in range(2):
            with np.load(tmp_path / f"{clips}-{rank}.npz") as two:
                assert two["values"].tobytes() == one.values.tobytes()
                np.testing.assert_array_equal(two["indices"], one.indices)
                assert two["failures"].tolist() == [str(path) for path, _ in one.failures]
                assert tuple(two["hashes"]) == one.hashes
                assert two["reused"] <= 1  # one of the two that are the same, where its process came second
        again = cases.embedded(tmp_path, "shared", Group(), Extraction(clips))
        assert again.reused == len(again.rows) == 29


@pytest.mark.slow
def test_processes_that_do_not_share_the_folder_are_told(tmp_path):
    cases.corpus_of(tmp_path)
    done = launch(ROOT / "tests" / "distributed_cases.py", "separate_folders", tmp_path)
    assert done.returncode != 0
    assert "must share the cache folder" in done.stderr


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_written(tmp_path):
    corpus = cases.make_corpus(tmp_path, 40)
    done = launch(ROOT / "tests" / "distributed_cases.py", "killed", tmp_path)
    assert done.returncode != 0
    kept = sum(len(load_arrays(path)["keys"]) for path in tmp_path.glob("cache/*/shard-*.safetensors"))
    assert kept >= 4  # the victim's own; the other process's besides, as far as it came
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = extract(corpus, cases.TinyEncoder(), tmp_path / "cache", False)
    assert resumed.reused == kept
    alone = extract(corpus, cases.TinyEncoder(), tmp_path / "alone", False)
    assert resumed.values.tobytes() == alone.values.tobytes()


@pytest.mark.slow
def test_training_by_two_processes_is_that_of_one(tmp_path):
    run("training", tmp_path)
    for system in cases.SYSTEMS:
        network, result = cases.trained(system, Group())
        first, second = (load_file(tmp_path / f"{system}-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), system  # both have the same model
        for name, value in network.state_dict().items():
            torch.testing.assert_close(first[f"state.{name}"], value, rtol=1e-3, atol=1e-4, msg=f"{system} {name}")
        torch.testing.assert_close(first["logits"], torch.from_numpy(result.test_logits), rtol=1e-3, atol=1e-4)
        for name, values in result.history.items():
            torch.testing.assert_close(first[f"history.{name}"], torch.tensor(values), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_the_whole_batch_agree_to_the_last_digits(tmp_path):
    run("double", tmp_path)
    for system in ("parrot", "parrot-unrolled", "cnn-0"):
        for rows in (1, 7):
            one = cases.gradients(system, rows, Group())
            for rank in range(2):
                two = load_file(tmp_path / f"{system}-{rows}-{rank}.safetensors")
                assert two.keys() == one.keys()
                for name in one:
                    torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-12, msg=f"{system} {name}")


@pytest.mark.slow
def test_cross_validation_by_two_processes(tmp_path):
    run("cross_validation", tmp_path)
    assert not (tmp_path / "results1").exists()  # the main process keeps the results
    one = cases.validated(tmp_path / "alone", Group())
    logits = np.concatenate([result.training.test_logits for results in one.systems.values() for result in results])
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"logits{rank}.npy"), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_commands_under_a_launcher(tmp_path):
    cases.make_corpus(tmp_path, 12)
    lines = [f"{i:03d}.wav,s{i % 4},{'ab'[i // 4 % 2]}" for i in range(12)]
    (tmp_path / "all.csv").write_text("\n".join(["path,speaker,label", *lines]) + "\n")
    common = ["--corpus", "manifest", tmp_path / "all.csv", "--cache", tmp_path / "cache", "--device", "cpu"]
    done = launch("-m", "parrot", "features", "--encoder", "ssam-demo", *common)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("12 of 12 utterances") == 1  # one process speaks
    options = ["--encoders", "ssam-demo", "--folds", "2", "--epochs", "1", "--output", tmp_path / "run"]
    done = launch("-m", "parrot", "train", *options, *common)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Trained  4 runs, reused 0") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.md").exists()


def test_commands_that_processes_cannot_share(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["info"]) == 2
    assert "can share features and train only" in capsys.readouterr().err


def test_without_accelerate_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'parrot-kernels\[distributed\]'"):
        join("cpu")


def test_one_process_does_not_import_accelerate():
    program = (
        "import sys\n"
        "from parrot import distributed, features, training, evaluation\n"
        "group = distributed.join()\n"
        "assert (group.rank, group.size, group.main) == (0, 1, True)\n"
        "assert group.gather(3) == [3] and group.of_main(4) == 4 and group.parallel(5) == 5\n"
        "assert 'accelerate' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_a_scheduler_s_world_size_alone_launches_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert not launched()
    monkeypatch.setenv("RANK", "1")
    assert launched()
