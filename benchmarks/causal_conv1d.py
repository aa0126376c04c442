"""Causal depthwise convolution of width 4 with SiLU: cases, peers and floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import machine, timing

TOLERANCE = 2e-3
WIDTH = 4

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    B: int
    D: int
    L: int

    def __str__(self) -> str:
        return f"{self.B}x{self.D}x{self.L}"

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.B, self.D, self.L), (self.D, WIDTH), (self.D,), (self.B, self.D, self.L))
        x, weight, bias, gradient = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        return [x, weight, bias], gradient

    def floor(self) -> dict[str, float]:
        elements = self.B * self.D * self.L
        return {"exponentials": elements, "multiply_adds": WIDTH * elements, "bytes": 8 * elements}


CASES = [Case(1, 384, 256), Case(8, 384, 1000), Case(1, 1536, 512), Case(4, 1536, 1000), Case(1, 768, 4096),
         Case(1, 2304, 251)]  # fmt: skip
TINY = Case(1, 4, 4)


def ours(backend: str) -> Convolution:
    from parrot_kernels import causal_conv1d

    return lambda x, weight, bias: causal_conv1d(x, weight, bias, "silu", backend=backend)


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What transformers and mamba-ssm do where causal-conv1d is missing."""
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=x.shape[1])[..., : x.shape[2]])


def shifted_sum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded, length = F.pad(x, (WIDTH - 1, 0)), x.shape[2]
    taps = (padded[..., k : k + length] * weight[:, k : k + 1] for k in range(WIDTH))
    return F.silu(sum(taps) + bias[:, None])


def causal_conv1d_package() -> Convolution:
    from causal_conv1d import causal_conv1d_fn

    return lambda x, weight, bias: causal_conv1d_fn(x, weight, bias, activation="silu")


def convolutions(device: str, peers: bool) -> dict[str, Callable[[], Convolution]]:
    found: dict[str, Callable[[], Convolution]] = {}
    for backend in machine.our_backends("causal_conv1d", device):
        found[f"parrot_kernels[{backend}]"] = lambda backend=backend: ours(backend)
    if peers:
        found["torch conv1d + silu"] = lambda: torch_conv1d
        found["sum of shifts"] = lambda: shifted_sum
        found["sum of shifts, compiled"] = lambda: torch.compile(shifted_sum, dynamic=False)
    if peers and device == "cuda":
        found["causal-conv1d"] = causal_conv1d_package
    return found


def work(
    convolution: Convolution, case: Case, device: str, both: bool, dtype=torch.float32
) -> Callable[[], tuple[Tensor, ...]]:
    inputs, gradient = case.inputs(device, dtype)
    if not both:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (convolution(*inputs),)

        return forward
    for tensor in inputs:
        tensor.requires_grad_()
    return timing.ForwardAndBackward(lambda: (convolution(*inputs),), inputs, (gradient,))


def floor_seconds(case: Case, both: bool) -> float:
    """A copy of the input and the exponentials of SiLU; with the backward 2.5 times the bytes and twice the rest."""
    x = case.inputs("cpu")[0][0]
    copy = min(timing.once(lambda: torch.empty_like(x).copy_(x), "cpu") for _ in range(20))
    exponentials = case.floor()["exponentials"] / machine.exponentials_per_second()
    return (2.5 * copy + 2 * exponentials) if both else (copy + exponentials)


def works(
    case: Case, device: str, both: bool, peers: bool
) -> dict[str, Callable[[], Callable[[], tuple[Tensor, ...]]]]:
    made = convolutions(device, peers)
    return {name: lambda factory=factory: work(factory(), case, device, both) for name, factory in made.items()}


def expected(case: Case, both: bool) -> tuple[Tensor, ...]:
    return work(shifted_sum, case, "cpu", both, torch.float64)()
