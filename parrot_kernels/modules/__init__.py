"""nn.Modules over the ops."""

from __future__ import annotations

from .bimamba import BiMamba
from .mamba import Mamba
from .parallel_branch_fusion import ParallelBranchFusion
from .sinkhorn_divergence import SinkhornDivergence
from .sinkhorn_hadamard import SinkhornHadamard

__all__ = ["BiMamba", "Mamba", "ParallelBranchFusion", "SinkhornDivergence", "SinkhornHadamard"]
