"""Transport between the frames of an utterance: a plain transcription, gradients, independence of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import make_fold

from parrot.frames import FrameParrot
from parrot.model import Parrot, ParrotConfig, build
from parrot.ragged import Ragged
from parrot.training import TrainingConfig, batch_sensitivity, predict, train

DIMS, CLASSES = (6, 5), 3
LENGTHS = ((4, 7, 1), (5, 2, 3))
SMALL = {"projection": 4, "hidden": 8, "transport": "frames", "gradient": "unrolled"}


def small(fusion: str = "parrot", **options) -> FrameParrot:
    torch.manual_seed(0)
    return FrameParrot(DIMS, CLASSES, ParrotConfig(fusion=fusion, **{**SMALL, **options})).eval()


def utterances(dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three of each encoder; what lies past an end is not a number."""
    features = []
    for dim, lengths in zip(DIMS, LENGTHS, strict=True):
        frames = torch.randn(3, max(lengths), dim, dtype=dtype)
        for row, length in zip(frames, lengths, strict=True):
            row[length:] = math.nan
        features.append((frames, torch.tensor(lengths)))
    return features


def transcribed(model: FrameParrot, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Logits of one utterance (T_1, d_1), (T_2, d_2), written from the class's formulas; differentiable."""
    weights = dict(model.named_parameters())

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x, y = linear("streams.0", x), linear("streams.1", y)
    n, m, eps = len(x), len(y), 0.05
    cost = ((x[:, None] - y[None]).square().sum(-1) + 1e-300).sqrt()
    cost = cost / cost.max().detach()
    g = cost.new_zeros(m)
    for _ in range(50):
        f = eps * (-math.log(n) - torch.logsumexp((g[None] - cost) / eps, 1))
        g = eps * (-math.log(m) - torch.logsumexp((f[:, None] - cost) / eps, 0))
    plan = torch.exp((f[:, None] + g[None] - cost) / eps)
    to_x, to_y = n * plan @ y, m * plan.T @ x
    rows = ([to_x, x], [to_y, y])
    if model.config.fusion == "parrot":
        rows = ([x * to_x, to_x, x], [y * to_y, to_y, y])
    means = [linear(f"hidden.{k}.0", torch.cat(row, 1)).relu().mean(0) for k, row in enumerate(rows)]
    return linear("classifier.1", torch.cat(means))


@pytest.mark.parametrize("fusion", ["parrot", "ot"])
def test_logits_and_gradients_are_the_transcriptions(fusion):
    model, features = small(fusion).double(), utterances()
    logits = model(*features)
    clips = [[frames[k, :n] for k, n in enumerate(lengths)] for frames, lengths in features]
    want = torch.stack([transcribed(model, x, y) for x, y in zip(*clips, strict=True)])
    assert (logits - want).abs().max() <= 1e-9
    labels = torch.tensor([0, 1, 2])
    got = torch.autograd.grad(F.cross_entropy(logits, labels), model.parameters())
    wanted = torch.autograd.grad(F.cross_entropy(want, labels), model.parameters())
    for (name, _), g, w in zip(model.named_parameters(), got, wanted, strict=True):
        assert (g - w).abs().max() <= 1e-8, name


def test_gradcheck_through_the_plan():
    model, (x, y) = (
        small().double(),
        [torch.randn(2, n, dim, dtype=torch.float64) for n, dim in zip((3, 4), DIMS, strict=True)],
    )
    lengths = torch.tensor([2, 3]), torch.tensor([4, 1])

    def logits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model((x, lengths[0]), (y, lengths[1]))

    # the largest cost of a problem is a constant to the gradient, so finite differences need a cost that is not scaled
    model.transport.options["cost_scale"] = 3.0
    assert torch.autograd.gradcheck(logits, (x.requires_grad_(), y.requires_grad_()), atol=1e-6)
    grad = torch.autograd.grad(logits(x, y).sum(), x)[0]
    assert (grad[0, 2:] == 0).all()
    assert (grad[0, :2] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_utterance_does_not_see_its_batch_or_its_padding(dtype):
    torch.manual_seed(0)
    model = build("parrot-frames", (33, 17), 5).to(dtype).eval()
    lengths = [torch.randint(1, 60, (9,)) for _ in range(2)]
    features = [
        (torch.randn(9, int(n.max()) + 3, dim, dtype=dtype), n) for n, dim in zip(lengths, (33, 17), strict=True)
    ]
    logits = model(*features)
    order = torch.randperm(9)
    assert torch.equal(model(*((frames[order], n[order]) for frames, n in features)), logits[order])
    for k in range(9):
        assert torch.equal(model(*(frames[k : k + 1, : n[k]] for frames, n in features))[0], logits[k])
    plans = model.plan(*features)
    alone = model.plan(*(frames[4:5, : n[4]] for frames, n in features))
    assert torch.equal(plans[4, : lengths[0][4], : lengths[1][4]], alone[0])
    assert (plans[4, lengths[0][4] :] == 0).all()


def test_number_of_parameters():
    model = build("parrot-frames", (3840, 768), 6)
    assert sum(weight.numel() for weight in model.parameters()) == 120 * (3840 + 768 + 2) + 2 * 128 * 361 + 6 * 257


def test_an_empty_batch():
    assert small()(torch.zeros(0, 3, 6), torch.zeros(0, 2, 5)).shape == (0, CLASSES)


def ragged_data(n: int = 60) -> tuple[list[Ragged], np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, n)
    features = []
    for dim in DIMS:
        centres = rng.standard_normal((CLASSES, dim))
        features.append(
            Ragged.join(
                (centres[label] + rng.standard_normal((rng.integers(2, 9), dim))).astype(np.float32) for label in labels
            )
        )
    return features, labels


def test_training_on_ragged_frames():
    features, labels = ragged_data()
    model, fold = small(), make_fold(40, 10, 10)
    config = TrainingConfig(epochs=30, batch_size=10, learning_rate=1e-2, patience=30, device="cpu")
    result = train(model, features, labels, fold, config)
    assert result.history["train_loss"][-1] < 0.7 * result.history["train_loss"][0]
    assert result.plan is None
    again = small()
    repeated = train(again, features, labels, fold, config)
    assert np.array_equal(repeated.test_logits, result.test_logits)
    test = [f.select(fold.test) for f in features]
    assert np.array_equal(predict(model, test, 1), predict(model, test, 10))
    assert batch_sensitivity(model, test, batch_size=4) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Parrot(DIMS, 3, ParrotConfig(transport="frames")), "that of parrot.frames.FrameParrot"),
        (
            lambda: FrameParrot(DIMS, 3, ParrotConfig()),
            "`transport` must be 'frames' in the configuration; got 'batch'",
        ),
        (lambda: FrameParrot((3, 4, 5), 3), r"frame widths of two encoders; got \[3, 4, 5\]"),
        (lambda: ParrotConfig(transport="frames", fusion="hadamard"), "wants a fusion that transports.*got 'hadamard'"),
        (lambda: small()(torch.zeros(2, 3, 6)), "wanted the frames of 2 encoders; got 1"),
        (lambda: small()(torch.zeros(2, 6), torch.zeros(2, 4, 5)), r"encoder 0 must be \(B, T, 6\); got \(2, 6\)"),
        (
            lambda: small()((torch.zeros(2, 3, 6), torch.tensor([3, 0])), torch.zeros(2, 4, 5)),
            r"lengths of encoder 0 must be 2 integers from 1 to 3; got \[3, 0\]",
        ),
        (
            lambda: small()(torch.zeros(2, 3, 6), (torch.zeros(2, 4, 5), torch.tensor([5, 1]))),
            r"lengths of encoder 1 must be 2 integers from 1 to 4; got \[5, 1\]",
        ),
        (
            lambda: small()(torch.zeros(2, 3, 6), torch.zeros(3, 4, 5)),
            r"same utterances from both encoders; got \[2, 3\]",
        ),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
