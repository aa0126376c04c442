"""The Triton backward of sinkhorn_hadamard, run by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from interpreted import interpreted
from sinkhorn_cases import CASES, problem
from test_sinkhorn_cpu import FP32, launch_arguments
from test_sinkhorn_cpu_backward import GRADIENTS, assert_matches, cotangents, run, weighted
from torch import Tensor


def points(batch: int, n: int, m: int, dim: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, n, dim), "y": torch.randn(batch, m, dim), "n_iters": 6}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("gradient", ["unrolled", "detached"])
@pytest.mark.parametrize("case", CASES)
@interpreted
def test_every_option(case, gradient):
    given = problem({**CASES[case], "n_iters": 6}, (3, 7, 13, 5), FP32)
    assert_matches(given, gradient=gradient, kernels="triton")


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 1, 9, 3), (1, 9, 1, 3), (1, 33, 31, 20)], ids=str)
@interpreted
def test_sizes(size):
    assert_matches(weighted(points(*size)), 4.0 if 1 in size[1:3] else 1.0, kernels="triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@interpreted
def test_half_precision(dtype):
    assert_matches(problem({"n_iters": 6}, (1, 9, 11, 5), dtype), kernels="triton")


EPS = [(1e-4, None), (1e-3, 0.3), (1e-2, None), (1.0, 0.3), (10.0, None)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("eps", "reach"), EPS, ids=str)
@interpreted
def test_any_eps(eps, reach):
    """At small eps the kernel matrix is set anew in many iterations. Rounding of C counts 1 / eps times."""
    given = weighted({**points(1, 9, 11, 3), "cost": "sqeuclidean", "eps": eps, "reach": reach, "n_iters": 15})
    # The gradient of eps is itself of order 1 / eps larger: float32 does not come to it at 1e-4, on any backend.
    assert_matches(given, max(1.0, 0.2 / eps), kernels="triton", needed=GRADIENTS[: None if eps > 1e-4 else -1])


@pytest.mark.parametrize("n", [1, 2])
@interpreted
def test_rounding_beyond_the_range_of_exponents(n):
    """Where costs are 1e9 eps, they, the offsets and the potentials are rounded to hundreds."""
    generator = torch.Generator().manual_seed(3)
    given = {side: torch.randn(2, size, 17, generator=generator) for side, size in (("x", n), ("y", 16))}
    arguments = launch_arguments(**given, cost="sqeuclidean", cost_scale=0.7, eps=1e-8, n_iters=3)
    for name, value in run("triton", arguments, cotangents(arguments)).items():
        assert torch.isfinite(value).all(), name


@interpreted
def test_half_steps_with_a_kernel_matrix_each():
    """What weights near zero on both sides ask for, here of every problem."""
    from parrot_kernels.triton_kernels import sinkhorn_resident

    with mock.patch.object(sinkhorn_resident, "LARGEST_SCALING", 1.5):
        assert_matches(weighted(points(2, 9, 7, 3)), kernels="triton")


@interpreted
def test_weights_near_zero():
    given = weighted({**points(1, 9, 7, 3), "eps": 0.02})
    given["a"][0, :3] = torch.tensor([0.0, 1e-12, 1e-6])
    given["b"][0, :3] = torch.tensor([1e-12, 0.0, 1e-5])
    assert_matches(given, 4.0, keep=("x_to_y", "y_to_x", "transport_cost"), kernels="triton")
    given["a"][0, 3], given["b"][0, 3] = 1e-30, 1e-36
    arguments = launch_arguments(**given)
    for name, value in run("triton", arguments, cotangents(arguments)).items():
        assert torch.isfinite(value).all(), name


@interpreted
def test_coincident_points_and_a_far_outlier():
    given = points(1, 9, 6, 3)
    given["y"][0, :3] = given["x"][0, :3]
    assert_matches(given, kernels="triton", scale=2.0)
    given["x"][0, 4] = 1e6
    arguments = launch_arguments(**given, cost_scale=1.0)
    got = run("triton", arguments, cotangents(arguments))
    for name, value in got.items():
        assert torch.isfinite(value).all(), name
    same = {"x": torch.ones(1, 5, 3), "y": torch.ones(1, 4, 3), "n_iters": 3}
    assert_matches(same, kernels="triton")
    assert_matches({**points(1, 5, 4, 3), "y": torch.zeros(1, 4, 3), "cost": "cosine"}, kernels="triton")


@interpreted
def test_batch_mates_and_padding_change_no_bit():
    given = problem({"lengths": True, "a": True, "b": True, "n_iters": 4}, (3, 7, 5, 3), FP32)
    arguments = launch_arguments(**given)
    outer = cotangents(arguments)
    clean = run("triton", arguments, outer)
    past = {side: torch.arange(given[side].shape[1]) >= given[f"{side}_lengths"][:, None] for side in "xy"}
    dead = (given["x_lengths"] == 0) | (given["y_lengths"] == 0)
    past = {side: mask | dead[:, None] for side, mask in past.items()}
    for name, side in (("x", "x"), ("y", "y"), ("a", "x"), ("b", "y")):
        assert torch.all(clean[f"d{name}"][past[side]] == 0), name
        arguments[name] = arguments[name].clone()
        arguments[name][past[side]] = math.nan
    for name, side in (("y_to_x", "x"), ("x_hadamard", "x"), ("f", "x"), ("x_to_y", "y"), ("g", "y")):
        outer[name][past[side]] = math.inf
    outer["plan"][past["x"][:, :, None] | past["y"][:, None]] = math.nan
    dirty = run("triton", arguments, outer)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    for p in range(3):
        alone = {n: t[p : p + 1] if isinstance(t, Tensor) else t for n, t in arguments.items()}
        one = run("triton", alone, {n: t[p : p + 1] for n, t in outer.items()})
        for name, value in clean.items():
            assert torch.equal(value[p : p + 1], one[name]), (name, p)


@interpreted
def test_what_is_not_asked_for_changes_nothing():
    arguments = launch_arguments(**weighted(points(1, 7, 5, 3)))
    outer = cotangents(arguments)
    everything = run("triton", arguments, outer)
    for name, value in everything.items():
        got = run("triton", arguments, outer, needed=(name,))
        assert got.keys() == {name}
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max(), name  # the compiled sums may differ
    for name in ("x_to_y", "y_hadamard", "plan", "transport_cost", "f"):
        for gradient in ("unrolled", "detached"):
            assert_matches(weighted(points(1, 4, 5, 2)), gradient=gradient, keep=(name,), kernels="triton")


def test_sizes_beyond_the_registers_are_refused():
    from parrot_kernels.triton_kernels import sinkhorn_hadamard_backward

    assert sinkhorn_hadamard_backward.why_not(64, 64) is None
    assert sinkhorn_hadamard_backward.why_not(33, 16) is None
    for n, m in ((65, 64), (257, 1), (128, 33)):
        assert "at most" in sinkhorn_hadamard_backward.why_not(n, m)
