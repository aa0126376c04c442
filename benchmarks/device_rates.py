"""What a GPU can do at most, measured: exponentials, fp32 multiply-adds, tensor cores, copies. Rates per second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from parrot_kernels.triton_kernels.specialization import Specialization

BLOCK, NUM_WARPS, ROUNDS = 1024, 4, 2048  # eight independent chains a thread hide the latency of one


@triton.jit
def _exponentials(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = i.to(tl.float32) * 1e-9
    for _ in range(ROUNDS):
        x = tl.exp2(-x)  # the minus is part of the instruction
    tl.store(out + i, x)


@triton.jit
def _multiply_adds(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = i.to(tl.float32) * 1e-9
    for _ in range(ROUNDS):
        x = x * x + x
    tl.store(out + i, x)


def specializations() -> list[Specialization]:
    """The kernels as they are launched, for ahead-of-time compilation."""
    constants = {"ROUNDS": ROUNDS, "BLOCK": BLOCK}
    return [
        Specialization(kernel, str(BLOCK), {"out": "*fp32"}, constants, NUM_WARPS)
        for kernel in (_exponentials, _multiply_adds)
    ]


def _fastest(work: Callable[[], Any], times: int = 10) -> float:
    """Seconds by the device's clock."""
    work()
    found = []
    for _ in range(times):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3)
    return min(found)


def _chain(kernel: Any) -> float:
    programs = 64 * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * BLOCK, device="cuda")
    launch = lambda: kernel[(programs,)](out, ROUNDS=ROUNDS, BLOCK=BLOCK, num_warps=NUM_WARPS)  # noqa: E731
    return programs * BLOCK * ROUNDS / _fastest(launch)


def _products(dtype: torch.dtype, size: int = 8192) -> float:
    matrix = torch.randn(size, size, device="cuda", dtype=dtype)
    return size**3 / _fastest(lambda: matrix @ matrix)


def _copies(mebibytes: int = 1024) -> float:
    source = torch.empty(mebibytes << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source))


def ceilings() -> dict[str, float]:
    """What the GPU can do, for the rows; bytes are read or written."""
    return {
        "exponentials_per_s": _chain(_exponentials),
        "multiply_adds_per_s": _chain(_multiply_adds),
        "tensor_multiply_adds_per_s": _products(torch.bfloat16),
        "bytes_per_s": _copies(),
    }
