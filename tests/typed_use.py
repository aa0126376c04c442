"""Never run: what `make typecheck` checks of the public names as somebody who uses them would, strictly."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import parrot_kernels as pk
from parrot import Parrot, ParrotConfig, SingleEncoderClassifier
from parrot_kernels import compat
from parrot_kernels.compat import transformers as fast_mamba


def transport(x: Tensor, y: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    out = pk.sinkhorn_hadamard(x, y, x_lengths=lengths, eps=0.1, reach=(0.5, None), return_plan=True)
    plan: Tensor = pk.sinkhorn_plan(x, y, cost=out.cost)
    x_to_y, y_to_x = pk.sinkhorn_transport(x, y)
    loss: Tensor = pk.sinkhorn_divergence(x, y, blur=0.1) + plan.sum() + x_to_y.sum()
    row: Tensor = pk.parallel_branch_fusion(x, y, parts=("x", "y"))
    return loss, row + y_to_x, out.x_hadamard


def scan(u: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = pk.selective_scan(u, u, A, B, B, reverse=True)
    out, state = pk.selective_scan(u, u, A, B, B, return_final_state=True)
    x: Tensor = pk.causal_conv1d(u, weight, activation="silu")
    filtered, inputs = pk.causal_conv1d(u, weight, return_final_state=True)
    step: Tensor = pk.causal_conv1d_update(u, inputs, weight)
    return y + out + x + filtered + step + pk.selective_state_update(state, u, u, A, B, B).sum()


def modules() -> list[nn.Module]:
    options: dict[str, Any] = {"dims": (4, 5), "n_classes": 3}
    model: Parrot = Parrot(**options, config=ParrotConfig(transport="reference"))
    return [
        model,
        SingleEncoderClassifier(4, 3, head="cnn"),
        pk.Mamba(8, d_state=16, backend="cpu"),
        pk.BiMamba(8),
        pk.SinkhornHadamard(cost="cosine"),
        pk.SinkhornDivergence(p=1),
        pk.ParallelBranchFusion(("x", "y")),
    ]


def settings() -> tuple[str, ...]:
    pk.set_workspace_limit(1 << 20)
    with fast_mamba.enabled():
        pass
    return compat.install("mamba_ssm", override=True)
