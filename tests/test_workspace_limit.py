"""The workspace limit of the CPU kernel of sinkhorn_hadamard, and the memory that it saves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from test_sinkhorn_cpu import points
from tolerances import assert_close

import parrot_kernels
from parrot_kernels import native

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")


def test_the_limit_decides():
    """At the limit a problem's matrices are kept, past it they are not, and the op hands the limit on."""
    given = points(1, 64, 64, 20)
    whole, tiled = 2 * 64 * 64 * 4, 2 * 64 * 64 * 4 - 1
    before = native.workspace_limit()
    results = {}
    try:
        for limit in (whole, tiled, 0):
            parrot_kernels.set_workspace_limit(limit)
            results[limit] = parrot_kernels.sinkhorn_hadamard(**given, backend="cpu").f
    finally:
        parrot_kernels.set_workspace_limit(before)
    assert torch.equal(results[tiled], results[0])
    assert not torch.equal(results[tiled], results[whole])  # sums in another order
    assert_close(results[tiled], results[whole], "sinkhorn", "f")


@pytest.mark.parametrize(("limit", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_limits_that_are_none(limit, kind):
    with pytest.raises(kind, match="set_workspace_limit: limit must"):
        parrot_kernels.set_workspace_limit(limit)


MEMORY = """
import torch, parrot_kernels

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

def grown(limit, points):
    before = peak()
    parrot_kernels.set_workspace_limit(limit)
    x, y = (torch.randn(1, points, 16, requires_grad=True) for _ in "xy")
    out = parrot_kernels.sinkhorn_hadamard(x, y, n_iters=3, backend="cpu")
    (out.cost.sum() + out.y_hadamard.sum()).backward()
    return peak() - before

grown(0, 50)
print(grown(0, 3000), grown(1 << 30, 3000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    """Of a forward and a backward. A matrix of 3000 x 3000 takes 34 MiB."""
    command = [sys.executable, "-c", MEMORY]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    tiled, whole = map(int, done.stdout.split())
    assert tiled < 20 << 20
    assert whole > 75 << 20
