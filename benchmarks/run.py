"""Measure an op beside its peers in one run, after checking that each computes the right thing.

    python -m benchmarks.run --op sinkhorn_hadamard --device cpu --peers all
    python -m benchmarks.run --op selective_scan --cases 1x384x256x16 --modes forward
    python -m benchmarks.run --suite quick

Every provider takes its turn in each round, so that a noisy machine is noisy for all. One row a provider, case
and mode is appended to ``benchmarks/results/<device>.jsonl``; the table on screen shows medians and how many
times faster than each peer ours is.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import machine, plot, rows, startup, sweeps, timing

OPS = ("sinkhorn_hadamard", "selective_scan", "causal_conv1d")
PACKAGES = (
    "triton", "POT", "geomloss", "ott-jax", "jax", "transformers", "mambapy", "mamba-ssm", "causal-conv1d"
)  # fmt: skip
QUICK_OUTPUT = machine.ROOT / "runs" / "bench"
# Keeps glibc from giving large blocks back to the kernel after every step: half the time of large cases in torch.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}


# Left out of the quick suite: what takes seconds to import, to compile, or a call.
EXPENSIVE_PEERS = ("compile", "step loop", "transformers", "mambapy", "POT", "OTT")
TIMED = ("forward", "both", "backward")  # of the cases, beside peers
ALL_MODES = (*TIMED, "latency", "startup", "sweep")
# A suite's order: what matters most comes first, should the time run out.
STAGES = (("forward", "both"), ("latency", "startup"), ("sweep",), ("backward",))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--op", choices=OPS)
    what.add_argument(
        "--suite", choices=("quick", "full"),
        help="every op in every mode, then plots; quick: few small cases, cheap peers, minutes on two cores",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", choices=("all", "none"), default="all")
    parser.add_argument("--modes", nargs="+", choices=ALL_MODES, help="default: forward both; of a suite, all")
    parser.add_argument("--cases", nargs="+", help="shapes as printed, such as 1x32x32x120; default all")
    parser.add_argument("--skip", nargs="+", default=[], help="providers whose name contains one of these")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--seconds", type=float, help="time for each provider, case and mode (1, quick suite 0.2)")
    parser.add_argument("--peaks", choices=("all", "ours", "none"), help="whose peak memory (all, quick suite ours)")
    parser.add_argument("--tuned-allocator", action="store_true", help="run again with glibc told to keep its pages")
    parser.add_argument("--results", type=Path, help="folder of rows (benchmarks/results, quick suite runs/bench)")
    parser.add_argument("--figures", type=Path, help="folder of a suite's plots (docs/figures, quick suite runs/bench)")
    parser.add_argument("--resume", action="store_true", help="skip what this commit has rows of on this device")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    quick = arguments.suite == "quick"
    arguments.sizes = 3 if quick else None  # of each sweep
    arguments.modes = arguments.modes or (ALL_MODES if arguments.suite else ("forward", "both"))
    arguments.seconds = arguments.seconds or (0.2 if quick else 1.0)
    # The quick suite's rows have few peers: they must not stand in for complete ones.
    arguments.results = arguments.results or (QUICK_OUTPUT if quick else rows.RESULTS)
    arguments.figures = arguments.figures or (QUICK_OUTPUT if quick else plot.FIGURES)
    arguments.peaks = arguments.peaks or ("ours" if quick else "all")
    if quick:
        arguments.skip = [*arguments.skip, *EXPENSIVE_PEERS]
    return arguments


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
    both, peers = mode in ("both", "backward"), arguments.peers == "all" and mode in TIMED
    torch.compiler.reset()  # else the limit on recompilations is met by the sum of all cases
    expected = op.expected(case, both)
    ready, errors = {}, {}
    for name, make in op.works(case, arguments.device, both, peers).items():
        if any(word in name for word in arguments.skip):
            continue
        try:
            candidate = make()
            if mode == "backward":
                if not isinstance(candidate, timing.ForwardAndBackward):
                    print(f"    {name}: has no backward of its own", file=sys.stderr)
                    continue
                candidate = candidate.backward_alone()
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
            if mode == "latency" and arguments.device == "cuda":
                replay = f"{name}, CUDA graph"
                ready[replay] = timing.graph_replay(candidate)
                errors[replay] = error_against(expected, ready[replay]())
        else:
            print(f"    {name}: not timed, it is wrong by {errors[name]:.1e} of the largest value", file=sys.stderr)
    samples = timing.interleaved(ready, arguments.device, arguments.seconds)
    found = []
    for name, values in samples.items():
        p20, p50, p80 = (float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)) * 1e3)
        wanted = arguments.peaks == "all" or (arguments.peaks == "ours" and name.startswith(rows.OURS))
        with_peak = wanted and mode in rows.MODES and arguments.device == "cpu"
        peak = peak_mib(arguments, str(case), mode, name) if with_peak else None
        found.append(
            {"op": arguments.op, "provider": name, "mode": mode, "shape": str(case), "dtype": "float32",
             "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "samples": len(values), "error": errors[name],
             "peak_mib": peak}
        )  # fmt: skip
    return found


def show(measured: list[dict]) -> None:
    ours = min((r["p50_ms"] for r in measured if rows.is_ours(r)), default=None)
    for row in sorted(measured, key=lambda r: r["p50_ms"]):
        ratio = f"{row['p50_ms'] / ours:8.1f}x" if ours else " " * 9
        peak = "       -" if row["peak_mib"] is None else f"{row['peak_mib']:8.1f}"
        floor = f"{100 * row['floor_ms'] / row['p50_ms']:6.1f} % of the floor's speed" if "floor_ms" in row else ""
        print(
            f"  {row['provider']:<34} {row['p50_ms']:10.3f} ms {ratio} {peak} MiB   error {row['error']:.1e} {floor}",
            flush=True,
        )


def with_floor(op, case, mode: str, device: str, measured: list[dict]) -> list[dict]:
    """Rows with the time that the device needs at least, and what the case does in it."""
    both = mode == "both"
    work = case.floor(both) if op.__name__.endswith("sinkhorn_hadamard") else case.floor()
    if device == "cpu":
        seconds = op.floor_seconds(case, both)
    elif both and "matrix_bytes" not in work:
        return measured  # what a backward does at least is told for Sinkhorn alone
    else:  # the units of a GPU work side by side
        rates = machine.ceilings(device)
        seconds = max(work[name] / rates[f"{name}_per_s"] for name in ("exponentials", "multiply_adds", "bytes"))
    floor = seconds * 1e3
    return [{**row, "floor_ms": floor, "of_floor": floor / row["p50_ms"], "work": work} for row in measured]


def measurements(op, arguments: argparse.Namespace) -> Iterator[tuple[tuple, str, Callable[[], list[dict]]]]:
    """(what identifies it among rows, title, what measures its rows) of everything asked of one op."""
    chosen = [c for c in op.CASES if not arguments.cases or str(c) in arguments.cases]
    if arguments.suite == "quick":
        chosen = sorted(chosen, key=lambda case: math.prod(vars(case).values()))[:2]

    def timed(case, mode: str, how: argparse.Namespace, **fields: object) -> list[dict]:
        measured = measure(op, case, mode, how)
        if mode in rows.MODES:
            measured = with_floor(op, case, mode, arguments.device, measured)
        return [{**row, **fields} for row in measured]

    for mode in (m for m in TIMED if m in arguments.modes):
        for case in chosen:
            yield (mode, str(case), None), f"{case} {rows.TITLES[mode]}", partial(timed, case, mode, arguments)
    if "latency" in arguments.modes:
        yield ("latency", str(op.TINY), None), f"{op.TINY} latency", partial(timed, op.TINY, "latency", arguments)
    if "startup" in arguments.modes:
        title = "import and first call in a fresh process"
        yield ("cold", str(op.TINY), None), title, partial(startup.measure, arguments.op, arguments.device)
    if "sweep" in arguments.modes:
        alone = argparse.Namespace(**{**vars(arguments), "peers": "none", "peaks": "none"})
        for mode in [m for m in rows.MODES if m in arguments.modes] or rows.MODES:
            for name, size, case in sweeps.cases(arguments.op, arguments.sizes):
                work = partial(timed, case, mode, alone, sweep=name, size=size)
                yield (mode, str(case), name), f"{case} {rows.MODES[mode]}", work


def recorded(op: str, context: dict, path: Path) -> set[tuple]:
    """What identifies the measurements of an op that the file has rows of, at this commit and in these conditions."""
    same = ("commit", "threads", "allocator")
    return {
        (row["mode"], row["shape"], row.get("sweep"))
        for row in (rows.load(path) if path.exists() else ())
        if row["op"] == op and all(row.get(field) == context[field] for field in same)
    }


def run_op(name: str, arguments: argparse.Namespace) -> list[dict]:
    """Measure, show and append; the rows."""
    arguments = argparse.Namespace(**{**vars(arguments), "op": name})
    device = machine.device_name(arguments.device)
    context = {
        "device": device, "threads": torch.get_num_threads(), "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"), "allocator": "tuned" if arguments.tuned_allocator else "default",
        "versions": machine.versions(*PACKAGES),
        "ceilings": machine.ceilings(arguments.device),
    }  # fmt: skip
    print(f"{name} on {device}, torch {torch.__version__}", end=", ")
    print(f"commit {context['commit']}, allocator {context['allocator']}")
    everything, path = [], arguments.results / f"{device}.jsonl"
    known = recorded(name, context, path) if arguments.resume else set()
    for key, title, work in measurements(importlib.import_module(f"benchmarks.{name}"), arguments):
        if key in known:
            continue
        print(f"\n{title}", flush=True)
        measured = work()
        show(measured)
        done = [{**row, **context} for row in measured]
        everything += done
        if not arguments.no_save:
            rows.append(done, path)
    for (_, provider, mode, dimension), power in sweeps.exponents(everything).items():
        print(f"  {provider} {rows.MODES[mode]}: time grows as {dimension}^{power:.2f}")
    return everything


def run_suite(arguments: argparse.Namespace) -> None:
    """Every op, stage by stage, and the plots of all rows that the results have then."""
    measured = []
    for stage in STAGES:
        modes = [mode for mode in stage if mode in arguments.modes]
        for name in OPS if modes else ():
            measured += run_op(name, argparse.Namespace(**{**vars(arguments), "modes": modes}))
    path = arguments.results / f"{machine.device_name(arguments.device)}.jsonl"
    for figure in plot.write(measured if arguments.no_save else rows.load(path), arguments.figures):
        print(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.tuned_allocator and any(os.environ.get(k) != v for k, v in TUNED_ALLOCATOR.items()):
        os.environ.update(TUNED_ALLOCATOR)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *(argv or sys.argv[1:])])
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.suite:
        run_suite(arguments)
        return 0
    op = importlib.import_module(f"benchmarks.{arguments.op}")
    chosen = [c for c in op.CASES if not arguments.cases or str(c) in arguments.cases]
    if not chosen:
        print(f"no such case; there are {', '.join(map(str, op.CASES))}", file=sys.stderr)
        return 2
    if arguments.peak_of:
        print_peak(op, chosen[0], arguments.modes[0] == "both", arguments.peak_of)
        return 0
    run_op(arguments.op, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
