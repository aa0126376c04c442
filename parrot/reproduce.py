"""The paper's experiments: every row of its tables on given corpora and encoders, over folds and seeds.

Table 1 has each encoder alone, with a fully connected and with a convolutional head. Table 2 has each pair, of two
attention encoders (homogeneous) or of a Mamba and an attention encoder (heterogeneous), in the four fusions.

Each (corpus, row, seed, fold) is one training run of its own seed on one CPU thread. Its result is one small JSON
file, named by a key made of all that determines it and written whole or not at all: a run that was killed goes on
where it stopped, and neither that nor the number of processes changes a byte of the tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from parrot import published
from parrot.corpora.splits import Fold, assert_no_leakage_in, check_classes_in, speaker_folds, stratified_folds
from parrot.evaluation import Task, metrics, model_digest
from parrot.files import write_atomically
from parrot.model import build
from parrot.training import TrainingConfig
from parrot.workers import run_all, usable_cores

if TYPE_CHECKING:
    from parrot.report import EncoderFacts

FORMAT = 1  # of the stored results; raise it when a change to training makes them out of date
SYSTEMS = {"table1": ("fcn", "cnn"), "table2": ("concat", "hadamard", "ot", "parrot")}
TITLES = {
    "fcn": "FCN",
    "cnn": "CNN",
    "concat": "Concatenation",
    "hadamard": "Hadamard product",
    "ot": "Optimal transport",
    "parrot": "PARROT",
}
LOCK_SECONDS = 10  # to wait for another run of the same folder to end
SPLITS = ("speaker", "stratified")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._#-]*")


@dataclass(frozen=True)
class Stream:
    """An encoder in the tables: ``name`` is a key of :data:`parrot.published.ENCODERS` or one of its own."""

    name: str
    mamba: bool
    facts: EncoderFacts

    @property
    def title(self) -> str:
        known = published.ENCODERS.get(self.name)
        return known.title if known else self.name


@dataclass(frozen=True)
class Row:
    """A row of a table: a system on one encoder or on two."""

    encoders: tuple[str, ...]
    system: str
    kind: str  # "single", "homogeneous" or "heterogeneous"


@dataclass(frozen=True)
class CorpusData:
    """What the rows are trained on: the utterances of one corpus that all encoders could embed.

    Attributes:
        name: of the corpus; its published figures are found by it.
        features: encoder name -> (n, d) float32, rows aligned.
        labels: (n,) classes, indices into ``label_names``.
        speakers: (n,) names.
        label_names: names of the classes.
        failures: (file name, reason) of utterances that could not be used.
        recordings: (n,) names, equal for copies of one recording; without them embeddings tell copies.
    """

    name: str
    features: dict[str, np.ndarray]
    labels: np.ndarray
    speakers: tuple[str, ...]
    label_names: tuple[str, ...]
    failures: tuple[tuple[str, str], ...] = ()
    recordings: tuple[str, ...] | None = None

    @property
    def synthetic(self) -> bool:
        return self.name == "demo"

    @property
    def title(self) -> str:
        return published.CORPORA.get(self.name, "the spoken demo corpus" if self.synthetic else self.name)


@dataclass(frozen=True)
class Job:
    """One training run."""

    corpus: str
    row: Row
    seed: int
    fold: int


@dataclass(frozen=True)
class Result:
    """All runs of a table; ``runs[corpus, row]`` are their records, by seed, then by fold."""

    table: str
    corpora: tuple[CorpusData, ...]
    streams: tuple[Stream, ...]
    rows: tuple[Row, ...]
    seeds: int
    folds: int
    split: str
    config: TrainingConfig
    runs: dict[tuple[str, Row], list[dict[str, Any]]]
    reused: int

    def values(self, corpus: str, row: Row, metric: str) -> np.ndarray:
        """(seeds, folds) values of a metric, in per cent."""
        found = [100 * run["metrics"][metric] for run in self.runs[corpus, row]]
        return np.array(found).reshape(self.seeds, self.folds)


def rows_of(table: str, streams: Sequence[Stream]) -> tuple[Row, ...]:
    """The rows of a table that these encoders make: in a pair the Mamba encoder first, homogeneous pairs first.

    Raises:
        ValueError: an unknown table, two encoders of one name, or encoders that make no row.
    """
    if table not in SYSTEMS:
        raise ValueError(f"reproduce: the table must be one of {', '.join(SYSTEMS)}; got {table!r}.")
    names = [stream.name for stream in streams]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"reproduce: an encoder's name is of letters, digits, '.', '_', '#' and '-'; got {name!r}."
            )
        if names.count(name) > 1:
            raise ValueError(f"reproduce: two encoders are called {name!r}. Name one of them: --encoders NAME=SPEC.")
    if table == "table1":
        groups = [((stream.name,), "single") for stream in streams]
    else:
        pairs = [sorted(pair, key=lambda stream: not stream.mamba) for pair in combinations(streams, 2)]
        groups = [
            ((first.name, second.name), "heterogeneous" if first.mamba else "homogeneous")
            for first, second in pairs
            if not second.mamba  # the paper pairs no two Mamba encoders
        ]
        groups.sort(key=lambda group: group[1], reverse=True)
    if not groups:
        raise ValueError(
            f"reproduce: {table} needs {'an encoder' if table == 'table1' else 'two, at least one of attention'}; "
            f"got {', '.join(names) or 'none'}."
        )
    return tuple(Row(encoders, system, kind) for encoders, kind in groups for system in SYSTEMS[table])


class Experiments:
    """What the training runs share; :meth:`run` is what a worker process does."""

    def __init__(
        self,
        corpora: Sequence[CorpusData],
        rows: Sequence[Row],
        seeds: int,
        n_folds: int,
        config: TrainingConfig,
        split: str = "speaker",
    ) -> None:
        self._tasks: dict[tuple[str, tuple[str, ...], int], Task] = {}
        self._initial: dict[tuple, str] = {}
        for corpus in corpora:
            for seed in range(seeds):
                folds = _folds(corpus, split, n_folds, seed)
                for encoders in dict.fromkeys(row.encoders for row in rows):
                    features = tuple(corpus.features[name] for name in encoders)
                    self._tasks[corpus.name, encoders, seed] = Task(
                        features, corpus.labels, len(corpus.label_names), folds, config, seed, build
                    )
        self.jobs = [
            Job(corpus.name, row, seed, fold)
            for corpus in corpora
            for row in rows
            for seed in range(seeds)
            for fold in range(n_folds)
        ]

    def task(self, job: Job) -> Task:
        return self._tasks[job.corpus, job.row.encoders, job.seed]

    def run(self, job: Job) -> dict[str, Any]:
        """Train and test; the record holds nothing that another run of the same job would not find again."""
        task = self.task(job)
        result = task.result(_system(job.row), job.fold)
        return {
            "corpus": job.corpus,
            "encoders": list(job.row.encoders),
            "system": job.row.system,
            "seed": job.seed,
            "fold": job.fold,
            "metrics": metrics(task.labels[task.folds[job.fold].test], result.predictions),
            "best_epoch": result.best_epoch,
            "epochs": len(result.history["train_loss"]),
            "predictions": result.predictions.tolist(),
        }

    def key(self, job: Job) -> str:
        """Hash of all that determines the result."""
        task, system = self.task(job), _system(job.row)
        kind = (tuple(f.shape[1] for f in task.features), task.n_classes, system)
        if kind not in self._initial:  # other seeds' models differ by their seeds only, which the key holds
            self._initial[kind] = model_digest(replace(task, seed=0).model(system, 0))
        return task.key(system, job.fold, f"{FORMAT}:{self._initial[kind]}")

    def size(self, job: Job) -> int:
        """Parameters of the job's model, a measure of its time."""
        task = self.task(job)
        with torch.device("meta"):
            model = build(_system(job.row), [f.shape[1] for f in task.features], task.n_classes)
        return sum(p.numel() for p in model.parameters())


def _folds(corpus: CorpusData, split: str, n_folds: int, seed: int) -> tuple[Fold, ...]:
    if split == "speaker":
        n_speakers = len(set(corpus.speakers))
        if n_speakers < n_folds:
            raise ValueError(
                f"reproduce: {corpus.title} tells {n_speakers} speakers apart, too few for {n_folds} speaker-disjoint "
                "folds. Ask for fewer folds, or for the split 'stratified', which has speakers on both sides."
            )
        folds, groups = speaker_folds(corpus.speakers, n_folds, seed), {"speaker": corpus.speakers}
    else:
        folds, groups = stratified_folds(corpus.labels, n_folds, seed, together=_embeddings(corpus)), {}
    assert_no_leakage_in(folds, {**groups, "recording": corpus.recordings or _embeddings(corpus)})
    check_classes_in(folds, corpus.labels, corpus.label_names)
    return tuple(folds)


def _embeddings(corpus: CorpusData) -> list[str]:
    """Hashes of the first encoder's embeddings: copies of one recording have one."""
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in next(iter(corpus.features.values()))]


def _system(row: Row) -> str:
    return f"{row.system}-0" if row.kind == "single" else row.system


def run(
    table: str,
    corpora: Sequence[CorpusData],
    streams: Sequence[Stream],
    store: str | Path,
    *,
    seeds: int = 3,
    folds: int = 5,
    split: str = "speaker",
    jobs: int | None = None,
    config: TrainingConfig | None = None,
    progress: bool = True,
) -> Result:
    """Train every row of a table on every corpus.

    Args:
        table: "table1" or "table2".
        corpora: see :class:`CorpusData`; their features hold every stream.
        streams: the encoders.
        store: folder of finished runs; what is there is not run again.
        seeds: number of repetitions; repetition s has folds of seed s, and fold k of it trains from 100 s + k.
        folds: number of folds.
        split: "speaker", the authors' procedure (no speaker on two sides), or "stratified" (by label alone).
        jobs: processes, each of one thread; by default one per CPU core on the CPU, 1 on a GPU.
        config: the training protocol; the paper's by default.
        progress: show a progress bar.

    Raises:
        ValueError: bad arguments, too few speakers or classes, a recording on two sides of a fold, or bad data.
        RuntimeError: another run uses ``store``, or a worker died.
    """
    if seeds < 1 or (jobs is not None and jobs < 1):
        raise ValueError(f"reproduce: `seeds` and `jobs` must be 1 or more; got {seeds} and {jobs}.")
    if len({corpus.name for corpus in corpora}) < len(corpora) or not corpora:
        raise ValueError(f"reproduce: wanted different corpora, at least one; got {[c.name for c in corpora]}.")
    if split not in SPLITS:
        raise ValueError(f"reproduce: `split` must be one of {', '.join(SPLITS)}; got {split!r}.")
    config, store = config or TrainingConfig(), Path(store)
    rows = rows_of(table, streams)
    experiments = Experiments(corpora, rows, seeds, folds, config, split)
    if jobs is None:
        jobs = usable_cores() if config.resolved_device().type == "cpu" else 1
    with _locked(store):
        paths = {job: store / _file_name(job, experiments.key(job)) for job in experiments.jobs}
        records = {job: record for job, path in paths.items() if (record := _load(path)) is not None}
        reused = len(records)
        sizes = {row: experiments.size(Job(corpora[0].name, row, 0, 0)) for row in rows}
        missing = [job for job in experiments.jobs if job not in records]
        missing.sort(key=lambda job: -sizes[job.row])  # the longest first: no process works alone at the end
        with contextlib.closing(run_all(experiments.run, [(job,) for job in missing], jobs)) as finished:
            for (job,), record in _progress(finished, len(paths), reused, progress):
                records[job] = record
                write_atomically(paths[job], (json.dumps(record, sort_keys=True) + "\n").encode())
    runs: dict[tuple[str, Row], list[dict[str, Any]]] = {}
    for job in experiments.jobs:
        runs.setdefault((job.corpus, job.row), []).append(records[job])
    return Result(table, tuple(corpora), tuple(streams), rows, seeds, folds, split, config, runs, reused)


def paired_test(ours: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """Mean difference ``ours - other`` over paired values, p of the paired t test and of Wilcoxon's signed ranks.

    Both tests are two-sided; with no difference anywhere p is 1, with fewer than two pairs there is none.
    """
    from scipy.stats import ttest_rel, wilcoxon

    ours, other = np.ravel(ours), np.ravel(other)
    difference = ours - other
    facts: dict[str, float | None] = {"difference": float(difference.mean()), "t_test": None, "wilcoxon": None}
    if len(difference) < 2:
        return facts
    if np.ptp(difference) == 0:  # the statistic of the t test is 0/0, or infinite
        facts["t_test"] = 1.0 if difference[0] == 0 else 0.0
    else:
        facts["t_test"] = float(ttest_rel(ours, other).pvalue)
    facts["wilcoxon"] = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    return facts


def _file_name(job: Job, key: str) -> str:
    return f"{job.corpus}_{'+'.join(job.row.encoders)}_{job.row.system}_seed{job.seed}_fold{job.fold}_{key[:20]}.json"


def _load(path: Path) -> dict[str, Any] | None:
    """A finished run; None if there is none, or none that can be read (it is then run again)."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "metrics" in record else None


@contextlib.contextmanager
def _locked(store: Path):
    store.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(store / "lock", timeout=LOCK_SECONDS):  # the system frees it when its holder is killed
            for stale in store.glob(".*.tmp"):
                stale.unlink()
            yield
    except Timeout:
        raise RuntimeError(f"reproduce: another run uses {store}. Wait for it, or name another folder.") from None


def _progress(finished, total: int, done: int, show: bool):
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc="Training", unit="run", disable=not show) as bar:
        for (job,), record in finished:
            bar.set_postfix_str(f"{job.corpus}, {'+'.join(job.row.encoders)}, {job.row.system}, fold {job.fold + 1}")
            bar.update()
            yield (job,), record
