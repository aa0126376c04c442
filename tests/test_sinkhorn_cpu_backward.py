"""The compiled CPU backward of sinkhorn_hadamard, called directly, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sinkhorn_cases import CASES, problem
from test_sinkhorn_cpu import FP32, FP64, TINY, allocate, launch_arguments, points
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import native
from parrot_kernels.ops.sinkhorn_hadamard import DIFFERENTIABLE, KERNELS

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")

INPUTS = ("x", "y", "cost_matrix", "a", "b", "eps")
GRADIENTS = tuple(f"d{name}" for name in INPUTS)
MODES = ("unrolled", "detached")


def cotangents(arguments: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of the outputs, in the outputs' dtypes."""
    generator = torch.Generator().manual_seed(seed)
    x = arguments["x"]
    wide = FP64 if x.dtype == FP64 else FP32
    (batch, n, dim), m = x.shape, arguments["y"].shape[1]
    shapes = dict(x_to_y=(batch, m, dim), y_to_x=(batch, n, dim), x_hadamard=(batch, n, dim), f=(batch, n))
    shapes |= dict(y_hadamard=(batch, m, dim), g=(batch, m), plan=(batch, n, m), transport_cost=(batch,))
    return {
        name: torch.randn(shapes[name], generator=generator, dtype=FP64).to(x.dtype if dim in shapes[name] else wide)
        for name in DIFFERENTIABLE
    }


def run(
    kernels: str,
    arguments: dict[str, Any],
    given: dict[str, Tensor | None],
    needed: tuple[str, ...] = GRADIENTS,
    gradient: str = "unrolled",
) -> dict[str, Tensor]:
    """The forward and the backward of a backend; what the backward must write it finds filled with NaN."""
    out = allocate(arguments)
    KERNELS[kernels].forward(**arguments, **out)
    forward_only = ("cost_scale", "n_iters", "tol")
    inputs = {n: v for n, v in arguments.items() if n not in forward_only}
    saved = {n: out[n] for n in ("f", "g", "scale", "iterations", "f_history", "g_history")}
    if gradient == "detached":
        saved["f_history"] = saved["g_history"] = None
    results = {
        f"d{name}": torch.full_like(arguments[name], torch.nan, memory_format=torch.contiguous_format)
        if arguments[name] is not None and f"d{name}" in needed
        else None
        for name in INPUTS
    }
    grads = {f"grad_{name}": given.get(name) for name in DIFFERENTIABLE}
    KERNELS[kernels].backward(**inputs, gradient=gradient, **saved, **grads, **results)
    return {name: t for name, t in results.items() if t is not None}


def widen(arguments: dict[str, Any]) -> dict[str, Any]:
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
    for name in ("a", "b"):
        if wide[name] is not None and arguments["x"].dtype != FP64:  # the floor that weights have in float32
            wide[name] = wide[name].clamp(min=TINY)
    return wide


def assert_matches(
    given: dict[str, Any],
    scale: float = 1.0,
    gradient: str = "unrolled",
    keep: tuple[str, ...] = DIFFERENTIABLE,
    kernels: str = "cpu",
    needed: tuple[str, ...] = GRADIENTS,
) -> dict[str, Tensor]:
    arguments = launch_arguments(**given)
    outer = {n: t for n, t in cotangents(arguments).items() if n in keep}
    got = run(kernels, arguments, outer, needed, gradient)
    want = run("torch", widen(arguments), widen({"x": arguments["x"], "a": None, "b": None} | outer), gradient=gradient)
    for name in ("a", "b"):  # zero where the weight is below the floor, which float64 does not see
        if arguments[name] is not None:
            want[f"d{name}"] = want[f"d{name}"].masked_fill(arguments[name] < TINY, 0)
    for name, value in got.items():
        # Of sums that cancel, each 1 / eps times as large: PyTorch's own rounding is as far off.
        assert_close(value, want[name], "sinkhorn_grad", name, 4 * scale if name == "deps" else scale)
    return got


def weighted(given: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    for name, side in (("a", "x"), ("b", "y")):
        weights = 0.2 + torch.rand(given[side].shape[:2], generator=generator, dtype=FP64)
        given[name] = (weights / weights.sum(1, keepdim=True)).to(FP64 if given["x"].dtype == FP64 else FP32)
    return given


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("dtype", [FP32, FP64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_option(case, dtype, gradient):
    assert_matches(problem(case, (4, 19, 23, 5), dtype), gradient=gradient)


SIZES = [
    (1, 1, 1, 1), (2, 1, 9, 3), (2, 9, 1, 3), (3, 7, 13, 1), (2, 32, 32, 120), (2, 33, 31, 768), (1, 129, 257, 20),
    (1, 17, 20, 3840), (2, 25, 29, 5),
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
    given = {**points(1, 40, 30, 17, FP64), "cost": "sqeuclidean", "eps": eps, "reach": reach, "n_iters": 60}
    assert_matches(weighted(given), scale=max(1.0, 0.02 / eps))
