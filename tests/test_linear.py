"""Linear layers that take oneDNN where torch would take MKL on another maker's processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parrot_kernels.modules import Linear, accelerate_linear
from parrot_kernels.ops import linear as ops


@pytest.fixture
def calls(monkeypatch):
    """What oneDNN is called with, on any processor whose torch has it."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    made, original = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(ops, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(ops, "WORTH_IT", 0)
    monkeypatch.setattr(ops.torch.ops.mkldnn, "_linear_pointwise", lambda *a: made.append(a) or original(*a))
    return made


@pytest.mark.parametrize("shape", [(7,), (1, 7), (13, 7), (2, 5, 7), (3, 0, 7)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_product_to_rounding(calls, shape, bias):
    x, weight = torch.randn(shape), torch.randn(5, 7)
    b = torch.randn(5) if bias else None
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    got = ops.linear(x, weight, b)
    assert got.shape == exact.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def test_takes_views(calls):
    x, weight = torch.randn(7, 6, 9).transpose(0, 2)[:, 1:], torch.randn(7, 5).T
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.T)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(calls, dtype):
    x, weight = torch.randn(4, 7, dtype=dtype), torch.randn(5, 7, dtype=dtype)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    assert calls == []


def test_whatever_else_looks_at_the_product_gets_torchs(calls):
    layer, x = Linear(7, 5), torch.randn(4, 7)
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    assert torch.equal(gradient, x.sum(0).expand(5, 7))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.vmap(layer)(x[None])
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        layer(x)
    assert calls == []
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(ops, "mkl_is_slow", lambda: True)
    x, weight = torch.randn(4, 7), torch.randn(5, 7)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


def test_a_model_is_changed_in_place_and_keeps_its_parameters(calls):
    class Subclass(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 5)), Subclass(5, 4)).requires_grad_(
        False
    )
    x, before = torch.randn(3, 7), {name: value.clone() for name, value in model.state_dict().items()}
    want = model(x)
    assert accelerate_linear(model) is model
    torch.testing.assert_close(model(x), want)
    assert len(calls) == 2
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [Linear, Linear, Subclass]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
