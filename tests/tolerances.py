"""The one table of tolerances, each with its reason. Errors are relative to the largest magnitude of the
expected tensor: max |got - want| <= tolerance * max(1, max |want|), unless a test says otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    # One half-step of Sinkhorn rounds in the compute dtype; eps magnifies the rounding of C by 1/eps.
    "sinkhorn": {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    # The adjoint runs through twice as many half-steps as the forward.
    "sinkhorn_grad": {torch.float64: 1e-8, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2},
    # Rounding accumulates over L steps of a contracting recurrence.
    "scan": {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    "scan_grad": {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3.2e-2},
    # A sum of a handful of products.
    "conv": {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    "conv_grad": {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2},
}


def tolerance(kind: str, dtype: torch.dtype) -> float:
    return TOLERANCES[kind][dtype]


def assert_close(got: Tensor, want: Tensor, kind: str, name: str = "", scale: float = 1.0) -> None:
    """Compare in float64 with the tolerance of ``got``'s dtype; says the error and the bound when it fails."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if got.numel() == 0:
        return
    got64, want64 = got.detach().double(), want.detach().double()
    assert torch.isfinite(want64).all(), f"{name}: the expected tensor is not finite"
    worst = (got64 - want64).abs().max().item()
    bound = scale * tolerance(kind, got.dtype) * max(1.0, want64.abs().max().item())
    assert worst <= bound, f"{name}: worst error {worst:.3e}, bound {bound:.3e}"
