"""Every figure of the tables of docs/scale.md comes from a row of a measurement."""

from __future__ import annotations

import re

import pytest

from benchmarks import features, machine, rows, store

PAGE = (machine.ROOT / "docs" / "scale.md").read_text()
MEASURED = [row for row in rows.load_all() if row["op"] in ("features", "store")]


def cells(first: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(first)}.*$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def hours(encoder: str, processes: int, dtype: str) -> float:
    found = [
        row["hours_per_minute"]
        for row in MEASURED
        if row["shape"].startswith(f"{encoder},") and (row["processes"], row["dtype"]) == (processes, dtype)
    ]
    return found[-1]


@pytest.mark.parametrize("encoder", features.CLIPS)
def test_throughput(encoder):
    one, two, four = (hours(encoder, processes, "fp32") for processes in (1, 2, 4))
    expected = [f"{one:.3g}", f"{two:.3g}", f"{four:.3g}", f"{four / one:.1f}x", f"{hours(encoder, 1, 'bf16'):.3g}"]
    assert cells(encoder) == expected


@pytest.mark.parametrize(
    ("phase", "first"),
    list(zip(store.PHASES, ("nothing", "building", "opening", "batches", "training"), strict=True)),
)
def test_a_million_utterances(phase, first):
    row = [row for row in MEASURED if row["mode"] == phase and row["op"] == "store"][-1]
    assert row["shape"].startswith("1000000x")
    assert cells(first) == [f"{row['p50_ms'] / 1e3:.1f}", f"{row['peak_mib']:.0f}"]


@pytest.mark.slow
def test_the_benchmarks_run(tmp_path):
    assert store.main(["--utterances", "20001", "--dim", "8", "--results", str(tmp_path)]) == 0
    arguments = ["--encoders", "ssam-demo", "--processes", "1", "--samples", "1", "--results", str(tmp_path)]
    assert features.main(arguments) == 0
    measured = rows.load_all(tmp_path)
    assert [row["mode"] for row in measured] == [*store.PHASES, "extract"]
    assert all(row["p50_ms"] >= 0 for row in measured)
    assert measured[-1]["hours_per_minute"] > 0
