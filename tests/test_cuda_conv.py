"""The CUDA kernels of causal_conv1d, emulated on the host, against the fp64 reference."""

from __future__ import annotations

import cuda_emulated
import pytest
import torch
from scan_cases import pairwise
from test_conv_cpu import EVERYTHING, OPTIONS, REFERENCE, double, make, run
from tolerances import assert_close

from parrot_kernels.ops import causal_conv1d as op

pytestmark = pytest.mark.skipif(not cuda_emulated.SOURCES.exists(), reason="needs the sources of the extension")


def layout_of(t, layout):
    if layout == "channels_last":
        return t.mT.contiguous().mT
    return t.repeat_interleave(2, -1)[..., ::2] if layout == "sliced" else t


@pytest.fixture
def check(monkeypatch):
    extension = cuda_emulated.module()
    monkeypatch.setattr(op.native, "extension", lambda: extension)
    monkeypatch.setattr(op.native, "call_cuda", lambda function, device, **a: cuda_emulated.call(function, **a))

    def check(inputs, options, grads, layout="rows"):
        want = run(REFERENCE, double(inputs), options, double(grads))
        if options["lengths"] is not None:  # what padding holds must not matter
            padding = torch.arange(inputs["x"].shape[2]) >= options["lengths"].unsqueeze(1)
            inputs["x"] = inputs["x"].masked_fill(padding.unsqueeze(1), torch.nan)
        for tensors in (inputs, grads):
            for name, t in tensors.items():
                tensors[name] = t if t is None or t.dim() == 1 else layout_of(t, layout)
        got = run(op.KERNELS["cuda"], inputs, options, grads)
        for name in got:
            assert_close(got[name], want[name], "conv_grad" if name.startswith("d") else "conv", name)
        return got

    return check


@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("case", list(pairwise(OPTIONS)), ids=str)
def test_options(case, layout, check):
    check(*make(case, dim=21), layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "channels_last", "sliced"])
@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_dtypes_and_layouts(width, layout, dtype, check):
    case = EVERYTHING | {"width": width, "reverse": width % 2 == 0, "lengths": width > 2}
    check(*make(case, dim=16, dtype=dtype), layout)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_several_stretches(layout, reverse, check):
    case = EVERYTHING | {"length": 2047 if layout == "rows" else 515, "reverse": reverse}
    check(*make(case, batch=2, dim=5), layout)


@pytest.mark.parametrize("absent", ["grad_out", "grad_final_state"])
def test_absent_output_gradients(absent, check):
    inputs, options, grads = make(EVERYTHING, dim=6)
    check(inputs, options, grads | {absent: None})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_padding_and_batch_mates_change_no_bit(layout, reverse, check):
    inputs, options, grads = make(EVERYTHING | {"reverse": reverse, "lengths": False}, dim=6)
    options["lengths"] = torch.tensor([100, 0, 1]).int()
    whole = check(dict(inputs), options, dict(grads), layout)

    def first(t):
        return None if t is None else t[:1, ..., :100] if t.dim() == 3 and t.shape[2] > 3 else t[:1]

    alone = {name: t if name in ("weight", "bias") else first(t) for name, t in inputs.items()}
    one = options | {"lengths": None, "seq_idx": options["seq_idx"][:1, :100]}
    alone = check(alone, one, {name: first(t) for name, t in grads.items()}, layout)
    for name in ("out", "final_state", "dx", "dinitial_state"):
        assert torch.equal(first(whole[name]), alone[name]), name
