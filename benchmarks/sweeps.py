"""How time grows with each dimension: ``python -m benchmarks.run --op selective_scan --modes forward sweep``.

From one base case each dimension is doubled several times while the others stay. Rows carry ``sweep``, the
dimension's name, and ``size``; the exponent p of time ~ size^p is fitted by least squares of the logarithms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from . import causal_conv1d, selective_scan, sinkhorn_hadamard

# op -> (base case, dimension -> sizes). The base is large enough that the call itself does not hide the growth.
SWEEPS = {
    "sinkhorn_hadamard": (
        sinkhorn_hadamard.Case(4, 128, 128, 64),
        {"B": (4, 8, 16, 32), "N": (128, 256, 512, 1024), "M": (128, 256, 512, 1024), "D": (64, 128, 256, 512, 1024),
         "iterations": (25, 50, 100, 200)},
    ),
    "selective_scan": (
        selective_scan.Case(2, 256, 256, 16),
        {"B": (2, 4, 8, 16), "D": (256, 512, 1024, 2048), "L": (256, 512, 1024, 2048), "N": (8, 16, 32, 64)},
    ),
    "causal_conv1d": (
        causal_conv1d.Case(4, 512, 512),
        {"B": (4, 8, 16, 32), "D": (512, 1024, 2048, 4096), "L": (512, 1024, 2048, 4096)},
    ),
}  # fmt: skip


def cases(op: str, count: int | None = None) -> Iterable[tuple[str, int, object]]:
    """(dimension, size, case) of every measurement, of the first ``count`` sizes where it is given."""
    base, dimensions = SWEEPS[op]
    for dimension, sizes in dimensions.items():
        for size in sizes[:count]:
            yield dimension, size, dataclasses.replace(base, **{dimension: size})


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """p of time ~ size^p, by least squares in log-log."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def newest(rows: Iterable[dict]) -> dict[tuple[str, str, str, str], dict[int, dict]]:
    """(op, provider, mode, dimension) -> size -> its last row."""
    found: dict[tuple[str, str, str, str], dict[int, dict]] = {}
    for row in rows:
        if "sweep" in row:
            found.setdefault((row["op"], row["provider"], row["mode"], row["sweep"]), {})[row["size"]] = row
    return found


def exponents(rows: Iterable[dict]) -> dict[tuple[str, str, str, str], float]:
    return {
        key: exponent(list(by_size), [row["p50_ms"] for row in by_size.values()])
        for key, by_size in newest(rows).items()
        if len(by_size) > 1
    }
