"""Features, folds, training, report, model: what ``parrot demo`` and ``parrot train`` share."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import extraction, load_encoders

if TYPE_CHECKING:
    import numpy as np

    from parrot.corpora import Corpus
    from parrot.distributed import Group
    from parrot.encoders import Encoder
    from parrot.evaluation import CrossValidation
    from parrot.features import Extraction
    from parrot.ragged import Ragged
    from parrot.report import EncoderFacts, Experiment
    from parrot.store import StoredRows
    from parrot.training import TrainingConfig

IN_MEMORY = 1 << 30  # bytes: larger features stay on disk while models are trained


def run_experiment(
    corpus: Corpus, args: argparse.Namespace, config: TrainingConfig, *, synthetic: bool, started: float
) -> None:
    """Features, folds, training, report, model: what demo and train share."""
    from parrot import distributed, evaluation, model, report, sharing
    from parrot.card import run_card
    from parrot.corpora.splits import assert_no_leakage_in, name_copies, speaker_folds
    from parrot.files import write_atomically

    group = distributed.join(args.device)
    encoders = load_encoders(args.encoders, args.download, args.device)
    systems = _systems(args.systems, encoders, len(corpus.labels))
    build = functools.partial(model.build, encoders=tuple(args.encoders))
    final = args.final or ("parrot" if "parrot" in systems else systems[-1])
    if final not in systems:
        raise ValueError(f"--final must be one of the systems trained ({', '.join(systems)}); got {final!r}.")
    speaker_folds(corpus.speakers, args.folds)  # says at once if there are too few speakers

    kinds = list(dict.fromkeys(model.inputs_of(system) for system in systems))
    rows, hashes, features, failures = embed_corpus(corpus, encoders, args.cache, extraction(args), group, kinds)
    speakers = [corpus.speakers[row] for row in rows]
    labels = corpus.targets[rows]
    folds = speaker_folds(speakers, args.folds, args.seed)
    final_fold = evaluation.final_fold(speakers, args.folds, args.seed)
    files = [corpus.utterances[row].path.name for row in rows]
    groups = {"speaker": speakers, "recording": name_copies(hashes, files)}
    assert_no_leakage_in([final_fold], groups)
    results = evaluation.cross_validate(
        systems, features, labels, folds, corpus.labels, config=config, seed=args.seed, workers=args.workers,
        store=args.output / "results", groups=groups, group=group, progress=group.main, build=build,
    )  # fmt: skip
    experiment = report.Experiment(
        "the spoken demo corpus" if synthetic else corpus.name, len(rows), len(set(speakers)), synthetic,
        encoder_facts(args.encoders, encoders), failures,
    )  # fmt: skip
    path = report.write(results, args.output, experiment) if group.main else None
    folder = evaluation.train_final(
        final, features, labels, final_fold, corpus.labels,
        args.output / "model", _origin(experiment), config=config, seed=args.seed, group=group, build=build,
    )  # fmt: skip
    if not group.main:
        return
    card = run_card(sharing.read_config(folder)["description"], results, experiment)
    write_atomically(folder / sharing.CARD, card.encode())
    _print_table(results, experiment)
    total = sum(len(folds) for folds in results.systems.values())
    print(
        f"Trained  {total - results.reused} runs, reused {results.reused}; {time.perf_counter() - started:.0f} s in all"
    )
    print(f"Report   {path}")
    print(f"Model    {folder} ({experiment.title(final)}, trained on all speakers)")


def _is_random(spec: str) -> bool:
    return spec.partition("#")[0].endswith("-demo")  # whichever layer is taken


def encoder_facts(specs: Sequence[str], encoders: Sequence[Encoder]) -> tuple[EncoderFacts, ...]:
    from parrot.report import EncoderFacts

    return tuple(
        EncoderFacts(
            spec,
            encoder.name,
            encoder.embedding_dim,
            encoder.fingerprint,
            random=_is_random(spec),
            sample_rate=encoder.sample_rate,
            normalisation=encoder.normalisation,
        )
        for spec, encoder in zip(specs, encoders, strict=True)
    )


def _systems(names: Sequence[str] | None, encoders: Sequence[Encoder], n_classes: int) -> list[str]:
    """The systems to train, each known to build."""
    import torch

    from parrot import model

    if names is None:
        names = [f"{head}-{k}" for head in model.HEADS for k in range(len(encoders))]
        names += model.FUSIONS if len(encoders) > 1 else ()
    with torch.device("meta"):
        for name in names:
            dims = [(e.n_layers + 1, e.embedding_dim) if name == "parrot-layers" else e.embedding_dim for e in encoders]
            # Encoders are not built on the meta device; what is put on them is PARROT.
            model.build("parrot" if name == "parrot-finetuned" else name, dims, n_classes)
    return list(dict.fromkeys(names))


def embed_corpus(
    corpus: Corpus,
    encoders: Sequence[Encoder],
    cache: Path,
    how: Extraction,
    group: Group | None = None,
    kinds: Sequence[str] = ("embeddings",),
) -> tuple[np.ndarray, list[str], dict[str, list[np.ndarray | StoredRows | Ragged]], tuple[tuple[str, str], ...]]:
    """The utterances that all encoders could embed, their files' hashes, features by kind; (file, reason) of others.

    Features are in memory where they are small, else on disk. Layers, and waveforms, a kind too, are always in memory;
    waveforms are those of the utterances of which there are embeddings.
    """
    import numpy as np

    from parrot import features
    from parrot.corpora.audio import load_waveform
    from parrot.ragged import Ragged

    progress = group is None or group.main
    stored = [kind for kind in kinds if kind != "waveforms"] or ["embeddings"]
    tables = {
        kind: [features.extract(corpus, e, cache, progress, how=how, group=group, kind=kind) for e in encoders]
        for kind in stored
    }
    every = [table for found in tables.values() for table in found]
    rows = every[0].indices
    for table in every[1:]:
        rows = np.intersect1d(rows, table.indices)
    failures = {path: reason for table in every for path, reason in table.failures}
    chosen = {
        kind: [table.rows.select(np.searchsorted(table.indices, rows)) for table in found]
        for kind, found in tables.items()
    }
    hashes = [key.tobytes().hex() for key in chosen[stored[0]][0].keys]

    def held(kind: str, values: StoredRows) -> np.ndarray | StoredRows | Ragged:
        if kind == "layers":  # as many for every clip
            return np.stack(values[:])
        if values.nbytes > IN_MEMORY:
            return values
        return Ragged.join(values[:]) if kind == "frames" else np.asarray(values)

    found = {kind: [held(kind, values) for values in of_kind] for kind, of_kind in chosen.items()}
    if "waveforms" in kinds:
        paths = [corpus.utterances[row].path for row in rows]
        found["waveforms"] = [
            Ragged.join(load_waveform(path, e.sample_rate, e.min_samples) for path in paths) for e in encoders
        ]
    return rows, hashes, found, tuple((path.name, reason) for path, reason in sorted(failures.items()))


def _origin(experiment: Experiment) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "corpus": experiment.corpus,
        "synthetic": experiment.synthetic,
        "encoders": [asdict(encoder) for encoder in experiment.encoders],
    }


def _print_table(results: CrossValidation, experiment: Experiment) -> None:
    from rich.console import Console
    from rich.table import Table

    from parrot import report

    table = Table()
    table.add_column("system")
    for title in report.METRIC_TITLES.values():
        table.add_column(title, justify="right", no_wrap=True)
    for system, entry in results.summary().items():
        style = "bold" if system == "parrot" else None
        table.add_row(experiment.title(system), *(report.percent(entry[m]) for m in report.METRIC_TITLES), style=style)
    notes = []
    if experiment.synthetic:
        notes.append("The corpus is synthetic: the figures show that everything works, no more.")
    if any(encoder.random for encoder in experiment.encoders):
        notes.append("The encoders are random, not pretrained.")
    print(
        f"\n{experiment.utterances} utterances of {experiment.speakers} speakers, {len(results.fold_sizes)} "
        f"speaker-disjoint folds; per cent, mean ± deviation over folds; chance is {100 * report.chance(results):.1f}"
    )
    Console().print(table)
    print("\n".join(notes) + "\n" if notes else "")
