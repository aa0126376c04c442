"""The benchmark harness: every provider computes the same thing, a wrong one is not timed, rows tell their origin."""

from __future__ import annotations

import argparse
import importlib
import json

import numpy as np
import pytest

from benchmarks import machine, run, timing

OPS = [importlib.import_module(f"benchmarks.{name}") for name in run.OPS]


@pytest.mark.parametrize("both", [False, True], ids=["forward", "both"])
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


def test_a_wrong_provider_is_not_timed(monkeypatch, capsys):
    op = importlib.import_module("benchmarks.causal_conv1d")
    good = op.works(op.TINY, "cpu", False, True)["sum of shifts"]
    monkeypatch.setattr(op, "works", lambda *_: {"good": good, "wrong": lambda: lambda: tuple(2 * t for t in good()())})
    monkeypatch.setattr(run, "peak_mib", lambda *_: None)
    arguments = argparse.Namespace(op="causal_conv1d", device="cpu", peers="all", skip=[], seconds=0.01)
    rows = run.measure(op, op.TINY, "forward", arguments)
    assert [row["provider"] for row in rows] == ["good"]
    assert "wrong: not timed" in capsys.readouterr().err


def test_every_provider_gets_its_turn_in_each_round():
    turns = []
    samples = timing.interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, "cpu", rounds=5)
    assert all(len(values) == 5 and np.all(values > 0) for values in samples.values())
    assert "".join(turns).replace("aa", "a").replace("bb", "b").count("ab") >= 5


def test_rows_are_appended_with_their_origin(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(importlib.import_module("benchmarks.causal_conv1d"), "CASES", [OPS[2].TINY])
    arguments = ["--op", "causal_conv1d", "--seconds", "0.01", "--skip", "compiled", "--modes", "forward"]
    assert run.main(arguments) == 0
    assert run.main(arguments) == 0
    (file,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) % 2 == 0
    assert file.stem == machine.device_name("cpu") == rows[0]["device"]
    assert rows[0]["commit"] == machine.commit()
    assert {"p20_ms", "p50_ms", "p80_ms", "peak_mib", "error", "versions"} <= rows[0].keys()
    assert rows[0]["p20_ms"] <= rows[0]["p50_ms"] <= rows[0]["p80_ms"]
