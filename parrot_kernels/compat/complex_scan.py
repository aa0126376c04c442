"""The selective scan with a complex A (S4D-Lin and the like), as mamba-ssm's functions accept it: a step loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def complex_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each state stands for itself and its conjugate: y_t = 2 Re <C_t, h_t>, the rest as for a real A.

    B, C per step are real, their real and imaginary parts taking turns along time: (batch, [groups,] n, 2 l).
    Returns (out, last_state), the latter complex. Autograd keeps every state: small sizes only.
    """
    dim, real = u.shape[1], torch.float64 if A.dtype == torch.complex128 else torch.float32
    x, dt = u.to(real), delta.to(real)
    if delta_bias is not None:
        dt = dt + delta_bias.to(real).unsqueeze(-1)
    if delta_softplus:
        dt = F.softplus(dt)

    def per_step(matrix: Tensor) -> list[Tensor]:  # that broadcast to (batch, dim, n)
        if matrix.dim() == 2:
            return [matrix.to(A.dtype)] * u.shape[2]
        matrix = torch.view_as_complex(matrix.to(real).unflatten(-1, (-1, 2)))
        groups = matrix if matrix.dim() == 4 else matrix.unsqueeze(1)
        return [step.repeat_interleave(dim // step.shape[1], 1) for step in groups.unbind(-1)]

    state = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(A.dtype)
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(-1), dt.unbind(-1), per_step(B), per_step(C), strict=True):
        state = torch.exp(dt_t.unsqueeze(-1) * A) * state + (dt_t * x_t).unsqueeze(-1) * B_t
        outputs.append(2 * (state * C_t).sum(-1).real)
    y = torch.stack(outputs, -1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(real).unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y.to(u.dtype), state
