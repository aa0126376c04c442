"""The debiased Sinkhorn divergence as a loss, beside GeomLoss and, on a GPU, flash-sinkhorn.

    python -m benchmarks.sinkhorn_divergence --threads 4
    python -m benchmarks.sinkhorn_divergence --device cuda

Squared distances of points in the unit cube, uniform weights; ``both`` adds the gradient to x. GeomLoss lowers eps to
its final value by a factor in each iteration ("scaling", 0.5 by default) and takes a few more: what it returns is as
far from convergence as that left it, so a row's ``error``, of the value (forward) or of the gradient, against a
converged solution in float64, belongs to its time. Ours iterates until its marginals are right to ``tol``, 1e-3.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import machine, rows, run, timing

OP = "sinkhorn_divergence"
SCALINGS = (0.5, 0.9)
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    B: int
    N: int
    M: int
    D: int
    blur: float

    def __str__(self) -> str:
        return f"{self.B}x{self.N}x{self.M}x{self.D}, blur {self.blur}"

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.B, self.N, self.D, generator=generator)
        y = 0.7 * torch.rand(self.B, self.M, self.D, generator=generator) + 0.3
        return x.to(device, dtype), y.to(device, dtype)


CASES = [
    Case(8, 256, 256, 3, 0.1),
    Case(8, 256, 256, 64, 0.4),
    Case(1, 1000, 1000, 3, 0.1),
    Case(1, 2000, 2000, 3, 0.1),
]
ON_GPUS = [Case(1, 10_000, 10_000, 64, 0.4)]


def losses(case: Case, device: str) -> dict[str, Callable[[], Loss]]:
    """Name -> a factory that raises where the peer is not installed."""
    from parrot_kernels import sinkhorn_divergence

    def geomloss(scaling: float) -> Loss:
        from geomloss import SamplesLoss

        return SamplesLoss("sinkhorn", p=2, blur=case.blur, scaling=scaling, backend="tensorized")

    def flash_sinkhorn(scaling: float) -> Loss:
        from flash_sinkhorn import SamplesLoss

        loss = SamplesLoss(loss="sinkhorn", blur=case.blur, scaling=scaling, debias=True, half_cost=True)
        return lambda x, y: torch.stack([loss(*pair) for pair in zip(x, y, strict=True)])

    found: dict[str, Callable[[], Loss]] = {}
    for backend in machine.our_backends("sinkhorn_hadamard", device):
        ours = partial(sinkhorn_divergence, blur=case.blur, backend=backend)
        found[f"{rows.OURS}[{backend}]"] = lambda ours=ours: ours
    for scaling in SCALINGS:
        found[f"GeomLoss, scaling {scaling}"] = partial(geomloss, scaling)
        if device == "cuda":
            found[f"flash-sinkhorn, scaling {scaling}"] = partial(flash_sinkhorn, scaling)
    return found


def work(loss: Loss, case: Case, device: str, both: bool) -> Callable[[], Sequence[Tensor]]:
    x, y = case.inputs(device)
    if both:
        x.requires_grad_()
        return timing.ForwardAndBackward(lambda: (loss(x, y),), (x,), (x.new_ones(case.B),))

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (loss(x, y),)

    return forward


def expected(case: Case, device: str, both: bool) -> tuple[Tensor, ...]:
    """Converged, in float64."""
    from parrot_kernels import sinkhorn_divergence

    x, y = case.inputs(device, torch.float64)
    value = sinkhorn_divergence(x.requires_grad_(both), y, blur=case.blur, n_iters=20_000, tol=1e-6)
    return torch.autograd.grad(value.sum(), (x,)) if both else (value,)


def measure(case: Case, device: str, both: bool, seconds: float) -> list[dict]:
    wanted = expected(case, device, both)
    works, errors = {}, {}
    for name, make in losses(case, device).items():
        try:
            works[name] = work(make(), case, device, both)
            errors[name] = run.error_against([t.cpu() for t in wanted], works[name]())
        except (ImportError, RuntimeError) as exception:
            print(f"    {name}: {type(exception).__name__}: {str(exception).splitlines()[0]}", file=sys.stderr)
            works.pop(name, None)
    samples = timing.interleaved(works, device, seconds)
    return rows.of_samples(OP, "both" if both else "forward", str(case), samples, errors)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sinkhorn_divergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--seconds", type=float, default=5.0, help="per provider, case and mode")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of rows (%(default)s)")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = machine.device_name(arguments.device)
    context = {
        "device": device, "threads": torch.get_num_threads(), "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"), "allocator": "default",
        "versions": machine.versions("geomloss", "flash-sinkhorn"),
    }  # fmt: skip
    print(f"{OP} on {device}, torch {torch.__version__}, commit {context['commit']}")
    for case in CASES + (ON_GPUS if arguments.device == "cuda" else []):
        for both in (False, True):
            measured = measure(case, arguments.device, both, arguments.seconds)
            print(f"\n{case} {rows.TITLES[measured[0]['mode']]}", flush=True)
            run.show(measured)
            if not arguments.no_save:
                rows.append(({**row, **context} for row in measured), arguments.results / f"{device}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
