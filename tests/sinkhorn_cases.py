"""Shared by the tests of sinkhorn_hadamard: problems with every option, the oracle, and where to run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from interpreted import interpreted
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import backends, native
from parrot_kernels.ops.sinkhorn_hadamard import sinkhorn_hadamard
from parrot_kernels.reference import sinkhorn_hadamard as reference

OP = "sinkhorn_hadamard"
INPUTS = ("x", "y", "a", "b", "cost", "eps")
OUTPUTS = ("x_to_y", "y_to_x", "x_hadamard", "y_hadamard", "f", "g", "plan", "cost")
CONSTANTS = ("f", "g", "plan")  # in the detached mode

# Options that are numbers are passed on; True asks `problem` for a tensor.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sqeuclidean": {"cost": "sqeuclidean", "eps": 0.1},
    "cosine": {"cost": "cosine", "cost_scale": 0.7},
    "matrix": {"cost": True, "cost_scale": 1.5, "eps": True},
    "weights": {"a": True, "b": True},
    "lengths": {"lengths": True, "eps": True},
    "tolerance": {"tol": 1e-2, "a": True, "lengths": True, "eps": True},
    "unbalanced": {"reach": 0.6, "cost": "sqeuclidean", "a": True, "b": True},
    "one-sided": {"reach": (None, 0.5), "a": True, "lengths": True},
    "everything": {
        "a": True, "b": True, "lengths": True, "cost": True, "eps": True, "tol": 1e-2, "reach": (0.8, 0.5),
    },
}  # fmt: skip


def problem(
    case: str | dict[str, Any], sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of the op, x and y among them."""
    batch, n, m, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    options = {"n_iters": 12, **(CASES[case] if isinstance(case, str) else case)}
    arguments = {"x": (2 * random(batch, n, dim) - 1).to(dtype), "y": (2 * random(batch, m, dim) - 0.7).to(dtype)}
    lengths = {}
    if options.pop("lengths", False):
        for side, size in (("x", n), ("y", m)):
            lengths[side] = torch.randint(1, size + 1, (batch,), generator=generator)
        if batch > 2:
            lengths["x"][-1] = 0
            lengths["y"][0] = 1
    for name, side, size in (("a", "x", n), ("b", "y", m)):
        if options.pop(name, False):
            weights = 0.2 + random(batch, size)
            if side in lengths:
                weights = weights.masked_fill(torch.arange(size) >= lengths[side][:, None], 0)
            arguments[name] = (weights / weights.sum(1, keepdim=True).clamp(min=0.1)).to(wide)
        if side in lengths:
            arguments[f"{side}_lengths"] = lengths[side]
    if options.get("cost") is True:
        options["cost"] = random(batch, n, m).to(wide)
    if options.get("eps") is True:
        options["eps"] = (0.1 + 0.3 * random(batch)).to(wide)
    return arguments | options


def oracle(
    x: Tensor,
    y: Tensor,
    *,
    cost: str | Tensor = "euclidean",
    cost_scale: float | str = "max",
    eps: float | Tensor = 0.05,
    reach: Any = None,
    return_plan: bool = True,
    **rest: Any,
) -> dict[str, Tensor]:
    """The reference under autograd, with the op's arguments, by the op's names."""
    matrix = isinstance(cost, Tensor)
    power = 2 if not matrix and cost == "sqeuclidean" else 1
    pair = reach if isinstance(reach, tuple) else (reach, reach)
    rho_x, rho_y = (None if r is None else r**power for r in pair)
    out = reference.sinkhorn_hadamard(
        x=x,
        y=y,
        cost="matrix" if matrix else cost,
        cost_matrix=cost if matrix else None,
        cost_scale=None if cost_scale == "max" else cost_scale,
        eps=eps if isinstance(eps, Tensor) else x.new_full((len(x),), eps),
        rho_x=rho_x,
        rho_y=rho_y,
        **rest,
    )._asdict()
    out["cost"] = out.pop("transport_cost")
    out["n_iters"] = out.pop("iterations")
    return out


def op(**arguments: Any) -> dict[str, Tensor]:
    return sinkhorn_hadamard(**{"return_plan": True} | arguments)._asdict()


def assert_marginals_of_y(
    solve: Callable[..., dict[str, Tensor]],
    scale: float,
    sizes: Sequence[tuple[int, int, int]] = ((1, 16, 17), (2, 16, 8), (3, 16, 8), (5, 6, 3)),
) -> None:
    """The plan has them, and x is averaged by it, where y is balanced and the weights are uniform.

    Where costs are thousands of eps, too: there the rounding of both potentials would be more than 1e-4 of the plan.
    """
    generator = torch.Generator().manual_seed(3)
    for n, m, dim in sizes:
        x, y = (torch.randn(2, size, dim, generator=generator) for size in (n, m))
        for eps, n_iters in ((1e-8, 2), (1e-4, 1), (0.02, 1), (0.02, 3), (0.02, 12), (0.3, 1), (1.0, 3), (1e8, 2)):
            out = solve(x=x, y=y, cost="sqeuclidean", cost_scale=0.7, eps=eps, n_iters=n_iters)
            name = f"{n} x {m}, eps {eps}, {n_iters} iterations"
            plan = m * out["plan"].cpu()
            assert_close(plan.sum(1), torch.ones(2, m), "sinkhorn", name, scale)
            assert_close(out["x_to_y"].cpu(), plan.mT @ x, "sinkhorn", f"x_to_y of {name}", scale)


def cotangents(arguments: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Gradients of the outputs, some of them several times others', in float64."""
    x, y = arguments["x"], arguments["y"]
    generator = torch.Generator().manual_seed(seed)
    shapes = (y.shape, x.shape, x.shape, y.shape, x.shape[:2], y.shape[:2], (*x.shape[:2], y.shape[1]), x.shape[:1])
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(OUTPUTS, shapes, strict=True)
    }


def with_gradients(
    function: Callable[..., dict[str, Tensor]], arguments: dict[str, Any], cotangents: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs by their names, and as "d<input>" the gradients of every floating tensor among the inputs."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if name in INPUTS and isinstance(value, Tensor)
    }
    out = function(**arguments | leaves)
    used = {n: c for n, c in cotangents.items() if out[n].requires_grad}
    sum((out[name] * c.to(out[name])).sum() for name, c in used.items()).backward()
    results = {name: value.detach() for name, value in out.items() if value is not None}
    return results | {
        f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }


def to(arguments: dict[str, Any], target: torch.dtype | str) -> dict[str, Any]:
    """Every floating tensor in another dtype, or every tensor on another device."""
    return {
        name: value.to(target)
        if isinstance(value, Tensor) and (isinstance(target, str) or value.is_floating_point())
        else value
        for name, value in arguments.items()
    }


def places(interpreter: Sequence[pytest.MarkDecorator] = ()) -> list:
    """(backend, device) of every backend there is; "interpreter" stands for Triton's, on the CPU, with marks."""
    found = [pytest.param("torch", "cpu", id="torch")]
    if "cpu" in backends.IMPLEMENTED[OP]:
        built = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")
        found.append(pytest.param("cpu", "cpu", id="cpu", marks=built))
    if "triton" in backends.IMPLEMENTED[OP]:
        found.append(pytest.param("interpreter", "cpu", id="triton-interpreter", marks=interpreter))
    for backend in (*backends.IMPLEMENTED[OP], "torch"):
        if backend != "cpu":
            found.append(pytest.param(backend, "cuda", id=f"{backend}-cuda", marks=pytest.mark.gpu))
    return found


def everywhere(test: Callable[..., None], interpreter: Sequence[pytest.MarkDecorator] = ()) -> Callable[..., None]:
    """Decorator: run a test of (backend, device, ...) at every place; with the interpreter in its own process."""
    remote = interpreted(test)

    @pytest.mark.parametrize(("backend", "device"), places(interpreter))
    @functools.wraps(test)
    def run(backend: str, device: str, **arguments: Any) -> None:
        if backend == "interpreter":
            remote(backend="triton", device=device, **arguments)
        else:
            test(backend=backend, device=device, **arguments)

    return run


def takes(backend: str, dtype: torch.dtype) -> bool:
    return backend == "torch" or dtype in backends.IMPLEMENTED[OP][backend]
