"""A million utterances in the feature store: building, opening, and the batches of one training epoch.

    python -m benchmarks.store --folder DIR     # needs 1 GB there, and removes it

Every phase runs in a process of its own, whose peak of resident memory is told; the peak of a process that has only
imported what is needed is told beside. Batches are read from a warm page cache unless memory is short.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from . import machine, rows

PHASES = ("import", "build", "open", "epoch", "train")
STEP = 10_000  # utterances that are added at once
BATCH = 32


def keys(n: int) -> np.ndarray:
    """(n, 32) that look like SHA-256."""
    return np.random.default_rng(0).integers(0, 256, (n, 32), np.uint8)


def phase(name: str, folder: Path, n: int, dim: int) -> dict[str, float]:
    from parrot.corpora.splits import Fold
    from parrot.model import build
    from parrot.store import FeatureStore
    from parrot.training import TrainingConfig, train

    wanted = keys(n)
    start = time.perf_counter()
    if name == "build":
        store, random = FeatureStore(folder, "million", dim), np.random.default_rng(1)
        for first in range(0, n, STEP):
            values = random.standard_normal((min(STEP, n - first), dim), np.float32)
            store.add({key.tobytes(): row for key, row in zip(wanted[first : first + STEP], values, strict=True)})
    elif name != "import":
        rows_on_disk = FeatureStore(folder, "million", dim, verify=name == "open").rows(wanted)
        if name != "open":
            start = time.perf_counter()
        if name == "epoch":
            for batch in np.random.default_rng(2).permutation(n)[: n - n % BATCH].reshape(-1, BATCH):
                rows_on_disk[batch]
        if name == "train":
            order = np.random.default_rng(2).permutation(n)
            fold = Fold(0, order[: -n // 10], order[-n // 10 :], order[:0])
            labels = np.arange(n) % 6
            train(build("fcn-0", [dim], 6), [rows_on_disk], labels, fold, TrainingConfig(epochs=1, device="cpu"))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (the system's temporary folder)")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    n, dim = arguments.utterances, arguments.dim
    if arguments.child:
        name, folder = arguments.child
        print(json.dumps(phase(name, Path(folder), n, dim)))
        return 0
    device = machine.device_name("cpu")
    context = {"device": device, "commit": machine.commit(), "date": time.strftime("%Y-%m-%d"), "allocator": "default",
               "threads": 1, "versions": machine.versions("safetensors", "numpy")}  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in PHASES:
            command = [sys.executable, "-m", "benchmarks.store", "--child", name, folder]
            command += ["--utterances", str(n), "--dim", str(dim)]
            done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout)
            milliseconds = 1e3 * result["seconds"]
            row = {"op": "store", "provider": "parrot.store", "mode": name, "dtype": "float32", "shape": f"{n}x{dim}",
                   "p20_ms": milliseconds, "p50_ms": milliseconds, "p80_ms": milliseconds, "samples": 1,
                   "peak_mib": result["peak_mib"]}  # fmt: skip
            rows.append([{**row, **context}], arguments.results / f"{device}.jsonl")
            print(f"{name}: {result['seconds']:.1f} s, peak {result['peak_mib']:.0f} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
