"""Learned weights of the encoders' layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_training import CLASSES, make_fold

from parrot import encoders
from parrot.features import embed_clip
from parrot.layer_weights import LayerWeighted
from parrot.model import Parrot, ParrotConfig, build
from parrot.training import TrainingConfig, train

SMALL = ParrotConfig(filters=(4, 4), projection=5, hidden=8)


def make() -> LayerWeighted:
    torch.manual_seed(0)
    return LayerWeighted([3, 2], Parrot((8, 4), CLASSES, SMALL))


def test_logits_are_the_heads_on_weighted_sums():
    model = make().double().eval()
    states = [torch.randn(6, 3, 8, dtype=torch.float64), torch.randn(6, 2, 4, dtype=torch.float64)]
    assert torch.allclose(model(*states), model.head(*(state.mean(1) for state in states)), atol=1e-12)
    with torch.no_grad():
        model.layer_weights[0].copy_(torch.tensor([0.0, 50.0, 0.0]))
    assert torch.allclose(model(*states), model.head(states[0][:, 1], states[1].mean(1)), atol=1e-12)
    model(*states).square().sum().backward()
    assert all(weights.grad.abs().max() > 0 for weights in model.layer_weights[1:])
    assert model.plan(*states).shape == (6, 6)


def test_the_sum_of_means_is_the_mean_of_sums():
    """As the encoder's own weighted layer, which sums frame by frame."""
    waveform = np.random.default_rng(0).standard_normal(9000).astype(np.float32) / 10
    encoder = encoders.load("hubert-demo")
    states = embed_clip(encoder, waveform, "layers")
    assert states.shape == (encoder.n_layers + 1, encoder.embedding_dim)
    weights = torch.tensor([0.3, -1.0, 0.7])
    encoder.use_layer("weighted").layer_weights.data.copy_(weights)
    want = encoder.embed(torch.from_numpy(waveform)[None])[0]
    got = torch.einsum("ld,l->d", torch.from_numpy(states), weights.softmax(0))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_training_finds_the_layer_that_tells():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 120)
    states = []
    for dim, n in ((8, 3), (4, 2)):
        noise = rng.standard_normal((120, n, dim))
        noise[:, 0] += 3 * rng.standard_normal((CLASSES, dim))[labels]
        states.append(noise.astype(np.float32))
    model = make()
    config = TrainingConfig(epochs=40, learning_rate=2e-2, patience=40, device="cpu")
    result = train(model, states, labels, make_fold(), config)
    assert result.history["train_loss"][-1] < 0.5 * result.history["train_loss"][0]
    assert all(weights.softmax(0).argmax() == 0 for weights in model.layer_weights)
    assert result.plan.shape == (30, 30)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="`transport` 'batch'; got 'reference'"):
        LayerWeighted([3, 2], Parrot((8, 4), 3, ParrotConfig(transport="reference")))
    with pytest.raises(ValueError, match="of 3 and 2 hidden states"):
        make()(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4))
    assert build("parrot-layers", [(3, 8), (2, 4)], 3).layer_weights[1].shape == (2,)
