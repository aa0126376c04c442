"""Entropic transport between two sets of features, as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..ops import sinkhorn_options
from ..ops.sinkhorn_hadamard import SinkhornHadamardOutput, sinkhorn_hadamard


class SinkhornHadamard(nn.Module):
    """The op :func:`parrot_kernels.sinkhorn_hadamard` with its options fixed; it has no parameters.

    Args: as the op's keyword arguments, whose documentation gives formulas, units, gradients, memory and sources.

    Raises:
        ValueError, TypeError: a wrong option, at once; inputs as the op.
    """

    def __init__(
        self,
        *,
        cost: str = "euclidean",
        cost_scale: float | str = "max",
        eps: float = 0.05,
        n_iters: int = 50,
        tol: float | None = None,
        reach: float | tuple[float | None, float | None] | None = None,
        gradient: str = "unrolled",
        backend: str | None = None,
        return_plan: bool = False,
        return_hadamard: bool = True,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "cost": cost,
            "cost_scale": cost_scale,
            "eps": eps,
            "n_iters": n_iters,
            "tol": tol,
            "reach": reach,
            "gradient": gradient,
            "backend": backend,
            "return_plan": return_plan,
            "return_hadamard": return_hadamard,
        }
        checks.choice("SinkhornHadamard", "cost", cost, sinkhorn_options.COSTS)
        sinkhorn_options.check(**self.options)

    def forward(self, x: Tensor, y: Tensor, **overrides: Any) -> SinkhornHadamardOutput:
        """Solve for x (B, N, D) and y (B, M, D), or one problem (N, D) and (M, D).

        Args:
            overrides: any keyword argument of the op, for this call only: weights ``a``, ``b``, ``x_lengths``,
                ``y_lengths``, a cost tensor, an ``eps`` tensor (B,), ``return_plan=True``.
        """
        return sinkhorn_hadamard(x, y, **{**self.options, **overrides})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
