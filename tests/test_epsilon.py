"""Learned and annealed regularisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_training import make_data, make_fold

from parrot.epsilon import Epsilon
from parrot.model import Parrot, ParrotConfig, build
from parrot.training import TrainingConfig, train

DIMS, CLASSES = (12, 8), 3
SMALL = {"filters": (4, 4), "projection": 5, "hidden": 8}


def make(**options) -> Parrot:
    torch.manual_seed(0)
    return Parrot(DIMS, CLASSES, ParrotConfig(**SMALL, **options))


@pytest.mark.parametrize("transport", ["batch", "frames", "reference"])
def test_the_gradient_of_a_learned_eps(transport):
    """Against central differences in fp64; the paper's gradient, through a constant plan, has none."""
    name = {"batch": "parrot-learned-eps", "frames": "parrot-frames", "reference": "parrot-learned-eps"}[transport]
    torch.manual_seed(0)
    config = ParrotConfig(**SMALL, transport=transport, gradient="unrolled", learn_eps=True)
    model = type(build(name, DIMS, CLASSES))(DIMS, CLASSES, config).double().eval()
    shape = (6, 4) if transport == "frames" else (6,)
    features = [torch.randn(*shape, dim, dtype=torch.float64) for dim in DIMS]
    if transport == "reference":
        model.set_reference(*(torch.randn(31, dim, dtype=torch.float64) for dim in DIMS))
    labels = torch.arange(6) % CLASSES

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(*features), labels)

    (gradient,) = torch.autograd.grad(loss(), model.epsilon.log)
    step, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -1):
            model.epsilon.log.add_(sign * step)
            values.append(loss().item())
            model.epsilon.log.sub_(sign * step)
    assert gradient.abs() > 1e-6
    assert gradient.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_a_constant_adds_nothing_to_a_model():
    assert not list(Epsilon(0.05).state_dict())
    assert Epsilon(0.05)() == 0.05
    assert sum(p.numel() for p in make(learn_eps=True, gradient="unrolled").parameters()) == 1 + sum(
        p.numel() for p in make().parameters()
    )


def test_a_schedule_comes_down_in_equal_ratios():
    eps = Epsilon(0.05, start=0.8, epochs=4)
    found = []
    for epoch in range(1, 8):
        eps.set_epoch(epoch)
        found.append(eps().item())
    assert found == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.05, 0.05, 0.05])


def test_a_schedule_is_what_the_plan_is_made_with():
    model, paper = make(eps_start=0.5).double().eval(), make(eps=0.5).double().eval()
    features = [torch.randn(7, dim, dtype=torch.float64) for dim in DIMS]
    assert torch.allclose(model(*features), paper(*features), rtol=0, atol=1e-12)
    assert torch.allclose(model.plan(*features), paper.plan(*features), rtol=0, atol=1e-12)
    model.set_epoch(11)
    paper = make().double().eval()
    assert torch.allclose(model(*features), paper(*features), rtol=0, atol=1e-8)  # the buffer was rounded in fp32


def test_training_moves_eps_and_restores_that_of_the_best_epoch():
    features, labels = make_data(noise=2.0)
    config = TrainingConfig(epochs=6, device="cpu")
    torch.manual_seed(0)
    learned = Parrot((4, 4), CLASSES, ParrotConfig(**SMALL, learn_eps=True, gradient="unrolled"))
    features = [features[0], features[0][:, ::-1].copy()]
    train(learned, features, labels, make_fold(), config)
    assert learned.epsilon().item() != pytest.approx(0.05, rel=1e-5)
    annealed = Parrot((4, 4), CLASSES, ParrotConfig(**SMALL, eps_start=0.8, eps_epochs=4))
    best = train(annealed, features, labels, make_fold(), config).best_epoch
    assert annealed.epsilon().item() == pytest.approx(
        0.8 ** (1 - min(1, (best - 1) / 4)) * 0.05 ** min(1, (best - 1) / 4)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ParrotConfig(learn_eps=True), "needs a gradient through a plan; got gradient 'detached'"),
        (lambda: ParrotConfig(learn_eps=True, gradient="unrolled", fusion="concat"), "fusion 'concat'"),
        (
            lambda: ParrotConfig(learn_eps=True, gradient="unrolled", eps_start=0.5),
            "either learned or annealed",
        ),
        (lambda: Epsilon(0.05, start=0.5, learned=True), "goes without a schedule"),
        (lambda: Epsilon(-1.0), "`eps` must be positive; got -1.0"),
        (lambda: Epsilon(0.05, start=math.inf), "`start` must be positive; got inf"),
        (lambda: Epsilon(0.05, start=0.5).set_epoch(0), "`epoch` counts from 1; got 0"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
