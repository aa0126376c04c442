"""Train one model on one fold: the protocol of PARROT's reimplementation, reproducible to the last digit.

Adam (learning rate 1e-3, betas 0.9 and 0.999, no weight decay, no schedule, no clipping) on the cross-entropy,
batches of 32; the training set is shuffled every epoch and its last incomplete batch dropped if the set exceeds
one batch; evaluation runs in the given order, last batch smaller. 50 epochs at most, patience 10 on the
validation cross-entropy (an improvement is more than 1e-6), and the best epoch's weights are restored.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot.distributed import Group
from parrot.ragged import Ragged, padded
from parrot.store import StoredRows, StoredSequences

if TYPE_CHECKING:
    from parrot.corpora.splits import Fold


@dataclass(frozen=True)
class TrainingConfig:
    """The training protocol; the defaults are the paper's and its reimplementation's.

    Attributes:
        epochs: the most epochs to train.
        batch_size: rows per batch in training and in evaluation. Batch-wise transport makes it part of the model.
        learning_rate: Adam's.
        encoder_learning_rate: Adam's for the encoders of a model that trains them.
        patience: epochs without an improvement of the validation cross-entropy after which training stops.
        min_improvement: what counts as an improvement.
        device: "auto" (CUDA if there is one), or anything ``torch.device`` takes.
    """

    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 1e-3
    encoder_learning_rate: float = 1e-5
    patience: int = 10
    min_improvement: float = 1e-6
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"TrainingConfig: `{name}` must be an integer of at least 1; got {value!r}.")
        for name in ("learning_rate", "encoder_learning_rate"):
            rate = getattr(self, name)
            if not (rate > 0 and math.isfinite(rate)):
                raise ValueError(f"TrainingConfig: `{name}` must be positive and finite; got {rate!r}.")

    def resolved_device(self) -> torch.device:
        """The device training runs on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"TrainingConfig: `device` must be auto, cpu or cuda; got {self.device!r}.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("TrainingConfig: `device` is cuda, but no CUDA device is visible. Use auto or cpu.")
        return device


@dataclass
class TrainingResult:
    """What one training run leaves behind (the trained weights are in the model itself).

    Attributes:
        history: lists over epochs: train_loss, validation_loss, validation_accuracy.
        best_epoch: the epoch (from 1) whose weights were restored.
        test_logits: (n_test, n_classes) float32, in the order of ``fold.test``.
        plan: (b, b) float32 transport plan of the first test batch, None for models without transport.
        seconds: wall time of the run.
    """

    history: dict[str, list[float]]
    best_epoch: int
    test_logits: np.ndarray
    plan: np.ndarray | None
    seconds: float

    @property
    def predictions(self) -> np.ndarray:
        """(n_test,) predicted class of each test row."""
        return self.test_logits.argmax(axis=1)


@contextlib.contextmanager
def reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators and fix what changes the last digits; everything is put back afterwards.

    On the CPU one thread computes, since sums split over threads round differently: use processes for speed.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    cuda = device.type == "cuda"
    if cuda:  # read by cuBLAS when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng(devices=[device] if cuda else []):
        try:
            if cuda:
                torch.use_deterministic_algorithms(True, warn_only=True)
                torch.backends.cudnn.benchmark = False
            else:
                torch.set_num_threads(1)
            torch.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.backends.cudnn.benchmark = benchmark


def predict(
    model: nn.Module,
    features: Sequence[np.ndarray | Tensor | StoredRows | Ragged],
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    group: Group | None = None,
) -> np.ndarray:
    """Logits (n, n_classes) float32 of all rows, in their order, in batches of ``batch_size`` (the last smaller).

    With batch-wise transport a row's logits depend on the rows that share its batch. In a group each process computes
    every ``group.size``-th batch, and all return the logits of all.
    """
    group = group or Group()
    starts = range(0, max(1, len(features[0])), batch_size)
    model.eval()
    with torch.no_grad():
        own = [
            model(*(batch_of(f, slice(start, start + batch_size), device) for f in features)).float().cpu().numpy()
            for start in starts[group.rank :: group.size]
        ]
    parts = group.gather(own)
    return np.concatenate([parts[i % group.size][i // group.size] for i in range(len(starts))])


def batch_of(
    features: np.ndarray | Tensor | StoredRows | Ragged, index: Any, device: str | torch.device
) -> Tensor | tuple[Tensor, Tensor]:
    """Some rows as a float32 tensor, sequences padded and with their lengths; of features on disk, these are read."""
    if not isinstance(features, Tensor) and isinstance(index, Tensor):
        index = index.cpu().numpy()
    if isinstance(features, Ragged | StoredSequences):
        return padded(features[index], device)
    return torch.as_tensor(features[index], dtype=torch.float32, device=device)


def train(
    model: nn.Module,
    features: Sequence[np.ndarray | StoredRows | Ragged],
    labels: np.ndarray,
    fold: Fold,
    config: TrainingConfig | None = None,
    seed: int = 0,
    group: Group | None = None,
) -> TrainingResult:
    """Train ``model`` on ``fold`` and evaluate it on the fold's test rows. The best weights end in ``model``.

    In a group the processes train one model together, and the result is that of one process up to rounding. A batch
    keeps its ``config.batch_size`` rows, whatever the number of processes, since the paper's transport couples them.
    Each process computes what works row by row (``model.row_modules``: convolutions and projections, nearly all of
    the work) on its part of the rows; their outputs are gathered, differentiably; fusion, classifier (dropout of the
    same seed) and loss are computed on the whole batch by every process; gradients are averaged by accelerate's data
    parallelism, see :meth:`parrot.distributed.Group.share_rows`. Batches of evaluation are dealt out whole.

    Args:
        model: takes one (b, d_k) float32 tensor per feature matrix, gives logits (b, n_classes).
        features: one (n, d_k) matrix per encoder, rows aligned. An array is put on the device as a whole; of rows on
            disk (:class:`parrot.store.StoredRows`) a batch is read at a time. Or one (n, layers + 1, d_k) array; or
            n sequences, of which the model takes pairs of a tensor (b, longest, d_k), padded with zeros, and the
            lengths (b,).
        labels: (n,) integer classes.
        fold: row indices train, validation, test; test may be empty.
        config: the protocol; the paper's by default.
        seed: of shuffling and dropout (the model's own initialisation is the caller's).
        group: see :func:`parrot.distributed.join`; this process alone by default.

    Raises:
        ValueError: on misaligned, non-finite or empty data, indices out of range or shared between parts.
        RuntimeError: if the validation loss is not finite before any epoch has been kept.
    """
    config, group = config or TrainingConfig(), group or Group()
    if group.size > 1 and hasattr(model, "encoders"):
        raise ValueError(
            f"train: encoders are trained in one process; got a group of {group.size}. Launch one, or freeze them."
        )
    _check(features, labels, fold)
    device = config.resolved_device()
    started = time.perf_counter()
    with reproducible(seed, device):
        model.to(device)
        data = [
            f if isinstance(f, StoredRows | Ragged) else torch.as_tensor(np.asarray(f, dtype=np.float32), device=device)
            for f in features
        ]
        targets = torch.as_tensor(np.asarray(labels, dtype=np.int64), device=device)
        if getattr(getattr(model, "config", None), "transport", None) == "reference":
            chosen = _reference_rows(fold.train, model.config.reference_size, seed)
            model.set_reference(*(batch_of(d, chosen, device) for d in data))
        history, best_epoch = _fit(model, data, targets, fold, config, seed, group)
        test = _part(data, fold.test)
        if len(fold.test):
            logits = predict(model, test, config.batch_size, device, group)
        else:
            logits = np.zeros((0, 0), dtype=np.float32)
        first = slice(config.batch_size)
        plan = transport_plan(model, [batch_of(t, first, device) for t in test]) if len(fold.test) else None
    return TrainingResult(history, best_epoch, logits, plan, time.perf_counter() - started)


def _parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    encoders = getattr(model, "encoders", None)
    if encoders is None:
        return [{"params": list(model.parameters())}]
    theirs = list(encoders.parameters())
    known = {id(parameter) for parameter in theirs}
    return [
        {"params": [parameter for parameter in model.parameters() if id(parameter) not in known]},
        {"params": theirs, "lr": config.encoder_learning_rate},
    ]


def _part(data: list[Tensor | StoredRows | Ragged], rows: np.ndarray) -> list[Tensor | StoredRows | Ragged]:
    rows = np.asarray(rows, dtype=np.int64)
    return [
        d.select(rows) if isinstance(d, StoredRows | Ragged) else d[torch.as_tensor(rows, device=d.device)]
        for d in data
    ]


def _fit(
    model: nn.Module,
    data: list[Tensor | StoredRows | Ragged],
    targets: Tensor,
    fold: Fold,
    config: TrainingConfig,
    seed: int,
    group: Group,
) -> tuple[dict[str, list[float]], int]:
    device = targets.device
    shuffle = torch.Generator().manual_seed(seed)
    rows = torch.as_tensor(np.asarray(fold.train, dtype=np.int64))
    held_out = torch.as_tensor(np.asarray(fold.validation, dtype=np.int64), device=device)
    validation, validation_targets = _part(data, fold.validation), targets[held_out].cpu()
    used = len(rows) - len(rows) % config.batch_size if len(rows) > config.batch_size else len(rows)
    optimizer = torch.optim.Adam(_parameter_groups(model, config), lr=config.learning_rate, fused=True)
    history: dict[str, list[float]] = {"train_loss": [], "validation_loss": [], "validation_accuracy": []}
    best_loss, best_epoch, best_weights = math.inf, 0, None
    trained = group.parallel(model)
    shared = [group.share_rows(module) for module in getattr(model, "row_modules", ())]

    for epoch in range(1, config.epochs + 1):
        model.train()
        if hasattr(model, "set_epoch"):
            model.set_epoch(epoch)
        order = rows[torch.randperm(len(rows), generator=shuffle)][:used].to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in order.split(config.batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(trained(*(batch_of(d, batch, device) for d in data)), targets[batch])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        logits = torch.from_numpy(predict(model, validation, config.batch_size, device, group))
        validation_loss = F.cross_entropy(logits.double(), validation_targets).item()
        history["train_loss"].append(total.item() / used)
        history["validation_loss"].append(validation_loss)
        history["validation_accuracy"].append((logits.argmax(1) == validation_targets).double().mean().item())
        if validation_loss < best_loss - config.min_improvement:
            best_loss, best_epoch = validation_loss, epoch
            best_weights = copy.deepcopy(model.state_dict())
        if best_weights is None:
            raise RuntimeError(
                f"train: the validation loss is {validation_loss} after epoch {epoch}. "
                "Look for enormous feature values, or lower `learning_rate`."
            )
        if epoch - best_epoch >= config.patience:
            break
    for unshare in shared:
        unshare()
    model.load_state_dict(best_weights)
    return history, best_epoch


def _reference_rows(train: np.ndarray, size: int, seed: int) -> np.ndarray:
    if len(train) < size:
        raise ValueError(f"train: `fold.train` must have {size} rows for the reference set; got {len(train)}.")
    return np.random.default_rng(seed).choice(np.asarray(train, dtype=np.int64), size=size, replace=False)


def batch_sensitivity(
    model: nn.Module, features: Sequence[np.ndarray | Ragged], batch_size: int = 32, orders: int = 5, seed: int = 0
) -> float:
    """Share of rows whose predicted class is not the same in every one of ``orders`` random orders of the rows.

    0 for a model whose prediction of a row does not depend on the rows that share its batch.
    """
    random, found = np.random.default_rng(seed), []
    for _ in range(orders):
        order = random.permutation(len(features[0]))
        predictions = np.empty(len(order), dtype=np.int64)
        predictions[order] = predict(
            model, [f.select(order) if isinstance(f, Ragged) else f[order] for f in features], batch_size
        ).argmax(axis=1)
        found.append(predictions)
    return float((np.stack(found) != found[0]).any(axis=0).mean())


def transport_plan(model: nn.Module, batch: Sequence[Tensor]) -> np.ndarray | None:
    """(b, b) plan of one batch, None for a model without transport."""
    plan_of = getattr(model, "plan", None)
    if plan_of is None:
        return None
    model.eval()
    with torch.no_grad():
        plan = plan_of(*batch)
    return None if plan is None or plan.dim() > 2 else plan.float().cpu().numpy()


def _check(features: Sequence[np.ndarray], labels: np.ndarray, fold: Fold) -> None:
    if not features:
        raise ValueError("train: `features` must hold at least one matrix; got none.")
    n = len(labels)
    for k, matrix in enumerate(features):
        sequences = isinstance(matrix, Ragged | StoredSequences)
        if len(matrix) != n or not (sequences or matrix.ndim in (2, 3)):
            raise ValueError(
                f"train: `features[{k}]` must be of shape (n, d) with n = {n}, one row per label; got {matrix.shape}."
            )
        for start in range(0, n, 1 << 14):
            rows = matrix[start : start + (1 << 14)]
            if sequences:
                finite = np.array([np.isfinite(row).all() for row in rows], dtype=bool)
            else:
                finite = np.isfinite(rows).all(axis=tuple(range(1, matrix.ndim)))
            if not finite.all():
                bad = start + int(np.flatnonzero(~finite)[0])
                raise ValueError(
                    f"train: `features[{k}]` must be finite; row {bad} is not. Drop it or extract it again."
                )
    if not np.issubdtype(np.asarray(labels).dtype, np.integer) or (n and np.min(labels) < 0):
        raise ValueError(
            f"train: `labels` must be integer classes from 0; got {np.asarray(labels).dtype}. "
            "Number the sorted label names."
        )
    parts = ("train", "validation", "test")
    owner = np.full(n, -1, dtype=np.int8)
    for number, part in enumerate(parts):
        indices = np.asarray(getattr(fold, part), dtype=np.int64)
        if not len(indices) and part != "test":
            raise ValueError(f"train: `fold.{part}` is empty. More speakers are needed, or fewer folds.")
        if len(indices) and (indices.min() < 0 or indices.max() >= n):
            raise ValueError(
                f"train: `fold.{part}` must be row indices from 0 to {n - 1}; "
                f"got {indices.min()} to {indices.max()}. Make the folds for these features."
            )
        if (shared := indices[owner[indices] >= 0]).size:
            raise ValueError(
                f"train: row {shared[0]} is in `fold.{parts[owner[shared[0]]]}` and in `fold.{part}`. "
                "Parts must be disjoint."
            )
        owner[indices] = number
        if np.count_nonzero(owner == number) < len(indices):
            rows, counts = np.unique(indices, return_counts=True)
            raise ValueError(f"train: row {rows[counts > 1][0]} is in `fold.{part}` twice. Name each row once.")
