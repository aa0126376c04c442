"""The Triton kernel of sinkhorn_hadamard, run by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import interpreted
from tolerances import assert_close
from torch import Tensor

OUTPUTS = ("x_to_y", "y_to_x", "x_hadamard", "y_hadamard", "f", "g", "plan", "transport_cost", "error", "scale")


def launch(x: Tensor, y: Tensor, without: tuple[str, ...] = (), **options: Any) -> dict[str, Tensor]:
    """Run the kernel on (B, N, D) and (B, M, D) with outputs that start as NaN, `without` some of them."""
    from parrot_kernels.triton_kernels import sinkhorn_hadamard

    (B, N, _), M = x.shape, y.shape[1]
    inputs = dict.fromkeys(("a", "b", "x_lengths", "y_lengths", "cost_matrix", "tol", "rho_x", "rho_y", "cost_scale"))
    inputs |= {"x": x, "y": y, "eps": 0.05, "cost": "euclidean", "n_iters": 20} | options
    if inputs["cost_matrix"] is not None:
        inputs["cost"] = "matrix"
    if not isinstance(inputs["eps"], Tensor):
        inputs["eps"] = torch.full((B,), inputs["eps"])
    K = inputs["n_iters"]
    outputs = {name: torch.full_like(like, math.nan, memory_format=torch.contiguous_format) for name, like in (
        ("x_to_y", y), ("y_to_x", x), ("x_hadamard", x), ("y_hadamard", y))}  # fmt: skip
    shapes = {"f": (B, N), "g": (B, M), "plan": (B, N, M), "f_history": (B, K, N), "g_history": (B, K, M)}
    shapes |= dict.fromkeys(("transport_cost", "error", "scale"), (B,))
    outputs |= {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
    outputs |= {"iterations": torch.full((B,), -1, dtype=torch.int32), "converged": torch.zeros(B, dtype=torch.bool)}
    outputs |= dict.fromkeys(without)
    sinkhorn_hadamard.forward(**inputs, **outputs)
    return outputs


def reference(x: Tensor, y: Tensor, **options: Any) -> dict[str, Tensor]:
    """One problem without padding, (N, D) and (M, D), in float64 by the reference; float32's floor of the weights."""
    from parrot_kernels.reference import sinkhorn_hadamard

    inputs = {"eps": 0.05, "n_iters": 20, "x": x, "y": y} | options
    inputs |= {name: inputs[name].clamp(min=torch.finfo(torch.float32).tiny) for name in ("a", "b") if name in inputs}
    inputs["eps"] = torch.as_tensor(inputs["eps"])
    inputs = {name: v.double()[None] if isinstance(v, Tensor) else v for name, v in inputs.items()}
    if "cost_matrix" in inputs:
        inputs["cost"] = "matrix"
    history = []
    result = sinkhorn_hadamard.sinkhorn_hadamard(**inputs, record=lambda k, f, g: history.append((f[0], g[0])))
    f_history, g_history = (torch.stack(potentials) for potentials in zip(*history, strict=True))
    found = {name: value[0] for name, value in result._asdict().items()}
    return found | {"f_history": f_history, "g_history": g_history}


def check(x: Tensor, y: Tensor, scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Launch a batch and compare every problem with the reference on its valid part; what pads it must be zero."""
    got = launch(x, y, **options)
    for p in range(len(x)):
        n, m = (
            int(options[name][p]) if name in options else points.shape[1]
            for name, points in (("x_lengths", x), ("y_lengths", y))
        )
        crop = {"a": (slice(n),), "b": (slice(m),), "cost_matrix": (slice(n), slice(m)), "eps": ()}
        one = {name: value for name, value in options.items() if name not in ("x_lengths", "y_lengths")}
        one |= {k: options[k][p][where] for k, where in crop.items() if isinstance(options.get(k), Tensor)}
        want = reference(x[p, :n], y[p, :m], **one)
        assert got["iterations"][p] == want["iterations"]
        assert got["converged"][p] == want["converged"]
        steps = int(want["iterations"])
        for name in (*OUTPUTS, "f_history", "g_history"):
            value = got[name][p][:steps] if "history" in name else got[name][p]
            inside = tuple(slice(size) for size in want[name].shape)
            assert_close(value[inside], want[name], "sinkhorn", f"{name}, problem {p}", scale)
            outside = torch.ones_like(value, dtype=torch.bool)
            outside[inside] = False
            assert torch.all(value[outside] == 0), f"{name}, problem {p}: padding is not zero"
    return got


def points(B: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(B, N, D).to(dtype), torch.randn(B, M, D).to(dtype)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 5, 3), (1, 6, 1, 2), (3, 7, 13, 5), (1, 33, 17, 4), (1, 16, 130, 2)]
)
@interpreted
def test_outputs_at_odd_shapes(shape):
    check(*points(*shape))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("cost_scale", [None, 2.5])
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine", "matrix"])
@interpreted
def test_costs(cost, cost_scale):
    extra = {"cost_matrix": torch.rand(2, 9, 6)} if cost == "matrix" else {"cost": cost}
    check(*points(2, 9, 6, 3), cost_scale=cost_scale, eps=0.1, **extra)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@interpreted
def test_half_precision_inputs(dtype):
    check(*points(2, 9, 11, 5, dtype))


@interpreted
def test_weights_with_zeros():
    a, b = torch.rand(2, 9).softmax(1), torch.rand(2, 6).softmax(1)
    a[0, 3] = b[0, :2] = 0.0
    check(*points(2, 9, 6, 3), a=a, b=b)


@interpreted
def test_weights_that_do_not_sum_to_one():
    check(*points(2, 9, 6, 3), a=torch.rand(2, 9) + 0.5, b=torch.rand(2, 6) + 0.5)


@interpreted
def test_eps_per_problem():
    check(*points(3, 9, 6, 3), eps=torch.tensor([0.02, 0.3, 10.0]), scale=10.0)  # f and g round in units of eps


@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 1.0, 10.0])
@interpreted
def test_any_eps(eps):
    """At small eps K is set anew in many iterations. The rounding of C counts 1 / eps times, f and g round in eps."""
    check(*points(1, 9, 12, 3), eps=eps, cost="sqeuclidean", scale=max(0.05 / eps, eps, 1.0))


@interpreted
def test_half_steps_with_a_kernel_matrix_each():
    """What weights near zero on both sides ask for: first of every problem, then of one that needs it."""
    from parrot_kernels.triton_kernels import sinkhorn_resident

    with mock.patch.object(sinkhorn_resident, "LARGEST_SCALING", 1.5):
        check(*points(2, 9, 7, 3))
    a, b = torch.rand(1, 9).softmax(1), torch.rand(1, 7).softmax(1)
    a[0, :4], b[0, :4] = torch.tensor([0.0, 1e-30, 1e-12, 1e-6]), torch.tensor([1e-36, 1e-25, 0.0, 1e-5])
    for reach in ({}, {"rho_x": 0.5, "rho_y": 0.3}):
        check(*points(1, 9, 7, 3), a=a, b=b, eps=0.02, scale=4.0, **reach)


@pytest.mark.parametrize("eps", [1e-3, 0.05])
@interpreted
def test_the_largest_tiles_step_in_the_log_domain(eps):
    from parrot_kernels.triton_kernels import sinkhorn_hadamard

    with mock.patch.object(sinkhorn_hadamard, "MAX_ABSORBED", 0):
        check(*points(2, 9, 6, 3), eps=eps, scale=max(1.0, 0.02 / eps))


@pytest.mark.parametrize(("rho_x", "rho_y"), [(0.5, 0.5), (0.3, None), (None, 2.0)])
@interpreted
def test_unbalanced(rho_x, rho_y):
    check(*points(2, 9, 6, 3), rho_x=rho_x, rho_y=rho_y)


@interpreted
def test_problems_stop_by_themselves():
    got = check(*points(3, 9, 6, 3), eps=torch.tensor([0.05, 0.5, 5.0]), tol=1e-4, n_iters=60)
    assert len(set(got["iterations"].tolist())) == 3
    assert got["converged"].all()


@interpreted
def test_a_problem_that_runs_out_of_iterations_says_so():
    got = check(*points(1, 9, 6, 3), eps=0.01, tol=1e-6, n_iters=3)
    assert got["iterations"].tolist() == [3]
    assert got["converged"].tolist() == [False]


LENGTHS = {
    "x_lengths": torch.tensor([9, 4, 1], dtype=torch.int32),
    "y_lengths": torch.tensor([2, 6, 1], dtype=torch.int32),
}


@interpreted
def test_lengths():
    check(*points(3, 9, 6, 3), **LENGTHS)
    check(*points(3, 9, 6, 3), **LENGTHS, a=torch.rand(3, 9), b=torch.rand(3, 6), rho_x=1.0, tol=1e-4)
    check(*points(3, 9, 6, 3), **LENGTHS, cost_matrix=torch.rand(3, 9, 6))


@interpreted
def test_empty_problems_give_zeros():
    lengths = {"x_lengths": torch.tensor([0, 5, 9]), "y_lengths": torch.tensor([6, 0, 6])}
    lengths = {name: value.int() for name, value in lengths.items()}
    got = launch(*points(3, 9, 6, 3), **lengths)
    for name in set(OUTPUTS) - {"scale"}:
        assert torch.all(got[name][:2] == 0), name
        assert torch.isfinite(got[name][2]).all(), name
    assert got["iterations"].tolist() == [0, 0, 20]
    assert got["converged"].tolist()[:2] == [True, True]


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 3), (2, 4, 0, 3), (1, 4, 3, 0)])
@interpreted
def test_empty_tensors(shape):
    got = launch(*points(*shape))
    for name in set(OUTPUTS) - {"scale"}:
        assert torch.isfinite(got[name]).all(), name


@interpreted
def test_optional_outputs_change_nothing():
    x, y = points(2, 9, 6, 3)
    full, short = launch(x, y), launch(x, y, without=("plan", "f_history", "g_history"))
    for name in set(OUTPUTS) - {"plan"}:
        assert torch.equal(full[name], short[name]), name


@pytest.mark.slow
@interpreted
def test_batch_mates_and_padding_change_no_bit():
    x, y = points(3, 9, 6, 3)
    a, b = torch.rand(3, 9), torch.rand(3, 6)
    clean = launch(x, y, a=a, b=b, **LENGTHS, tol=1e-3, n_iters=10)
    past_n = torch.arange(9)[None] >= LENGTHS["x_lengths"][:, None]
    past_m = torch.arange(6)[None] >= LENGTHS["y_lengths"][:, None]
    for rubbish in (math.nan, math.inf, 1e30):
        x[past_n], y[past_m], a[past_n], b[past_m] = rubbish, rubbish, rubbish, rubbish
        dirty = launch(x, y, a=a, b=b, **LENGTHS, tol=1e-3, n_iters=10)
        for p in range(3):
            one = {name: value[p : p + 1] for name, value in ({"a": a, "b": b} | LENGTHS).items()}
            alone = launch(x[p : p + 1], y[p : p + 1], **one, tol=1e-3, n_iters=10)
            for name in (*OUTPUTS, "iterations"):
                assert torch.equal(clean[name][p], dirty[name][p]), (name, p, rubbish)
                assert torch.equal(clean[name][p], alone[name][0]), (name, p, rubbish)


@interpreted
def test_a_nan_stays_in_its_problem():
    x, y = points(2, 9, 6, 3)
    clean = launch(x, y)
    x[0, 2, 1] = math.nan
    dirty = launch(x, y)
    assert dirty["y_to_x"][0].isnan().all()
    for name in OUTPUTS:
        assert torch.equal(clean[name][1], dirty[name][1]), name


@interpreted
def test_coincident_and_near_points():
    x, _ = points(1, 9, 6, 3)
    check(x, x.clone())
    check(x + 1000.0, x + 1000.0 + 0.01 * torch.randn_like(x))
    check(torch.ones(1, 5, 3), torch.ones(1, 4, 3))


@interpreted
def test_one_far_outlier():
    x, y = points(1, 9, 6, 3)
    x[0, 4] = 1e6
    got = launch(x, y)
    for name in OUTPUTS:
        assert torch.isfinite(got[name]).all(), name


@interpreted
def test_strided_inputs():
    x, y = points(2, 9, 6, 4)
    want = launch(x, y)
    got = launch(x.mT.contiguous().mT, torch.cat([y, y], 2)[..., :4])
    for name in OUTPUTS:
        assert torch.equal(want[name], got[name]), name


@interpreted
def test_sizes_beyond_the_registers_are_refused():
    from parrot_kernels.triton_kernels import sinkhorn_hadamard

    assert sinkhorn_hadamard.why_not(128, 128) is None
    assert sinkhorn_hadamard.why_not(256, 64) is None
    for N, M in ((129, 128), (257, 1), (256, 65)):
        assert "at most" in sinkhorn_hadamard.why_not(N, M)
    with pytest.raises(ValueError, match="129 x 128"):
        launch(*points(1, 129, 128, 1))
