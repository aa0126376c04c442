"""The CUDA kernels of the one-token updates, emulated on the host, against the fp64 reference."""

from __future__ import annotations

import cuda_emulated
import pytest
import test_causal_conv1d_update as conv_cases
import test_selective_state_update as state_cases
import torch
from scan_cases import pairwise
from tolerances import assert_close

from parrot_kernels.ops import causal_conv1d_update as conv
from parrot_kernels.ops import selective_state_update as scan

pytestmark = pytest.mark.skipif(not cuda_emulated.SOURCES.exists(), reason="needs the sources of the extension")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    cuda_emulated.module()
    for op in (conv, scan):
        monkeypatch.setattr(op.native, "call_cuda", lambda function, device, **a: cuda_emulated.call(function, **a))


def within(state, dtype, compute):
    """As the ops do before they launch: states that a kernel doesn't take are converted."""
    return state if state.dtype in (dtype, compute, torch.float64) else state.to(compute)


@pytest.mark.parametrize("case", list(pairwise(state_cases.OPTIONS)), ids=lambda c: "-".join(map(str, c.values())))
def test_state_update(case):
    state, inputs, indices = state_cases.make_step(case, dim=21, states=11)
    state = within(state, case["dtype"], inputs["A"].dtype)
    want, want_state = state_cases.expected(state, inputs, indices)
    out = torch.empty_like(inputs["x"])
    scan.KERNELS["cuda"](state=state, out=out, indices=None if indices is None else indices.to(torch.int32), **inputs)
    assert_close(out, want, "scan", "out")
    narrow = state.float() if state.dtype == torch.float64 != case["dtype"] else state
    assert_close(narrow, want_state, "scan", "state")


def test_a_padded_row_may_hold_anything():
    state, inputs, indices = state_cases.make_step(state_cases.ALL | {"indices": "padded"})
    want, want_state = state_cases.expected(state, inputs, indices)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name][1] = torch.nan
    out = torch.empty_like(inputs["x"])
    scan.KERNELS["cuda"](state=state, out=out, indices=indices.to(torch.int32), **inputs)
    assert_close(out, want, "scan", "out")
    assert_close(state, want_state, "scan", "state")


@pytest.mark.parametrize("dim", [1, 16, 35])
@pytest.mark.parametrize("states", [1, 8, 24, 33])
def test_sizes_and_batches(dim, states):
    state, inputs, _ = state_cases.make_step(state_cases.ALL | {"C": "one"}, dim=dim, states=states)
    one = {name: t[:1] if name in ("x", "dt", "z", "B", "C") else t for name, t in inputs.items()}
    alone, out, out_alone = state[:1].clone(), torch.empty_like(inputs["x"]), torch.empty_like(inputs["x"][:1])
    want, want_state = state_cases.expected(state, inputs, None)
    scan.KERNELS["cuda"](state=state, out=out, indices=None, **inputs)
    scan.KERNELS["cuda"](state=alone, out=out_alone, indices=None, **one)
    assert_close(out, want, "scan", "out")
    assert_close(state, want_state, "scan", "state")
    assert torch.equal(out[:1], out_alone)
    assert torch.equal(state[:1], alone)


@pytest.mark.parametrize("case", conv_cases.CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_conv_update(case):
    inputs = conv_cases.make_steps(case, dim=70)
    inputs["state"] = within(inputs["state"], case["dtype"], inputs["weight"].dtype)
    want, want_state = conv_cases.expected(inputs)
    x, seen, indices = inputs["x"], inputs["cache_seqlens"], inputs["state_indices"]
    x = x.unsqueeze(-1) if x.dim() == 2 else x
    out = torch.empty_like(x)
    conv.KERNELS["cuda"](
        x=x,
        state=inputs["state"],
        weight=inputs["weight"],
        bias=inputs["bias"],
        silu=inputs["activation"] is not None,
        seen=None if seen is None else seen.to(torch.int32),
        indices=None if indices is None else indices.to(torch.int32),
        out=out,
    )
    assert_close(out.view(want.shape), want, "conv", "out")
    assert torch.equal(inputs["state"], want_state)
