"""The debiased Sinkhorn divergence as a loss, beside GeomLoss.

    python -m benchmarks.sinkhorn_divergence --threads 4

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

import torch
from torch import Tensor

from . import machine, rows, run, timing

OP, OURS, GEOMLOSS = "sinkhorn_divergence", "parrot_kernels[cpu]", "GeomLoss, scaling"
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

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.B, self.N, self.D, generator=generator)
        y = 0.7 * torch.rand(self.B, self.M, self.D, generator=generator) + 0.3
        return x.to(dtype), y.to(dtype)


CASES = [
    Case(8, 256, 256, 3, 0.1),
    Case(8, 256, 256, 64, 0.4),
    Case(1, 1000, 1000, 3, 0.1),
    Case(1, 2000, 2000, 3, 0.1),
]


def losses(case: Case) -> dict[str, Loss]:
    from geomloss import SamplesLoss

    from parrot_kernels import sinkhorn_divergence

    found: dict[str, Loss] = {OURS: lambda x, y: sinkhorn_divergence(x, y, blur=case.blur)}
    for scaling in SCALINGS:
        found[f"{GEOMLOSS} {scaling}"] = SamplesLoss(
            "sinkhorn", p=2, blur=case.blur, scaling=scaling, backend="tensorized"
        )
    return found


def work(loss: Loss, case: Case, both: bool) -> Callable[[], Sequence[Tensor]]:
    x, y = case.inputs()
    if both:
        x.requires_grad_()
        return timing.ForwardAndBackward(lambda: (loss(x, y),), (x,), (torch.ones(case.B),))

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (loss(x, y),)

    return forward


def expected(case: Case, both: bool) -> tuple[Tensor, ...]:
    """Converged, in float64."""
    from parrot_kernels import sinkhorn_divergence

    x, y = case.inputs(torch.float64)
    value = sinkhorn_divergence(x.requires_grad_(both), y, blur=case.blur, n_iters=20_000, tol=1e-6)
    return torch.autograd.grad(value.sum(), (x,)) if both else (value,)


def measure(case: Case, both: bool, seconds: float) -> list[dict]:
    works = {name: work(loss, case, both) for name, loss in losses(case).items()}
    wanted = expected(case, both)
    errors = {name: run.error_against(wanted, once()) for name, once in works.items()}
    samples = timing.interleaved(works, "cpu", seconds)
    return rows.of_samples(OP, "both" if both else "forward", str(case), samples, errors)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sinkhorn_divergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--seconds", type=float, default=5.0, help="per provider, case and mode")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = machine.device_name("cpu")
    context = {
        "device": device, "threads": torch.get_num_threads(), "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"), "allocator": "default", "versions": machine.versions("geomloss"),
    }  # fmt: skip
    print(f"{OP} on {device}, torch {torch.__version__}, commit {context['commit']}")
    for case in CASES:
        for both in (False, True):
            measured = measure(case, both, arguments.seconds)
            print(f"\n{case} {rows.TITLES[measured[0]['mode']]}", flush=True)
            run.show(measured)
            if not arguments.no_save:
                rows.append(({**row, **context} for row in measured), rows.RESULTS / f"{device}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
