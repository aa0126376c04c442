"""What the first call costs: a fresh process imports the package and calls an op once.

Mode ``import``: importing ``parrot_kernels`` where torch is already there. Mode ``cold``: the first call after it,
with all that is loaded or built on demand. Mode ``latency``, of the smallest problem in a warm process, is timed by
the runner with the other modes.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time

import numpy as np

from . import machine

PROCESSES = 5


def child(op_name: str, backend: str, device: str) -> dict[str, float]:
    """Milliseconds of the import and of the first call in this, fresh, process."""
    import torch

    op = importlib.import_module(f"benchmarks.{op_name}")
    if device == "cuda":
        torch.ones(1, device=device)  # the context belongs to torch
    start = time.perf_counter()
    importlib.import_module("parrot_kernels")
    imported = time.perf_counter()
    work = op.work(op.ours(backend), op.TINY, device, False)
    called = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"import": 1e3 * (imported - start), "cold": 1e3 * (time.perf_counter() - called)}


def measure(op_name: str, device: str, processes: int | None = None) -> list[dict]:
    """Rows of modes ``import`` and ``cold`` for each of our backends."""
    op = importlib.import_module(f"benchmarks.{op_name}")
    processes = processes or PROCESSES
    rows = []
    for backend in machine.our_backends(op_name, device):
        command = [sys.executable, "-m", "benchmarks.startup", op_name, backend, device]
        runs = [
            json.loads(subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True).stdout)
            for _ in range(processes)
        ]
        for mode in ("import", "cold"):
            p20, p50, p80 = (float(q) for q in np.quantile([run[mode] for run in runs], (0.2, 0.5, 0.8)))
            rows.append(
                {"op": op_name, "provider": f"parrot_kernels[{backend}]", "mode": mode, "shape": str(op.TINY),
                 "dtype": "float32", "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "samples": processes,
                 "error": 0.0, "peak_mib": None}
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:4])))
