"""Mamba-1's selective scan with D, z, delta bias and softplus: cases, peers and floors.

Mode ``both`` adds the gradients of a fixed linear function of the output to u, delta, A, B, C, D, z and delta_bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import machine, timing

TOLERANCE = 2e-3

# (u, delta, A, B, C, D, z, delta_bias) -> out
Scan = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    B: int
    D: int
    L: int
    N: int = 16

    def __str__(self) -> str:
        return f"{self.B}x{self.D}x{self.L}x{self.N}"

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        bdl = (self.B, self.D, self.L)
        A = -torch.arange(1, self.N + 1, device=device, dtype=dtype).repeat(self.D, 1)
        u, delta, z = normal(*bdl), normal(*bdl, scale=0.5) - 3, normal(*bdl)
        B, C = normal(self.B, self.N, self.L), normal(self.B, self.N, self.L)
        return [u, delta, A, B, C, normal(self.D), z, normal(self.D, scale=0.1)], normal(*bdl)

    def floor(self) -> dict[str, float]:
        """One exponential and about four multiply-adds a state and step; the bytes of inputs and output."""
        steps = self.B * self.D * self.L * self.N
        return {
            "exponentials": steps,
            "multiply_adds": 4 * steps,
            "bytes": 4 * self.B * self.L * (4 * self.D + 2 * self.N),
        }


CASES = [Case(1, 384, 256), Case(8, 384, 1000), Case(1, 1536, 512), Case(4, 1536, 1000), Case(1, 768, 4096),
         Case(1, 2304, 251, 24)]  # fmt: skip
TINY = Case(1, 4, 4, 4)


def ours(backend: str) -> Scan:
    from parrot_kernels import selective_scan

    return lambda u, delta, A, B, C, D, z, bias: selective_scan(u, delta, A, B, C, D, z, bias, True, backend=backend)


def prepare(delta: Tensor, bias: Tensor) -> Tensor:
    return F.softplus(delta + bias[:, None])


def finish(y: Tensor, u: Tensor, D: Tensor, z: Tensor) -> Tensor:
    return (y + u * D[:, None]) * F.silu(z)


def step(state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
    return state, (state * C[:, None]).sum(-1)


def step_loop(one_step: Callable) -> Scan:
    """The sequential loop at its best: nothing of size B*D*L*N in the forward."""

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        state, out = u.new_zeros(u.shape[0], *A.shape), []
        for d, b, c, v in zip(prepare(delta, bias).unbind(2), B.unbind(2), C.unbind(2), u.unbind(2), strict=True):
            state, y = one_step(state, d, A, b, c, v)
            out.append(y)
        return finish(torch.stack(out, 2), u, D, z)

    return run


def materialised_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """The loop of mamba-ssm's reference, over decays of size B*D*L*N made beforehand, with a backward linear in L."""
    delta = prepare(delta, bias)
    decay = torch.exp(delta[..., None] * A[:, None])
    update = (delta * u)[..., None] * B.mT[:, None]
    state, out = u.new_zeros(u.shape[0], *A.shape), []
    for a, b, c in zip(decay.unbind(2), update.unbind(2), C.unbind(2), strict=True):
        state = a * state + b
        out.append(torch.matmul(state, c[..., None])[..., 0])
    return finish(torch.stack(out, 2), u, D, z)


def mambapy() -> Scan:
    from mambapy.pscan import pscan

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        delta = prepare(delta, bias).mT
        decay = torch.exp(delta[..., None] * A)
        states = pscan(decay, (delta * u.mT)[..., None] * B.mT[:, :, None])
        return finish((states @ C.mT[..., None])[..., 0].mT, u, D, z)

    return run


def transformers_slow_path() -> Scan:
    """The recurrent path of transformers' Mamba, as published since 5.16."""
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError as error:
        raise ImportError("transformers >= 5.16") from error

    return lambda u, delta, A, B, C, D, z, bias: mamba_selective_scan(u, delta, A, B, C, D, z, bias, True)


def mamba_ssm() -> Scan:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return lambda u, delta, A, B, C, D, z, bias: selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True)


def scans(device: str, peers: bool) -> dict[str, Callable[[], Scan]]:
    """Name -> a factory that raises ImportError where the peer is not installed."""
    found: dict[str, Callable[[], Scan]] = {}
    for backend in machine.our_backends("selective_scan", device):
        found[f"parrot_kernels[{backend}]"] = lambda backend=backend: ours(backend)
    if peers:
        found["step loop"] = lambda: step_loop(step)
        found["step loop, compiled step"] = lambda: step_loop(torch.compile(step, dynamic=False))
        found["materialised loop, unbind"] = lambda: materialised_loop
        found["transformers' slow path"] = transformers_slow_path
        found["mambapy pscan"] = mambapy
    if peers and device == "cuda":
        found["mamba-ssm"] = mamba_ssm
    return found


def work(
    scan: Scan, case: Case, device: str, both: bool, dtype: torch.dtype = torch.float32
) -> Callable[[], tuple[Tensor, ...]]:
    inputs, gradient = case.inputs(device, dtype)
    if not both:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (scan(*inputs),)

        return forward
    for tensor in inputs:
        tensor.requires_grad_()
    return timing.ForwardAndBackward(lambda: (scan(*inputs),), inputs, (gradient,))


def works(
    case: Case, device: str, both: bool, peers: bool
) -> dict[str, Callable[[], Callable[[], tuple[Tensor, ...]]]]:
    made = scans(device, peers)
    if both and case.L > 512:  # its backward is quadratic in L: minutes
        made.pop("transformers' slow path", None)
    return {name: lambda factory=factory: work(factory(), case, device, both) for name, factory in made.items()}


def floor_seconds(case: Case, both: bool) -> float:
    """The exponentials of the forward; three times that with the backward, which also computes the states again."""
    return case.floor()["exponentials"] / machine.exponentials_per_second() * (3 if both else 1)


def expected(case: Case, both: bool) -> tuple[Tensor, ...]:
    return work(step_loop(step), case, "cpu", both, torch.float64)()
