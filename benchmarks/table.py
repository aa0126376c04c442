"""Markdown tables from the rows of one device: ``python -m benchmarks.table amd-epyc-4-threads > table.md``.

For every op, case, mode and allocator the newest rows count. Ratios are of medians measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
OURS = "parrot_kernels"
MODES = {"forward": "forward", "both": "forward + backward", "generate": "a token"}


def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def newest(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """(op, shape, mode, allocator) -> provider -> its last row; a later run replaces an earlier one as a whole."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        group = found.setdefault((row["op"], row["shape"], row["mode"], row["allocator"]), {})
        if row["provider"] in group:
            group.clear()
        group[row["provider"]] = row
    return found


def cell(row: dict | None, ours: float) -> str:
    return "-" if row is None else f"{row['p50_ms']:.3g} ({row['p50_ms'] / ours:.1f}x)"


def tables(rows: list[dict]) -> Iterable[str]:
    groups = newest(rows)
    for op in dict.fromkeys(key[0] for key in groups):
        mine = {key: group for key, group in groups.items() if key[0] == op}
        peers = [p for p in dict.fromkeys(p for group in mine.values() for p in group) if not p.startswith(OURS)]
        commits = sorted({row["commit"] for group in mine.values() for row in group.values()})
        yield f"### `{op}`, {next(iter(next(iter(mine.values())).values()))['device']}, at {', '.join(commits)}\n"
        yield "Medians in ms; in brackets how many times longer than ours.\n"
        yield f"| case | mode | allocator | ours | of the floor's speed | peak MiB | {' | '.join(peers)} |"
        yield "|---" * (6 + len(peers)) + "|"
        for (_, shape, mode, allocator), group in mine.items():
            own = min((r for p, r in group.items() if p.startswith(OURS)), key=lambda r: r["p50_ms"], default=None)
            if own is None:
                continue
            time, peak = own["p50_ms"], own["peak_mib"]
            floor = f"{100 * own['floor_ms'] / time:.0f} %" if own.get("floor_ms") else "-"
            cells = [cell(group.get(peer), time) for peer in peers]
            yield (
                f"| {shape} | {MODES[mode]} | {allocator} | {time:.3g} | {floor} | "
                f"{'-' if peak is None else f'{peak:.1f}'} | {' | '.join(cells)} |"
            )
        yield ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    known = sorted(path.stem for path in RESULTS.glob("*.jsonl"))
    parser.add_argument("device", choices=known, nargs="?" if len(known) == 1 else None, default=known[0])
    print("\n".join(tables(load(RESULTS / f"{parser.parse_args(argv).device}.jsonl"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
