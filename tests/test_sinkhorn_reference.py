"""The PyTorch reference of sinkhorn_hadamard against POT, finite differences, and its own explicit adjoint."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from sinkhorn_cases import CASES, INPUTS, OUTPUTS, cotangents, oracle, problem, with_gradients
from tolerances import assert_close
from torch import Tensor

from parrot_kernels.reference import sinkhorn_hadamard as reference

FP64 = torch.float64
GRADIENTS = ("unrolled", "implicit", "detached")


def one(case: dict, sizes: tuple[int, int, int] = (7, 9, 3), seed: int = 0) -> dict:
    return problem(case, (1, *sizes), FP64, seed)


def pot_cost(arguments: dict, scale: Tensor) -> np.ndarray:
    metric = arguments.get("cost", "euclidean")
    x, y = arguments["x"][0].numpy(), arguments["y"][0].numpy()
    return ot.dist(x, y, metric=metric) / scale.item()


def assert_plan_and_features(out: dict[str, Tensor], plan: np.ndarray, arguments: dict) -> None:
    a, b = (arguments[n][0].numpy() for n in ("a", "b"))
    x, y = arguments["x"][0].numpy(), arguments["y"][0].numpy()
    for name, want in (("plan", plan), ("y_to_x", plan @ y / a[:, None]), ("x_to_y", plan.T @ x / b[:, None])):
        assert_close(out[name][0], torch.from_numpy(want), "sinkhorn", name)


class TestAgainstPOT:
    @pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
    @pytest.mark.parametrize("n_iters", [1, 2, 17])
    def test_the_same_number_of_iterations(self, cost, n_iters):
        arguments = one({"a": True, "b": True, "cost": cost, "n_iters": n_iters})
        out = oracle(**arguments)
        a, b = (arguments[n][0].numpy() for n in ("a", "b"))
        C = pot_cost(arguments, out["scale"])
        options = {"method": "sinkhorn_log", "numItermax": n_iters, "stopThr": 0, "warn": False}
        plan = ot.sinkhorn(b, a, C.T, 0.05, **options).T  # POT updates its second marginal first, we our first
        assert_plan_and_features(out, plan, arguments)
        assert_close(out["cost"], torch.tensor([(plan * C).sum()]), "sinkhorn", "cost")
        assert_close(out["error"], torch.tensor([np.abs(plan.sum(1) - a).sum()]), "sinkhorn", "error")

    def test_converged(self):
        arguments = one({"a": True, "b": True, "tol": 1e-13, "n_iters": 100_000})
        out = oracle(**arguments)
        a, b = (arguments[n][0].numpy() for n in ("a", "b"))
        C = pot_cost(arguments, out["scale"])
        assert out["converged"].all()
        assert 1 < out["n_iters"].item() < 100_000
        plan, log = ot.sinkhorn(a, b, C, 0.05, method="sinkhorn_log", numItermax=100_000, stopThr=1e-13, log=True)
        assert_plan_and_features(out, plan, arguments)
        for name, want in (("f", 0.05 * log["log_u"]), ("g", 0.05 * log["log_v"])):
            got, want = out[name][0], torch.from_numpy(want)
            assert_close(got - got.mean(), want - want.mean(), "sinkhorn", name)  # equal up to a constant

    @pytest.mark.parametrize("reach", [0.6, (0.6, 0.9), (None, 0.5), (0.5, None)])
    @pytest.mark.parametrize(("cost", "power"), [("sqeuclidean", 2), ("euclidean", 1)])
    def test_unbalanced(self, cost, power, reach):
        arguments = one({"a": True, "b": True, "cost": cost, "reach": reach, "tol": 1e-14, "n_iters": 10_000})
        arguments["b"] = arguments["b"] * 1.5
        out = oracle(**arguments)
        a, b = (arguments[n][0].numpy() for n in ("a", "b"))
        pair = reach if isinstance(reach, tuple) else (reach, reach)
        rho = tuple(math.inf if r is None else r**power for r in pair)
        C = pot_cost(arguments, out["scale"])
        options = {"method": "sinkhorn", "reg_type": "kl", "numItermax": 20_000, "stopThr": 1e-15}
        plan = ot.unbalanced.sinkhorn_unbalanced(a, b, C, 0.05, rho, **options)
        assert_plan_and_features(out, plan, arguments)


class TestClosedForms:
    def test_one_point_each(self):
        x, y = torch.tensor([[[1.0, 2.0]]], dtype=FP64), torch.tensor([[[4.0, 6.0]]], dtype=FP64)
        out = oracle(x, y, cost_scale=1.0)
        assert out["plan"].item() == pytest.approx(1)
        assert out["cost"].item() == pytest.approx(5)
        assert_close(out["y_to_x"], y, "sinkhorn")
        assert_close(out["x_hadamard"], x * y, "sinkhorn")

    def test_equal_points_are_coupled_independently(self):
        arguments = problem("weights", (2, 4, 6, 3), FP64)
        arguments["x"], arguments["y"] = torch.ones(2, 4, 3, dtype=FP64), torch.ones(2, 6, 3, dtype=FP64)
        out = oracle(**arguments)
        assert_close(out["plan"], arguments["a"][:, :, None] * arguments["b"][:, None], "sinkhorn")
        assert out["cost"].abs().max() == 0

    def test_gaussians(self):
        """Between N(0, s^2) and N(m, t^2) on a line the entropic plan for |x-y|^2 is Gaussian with covariance
        (sqrt(16 s^2 t^2 + eps^2) - eps) / 4 (Janati et al. 2020, arXiv 2006.02572, with their 2 sigma^2 = eps)."""
        s, t, m, eps = 1.0, 0.6, 0.8, 0.5
        grid = torch.linspace(-6, 6, 200, dtype=FP64)[None, :, None]
        a, b = (torch.exp(-(((grid[..., 0] - c) / w) ** 2) / 2) for c, w in ((0.0, s), (m, t)))
        a, b = a / a.sum(), b / b.sum()
        out = oracle(grid, grid, a=a, b=b, cost="sqeuclidean", cost_scale=1.0, eps=eps, tol=1e-12, n_iters=2000)
        covariance = (out["plan"][0] * grid[0] * (grid[0].T - m)).sum()
        want = (math.sqrt(16 * s**2 * t**2 + eps**2) - eps) / 4
        assert covariance.item() == pytest.approx(want, rel=1e-6)
        slope = want / s**2  # the entropic map is linear
        near = grid[0, :, 0].abs() < 2
        assert_close(out["y_to_x"][0, near, 0], m + slope * grid[0, near, 0], "sinkhorn", scale=1e3)


class TestGradients:
    @pytest.mark.parametrize("case", [name for name in CASES if name != "everything"])
    @pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
    def test_finite_differences(self, case, gradient):
        arguments = problem(case, (2, 3, 4, 2), FP64)
        if arguments.get("cost_scale", "max") == "max":  # the largest cost is a constant to the gradient only
            arguments["cost_scale"] = 2.0
        outputs = OUTPUTS
        if gradient == "implicit":
            arguments |= {"n_iters": 60, "tol": None}
            arguments["eps"] = arguments["eps"] + 0.2 if isinstance(arguments.get("eps"), Tensor) else 0.4
            if arguments.get("reach") is None:  # the potentials are determined up to a constant: see below
                outputs = tuple(n for n in OUTPUTS if n not in ("f", "g"))
        names, outer = [n for n in INPUTS if isinstance(arguments.get(n), Tensor)], cotangents(arguments)

        def function(*values: Tensor) -> tuple[Tensor, ...]:  # of each output one number, for the time's sake
            out = oracle(**arguments | dict(zip(names, values, strict=True)), gradient=gradient)
            return tuple((out[name] * outer[name]).sum() for name in outputs)

        leaves = [arguments[n].clone().requires_grad_() for n in names]
        assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)

    def test_implicit_potentials_are_those_of_equal_sums(self):
        arguments = one({"a": True, "b": True, "eps": 0.4, "n_iters": 400})

        def potentials(x: Tensor, a: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
            # Feasible perturbations keep the mass of a: gradcheck's single entries need rescaling.
            scaled = arguments | {"x": x, "a": a / a.sum(1, keepdim=True), "cost_scale": 2.0}
            out = oracle(**scaled, gradient=gradient)
            if gradient == "implicit":
                return out["f"], out["g"]
            shift = (out["f"].sum() - out["g"].sum()) / (out["f"].numel() + out["g"].numel())
            return out["f"] - shift, out["g"] + shift

        leaves = [arguments[n].clone().requires_grad_() for n in ("x", "a")]
        results = []
        for gradient in ("implicit", "unrolled"):
            f, g = potentials(*leaves, gradient)
            weights_f, weights_g = torch.linspace(-1, 2, f.numel()), torch.linspace(3, 1, g.numel())
            loss = (f * weights_f).sum() + (g * weights_g).sum()
            results.append(torch.autograd.grad(loss, leaves))
        for got, want, name in zip(*results, "xa", strict=True):
            assert_close(got, want, "sinkhorn_grad", name)

    def test_implicit_is_the_limit_of_unrolled(self):
        arguments = problem("weights", (2, 6, 5, 3), FP64) | {"eps": 0.2, "n_iters": 2000}
        given = {n: c for n, c in cotangents(arguments).items() if n not in ("f", "g")}
        found = [with_gradients(lambda g=g, **k: oracle(**k, gradient=g), arguments, given) for g in GRADIENTS[:2]]
        for name in ("dx", "dy", "da", "db"):
            assert_close(found[1][name], found[0][name], "sinkhorn_grad", name)

    @pytest.mark.parametrize("cost", ["euclidean", "matrix"])
    def test_detached_takes_the_plan_for_a_constant(self, cost):
        arguments = problem("matrix" if cost == "matrix" else "weights", (2, 5, 4, 3), FP64)
        given = {n: c for n, c in cotangents(arguments).items() if n not in ("f", "g", "plan")}
        got = with_gradients(lambda **k: oracle(**k, gradient="detached"), arguments, given)

        def by_hand(x: Tensor, y: Tensor, **options) -> dict[str, Tensor]:
            with torch.no_grad():
                out = oracle(x, y, **options)
            a, b = (options.get(n, torch.tensor(1 / size, dtype=FP64)) for n, size in (("a", 5), ("b", 4)))
            to_x = (out["plan"] / a.detach().expand(2, 5)[:, :, None]) @ y
            to_y = (out["plan"] / b.detach().expand(2, 4)[:, None]).mT @ x
            C = options["cost"] if cost == "matrix" else (x[:, :, None] - y[:, None]).norm(dim=3)
            transported = (out["plan"] * C).sum((1, 2)) / out["scale"]
            return {"x_to_y": to_y, "y_to_x": to_x, "x_hadamard": x * to_x, "y_hadamard": y * to_y, "cost": transported}

        want = with_gradients(by_hand, arguments, given)
        for name in want:
            assert_close(got[name], want[name], "sinkhorn_grad", name)

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_the_largest_cost_is_a_constant(self, gradient):
        arguments = problem("plain", (2, 5, 4, 3), FP64) | {"gradient": gradient}
        scale = oracle(**arguments)["scale"]
        found = []
        for p in range(2):
            single = {n: v[p : p + 1] if isinstance(v, Tensor) else v for n, v in arguments.items()}
            given = cotangents(single)
            found.append(with_gradients(oracle, single, given))
            want = with_gradients(oracle, single | {"cost_scale": scale[p].item()}, given)
            for name in ("dx", "dy", "plan"):
                assert_close(found[-1][name], want[name], "sinkhorn_grad", name)

    @pytest.mark.parametrize("gradient", GRADIENTS)
    @pytest.mark.parametrize("case", CASES)
    def test_explicit_adjoint_is_autograds(self, case, gradient):
        arguments = problem(case, (4, 5, 6, 3), FP64) | {"gradient": gradient}
        given = cotangents(arguments)
        want = with_gradients(oracle, arguments, given)
        got = explicit(arguments, given)
        for name in (n for n in want if n[0] == "d"):
            assert_close(got[name], want[name], "sinkhorn_grad", name)


def explicit(arguments: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by `reference.backward`, with NaN wherever a buffer is not written or should not be read."""
    seen: dict = {}
    n, m = arguments["x"].shape[1], arguments["y"].shape[1]
    steps = arguments["n_iters"]
    batch = len(arguments["x"])
    f_history = torch.full((batch, steps, n), math.nan, dtype=FP64)
    g_history = torch.full((batch, steps, m), math.nan, dtype=FP64)

    def record(k: int, f: Tensor, g: Tensor) -> None:
        f_history[:, k], g_history[:, k] = f, g

    with torch.no_grad():
        out = oracle(**arguments, record=record)
    past = torch.arange(steps) >= out["n_iters"][:, None]
    f_history[past] = math.nan
    g_history[past] = math.nan
    matrix = isinstance(arguments.get("cost"), Tensor)
    power = 2 if not matrix and arguments.get("cost") == "sqeuclidean" else 1
    reach = arguments.get("reach")
    rho = (None if r is None else r**power for r in (reach if isinstance(reach, tuple) else (reach, reach)))
    eps = arguments.get("eps", 0.05)
    inputs = {n: arguments.get(n) for n in ("x", "y", "a", "b", "x_lengths", "y_lengths")}
    inputs["cost_matrix"] = arguments["cost"] if matrix else None
    inputs["eps"] = eps if isinstance(eps, Tensor) else torch.full((batch,), eps, dtype=FP64)
    targets = {
        f"d{name}": None if inputs[name] is None else torch.full_like(inputs[name], math.nan)
        for name in ("x", "y", "a", "b", "cost_matrix", "eps")
    }
    unrolled = arguments["gradient"] == "unrolled"
    reference.backward(
        **inputs,
        cost="matrix" if matrix else arguments.get("cost", "euclidean"),
        rho_x=next(rho),
        rho_y=next(rho),
        gradient=arguments["gradient"],
        f=out["f"],
        g=out["g"],
        scale=out["scale"],
        iterations=out["n_iters"],
        f_history=f_history if unrolled else None,
        g_history=g_history if unrolled else None,
        **{f"grad_{'transport_cost' if name == 'cost' else name}": c for name, c in given.items()},
        **targets,
    )
    seen |= {name: t for name, t in targets.items() if t is not None}
    if matrix:
        seen["dcost"] = seen.pop("dcost_matrix")
    return seen


def test_potentials_of_every_iteration_are_recorded():
    arguments = problem("tolerance", (3, 5, 4, 2), FP64)
    seen = {}
    oracle(**arguments, record=lambda k, f, g: seen.update({k: (f, g)}))
    for k, (f, g) in seen.items():
        out = oracle(**arguments | {"n_iters": k + 1})
        assert torch.equal(out["f"], f)
        assert torch.equal(out["g"], g)


def test_tolerance_stops_each_problem_at_its_own_first_small_error():
    arguments = problem({"tol": 1e-3, "eps": True, "n_iters": 60}, (5, 6, 7, 3), FP64)
    out = oracle(**arguments)
    assert len(set(out["n_iters"].tolist())) > 1
    assert out["converged"].all()
    for p in range(5):
        k = out["n_iters"][p].item()
        single = {n: v[p : p + 1] if isinstance(v, Tensor) else v for n, v in arguments.items()}
        errors = [oracle(**single | {"n_iters": i, "tol": None})["error"].item() for i in (k - 1, k) if i]
        assert errors[-1] == out["error"][p].item() <= 1e-3
        assert k == 1 or errors[0] > 1e-3
