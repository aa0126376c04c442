"""The streaming Triton backward of sinkhorn_hadamard with small tiles, in the interpreter, against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import interpreted
from sinkhorn_cases import CASES, cotangents, op, oracle, problem, to, with_gradients
from tolerances import assert_close

FP32 = torch.float32
GRADIENTS = ("dx", "dy", "da", "db", "dcost", "deps")


def streaming(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: in the interpreter, with the streaming kernels for every size and new memory filled with NaN."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        from parrot_kernels.ops import sinkhorn_hadamard as module
        from parrot_kernels.triton_kernels import sinkhorn_streaming, sinkhorn_streaming_backward, sinkhorn_workspace

        tiles = sinkhorn_workspace.Tiles(own=16, other=16, depth=16, features=16, chunk=32, vector=16)
        kernels = module.Kernels(
            functools.partial(sinkhorn_streaming.forward, tiles=tiles),
            functools.partial(sinkhorn_streaming_backward.backward, tiles=tiles),
        )
        torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
        try:
            with mock.patch.dict(module.KERNELS, triton=kernels):
                test(**arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    return interpreted(run)


def launch(arguments: dict[str, Any], outer: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    return with_gradients(functools.partial(op, backend="triton", **options), arguments, outer)


def compare(arguments: dict[str, Any], gradient: str = "unrolled", scale: float = 1.0) -> dict[str, torch.Tensor]:
    outer = cotangents(arguments)
    got = launch(arguments, outer, gradient=gradient)
    want = with_gradients(functools.partial(oracle, gradient=gradient), to(arguments, torch.float64), outer)
    for name in GRADIENTS:
        if name in got:
            assert_close(got[name], want[name], "sinkhorn_grad", name, scale)
    return got


def compare_with_reference(arguments: dict[str, Any]) -> None:
    """Four times as far from float64 as the reference in float32, at most."""
    outer = cotangents(arguments)
    got, plain = launch(arguments, outer), with_gradients(oracle, arguments, outer)
    want = with_gradients(oracle, to(arguments, torch.float64), outer)
    for name in set(GRADIENTS) & got.keys():
        errors = [(t[name].double() - want[name]).abs().max().item() for t in (got, plain)]
        allowed = 4 * errors[1]
        assert errors[0] <= allowed, f"{name}: {errors[0]:.2e}, the reference {errors[1]:.2e}"


@pytest.mark.sampled(12)
@pytest.mark.parametrize("gradient", ["unrolled", "detached"])
@pytest.mark.parametrize("case", CASES)
@streaming
def test_every_option(case, gradient):
    options = {**CASES[case], "n_iters": 3}
    compare(problem(options, (3 if "lengths" in options else 1, 19, 35, 5), torch.float32), gradient)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 1, 18, 3), (1, 17, 1, 20), (1, 16, 33, 1)], ids=str)
@streaming
def test_sizes(size, cost):
    # From one point the plan is known whatever eps, and what is left of its gradient is a difference of large sums.
    scale = 4.0 if 1 in size[1:3] else 1.0
    compare(problem({"cost": cost, "a": True, "b": True, "n_iters": 2}, size, torch.float32), scale=scale)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("gradient", ["unrolled", "detached"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@streaming
def test_half_precision_inputs(dtype, gradient):
    compare(problem({"n_iters": 2}, (1, 19, 35, 5), dtype), gradient)


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean"])
@streaming
def test_small_eps(cost):
    options = {"cost": cost, "eps": 5e-3, "a": True, "b": True, "n_iters": 6}
    compare(problem(options, (1, 19, 35, 20), FP32))  # with costs from products
    compare_with_reference(problem(options, (1, 19, 35, 3), FP32))  # with costs from differences


@streaming
def test_costs_of_thousands_of_eps():
    """The weights of the plan that a gradient moves along must be those that the last update's sums are of."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(1, size, 17, generator=generator) for size in (6, 16))
    options = {"cost": "sqeuclidean", "cost_scale": 0.7, "eps": 0.02, "reach": (0.7, None), "n_iters": 3}
    compare_with_reference({"x": x, "y": y, **options})


@pytest.mark.slow
@streaming
def test_coincident_and_near_points():
    """The gradient of a distance is 0 at distance 0; near points far from the rest must not cancel."""
    arguments = problem({"n_iters": 3}, (1, 19, 35, 3), FP32)
    arguments["y"][:, :19] = arguments["x"] + 1e-3 * torch.randn(1, 19, 3)
    arguments["y"][:, :4] = arguments["x"][:, :4]
    compare(arguments)
    compare({**arguments, "x": arguments["x"] + 100.0, "y": arguments["y"] + 100.0, "cost": "sqeuclidean"}, scale=4.0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("output", ["x_to_y", "y_hadamard", "f", "plan", "cost"])
@streaming
def test_one_output_alone(output):
    arguments = problem({"n_iters": 2, "a": True, "eps": True}, (1, 17, 18, 3), FP32)
    outer = {output: cotangents(arguments)[output]}
    got, want = launch(arguments, outer), with_gradients(oracle, to(arguments, torch.float64), outer)
    for name in ("dx", "dy", "da", "deps"):
        assert_close(got[name], want[name], "sinkhorn_grad", name)


@pytest.mark.slow
@streaming
def test_batch_mates_and_padding_change_no_bit():
    arguments = problem({"lengths": True, "a": True, "eps": True, "tol": 1e-2, "n_iters": 4}, (3, 20, 35, 3), FP32)
    outer = cotangents(arguments)
    clean = launch(arguments, outer)
    lengths = arguments["x_lengths"], arguments["y_lengths"]
    past = [torch.arange(size)[None] >= length[:, None] for size, length in zip((20, 35), lengths, strict=True)]
    dirty = {**arguments, "x": arguments["x"].masked_fill(past[0][..., None], torch.nan)}
    dirty["y"] = arguments["y"].masked_fill(past[1][..., None], 1e30)
    again = launch(dirty, outer)
    for name in ("dx", "dy", "da", "deps"):
        assert torch.equal(clean[name], again[name]), name
    assert not clean["dx"][past[0]].any()
    assert not clean["dy"][past[1]].any()
    for p in range(2):  # alone and without padding: other grids, the same bits
        n, m = (int(length[p]) for length in lengths)
        crop = {"x": (n,), "y": (m,), "a": (n,), "eps": ()}
        one = {k: v for k, v in arguments.items() if k not in ("x_lengths", "y_lengths")}
        one |= {k: arguments[k][(slice(p, p + 1), *map(slice, size))] for k, size in crop.items()}
        sizes = dict(x_to_y=(m,), y_to_x=(n,), x_hadamard=(n,), y_hadamard=(m,), f=(n,), g=(m,), plan=(n, m), cost=())
        alone = launch(one, {k: t[(slice(p, p + 1), *map(slice, sizes[k]))] for k, t in outer.items()})
        for name in ("dx", "dy", "da", "deps"):
            inside = tuple(slice(size) for size in alone[name][0].shape)
            assert torch.equal(clean[name][p][inside], alone[name][0]), (name, p)


@interpreted
def test_the_op_streams_gradients_of_what_no_program_holds():
    arguments = problem({"n_iters": 1}, (1, 3, 270, 2), FP32)
    outer = cotangents(arguments)
    got, want = launch(arguments, outer), with_gradients(oracle, to(arguments, torch.float64), outer)
    for name in ("dx", "dy"):
        assert_close(got[name], want[name], "sinkhorn_grad", name)


@interpreted
def test_other_gradients_are_refused():
    from parrot_kernels.ops.sinkhorn_hadamard import DIFFERENTIABLE
    from parrot_kernels.triton_kernels.sinkhorn_streaming_backward import backward

    x = torch.zeros(1, 2, 3)
    names = ("a", "b", "x_lengths", "y_lengths", "cost_matrix", "rho_x", "rho_y", "f_history", "g_history")
    names += ("dx", "dy", "dcost_matrix", "da", "db", "deps", *(f"grad_{name}" for name in DIFFERENTIABLE))
    given = {"x": x, "y": x, "eps": x[0, 0], "f": x, "g": x, "scale": x, "iterations": x, "cost": "euclidean"}
    with pytest.raises(ValueError, match="implicit"):
        backward(**dict.fromkeys(names), **given, gradient="implicit")
