"""The options of Sinkhorn-Hadamard: their checks, and the form in which they pass through the registered op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .. import backends, checks
from .sinkhorn_kernels import OP

COSTS = ("euclidean", "sqeuclidean", "cosine")
GRADIENTS = ("unrolled", "implicit", "detached")


def check(
    *,
    cost: str = "euclidean",
    cost_scale: float | str = "max",
    eps: float | Tensor = 0.05,
    n_iters: int = 50,
    tol: float | None = None,
    reach: float | Sequence[float | None] | None = None,
    gradient: str = "unrolled",
    backend: str | None = None,
    return_plan: bool = False,
    return_hadamard: bool = True,
) -> list[float]:
    """The numbers among the options, packed; raises where an option is wrong by itself.

    ``cost`` may be "matrix" here, for a tensor: a caller that is given a name checks it.
    """
    checks.choice(OP, "gradient", gradient, GRADIENTS)
    checks.choice(OP, "backend", backend, (None, *backends.NAMES))
    if not isinstance(eps, Tensor):
        checks.positive(OP, "eps", eps)
    rho_x, rho_y = _rho(reach, 2 if cost == "sqeuclidean" else 1)
    return Numbers.pack(n_iters, cost_scale, tol, rho_x, rho_y, return_plan, return_hadamard)


def _rho(reach: float | Sequence[float | None] | None, power: int) -> tuple[float | None, float | None]:
    """The weight of each side's Kullback-Leibler divergence, None for balanced."""
    pair = tuple(reach) if isinstance(reach, tuple | list) else (reach, reach)
    wanted = "None, a positive number, or a pair (reach_x, reach_y) of these"
    if len(pair) != 2:
        raise checks.error(OP, "reach", wanted, reach)
    for side in pair:
        if side is not None:
            checks.positive(OP, "reach", side, wanted)
    x, y = (None if side is None else side**power for side in pair)
    return x, y


class Numbers(NamedTuple):
    """The numbers among the options; they pass through the op as a list of floats in which -1 stands for None.

    One list, because the price of calling a differentiable custom op grows with the square of its arguments.
    """

    n_iters: int
    cost_scale: float | None
    tol: float | None
    rho_x: float | None
    rho_y: float | None
    return_plan: bool
    return_hadamard: bool
    keep: bool  # whether a backward may follow

    @staticmethod
    def pack(n_iters, cost_scale, tol, rho_x, rho_y, return_plan, return_hadamard) -> list[float]:
        if isinstance(n_iters, bool) or not isinstance(n_iters, int):
            raise checks.error(OP, "n_iters", "an int", repr(n_iters), kind=TypeError)
        if n_iters < 1:
            raise checks.error(OP, "n_iters", "at least 1", n_iters)
        if isinstance(cost_scale, str):
            checks.choice(OP, "cost_scale", cost_scale, ("max",))
            cost_scale = None
        else:
            checks.positive(OP, "cost_scale", cost_scale, 'a positive number or "max"')
        if tol is not None and tol != 0:
            checks.positive(OP, "tol", tol, "None or a number that is not negative")
        options = (n_iters, cost_scale, tol, rho_x, rho_y, bool(return_plan), bool(return_hadamard), False)
        return [-1.0 if value is None else float(value) for value in options]

    @staticmethod
    def unpack(numbers: Sequence[float]) -> Numbers:
        return _unpack(tuple(numbers))


@functools.lru_cache(maxsize=256)
def _unpack(numbers: tuple[float, ...]) -> Numbers:
    cost_scale, tol, rho_x, rho_y = (None if value == -1.0 else value for value in numbers[1:5])
    return Numbers(int(numbers[0]), cost_scale, tol, rho_x, rho_y, *map(bool, numbers[5:]))
