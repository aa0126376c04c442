"""The Sinkhorn divergence against GeomLoss, closed forms, finite differences, and its own invariances."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from geomloss import SamplesLoss
from sinkhorn_cases import everywhere
from tolerances import assert_close
from torch import Tensor

from parrot_kernels.modules.sinkhorn_divergence import SinkhornDivergence
from parrot_kernels.ops.sinkhorn_divergence import sinkhorn_divergence

FP32, FP64 = torch.float32, torch.float64
CONVERGED = {"tol": 1e-14, "n_iters": 20_000}
LEAVES = ("x", "y", "a", "b")


def clouds(batch: int = 2, n: int = 9, m: int = 7, dim: int = 3, dtype: torch.dtype = FP64, mass: float = 1.0) -> dict:
    """Points and weights, those of x of sum 1, those of y of sum ``mass``."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=FP64)

    x, y, a, b = random(batch, n, dim), random(batch, m, dim) + 0.2, random(batch, n) + 0.2, random(batch, m) + 0.2
    a, b = a / a.sum(1, keepdim=True), mass * b / b.sum(1, keepdim=True)
    return {name: t.to(dtype) for name, t in zip(LEAVES, (x, y, a, b), strict=True)}


def value_and_gradients(function: Callable[..., Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in arguments.items() if n in LEAVES}
    value = function(**arguments | leaves)
    gradients = torch.autograd.grad(value.sum(), tuple(leaves.values()))
    return {"value": value.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}


def centred(gradient: Tensor) -> Tensor:
    """The part of a gradient to weights that matters to weights of fixed sum."""
    return gradient - gradient.mean(-1, keepdim=True)


def geomloss(p: int = 2, **options: Any) -> Callable[..., Tensor]:
    """SamplesLoss with our arguments and exact distances: its own, for p = 1, are at least 1e-4."""
    loss = SamplesLoss("sinkhorn", p=p, cost=lambda x, y: torch.cdist(x, y) ** p / p, **options)
    return lambda x, y, a, b: loss(a, x, b, y)


@pytest.fixture
def converged_geomloss(monkeypatch):
    """GeomLoss iterates once at each of a few decreasing eps; let it iterate often at the last."""
    module = importlib.import_module(SamplesLoss.__module__.replace("samples_loss", "sinkhorn_divergence"))
    monkeypatch.setattr(module, "epsilon_schedule", lambda p, diameter, blur, scaling: [blur**p] * 2000)


@pytest.mark.usefixtures("converged_geomloss")
class TestAgainstGeomLoss:
    @pytest.mark.parametrize("debias", [True, False])
    @pytest.mark.parametrize("p", [1, 2])
    def test_balanced(self, p, debias):
        options = {"p": p, "blur": 0.3, "debias": debias}
        want = value_and_gradients(geomloss(**options), clouds())
        got = value_and_gradients(sinkhorn_divergence, clouds() | options | CONVERGED)
        for name, value in got.items():
            same = centred if name in ("da", "db") else lambda t: t
            assert_close(same(value), same(want[name]), "sinkhorn", name)

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("mass", [1.0, 1.7])
    @pytest.mark.parametrize("debias", [True, False])
    @pytest.mark.parametrize("p", [1, 2])
    def test_unbalanced(self, p, debias, mass):
        options = {"p": p, "blur": 0.3, "reach": 0.7, "debias": debias}
        want = value_and_gradients(geomloss(**options), clouds(mass=mass))
        got = value_and_gradients(sinkhorn_divergence, clouds(mass=mass) | options | CONVERGED)
        eps, rho = 0.3**p, 0.7**p
        short = (rho + eps / 2) / (rho + eps)  # ours are checked by finite differences below
        for name, value in got.items():
            wanted = want[name] if name == "value" else want[name] / short
            if name in ("da", "db") and not debias:
                wanted = wanted - eps / 2  # the derivative of the masses in the dual objective
            assert_close(value, wanted, "sinkhorn", name)

    def test_uniform_weights_and_no_batch(self):
        x, y = (clouds()[name][0] for name in ("x", "y"))
        loss = SamplesLoss("sinkhorn", p=2, blur=0.3)
        got = sinkhorn_divergence(x, y, blur=0.3, **CONVERGED)
        assert got.shape == ()
        assert_close(got, loss(x, y), "sinkhorn")


@pytest.mark.parametrize("p", [1, 2])
def test_geomloss_as_it_is_used(p):
    x, y = torch.rand(2, 200, 3), torch.rand(2, 150, 3) * 0.7
    want = SamplesLoss("sinkhorn", p=p, blur=0.1, scaling=0.99)(x, y)
    torch.testing.assert_close(sinkhorn_divergence(x, y, p=p, blur=0.1), want, rtol=1e-2, atol=0)


class TestClosedForms:
    @pytest.mark.parametrize("p", [1, 2])
    def test_one_point_each(self, p):
        x, y = torch.tensor([[1.0, 2.0]], dtype=FP64), torch.tensor([[4.0, 6.0]], dtype=FP64)
        assert sinkhorn_divergence(x, y, p=p).item() == pytest.approx(5**p / p)

    def test_translation(self):
        """Between a measure and its translate the divergence is |shift|^2 / 2 for any blur: C separates."""
        x, shift = clouds()["x"], torch.tensor([0.3, -1.0, 2.0], dtype=FP64)
        for blur in (0.3, 3.0):
            found = value_and_gradients(sinkhorn_divergence, {"x": x, "y": x + shift, "blur": blur} | CONVERGED)
            assert_close(found["value"], shift.square().sum().expand(2) / 2, "sinkhorn")
            assert_close(found["dx"], (-shift / 9).expand_as(x), "sinkhorn")

    @pytest.mark.parametrize("blur", [0.3, 1.0])
    def test_gaussians(self, blur):
        """Between N(0, s^2) and N(m, t^2) the optimal plan is Gaussian of covariance k = (sqrt(4 s^2 t^2 + eps^2) -
        eps) / 2 and OT is (s^2 + t^2 + m^2) / 2 - k - eps / 2 log(1 - k^2 / (s t)^2) (Janati et al. 2020, arXiv
        2006.02572, theorem 1)."""

        def cost(s: float, t: float, m: float) -> float:
            eps = blur**2
            k = (math.sqrt(4 * s**2 * t**2 + eps**2) - eps) / 2
            return (s**2 + t**2 + m**2) / 2 - k - eps / 2 * math.log1p(-((k / (s * t)) ** 2))

        s, t, m = 1.0, 0.6, 0.8
        grid = torch.linspace(-7, 7, 280, dtype=FP64)
        a, b = (torch.exp(-(((grid - centre) / width) ** 2) / 2) for centre, width in ((0.0, s), (m, t)))
        a, b = a / a.sum(), b / b.sum()
        options = {"a": a, "b": b, "blur": blur, "tol": 1e-9, "n_iters": 5000}
        points = grid[:, None]
        assert sinkhorn_divergence(points, points, debias=False, **options).item() == pytest.approx(cost(s, t, m))
        want = cost(s, t, m) - (cost(s, s, 0) + cost(t, t, 0)) / 2
        assert sinkhorn_divergence(points, points, **options).item() == pytest.approx(want)

    def test_small_blur_is_optimal_transport(self):
        x, y = torch.tensor([0.0, 1.0, 2.5, 4.0], dtype=FP64), torch.tensor([3.6, 0.7, 2.0, 5.0], dtype=FP64)
        got = sinkhorn_divergence(x[:, None], y[:, None], blur=0.1, **CONVERGED)
        want = (x - y.sort().values).square().mean() / 2  # on a line the optimal plan is monotone
        assert got.item() == pytest.approx(want.item(), rel=1e-5)

    @pytest.mark.parametrize("reach", [None, 1e5])
    def test_large_blur_is_the_energy_distance(self, reach):
        given = clouds()
        x, y, a, b = given.values()
        got = sinkhorn_divergence(**given, p=1, blur=1e5, reach=reach, **CONVERGED)
        points, signed = torch.cat([x, y], 1), torch.cat([a, -b], 1)
        want = -(signed[:, :, None] * torch.cdist(points, points) * signed[:, None]).sum((1, 2)) / 2
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


class TestGradients:
    @pytest.mark.parametrize("mass", [1.0, 1.7])
    @pytest.mark.parametrize("debias", [True, False])
    @pytest.mark.parametrize("p", [1, 2])
    def test_finite_differences(self, p, debias, mass):
        options = {"p": p, "blur": 0.5, "reach": 0.7, "debias": debias} | CONVERGED
        leaves = [t.requires_grad_() for t in clouds(2, 3, 4, 2, mass=mass).values()]
        assert torch.autograd.gradcheck(
            lambda x, y, a, b: sinkhorn_divergence(x, y, a=a, b=b, **options), leaves, atol=1e-7, rtol=1e-5
        )

    @pytest.mark.parametrize("debias", [True, False])
    @pytest.mark.parametrize("p", [1, 2])
    def test_finite_differences_balanced(self, p, debias):
        """Over weights of equal, but not of fixed, sums."""

        def function(x: Tensor, y: Tensor, a: Tensor, b: Tensor, mass: Tensor) -> Tensor:
            a, b = mass * a.softmax(1), mass * b.softmax(1)
            return sinkhorn_divergence(x, y, a=a, b=b, p=p, blur=0.5, debias=debias, **CONVERGED)

        leaves = [*clouds(2, 3, 4, 2).values(), torch.tensor(1.3, dtype=FP64)]
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves], atol=1e-7, rtol=1e-5)

    def test_the_error_of_the_value_is_the_square_of_the_gradients(self):
        exact = value_and_gradients(sinkhorn_divergence, clouds() | {"blur": 0.1} | CONVERGED)
        rough = value_and_gradients(sinkhorn_divergence, clouds() | {"blur": 0.1, "tol": 1e-3, "n_iters": 20_000})
        error = {n: ((rough[n] - exact[n]).norm() / exact[n].norm()).item() for n in ("value", "dx", "dy")}
        assert error["value"] < 1e-5
        assert max(error["dx"], error["dy"]) < 1e-2

    def test_nothing_is_kept_of_the_iterations(self):
        kept = []
        for n_iters in (5, 500):
            sizes = []
            arguments = {n: t.requires_grad_() for n, t in clouds().items()}
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
                sinkhorn_divergence(**arguments, n_iters=n_iters, tol=None)
            kept.append(sum(sizes))
        assert kept[0] == kept[1]

    def test_differentiating_twice_raises(self):
        arguments = {n: t.requires_grad_() for n, t in clouds().items()}
        gradient = torch.autograd.grad(sinkhorn_divergence(**arguments).sum(), arguments["x"], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiating twice"):
            gradient.sum().backward()


OPTIONS = [pytest.param({"p": p, "reach": reach}, id=f"p={p}, reach={reach}") for p in (1, 2) for reach in (None, 0.5)]


@pytest.mark.parametrize("options", OPTIONS)
class TestAsADistance:
    def test_zero_between_equal_measures(self, options):
        given = clouds()
        same = {"x": given["x"], "y": given["x"], "a": given["a"], "b": given["a"]}
        found = value_and_gradients(sinkhorn_divergence, same | options | {"blur": 0.3} | CONVERGED)
        assert torch.equal(found["value"], torch.zeros(2, dtype=FP64))
        for name in ("dx", "dy", "da", "db"):
            same = centred if name in ("da", "db") else lambda t: t
            assert_close(same(found[name]), torch.zeros_like(found[name]), "sinkhorn", name)

    def test_zero_at_any_number_of_iterations(self, options):
        x = clouds(dtype=FP32)["x"]
        assert torch.equal(sinkhorn_divergence(x, x, n_iters=3, **options), torch.zeros(2))

    def test_symmetric(self, options):
        given = clouds()
        swapped = dict(zip(LEAVES, (given[n] for n in "yxba"), strict=True))
        one = value_and_gradients(sinkhorn_divergence, given | options | {"blur": 0.3} | CONVERGED)
        other = value_and_gradients(sinkhorn_divergence, swapped | options | {"blur": 0.3} | CONVERGED)
        for name, counterpart in (("value", "value"), ("dx", "dy"), ("dy", "dx"), ("da", "db"), ("db", "da")):
            same = centred if name in ("da", "db") and options["reach"] is None else lambda t: t
            assert_close(same(one[name]), same(other[counterpart]), "sinkhorn", name)

    def test_positive(self, options):
        x = torch.rand(20, 6, 2, dtype=FP64)
        nearby = x + 1e-3 * torch.randn_like(x)
        for y in (nearby, torch.rand(20, 9, 2, dtype=FP64)):
            divergence = sinkhorn_divergence(x, y, blur=0.2, tol=1e-9, n_iters=20_000, **options)
            assert (divergence > 0).all()

    def test_descending_it_reaches_the_target(self, options):
        y = clouds(1, dtype=FP32)["y"][0]
        x = torch.rand(7, 3, requires_grad=True)
        loss = SinkhornDivergence(blur=0.1, **options)
        start = loss(x, y).item()
        optimizer = torch.optim.Adam([x], lr=0.03)
        for _ in range(150):
            optimizer.zero_grad()
            value = loss(x, y)
            value.backward()
            optimizer.step()
        assert value.item() < 0.02 * start


def test_descending_it_reaches_the_target_weights():
    given = clouds(1, dtype=FP32)
    logits = torch.zeros(9, requires_grad=True)
    loss = SinkhornDivergence(p=1, blur=0.02, tol=1e-4)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss(given["x"][0], given["x"][0], a=logits.softmax(0), b=given["a"][0]).backward()
        optimizer.step()
    torch.testing.assert_close(logits.softmax(0), given["a"][0], rtol=0.05, atol=0)


# Each problem by itself


LOOSE = {"blur": 0.3, "n_iters": 30, "tol": 1e-3}


@pytest.mark.sampled(2)
@everywhere
@pytest.mark.parametrize("reach", [None, 0.5])
def test_every_backend(backend, device, reach):
    arguments = clouds(2, 5, 6, 3)
    options = {"blur": 0.5, "n_iters": 20, "tol": None, "reach": reach}
    want = value_and_gradients(sinkhorn_divergence, arguments | options | {"backend": "torch"})
    single = {n: t.to(device, FP32) for n, t in arguments.items()}
    got = value_and_gradients(sinkhorn_divergence, single | options | {"backend": backend})
    for name, value in got.items():
        assert_close(value.cpu(), want[name], "sinkhorn_grad", name)


@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_batch_mates_do_not_matter(dtype, reach):
    arguments = clouds(5, 33, 20, 4, dtype=dtype)
    batch = value_and_gradients(sinkhorn_divergence, arguments | LOOSE | {"reach": reach})
    for k in range(5):
        alone = {n: t[k] for n, t in arguments.items()} | LOOSE | {"reach": reach}
        for name, value in value_and_gradients(sinkhorn_divergence, alone).items():
            assert torch.equal(value, batch[name][k]), f"{name} of problem {k}"


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reach", [None, 0.5])
def test_padding_does_not_matter_and_gets_no_gradient(weighted, reach):
    arguments = clouds(4, 9, 7)
    if not weighted:
        arguments = {n: arguments[n] for n in ("x", "y")}
    lengths = {"x_lengths": torch.tensor([9, 4, 1, 0]), "y_lengths": torch.tensor([3, 7, 0, 2])}
    options = LOOSE | lengths | {"reach": reach}
    want = value_and_gradients(sinkhorn_divergence, arguments | options)
    padding = {}
    for side, weights in (("x", "a"), ("y", "b")):
        padding[weights] = torch.arange(arguments[side].shape[1]) >= lengths[f"{side}_lengths"][:, None]
        padding[side] = padding[weights][..., None]
    filled = {n: t.masked_fill(padding[n], math.nan) for n, t in arguments.items()}
    got = value_and_gradients(sinkhorn_divergence, filled | options)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
        if name != "value":
            assert value.masked_fill(~padding[name[1:]], 0).count_nonzero() == 0, name
    for k, (n, m) in enumerate(zip(*(t.tolist() for t in lengths.values()), strict=True)):
        if n * m == 0:
            assert all(t[k].count_nonzero() == 0 for t in got.values())
            continue
        cut = {name: t[k, : n if name in ("x", "a") else m] for name, t in arguments.items()}
        for name, value in value_and_gradients(sinkhorn_divergence, cut | LOOSE | {"reach": reach}).items():
            valid = got[name][k] if name == "value" else got[name][k][: len(value)]
            assert_close(valid, value, "sinkhorn", name)


@pytest.mark.parametrize(("batch", "n", "m"), [(2, 0, 3), (2, 3, 0), (0, 3, 3)])
def test_nothing_to_compare(batch, n, m):
    found = value_and_gradients(sinkhorn_divergence, clouds(batch, n, m))
    assert torch.equal(found["value"], torch.zeros(batch, dtype=FP64))
    assert all(t.count_nonzero() == 0 for t in found.values())


def test_a_nan_stays_in_its_problem():
    arguments = clouds(3)
    want = sinkhorn_divergence(**arguments)
    arguments["x"][1, 0, 0] = math.nan
    got = sinkhorn_divergence(**arguments)
    assert got.isnan().tolist() == [False, True, False]
    assert torch.equal(got[::2], want[::2])


def test_zero_weights_are_left_out():
    arguments = clouds()
    arguments["a"][:, -1], arguments["b"][:, 0] = 0, 0
    arguments |= {n: arguments[n] / arguments[n].sum(1, keepdim=True) for n in ("a", "b")}
    fewer = {
        "x": arguments["x"][:, :-1],
        "a": arguments["a"][:, :-1],
        "y": arguments["y"][:, 1:],
        "b": arguments["b"][:, 1:],
    }
    for reach in (None, 0.5):
        options = {"blur": 0.3, "reach": reach} | CONVERGED
        found = value_and_gradients(sinkhorn_divergence, arguments | options)
        want = sinkhorn_divergence(**fewer | options)
        assert_close(found["value"], want, "sinkhorn")
        assert found["dx"][:, -1].abs().max() < 1e-12
        assert found["da"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    arguments = clouds(dtype=FP32)
    arguments |= {n: arguments[n].to(dtype) for n in ("x", "y")}
    got = value_and_gradients(sinkhorn_divergence, arguments | {"blur": 0.3})
    wide = {n: t.to(FP32) for n, t in arguments.items()}
    want = value_and_gradients(sinkhorn_divergence, wide | {"blur": 0.3})
    assert got["value"].dtype == FP32
    assert torch.equal(got["value"], want["value"])
    assert got["dx"].dtype == dtype
    assert_close(got["dx"], want["dx"], "sinkhorn_grad")


# As a function and as a module


def test_compile_and_vmap():
    arguments = clouds(3, dtype=FP32)
    want = value_and_gradients(sinkhorn_divergence, arguments | LOOSE)
    compiled = torch.compile(sinkhorn_divergence, fullgraph=True, backend="aot_eager")
    for name, value in value_and_gradients(compiled, arguments | LOOSE).items():
        assert_close(value, want[name], "sinkhorn_grad", name)
    mapped = torch.vmap(lambda x, y, a, b: sinkhorn_divergence(x, y, a=a, b=b, **LOOSE))(*arguments.values())
    assert_close(mapped, want["value"], "sinkhorn")


@pytest.mark.parametrize(
    "options", [{}, {"p": 1, "blur": 0.2, "reach": 0.5, "debias": False, "n_iters": 7, "tol": None}]
)
def test_module(options):
    loss = SinkhornDivergence(**options)
    arguments = clouds(dtype=FP32) | {"x_lengths": torch.tensor([9, 3]), "y_lengths": torch.tensor([2, 7])}
    assert torch.equal(loss(**arguments), sinkhorn_divergence(**arguments, **options))
    assert not loss.state_dict()
    assert f"blur={options.get('blur', 0.05)}" in repr(loss)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"p": 3}, ValueError, "`p` must be one of 1, 2"),
        ({"blur": 0}, ValueError, "`blur` must be a positive number"),
        ({"blur": -0.1}, ValueError, "`blur` must be a positive number"),
        ({"blur": "0.1"}, TypeError, "`blur` must be a positive number"),
        ({"reach": math.inf}, ValueError, "`reach` must be a positive number"),
        ({"reach": (None, 0.5)}, TypeError, "`reach` must be a positive number"),
        ({"n_iters": 0}, ValueError, "`n_iters` must be at least 1"),
        ({"a": torch.ones(2, 8)}, ValueError, "`a` must be of shape"),
        ({"x_lengths": torch.tensor([10, 1])}, ValueError, "`x_lengths` must be between 0 and 9"),
    ],
)
def test_errors(options, kind, message):
    with pytest.raises(kind, match=message):
        sinkhorn_divergence(**clouds(dtype=FP32) | options)
