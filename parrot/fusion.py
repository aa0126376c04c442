"""The fusions of the paper: one module, parallel branches, different parts of them."""

from __future__ import annotations

from typing import Any

from parrot_kernels.modules import ParallelBranchFusion

# x is the projection of the first encoder, y of the second; the order is that of the fused row.
FUSIONS: dict[str, tuple[str, ...]] = {
    "concat": ("x", "y"),
    "hadamard": ("hadamard",),
    "ot": ("x_to_y", "y", "y_to_x", "x"),
    "parrot": ("hadamard", "x_to_y", "y", "y_to_x", "x"),
}


def build_fusion(name: str, **transport: Any) -> ParallelBranchFusion:
    """The fusion ``name`` of :data:`FUSIONS`.

    Args:
        name: "concat", "hadamard", "ot" or "parrot".
        transport: options of :class:`parrot_kernels.modules.SinkhornHadamard`.

    Raises:
        ValueError: another name.
    """
    if name not in FUSIONS:
        raise ValueError(f"build_fusion: `name` must be one of {', '.join(FUSIONS)}; got {name!r}.")
    return ParallelBranchFusion(FUSIONS[name], **transport)
