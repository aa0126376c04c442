"""Measure an op beside its peers in one run, after checking that each computes the right thing.

    python -m benchmarks.run --op sinkhorn_hadamard --device cpu --peers all
    python -m benchmarks.run --op selective_scan --cases 1x384x256x16 --modes forward

Every provider takes its turn in each round, so that a noisy machine is noisy for all. One row a provider, case
and mode is appended to ``benchmarks/results/<device>.jsonl``; the table on screen shows medians and how many
times faster than each peer ours is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from . import machine, timing

OPS = ("sinkhorn_hadamard", "selective_scan", "causal_conv1d")
RESULTS = Path(__file__).with_name("results")
# Keeps glibc from giving large blocks back to the kernel after every step: half the time of large cases in torch.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", choices=("all", "none"), default="all")
    parser.add_argument("--modes", nargs="+", choices=("forward", "both"), default=["forward", "both"])
    parser.add_argument("--cases", nargs="+", help="shapes as printed, such as 1x32x32x120; default all")
    parser.add_argument("--skip", nargs="+", default=[], help="providers whose name contains one of these")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each provider, case and mode")
    parser.add_argument("--tuned-allocator", action="store_true", help="run again with glibc told to keep its pages")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def error_against(expected: tuple[torch.Tensor, ...], got: tuple[torch.Tensor, ...]) -> float:
    """Largest error of any output, relative to the output's largest magnitude."""
    return max(
        ((g.detach().double().cpu() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item()
        for g, e in zip(got, expected, strict=True)
    )


def peak_mib(arguments: argparse.Namespace, case: str, mode: str, provider: str) -> float | None:
    """Peak memory of one call beyond inputs and imports, measured in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--op",
        arguments.op,
        "--cases",
        case,
        "--modes",
        mode,
        "--peak-of",
        provider,
    ]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_peak(op, case, both: bool, provider: str) -> None:
    """The child's part of ``peak_mib``: the kernel's own high-water mark, reset after a small warm-up."""
    make = op.works(case, "cpu", both, True)[provider]
    tiny = op.works(op.TINY, "cpu", both, True)[provider]()
    tiny()  # imports, thread pools and code that is allocated once
    print(growth_mib(make()))


def growth_mib(work: Callable[[], object]) -> float:
    """How far one call raises the process's high-water mark of memory."""
    Path("/proc/self/clear_refs").write_text("5")

    def high_water() -> int:
        return next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )

    before = high_water()
    work()
    return (high_water() - before) / 1024


def measure(op, case, mode: str, arguments: argparse.Namespace) -> list[dict]:
    both = mode == "both"
    torch.compiler.reset()  # else the limit on recompilations is met by the sum of all cases
    expected = op.expected(case, both)
    ready, errors = {}, {}
    for name, make in op.works(case, arguments.device, both, arguments.peers == "all").items():
        if any(word in name for word in arguments.skip):
            continue
        try:
            candidate = make()
            start = time.perf_counter()
            errors[name] = error_against(expected, candidate())
            print(
                f"    {name}: error {errors[name]:.1e}, first call {time.perf_counter() - start:.2f} s", file=sys.stderr
            )
        except ImportError as exception:
            print(f"    {name}: not installed ({exception})", file=sys.stderr)
            continue
        except Exception as exception:  # a peer that fails on a case is a finding, not the end of the run
            print(f"    {name}: failed: {type(exception).__name__}: {str(exception).splitlines()[0]}", file=sys.stderr)
            continue
        if errors[name] <= op.TOLERANCE:
            ready[name] = candidate
        else:
            print(f"    {name}: not timed, it is wrong by {errors[name]:.1e} of the largest value", file=sys.stderr)
    samples = timing.interleaved(ready, arguments.device, arguments.seconds)
    rows = []
    for name, values in samples.items():
        p20, p50, p80 = (float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)) * 1e3)
        peak = peak_mib(arguments, str(case), mode, name) if arguments.device == "cpu" else None
        rows.append(
            {"op": arguments.op, "provider": name, "mode": mode, "shape": str(case), "dtype": "float32",
             "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "samples": len(values), "error": errors[name],
             "peak_mib": peak}
        )  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    ours = min((r["p50_ms"] for r in rows if r["provider"].startswith("parrot_kernels")), default=None)
    for row in sorted(rows, key=lambda r: r["p50_ms"]):
        ratio = f"{row['p50_ms'] / ours:8.1f}x" if ours else " " * 9
        peak = "       -" if row["peak_mib"] is None else f"{row['peak_mib']:8.1f}"
        floor = f"{100 * row['floor_ms'] / row['p50_ms']:6.1f} % of the floor's speed" if "floor_ms" in row else ""
        print(
            f"  {row['provider']:<34} {row['p50_ms']:10.3f} ms {ratio} {peak} MiB   error {row['error']:.1e} {floor}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.tuned_allocator and any(os.environ.get(k) != v for k, v in TUNED_ALLOCATOR.items()):
        os.environ.update(TUNED_ALLOCATOR)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *(argv or sys.argv[1:])])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    op = importlib.import_module(f"benchmarks.{arguments.op}")
    cases = [c for c in op.CASES if not arguments.cases or str(c) in arguments.cases]
    if not cases:
        print(f"no such case; there are {', '.join(map(str, op.CASES))}", file=sys.stderr)
        return 2
    if arguments.peak_of:
        print_peak(op, cases[0], arguments.modes[0] == "both", arguments.peak_of)
        return 0
    device = machine.device_name(arguments.device)
    context = {
        "device": device, "commit": machine.commit(), "date": time.strftime("%Y-%m-%d"),
        "allocator": "tuned" if arguments.tuned_allocator else "default",
        "versions": machine.versions("triton", "POT", "geomloss", "ott-jax", "jax", "transformers", "mambapy"),
    }  # fmt: skip
    print(f"{arguments.op} on {device}, torch {torch.__version__}", end=", ")
    print(f"commit {context['commit']}, allocator {context['allocator']}")
    for case in cases:
        for mode in arguments.modes:
            print(f"\n{case} {'forward + backward' if mode == 'both' else 'forward'}", flush=True)
            rows = measure(op, case, mode, arguments)
            if arguments.device == "cpu" and hasattr(op, "floor_seconds"):
                floor = op.floor_seconds(case, mode == "both") * 1e3
                rows = [{**row, "floor_ms": floor} for row in rows]
                print(f"  floor {floor:.3f} ms")
            show(rows)
            if not arguments.no_save:
                RESULTS.mkdir(exist_ok=True)
                with (RESULTS / f"{device}.jsonl").open("a") as file:
                    file.writelines(json.dumps({**row, **context}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
