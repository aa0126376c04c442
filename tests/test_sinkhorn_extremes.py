"""sinkhorn_hadamard at its extremes: finite outputs and gradients on every backend, in every gradient mode."""

from __future__ import annotations

import functools

import pytest
import sinkhorn_cases
import torch
from sinkhorn_cases import assert_marginals_of_y, cotangents, op, problem, takes, to, with_gradients
from tolerances import assert_close

from parrot_kernels import backends, sinkhorn_hadamard

# The interpreter takes seconds for each; the quick tests of Triton's extremes are in test_sinkhorn_triton*.py.
everywhere = functools.partial(sinkhorn_cases.everywhere, interpreter=[pytest.mark.slow])

FP32 = torch.float32
GRADIENTS = ("unrolled", "implicit", "detached")
SIZES = (2, 5, 6, 3)


def assert_finite(arguments: dict, backend: str, device: str) -> None:
    for gradient in GRADIENTS:
        solve = functools.partial(op, gradient=gradient, backend=backend)
        results = with_gradients(solve, to(arguments, device), cotangents(arguments))
        for name, value in results.items():
            assert torch.isfinite(value).all(), f"{gradient}: {name}"


@pytest.mark.sampled(8)
@everywhere
@pytest.mark.parametrize("eps", [1e-6, 1e-4, 1e2, 1e6])
@pytest.mark.parametrize("case", ["weights", "unbalanced"])
def test_regularisation(backend, device, case, eps):
    assert_finite(problem(case, SIZES, FP32) | {"eps": eps}, backend, device)


@pytest.mark.sampled(8)
@everywhere
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("points", ["coincident", "equal", "zero", "outlier", "far"])
def test_points(backend, device, points, cost):
    arguments = problem("weights", (2, 6, 6, 3), FP32) | {"cost": cost}
    if points == "coincident":
        arguments["y"] = arguments["x"].clone()
    elif points == "equal":
        arguments["x"].fill_(0.3)
        arguments["y"].fill_(0.3)
    elif points == "zero":
        arguments["x"][:, 1] = 0
        arguments["y"][:, 2] = 0
    elif points == "outlier":
        arguments["x"][:, 0] = 1e6
    else:
        arguments["y"] += 1e4
    assert_finite(arguments, backend, device)


@everywhere
@pytest.mark.parametrize("outlier", [False, True], ids=["", "outlier"])
def test_zero_weights(backend, device, outlier):
    arguments = problem("weights", SIZES, FP32)
    arguments["a"][:, 1] = arguments["b"][:, :2] = 0
    if outlier:
        arguments["x"][:, 0] = 1e6
    assert_finite(arguments, backend, device)


@everywhere
def test_a_point_without_mass_gets_what_a_little_mass_would_get(backend, device):
    arguments = to(problem("weights", SIZES, FP32), device)
    arguments["a"][:, 1] = 0
    none = op(**arguments, backend=backend)
    arguments["a"][:, 1] = 1e-30
    little = op(**arguments, backend=backend)
    for name in ("x_to_y", "y_to_x"):
        assert_close(none[name], little[name], "sinkhorn", name)
    assert none["plan"][:, 1].max() < 1e-30


@everywhere
def test_weights_that_are_all_zero(backend, device):
    arguments = problem("weights", SIZES, FP32)
    arguments["a"].zero_()
    arguments["b"].zero_()
    assert_finite(arguments, backend, device)


@everywhere
@pytest.mark.parametrize("reach", [None, (0.7, None)], ids=str)
def test_plan_has_the_marginal_of_y_for_any_eps(backend, device, reach):
    exact = backend in ("cpu", "triton")  # elsewhere logarithms of a column's sum lose a little beside its largest term

    def solve(**arguments):
        return op(**to(arguments, device), reach=reach, backend=backend)

    assert_marginals_of_y(solve, scale=0.1 if exact else 20)


def test_cosine_of_one_feature_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, n, 1, generator=generator, requires_grad=True) for n in (1, 2))
    out = sinkhorn_hadamard(x, y, cost="cosine", eps=0.01, n_iters=5)
    for gradient in torch.autograd.grad(out.cost.sum(), (x, y)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_cost_stays_finite_where_a_point_without_weight_is_nearest():
    x, y = torch.zeros(1, 2, 40), torch.full((1, 48, 40), 9.0)
    x[0, 1] = 8.0
    a = torch.tensor([[1.0, 0.0]])
    for backend in ("cpu", "torch"):
        if backends.why_not("sinkhorn_hadamard", backend, "cpu", FP32) is None:
            out = sinkhorn_hadamard(x, y, a=a, cost="sqeuclidean", cost_scale=0.7, eps=0.01, n_iters=2, backend=backend)
            assert torch.isfinite(out.cost).all()


@everywhere
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean"])
def test_distances_are_finite_up_to_the_square_root_of_the_range_and_an_overflow_stays_in_its_problem(
    backend, device, cost
):
    arguments = to(problem("plain", (3, 5, 6, 4), FP32), device) | {"cost": cost, "backend": backend}
    plain = op(**arguments)
    factors = torch.tensor([1.0, 1e18, 1e20], device=device)[:, None, None]
    out = op(**arguments | {side: arguments[side] * factors for side in ("x", "y")})
    assert_close(out["plan"][1], plain["plan"][1], "sinkhorn", "plan of large points", scale=10)
    assert not torch.isfinite(out["plan"][2]).all()
    for name, value in out.items():
        assert torch.equal(value[0], plain[name][0]), name


@everywhere
@pytest.mark.parametrize("cost_scale", ["max", 1.0])
def test_a_large_finite_cost_forbids_a_pair(backend, device, cost_scale):
    """The plan is exactly 0 there, and everything stays finite."""
    arguments = problem("matrix", (2, 6, 6, 3), FP32) | {"n_iters": 6}
    forbidden = torch.eye(6, dtype=torch.bool).expand(2, -1, -1)
    large = 1e4 if cost_scale == 1.0 else 3.0  # over the largest, eps is in units of the forbidding cost
    eps = torch.full((2,), 0.1 if cost_scale == 1.0 else 0.003)
    arguments |= {"cost": arguments["cost"].masked_fill(forbidden, large), "cost_scale": cost_scale, "eps": eps}
    assert_finite(arguments, backend, device)
    plan = op(**to(arguments, device), backend=backend)["plan"].cpu()
    assert (plan[forbidden] == 0).all()
    assert (plan.sum(1) > 0.1).all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("size", ["largest", "subnormal"])
def test_the_ends_of_half_precision(backend, device, size, dtype):
    """Features near the largest number of fp16, and below its smallest normal number, are transported exactly."""
    if not takes(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    arguments = problem("weights", (2, 6, 6, 3), dtype)
    factor = 3e4 if size == "largest" else 2e-5
    for name in ("x", "y"):
        arguments[name] = (factor * arguments[name].float()).to(dtype)
    exact = op(**to(arguments, torch.float64), backend="torch")
    got = op(**to(arguments, device), backend=backend)
    for name in ("x_to_y", "y_to_x"):
        rounding = torch.finfo(dtype).eps * exact[name].abs() + torch.finfo(dtype).smallest_normal * 2**-10
        assert ((got[name].cpu().double() - exact[name]).abs() <= rounding + 1e-5 * factor).all(), name
    assert_close(got["plan"].cpu(), exact["plan"], "sinkhorn", "plan")
    held = exact["x_hadamard"].to(dtype)
    assert torch.equal(got["x_hadamard"].cpu().isinf(), held.isinf()), "infinite where the product does not fit"
