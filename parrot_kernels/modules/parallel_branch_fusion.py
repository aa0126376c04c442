"""PARROT's fusion of two streams: parallel branches of transport and products, concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.parallel_branch_fusion import PARTS, TRANSPORTED, parallel_branch_fusion
from .sinkhorn_hadamard import SinkhornHadamard


class ParallelBranchFusion(nn.Module):
    """Concatenate branches of two paired feature matrices along the feature dimension.

    Rows x_i and y_i belong together (two views of one sample). The N rows are the points of one entropic transport
    problem, so a row's transported features depend on all rows: permuting them permutes the output, and changing
    one changes all. The parts, of width D each:

    ============  =====================================================
    ``hadamard``  x_i * y_i
    ``x_to_y``    (1/b_i) sum_j P_ji x_j, the x carried to row i of y
    ``y_to_x``    (1/a_i) sum_j P_ij y_j, the y carried to row i of x
    ``x``, ``y``  the inputs
    ============  =====================================================

    The default is PARROT's row (arXiv 2506.01138), [x*y, x_to_y, y, y_to_x, x]. With no transported part the
    transport problem is not solved. With one row the plan is [[1]] and x_to_y, y_to_x are x, y themselves.

    Args:
        parts: which parts, in this order.
        options: keyword arguments of :class:`SinkhornHadamard`.

    dtypes, gradients and memory are those of :func:`parrot_kernels.parallel_branch_fusion`, autograd's where nothing is
    transported.

    Raises:
        ValueError, TypeError: an unknown part or a wrong option, at once; inputs as the function.
    """

    def __init__(self, parts: Sequence[str] = PARTS, **options: Any) -> None:
        super().__init__()
        if not parts:
            raise checks.error("ParallelBranchFusion", "parts", "at least one of " + ", ".join(PARTS), "none")
        for part in parts:
            checks.choice("ParallelBranchFusion", "parts", part, PARTS)
        self.parts = tuple(parts)
        self.transport = SinkhornHadamard(**options, return_hadamard=False)

    @property
    def solves_transport(self) -> bool:
        """Whether any part needs the transport plan."""
        return any(part in TRANSPORTED for part in self.parts)

    def width(self, dim: int) -> int:
        """Features out for ``dim`` features in."""
        return len(self.parts) * dim

    def forward(self, x: Tensor, y: Tensor, *, eps: float | Tensor | None = None) -> Tensor:
        """Fuse x and y, both (N, D) or a batch of independent problems (B, N, D), into (..., N, len(parts) * D).

        ``eps``, if given, is the regularisation of this call: a number or a tensor, () or (B,). By
        :func:`parrot_kernels.parallel_branch_fusion` where there is a transported part.
        """
        if self.solves_transport:
            options = {name: value for name, value in self.transport.options.items() if "return" not in name}
            if eps is not None:
                options["eps"] = eps
            return parallel_branch_fusion(x, y, parts=self.parts, **options)
        if x.shape != y.shape:
            raise checks.error("ParallelBranchFusion", "y", f"of x's shape {tuple(x.shape)}", tuple(y.shape))
        return torch.cat([x * y if part == "hadamard" else x if part == "x" else y for part in self.parts], dim=-1)

    def plan(self, x: Tensor, y: Tensor, *, eps: float | Tensor | None = None) -> Tensor:
        """The transport plan (..., N, N) between the rows of x and of y; ``eps`` as of a call."""
        return self.transport(x, y, return_plan=True, **({} if eps is None else {"eps": eps})).plan

    def extra_repr(self) -> str:
        return f"parts={self.parts}"
