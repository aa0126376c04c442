"""The accuracy page: its metric, that its figures are rows and its tests exist, and what the rows must show."""

from __future__ import annotations

import ast
import math
import re

import pytest
import torch

from benchmarks import accuracy, machine, rows, stress, table

PAGE = (machine.ROOT / "docs" / "accuracy.md").read_text()
MEASURED = [row for path in sorted(accuracy.RESULTS.glob("*.jsonl")) for row in rows.load(path)]
FP32, FP16 = torch.float32, torch.float16


def test_error_is_relative_to_the_largest_value():
    want = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert accuracy.error(want, want, FP32) == 0
    assert accuracy.error(want + torch.tensor([0.0, 0.2]), want, FP32) == pytest.approx(0.05)
    assert accuracy.error(torch.tensor([1.0, math.nan]), want, FP32) == math.inf
    assert accuracy.error(torch.tensor([1.0, math.inf]), want, FP32) == math.inf


def test_error_of_what_a_dtype_cannot_hold():
    want = torch.tensor([1.0, 1e5, -1e5], dtype=torch.float64)
    assert accuracy.error(torch.tensor([1.0, math.inf, -math.inf]), want, FP16) == 0
    assert accuracy.error(torch.tensor([1.0, -math.inf, -math.inf]), want, FP16) == math.inf
    assert accuracy.error(torch.zeros(1), torch.tensor([1e-9], dtype=torch.float64), FP16) < 1e-4


def test_a_planted_error_is_measured(monkeypatch):
    case = next(case for case in stress.cases(FP32, small=True) if case.op == "causal_conv1d")

    def off(backend, **given):
        out = case.solve("torch", **given)
        return out if given["x"].dtype == torch.float64 else {k: 1.001 * v for k, v in out.items()}

    monkeypatch.setattr(stress, "cases", lambda *_: [case._replace(solve=off)])
    (row,) = accuracy.measure(FP32, ["torch"], small=True)
    assert row["errors"]["out"] == pytest.approx(1e-3, rel=0.05)
    assert row["errors"]["dweight"] == pytest.approx(1e-3, rel=0.05)
    assert row["ulp"]["out"] < 1e-5


def test_rows_replace_those_of_their_backend_and_dtype(tmp_path):
    def row(backend, dtype, value):
        return {"op": "o", "case": "c", "backend": backend, "dtype": dtype, "errors": {"out": value}}

    path = tmp_path / "folder" / "device.jsonl"
    accuracy.write([row("cpu", "float32", 1), row("cpu", "float16", 2)], path)
    accuracy.write([row("cpu", "float32", 3), row("triton", "float32", 4)], path)
    assert sorted(r["errors"]["out"] for r in rows.load(path)) == [2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["device.jsonl"]


def test_every_figure_comes_from_a_row():
    assert table.fill(PAGE, accuracy.tables(MEASURED)) == PAGE
    written = {match[2] for match in table.BLOCK.finditer(PAGE) if match[3].startswith("\n###")}
    assert written == accuracy.tables(MEASURED).keys()


def test_what_was_measured_was_measured_for_every_op():
    found = {(row["dtype"], row["backend"]): set() for row in MEASURED}
    for row in MEASURED:
        found[row["dtype"], row["backend"]].add(row["op"])
        assert {"commit", "device", "versions"} <= row.keys()
    ops = {"sinkhorn_hadamard", "sinkhorn_divergence", "selective_scan", "causal_conv1d"}
    assert all(ops <= measured for measured in found.values())


# Exponents of 1e4 and more, of which fp32 keeps no digit behind the point: both errors are noise.
NOISE = {"eps 1e-05", "eps 0.0001", "costs up to 1e6, eps 1"}


def test_half_precision_is_as_exact_as_pytorch():
    for row in MEASURED:
        if row["dtype"] in ("float16", "bfloat16") and row["case"] not in NOISE:
            counted = {name: value for name, value in row["errors"].items() if name != "deps"}  # which cancels
            assert accuracy.excess(row | {"errors": counted}) <= 2, (
                f"{row['op']}, {row['case']}, {row['dtype']}, {row['backend']}"
            )


def functions(path: str) -> set[str]:
    names = set()
    for node in ast.parse((machine.ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/\w+\.py)::([\w:]+)`", PAGE)
    assert len(named) > 60
    missing = [f"{path}::{name}" for path, name in named if name not in functions(path)]
    assert missing == []
    promises = [line for line in PAGE[PAGE.index("## Limits") :].splitlines() if line.startswith("| ")]
    headers = ("| limit |", "| promise |")
    assert all("::test_" in line for line in promises if not line.startswith(headers))
