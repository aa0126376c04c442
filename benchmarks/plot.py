"""Plots from rows alone: ``python -m benchmarks.plot amd-epyc-4-threads --figures docs/figures``.

``<op>-speedup.png``: how many times longer than ours each peer takes. ``roofline.png``: the fraction of the floor's
speed that our kernels reach, over their multiply-adds and exponentials a byte. ``<op>-growth.png``: our time over
the size of each dimension with its fitted exponent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import rows, sweeps

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"


def _figure(columns: int = 1, width: float = 7.0):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def speedup(op: str, measured: list[dict], folder: Path) -> Path | None:
    """Bars of peer over ours, logarithmic, in one panel a mode."""
    groups = {key: group for key, group in rows.newest(measured).items() if rows.own(group) and key[3] == "default"}
    peers = list(dict.fromkeys(name for group in groups.values() for name in group if not name.startswith(rows.OURS)))
    modes = [mode for mode in rows.TITLES if any(key[2] == mode for key in groups)]
    if not peers or not modes:
        return None
    figure, axes = _figure(len(modes), 12)
    for axis, mode in zip(axes, modes, strict=True):
        here = {shape: group for (_, shape, m, _), group in groups.items() if m == mode}
        for index, peer in enumerate(peers):
            at = [i + (index - len(peers) / 2) * 0.8 / len(peers) for i, g in enumerate(here.values()) if peer in g]
            ratios = [g[peer]["p50_ms"] / rows.own(g)["p50_ms"] for g in here.values() if peer in g]
            axis.bar(at, ratios, 0.8 / len(peers), align="edge", label=peer)
        axis.set_xticks(range(len(here)), here, rotation=20, fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(yscale="log", title=rows.TITLES[mode])
    axes[0].set_ylabel("times longer than ours")
    handles = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=7)
    figure.suptitle(f"{op}, {measured[0]['device']}", fontsize=10)
    return _save(figure, folder / f"{op}-speedup.png")


def intensity(row: dict) -> float:
    """Multiply-adds and exponentials for each byte that must move."""
    return (row["work"]["multiply_adds"] + row["work"]["exponentials"]) / row["work"]["bytes"]


def roofline(measured: list[dict], folder: Path) -> Path | None:
    best = [rows.own(group) for group in rows.newest(measured).values()]
    best = [row for row in best if row and row.get("work") and row.get("floor_ms")]
    if not best:
        return None
    figure, (axis,) = _figure()
    for op in dict.fromkeys(row["op"] for row in best):
        for mode, marker in zip(rows.MODES, "os", strict=True):
            mine = [row for row in best if row["op"] == op and row["mode"] == mode]
            fractions = [row["floor_ms"] / row["p50_ms"] for row in mine]
            axis.plot([intensity(r) for r in mine], fractions, marker, label=f"{op}, {rows.MODES[mode]}", markersize=5)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="multiply-adds and exponentials a byte", ylabel="fraction of the floor's speed")
    axis.set(ylim=(0, None), title=best[0]["device"])
    axis.legend(fontsize=6)
    return _save(figure, folder / "roofline.png")


def growth(op: str, measured: list[dict], folder: Path) -> Path | None:
    curves = {key: found for key, found in sweeps.newest(measured).items() if key[0] == op and len(found) > 1}
    dimensions = list(dict.fromkeys(key[3] for key in curves))
    if not curves:
        return None
    figure, axes = _figure(len(dimensions), 2.6 * len(dimensions))
    for axis, dimension in zip(axes, dimensions, strict=True):
        for (_, _, mode, swept), by_size in curves.items():
            if swept == dimension:
                sizes, times = list(by_size), [row["p50_ms"] for row in by_size.values()]
                power = sweeps.exponent(sizes, times)
                axis.loglog(sizes, times, "o-", label=f"{rows.MODES[mode]}, {dimension}^{power:.2f}", markersize=3)
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.tick_params(labelsize=7)
        axis.set_title(dimension, fontsize=9)
        axis.legend(fontsize=6)
    axes[0].set_ylabel("ms")
    return _save(figure, folder / f"{op}-growth.png")


def write(measured: list[dict], folder: Path) -> list[Path]:
    """All plots that these rows, of one device, allow."""
    timed = rows.cases(measured)
    ops = list(dict.fromkeys(row["op"] for row in measured))
    paths = [speedup(op, [row for row in timed if row["op"] == op], folder) for op in ops]
    paths += [growth(op, measured, folder) for op in ops]
    return [path for path in (*paths, roofline(timed, folder)) if path]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows.device_argument(parser)
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder to write to (%(default)s)")
    arguments = parser.parse_args(argv)
    for path in write(rows.load(rows.RESULTS / f"{arguments.device}.jsonl"), arguments.figures):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
