"""What each change to the paper's configuration does, on the demo corpus: the tables of docs/ablation.md.

    parrot demo                                          # makes runs/demo/corpus
    python -m benchmarks.ablation run runs/demo/corpus   # trains what has no row yet
    python -m benchmarks.ablation tables                 # prints both tables

A row is one training run: its accuracy on the test speakers in the paper's batches of 32, of 8 and of single clips,
and the share of clips whose class hangs on the order of the test set.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from . import machine, rows

RESULTS = rows.RESULTS / "ablation" / "demo.jsonl"
EPOCHS, FOLDS = 15, 5
BATCHES = (32, 8, 1)


@dataclass(frozen=True)
class Variant:
    """A row of the table: a system, its encoders, and the one thing that sets it apart."""

    system: str
    change: str
    encoders: tuple[str, ...] = ("ssam-demo", "hubert-demo")

    @property
    def name(self) -> str:
        return self.system + ("" if len(self.encoders) == 2 else f", {len(self.encoders)} encoders")


THREE = ("ssam-demo", "hubert-demo", "hubert-demo#1")
VARIANTS = (
    Variant("parrot", "none: the paper"),
    Variant("concat", "no product, no transport"),
    Variant("parrot-unrolled", "gradient through the 50 iterations"),
    Variant("parrot-learned-eps", "the same, and eps learned"),
    Variant("parrot-annealed-eps", "eps from 0.5 to 0.05 over 10 epochs"),
    Variant("parrot-unbalanced", "marginals relaxed, reach 0.5"),
    Variant("parrot-reference", "in evaluation, transport among 31 stored training clips"),
    Variant("parrot-frames", "transport between the frames of each clip"),
    Variant("parrot-layers", "learned weights of the encoders' layers"),
    Variant("parrot", "hubert-demo's first layer as a third encoder, all pairs", THREE),
    Variant("parrot-first-pairs", "the same, each fused with the first only", THREE),
    Variant("parrot-finetuned", "the encoders trained too, at 1e-5"),
)


class Runs:
    """The training runs of one variant and seed; :meth:`row` is what a worker process does."""

    def __init__(self, variant: Variant, seed: int, features: Sequence[Any], labels, speakers, label_names, epochs):
        from parrot import model
        from parrot.corpora.splits import speaker_folds
        from parrot.evaluation import Task
        from parrot.training import TrainingConfig

        build = functools.partial(model.build, encoders=variant.encoders)
        folds = tuple(speaker_folds(speakers, FOLDS, seed))
        config = TrainingConfig(epochs=epochs, device="cpu")
        self.variant, self.seed = variant, seed
        self.task = Task(tuple(features), labels, len(label_names), folds, config, seed, build)

    def row(self, fold: int) -> dict[str, Any]:
        from parrot.ragged import Ragged
        from parrot.training import batch_sensitivity, predict

        model, result = self.task.fit(self.variant.system, fold)
        chosen = self.task.folds[fold].test
        test = [f.select(chosen) if isinstance(f, Ragged) else np.asarray(f)[chosen] for f in self.task.features]
        truth = self.task.labels[chosen]
        epsilon = getattr(model, "epsilon", None)
        return {
            "system": self.variant.name,
            "seed": self.seed,
            "fold": fold,
            "accuracy": {str(n): float((predict(model, test, n).argmax(1) == truth).mean()) for n in BATCHES},
            "sensitivity": batch_sensitivity(model, test),
            "epochs": len(result.history["train_loss"]),
            "best_epoch": result.best_epoch,
            "eps": None if epsilon is None else float(epsilon()),
            "seconds": round(result.seconds, 2),
        }


def measure(
    corpus_folder: Path,
    cache: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    epochs: int,
    results: Path,
) -> None:
    from parrot import corpora, encoders, model
    from parrot.commands.experiment import embed_corpus
    from parrot.features import Extraction
    from parrot.workers import run_all

    corpus = corpora.load("demo", corpus_folder)
    done = {(row["system"], row["seed"], row["fold"]) for row in (rows.load(results) if results.exists() else ())}
    context = {"commit": machine.commit(), "date": time.strftime("%Y-%m-%d"), **machine.versions()}
    for seed, variant in product(seeds, VARIANTS):
        missing = [(fold,) for fold in range(FOLDS) if (variant.name, seed, fold) not in done]
        if not missing or (names and variant.name not in names):
            continue
        kind = model.inputs_of(variant.system)
        loaded = [encoders.load(spec) for spec in variant.encoders]
        used, _, features, _ = embed_corpus(corpus, loaded, cache, Extraction(), kinds=[kind])
        speakers = [corpus.speakers[row] for row in used]
        runs = Runs(variant, seed, features[kind], corpus.targets[used], speakers, corpus.labels, epochs)
        with contextlib.closing(run_all(runs.row, missing, workers)) as finished:
            for _, row in finished:
                rows.append([{**row, **context}], results)
                print(f"{variant.name}, seed {seed}, fold {row['fold'] + 1}: {row['accuracy']['32']:.3f}", flush=True)


def by_variant(measured: Sequence[dict]) -> Iterator[tuple[Variant, list[dict]]]:
    """Each variant's rows, by seed, then by fold; a seed counts when all of its folds are there."""
    for variant in VARIANTS:
        found = {(row["seed"], row["fold"]): row for row in measured if row["system"] == variant.name}
        seeds = [seed for seed, folds in Counter(seed for seed, _ in found).items() if folds == FOLDS]
        chosen = [found[seed, fold] for seed in sorted(seeds) for fold in range(FOLDS)]
        if chosen:
            yield variant, chosen


def accuracy_table(measured: Sequence[dict]) -> list[str]:
    """One line per variant: mean and deviation over seeds and folds, the mean of each seed, p against the paper."""
    from scipy.stats import ttest_rel

    lines = ["| system | the one change | accuracy, % | each seed | p |", "| --- | --- | ---: | --- | ---: |"]
    paper: dict[tuple[int, int], float] = {}
    for variant, found in by_variant(measured):
        accuracy = {(row["seed"], row["fold"]): 100 * row["accuracy"]["32"] for row in found}
        paper = paper or accuracy
        values, both = np.array(list(accuracy.values())), accuracy.keys() & paper.keys()
        p = (
            ""
            if paper is accuracy
            else f"{ttest_rel([accuracy[k] for k in both], [paper[k] for k in both]).pvalue:.2f}"
        )
        seeds = " ".join(f"{mean:.1f}" for mean in values.reshape(-1, FOLDS).mean(1))
        lines.append(
            f"| `{variant.system}` | {variant.change} | {values.mean():.1f} ± {values.std():.1f} | {seeds} | {p} |"
        )
    return lines


def batch_table(measured: Sequence[dict]) -> list[str]:
    """One line per variant: how much its answers depend on what shares a batch with a clip."""
    lines = [
        "| system | clips whose class changes, % | batches of 32 | of 8 | of 1 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for variant, found in by_variant(measured):
        changed = 100 * np.mean([row["sensitivity"] for row in found])
        cells = " | ".join(f"{100 * np.mean([row['accuracy'][str(n)] for row in found]):.2f}" for n in BATCHES)
        lines.append(f"| `{variant.system}`{variant.name[len(variant.system) :]} | {changed:.2f} | {cells} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("corpus", type=Path, help="folder of the demo corpus")
    run.add_argument("--cache", type=Path, default=Path("runs/features"))
    run.add_argument("--systems", nargs="+", choices=[variant.name for variant in VARIANTS], default=[])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--epochs", type=int, default=EPOCHS)
    commands.add_parser("tables")
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        measure(
            arguments.corpus,
            arguments.cache,
            arguments.systems,
            arguments.seeds,
            arguments.workers,
            arguments.epochs,
            arguments.results,
        )
    else:
        measured = rows.load(arguments.results)
        print("\n".join([*accuracy_table(measured), "", *batch_table(measured)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
