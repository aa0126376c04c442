"""parrot_kernels: fused kernels for entropic optimal transport and Mamba-1, on GPUs and on any CPU.

``python -m parrot_kernels`` tells what this machine has and what serves each op.
"""

from __future__ import annotations

from typing import Any

from .modules import BiMamba, Mamba, ParallelBranchFusion, SinkhornDivergence, SinkhornHadamard
from .native import set_workspace_limit
from .ops.causal_conv1d import causal_conv1d
from .ops.causal_conv1d_update import causal_conv1d_update
from .ops.parallel_branch_fusion import parallel_branch_fusion
from .ops.selective_scan import selective_scan
from .ops.selective_state_update import selective_state_update
from .ops.sinkhorn_divergence import sinkhorn_divergence
from .ops.sinkhorn_hadamard import SinkhornHadamardOutput, sinkhorn_hadamard
from .ops.sinkhorn_transport import sinkhorn_plan, sinkhorn_transport

__all__ = [
    "BiMamba",
    "Mamba",
    "ParallelBranchFusion",
    "SinkhornDivergence",
    "SinkhornHadamard",
    "SinkhornHadamardOutput",
    "causal_conv1d",
    "causal_conv1d_update",
    "parallel_branch_fusion",
    "selective_scan",
    "selective_state_update",
    "set_workspace_limit",
    "sinkhorn_divergence",
    "sinkhorn_hadamard",
    "sinkhorn_plan",
    "sinkhorn_transport",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("parrot-kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
