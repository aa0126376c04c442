"""sinkhorn_plan and sinkhorn_transport are sinkhorn_hadamard's, options, gradients and errors included."""

from __future__ import annotations

import pytest
import torch
from sinkhorn_cases import CASES, problem
from torch import Tensor

from parrot_kernels import backends
from parrot_kernels.ops.sinkhorn_hadamard import sinkhorn_hadamard
from parrot_kernels.ops.sinkhorn_transport import sinkhorn_plan, sinkhorn_transport

FP32, FP64 = torch.float32, torch.float64


@pytest.mark.parametrize("case", CASES)
def test_every_option(case):
    arguments = problem(case, (3, 5, 6, 4), FP32)
    want = sinkhorn_hadamard(**arguments, return_plan=True)
    assert torch.equal(sinkhorn_plan(**arguments), want.plan)
    x_to_y, y_to_x = sinkhorn_transport(**arguments)
    assert torch.equal(x_to_y, want.x_to_y)
    assert torch.equal(y_to_x, want.y_to_x)


def test_one_problem():
    arguments = {name: t[0] for name, t in problem("plain", (1, 5, 6, 4), FP32).items() if isinstance(t, Tensor)}
    assert sinkhorn_plan(**arguments).shape == (5, 6)
    x_to_y, y_to_x = sinkhorn_transport(**arguments)
    assert (x_to_y.shape, y_to_x.shape) == ((6, 4), (5, 4))


@pytest.mark.parametrize("function", [sinkhorn_plan, lambda *a, **k: torch.cat(sinkhorn_transport(*a, **k), 1)])
def test_finite_differences(function):
    arguments = problem("weights", (2, 3, 4, 2), FP64) | {"cost_scale": 2.0}
    names = ("x", "y", "a", "b")

    def of(*values: Tensor) -> Tensor:
        return function(**arguments | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(of, [arguments[n].requires_grad_() for n in names], atol=1e-7, rtol=1e-5)


def test_a_detached_plan_is_a_constant():
    x = torch.rand(5, 3, requires_grad=True)
    y = torch.rand(4, 3)
    assert not sinkhorn_plan(x, y, gradient="detached").requires_grad
    plan = sinkhorn_plan(x, y)
    x_to_y, _ = sinkhorn_transport(x, y, gradient="detached")
    (got,) = torch.autograd.grad(x_to_y.sum(), x)
    want = 4 * plan.detach().sum(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("function", [sinkhorn_plan, sinkhorn_transport])
def test_errors(function):
    x, y = torch.rand(5, 3), torch.rand(4, 3)
    with pytest.raises(ValueError, match="`y` must be of shape"):
        function(x, y[:, :2])
    with pytest.raises(ValueError, match="`eps` must be a positive number"):
        function(x, y, eps=0.0)
    with pytest.raises(TypeError, match="return_plan"):
        function(x, y, return_plan=True)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_without_products_everything_else_is_the_same(backend, gradient):
    if (why := backends.why_not("sinkhorn_hadamard", backend, "cpu", torch.float32)) is not None:
        pytest.skip(why)
    x, y = (torch.randn(3, n, 33, requires_grad=True) for n in (9, 14))
    options = {"x_lengths": torch.tensor([9, 0, 4]), "gradient": gradient, "backend": backend, "return_plan": True}
    with_products, without = (sinkhorn_hadamard(x, y, **options, return_hadamard=wanted) for wanted in (True, False))
    assert without.x_hadamard is None
    assert without.y_hadamard is None
    for name, got in without._asdict().items():
        if name not in ("x_hadamard", "y_hadamard"):
            assert torch.equal(got, getattr(with_products, name)), name
    cotangents = torch.randn_like(without.x_to_y), torch.randn_like(without.y_to_x)
    got, want = (torch.autograd.grad((out.x_to_y, out.y_to_x), (x, y), cotangents) for out in (without, with_products))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
