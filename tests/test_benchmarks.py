"""The benchmark harness: every provider computes the same thing, a wrong one is not timed, rows tell their origin."""

from __future__ import annotations

import argparse
import importlib
import json
import re

import numpy as np
import pytest

from benchmarks import (
    compare,
    end_to_end,
    machine,
    plot,
    rows,
    run,
    sinkhorn_divergence,
    startup,
    sweeps,
    table,
    targets,
    timing,
)
from parrot import cli
from parrot.commands import bench

OPS = [importlib.import_module(f"benchmarks.{name}") for name in run.OPS]


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "both"])
@pytest.mark.parametrize("op", OPS, ids=run.OPS)
def test_providers_agree_with_float64(op, both):
    expected = op.expected(op.TINY, both)
    for name, make in op.works(op.TINY, "cpu", both, peers=True).items():
        if "compile" in name:  # seconds of compilation for the code that the eager provider runs too
            continue
        try:
            work = make()
        except ImportError:
            continue
        assert run.error_against(expected, work()) < op.TOLERANCE, name


@pytest.mark.parametrize("op", OPS, ids=run.OPS)
def test_the_backward_alone_gives_the_same_gradients_again_and_again(op):
    expected = op.expected(op.TINY, True)
    (name, make), *_ = op.works(op.TINY, "cpu", True, peers=False).items()
    backward = make().backward_alone()
    assert name == "parrot_kernels[cpu]"
    assert run.error_against(expected, backward()) < op.TOLERANCE
    assert run.error_against(expected, backward()) < op.TOLERANCE


def test_what_has_rows_of_this_commit_is_not_measured_again(monkeypatch, tmp_path):
    op, measured = OPS[2], []
    monkeypatch.setattr(op, "CASES", [op.TINY])
    monkeypatch.setattr(machine, "ceilings", lambda device: {})
    monkeypatch.setattr(run, "with_floor", lambda op, case, mode, device, found: found)
    monkeypatch.setattr(
        run, "measure", lambda op, case, mode, how: measured.append(mode) or [made_row(str(case), mode=mode, error=0.0)]
    )
    arguments = ["--op", "causal_conv1d", "--results", str(tmp_path), "--resume", "--modes"]
    assert run.main([*arguments, "forward"]) == 0
    assert run.main([*arguments, "forward", "backward"]) == 0
    assert measured == ["forward", "backward"]
    monkeypatch.setattr(machine, "commit", lambda: "another")
    assert run.main([*arguments, "forward"]) == 0
    assert measured == ["forward", "backward", "forward"]


def test_a_wrong_provider_is_not_timed(monkeypatch, capsys):
    op = importlib.import_module("benchmarks.causal_conv1d")
    good = op.works(op.TINY, "cpu", False, True)["sum of shifts"]
    monkeypatch.setattr(op, "works", lambda *_: {"good": good, "wrong": lambda: lambda: tuple(2 * t for t in good()())})
    monkeypatch.setattr(run, "peak_mib", lambda *_: None)
    arguments = argparse.Namespace(op="causal_conv1d", device="cpu", peers="all", peaks="all", skip=[], seconds=0.01)
    measured = run.measure(op, op.TINY, "forward", arguments)
    assert [row["provider"] for row in measured] == ["good"]
    assert "wrong: not timed" in capsys.readouterr().err


def test_every_provider_gets_its_turn_in_each_round():
    turns = []
    samples = timing.interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, "cpu", rounds=5)
    assert all(len(values) == 5 and np.all(values > 0) for values in samples.values())
    assert "".join(turns).replace("aa", "a").replace("bb", "b").count("ab") >= 5


@pytest.mark.slow
def test_rows_are_appended_with_their_origin(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.import_module("benchmarks.causal_conv1d"), "CASES", [OPS[2].TINY])
    arguments = ["--op", "causal_conv1d", "--seconds", "0.01", "--skip", "compiled", "--modes", "forward"]
    arguments += ["--results", str(tmp_path)]
    assert run.main(arguments) == 0
    assert run.main(arguments) == 0
    (file,) = tmp_path.iterdir()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) % 2 == 0
    assert file.stem == machine.device_name("cpu") == found[0]["device"]
    assert found[0]["commit"] == machine.commit()
    assert {"p20_ms", "p50_ms", "p80_ms", "peak_mib", "error", "versions", "threads", "ceilings"} <= found[0].keys()
    assert found[0]["p20_ms"] <= found[0]["p50_ms"] <= found[0]["p80_ms"]


def made_row(shape="1x2x3", p50=1.0, spread=0.05, **fields):
    row = {"op": "causal_conv1d", "provider": "parrot_kernels[cpu]", "mode": "forward", "shape": shape,
           "dtype": "float32", "threads": 2, "device": "some-cpu", "allocator": "default", "commit": "aaaa1111",
           "p20_ms": p50 * (1 - spread), "p50_ms": p50, "p80_ms": p50 * (1 + spread), "peak_mib": None}  # fmt: skip
    return {**row, **fields}


def slowed(row, factor, **fields):
    return {**row, **{key: factor * row[key] for key in ("p20_ms", "p50_ms", "p80_ms")}, **fields}


def compare_status(tmp_path, before, after):
    rows.append(before, tmp_path / "before.jsonl")
    rows.append(after, tmp_path / "after.jsonl")
    return compare.main([str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")])


def test_a_planted_slowdown_is_caught(tmp_path, capsys):
    before = [made_row("1x2x3"), made_row("4x5x6", 2.0)]
    assert compare_status(tmp_path, before, [before[0], slowed(before[1], 1.5)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("slower |")]
    assert len(lines) == 1
    assert "4x5x6" in lines[0]


def test_a_slowdown_planted_into_real_rows_is_caught(tmp_path):
    """Twelve cases of the largest op, all slowed: those that are not too noisy for it must be named."""
    before = [row for row in rows.load_all() if rows.is_ours(row) and row["op"] == "selective_scan"]
    assert compare_status(tmp_path, before, [slowed(row, 1.5) for row in before]) == 1


def test_equal_rows_and_noise_are_no_regression(tmp_path):
    before = [made_row("1x2x3"), made_row("4x5x6", spread=0.4)]
    assert compare_status(tmp_path, before, [slowed(before[0], 1.15), slowed(before[1], 1.5)]) == 0


def test_commits_are_compared_by_their_rows(tmp_path, capsys):
    row = made_row()
    rows.append([row, slowed(row, 1.5, commit="bbbb2222"), slowed(row, 1.0, commit="cccc3333")], tmp_path / "d.jsonl")
    assert compare.main(["aaaa", "bbbb", "--results", str(tmp_path)]) == 1
    assert compare.main(["aaaa", "bbbb", "--results", str(tmp_path), "--threshold", "1.6"]) == 0
    assert compare.main(["aaaa", "cccc", "--results", str(tmp_path)]) == 0
    assert compare.main(["aaaa", "dddd", "--results", str(tmp_path)]) == 2
    assert "no case in common" in capsys.readouterr().out


def test_exponents_are_fitted_in_log_log():
    sizes = (1, 2, 4, 8)
    assert sweeps.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    measured = [made_row(p50=size**2, sweep="L", size=size) for size in sizes]
    (power,) = sweeps.exponents(measured).values()
    assert power == pytest.approx(2)
    assert rows.cases(measured) == []


@pytest.mark.parametrize("op", run.OPS)
def test_sweeps_vary_one_dimension(op):
    base, dimensions = sweeps.SWEEPS[op]
    for dimension, size, case in sweeps.cases(op, count=2):
        assert getattr(case, dimension) == size
        assert {k: v for k, v in vars(case).items() if k != dimension}.items() <= vars(base).items()
    assert len(list(sweeps.cases(op))) == sum(map(len, dimensions.values()))


def test_plots_are_drawn_from_rows_alone(tmp_path):
    work = {"multiply_adds": 8, "exponentials": 2, "bytes": 5}
    measured = [
        made_row(mode=mode, provider=provider, floor_ms=0.5, work=work)
        for mode in rows.MODES
        for provider in ("parrot_kernels[cpu]", "peer")
    ]
    measured += [made_row(p50=size, sweep="L", size=size) for size in (1, 2, 4)]
    paths = plot.write(measured, tmp_path)
    assert {path.name for path in paths} == {"causal_conv1d-speedup.png", "causal_conv1d-growth.png", "roofline.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 200_000 for path in paths)


def test_a_process_of_its_own_tells_the_cost_of_the_first_call():
    measured = startup.measure("causal_conv1d", "cpu", processes=1)
    assert [row["mode"] for row in measured] == ["import", "cold"]
    assert all(row["p50_ms"] > 0 for row in measured)


@pytest.mark.slow
def test_the_quick_suite_runs_every_op_and_mode(monkeypatch, tmp_path):
    for op, name in zip(OPS, run.OPS, strict=True):
        monkeypatch.setattr(op, "CASES", [op.TINY])
        dimensions = sweeps.SWEEPS[name][1]
        monkeypatch.setitem(sweeps.SWEEPS, name, (op.TINY, {next(iter(dimensions)): (2, 4)}))
    monkeypatch.setattr(run, "peak_mib", lambda *_: None)
    monkeypatch.setattr(startup, "PROCESSES", 1)
    monkeypatch.setattr(machine, "ceilings", lambda *_: {})
    monkeypatch.setattr(machine, "exponentials_per_second", lambda: 1e10)
    monkeypatch.setattr(machine, "multiply_adds_per_second", lambda: 1e11)
    monkeypatch.setattr(machine, "bytes_per_second", lambda: 1e10)
    folders = ["--results", str(tmp_path), "--figures", str(tmp_path / "figures")]
    assert run.main(["--suite", "quick", "--seconds", "0.01", *folders]) == 0
    measured = rows.load_all(tmp_path)
    assert {(row["op"], row["mode"]) for row in measured} == {
        (op, mode) for op in run.OPS for mode in ("forward", "both", "backward", "latency", "import", "cold")
    }
    assert {row["op"] for row in measured if "sweep" in row} == set(run.OPS)
    assert len(list((tmp_path / "figures").glob("*.png"))) == 7


PAGE = (machine.ROOT / "docs" / "performance.md").read_text()
BLOCKS = {(page, match[2]): match[3].strip()
          for page in ("README.md", "docs/performance.md", "docs/performance_intel.md")
          for match in table.BLOCK.finditer((machine.ROOT / page).read_text())}  # fmt: skip


@pytest.mark.parametrize(("page", "name"), [key for key, block in BLOCKS.items() if block])
def test_every_figure_of_a_table_comes_from_a_row(page, name):
    """A block is what its device's rows of its commits give, to the letter."""
    block = BLOCKS[page, name]
    device, commits = re.match(r"### .*?, (\S+), at (.*)", block).groups()
    measured = [row for row in rows.load(rows.RESULTS / f"{device}.jsonl") if row["commit"] in commits.split(", ")]
    assert "\n".join(table.tables(measured)[name]) == block


# A figure that says what something costs here; sizes such as `4096 x 4096` and limits such as "1 GiB" do not.
MEASURED = re.compile(
    r"(?<![\w.x])\d[\d,.]*(?:e[+-]?\d+)?(?:[x×](?!\w)|\s(?:us|ms|s|sec(?:onds?)?|minutes?|hours?|[MG]iB/s|G/s|GFLOP/s|"
    r"times\s(?:as\sfast|faster|slower|longer))\b)"
)
# Page -> the figures outside the tables of performance.md, and where each comes from.
TRACED = {
    "docs/scale.md": {
        **dict.fromkeys(("2.1x", "3.3x", "1.6x", "1.4x"), "rows of op features: tests/test_scale_page.py"),
        "4 s": "the length of a clip of benchmarks/features.py",
    },
    "docs/encoders.md": {"10.24 s": "the length of SSAM's table of positions"},
    "docs/install.md": dict.fromkeys(("0.02 s", "0.03 s", "0.04 s", "0.05 s"), "written by tests/install_matrix.py"),
    "docs/release.md": {
        "31 minutes": "the time that tests/coverage_run.py took",
        "17.5 minutes": "the time that tests/build_wheels.py took",
    },
}


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(machine.ROOT)) for p in sorted((machine.ROOT / "docs").rglob("*.md")))]
)
def test_every_measured_figure_can_be_traced(page):
    text = table.BLOCK.sub("", (machine.ROOT / page).read_text())
    untraced = [figure for figure in MEASURED.findall(text) if figure not in TRACED.get(page, {})]
    assert untraced == [], f"{page}: give these a row and a table, or name their origin in TRACED"
    assert [figure for figure in TRACED.get(page, {}) if figure not in text] == []


@pytest.mark.parametrize("figure", ["5.4x", "545 ms", "1.2 s", "12 times faster", "3.9 G/s"])
def test_a_figure_without_a_row_is_seen(figure):
    assert MEASURED.findall(f"ours takes {figure} there") == [figure]
    assert MEASURED.findall("1x32x32x120, 4096 x 4096 points, up to 1 GiB, 3xTF32") == []


def test_performance_has_its_blocks():
    assert {"sinkhorn_hadamard", "selective_scan", "causal_conv1d", "targets"} <= {
        match[2] for match in table.BLOCK.finditer(PAGE)
    }


def test_a_figure_that_was_changed_by_hand_is_found():
    device = re.search(r"### .*?, (\S+), at", PAGE)[1]
    measured = rows.load(rows.RESULTS / f"{device}.jsonl")
    forged = re.sub(r"(\| forward \| default \| )0\.", r"\g<1>9.", PAGE, count=1)
    assert forged != PAGE
    assert table.update(forged, measured) != forged
    assert table.update(forged, measured) == table.update(PAGE, measured)


@pytest.mark.parametrize(
    ("own", "peer", "floor", "expected"), [(1, 16, 0.5, "16.0x | yes |"), (1, 3, 0.5, "3.0x | no | why")]
)
def test_an_aim_is_judged_by_its_rows(own, peer, floor, expected):
    group = {"parrot_kernels[cpu]": made_row(p50=own, floor_ms=floor), "peer": made_row(p50=peer, provider="peer")}
    aim = targets.Target("causal_conv1d", "x", "forward", {"1x2x3": 8.0}, targets.slower("peer"), {"1x2x3": "why"})
    assert expected in targets.line(aim, {("causal_conv1d", "1x2x3", "forward", "default"): group})
    assert "not measured" in targets.line(aim, {})


def test_parrot_bench_forwards_and_says_where_benchmarks_are_missing(monkeypatch, tmp_path, capsys):
    commands = []
    done = argparse.Namespace(returncode=3)
    monkeypatch.setattr(bench.subprocess, "run", lambda command, **_: commands.append(command) or done)
    assert cli.main(["bench", "--suite", "full", "--threads", "2", "--output", str(tmp_path)]) == 3
    assert commands[0][1:5] == ["-m", "benchmarks.run", "--suite", "full"]
    run.parse(commands[0][3:])
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert cli.main(["bench"]) == 2
    assert "in a clone" in capsys.readouterr().err


def test_the_two_ways_of_embedding_agree():
    pytest.importorskip("transformers")
    works = end_to_end.embedding(samples=16_000, layers=1)
    ours, plain = (work() for work in works.values())
    assert ours.shape == (1, 3840 + 768)
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()


def test_training_steps_learn():
    for step in end_to_end.training_step(batch=4, dims=(64, 48)).values():
        first = step()
        assert min(step() for _ in range(20)) < first


def test_the_divergence_and_its_peer_tell_how_exact_they_are():
    pytest.importorskip("geomloss")
    case = sinkhorn_divergence.Case(2, 12, 9, 3, 0.3)
    for both in (False, True):
        measured = {row["provider"]: row for row in sinkhorn_divergence.measure(case, "cpu", both, 0.01)}
        assert len(measured) == 1 + len(sinkhorn_divergence.SCALINGS)
        assert measured["parrot_kernels[cpu]"]["error"] < (5e-2 if both else 1e-4)
