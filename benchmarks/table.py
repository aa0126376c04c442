"""Markdown tables from the rows of one device, on screen or written into a page.

    python -m benchmarks.table amd-epyc-4-threads
    python -m benchmarks.table amd-epyc-4-threads --update docs/performance.md

For every op, case, mode and allocator the newest rows count. Ratios are of medians measured in the same run.
``--update`` replaces what lies between ``<!-- rows: NAME -->`` and ``<!-- end of rows -->``; names are those of the
ops, ``growth``, ``startup``, ``summary`` and ``targets``.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

from . import rows, sweeps, targets

BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n)(.*?)(<!-- end of rows -->)", re.DOTALL)
STARTUP = {"import": "import", "cold": "first call of a process", "latency": "smallest problem"}
WITH_ERRORS = ("sinkhorn_divergence",)  # whose providers are not equally exact
SUMMARISED = ("sinkhorn_hadamard", "sinkhorn_divergence", "selective_scan", "causal_conv1d", "transformers_mamba")


def time_of(row: dict) -> str:
    return f"{row['p50_ms']:.3g}" + (f", error {row['error']:.0e}" if row["op"] in WITH_ERRORS else "")


def cell(row: dict | None, ours: float) -> str:
    return "-" if row is None else f"{time_of(row)} ({row['p50_ms'] / ours:.1f}x)"


def by_size(key: tuple[str, ...]) -> tuple:
    """Small problems first, forward before backward, whatever the order in which they were measured."""
    _, shape, mode, allocator = key
    return (
        math.prod(map(int, re.findall(r"\d+", shape.partition(",")[0]))),
        shape,
        list(rows.TITLES).index(mode),
        allocator,
    )


def op_table(op: str, measured: list[dict]) -> list[str]:
    newest = rows.newest(rows.cases(measured))
    groups = {key: newest[key] for key in sorted((k for k in newest if k[0] == op), key=by_size)}
    groups = {key: group for key, group in groups.items() if rows.own(group)}
    if not groups:
        return []
    peers = [p for p in dict.fromkeys(p for group in groups.values() for p in group) if not p.startswith(rows.OURS)]
    counted = [row for group in groups.values() for row in group.values()]
    lines = [
        f"### `{op}`, {counted[0]['device']}, at {rows.commits(counted)}", "",
        "Medians in ms; in brackets how many times longer than ours.", "",
        f"| case | mode | allocator | ours | of the floor's speed | peak MiB | {' | '.join(peers)} |",
        "|---" * (6 + len(peers)) + "|",
    ]  # fmt: skip
    for (_, shape, mode, allocator), group in groups.items():
        own = rows.own(group)
        time, peak = own["p50_ms"], own["peak_mib"]
        floor = f"{100 * own['floor_ms'] / time:.0f} %" if own.get("floor_ms") else "-"
        cells = [cell(group.get(peer), time) for peer in peers]
        lines.append(
            f"| {shape} | {rows.TITLES[mode]} | {allocator} | {time_of(own)} | {floor} | "
            f"{'-' if peak is None else f'{peak:.1f}'} | {' | '.join(cells)} |"
        )
    return lines


def summary_table(measured: list[dict]) -> list[str]:
    """For each op and mode the smallest and the largest ratio of the fastest peer's time to ours."""
    ratios: dict[tuple[str, str], list[float]] = {}
    counted: list[dict] = []
    for (op, _, mode, allocator), group in rows.newest(rows.cases(measured)).items():
        own, peers = rows.own(group), [row for row in group.values() if not rows.is_ours(row)]
        if own and peers and allocator == "default" and op in SUMMARISED:
            ratios.setdefault((op, mode), []).append(min(row["p50_ms"] for row in peers) / own["p50_ms"])
            counted += group.values()
    if not ratios:
        return []
    lines = [
        f"### Summary, {counted[0]['device']}, at {rows.commits(counted)}", "",
        "| op | mode | cases | the fastest peer of each case takes |", "|---" * 4 + "|",
    ]  # fmt: skip
    titles = list(rows.TITLES)
    for op, mode in sorted(ratios, key=lambda key: (SUMMARISED.index(key[0]), titles.index(key[1]))):
        found = ratios[op, mode]
        least, most = f"{min(found):.1f}x", f"{max(found):.1f}x"
        times = least if len(found) == 1 else f"{least} to {most}"
        lines.append(f"| `{op}` | {rows.TITLES[mode]} | {len(found)} | {times} as long |")
    return lines


def startup_table(measured: list[dict]) -> list[str]:
    ours = [row for row in measured if row["mode"] in STARTUP and rows.is_ours(row)]
    newest = {(row["op"], row["provider"], row["mode"]): row for row in ours}
    if not newest:
        return []
    lines = [
        f"### Start, {measured[0]['device']}, at {rows.commits(newest.values())}", "", "Medians in ms.", "",
        f"| op | provider | case | {' | '.join(STARTUP.values())} |", "|---" * (3 + len(STARTUP)) + "|",
    ]  # fmt: skip
    for op, provider in dict.fromkeys(key[:2] for key in newest):
        found = [newest.get((op, provider, mode)) for mode in STARTUP]
        shape = next(row["shape"] for row in found if row)
        cells = ["-" if row is None else f"{row['p50_ms']:.3g}" for row in found]
        lines.append(f"| {op} | {provider} | {shape} | {' | '.join(cells)} |")
    return lines


def growth_table(measured: list[dict]) -> list[str]:
    newest, fitted = sweeps.newest(measured), sweeps.exponents(measured)
    if not fitted:
        return []
    counted = [row for key in fitted for row in newest[key].values()]
    lines = [
        f"### Growth, {measured[0]['device']}, at {rows.commits(counted)}", "",
        "| op | provider | mode | dimension | sizes | time grows as |", "|---" * 6 + "|",
    ]  # fmt: skip
    for (op, provider, mode, dimension), power in fitted.items():
        sizes = sorted(newest[op, provider, mode, dimension])
        lines.append(
            f"| {op} | {provider} | {rows.MODES[mode]} | {dimension} | {sizes[0]} to {sizes[-1]} | "
            f"{dimension}^{power:.2f} |"
        )
    return lines


def tables(measured: list[dict]) -> dict[str, list[str]]:
    """Name -> lines, for what there are rows of."""
    found = {op: op_table(op, measured) for op in dict.fromkeys(row["op"] for row in measured)}
    found |= {"growth": growth_table(measured), "startup": startup_table(measured), "targets": targets.table(measured)}
    found["summary"] = summary_table(measured)
    return {name: lines for name, lines in found.items() if lines}


def update(page: str, measured: list[dict]) -> str:
    """The page with its blocks written anew; a block whose rows are missing stays as it is."""
    return fill(page, tables(measured))


def fill(page: str, made: dict[str, list[str]]) -> str:
    """The page with those tables in the blocks of their names."""

    def block(match: re.Match) -> str:
        lines = made.get(match[2])
        return match[0] if lines is None else "\n".join((f"{match[1]}", *lines, "", match[4]))

    return BLOCK.sub(block, page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if not any(argument.startswith("--rows") for argument in argv or sys.argv[1:]):
        rows.device_argument(parser)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="of a file instead of a known device")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write the tables into this page")
    arguments = parser.parse_args(argv)
    measured = rows.load(arguments.rows or rows.RESULTS / f"{arguments.device}.jsonl")
    if arguments.update:
        arguments.update.write_text(update(arguments.update.read_text(), measured))
    else:
        print("\n\n".join("\n".join(lines) for lines in tables(measured).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
