"""The CUDA backward of sinkhorn_hadamard, run thread by thread on the host, against the reference in float64."""

from __future__ import annotations

from typing import Any

import cuda_emulated
import pytest
import torch
from sinkhorn_cases import CASES, problem
from test_sinkhorn_cpu import FP32, FP64, launch_arguments, points
from test_sinkhorn_cpu_backward import MODES, assert_matches, cotangents, run, weighted
from torch import Tensor

from parrot_kernels import native
from parrot_kernels.ops.sinkhorn_hadamard import DIFFERENTIABLE


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The extension's CUDA functions are those of the emulation."""
    module = cuda_emulated.module()
    monkeypatch.setattr(native, "extension", lambda: module)
    monkeypatch.setattr(native, "call_cuda", lambda function, _, **arguments: cuda_emulated.call(function, **arguments))
    return module


def check(given: dict[str, Any], scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    return assert_matches(given, scale, kernels="cuda", **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("dtype", [FP32, FP64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_option(case, dtype, gradient):
    check(problem(case, (4, 19, 23, 5), dtype), gradient=gradient)


# Numbers of rows and columns that a thread may hold in registers, and some that go through the workspace.
SIZES = [
    (1, 1, 1, 1), (2, 1, 9, 3), (2, 9, 1, 3), (3, 7, 13, 1), (2, 33, 31, 20), (1, 10, 50, 150), (1, 60, 100, 6),
    (1, 9, 140, 3), (1, 70, 40, 3), (1, 100, 100, 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype):
    # What eps does to the plan is a difference of large sums; the cost of parallel vectors is rounding alone.
    scale = 20.0 if 1 in size[1:3] else 10.0 if size[3] > 100 else 1.0
    for cost in ("euclidean", "cosine") if size[1] < 50 else ("sqeuclidean",):
        check(weighted({**points(*size, dtype), "cost": cost, "n_iters": 8}), scale)


@pytest.mark.parametrize("reach", [None, 0.3, (None, 0.1)], ids=str)
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0, 10.0])
def test_any_eps_in_double_precision(eps, reach):
    given = {**points(1, 40, 30, 17, FP64), "cost": "sqeuclidean", "eps": eps, "reach": reach, "n_iters": 30}
    check(weighted(given), scale=max(1.0, 0.02 / eps))


@pytest.mark.parametrize("eps", [0.05, 0.005])
def test_weights_of_zero(eps):
    given = {**weighted(points(2, 40, 30, 5)), "eps": eps, "n_iters": 20}
    given["a"][:, ::4] = given["b"][:, ::4] = 0
    check(given, scale=max(1.0, 0.05 / eps))


def test_point_without_mass_beside_points_without_mass():
    """The densities there are beyond float32: the kernel has to fall back to log-domain steps."""
    given = {**points(1, 12, 12, 2), "eps": 0.004, "n_iters": 20}
    given["x"][0, 0] = given["y"][0, 0] = 30.0
    given["a"] = given["b"] = torch.tensor([[0.0] + [1 / 11] * 11])
    check(given, scale=20)


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
def test_coincident_equal_and_zero_points(cost):
    given = points(1, 40, 30, 17)
    check({"x": given["x"], "y": given["x"][:, :30].clone(), "cost": cost, "eps": 0.05}, scale=4)
    given["x"][:, 2] = given["y"][:, 1] = 0
    check({**given, "cost": cost})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("gradient", MODES)
def test_one_gradient_at_a_time(name, gradient):
    for needed in (("dx",), ("dy", "da"), ("dx", "dy", "deps")):
        check(weighted(points(2, 20, 30, 5)), gradient=gradient, keep=(name,), needed=needed)


@pytest.mark.parametrize("sizes", [(37, 30), (37, 110), (80, 20)], ids=str)
def test_bits_depend_on_nothing_but_the_problem(sizes):
    """Neither on the batch, nor on the size it is padded to, nor on what the padding holds; which gets zeros."""
    n, m = sizes
    given = weighted(points(2, n, m, 6))

    def gradients(outer: dict[str, Tensor], **problems: Any) -> dict[str, Tensor]:
        return run("cuda", launch_arguments(**problems, n_iters=9), outer)

    outer = cotangents(launch_arguments(**given, n_iters=9))
    want = gradients(outer, **given)
    alone = gradients({k: t[1:] for k, t in outer.items()}, **{k: t[1:] for k, t in given.items()})
    for name, value in alone.items():
        assert torch.equal(value[0], want[name][1]), name

    more = {n: n + 60, m: m + 30}

    def padded(t: Tensor) -> Tensor:
        for dim, size in enumerate(t.shape[1:], 1):
            if size in more:
                shape = list(t.shape)
                shape[dim] = more[size] - size
                t = torch.cat([t, torch.full(shape, torch.nan)], dim)
        return t

    lengths = {"x_lengths": torch.full((2,), n), "y_lengths": torch.full((2,), m)}
    got = gradients({k: padded(t) for k, t in outer.items()}, **{k: padded(t) for k, t in given.items()}, **lengths)
    for name, value in got.items():
        for dim, size in enumerate(want[name].shape):
            assert not value.narrow(dim, size, value.shape[dim] - size).any(), f"{name}: padding is not zero"
            value = value.narrow(dim, 0, size)
        assert torch.equal(value, want[name]), name


def test_nan_stays_in_its_problem():
    given = weighted(points(3, 20, 30, 5))
    outer = cotangents(launch_arguments(**given))
    want = run("cuda", launch_arguments(**given), outer)
    given["x"][1, 3, 2] = torch.nan
    got = run("cuda", launch_arguments(**given), outer)
    for name in want:
        assert torch.equal(got[name][::2], want[name][::2]), name
    assert got["dy"][1].isnan().any()


def test_strides():
    given = weighted(points(2, 20, 30, 5))
    outer = cotangents(launch_arguments(**given))

    def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t.repeat_interleave(2, -1)[..., ::2] for k, t in tensors.items()}

    want, got = run("cuda", launch_arguments(**given), outer), run("cuda", launch_arguments(**spread(given)), outer)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_which_problems_need_a_workspace(emulated):
    assert not emulated.sinkhorn_hadamard_needs_workspace(N=64, M=128, wide=False)
    assert not emulated.sinkhorn_hadamard_needs_workspace(N=64, M=64, wide=True)
    assert emulated.sinkhorn_hadamard_needs_workspace(N=65, M=10, wide=False)
    assert emulated.sinkhorn_hadamard_needs_workspace(N=64, M=65, wide=True)


def test_implicit_is_the_reference():
    """Solved as one dense linear system by PyTorch, whatever the backend."""
    given = weighted(points(1, 9, 8, 3))
    arguments = launch_arguments(**given)
    outer = cotangents(arguments)
    got, want = (run(kernels, arguments, outer, gradient="implicit") for kernels in ("cuda", "torch"))
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-2, atol=1e-3), name
