"""A reproduction on made-up features, small enough to be killed and resumed many times.

As a program, ``python reproduce_small.py FOLDER JOBS``, it runs table 2 and writes everything to FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from parrot import reproduce, reproduce_report
from parrot.report import EncoderFacts
from parrot.training import TrainingConfig

DIMS = {"audio-mamba-base": 16, "wav2vec2": 12, "mms": 8}
SEEDS, FOLDS = 2, 3
RUNS = 3 * 4 * SEEDS * FOLDS  # three pairs in four fusions


def streams():
    return [
        reproduce.Stream(name, name.startswith("audio-mamba"), EncoderFacts(f"{name}-spec", name, dim, "f" * 64, False))
        for name, dim in DIMS.items()
    ]


def corpus(name="crema-d", seed=0):
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(3), 48)
    features = {
        encoder: (rng.standard_normal((3, dim))[labels] + rng.standard_normal((len(labels), dim))).astype(np.float32)
        for encoder, dim in DIMS.items()
    }
    speakers = tuple(f"s{k // 16}" for k in range(len(labels)))
    return reproduce.CorpusData(name, features, labels, speakers, ("anger", "neutral", "sad"))


def run(folder, jobs=1, table="table2", corpora=None, **options):
    options = {"seeds": SEEDS, "folds": FOLDS, "config": TrainingConfig(epochs=3, device="cpu"), **options}
    result = reproduce.run(
        table, corpora or [corpus()], options.pop("streams", streams()), Path(folder) / "results", jobs=jobs,
        progress=False, **options,
    )  # fmt: skip
    reproduce_report.write(result, folder)
    return result


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
