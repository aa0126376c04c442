"""The streaming Triton kernels of sinkhorn_hadamard with small tiles, in the interpreter, against the reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from interpreted import interpreted
from sinkhorn_cases import assert_marginals_of_y
from test_sinkhorn_triton import OUTPUTS, check, launch, points
from tolerances import assert_close

LENGTHS = {
    "x_lengths": torch.tensor([20, 1, 17], dtype=torch.int32),
    "y_lengths": torch.tensor([3, 33, 16], dtype=torch.int32),
}


def streaming(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: in the interpreter, with the streaming forward in the place of the resident one."""

    @functools.wraps(test)
    def run(**arguments):
        from parrot_kernels.triton_kernels import sinkhorn_hadamard, sinkhorn_streaming, sinkhorn_workspace

        tiles = sinkhorn_workspace.Tiles(own=16, other=16, depth=16, features=16, chunk=32, vector=16)
        forward = functools.partial(sinkhorn_streaming.forward, tiles=tiles)
        torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
        try:
            with mock.patch.object(sinkhorn_hadamard, "forward", forward):
                test(**arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    return interpreted(run)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 37, 3), (1, 35, 1, 2), (1, 33, 17, 20), (1, 16, 32, 16)])
@streaming
def test_outputs_at_odd_shapes(shape):
    check(*points(*shape), n_iters=2)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("cost_scale", [None, 2.5])
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine", "matrix"])
@streaming
def test_costs(cost, cost_scale):
    extra = {"cost_matrix": torch.rand(1, 20, 35)} if cost == "matrix" else {"cost": cost}
    check(*points(1, 20, 35, 3), cost_scale=cost_scale, eps=0.1, n_iters=2, **extra)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@streaming
def test_half_precision_inputs(dtype):
    check(*points(1, 20, 35, 5, dtype), n_iters=2)


@streaming
def test_weights_with_zeros():
    a, b = torch.rand(1, 20).softmax(1), torch.rand(1, 35).softmax(1)
    a[0, 3] = b[0, :2] = 0.0
    check(*points(1, 20, 35, 3), a=a, b=b, n_iters=3)


@pytest.mark.parametrize(("rho_x", "rho_y"), [(0.5, 0.5), (0.3, None), (None, 2.0)])
@streaming
def test_unbalanced(rho_x, rho_y):
    check(*points(1, 20, 18, 3), rho_x=rho_x, rho_y=rho_y, a=torch.rand(1, 20), n_iters=3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rho_x", [0.5, None])
@streaming
def test_plan_has_the_marginal_of_y_for_any_eps(rho_x):
    assert_marginals_of_y(functools.partial(launch, rho_x=rho_x), 0.1, ((1, 16, 17), (37, 16, 17)))


@pytest.mark.slow
@streaming
def test_small_and_large_eps():
    eps = torch.tensor([1e-3, 0.3, 10.0])
    check(*points(3, 17, 18, 3), eps=eps, scale=20.0, n_iters=5)  # eps magnifies the rounding of C by 1000


@pytest.mark.slow
@streaming
def test_problems_stop_by_themselves():
    got = check(*points(3, 17, 18, 3), eps=torch.tensor([0.1, 0.5, 5.0]), tol=1e-3, n_iters=20)
    assert len(set(got["iterations"].tolist())) == 3
    assert got["converged"].all()


@streaming
def test_a_problem_that_runs_out_of_iterations_says_so():
    got = check(*points(1, 17, 18, 3), eps=0.01, tol=1e-6, n_iters=2)
    assert got["iterations"].tolist() == [2]
    assert got["converged"].tolist() == [False]


@streaming
def test_lengths():
    check(*points(3, 20, 35, 3), **LENGTHS, n_iters=2)
    extra = {"a": torch.rand(3, 20), "b": torch.rand(3, 35), "rho_x": 1.0, "tol": 1e-4}
    check(*points(3, 20, 35, 3), **LENGTHS, **extra, cost_matrix=torch.rand(3, 20, 35), n_iters=3)


@streaming
def test_empty_problems_give_zeros():
    lengths = {"x_lengths": torch.tensor([0, 5, 20]), "y_lengths": torch.tensor([6, 0, 18])}
    lengths = {name: value.int() for name, value in lengths.items()}
    got = launch(*points(3, 20, 18, 3), **lengths, n_iters=2)
    for name in set(OUTPUTS) - {"scale"}:
        assert torch.all(got[name][:2] == 0), name
        assert torch.isfinite(got[name][2]).all(), name
    assert got["iterations"].tolist() == [0, 0, 2]
    assert got["converged"].tolist()[:2] == [True, True]


@streaming
def test_optional_outputs_change_nothing():
    x, y = points(1, 20, 35, 3)
    full, short = launch(x, y, n_iters=2), launch(x, y, n_iters=2, without=("plan", "f_history", "g_history"))
    for name in set(OUTPUTS) - {"plan"}:
        assert torch.equal(full[name], short[name]), name


@pytest.mark.slow
@streaming
def test_batch_mates_and_padding_change_no_bit():
    x, y = points(3, 20, 35, 3)
    a, b = torch.rand(3, 20), torch.rand(3, 35)
    options = {"tol": 1e-3, "n_iters": 6}
    clean = launch(x, y, a=a, b=b, **LENGTHS, **options)
    past_n = torch.arange(20)[None] >= LENGTHS["x_lengths"][:, None]
    past_m = torch.arange(35)[None] >= LENGTHS["y_lengths"][:, None]
    for rubbish in (math.nan, 1e30):
        x[past_n], y[past_m], a[past_n], b[past_m] = rubbish, rubbish, rubbish, rubbish
        dirty = launch(x, y, a=a, b=b, **LENGTHS, **options)
        for name in (*OUTPUTS, "iterations"):
            assert torch.equal(clean[name], dirty[name]), (name, rubbish)
    for p in range(3):  # alone and without padding: other grids, the same bits
        n, m = (int(LENGTHS[name][p]) for name in LENGTHS)
        one = launch(x[p : p + 1, :n], y[p : p + 1, :m], a=a[p : p + 1, :n], b=b[p : p + 1, :m], **options)
        for name in (*OUTPUTS, "iterations"):
            crop = tuple(slice(size) for size in one[name][0].shape)
            assert torch.equal(clean[name][p][crop], one[name][0]), (name, p)


@streaming
def test_a_nan_stays_in_its_problem():
    x, y = points(2, 20, 18, 3)
    clean = launch(x, y, n_iters=2)
    x[0, 2, 1] = math.nan
    dirty = launch(x, y, n_iters=2)
    assert dirty["y_to_x"][0].isnan().all()
    for name in OUTPUTS:
        assert torch.equal(clean[name][1], dirty[name][1]), name


@streaming
def test_coincident_and_near_points():
    x, _ = points(1, 20, 18, 3)
    check(x, x.clone(), n_iters=3)
    check(x + 1000.0, x + 1000.0 + 0.01 * torch.randn_like(x), n_iters=3)
    check(torch.ones(1, 17, 3), torch.ones(1, 4, 3), n_iters=2)


@streaming
def test_near_points_behind_a_far_origin():
    """Moved to the far outlier, which comes first, the others would all be one point."""
    x, y = points(1, 20, 18, 3)
    want = launch(x[:, 1:], y, cost_scale=1.0, eps=1.0, n_iters=1)
    x[0, 0] = 1e6
    got = launch(x, y, cost_scale=1.0, eps=1.0, n_iters=1)
    # The first f of a row depends on no other row but for the uniform weight.
    assert_close(got["f"][:, 1:], want["f"].double() + math.log(19 / 20), "sinkhorn", "f")


@streaming
def test_strided_inputs():
    x, y = points(2, 20, 18, 4)
    want = launch(x, y, n_iters=2)
    got = launch(x.mT.contiguous().mT, torch.cat([y, y], 2)[..., :4], n_iters=2)
    for name in OUTPUTS:
        assert torch.equal(want[name], got[name]), name


@interpreted
def test_the_op_streams_what_no_program_holds():
    from parrot_kernels.ops.sinkhorn_hadamard import sinkhorn_hadamard

    x, y = points(1, 7, 270, 2)
    got = sinkhorn_hadamard(x, y, n_iters=1, backend="triton")
    want = sinkhorn_hadamard(x.double(), y.double(), n_iters=1, backend="torch")
    for name in ("x_to_y", "y_to_x", "f", "g", "cost"):
        assert torch.allclose(getattr(got, name).double(), getattr(want, name), atol=1e-5), name
