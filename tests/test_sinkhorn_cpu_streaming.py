"""Problems beyond the workspace limit of the CPU kernel of sinkhorn_hadamard, against the reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from sinkhorn_cases import CASES, OP, problem
from test_sinkhorn_cpu import (
    FP32,
    FP64,
    allocate,
    expected,
    launch_arguments,
    points,
    threads,  # noqa: F401, a fixture
)
from tolerances import assert_close
from torch import Tensor

import parrot_kernels
from parrot_kernels import native

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")


def forward(histories: bool = True, **given: Any) -> dict[str, Tensor]:
    arguments = launch_arguments(**given)
    out = allocate(arguments, histories)
    native.call_cpu(f"{OP}_forward", **arguments, **out, workspace_limit=0)
    return out


def assert_matches(given: dict[str, Any], scale: float = 1.0) -> None:
    got, want = forward(**given), expected(**given)
    assert torch.equal(got["iterations"], want["iterations"])
    assert torch.equal(got["converged"], want["converged"])
    done = torch.arange(got["f_history"].shape[1]) < want["iterations"][:, None]
    for name in want.keys() - {"iterations", "converged"}:
        if name.endswith("history"):  # unspecified past the last iteration
            got[name], want[name] = (t.masked_fill(~done[:, :, None], 0) for t in (got[name], want[name]))
        assert_close(got[name], want[name].to(FP64), "sinkhorn", name, scale)


@pytest.mark.parametrize("dtype", [FP32, FP64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_option(case, dtype):
    assert_matches(problem(case, (4, 19, 23, 5), dtype))


# The larger ones have several blocks of rows, and several tiles on both sides.
SIZES = [
    (1, 1, 1, 1), (2, 1, 9, 3), (2, 9, 1, 3), (3, 7, 13, 1), (2, 33, 31, 768), (1, 129, 257, 20), (1, 333, 101, 17),
    (1, 17, 20, 3840),
]  # fmt: skip


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, cost):
    assert_matches({**points(*size), "cost": cost})


@pytest.mark.parametrize("reach", [None, 0.3, (None, 0.1), (0.1, None)], ids=str)
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_any_eps(eps, reach):
    # C rounds to a part of itself, in units of eps; potentials, of the size of eps where it is large, likewise.
    given = {**points(1, 40, 70, 17), "cost": "sqeuclidean", "eps": eps, "reach": reach, "n_iters": 60}
    assert_matches(given, scale=max(1.0, 0.02 / eps, eps))


def test_small_eps_in_double_precision_is_exact():
    assert_matches({**points(2, 40, 30, 17, FP64), "eps": 1e-4, "n_iters": 300})


@pytest.mark.parametrize("eps", [0.05, 0.003])
def test_weights_of_zero(eps):
    generator = torch.Generator().manual_seed(1)
    given = {**points(2, 40, 30, 5), "eps": eps}
    for name, size in (("a", 40), ("b", 30)):
        weights = torch.rand(2, size, generator=generator)
        weights[:, ::4] = 0
        given[name] = weights / weights.sum(1, keepdim=True)
    assert_matches(given, scale=max(1.0, 0.02 / eps, eps))


def test_point_without_mass_beside_points_without_mass():
    given = {**points(1, 12, 12, 2), "eps": 0.004, "n_iters": 20}
    given["x"][0, 0] = given["y"][0, 0] = 30.0
    given["a"] = given["b"] = torch.tensor([[0.0] + [1 / 11] * 11])
    assert_matches(given, scale=10)


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_any_mass(factor):
    given = points(1, 20, 30, 5)
    given["a"], given["b"] = (torch.rand(1, size) * factor for size in (20, 30))
    assert_matches(given)


@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
def test_far_outlier(cost, reach):
    given = {**points(1, 40, 70, 17), "cost": cost, "reach": reach}
    given["x"][0, 3] = 1e6
    assert_matches(given)


def test_any_strides():
    plain = points(2, 20, 30, 8)
    matrix = torch.rand(2, 20, 30)
    want = forward(**plain, cost=matrix)
    got = forward(
        x=plain["x"].mT.contiguous().mT, y=plain["y"], cost=matrix.transpose(0, 2).contiguous().transpose(0, 2)
    )
    assert all(torch.equal(got[n], want[n]) for n in want)


# Shared by threads; with columns in the log domain in many iterations; with all of them.
INVARIANCE = {
    "plain": {**points(3, 230, 300, 20), "n_iters": 10},
    "small eps": {**points(3, 230, 300, 3), "n_iters": 10, "eps": 1e-3, "cost": "sqeuclidean"},
    "log domain": {**points(3, 230, 300, 3), "n_iters": 5, "a": torch.full((3, 230), 1e9)},
    "unbalanced": {**points(3, 230, 300, 6), "n_iters": 20, "reach": 0.4, "tol": 1e-3},
}


@pytest.mark.parametrize("case", INVARIANCE)
def test_bits_depend_on_nothing_but_the_problem(case, threads):  # noqa: F811
    given = INVARIANCE[case]
    threads(1)
    want = forward(**given)
    names = want.keys() - {"f_history", "g_history"} if "tol" in given else want
    for count in (1, 2, 4):
        threads(count)
        got = forward(**given)
        for name in names:
            assert torch.equal(got[name], want[name]), (name, count)
    without = forward(histories=False, **given)
    alone = forward(**{n: t[1:2] if isinstance(t, Tensor) else t for n, t in given.items()})
    for name in want.keys() - {"f_history", "g_history"}:
        assert torch.equal(without[name], want[name]), name
        assert torch.equal(alone[name][0], want[name][1]), name


def test_padding_reaches_nothing():
    plain = points(2, 100, 70, 20)
    want = forward(**plain, n_iters=10)
    padded = {n: torch.cat([t, torch.full((2, 9, 20), torch.nan)], 1) for n, t in plain.items()}
    lengths = {"x_lengths": torch.full((2,), 100), "y_lengths": torch.full((2,), 70)}
    for name, value in forward(**padded, **lengths, n_iters=10).items():
        for dim, size in enumerate(want[name].shape):
            assert not value.narrow(dim, size, value.shape[dim] - size).any(), f"{name}: padding is not zero"
            value = value.narrow(dim, 0, size)
        assert torch.equal(value, want[name]), name


def test_nan_stays_in_its_problem():
    given = points(3, 50, 30, 5)
    want = forward(**given)
    given["x"][1, 3, 2] = torch.nan
    got = forward(**given)
    for name in want:
        assert torch.equal(got[name][::2], want[name][::2]), name
    assert got["y_to_x"][1].isnan().any()


def test_the_limit_decides():
    """At the limit a problem's matrices are kept, past it they are not, and the op hands the limit on."""
    given = points(1, 64, 64, 20)
    whole, tiled = 2 * 64 * 64 * 4, 2 * 64 * 64 * 4 - 1
    before = native.workspace_limit()
    results = {}
    try:
        for limit in (whole, tiled, 0):
            parrot_kernels.set_workspace_limit(limit)
            results[limit] = parrot_kernels.sinkhorn_hadamard(**given, backend="cpu").f
    finally:
        parrot_kernels.set_workspace_limit(before)
    assert torch.equal(results[tiled], results[0])
    assert not torch.equal(results[tiled], results[whole])  # sums in another order
    assert_close(results[tiled], results[whole], "sinkhorn", "f")


@pytest.mark.parametrize(("limit", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_limits_that_are_none(limit, kind):
    with pytest.raises(kind, match="set_workspace_limit: limit must"):
        parrot_kernels.set_workspace_limit(limit)


MEMORY = """
import torch, parrot_kernels

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

def grown(limit, points):
    before = peak()
    parrot_kernels.set_workspace_limit(limit)
    x, y = (torch.randn(1, points, 16, requires_grad=True) for _ in "xy")
    out = parrot_kernels.sinkhorn_hadamard(x, y, n_iters=3, backend="cpu")
    (out.cost.sum() + out.y_hadamard.sum()).backward()
    return peak() - before

grown(0, 50)
print(grown(0, 6000), grown(1 << 30, 6000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    """Of a forward and a backward. A matrix of 6000 x 6000 takes 137 MiB."""
    command = [sys.executable, "-c", MEMORY]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    tiled, whole = map(int, done.stdout.split())
    assert tiled < 64 << 20
    assert whole > 300 << 20
