"""The selective scan of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, section 3.2) in plain PyTorch.

For a channel d with states n = 1..N, in scan order, with dt = softplus(delta + bias) or delta + bias:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = <C_t, h_t> + D u_t        out_t = y_t silu(z_t)

The adjoint state g_t = dL/dh_t runs the other way, from g_{L+1} = dL/d(final state) with decay 1:

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}
    dC_t = h_t dy_t    dB_t = g_t dt_t u_t    e_t = g_t exp(dt_t A) h_{t-1}    (d dt_t) = <e_t, A> + <g_t, B_t> u_t
    dA = sum_t e_t dt_t    du_t = <g_t, B_t> dt_t + D dy_t

`selective_scan` is the step loop that autograd goes through: the oracle. `forward` and `backward` work in chunks
of the time axis: inside one, everything but one multiply-add per step is vectorised over the chunk, and the
backward recomputes a chunk's states from the state at its start. Nothing of size B*D*L*N exists.

Where a sequence of a packed batch starts, the decay is zero; at padding dt is zero, so that the state stays.
Shapes as in `parrot_kernels.ops.selective_scan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import SOFTPLUS_THRESHOLD, silu, silu_derivative, softplus, softplus_derivative
from .scan_order import ScanOrder


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The differentiable step loop; returns (out, final_state). Autograd stores every state: small sizes only."""
    (batch, dim, length), dtype = u.shape, _compute_dtype(u)
    order = ScanOrder(batch, length, lengths, reverse, u.device)
    A = A.to(dtype)
    x, dt = order(u.to(dtype)), order(delta.to(dtype))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        dt = F.softplus(dt, threshold=SOFTPLUS_THRESHOLD)
    if order.padding is not None:
        dt = dt.masked_fill(order.padding.unsqueeze(1), 0)
    keep = None if seq_idx is None else order.same_sequence(seq_idx).to(dtype).unbind(-1)

    def per_step(matrix: Tensor) -> list[Tensor]:  # L tensors that broadcast to (B, D, N)
        matrix = matrix.to(dtype)
        if matrix.dim() == 2:
            return [matrix] * length
        matrix = order(matrix if matrix.dim() == 4 else matrix.unsqueeze(1))
        return [_spread(step, dim) for step in matrix.unbind(-1)]

    state = u.new_zeros(batch, dim, A.shape[1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    steps = zip(x.unbind(-1), dt.unbind(-1), per_step(B), per_step(C), strict=True)
    for t, (x_t, dt_t, B_t, C_t) in enumerate(steps):
        decay = torch.exp(dt_t.unsqueeze(-1) * A)
        if keep is not None:
            decay = decay * keep[t].view(batch, 1, 1)
        state = decay * state + (dt_t * x_t).unsqueeze(-1) * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, -1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(order(z.to(dtype)))
    return order(y).to(u.dtype), state


def forward(
    *,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    out: Tensor,
    final_state: Tensor,
    checkpoints: Tensor | None = None,
) -> None:
    """Fill ``out``, ``final_state`` and, if given, ``checkpoints``.

    ``checkpoints`` (B, ceil(L / chunk_size), D, N) receives the state before scan step c * chunk_size of every
    chunk c, from which a backward recomputes the others.
    """
    s = _Steps.prepare(u, delta, A, B, C, delta_bias, delta_softplus, reverse, lengths, seq_idx)
    state = _first_state(s, initial_state)
    y = torch.empty_like(s.u)
    workspace = _workspace(s, 3, chunk_size)
    for c, chunk in enumerate(s.chunks(chunk_size)):
        if checkpoints is not None:
            checkpoints[:, c] = state
        decay, states, product = (buffer[: len(chunk.u)] for buffer in workspace)
        _run(chunk, s.A, state, decay, states)
        torch.mul(states, _matrix(chunk.C, s), out=product)
        torch.sum(product, -1, out=y[chunk.slice])
        state.copy_(states[-1])
    if D is not None:
        y.addcmul_(s.u, D.to(y.dtype))
    y = y.permute(1, 2, 0)
    if z is not None:
        y = y * silu(s.order(z.to(y.dtype)))
    out.copy_(s.order(y))
    final_state.copy_(state)


def backward(
    *,
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    checkpoints: Tensor | None,
    du: Tensor,
    ddelta: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    dz: Tensor | None,
    ddelta_bias: Tensor | None,
    dinitial_state: Tensor | None,
) -> None:
    """Fill the gradients ``d*`` of the inputs of `forward`, given those of its outputs (None stands for zero).

    Without ``checkpoints`` one more pass over the time axis computes them.
    """
    s = _Steps.prepare(u, delta, A, B, C, delta_bias, delta_softplus, reverse, lengths, seq_idx)
    dtype = s.u.dtype
    workspace = _workspace(s, 4, chunk_size)
    chunks = list(s.chunks(chunk_size))
    if checkpoints is None:
        state = _first_state(s, initial_state)
        checkpoints = state.new_empty(state.shape[0], len(chunks), *state.shape[1:])
        for c, chunk in enumerate(chunks):
            checkpoints[:, c] = state
            decay, states = (buffer[: len(chunk.u)] for buffer in workspace[:2])
            _run(chunk, s.A, state, decay, states)
            state.copy_(states[-1])

    dout = torch.zeros_like(s.u) if grad_out is None else _time_first(s.order(grad_out.to(dtype)))
    if z is None:
        dy = dout
    else:
        gate = _time_first(s.order(z.to(dtype)))
        dy = dout * silu(gate)
        dgate = dout * silu_derivative(gate)  # still to be multiplied by y
    adjoint = s.u.new_zeros(s.u.shape[1], *A.shape) if grad_final_state is None else grad_final_state.to(dtype).clone()

    dx, ddt = torch.empty_like(s.u), torch.empty_like(s.u)
    dB_steps, dC_steps = _Gradient(B, s), _Gradient(C, s)
    dA.zero_()
    for c, chunk in reversed(list(enumerate(chunks))):
        decay, states, adjoints, product = (buffer[: len(chunk.u)] for buffer in workspace)
        state = checkpoints[:, c].to(dtype)
        _run(chunk, s.A, state, decay, states)
        C_t, B_t, dy_t = _matrix(chunk.C, s), _matrix(chunk.B, s), dy[chunk.slice].unsqueeze(-1)
        if z is not None:
            y = torch.mul(states, C_t, out=product).sum(-1)
            if D is not None:
                y.addcmul_(chunk.u, D.to(dtype))
            dgate[chunk.slice] *= y
        dC_steps.add(torch.mul(states, dy_t, out=product), chunk.slice)

        torch.mul(dy_t, C_t, out=adjoints)
        g, a = adjoints.unbind(0), decay.unbind(0)
        g[-1].add_(adjoint)
        for t in range(len(g) - 2, -1, -1):
            g[t].addcmul_(a[t + 1], g[t + 1])
        torch.mul(a[0], g[0], out=adjoint)

        dB_steps.add(torch.mul(adjoints, (chunk.dt * chunk.u).unsqueeze(-1), out=product), chunk.slice)
        dinput = torch.mul(adjoints, B_t, out=product).sum(-1)
        dx[chunk.slice] = dinput * chunk.dt
        ddecay = decay.mul_(adjoints)  # e_t, once multiplied by the state before
        ddecay[1:] *= states[:-1]
        ddecay[0] *= state
        ddt[chunk.slice] = torch.mul(ddecay, s.A, out=product).sum(-1).addcmul_(dinput, chunk.u)
        dA += torch.mul(ddecay, chunk.dt.unsqueeze(-1), out=product).sum((0, 1))

    if D is not None:
        dD.copy_((dy * s.u).sum((0, 1)))
        dx.addcmul_(dy, D.to(dtype))
    if delta_softplus:
        ddt *= softplus_derivative(s.raw)
    ddt = s.order(ddt.permute(1, 2, 0))
    if delta_bias is not None:
        ddelta_bias.copy_(ddt.sum((0, 2)))
    du.copy_(s.order(dx.permute(1, 2, 0)))
    ddelta.copy_(ddt)
    dB_steps.write(dB)
    dC_steps.write(dC)
    if z is not None:
        dz.copy_(s.order(dgate.permute(1, 2, 0)))
    if initial_state is not None:
        dinitial_state.copy_(adjoint)


class _Chunk(NamedTuple):
    slice: slice
    u: Tensor  # (S, B, D), as dt
    dt: Tensor
    B: Tensor  # (D, N) or (S, B, G, N)
    C: Tensor
    keep: Tensor | None  # (S, B), or None when the state survives every step of the chunk


class _Steps(NamedTuple):
    """The inputs in scan order, time first, in the compute dtype."""

    order: ScanOrder
    u: Tensor  # (L, B, D), as raw and dt
    raw: Tensor  # delta + bias
    dt: Tensor
    A: Tensor  # (D, N)
    B: Tensor  # (D, N) or (L, B, G, N)
    C: Tensor
    keep: Tensor | None  # (L, B)

    @classmethod
    def prepare(
        cls,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
    ) -> _Steps:
        dtype = _compute_dtype(u)
        order = ScanOrder(u.shape[0], u.shape[2], lengths, reverse, u.device)
        raw = _time_first(order(delta.to(dtype)))
        if delta_bias is not None:
            raw = raw + delta_bias.to(dtype)
        dt = softplus(raw) if delta_softplus else raw
        if order.padding is not None:
            dt = dt.masked_fill(order.padding.t().unsqueeze(-1), 0)

        def time_first(matrix: Tensor) -> Tensor:
            matrix = matrix.to(dtype)
            if matrix.dim() == 2:
                return matrix
            matrix = matrix if matrix.dim() == 4 else matrix.unsqueeze(1)
            return order(matrix).permute(3, 0, 1, 2)

        keep = None if seq_idx is None else order.same_sequence(seq_idx).t()
        x = _time_first(order(u.to(dtype)))
        return cls(order, x, raw, dt, A.to(dtype), time_first(B), time_first(C), keep)

    def chunks(self, size: int):
        length = self.u.shape[0]
        for start in range(0, length, size):
            part = slice(start, min(start + size, length))
            B, C = (m if m.dim() == 2 else m[part] for m in (self.B, self.C))
            keep = None if self.keep is None or self.keep[part].all() else self.keep[part]
            yield _Chunk(part, self.u[part], self.dt[part], B, C, keep)


class _Gradient:
    """Sums the gradient of B or C from chunks (S, B, D, N) into the shape of the input."""

    def __init__(self, matrix: Tensor, s: _Steps) -> None:
        self.order, self.constant = s.order, matrix.dim() == 2
        steps, batch, _ = s.u.shape
        if self.constant:
            self.total = s.u.new_zeros(matrix.shape)
        else:
            groups = matrix.shape[1] if matrix.dim() == 4 else 1
            self.total = s.u.new_empty(steps, batch, groups, s.A.shape[1])

    def add(self, gradient: Tensor, part: slice) -> None:
        if self.constant:
            self.total += gradient.sum((0, 1))
        else:
            self.total[part] = gradient.unflatten(2, (self.total.shape[2], -1)).sum(3)

    def write(self, target: Tensor) -> None:
        if self.constant:
            target.copy_(self.total)
        else:
            target.copy_(self.order(self.total.permute(1, 2, 3, 0)).view_as(target))


def _run(chunk: _Chunk, A: Tensor, state: Tensor, decay: Tensor, states: Tensor) -> None:
    """Fill ``decay`` = exp(dt A) and ``states``, both (S, B, D, N), of a chunk that starts from ``state``."""
    torch.mul(chunk.dt.unsqueeze(-1), A, out=decay).exp_()
    if chunk.keep is not None:
        decay *= chunk.keep[..., None, None]
    torch.mul((chunk.dt * chunk.u).unsqueeze(-1), _spread_matrix(chunk.B, A.shape[0]), out=states)
    h, a = states.unbind(0), decay.unbind(0)
    h[0].addcmul_(a[0], state)
    for t in range(1, len(h)):
        h[t].addcmul_(a[t], h[t - 1])


def _matrix(matrix: Tensor, s: _Steps) -> Tensor:
    return _spread_matrix(matrix, s.A.shape[0])


def _spread_matrix(matrix: Tensor, dim: int) -> Tensor:
    return matrix if matrix.dim() == 2 else _spread(matrix, dim)


def _spread(matrix: Tensor, dim: int) -> Tensor:
    """(..., G, N) to what broadcasts against (..., D, N)."""
    groups = matrix.shape[-2]
    return matrix if groups == 1 else matrix.repeat_interleave(dim // groups, -2)


def _time_first(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1).contiguous()


def _first_state(s: _Steps, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return s.u.new_zeros(s.u.shape[1], *s.A.shape)
    return initial_state.to(s.u.dtype, copy=True)


def _workspace(s: _Steps, count: int, chunk_size: int) -> Tensor:
    steps, batch, _ = s.u.shape
    return s.u.new_empty(count, min(chunk_size, steps), batch, *s.A.shape)


def _compute_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32
