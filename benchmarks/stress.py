"""The stress set on which accuracy is measured: problems at the edges of what the ops take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import parrot_kernels as pk

FP64 = torch.float64
Inputs = dict[str, Tensor]
Solve = Callable[..., dict[str, Tensor]]  # inputs by name, backend -> outputs by name
HALF = (torch.float16, torch.bfloat16)
LONG = (torch.float32, torch.bfloat16)  # dtypes that run 65,536 steps one by one, which takes a minute each
WIDE = {"a", "b", "cost", "eps", "A", "D", "delta_bias", "initial_state", "weight", "bias"}  # in the compute dtype


class Case(NamedTuple):
    op: str
    name: str
    inputs: Inputs  # in float64
    solve: Solve
    exact: Solve | None = None  # what the results should be, if not those of ``solve`` in PyTorch


def cases(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """The set for inputs of ``dtype``; ``small`` for Triton's interpreter."""
    yield from _transport(dtype, small)
    yield from _divergence(small)
    yield from _scan(dtype, small)
    yield from _convolution(dtype, small)
    if not small and dtype in LONG:
        yield from _single_steps()


def rounded(case: Case, dtype: torch.dtype) -> Inputs:
    """The inputs in ``dtype``, those that ops keep in the compute dtype in that."""
    compute = dtype if dtype not in HALF else torch.float32
    return {name: value.to(compute if name in WIDE and case.op != "causal_conv1d" else dtype)
            for name, value in case.inputs.items()}  # fmt: skip


def _large(dtype: torch.dtype) -> float:
    """Near fp16's maximum there; else where squared distances still fit into fp32."""
    return 6e4 if dtype == torch.float16 else 1e17


class _Random:
    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=FP64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=FP64)


def _clouds(batch: int, n: int, m: int, dim: int) -> Inputs:
    random = _Random()
    a, b = 0.2 + random.uniform(batch, n), 0.2 + random.uniform(batch, m)
    return {
        "x": 2 * random.uniform(batch, n, dim) - 1,
        "y": 2 * random.uniform(batch, m, dim) - 0.7,
        "a": a / a.sum(1, keepdim=True),
        "b": b / b.sum(1, keepdim=True),
        "eps": torch.full((batch,), 0.05, dtype=FP64),
    }


def _transport(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    sizes, iterations = ((1, 7, 9, 5), 3) if small else ((2, 33, 65, 24), 50)

    def case(name: str, inputs: Inputs, n_iters: int = iterations, **options: Any) -> Case:
        def solve(backend: str, **given: Tensor) -> dict[str, Tensor]:
            arguments = {"n_iters": n_iters, "return_plan": True, **options, **given, "backend": backend}
            out = pk.sinkhorn_hadamard(**arguments)._asdict()
            return {k: v for k, v in out.items() if v.is_floating_point()}

        return Case("sinkhorn_hadamard", name, inputs, solve)

    def changed(**changes: Any) -> Inputs:
        inputs = _clouds(*sizes)
        for name, change in changes.items():
            inputs[name] = change(inputs[name]) if callable(change) else change
        return inputs

    for eps in (1e-5, 1e-4, 1e-3, 0.05, 10.0):
        yield case(f"eps {eps:g}", changed(eps=lambda old, eps=eps: torch.full_like(old, eps)))
    batch, n, m, dim = sizes
    costs = 1e6 * _Random(1).uniform(batch, n, m)
    yield case("costs up to 1e6, eps 5e4", changed(cost=costs, eps=lambda e: 1e6 * e), cost_scale=1.0)
    yield case("costs up to 1e6, eps 1", changed(cost=costs, eps=torch.ones_like), cost_scale=1.0)
    yield case("squared distances", changed(), cost="sqeuclidean")
    yield case("cosine", changed(), cost="cosine")

    def outlier(x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[:, :1], 6e4 if dtype == torch.float16 else 1e6), x[:, 1:]], 1)

    def start(t: Tensor) -> Tensor:
        return torch.cat([torch.full_like(t[:, :3], 1e-30), t[:, 3:]], 1)

    yield case("an outlier of 1e6 (fp16: 6e4)", changed(x=outlier))
    clouds = _clouds(*sizes)
    yield case("coincident points", changed(y=torch.cat([clouds["x"][:, :5], clouds["y"][:, 5:]], 1)))
    yield case("equal points", changed(x=lambda x: torch.full_like(x, 0.3), y=lambda y: torch.full_like(y, 0.3)))
    yield case("100 from the origin", changed(x=lambda x: x + 100, y=lambda y: y + 100))
    large = _large(dtype)
    yield case("values of 1e17 (fp16: 6e4)", changed(x=lambda x: large * x.clamp(-1, 1), y=lambda y: large * y / 2))
    yield case("values of 1e-5", changed(x=lambda x: 1e-5 * x, y=lambda y: 1e-5 * y))
    yield case("weights of 1e-30", changed(a=start, b=start))
    yield case("unbalanced", changed(), reach=0.6)
    yield case("unbalanced on one side", changed(), reach=(None, 0.5))
    yield case("1 iteration", changed(), n_iters=1)
    yield case("implicit gradient", changed(), gradient="implicit")
    yield case("detached plan", changed(), gradient="detached")
    yield case("1 x 1", _clouds(batch, 1, 1, dim))
    yield case("1 x M", _clouds(batch, 1, m, dim))
    yield case("D = 1", _clouds(batch, n, m, 1))
    if small:
        yield case("10 iterations", changed(), n_iters=10)
        return
    yield case("500 iterations", changed(), n_iters=500)
    yield case("D = 3840", _clouds(2, 33, 17, 3840))
    yield case("N = M = 1000", _clouds(1, 1000, 1000, 8), n_iters=5)


def _divergence(small: bool) -> Iterator[Case]:
    sizes = (1, 7, 6, 3) if small else (2, 65, 40, 3)
    random = _Random()
    shared = {"x": random.normal(*sizes[:2], sizes[3]), "y": 0.5 + random.normal(sizes[0], *sizes[2:])}
    options: dict[str, dict[str, Any]] = {
        "p = 2": {"p": 2, "blur": 0.3},
        "p = 1, unbalanced": {"p": 1, "blur": 0.1, "reach": 1.0},
    }
    for name, chosen in options.items():

        def solve(backend: str, chosen: dict[str, Any] = chosen, **given: Tensor) -> dict[str, Tensor]:
            out = pk.sinkhorn_divergence(**given, **chosen, tol=None, n_iters=5 if small else 100, backend=backend)
            return {"divergence": out}

        yield Case("sinkhorn_divergence", name, shared, solve)


def _sequences(batch: int, dim: int, length: int, states: int) -> Inputs:
    random = _Random()
    return {
        "u": random.normal(batch, dim, length),
        "delta": 0.5 * random.normal(batch, dim, length),
        "A": -torch.arange(1, states + 1, dtype=FP64).expand(dim, states).clone(),
        "B": random.normal(batch, states, length),
        "C": random.normal(batch, states, length),
        "D": random.normal(dim),
        "z": random.normal(batch, dim, length),
        "delta_bias": -1 + random.normal(dim),
        "initial_state": random.normal(batch, dim, states),
    }


def _scan(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    sizes = (2, 3, 9, 4) if small else (2, 24, 257, 16)

    def case(name: str, inputs: Inputs, **options: Any) -> Case:
        def solve(backend: str, **given: Tensor) -> dict[str, Tensor]:
            arguments = {"delta_softplus": True, "return_final_state": True, **options, **given, "backend": backend}
            out, state = pk.selective_scan(**arguments)
            return {"out": out, "final_state": state}

        return Case("selective_scan", name, inputs, solve)

    def changed(sizes: tuple[int, ...] = sizes, **changes: Any) -> Inputs:
        inputs = _sequences(*sizes)
        return inputs | {name: change(inputs[name]) for name, change in changes.items()}

    batch, _, length, _ = sizes
    lengths, packs = torch.tensor([length, length // 2]), (torch.arange(length) // 4).expand(batch, -1)
    yield case("Mamba's values", changed())
    yield case("reverse, lengths, packed", changed(), reverse=True, lengths=lengths, seq_idx=packs)
    yield case("steps of 1e4: states underflow", changed(delta=lambda d: d + 1e4))
    yield case("steps of exp(-60): nothing moves", changed(delta=lambda d: d - 60))
    yield case("A of -1e-6", changed(A=lambda a: torch.full_like(a, -1e-6)))
    yield case("A of -1e4", changed(A=lambda a: torch.full_like(a, -1e4)))
    large = {"u": lambda u: _large(dtype) * u.clamp(-1, 1), "B": lambda b: b.clamp(-1, 1)}
    yield case("u of 1e17 (fp16: 6e4)", changed(**large))
    sums = {"u": torch.abs, "B": torch.abs, "C": torch.abs, "A": lambda a: 1e-5 * a, "delta": lambda d: d + 4}
    if small:
        yield case("N = 24", changed((1, 2, 9, 24)))
        yield case("growing sums, L = 65", changed((1, 2, 65, 4), **sums))
        return
    for states in (8, 24, 64):
        yield case(f"N = {states}", changed((2, 24, 257, states)))
    yield case("sums beyond fp16, L = 4096", changed((1, 4, 4096, 16), **sums))
    if dtype in LONG:
        yield case("L = 65,536", changed((1, 2, 65536, 16)))


def _convolution(dtype: torch.dtype, small: bool) -> Iterator[Case]:
    def case(name: str, length: int, width: int, activation: str | None = "silu", factor: float = 1.0) -> Case:
        random = _Random()
        dim = 3 if small else 24
        inputs = {
            "x": factor * random.normal(2, dim, length).clamp(-1, 1),
            "weight": random.normal(dim, width).clamp(-1, 1),
            "bias": random.normal(dim),
            "initial_state": random.normal(2, dim, width - 1),
        }

        def solve(backend: str, **given: Tensor) -> dict[str, Tensor]:
            out, state = pk.causal_conv1d(**given, activation=activation, return_final_state=True, backend=backend)
            return {"out": out, "final_state": state}

        return Case("causal_conv1d", name, inputs, solve)

    length = 9 if small else 257
    yield case("W = 4", length, 4)
    yield case("W = 4 without activation", length, 4, None)
    yield case("values of 1e17 (fp16: 6e4)", length, 4, "silu", _large(dtype))
    yield case("values of 1e-5", length, 4, "silu", 1e-5)
    yield case("W = 1", length, 1)
    yield case("W = 32", 40 if small else 4096, 32)
    if not small:
        yield case("L = 65,536", 65536, 4)


def _single_steps(length: int = 65536) -> Iterator[Case]:
    """Single steps against the whole sequence."""
    inputs = _sequences(1, 2, length, 16)

    def steps(backend: str, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor, **given: Tensor) -> Inputs:
        state = given.pop("initial_state").clone()
        rest = {"A": given["A"], "D": given["D"], "dt_bias": given["delta_bias"], "dt_softplus": True}
        lines = zip(*(t.unbind(-1) for t in (u, delta, B, C, z)), strict=True)
        outs = [pk.selective_state_update(state, *line[:2], A, *line[2:4], z=line[4], **rest, backend=backend)
                for A in [rest.pop("A")] for line in lines]  # fmt: skip
        return {"out": torch.stack(outs, -1), "final_state": state}

    def whole(backend: str, **given: Tensor) -> Inputs:
        out, state = pk.selective_scan(**given, delta_softplus=True, return_final_state=True, backend=backend)
        return {"out": out, "final_state": state}

    yield Case("selective_state_update", "65,536 steps", inputs, steps, whole)

    random = _Random()
    line = {"x": random.normal(1, 8, length), "weight": random.normal(8, 4), "bias": random.normal(8)}

    def conv_steps(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Inputs:
        state = x.new_zeros(1, 8, 3)
        outs = [pk.causal_conv1d_update(t, state, weight, bias, "silu", backend=backend) for t in x.unbind(-1)]
        return {"out": torch.stack(outs, -1), "final_state": state}

    def conv_whole(backend: str, **given: Tensor) -> Inputs:
        out, state = pk.causal_conv1d(**given, activation="silu", return_final_state=True, backend=backend)
        return {"out": out, "final_state": state}

    yield Case("causal_conv1d_update", "65,536 steps", line, conv_steps, conv_whole)
