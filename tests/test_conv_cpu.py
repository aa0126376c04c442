"""The CPU kernels of causal_conv1d against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from scan_cases import pairwise
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import native
from parrot_kernels.ops.causal_conv1d import KERNELS, Kernels
from parrot_kernels.reference import causal_conv1d as reference

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason=str(native.why_missing("cpu")))
REFERENCE = Kernels(reference.forward, reference.backward)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
OPTIONS = {
    "width": (1, 2, 3, 4, 6),
    "length": (0, 1, 2, 63, 64, 65, 130),
    "bias": (False, True),
    "silu": (False, True),
    "reverse": (False, True),
    "lengths": (False, True),
    "seq_idx": (None, "few", "recurring"),
    "initial_state": (False, True),
}
EVERYTHING = {"width": 4, "length": 130, "bias": True, "silu": True, "reverse": False}
EVERYTHING |= {"lengths": True, "seq_idx": "few", "initial_state": True}


def make(case, batch=3, dim=37, dtype=torch.float32):
    """Inputs (tensors to differentiate), options and the gradients of the outputs."""
    width, length = case["width"], case["length"]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "x": torch.randn(batch, dim, length).to(dtype),
        "weight": torch.randn(dim, width, dtype=compute),
        "bias": torch.randn(dim, dtype=compute) if case["bias"] else None,
        "initial_state": torch.randn(batch, dim, width - 1).to(dtype) if case["initial_state"] else None,
    }
    ids = {
        None: None,
        "few": (torch.rand(batch, length) < 0.1).cumsum(1).int(),
        "recurring": torch.randint(0, 2, (batch, length)).int(),
    }
    options = {
        "silu": case["silu"],
        "reverse": case["reverse"],
        "lengths": torch.randint(0, length + 1, (batch,)).int() if case["lengths"] else None,
        "seq_idx": ids[case["seq_idx"]],
    }
    grads = {
        "grad_out": torch.randn(batch, dim, length).to(dtype),
        "grad_final_state": torch.randn(batch, dim, width - 1).to(dtype),
    }
    return inputs, options, grads


def run(kernels, inputs, options, grads) -> dict[str, Tensor]:
    """Outputs and gradients; everything starts as NaN."""
    x, width = inputs["x"], inputs["weight"].shape[1]
    out = torch.full_like(x, torch.nan)
    final_state = torch.full((*x.shape[:2], width - 1), torch.nan, dtype=x.dtype)
    kernels.forward(**inputs, **options, out=out, final_state=final_state)
    gradients = {f"d{name}": None if t is None else torch.full_like(t, torch.nan) for name, t in inputs.items()}
    kernels.backward(**inputs, **options, **grads, **gradients)
    return {"out": out, "final_state": final_state, **{k: v for k, v in gradients.items() if v is not None}}


def double(tensors):
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def check(inputs, options, grads):
    want = run(REFERENCE, double(inputs), options, double(grads))
    if options["lengths"] is not None:  # what padding holds must not matter
        padding = torch.arange(inputs["x"].shape[2]) >= options["lengths"].unsqueeze(1)
        inputs["x"] = inputs["x"].masked_fill(padding.unsqueeze(1), torch.nan)
    got = run(KERNELS["cpu"], inputs, options, grads)
    for name in got:
        assert_close(got[name], want[name], "conv_grad" if name.startswith("d") else "conv", name)


@DTYPES
@pytest.mark.parametrize("case", list(pairwise(OPTIONS)), ids=str)
def test_options(case, dtype):
    check(*make(case, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_layouts(layout, reverse, dtype):
    inputs, options, grads = make(EVERYTHING | {"reverse": reverse, "lengths": False}, dim=64, dtype=dtype)
    for tensors in (inputs, grads):
        for name, t in tensors.items():
            if t.dim() > 1:
                last = layout == "channels_last"
                tensors[name] = t.mT.contiguous().mT if last else t.repeat_interleave(2, -1)[..., ::2]
    check(inputs, options, grads)


@pytest.mark.parametrize("absent", ["grad_out", "grad_final_state"])
def test_absent_output_gradients(absent):
    inputs, options, grads = make(EVERYTHING)
    check(inputs, options, grads | {absent: None})


def test_pieces_make_the_whole():
    inputs, options, grads = make(EVERYTHING | {"lengths": False, "seq_idx": None})
    whole = run(KERNELS["cpu"], inputs, options, grads)
    first = run(KERNELS["cpu"], inputs | {"x": inputs["x"][..., :50]}, options, grads | {"grad_out": None})
    rest = inputs | {"x": inputs["x"][..., 50:], "initial_state": first["final_state"]}
    second = run(KERNELS["cpu"], rest, options, grads | {"grad_out": None})
    assert torch.equal(torch.cat([first["out"], second["out"]], -1), whole["out"])
    assert torch.equal(second["final_state"], whole["final_state"])


def test_results_do_not_depend_on_threads():
    case = make(EVERYTHING, dim=200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(KERNELS["cpu"], *case)
        torch.set_num_threads(3)
        together = run(KERNELS["cpu"], *case)
    finally:
        torch.set_num_threads(threads)
    for name in alone:
        assert torch.equal(alone[name], together[name]), name
