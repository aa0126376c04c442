"""nn.Modules over the ops."""

from __future__ import annotations

from .bimamba import BiMamba
from .linear import Linear, accelerate_linear
from .mamba import Mamba
from .parallel_branch_fusion import ParallelBranchFusion
from .sinkhorn_divergence import SinkhornDivergence
from .sinkhorn_hadamard import SinkhornHadamard

__all__ = [
    "BiMamba",
    "Linear",
    "Mamba",
    "ParallelBranchFusion",
    "SinkhornDivergence",
    "SinkhornHadamard",
    "accelerate_linear",
]
