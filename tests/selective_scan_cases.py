"""The cases on which selective_scan is tested, and what it is tested against: a plain loop."""

from __future__ import annotations

import torch
from scan_cases import leaves, outputs_and_gradients, pairwise
from torch import Tensor

from parrot_kernels.ops.selective_scan import selective_scan

OPTIONS = {
    "delta_softplus": (False, True),
    "delta_bias": (False, True),
    "D": (False, True),
    "z": (False, True),
    "B": ("constant", "step", "group"),
    "C": ("constant", "step", "group"),
    "reverse": (False, True),
    "lengths": (False, True),
    "seq_idx": (False, True),
    "initial_state": (False, True),
}
EVERYTHING = {
    "delta_softplus": True,
    "delta_bias": True,
    "D": True,
    "z": True,
    "B": "group",
    "C": "step",
    "reverse": True,
    "lengths": True,
    "seq_idx": True,
    "initial_state": True,
}
CASES = list(pairwise(OPTIONS))


def plain_loop(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, lengths, seq_idx
) -> tuple[Tensor, Tensor]:
    """The definition, one sequence and one step at a time, in the dtype of its inputs."""
    (batch, dim, length), states = u.shape, A.shape[1]
    outs, finals = [], []
    for b in range(batch):
        n = length if lengths is None else int(lengths[b])
        h = u.new_zeros(dim, states) if initial_state is None else initial_state[b]
        out, before = [u.new_zeros(dim)] * length, None
        for t in reversed(range(n)) if reverse else range(n):
            if seq_idx is not None and before is not None and seq_idx[b, t] != seq_idx[b, before]:
                h = torch.zeros_like(h)
            before = t
            dt = delta[b, :, t] + (0 if delta_bias is None else delta_bias)
            if delta_softplus:
                dt = torch.logaddexp(dt, torch.zeros_like(dt))
            B_t, C_t = (_at(matrix, b, t, dim) for matrix in (B, C))
            h = torch.exp(dt[:, None] * A) * h + dt[:, None] * B_t * u[b, :, t, None]
            y = (C_t * h).sum(1) + (0 if D is None else D * u[b, :, t])
            out[t] = y if z is None else y * z[b, :, t] / (1 + torch.exp(-z[b, :, t]))
        outs.append(torch.stack(out, 1) if out else u.new_zeros(dim, 0))
        finals.append(h)
    return torch.stack(outs), torch.stack(finals)


def _at(matrix: Tensor, b: int, t: int, dim: int) -> Tensor:
    if matrix.dim() == 2:
        return matrix
    if matrix.dim() == 3:
        return matrix[b, :, t].expand(dim, -1)
    groups = matrix.shape[1]
    return torch.stack([matrix[b, d * groups // dim, :, t] for d in range(dim)])


def make(case, batch=3, dim=6, length=15, states=8, dtype=torch.float64, device="cpu", seed=0):
    """Inputs (tensors to differentiate) and options of a case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    matrices = {
        "constant": lambda: normal(dim, states, dtype=compute),
        "step": lambda: normal(batch, states, length),
        "group": lambda: normal(batch, 3, states, length),
    }
    inputs = {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length).mul(0.5).add(0 if case["delta_softplus"] else 1).abs(),
        "A": -0.1 - normal(dim, states, dtype=compute).abs(),
        "B": matrices[case["B"]](),
        "C": matrices[case["C"]](),
        "D": normal(dim, dtype=compute) if case["D"] else None,
        "z": normal(batch, dim, length) if case["z"] else None,
        "delta_bias": normal(dim, dtype=compute).abs() if case["delta_bias"] else None,
        "initial_state": normal(batch, dim, states, dtype=compute) if case["initial_state"] else None,
    }
    lengths = torch.randint(1, length + 1, (batch,), generator=generator) if length else torch.zeros(batch).int()
    lengths[0] = length
    starts = (torch.rand(batch, length, generator=generator) < 0.2).long()
    options = {
        "delta_softplus": case["delta_softplus"],
        "reverse": case["reverse"],
        "lengths": lengths.to(device) if case["lengths"] else None,
        "seq_idx": starts.cumsum(1).to(device) if case["seq_idx"] else None,
    }
    return inputs, options


def cotangents(inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, dim, length = inputs["u"].shape
    out, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, dim, length), (batch, dim, inputs["A"].shape[1]))
    )
    return out.to(inputs["u"].device), state.to(inputs["u"].device)


def run(inputs, options, backend="torch"):
    return outputs_and_gradients(
        lambda **i: selective_scan(**i, **options, return_final_state=True, backend=backend),
        leaves(inputs),
        cotangents(inputs),
    )


def expected(inputs, options):
    return outputs_and_gradients(
        lambda **i: plain_loop(**i, **options), leaves(inputs, torch.float64), cotangents(inputs)
    )
