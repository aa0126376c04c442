"""``parrot bench``: measure the kernels beside their peers."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .options import Subparsers, new_command

DESCRIPTION = """\
Measure the kernels beside their peers and draw plots, in a clone of the repository: the benchmarks are not part of
an installed package. `python -m benchmarks.run --help` there has more options."""

EXAMPLES = """\
examples:
  parrot bench
  parrot bench --suite full --threads 4 --output runs/bench"""

ROOT = Path(__file__).resolve().parents[2]


def add_parser(commands: Subparsers) -> None:
    parser = new_command(commands, "bench", run, "measure the kernels beside their peers", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--suite", choices=("quick", "full"), default="quick", help="quick: minutes on two cores (%(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    parser.add_argument("--threads", type=int, help="default: what torch chooses")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="rows and plots (%(default)s)")


def run(args: argparse.Namespace) -> int:
    if not (ROOT / "benchmarks" / "run.py").exists():
        raise RuntimeError(
            f"the benchmarks were not found beside the package ({ROOT / 'benchmarks'}): they come with the repository, "
            "not with an installed package. Run `pip install -e '.[bench]'` in a clone"
        )
    output = args.output.resolve()
    command = [sys.executable, "-m", "benchmarks.run", "--suite", args.suite, "--device", args.device]
    command += ["--results", str(output), "--figures", str(output)]
    if args.threads is not None:
        command += ["--threads", str(args.threads)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode
