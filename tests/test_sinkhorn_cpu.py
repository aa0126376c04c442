"""The compiled CPU kernel of sinkhorn_hadamard, called directly, against the reference in float64.

Each test runs twice: with matrices that are kept, and tile by tile, as beyond the workspace limit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sinkhorn_cases import CASES, OP, problem
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import native
from parrot_kernels.reference import sinkhorn_hadamard as reference

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")

FP32, FP64 = torch.float32, torch.float64
TINY = torch.finfo(FP32).tiny


def launch_arguments(x: Tensor, y: Tensor, **given: Any) -> dict[str, Any]:
    """The launch contract's inputs and options from the op's arguments."""
    wide = FP64 if x.dtype == FP64 else FP32
    cost, reach, eps = given.get("cost", "euclidean"), given.get("reach"), given.get("eps", 0.05)
    pair = reach if isinstance(reach, tuple) else (reach, reach)
    power = 2 if isinstance(cost, str) and cost == "sqeuclidean" else 1
    rho_x, rho_y = (None if r is None else r**power for r in pair)
    lengths = {f"{side}_lengths": given.get(f"{side}_lengths") for side in "xy"}
    return {
        "x": x,
        "y": y,
        "a": given.get("a"),
        "b": given.get("b"),
        **{n: t if t is None else t.int() for n, t in lengths.items()},
        "cost_matrix": cost if isinstance(cost, Tensor) else None,
        "eps": eps if isinstance(eps, Tensor) else torch.full((len(x),), eps, dtype=wide),
        "cost": "matrix" if isinstance(cost, Tensor) else cost,
        "cost_scale": given.get("cost_scale"),
        "n_iters": given.get("n_iters", 50),
        "tol": given.get("tol"),
        "rho_x": rho_x,
        "rho_y": rho_y,
    }


def allocate(arguments: dict[str, Any], histories: bool = True) -> dict[str, Tensor]:
    x, y, steps = arguments["x"], arguments["y"], arguments["n_iters"]
    (batch, n, dim), m = x.shape, y.shape[1]
    wide = FP64 if x.dtype == FP64 else FP32
    shapes = {
        "x_to_y": (batch, m, dim),
        "y_to_x": (batch, n, dim),
        "x_hadamard": (batch, n, dim),
        "y_hadamard": (batch, m, dim),
        "f": (batch, n),
        "g": (batch, m),
        "plan": (batch, n, m),
        "f_history": (batch, steps, n),
        "g_history": (batch, steps, m),
        **dict.fromkeys(("transport_cost", "error", "scale"), (batch,)),
    }
    # NaN: what the kernel must write, it must write.
    out = {name: torch.full(s, torch.nan, dtype=x.dtype if len(s) == 3 else wide) for name, s in shapes.items()}
    for name in ("plan", "f_history", "g_history"):
        out[name] = out[name].to(wide)
    if not histories:
        out["f_history"] = out["g_history"] = None
    return out | {
        "iterations": torch.full((batch,), -1, dtype=torch.int32),
        "converged": torch.ones(batch, dtype=torch.bool),
    }


@pytest.fixture(autouse=True, params=[1 << 30, 0], ids=["kept", "tiled"])
def workspace_limit(request):
    before = native.workspace_limit()
    native.set_workspace_limit(request.param)
    yield
    native.set_workspace_limit(before)


def launch(arguments: dict[str, Any], out: dict[str, Tensor]) -> None:
    native.call_cpu(f"{OP}_forward", **arguments, **out, workspace_limit=native.workspace_limit())


def forward(histories: bool = True, **given: Any) -> dict[str, Tensor]:
    arguments = launch_arguments(**given)
    out = allocate(arguments, histories)
    launch(arguments, out)
    return out


def expected(**given: Any) -> dict[str, Tensor]:
    """The reference in float64, with the floor that weights have in float32."""
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()}
    for name in ("a", "b"):
        if wide.get(name) is not None:
            wide[name] = wide[name].clamp(min=TINY)
    arguments = launch_arguments(**wide)
    out = allocate(arguments)
    reference.forward(**arguments, **out)
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


def points(batch: int, n: int, m: int, dim: int, dtype: torch.dtype = FP32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=generator, dtype=FP64)
    y = torch.randn(batch, m, dim, generator=generator, dtype=FP64) + 0.3
    return {"x": x.to(dtype), "y": y.to(dtype)}


# The larger ones have several blocks of rows, and several tiles on both sides.
SIZES = [
    (1, 1, 1, 1), (2, 1, 9, 3), (2, 9, 1, 3), (3, 7, 13, 1), (2, 32, 32, 120), (2, 33, 31, 768), (1, 129, 257, 20),
    (1, 333, 101, 17), (1, 17, 20, 3840),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, FP64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_option(case, dtype):
    assert_matches(problem(case, (4, 19, 23, 5), dtype))


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
    """The densities there are beyond float32: the kernel has to fall back to log-domain steps."""
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


def test_a_column_whose_small_entries_add_up():
    """All but one of its entries are below the least normal number; together they are a quarter of its sum."""
    cost = torch.zeros(1, 20, 30)
    cost[0, :, -1] = 0.5 - math.log(TINY)
    cost[0, 0, -1] -= 4.0
    given = {**points(1, 20, 30, 3), "a": torch.ones(1, 20), "cost": cost, "cost_scale": 1.0, "eps": 1.0}
    assert_matches({**given, "n_iters": 3}, scale=20)  # potentials of 80


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
def test_coincident_and_equal_points(cost):
    given = points(1, 40, 30, 17)
    coincident = {"x": given["x"], "y": given["x"][:, :30].clone(), "cost": cost, "eps": 0.002}
    assert_matches(coincident, scale=10)
    assert_matches({"x": torch.full_like(given["x"], 3.0), "y": torch.full_like(given["y"], 3.0), "cost": cost})


def test_nearby_points_far_from_the_origin():
    """|x|^2 + |y|^2 - 2 <x, y> alone would have no digit left."""
    grid = torch.arange(40 * 20).view(1, 40, 20) % 7 / 16  # exact beside 4096
    given = {"x": grid[:, :25] + 4096, "y": grid[:, 25:] + 4096, "cost": "sqeuclidean"}
    want = expected(**given)
    assert_close(forward(**given)["scale"], want["scale"], "sinkhorn", "scale")
    assert_matches(given)


def test_any_strides():
    plain = points(2, 20, 30, 8)
    matrix = torch.rand(2, 20, 30)
    strided = {
        "x": plain["x"].mT.contiguous().mT,
        "y": torch.stack([plain["y"], plain["y"]], 3)[..., 0],
        "cost": matrix.transpose(0, 2).contiguous().transpose(0, 2),
    }
    arguments = launch_arguments(**strided)
    out = allocate(arguments)
    out = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in out.items()}
    launch(arguments, out)
    want = forward(**plain, cost=matrix)
    assert all(torch.equal(out[n], want[n]) for n in want)


# Small, shared by threads, with refreshes in many iterations, and with each thread's own points and without.
INVARIANCE = {
    "small": {**points(5, 21, 34, 6), "eps": 0.1},
    "own points": {**points(2, 100, 130, 40), "cost": "sqeuclidean"},
    "own points, cosine": {**points(2, 100, 130, 40), "cost": "cosine"},
    "common points": {**points(2, 230, 300, 130), "n_iters": 5},
    "shared": {**points(3, 230, 300, 6), "n_iters": 20},
    "refreshing": {**points(3, 230, 300, 3), "n_iters": 20, "eps": 1e-3, "cost": "sqeuclidean"},
    "log domain": {**points(3, 230, 300, 3), "n_iters": 5, "a": torch.full((3, 230), 1e9)},
    "unbalanced": {**points(3, 230, 300, 6), "n_iters": 20, "reach": 0.4, "tol": 1e-3},
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", INVARIANCE)
def test_bits_depend_on_nothing_but_the_problem(case, threads):
    """Neither on the number of threads, nor on the batch, the run, or whether histories are kept."""
    given = INVARIANCE[case]
    threads(1)
    want = forward(**given)
    for count in (1, 2, 3, 4):
        threads(count)
        got = forward(**given)
        for name in want.keys() - {"f_history", "g_history"} if "tol" in given else want:
            assert torch.equal(got[name], want[name]), (name, count)
    without = forward(histories=False, **given)
    alone = forward(**{n: t[1:2] if isinstance(t, Tensor) else t for n, t in given.items()})
    for name in want.keys() - {"f_history", "g_history"}:
        assert torch.equal(without[name], want[name]), name
        assert torch.equal(alone[name][0], want[name][1]), name


@pytest.mark.parametrize("sizes", [(3, 21, 34, 6), (2, 100, 70, 20), (2, 230, 300, 6)], ids=str)
def test_padding_reaches_nothing(sizes):
    batch, n, m, dim = sizes
    plain = points(*sizes)
    a, b = torch.rand(batch, n) / n, torch.rand(batch, m) / m
    want = forward(**plain, a=a, b=b, n_iters=20)
    pad = (7, 19)

    def padded(t: Tensor, size: int, dim: int) -> Tensor:
        shape = list(t.shape)
        shape[dim] = size
        return torch.cat([t, torch.full(shape, torch.nan)], dim)

    got = forward(
        x=padded(plain["x"], pad[0], 1),
        y=padded(plain["y"], pad[1], 1),
        a=padded(a, pad[0], 1),
        b=padded(b, pad[1], 1),
        x_lengths=torch.full((batch,), n),
        y_lengths=torch.full((batch,), m),
        n_iters=20,
    )
    for name, value in got.items():
        for dim, size in enumerate(want[name].shape):
            assert not value.narrow(dim, size, value.shape[dim] - size).any(), f"{name}: padding is not zero"
            value = value.narrow(dim, 0, size)
        assert torch.equal(value, want[name]), name


def test_nan_stays_in_its_problem():
    given = points(3, 20, 30, 5)
    want = forward(**given)
    given["x"][1, 3, 2] = torch.nan
    got = forward(**given)
    for name in want:
        assert torch.equal(got[name][::2], want[name][::2]), name
    assert got["y_to_x"][1].isnan().any()
