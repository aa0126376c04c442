"""The training protocol, against a plain loop written from its description."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from parrot.model import build
from parrot.training import (
    TrainingConfig,
    batch_sensitivity,
    predict,
    train,
)

CLASSES = 3


class TwoStream(nn.Module):
    """A small pair classifier that notes the batches it sees."""

    def __init__(self, dims=(4, 3), dropout=0.0):
        super().__init__()
        self.hidden = nn.Linear(sum(dims), 16)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(16, CLASSES)
        self.batches: list[tuple[bool, int]] = []

    def forward(self, a, b):
        self.batches.append((self.training, len(a)))
        return self.out(self.dropout(torch.relu(self.hidden(torch.cat([a, b], dim=1)))))

    def plan(self, a, b):
        return torch.softmax(a @ a.T, dim=1)


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    return TwoStream(**options)


def make_data(n=120, seed=0, noise=0.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    features = [
        (rng.standard_normal((CLASSES, d))[labels] * 2 + noise * rng.standard_normal((n, d))).astype(np.float32)
        for d in (4, 3)
    ]
    return features, labels.astype(np.int64)


def make_fold(train=70, validation=20, test=30):
    rows = np.arange(train + validation + test)
    return SimpleNamespace(
        index=0, train=rows[:train], validation=rows[train : train + validation], test=rows[train + validation :]
    )


def test_agrees_with_a_plain_loop():
    features, labels = make_data(noise=3.0)
    fold = make_fold()
    config = TrainingConfig(epochs=6, patience=6)
    model = make_model()
    result = train(model, features, labels, fold, config, seed=5)

    plain = make_model()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    x, y = [torch.from_numpy(f) for f in features], torch.from_numpy(labels)
    history = []
    for _ in range(6):
        order = torch.from_numpy(fold.train)[torch.randperm(70, generator=generator)]
        for start in (0, 32):
            batch = order[start : start + 32]
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(*(t[batch] for t in x)), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            held_out = plain(*(t[fold.validation] for t in x))
            history.append(nn.functional.cross_entropy(held_out, y[fold.validation]).item())
    assert result.history["validation_loss"] == pytest.approx(history, abs=1e-5)
    assert result.best_epoch == 1 + int(np.argmin(history))
    assert len(result.history["train_loss"]) == len(result.history["validation_accuracy"]) == 6


def test_learns_what_can_be_learnt():
    features, labels = make_data()
    fold = make_fold()
    model = make_model()
    result = train(model, features, labels, fold, TrainingConfig(epochs=50, learning_rate=1e-2))
    assert (result.predictions == labels[fold.test]).mean() > 0.9
    assert result.history["train_loss"][-1] < 0.3 * result.history["train_loss"][0]
    assert result.test_logits.shape == (30, CLASSES)
    assert result.test_logits.dtype == np.float32


@pytest.mark.parametrize(("n_train", "sizes"), [(20, [20]), (32, [32]), (33, [32]), (70, [32, 32])])
def test_last_incomplete_training_batch_is_dropped_above_one_batch(n_train, sizes):
    features, labels = make_data()
    model = make_model()
    train(model, features, labels, make_fold(train=n_train, validation=10, test=10), TrainingConfig(epochs=1))
    assert [size for training, size in model.batches if training] == sizes


def test_evaluation_keeps_order_and_the_last_small_batch():
    features, _ = make_data(n=70)
    model = make_model()
    logits = predict(model, features)
    assert [size for _, size in model.batches] == [32, 32, 6]
    with torch.no_grad():
        want = model(*(torch.from_numpy(f) for f in features)).numpy()
    np.testing.assert_allclose(logits, want, atol=1e-5)


def test_same_seed_same_digits_whatever_the_global_state():
    features, labels = make_data(noise=3.0)

    def run(seed):
        model = make_model(dropout=0.3)
        return train(model, features, labels, make_fold(), TrainingConfig(epochs=4), seed=seed), model

    first, first_model = run(seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        model = TwoStream(dropout=0.3)
        model.load_state_dict(make_model(dropout=0.3).state_dict())
        torch.set_rng_state(before)
        second = train(model, features, labels, make_fold(), TrainingConfig(epochs=4), seed=1)
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)
    assert first.history == second.history
    assert np.array_equal(first.test_logits, second.test_logits)
    assert all(torch.equal(a, b) for a, b in zip(first_model.parameters(), model.parameters(), strict=True))
    assert run(seed=2)[0].history != first.history


def test_patience_and_best_weights():
    features, labels = make_data()
    fold = make_fold()
    labels[fold.validation] = (labels[fold.validation] + 1) % CLASSES  # the better trained, the worse validated
    config = TrainingConfig(epochs=50, patience=3, learning_rate=1e-2)
    model = make_model()
    result = train(model, features, labels, fold, config)
    losses = result.history["validation_loss"]
    assert result.best_epoch == 1 + int(np.argmin(losses))
    assert len(losses) == result.best_epoch + 3

    best = make_model()
    train(best, features, labels, fold, TrainingConfig(epochs=result.best_epoch, patience=3, learning_rate=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), best.parameters(), strict=True))


def test_a_tiny_gain_is_no_improvement():
    features, labels = make_data()
    result = train(
        make_model(), features, labels, make_fold(), TrainingConfig(epochs=50, patience=4, learning_rate=1e-10)
    )
    assert result.best_epoch == 1
    assert len(result.history["validation_loss"]) == 5


def test_plan_of_the_first_test_batch():
    features, labels = make_data()
    fold = make_fold(train=60, validation=20, test=40)
    model = make_model()
    result = train(model, features, labels, fold, TrainingConfig(epochs=1))
    a = torch.from_numpy(features[0][fold.test[:32]])
    np.testing.assert_allclose(result.plan, torch.softmax(a @ a.T, dim=1).numpy(), atol=1e-6)


def test_empty_test_part_is_allowed():
    features, labels = make_data()
    result = train(
        make_model(), features, labels, make_fold(train=100, validation=20, test=0), TrainingConfig(epochs=1)
    )
    assert len(result.test_logits) == 0
    assert result.plan is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`epochs` must be an integer of at least 1; got 0"),
        ({"batch_size": 2.5}, "`batch_size` must be an integer"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive"),
        ({"learning_rate": math.inf}, "`learning_rate` must be positive and finite"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


def test_bad_device():
    with pytest.raises(ValueError, match="`device` must be auto, cpu or cuda"):
        TrainingConfig(device="abacus").resolved_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="no CUDA device is visible"):
        TrainingConfig(device="cuda").resolved_device()


def test_bad_data_is_named():
    features, labels = make_data()
    fold = make_fold()

    def fails(message, f=features, y=labels, parts=fold):
        with pytest.raises(ValueError, match=message):
            train(make_model(), f, y, parts, TrainingConfig(epochs=1))

    fails("at least one matrix", f=[])
    fails(r"`features\[1\]` must be of shape", f=[features[0], features[1][:-1]])
    spoilt = features[1].copy()
    spoilt[7, 0] = np.nan
    fails("row 7 is not", f=[features[0], spoilt])
    fails("`labels` must be integer classes", y=labels.astype(float))
    fails("`fold.validation` is empty", parts=make_fold(train=100, validation=0, test=20))
    fails("`fold.test` must be row indices from 0 to 119", parts=make_fold(test=31))
    shared = make_fold()
    shared.test = shared.test.copy()
    shared.test[0] = 3
    fails("row 3 is in `fold.train` and in `fold.test`", parts=shared)
    twice = make_fold()
    twice.train = twice.train.copy()
    twice.train[4] = 5
    fails("row 5 is in `fold.train` twice", parts=twice)


def test_a_diverged_run_says_so():
    features, labels = make_data()
    model = make_model()
    nn.init.constant_(model.out.bias, math.nan)
    with pytest.raises(RuntimeError, match="validation loss is nan after epoch 1"):
        train(model, features, labels, make_fold())


def test_the_reference_set_is_of_training_rows_and_frees_from_the_batch():
    features, labels = make_data()
    features = [np.tile(f, (1, 3)) for f in features]
    fold, config = make_fold(), TrainingConfig(epochs=2, device="cpu")
    torch.manual_seed(0)
    model, paper = build("parrot-reference", (12, 9), CLASSES), build("parrot", (12, 9), CLASSES)
    result = train(model, features, labels, fold, config, seed=3)
    rows = {row.tobytes() for row in features[0][fold.train]}
    assert all(row.tobytes() in rows for row in model.reference_0.numpy())
    assert result.plan is None
    one_by_one = predict(model, [f[fold.test] for f in features], batch_size=1)
    assert np.abs(one_by_one - result.test_logits).max() < 1e-4
    again = build("parrot-reference", (12, 9), CLASSES)
    again.load_state_dict(model.state_dict())
    assert batch_sensitivity(again, features) == 0.0
    train(paper, features, labels, fold, config, seed=3)
    assert 0.0 < batch_sensitivity(paper, features) < 1.0
    with pytest.raises(ValueError, match="must have 31 rows for the reference set; got 20"):
        train(build("parrot-reference", (12, 9), CLASSES), features, labels, make_fold(train=20), config)
