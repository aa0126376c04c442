"""The rows of measurements: where they lie, what identifies one, which of them count."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).with_name("results")
OURS = "parrot_kernels"
MODES = {"forward": "forward", "both": "forward + backward"}
TITLES = {**MODES, "backward": "backward", "generate": "a token"}  # of all modes that are timed beside peers


def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def load_all(folder: Path = RESULTS) -> list[dict]:
    return [row for path in sorted(folder.glob("*.jsonl")) for row in load(path)]


def append(rows: Iterable[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def of_samples(
    op: str,
    mode: str,
    shape: str,
    samples: dict[str, np.ndarray],
    errors: dict[str, float],
    peaks: dict[str, float | None] | None = None,
) -> list[dict]:
    """A row for each provider, from its seconds."""
    found = []
    for name, values in samples.items():
        p20, p50, p80 = (float(q) for q in np.quantile(values, (0.2, 0.5, 0.8)) * 1e3)
        found.append(
            {"op": op, "provider": name, "mode": mode, "shape": shape, "dtype": "float32", "p20_ms": p20,
             "p50_ms": p50, "p80_ms": p80, "samples": len(values), "error": errors[name],
             "peak_mib": (peaks or {}).get(name)}
        )  # fmt: skip
    return found


def is_ours(row: dict) -> bool:
    return row["provider"].startswith(OURS)


def cases(rows: Iterable[dict]) -> list[dict]:
    """The rows of cases timed beside peers: no sweeps, no start-up."""
    return [row for row in rows if row["mode"] in TITLES and "sweep" not in row]


def newest(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """(op, shape, mode, allocator) -> provider -> its last row; a later run replaces an earlier one as a whole."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        group = found.setdefault((row["op"], row["shape"], row["mode"], row["allocator"]), {})
        if row["provider"] in group:
            group.clear()
        group[row["provider"]] = row
    return found


def own(group: dict[str, dict]) -> dict | None:
    """The fastest of our backends in a group."""
    return min((row for row in group.values() if is_ours(row)), key=lambda row: row["p50_ms"], default=None)


def commits(rows: Iterable[dict]) -> str:
    return ", ".join(sorted({row["commit"] for row in rows}))


def device_argument(parser: argparse.ArgumentParser) -> None:
    known = sorted(path.stem for path in RESULTS.glob("*.jsonl"))
    parser.add_argument("device", choices=known, nargs="?", default=known[0], help=f"default: {known[0]}")
