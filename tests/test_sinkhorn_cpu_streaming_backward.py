"""The backward of problems beyond the workspace limit of the CPU kernel, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from sinkhorn_cases import CASES, problem
from test_sinkhorn_cpu import (
    FP32,
    FP64,
    launch_arguments,
    points,
    threads,  # noqa: F401, a fixture
)
from test_sinkhorn_cpu_backward import MODES, assert_matches, cotangents, run, weighted
from torch import Tensor

import parrot_kernels
from parrot_kernels import native

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def nothing_is_kept():
    before = native.workspace_limit()
    parrot_kernels.set_workspace_limit(0)
    yield
    parrot_kernels.set_workspace_limit(before)


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("dtype", [FP32, FP64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_option(case, dtype, gradient):
    assert_matches(problem(case, (4, 19, 23, 5), dtype), gradient=gradient)


# The larger ones have several blocks of rows, and several tiles on both sides.
SIZES = [
    (1, 1, 1, 1), (2, 1, 9, 3), (2, 9, 1, 3), (3, 7, 13, 1), (2, 33, 31, 768), (1, 129, 257, 20), (1, 333, 101, 17),
]  # fmt: skip


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, cost):
    # From one point the plan is known whatever eps, and what is left of its gradient is a difference of large sums.
    scale = 8.0 if 1 in size[1:3] else 2.0 if size[3] > 1000 else 1.0  # and long sums
    assert_matches(weighted({**points(*size), "cost": cost}), scale)


@pytest.mark.parametrize("reach", [None, 0.3, (None, 0.1), (0.1, None)], ids=str)
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_any_eps_in_double_precision(eps, reach):
    given = {**points(1, 40, 70, 17, FP64), "cost": "sqeuclidean", "eps": eps, "reach": reach, "n_iters": 60}
    assert_matches(weighted(given), scale=max(1.0, 0.02 / eps))


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean"])
def test_far_outlier(cost):
    given = {**points(1, 40, 70, 17, FP64), "cost": cost}
    given["x"][0, 3] = 1e6
    assert_matches(weighted(given))


def test_weights_of_zero():
    given = weighted(points(2, 40, 70, 5))
    for name in ("a", "b"):
        given[name][:, ::4] = 0
    assert_matches(given, needed=("dx", "dy"))


@pytest.mark.parametrize("output", ["x_to_y", "y_to_x", "x_hadamard", "y_hadamard", "f", "plan", "transport_cost"])
@pytest.mark.parametrize("gradient", MODES)
def test_one_output_at_a_time(output, gradient):
    assert_matches(weighted(points(2, 50, 70, 20)), gradient=gradient, keep=(output,))


@pytest.mark.parametrize("case", ["plain", "tol", "reach"])
def test_bits_depend_on_nothing_but_the_problem(case, threads):  # noqa: F811
    options = {"plain": {}, "tol": {"tol": 1e-3}, "reach": {"reach": 0.4}}[case]
    given = weighted({**points(3, 230, 300, 6), "n_iters": 8, **options})
    arguments = launch_arguments(**given)
    outer = cotangents(arguments)
    threads(1)
    want = run("cpu", arguments, outer)
    for count in (2, 4):
        threads(count)
        got = run("cpu", arguments, outer)
        for name in want:
            assert torch.equal(got[name], want[name]), (name, count)
    alone = run(
        "cpu",
        {n: t[1:2] if isinstance(t, Tensor) else t for n, t in arguments.items()},
        {n: t[1:2] for n, t in outer.items()},
    )
    for name in want:
        assert torch.equal(alone[name][0], want[name][1]), name
