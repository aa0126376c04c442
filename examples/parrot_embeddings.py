"""PARROT on two embeddings of each utterance. These are synthetic: use `parrot.features.extract` for your own."""

from __future__ import annotations

import numpy as np
import torch

from parrot import Parrot, ParrotConfig
from parrot.corpora.splits import speaker_folds
from parrot.evaluation import metrics
from parrot.training import TrainingConfig, train

random = np.random.default_rng(0)
labels = np.tile(np.arange(4), 100)
speakers = [f"speaker-{i // 40}" for i in range(400)]
centres = random.standard_normal((4, 64))
first = (centres[labels] + 2 * random.standard_normal((400, 64))).astype(np.float32)
second = (centres[labels, :48] + 2 * random.standard_normal((400, 48))).astype(np.float32)

fold = speaker_folds(speakers)[0]  # no speaker on two sides
for transport in ("batch", "reference"):
    torch.manual_seed(0)
    model = Parrot(dims=(64, 48), n_classes=4, config=ParrotConfig(transport=transport))
    result = train(model, (first, second), labels, fold, TrainingConfig(epochs=5), seed=0)
    scores = metrics(labels[fold.test], result.predictions)
    print(f"transport={transport!r}: best epoch {result.best_epoch}, accuracy {scores['wa']:.2f} (chance 0.25)")
