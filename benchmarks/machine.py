"""What a row must say about the machine, the software and the commit it was measured with."""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LARGE_CACHE = 32 << 20  # bytes: what does not fit is taken to come from memory


def device_name(device: str) -> str:
    """A name for the results file, such as ``amd-epyc-4-threads`` or ``nvidia-h100-80gb-hbm3``."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
            name = match[1]
        name = f"{name} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit measured; ``-dirty`` where tracked files but for results differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return f"{head}-dirty" if changed else head or "unknown"


def versions(*distributions: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _best(work: Callable[[], object], times: int = 20) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(times))


@functools.lru_cache(maxsize=1)
def multiply_adds_per_second() -> float:
    """fp32, as torch's own matrix product does them on torch's threads."""
    matrix = torch.randn(1536, 1536)
    return 1536**3 / _best(lambda: matrix @ matrix)


@functools.lru_cache(maxsize=1)
def bytes_per_second() -> float:
    """Read or written by a copy in memory, on torch's threads."""
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def our_backends(op: str, device: str) -> list[str]:
    """Our backends that have a kernel for this op on this device."""
    from parrot_kernels import backends

    return [
        name
        for name in ("cpu", "triton", "cuda")
        if (name == "cpu") == (device == "cpu") and name in backends.IMPLEMENTED[op]
    ]


@functools.lru_cache(maxsize=1)
def exponentials_per_second() -> float:
    """fp32 vector exponentials that torch's threads compute together, by a loop compiled for this processor."""
    csrc = ROOT / "csrc"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "exp_rate.so"
        include = [f"-I{csrc / 'include'}", f"-I{csrc / 'cpu'}"]
        options = ["-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC"]
        source = Path(__file__).with_name("exp_rate.cpp")
        subprocess.run(["g++", *options, *include, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).exponentials_per_second
        function.restype = ctypes.c_double
        return function() * torch.get_num_threads()


@functools.lru_cache(maxsize=2)
def ceilings(device: str = "cpu") -> dict[str, float]:
    """What the device can do, for the rows."""
    if device == "cuda":
        from . import device_rates

        return device_rates.ceilings()
    return {
        "exponentials_per_s": exponentials_per_second(),
        "multiply_adds_per_s": multiply_adds_per_second(),
        "bytes_per_s": bytes_per_second(),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the name and the ceilings of a device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=main.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    print(json.dumps({"device": device_name(arguments.device)} | ceilings(arguments.device), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
