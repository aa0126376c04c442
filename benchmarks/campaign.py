"""What a machine with an NVIDIA GPU is asked for: build, tests, sanitizers, ceilings, timings, profiles, tables.

    python -m benchmarks.campaign --output runs/gpu                  # everything, goes on where it was cut off
    python -m benchmarks.campaign --output runs/gpu --budget 570     # start no stage that would end later than that
    python -m benchmarks.campaign --stages build tests-scan --again
    python -m benchmarks.campaign --list

Each stage has a time limit of its own and leaves STAGE.log, its outcome stands in campaign.json as soon as it is known,
rows are written as they are measured: an interrupted campaign loses one stage. A stage that has passed on this commit
is not run again; a tool that is missing is an outcome that says so. The exit code is 1 if a stage failed, 3 if some are
still to be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import machine

PYTHON = sys.executable
OPS = ("sinkhorn_hadamard", "selective_scan", "causal_conv1d")
TESTS = {
    "sinkhorn": ("tests/test_sinkhorn*.py", "tests/test_parallel_branch_fusion.py", "tests/test_epsilon.py"),
    "scan": ("tests/test_selective*.py", "tests/test_scan*.py", "tests/test_bimamba.py", "tests/test_compat*.py"),
    "conv": ("tests/test_causal*.py", "tests/test_conv*.py", "tests/test_triton_updates.py"),
}


@dataclass(frozen=True)
class Stage:
    """A command with a limit in seconds; `why_not` tells what it lacks, `environment` is set for it."""

    name: str
    limit: float
    command: Callable[[], Sequence[str]]
    why_not: Callable[[], str | None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)


def lacks(tool: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(tool) else f"{tool} is not on the path"


def no_device() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def architecture() -> str:
    return "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "90"


def sdists(folder: Path | None) -> list[str]:
    found = [] if folder is None else sorted(str(path) for path in folder.glob("*.tar.gz"))
    return sorted(found, key=lambda path: "mamba" in Path(path).name)  # it needs causal-conv1d


def stages(output: Path, peers: Path | None = None) -> list[Stage]:
    """All stages, in order. `output` gets their rows; `peers` is a folder with sdists of other projects."""
    module = [PYTHON, "-m"]
    every = [*module, "benchmarks.every_kernel"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else torch's blocks hide what lies beyond a tensor

    def test_files(patterns: Sequence[str]) -> list[str]:
        return [str(path.relative_to(machine.ROOT)) for p in patterns for path in sorted(machine.ROOT.glob(p))]

    build = {"PARROT_BUILD_CUDA": "1", "PARROT_CUDA_ARCHS": architecture()}
    force = {"MAMBA_KEEP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE", "CAUSAL_CONV1D_FORCE_BUILD": "TRUE"}
    force["TORCH_CUDA_ARCH_LIST"] = ".".join((architecture()[:-1], architecture()[-1]))
    found = [
        Stage("build", 560, lambda: [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], lacks("nvcc"), build),
        Stage("doctor", 60, lambda: [*module, "parrot_kernels"]),
    ]
    for name, patterns in TESTS.items():
        command = lambda patterns=patterns: [*module, "pytest", "-q", "-m", "gpu", *test_files(patterns)]  # noqa: E731
        found.append(Stage(f"tests-{name}", 560, command, no_device))
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = lambda tool=tool: [*sanitizer, tool, *every]  # noqa: E731
        missing = lacks("compute-sanitizer")
        found.append(Stage(tool, 400, command, lambda missing=missing: no_device() or missing(), uncached))
    if peers is not None:
        install = [*module, "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
        nothing = None if sdists(peers) else f"{peers} holds no *.tar.gz"
        found.append(Stage("peers", 590, lambda: [*install, *sdists(peers)], lambda: nothing, force))
    found.append(Stage("ceilings", 120, lambda: [*module, "benchmarks.machine", "--device", "cuda"], no_device))
    for op in OPS:
        for mode in ("forward", "both"):
            command = lambda op=op, mode=mode: [  # noqa: E731
                *module, "benchmarks.run", "--op", op, "--device", "cuda", "--modes", mode, "--results",
                str(output / "rows"), "--peaks", "none",
            ]  # fmt: skip
            found.append(Stage(f"bench-{op}-{mode}", 300, command, no_device))
    divergence = [*module, "benchmarks.sinkhorn_divergence", "--device", "cuda", "--results", str(output / "rows")]
    found.append(Stage("bench-sinkhorn_divergence", 300, lambda: divergence, no_device))
    names = "regex:(parrot|sinkhorn|selective|causal)"
    ncu = ["ncu", "--set", "full", "--kernel-name", names, "--launch-count", "40", "--page", "details"]
    ncu = [*ncu, *every, "--large"]
    missing = lacks("ncu")
    found.append(Stage("profiles", 560, lambda: ncu, lambda: no_device() or missing()))
    rows = lambda: output / "rows" / f"{machine.device_name('cuda')}.jsonl"  # noqa: E731
    no_rows = lambda: no_device() or (None if rows().exists() else f"{rows()} does not exist")  # noqa: E731
    found.append(Stage("tables", 60, lambda: [*module, "benchmarks.table", "--rows", str(rows())], no_rows))
    return found


def run(stage: Stage, output: Path, limit: float) -> dict:
    """Run one stage into its log; its outcome."""
    if reason := stage.why_not():
        return {"outcome": "missing", "reason": reason, "seconds": 0.0}
    command, start = list(stage.command()), time.monotonic()
    with (output / f"{stage.name}.log").open("w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=machine.ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **stage.environment},
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            code = None
    outcome = "timeout" if code is None else "failed" if code else "passed"
    return {"outcome": outcome, "code": code, "seconds": round(time.monotonic() - start, 1), "command": command}


def save(outcomes: dict[str, dict], output: Path) -> None:
    partial = output / "campaign.json.partial"
    partial.write_text(json.dumps(outcomes, indent=1) + "\n")
    partial.replace(output / "campaign.json")


def campaign(
    plan: Sequence[Stage], output: Path, only: Sequence[str] = (), again: bool = False, budget: float | None = None
) -> dict[str, dict]:
    """Run what is left of the plan; the outcomes by stage."""
    output.mkdir(parents=True, exist_ok=True)
    file, commit, start = output / "campaign.json", machine.commit(), time.monotonic()
    outcomes: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
    for stage in plan:
        before = outcomes.get(stage.name, {})
        passed = before.get("outcome") == "passed" and before.get("commit") == commit
        if (only and stage.name not in only) or (passed and not again):
            continue
        left = float("inf") if budget is None else budget - (time.monotonic() - start)
        if left < min(stage.limit, 30):  # too little to begin anything with
            print(f"{stage.name:<28} left for later: {max(left, 0):.0f} s of the budget remain", flush=True)
            continue
        limit = min(stage.limit, left)
        outcomes[stage.name] = {**run(stage, output, limit), "limit": round(limit), "commit": commit}
        save(outcomes, output)
        now = outcomes[stage.name]
        told = now.get("reason") or f"{now['seconds']} s, see {output / stage.name}.log"
        print(f"{stage.name:<28} {now['outcome']}: {told}", flush=True)
    return outcomes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=machine.ROOT / "runs" / "gpu", help="(runs/gpu)")
    parser.add_argument("--stages", nargs="+", default=[], help="only these")
    parser.add_argument("--again", action="store_true", help="also what has passed on this commit")
    parser.add_argument("--budget", type=float, help="seconds for this call")
    parser.add_argument("--peers", type=Path, help="folder with sdists of mamba-ssm and causal-conv1d, to be built")
    parser.add_argument("--list", action="store_true", help="the stages and their limits")
    arguments = parser.parse_args(argv)
    plan = stages(arguments.output.resolve(), arguments.peers)
    names = [stage.name for stage in plan]
    if unknown := [name for name in arguments.stages if name not in names]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(names)}")
    if arguments.list:
        for stage in plan:
            print(f"{stage.name:<28} {stage.limit:4.0f} s  {stage.why_not() or 'ready'}")
        return 0
    outcomes = campaign(plan, arguments.output.resolve(), arguments.stages, arguments.again, arguments.budget)
    wanted = [outcomes.get(name, {}).get("outcome") for name in arguments.stages or names]
    return 1 if {"failed", "timeout"} & set(wanted) else 3 if None in wanted else 0


if __name__ == "__main__":
    sys.exit(main())
