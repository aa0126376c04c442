"""Compare our medians between two commits, or two files of rows; exit status 1 where something became slower.

    python -m benchmarks.compare 4d893839e8ce a2292a156761
    python -m benchmarks.compare before.jsonl after.jsonl --threshold 1.1

A case is a regression where its ratio of medians exceeds ``--threshold`` and also 1 + 2 s, s being the root of the
sum of squares of the two rows' relative spreads (p80 - p20) / (2 p50): a case must stand out of its own noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from . import rows

IDENTITY = ("op", "provider", "mode", "shape", "dtype", "threads", "device", "allocator")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit that has rows (its first letters are enough) or a .jsonl file")
    parser.add_argument("new", help="the same, of what is to be judged")
    parser.add_argument("--threshold", type=float, default=1.2, help="ratio of medians to report (%(default)s)")
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of rows (%(default)s)")
    return parser.parse_args(argv)


def select(name: str, results: Path) -> dict[tuple, dict]:
    """Our rows of a commit or file by what identifies a measurement; the last one of each counts."""
    path = Path(name)
    found = rows.load(path) if path.suffix == ".jsonl" else rows.load_all(results)
    if path.suffix != ".jsonl":
        found = [row for row in found if row["commit"].startswith(name)]
    return {tuple(row.get(field) for field in IDENTITY): row for row in found if rows.is_ours(row)}


def spread(row: dict) -> float:
    return (row["p80_ms"] - row["p20_ms"]) / (2 * row["p50_ms"])


def verdict(base: dict, new: dict, threshold: float) -> tuple[float, float, str]:
    """(ratio of medians, ratio that counts as a change, "slower" | "faster" | "")."""
    ratio = new["p50_ms"] / base["p50_ms"]
    limit = max(threshold, 1 + 2 * float(np.hypot(spread(base), spread(new))))
    return ratio, limit, "slower" if ratio > limit else "faster" if ratio < 1 / limit else ""


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    base, new = (select(name, arguments.results) for name in (arguments.base, arguments.new))
    common = [key for key in base if key in new]
    if not common:
        print(f"no case in common: {len(base)} of ours in {arguments.base}, {len(new)} in {arguments.new}")
        return 2
    print("| op | provider | mode | case | base ms | new ms | ratio | counts from | |\n" + "|---" * 9 + "|")
    slower = 0
    for key in common:
        ratio, limit, word = verdict(base[key], new[key], arguments.threshold)
        slower += word == "slower"
        row = base[key]
        print(
            f"| {row['op']} | {row['provider']} | {row['mode']} | {row['shape']} | {row['p50_ms']:.3g} | "
            f"{new[key]['p50_ms']:.3g} | {ratio:.2f} | {limit:.2f} | {word} |"
        )
    missing = len(base) - len(common)
    print(f"\n{len(common)} cases compared, {slower} slower; {missing} of the base have no counterpart")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
