"""Parallel branch fusion in plain PyTorch, by the reference of the transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sinkhorn_hadamard import sinkhorn_hadamard


def parallel_branch_fusion(*, x: Tensor, y: Tensor, parts: Sequence[str], **options: Any) -> Tensor:
    """[x*y, x_to_y, y, y_to_x, x], or the ``parts`` of it in their order; ``options`` of `sinkhorn_hadamard`."""
    transported = sinkhorn_hadamard(x=x, y=y, **options)
    branches = {"x": x, "y": y, "hadamard": x * y, "x_to_y": transported.x_to_y, "y_to_x": transported.y_to_x}
    return torch.cat([branches[part] for part in parts], dim=-1)
