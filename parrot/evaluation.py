"""Metrics, and cross-validation of several systems over folds: parallel, resumable, reproducible.

Every (system, fold) is one training run of its own seed, stored under a key made of all that determines it, so a
run that was killed goes on where it stopped and one with nothing new to do trains nothing. A run computes on one
CPU thread; runs go to worker processes, and any number of workers gives the same figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from parrot.corpora.splits import Fold, assert_no_leakage_in, check_classes_in
from parrot.distributed import Group
from parrot.encoders.base import Encoder
from parrot.files import write_atomically
from parrot.ragged import Ragged
from parrot.sharing import Shareable
from parrot.store import StoredRows, StoredSequences
from parrot.training import (
    TrainingConfig,
    TrainingResult,
    reproducible,
    train,
)
from parrot.workers import run_all, usable_cores

METRICS = ("wa", "ua", "macro_f1")
FORMAT = 1  # of stored results; raise it when a change to training makes them out of date

Features = Sequence[np.ndarray | StoredRows | Ragged]  # one per encoder, rows aligned
Build = Callable[[str, Sequence[int], int], nn.Module]


def metrics(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """WA (accuracy), UA (balanced accuracy: the mean recall over the classes present) and macro-F1, in [0, 1]."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    if len(labels) == 0 or len(labels) != len(predictions):
        raise ValueError(
            f"metrics: `labels` and `predictions` must be equally long and not empty; "
            f"got {len(labels)} and {len(predictions)}."
        )
    with warnings.catch_warnings():  # a class may be predicted that a small test set does not hold
        warnings.simplefilter("ignore", UserWarning)
        return {
            "wa": float(accuracy_score(labels, predictions)),
            "ua": float(balanced_accuracy_score(labels, predictions)),
            "macro_f1": float(f1_score(labels, predictions, average="macro")),
        }


@dataclass
class FoldResult:
    """One system trained and tested on one fold; ``rows`` and ``labels`` are those of the test part, (n_test,)."""

    fold: int
    rows: np.ndarray
    labels: np.ndarray
    training: TrainingResult

    @property
    def metrics(self) -> dict[str, float]:
        return metrics(self.labels, self.training.predictions)


@dataclass
class CrossValidation:
    """The results of all systems over all folds, and what they were made with."""

    systems: dict[str, list[FoldResult]]
    label_names: tuple[str, ...]
    config: TrainingConfig
    seed: int
    fold_sizes: list[dict[str, int]]
    reused: int

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """system -> metric -> {"mean", "std" (population, over folds), "folds" (values)}."""
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for system, results in self.systems.items():
            per_fold = [result.metrics for result in results]
            table[system] = {}
            for name in METRICS:
                values = [fold[name] for fold in per_fold]
                table[system][name] = {"mean": float(np.mean(values)), "std": float(np.std(values)), "folds": values}
        return table

    def confusion(self, system: str) -> np.ndarray:
        """(n_classes, n_classes) counts over all folds' test parts; rows are true classes, columns predictions."""
        counts = np.zeros((len(self.label_names),) * 2, dtype=np.int64)
        for result in self.systems[system]:
            np.add.at(counts, (result.labels, result.training.predictions), 1)
        return counts


@dataclass(frozen=True)
class Task:
    """All that the training runs of one cross-validation share.

    Features of several kinds come as a mapping from the kind; each system gets what :func:`parrot.model.inputs_of`
    says.
    """

    features: Features | Mapping[str, Features]
    labels: np.ndarray
    n_classes: int
    folds: tuple[Fold, ...]
    config: TrainingConfig
    seed: int
    build: Build

    def model(self, system: str, fold: int) -> nn.Module:
        """The system's model, initialised from the fold's seed."""
        with reproducible(self.seed_of(fold), torch.device("cpu")):
            return self.build(system, widths(self.features_of(system)), self.n_classes)

    def features_of(self, system: str) -> Features:
        """What the system takes."""
        return self.features[_kind(system)] if isinstance(self.features, Mapping) else self.features

    def seed_of(self, fold: int) -> int:
        return self.seed * 100 + self.folds[fold].index

    def fit(self, system: str, fold: int, group: Group | None = None) -> tuple[nn.Module, TrainingResult]:
        """Initialise and train one system on one fold."""
        model, seed = self.model(system, fold), self.seed_of(fold)
        return model, train(model, self.features_of(system), self.labels, self.folds[fold], self.config, seed, group)

    def result(self, system: str, fold: int, group: Group | None = None) -> TrainingResult:
        """What training one system on one fold leaves behind."""
        return self.fit(system, fold, group)[1]

    @cached_property
    def _digests(self) -> tuple[dict[str, list[str]], str]:
        kinds = self.features if isinstance(self.features, Mapping) else {"": self.features}
        return {kind: [digest(f) for f in features] for kind, features in kinds.items()}, digest(self.labels)

    def key(self, system: str, fold: int, initial: str) -> str:
        """Hash of what determines the result: data, parts, protocol, seed, initial model, torch and the device."""
        device = self.config.resolved_device()
        facts = {
            "format": FORMAT,
            "system": system,
            "model": initial,
            "features": self._digests[0][_kind(system) if isinstance(self.features, Mapping) else ""],
            "labels": self._digests[1],
            "n_classes": self.n_classes,
            "parts": [digest(np.asarray(getattr(self.folds[fold], p))) for p in ("train", "validation", "test")],
            "config": {**asdict(self.config), "device": device.type},
            "seed": self.seed_of(fold),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _kind(system: str) -> str:
    from parrot.model import inputs_of

    return inputs_of(system)


def widths(features: Features) -> list[int | tuple[int, ...]]:
    """What ``build`` is told of each encoder's features: d of (n, d) or sequences of (T, d), else (layers + 1, d)."""
    shapes = [f.shape[1:] for f in features]
    return [shape[0] if len(shape) == 1 else tuple(shape) for shape in shapes]


def digest(array: np.ndarray | StoredRows | Ragged) -> str:
    """Hash of an array's dtype, shape and values, or of sequences' and their lengths; the same for rows on disk."""
    if isinstance(array, Ragged | StoredSequences):
        # Not the whole shape: what a selection shares its memory with is no part of it.
        facts = f"sequences {array.dtype}{array.shape[1:]}{array.lengths.tolist()}"
        state = hashlib.sha256(facts.encode())
        for start in range(0, len(array), 1024):
            for sequence in array[start : start + 1024]:
                state.update(np.ascontiguousarray(sequence).data)
        return state.hexdigest()
    if not isinstance(array, StoredRows):
        array = np.ascontiguousarray(array)
    state = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    for start in range(0, len(array), 1 << 14):
        state.update(array[start : start + (1 << 14)].tobytes())
    return state.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Hash of a model's structure and weights, and of the settings of encoders in it, which neither shows."""
    state = hashlib.sha256(repr(model).encode())
    for module in model.modules():
        if isinstance(module, Encoder):
            state.update(module.fingerprint.encode())
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + digest(tensor.detach().cpu().numpy()).encode())
    return state.hexdigest()


def cross_validate(
    systems: Sequence[str],
    features: Features | Mapping[str, Features],
    labels: np.ndarray,
    folds: Sequence[Fold],
    label_names: Sequence[str],
    *,
    config: TrainingConfig | None = None,
    seed: int = 0,
    workers: int | None = None,
    store: str | Path | None = None,
    build: Build | None = None,
    progress: bool = True,
    groups: Mapping[str, Sequence[str]] | None = None,
    group: Group | None = None,
) -> CrossValidation:
    """Train and test every system on every fold.

    Args:
        systems: names that ``build`` knows.
        features: one (n, d_k) matrix per encoder, rows aligned; or such lists by kind, see :class:`Task`.
        labels: (n,) integer classes, indices into ``label_names``.
        folds: the folds; training runs of fold k use the seed ``seed * 100 + k``.
        label_names: the names of the classes.
        config: the training protocol; the paper's by default.
        seed: see ``folds``.
        workers: worker processes, each of one thread; 1 trains in this process. By default one per CPU core on
            the CPU, 1 on a GPU. The figures do not depend on it.
        store: folder of finished runs, to resume and to reuse; None keeps nothing.
        build: ``build(name, dims, n_classes)`` gives the model; ``parrot.model.build`` by default. A module-level
            function, so that workers can import it.
        progress: show a progress bar.
        groups: what train, validation and test must not share, such as ``{"speaker": corpus speakers,
            "recording": file hashes}``, (n,) each; checked for every fold before anything is trained.
        group: processes that train each run together and all call this, see :func:`parrot.distributed.join`; there
            are no worker processes then, and the figures agree with those of one process up to rounding. The main
            process alone reads and writes ``store``.

    Raises:
        ValueError: if there is no system or fold, there is one class alone or one without a name, the training data
            are bad, or a fold leaks.
    """
    if build is None:
        from parrot.model import build
    if not systems or not folds:
        raise ValueError(f"cross_validate: `systems` and `folds` must not be empty; got {len(systems)}, {len(folds)}.")
    if len(labels) and not 0 <= np.min(labels) <= np.max(labels) < len(label_names):
        raise ValueError(
            f"cross_validate: `labels` must be indices into `label_names` (0 to {len(label_names) - 1}); "
            f"got {np.min(labels)} to {np.max(labels)}."
        )
    for what, values in (groups or {}).items():
        if len(values) != len(labels):
            raise ValueError(f"cross_validate: `groups[{what!r}]` must have {len(labels)} values; got {len(values)}.")
    assert_no_leakage_in(folds, groups or {})
    check_classes_in(folds, labels, label_names)
    config, group = config or TrainingConfig(), group or Group()
    task = Task(_owned(features), labels, len(label_names), tuple(folds), config, seed, build)
    store = None if store is None else Path(store)

    results: dict[tuple[str, int], TrainingResult] = {}
    keys: dict[tuple[str, int], str] = {}
    sizes: dict[str, int] = {}
    for system in dict.fromkeys(systems):
        model = task.model(system, 0)  # the other folds' models differ by their seeds only
        initial, sizes[system] = model_digest(model), sum(p.numel() for p in model.parameters())
        for fold in range(len(folds)):
            keys[system, fold] = task.key(system, fold, initial)
            if store is not None and group.main:
                stored = load_result(_path(store, system, fold, keys))
                if stored is not None:
                    results[system, fold] = stored
    results = group.of_main(results)
    reused = len(results)
    missing = sorted((run for run in keys if run not in results), key=lambda run: -sizes[run[0]])  # longest first
    if group.size > 1:
        workers = 1
    elif workers is None:
        workers = usable_cores() if config.resolved_device().type == "cpu" else 1

    fit = partial(task.result, group=group)
    with contextlib.closing(run_all(fit, missing, workers)) as finished:
        for (system, fold), result in _progress(finished, len(keys), reused, progress):
            results[system, fold] = result
            if store is not None and group.main:
                save_result(_path(store, system, fold, keys), result)

    def fold_result(system: str, fold: int) -> FoldResult:
        rows = np.asarray(folds[fold].test)
        return FoldResult(folds[fold].index, rows, np.asarray(labels)[rows], results[system, fold])

    return CrossValidation(
        {system: [fold_result(system, k) for k in range(len(folds))] for system in dict.fromkeys(systems)},
        tuple(label_names),
        config,
        seed,
        [{part: len(getattr(fold, part)) for part in ("train", "validation", "test")} for fold in folds],
        reused,
    )


def final_fold(speakers: Sequence[str], index: int, seed: int = 0, validation_fraction: float = 0.1) -> Fold:
    """The fold of a model to be used: all speakers train, but for those held out for early stopping; no test part.

    The validation speakers are drawn as those of a cross-validation's fold ``index`` are.
    """
    speakers = np.asarray(speakers, dtype=str)
    names = np.unique(speakers)
    count = max(1, round(validation_fraction * len(names)))
    if count >= len(names):
        raise ValueError(f"final_fold: `speakers` must name at least 2 speakers; got {len(names)}. Add speakers.")
    held_out = np.isin(speakers, np.random.default_rng(100 * seed + index).choice(names, size=count, replace=False))
    return Fold(index, np.flatnonzero(~held_out), np.flatnonzero(held_out), np.zeros(0, dtype=np.int64))


def train_final(
    system: str,
    features: Features | Mapping[str, Features],
    labels: np.ndarray,
    fold: Fold,
    label_names: Sequence[str],
    folder: str | Path,
    description: dict[str, Any],
    *,
    config: TrainingConfig | None = None,
    seed: int = 0,
    build: Build | None = None,
    group: Group | None = None,
) -> Path:
    """Train one system on ``fold`` and save it (``save_pretrained``); what the same call saved is left as it is.

    Args:
        system, features, labels, label_names, config, seed, build, group: as in :func:`cross_validate`.
        fold: see :func:`final_fold`.
        folder: of the model.
        description: what a user of the model must know beside the system, its widths and its labels.
    """
    if build is None:
        from parrot.model import build
    config, group = config or TrainingConfig(), group or Group()
    task = Task(_owned(features), labels, len(label_names), (fold,), config, seed, build)
    description = {
        **description,
        "system": system,
        "dims": [f.shape[-1] if len(f.shape) > 1 else 1 for f in task.features_of(system)],
        "labels": list(label_names),
        "batch_size": config.batch_size,
        "key": task.key(system, 0, model_digest(task.model(system, 0))),
    }
    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # none yet, or a broken one
        found = Shareable.from_pretrained(folder).description
    if group.of_main(found == description):
        return Path(folder)
    model, _ = task.fit(system, 0, group)
    if group.main:
        model.description = description
        model.save_pretrained(folder)
    return Path(folder)


def _owned(features: Features | Mapping[str, Features]) -> tuple | dict[str, tuple]:
    return {kind: tuple(f) for kind, f in features.items()} if isinstance(features, Mapping) else tuple(features)


def _path(store: Path, system: str, fold: int, keys: dict[tuple[str, int], str]) -> Path:
    return store / f"{system}_fold{fold}_{keys[system, fold][:20]}.safetensors"


def _progress(finished: Iterable, total: int, done: int, show: bool) -> Iterator:
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc="Training", unit="run", disable=not show) as bar:
        for (system, fold), result in finished:
            bar.set_postfix_str(f"{system}, fold {fold + 1}")
            bar.update()
            yield (system, fold), result


def save_result(path: Path, result: TrainingResult) -> None:
    """Write one training run's result as one safetensors file, atomically."""
    from safetensors.numpy import save

    tensors = {"test_logits": np.ascontiguousarray(result.test_logits)}
    if result.plan is not None:
        tensors["plan"] = np.ascontiguousarray(result.plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"history": result.history, "best_epoch": result.best_epoch, "seconds": result.seconds}
    write_atomically(path, save(tensors, {"result": json.dumps(facts)}))


def load_result(path: Path) -> TrainingResult | None:
    """The stored result; None if there is none or it can't be read (then it is made again)."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads(file.metadata()["result"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return TrainingResult(
            facts["history"], facts["best_epoch"], tensors["test_logits"], tensors.get("plan"), facts["seconds"]
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} can't be read ({error}); this run is trained again.", RuntimeWarning, stacklevel=3)
        return None
