"""What the processes of tests/test_distributed.py do: `torchrun distributed_cases.py CASE FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from test_features import MaskingEncoder, TinyEncoder, make_corpus

from parrot import features, model
from parrot.corpora import Corpus
from parrot.corpora.splits import Fold
from parrot.distributed import Group, join, leave
from parrot.evaluation import cross_validate
from parrot.features import Extraction, FeatureTable, extract
from parrot.training import TrainingConfig, train

DIMS, CLASSES, ROWS = (12, 8), 3, 150
SYSTEMS = ("parrot", "parrot-unrolled", "concat", "cnn-1", "fcn-0", "parrot-reference")
CONFIG = TrainingConfig(epochs=3, batch_size=33, device="cpu")  # two processes get 16 and 17 rows


def corpus_of(folder: Path) -> Corpus:
    """31 recordings, two of which can't be used and two of which are the same; made by the first call."""
    made = (folder / "wav").exists()
    (folder / "wav").mkdir(exist_ok=True)
    corpus = make_corpus(folder / "wav", 31)
    if made:
        return corpus
    for number in (4, 17):
        corpus.utterances[number].path.write_bytes(b"")
    corpus.utterances[9].path.write_bytes(corpus.utterances[8].path.read_bytes())
    return corpus


def embedded(folder: Path, cache: str, group: Group, how: Extraction | None = None) -> FeatureTable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two files are bad
        return extract(corpus_of(folder), MaskingEncoder(), folder / cache, False, how=how, group=group)


def extraction(folder: Path, group: Group) -> None:
    for clips in (1, 4):
        table = embedded(folder, "shared", group, Extraction(clips))
        failures = np.array([str(path) for path, _ in table.failures])
        np.savez(
            folder / f"{clips}-{group.rank}.npz", values=table.values, indices=table.indices, failures=failures,
            reused=table.reused, hashes=np.array(table.hashes),
        )  # fmt: skip


def separate_folders(folder: Path, group: Group) -> None:
    embedded(folder, f"own{group.rank}", group)


def killed(folder: Path, group: Group) -> None:
    """The second process is killed when it has written some of its part."""
    features.FLUSH_SECONDS = -1.0  # a shard for each clip

    class Victim(TinyEncoder):
        def embed(self, waveforms: torch.Tensor) -> torch.Tensor:
            if group.rank == 1 and self.calls == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().embed(waveforms)

    extract(make_corpus(folder, 40), Victim(), folder / "cache", False, group=group)


def task() -> tuple[list[np.ndarray], np.ndarray, Fold]:
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, ROWS)
    centres = [random.standard_normal((CLASSES, dim)) for dim in DIMS]
    matrices = [(c[labels] + random.standard_normal((ROWS, len(c[0])))).astype(np.float32) for c in centres]
    return matrices, labels, Fold(0, np.arange(100), np.arange(100, 120), np.arange(120, ROWS))


def trained(system: str, group: Group):
    torch.manual_seed(0)
    network = model.build(system, DIMS, CLASSES)
    matrices, labels, fold = task()
    return network, train(network, matrices, labels, fold, CONFIG, seed=1, group=group)


def training(folder: Path, group: Group) -> None:
    for system in SYSTEMS:
        network, result = trained(system, group)
        state = {f"state.{name}": value for name, value in network.state_dict().items()}
        history = {f"history.{name}": torch.tensor(values) for name, values in result.history.items()}
        logits = torch.from_numpy(result.test_logits)
        save_file({**state, **history, "logits": logits}, folder / f"{system}-{group.rank}.safetensors")


def gradients(system: str, rows: int, group: Group) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = model.build(system, DIMS, CLASSES).double().train()
    parallel = group.parallel(network)
    undo = [group.share_rows(module) for module in network.row_modules]
    inputs = [torch.randn(rows, dim, dtype=torch.float64) for dim in DIMS]
    torch.manual_seed(1)  # dropout
    loss = torch.nn.functional.cross_entropy(parallel(*inputs), torch.arange(rows) % CLASSES)
    loss.backward()
    for again in undo:
        again()
    network.eval()
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {**found, "loss": loss.detach(), "alone": network(*inputs).detach()}


def double(folder: Path, group: Group) -> None:
    for system in ("parrot", "parrot-unrolled", "cnn-0"):
        for rows in (1, 7):  # one row: a process has none
            save_file(gradients(system, rows, group), folder / f"{system}-{rows}-{group.rank}.safetensors")


def validated(folder: Path, group: Group):
    matrices, labels, fold = task()
    folds = [fold, Fold(1, np.arange(50, ROWS), np.arange(20, 50), np.arange(20))]
    return cross_validate(
        ["parrot", "fcn-1"], matrices, labels, folds, "abc", config=CONFIG, workers=1,
        store=folder / f"results{group.rank}", progress=False, group=group,
    )  # fmt: skip


def cross_validation(folder: Path, group: Group) -> None:
    first = validated(folder, group)
    again = validated(folder, group)
    assert (first.reused, again.reused) == (0, 4)
    assert first.summary() == again.summary()
    logits = [result.training.test_logits for results in first.systems.values() for result in results]
    np.save(folder / f"logits{group.rank}.npy", np.concatenate(logits))


if __name__ == "__main__":
    {case.__name__: case for case in (extraction, separate_folders, killed, training, double, cross_validation)}[
        sys.argv[1]
    ](Path(sys.argv[2]), join("cpu"))
    leave()
