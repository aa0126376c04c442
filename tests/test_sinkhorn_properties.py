"""Properties of entropic transport that hold whatever the points, weights and regularisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import backends
from parrot_kernels.ops.sinkhorn_hadamard import SinkhornHadamardOutput, sinkhorn_hadamard

FP64 = torch.float64
COSTS = ("euclidean", "sqeuclidean", "cosine")
PER_ROW, PER_COLUMN = ("y_to_x", "x_hadamard", "f"), ("x_to_y", "y_hadamard", "g")

examples = settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
served = [b for b in ("torch", "cpu") if b == "torch" or FP64 in backends.IMPLEMENTED["sinkhorn_hadamard"].get(b, ())]
on_every_cpu_backend = pytest.mark.parametrize("backend", served)


@st.composite
def problems(
    draw: st.DrawFn, costs: tuple[str, ...] = COSTS, smallest_eps: float = 0.02, zero_weights: bool = True
) -> dict[str, Any]:
    """A batch of balanced problems: points at any scale, some of them equal, weights some of which may be zero."""
    batch, n, m, dim = (draw(st.integers(1, top)) for top in (3, 12, 12, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def points(rows: int) -> Tensor:
        cloud = torch.randn(batch, rows, dim, generator=generator, dtype=FP64)
        if draw(st.booleans()):
            cloud[:, rows // 2] = cloud[:, 0]
        return scale * cloud

    def weights(rows: int) -> Tensor:
        values = torch.rand(batch, rows, generator=generator, dtype=FP64) + 0.05
        if zero_weights and rows > 1 and draw(st.booleans()):
            values[:, draw(st.integers(0, rows - 1))] = 0
        return values / values.sum(1, keepdim=True)

    scale = 10 ** draw(st.floats(-3, 3))
    problem = {"x": points(n), "y": points(m), "cost": draw(st.sampled_from(costs))}
    problem["eps"] = math.exp(draw(st.floats(math.log(smallest_eps), math.log(10))))
    if draw(st.booleans()):
        problem |= {"a": weights(n), "b": weights(m)}
    return problem


def marginals(problem: dict[str, Any]) -> tuple[Tensor, Tensor]:
    uniform = (torch.full(problem[n].shape[:2], 1 / problem[n].shape[1], dtype=FP64) for n in ("x", "y"))
    return tuple(problem.get(name, default) for name, default in zip("ab", uniform, strict=True))


def solve(problem: dict[str, Any], **options: Any) -> SinkhornHadamardOutput:
    return sinkhorn_hadamard(**problem | {"return_plan": True} | options)


def solve_to_convergence(problem: dict[str, Any], **options: Any) -> SinkhornHadamardOutput:
    out = solve(problem, tol=1e-13, n_iters=50_000, **options)
    assert out.converged.all()
    return out


def extent(*points: Tensor) -> Tensor:
    """The largest coordinate: what the rounding of features is relative to."""
    return torch.stack([p.abs().max() for p in points]).max()


@on_every_cpu_backend
class TestAtEveryIteration:
    @examples
    @given(problem=problems(), n_iters=st.integers(1, 30))
    def test_marginals(self, backend, problem, n_iters):
        out = solve(problem, n_iters=n_iters, backend=backend)
        a, b = marginals(problem)
        assert (out.plan >= 0).all()
        assert_close(out.plan.sum(1), b, "sinkhorn", "of y, after the update of g")
        assert_close((out.plan.sum(2) - a).abs().sum(1), out.error, "sinkhorn", "of x, up to the error reported")

    @examples
    @given(problem=problems(), n_iters=st.integers(1, 30))
    def test_transported_features_are_averages(self, backend, problem, n_iters):
        """Those of y are convex combinations: they lie in the bounding box of the x."""
        out = solve(problem, n_iters=n_iters, backend=backend)
        x, slack = problem["x"], 1e-9 * extent(problem["x"])
        assert (out.x_to_y <= x.amax(1, keepdim=True) + slack).all()
        assert (out.x_to_y >= x.amin(1, keepdim=True) - slack).all()

    @examples
    @given(problem=problems(), seed=st.integers(0, 1000))
    def test_permuting_the_points_permutes_the_results(self, backend, problem, seed):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = (torch.randperm(problem[n].shape[1], generator=generator) for n in ("x", "y"))
        orders = {"x": rows, "a": rows, "y": columns, "b": columns}
        permuted = {n: v[:, orders[n]] if n in orders else v for n, v in problem.items()}
        want, got = solve(problem, backend=backend), solve(permuted, backend=backend)
        assert_close(got.plan, want.plan[:, rows][:, :, columns], "sinkhorn", "plan")
        for names, order in ((PER_ROW, rows), (PER_COLUMN, columns)):
            for name in names:
                assert_close(getattr(got, name), getattr(want, name)[:, order], "sinkhorn", name)
        assert_close(got.cost, want.cost, "sinkhorn", "cost")

    @examples
    @given(problem=problems(costs=("euclidean", "sqeuclidean")), factor=st.floats(1e-3, 1e3))
    def test_scaling_by_the_largest_cost_removes_units(self, backend, problem, factor):
        """Features measured in other units give the same plan, and results in those units."""
        scaled = problem | {"x": factor * problem["x"], "y": factor * problem["y"]}
        want, got = solve(problem, backend=backend), solve(scaled, backend=backend)
        for name in ("plan", "f", "g", "cost", "error"):
            assert_close(getattr(got, name), getattr(want, name), "sinkhorn", name)
        size = extent(problem["x"], problem["y"])
        for name in ("x_to_y", "y_to_x"):
            assert_close(getattr(got, name) / (factor * size), getattr(want, name) / size, "sinkhorn", name)

    @examples
    @given(problem=problems(costs=("cosine",)), factor=st.floats(1e-3, 1e3))
    def test_the_cosine_has_no_units(self, backend, problem, factor):
        want, got = (
            solve(p, cost_scale=1.0, backend=backend) for p in (problem, problem | {"x": factor * problem["x"]})
        )
        for name in ("plan", "y_to_x", "f", "g", "cost"):
            assert_close(getattr(got, name), getattr(want, name), "sinkhorn", name)

    @examples
    @given(problem=problems(costs=("euclidean", "sqeuclidean")), seed=st.integers(0, 1000))
    def test_translating_both_sides_translates_the_results(self, backend, problem, seed):
        size = extent(problem["x"], problem["y"])
        shift = size * torch.randn(problem["x"].shape[2], generator=torch.Generator().manual_seed(seed), dtype=FP64)
        moved = problem | {"x": problem["x"] + shift, "y": problem["y"] + shift}
        want, got = solve(problem, backend=backend), solve(moved, backend=backend)
        for name in ("plan", "f", "g", "cost"):
            assert_close(getattr(got, name), getattr(want, name), "sinkhorn", name)
        # x_to_y averages with weights that sum to one: the column sums of the plan over b.
        assert_close(got.x_to_y / size, (want.x_to_y + shift) / size, "sinkhorn", "x_to_y")


@on_every_cpu_backend
class TestAtConvergence:
    @examples
    @given(problem=problems(smallest_eps=0.1, zero_weights=False))
    def test_swapping_the_sides_swaps_the_results(self, backend, problem):
        """Where there is mass: without, the error that stops the iteration does not see how far a point has come."""
        names = {"x": "y", "y": "x", "a": "b", "b": "a"}
        swapped = {names.get(n, n): v for n, v in problem.items()}
        want, got = (solve_to_convergence(p, backend=backend) for p in (problem, swapped))
        assert_close(got.plan, want.plan.mT, "sinkhorn", "plan")
        assert_close(got.cost, want.cost, "sinkhorn", "cost")
        size = extent(problem["x"], problem["y"])
        for one, other, unit in (
            ("x_to_y", "y_to_x", size),
            ("y_to_x", "x_to_y", size),
            ("x_hadamard", "y_hadamard", size**2),
            ("y_hadamard", "x_hadamard", size**2),
        ):
            assert_close(getattr(got, one) / unit, getattr(want, other) / unit, "sinkhorn", one)

    @examples
    @given(problem=problems(costs=("sqeuclidean",), smallest_eps=0.2), seed=st.integers(0, 1000))
    def test_squared_costs_ignore_translations_of_one_side(self, backend, problem, seed):
        """|x + t - y|^2 = |x - y|^2 + terms of x alone and of y alone, which the potentials take up."""
        size = extent(problem["x"], problem["y"])
        options = {"cost_scale": 4 * size.item() ** 2, "backend": backend}
        shift = size * torch.rand(problem["x"].shape[2], generator=torch.Generator().manual_seed(seed), dtype=FP64)
        want, got = (solve_to_convergence(p, **options) for p in (problem, problem | {"x": problem["x"] + shift}))
        assert_close(got.plan, want.plan, "sinkhorn", "plan")
        assert_close(got.y_to_x / size, want.y_to_x / size, "sinkhorn", "y_to_x")

    @settings(examples, max_examples=5)
    @given(
        s=st.floats(0.4, 1.2),
        t=st.floats(0.4, 1.2),
        m=st.floats(-1, 1),
        eps=st.floats(0.2, 3),
        unit=st.sampled_from([1e-3, 1.0, 1e3]),
    )
    def test_gaussians(self, backend, s, t, m, eps, unit):
        """Between N(0, s^2) and N(m, t^2) with cost |x - y|^2 / 2 the plan is Gaussian: covariance k =
        (sqrt(4 s^2 t^2 + eps^2) - eps) / 2, the entropic map x -> m + (k / s^2) x, the transport cost
        (s^2 + t^2 + m^2) / 2 - k (Janati et al. 2020, arXiv 2006.02572, theorem 1)."""
        grid = torch.linspace(-9, 9, 200, dtype=FP64)
        a, b = (torch.exp(-(((grid - centre) / width) ** 2) / 2) for centre, width in ((0.0, s), (m, t)))
        a, b, points = a / a.sum(), b / b.sum(), unit * grid[:, None]
        problem = {"x": points, "y": points, "a": a, "b": b, "cost": "sqeuclidean", "eps": eps}
        out = solve(problem, cost_scale=2 * unit**2, tol=1e-12, n_iters=5000, backend=backend)
        assert out.converged
        k = (math.sqrt(4 * s**2 * t**2 + eps**2) - eps) / 2
        assert (out.plan * grid[:, None] * (grid - m)).sum().item() == pytest.approx(k, rel=1e-7)
        assert out.cost.item() == pytest.approx((s**2 + t**2 + m**2) / 2 - k, rel=1e-7)
        near = grid.abs() < 2 * s
        assert_close(out.y_to_x[near, 0] / unit, m + k / s**2 * grid[near], "sinkhorn", scale=1e3)
