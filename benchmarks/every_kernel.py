"""Run every kernel of every backend of a device once, forward and backward: what a sanitizer or a profiler watches.

compute-sanitizer --tool memcheck python -m benchmarks.every_kernel
ncu python -m benchmarks.every_kernel --large --repeat 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

import parrot_kernels
from parrot_kernels import backends

Sizes = dict[str, tuple[int, ...]]
# Odd sizes: every kernel meets rows, columns and steps that its tiles hang over. Sinkhorn: resident and streaming.
SMALL: Sizes = {
    "sinkhorn": (2, 33, 45, 7),
    "streaming": (1, 300, 270, 19),
    "scan": (2, 35, 70, 16),
    "conv": (2, 35, 70),
}
LARGE: Sizes = {
    "sinkhorn": (1024, 64, 64, 120), "streaming": (1, 10_000, 10_000, 64), "scan": (8, 1536, 2048, 16),
    "conv": (8, 1536, 2048),
}  # fmt: skip


def differentiate(outputs: torch.Tensor | tuple[torch.Tensor, ...], *inputs: torch.Tensor) -> None:
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])


def works(device: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(op, backend, a call of it)."""

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    def sinkhorn(backend: str, size: tuple[int, ...]) -> None:
        B, N, M, D = size
        x, y = made(B, N, D), made(B, M, D)
        result = parrot_kernels.sinkhorn_hadamard(x, y, eps=0.1, n_iters=5, backend=backend)
        differentiate((result.x_hadamard, result.y_hadamard), x, y)

    def scan(backend: str) -> None:
        B, D, L, N = sizes["scan"]
        u, delta, z, A = made(B, D, L), made(B, D, L), made(B, D, L), -torch.rand(D, N, device=device) - 0.5
        b, c = made(B, N, L), made(B, N, L)
        out = parrot_kernels.selective_scan(u, delta, A, b, c, z=z, delta_softplus=True, backend=backend)
        differentiate(out, u, delta, z, b, c)

    def conv(backend: str) -> None:
        B, D, L = sizes["conv"]
        x, weight = made(B, D, L), torch.randn(D, 4, device=device, requires_grad=True)
        differentiate(parrot_kernels.causal_conv1d(x, weight, activation="silu", backend=backend), x, weight)

    def state_update(backend: str) -> None:
        B, D, _, N = sizes["scan"]
        state, A = torch.zeros(B, D, N, device=device), -torch.rand(D, N, device=device)
        x, dt, b, c = (made(*shape).detach() for shape in ((B, D), (B, D), (B, N), (B, N)))
        parrot_kernels.selective_state_update(state, x, dt, A, b, c, dt_softplus=True, backend=backend)

    def conv_update(backend: str) -> None:
        B, D, _ = sizes["conv"]
        state, weight = torch.zeros(B, D, 3, device=device, dtype=dtype), torch.randn(D, 4, device=device)
        parrot_kernels.causal_conv1d_update(made(B, D).detach(), state, weight, activation="silu", backend=backend)

    ops = {
        "selective_scan": scan, "causal_conv1d": conv, "selective_state_update": state_update,
        "causal_conv1d_update": conv_update,
    }  # fmt: skip
    names = [name for name in ("triton", "cuda", "cpu") if (name == "cpu") == (device == "cpu")]
    for op in ("sinkhorn_hadamard", *ops):
        for backend in names:
            if backends.why_not(op, backend, device, dtype) is not None:
                continue
            if op in ops:
                yield op, backend, lambda op=op, backend=backend: ops[op](backend)
                continue
            # The CUDA kernels hold a problem in a block.
            for size in ("sinkhorn",) if backend == "cuda" else ("sinkhorn", "streaming"):
                yield f"{op}, {size}", backend, lambda backend=backend, size=size: sinkhorn(backend, sizes[size])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.every_kernel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--large", action="store_true", help="shapes of the benchmarks instead of small odd ones")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    count = 0
    sizes = LARGE if arguments.large else SMALL
    for op, backend, work in works(arguments.device, getattr(torch, arguments.dtype), sizes):
        for _ in range(arguments.repeat):
            work()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        print(f"{op} [{backend}]", flush=True)
        count += 1
    if not count:
        print(f"no backend has a kernel for {arguments.dtype} on {arguments.device}", file=sys.stderr)
    return 0 if count else 2


if __name__ == "__main__":
    sys.exit(main())
