"""Training of encoders through the head."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import CLASSES, make_fold

from parrot import encoders
from parrot.encoders import SSAM
from parrot.fine_tuning import FineTuned
from parrot.model import Parrot, ParrotConfig, build
from parrot.ragged import Ragged
from parrot.training import TrainingConfig, train

SMALL = ParrotConfig(filters=(4, 4), projection=5, hidden=8, gradient="unrolled")
SPECS = ("ssam-demo", "hubert-demo")


def make(**options) -> FineTuned:
    torch.manual_seed(0)
    loaded = [encoders.load(spec) for spec in SPECS]
    return FineTuned(loaded, Parrot([e.embedding_dim for e in loaded], CLASSES, SMALL), **options)


def clips(n: int, seed: int = 0) -> list[np.ndarray]:
    """Tones whose pitch is the class, in noise."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(n):
        time = np.arange(rng.integers(3000, 5000)) / 16_000
        tone = np.sin(2 * np.pi * 300 * 2 ** (k % CLASSES) * time)
        found.append((0.2 * tone + 0.02 * rng.standard_normal(len(time))).astype(np.float32))
    return found


def padded(waveforms: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.from_numpy(waveform) for waveform in waveforms]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def test_before_the_first_step_it_is_the_head_on_frozen_embeddings():
    model, batch = make(), padded(clips(4))
    model.train()
    assert not any(module.training for module in model.encoders.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for k, spec in enumerate(SPECS):
        encoder = encoders.load(spec)
        want = torch.cat([encoder.embed(torch.from_numpy(clip)[None]) for clip in clips(4)])
        assert torch.equal(model.embeddings(batch, batch)[k], want)
    model.eval()
    assert torch.equal(model(batch, batch), model.head(*model.embeddings(batch, batch)))


def test_checkpointing_changes_no_gradient():
    batch, labels = padded(clips(3)), torch.arange(3)
    found = []
    for checkpointing in (False, True):
        model = make(checkpointing=checkpointing).eval()
        F.cross_entropy(model(batch, batch), labels).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert sum(gradient is not None for gradient in found[0]) > 50
    for plain, checkpointed in zip(*found, strict=True):
        assert plain is checkpointed is None or torch.equal(plain, checkpointed)


def test_gradients_of_an_encoder_are_the_differences_of_the_loss():
    """Through the kernels of scan, convolution and transport: along one direction of all of SSAM's weights, in fp64."""
    torch.manual_seed(0)
    ssams = [SSAM(width=8, depth=2, d_state=4, expand=2).double() for _ in range(2)]
    model = FineTuned(ssams, Parrot([e.embedding_dim for e in ssams], CLASSES, SMALL)).double().eval()
    model.head.fusion.transport.options["cost_scale"] = 3.0  # "max" is a constant to the gradient
    waves = torch.from_numpy(np.stack([clip[:3000] for clip in clips(3)])).double()
    weights = list(model.encoders.parameters())
    direction = [torch.randn_like(weight) * weight.abs().mean() for weight in weights]

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(waves, waves), torch.arange(3))

    loss().backward()
    slope = sum((w.grad * d).sum() for w, d in zip(weights, direction, strict=True) if w.grad is not None).item()
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for weight, d in zip(weights, direction, strict=True):
                weight.add_(sign * step * d)
            values.append(loss().item())
            for weight, d in zip(weights, direction, strict=True):
                weight.sub_(sign * step * d)
    assert abs(slope) > 1e-6
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def test_training_changes_the_encoders_and_lowers_the_loss():
    waveforms = Ragged.join(clips(36))
    labels, fold = np.arange(36) % CLASSES, make_fold(24, 6, 6)
    config = TrainingConfig(
        epochs=4, batch_size=8, learning_rate=1e-30, encoder_learning_rate=3e-3, patience=4, device="cpu"
    )
    model = make()
    model.head.classifier[2].p = 0.0
    before = copy.deepcopy(model.state_dict())
    result = train(model, [waveforms, waveforms], labels, fold, config)
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]  # by the encoders alone
    after = model.state_dict()
    changed = {
        name.split(".")[1] for name in after if name.startswith("encoders") and (after[name] != before[name]).any()
    }
    assert changed == {"0", "1"}
    assert result.test_logits.shape == (6, CLASSES)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="`transport` 'batch'; got 'reference'"):
        FineTuned([encoders.load("ssam-demo")] * 2, Parrot((160, 160), 3, ParrotConfig(transport="reference")))
    with pytest.raises(ValueError, match="waveforms for 2 encoders; got 1"):
        make()(torch.zeros(1, 4000))
    with pytest.raises(ValueError, match="give them, or their specs"):
        build("parrot-finetuned", [(), ()], 3)
    with pytest.raises(ValueError, match="`encoder_learning_rate` must be positive and finite; got 0"):
        TrainingConfig(encoder_learning_rate=0)
    with pytest.raises(ValueError, match="given by their specs can be saved"):
        make().arguments()
    built = build("parrot-finetuned", [(), ()], 3, SPECS)
    assert sum(p.numel() for p in built.head.parameters()) == sum(
        p.numel() for p in build("parrot", (160, 96), 3).parameters()
    )
