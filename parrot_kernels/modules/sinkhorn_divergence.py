"""The Sinkhorn divergence as a loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops import sinkhorn_options
from ..ops.sinkhorn_divergence import check_options, sinkhorn_divergence


class SinkhornDivergence(nn.Module):
    """The loss :func:`parrot_kernels.sinkhorn_divergence` with its options fixed; it has no parameters.

    Args: as the function's keyword arguments, whose documentation gives formulas, units, gradients, memory and sources.

    Raises:
        ValueError, TypeError: a wrong option, at once; inputs as the function.
    """

    def __init__(
        self,
        *,
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        debias: bool = True,
        n_iters: int = 1000,
        tol: float | None = 1e-3,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_options(p, blur, reach)
        sinkhorn_options.check(n_iters=n_iters, tol=tol, backend=backend)
        self.options: dict[str, Any] = {
            "p": p,
            "blur": blur,
            "reach": reach,
            "debias": debias,
            "n_iters": n_iters,
            "tol": tol,
            "backend": backend,
        }

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
    ) -> Tensor:
        """The divergence (B,) of x (B, N, D) and y (B, M, D), or () of one problem (N, D) and (M, D).

        Args:
            a, b: weights (B, N) and (B, M), uniform by default.
            x_lengths, y_lengths: valid rows of each problem, (B,).
        """
        return sinkhorn_divergence(x, y, a=a, b=b, x_lengths=x_lengths, y_lengths=y_lengths, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
