"""The fusions of the paper: one module, parallel branches, different parts of them."""

from __future__ import annotations

from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn

from parrot_kernels.modules import ParallelBranchFusion

TRANSPORTED = ("x_to_y", "y_to_x")  # the parts that need the plan

# x is the projection of the first encoder, y of the second; the order is that of the fused row.
FUSIONS: dict[str, tuple[str, ...]] = {
    "concat": ("x", "y"),
    "hadamard": ("hadamard",),
    "ot": ("x_to_y", "y", "y_to_x", "x"),
    "parrot": ("hadamard", "x_to_y", "y", "y_to_x", "x"),
}
PAIRS = ("all", "first")


class PairwiseFusion(nn.Module):
    """The fusion of each pair of K streams, concatenated, with every stream itself at most once.

    Pairs (k, l), k < l, come in lexicographic order; "all" are K (K - 1) / 2, "first" the K - 1 with k = 0. Each gives
    the parts of the two-stream fusion, less the streams that an earlier pair gave. So two streams give the row of
    :class:`parrot_kernels.modules.ParallelBranchFusion`, and three, fused by "parrot" in all pairs, 12 parts::

        [x0*x1, 0>1, x1, 1>0, x0,   x0*x2, 0>2, x2, 2>0,   x1*x2, 1>2, 2>1]

    where k>l is x_k carried to the rows of x_l. In general "parrot" has 3 pairs + K parts, "ot" 2 pairs + K,
    "hadamard" one for each pair and "concat" K, each as wide as a stream.

    Args:
        name: of :data:`FUSIONS`.
        n_streams: K.
        pairs: "all" or "first".
        transport: options of :class:`parrot_kernels.modules.SinkhornHadamard`.
    """

    def __init__(self, name: str, n_streams: int, pairs: str = "all", **transport: Any) -> None:
        super().__init__()
        self.fusions, self.pairs = nn.ModuleList(), []
        given: set[int] = set()
        for pair in combinations(range(n_streams), 2):
            if pairs == "first" and pair[0]:
                continue
            repeated = {side for side, stream in zip("xy", pair, strict=True) if stream in given}
            given.update(pair)
            if parts := [part for part in FUSIONS[name] if part not in repeated]:
                self.fusions.append(ParallelBranchFusion(parts, **transport))
                self.pairs.append(pair)

    @property
    def solves_transport(self) -> bool:
        """Whether any part needs a transport plan."""
        return self._first.solves_transport

    @property
    def _first(self) -> ParallelBranchFusion:
        return cast(ParallelBranchFusion, self.fusions[0])

    def width(self, dim: int) -> int:
        """Features out for streams of ``dim`` features."""
        return sum(cast(ParallelBranchFusion, fusion).width(dim) for fusion in self.fusions)

    def forward(self, *streams: Tensor, eps: float | Tensor | None = None) -> Tensor:
        """Fuse K streams, all (N, D) or (B, N, D); ``eps`` as of :class:`ParallelBranchFusion`."""
        rows = [f(streams[k], streams[l], eps=eps) for f, (k, l) in zip(self.fusions, self.pairs, strict=True)]
        return torch.cat(rows, dim=-1)

    def plan(self, *streams: Tensor, eps: float | Tensor | None = None) -> Tensor:
        """The transport plan (..., N, N) between the rows of the first two streams."""
        return self._first.plan(*streams[:2], eps=eps)


def build_fusion(
    name: str, n_streams: int = 2, pairs: str = "all", **transport: Any
) -> ParallelBranchFusion | PairwiseFusion:
    """The fusion ``name`` of :data:`FUSIONS`.

    Args:
        name: "concat", "hadamard", "ot" or "parrot".
        n_streams: how many streams; from three on, a :class:`PairwiseFusion`.
        pairs: see there.
        transport: options of :class:`parrot_kernels.modules.SinkhornHadamard`.

    Raises:
        ValueError: another name.
    """
    if name not in FUSIONS:
        raise ValueError(f"build_fusion: `name` must be one of {', '.join(FUSIONS)}; got {name!r}.")
    if n_streams > 2:
        return PairwiseFusion(name, n_streams, pairs, **transport)
    return ParallelBranchFusion(FUSIONS[name], **transport)
