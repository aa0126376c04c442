"""The CPU kernels on each instruction set below the processor's best, in copies of the extension."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import extensions
import pytest
import test_conv_cpu as conv
import test_scan_cpu as scan
import test_sinkhorn_cpu as sinkhorn
import test_sinkhorn_cpu_backward as sinkhorn_backward
import torch
from scan_cases import pairwise
from selective_scan_cases import CASES, EVERYTHING, make
from sinkhorn_cases import CASES as PROBLEMS
from sinkhorn_cases import problem

from parrot_kernels import native

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(params=["v2", "v3"])
def lower(request, monkeypatch):
    extension = extensions.with_instruction_set(request.param)
    monkeypatch.setattr(native, "extension", lambda: extension)


@pytest.mark.usefixtures("lower")
def test_scan():
    for case, dtype in zip(CASES, cycle(DTYPES), strict=False):
        scan.check(*make(case, dim=63, length=45, states=9, dtype=dtype))
    for dtype in DTYPES:
        for states in (1, 8, 16, 24, 64):
            scan.check(*make(EVERYTHING, batch=2, dim=33, length=70, states=states, dtype=dtype))


@pytest.mark.usefixtures("lower")
def test_conv():
    for case, dtype in zip(pairwise(conv.OPTIONS), cycle(DTYPES), strict=False):
        conv.check(*conv.make(case, dtype=dtype))


@pytest.mark.usefixtures("lower")
@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["kept", "tiled"])
def test_sinkhorn(limit, monkeypatch):
    monkeypatch.setattr(native, "_workspace_limit", limit)
    for case in PROBLEMS:
        for dtype in DTYPES:
            given = problem(case, (4, 19, 23, 5), dtype)
            sinkhorn.assert_matches(given)
            sinkhorn_backward.assert_matches(given)
    for size in ((1, 1, 1, 1), (2, 33, 31, 40), (1, 129, 257, 20)):
        sinkhorn.assert_matches(sinkhorn.points(*size))
        scale = 8.0 if size[1] == 1 else 1.0  # see there
        sinkhorn_backward.assert_matches(sinkhorn_backward.weighted(sinkhorn.points(*size)), scale)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["v2", "v3"])
@pytest.mark.parametrize("file", ["scan_cpu", "conv_cpu", "sinkhorn_cpu", "sinkhorn_cpu_backward"])
def test_every_test(file, isa):
    if native.extension().isa <= isa:
        pytest.skip(f"there is nothing above {isa}")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PARROT_CPU_ISA": isa}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    test = Path(__file__).with_name(f"test_{file}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
