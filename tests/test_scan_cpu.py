"""The CPU kernels of selective_scan against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from selective_scan_cases import CASES, EVERYTHING, cotangents, make
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import native
from parrot_kernels.ops.selective_scan import CHUNK_SIZE, KERNELS, Kernels
from parrot_kernels.reference import selective_scan as reference

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason=str(native.why_missing("cpu")))
REFERENCE = Kernels(reference.forward, reference.backward, checkpoints=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)


def run(
    kernels, inputs, options, chunk_size=CHUNK_SIZE, checkpoints=True, grads=(True, True), dtype=None
) -> dict[str, Tensor]:
    """Outputs and gradients; everything starts as NaN."""
    u, A = inputs["u"], inputs["A"]
    (batch, dim, length), states = u.shape, A.shape[1]
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    options = {name: v.int() if isinstance(v, Tensor) else v for name, v in options.items()}
    grad_out, grad_final_state = cotangents(inputs)
    grad_out = grad_out.to(dtype or u.dtype).to(u.dtype) if grads[0] else None  # the reference gets it rounded too
    grad_final_state = grad_final_state.to(compute) if grads[1] else None
    out, final_state = torch.full_like(u, torch.nan), torch.full((batch, dim, states), torch.nan, dtype=compute)
    kept = torch.full((batch, -(-length // chunk_size), dim, states), torch.nan, dtype=compute) if checkpoints else None
    common = {**inputs, **options, "chunk_size": chunk_size, "checkpoints": kept}
    kernels.forward(**common, out=out, final_state=final_state)
    gradients = {f"d{name}": None if t is None else torch.full_like(t, torch.nan) for name, t in inputs.items()}
    kernels.backward(**common, grad_out=grad_out, grad_final_state=grad_final_state, **gradients)
    return {"out": out, "final_state": final_state, **{k: v for k, v in gradients.items() if v is not None}}


def check(inputs, options, **how) -> dict[str, Tensor]:
    want = run(
        REFERENCE,
        {name: None if t is None else t.double() for name, t in inputs.items()},
        options,
        dtype=inputs["u"].dtype,
        **how,
    )
    if options["lengths"] is not None:  # what padding holds must not matter
        padding = torch.arange(inputs["u"].shape[2]) >= options["lengths"].unsqueeze(1)
        for name in ("u", "delta", "z", "B", "C"):
            t = inputs[name]
            if t is not None and t.dim() > 2:
                inputs[name] = t.masked_fill(padding.view(padding.shape[0], *(1,) * (t.dim() - 2), -1), torch.nan)
    got = run(KERNELS["cpu"], inputs, options, **how)
    for name in got:
        assert_close(got[name], want[name], "scan_grad" if name.startswith("d") else "scan", name)
    return got


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(case, dtype):
    inputs, options = make(case, dim=63, length=45, states=9, dtype=dtype)
    check(inputs, options)


@DTYPES
@pytest.mark.parametrize("states", [1, 7, 8, 16, 24, 32, 64, 70])
def test_state_sizes(states, dtype):
    inputs, options = make(EVERYTHING, batch=2, dim=33, length=70, states=states, dtype=dtype)
    check(inputs, options)


@pytest.mark.parametrize("length", [0, 1, 2, 15, 31, 32, 33, 63, 64, 65, 129, 1134])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_lengths(length, reverse, checkpoints):
    inputs, options = make({**EVERYTHING, "reverse": reverse}, dim=18, length=length, states=8, dtype=torch.float32)
    check(inputs, options, checkpoints=checkpoints)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 200])
def test_chunk_sizes(chunk_size):
    inputs, options = make(EVERYTHING, dim=18, length=150, states=8, dtype=torch.float32)
    check(inputs, options, chunk_size=chunk_size)


@pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False)])
def test_absent_output_gradients(grads):
    inputs, options = make(EVERYTHING, dim=18, length=40, dtype=torch.float32)
    check(inputs, options, grads=grads)


def test_empty_sequences():
    inputs, options = make(EVERYTHING, batch=3, dim=18, length=40, dtype=torch.float32)
    options["lengths"] = torch.tensor([0, 40, 1])
    check(inputs, options)


@DTYPES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "states_last"])
def test_layouts(layout, reverse, dtype):
    case = {**EVERYTHING, "reverse": reverse, "lengths": False}
    inputs, options = make(case, dim=75, length=70, states=16, dtype=dtype)
    for name in ("B", "C") if layout == "states_last" else ("u", "delta", "z", "A", "B", "C", "initial_state"):
        t = inputs[name]
        inputs[name] = t.repeat_interleave(2, -1)[..., ::2] if layout == "sliced" else t.mT.contiguous().mT
    check(inputs, options)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_extreme_steps(scale):
    inputs, options = make(EVERYTHING, dim=18, length=100, states=16, dtype=torch.float32)
    options["delta_softplus"], inputs["delta_bias"] = False, None
    inputs["delta"] = inputs["delta"] * scale
    inputs["u"], inputs["B"] = inputs["u"] / scale**0.5, inputs["B"] / scale**0.5
    check(inputs, options)


def test_growing_states_overflow_to_infinity_and_not_to_garbage():
    inputs, options = make({**EVERYTHING, "seq_idx": False, "lengths": False}, length=8, dtype=torch.float32)
    inputs["A"] = inputs["A"].abs() + 1
    inputs["delta"] = torch.full_like(inputs["delta"], 60.0)
    got = run(KERNELS["cpu"], inputs, options)
    assert not torch.isfinite(got["final_state"]).any() or got["final_state"].abs().max() > 1e30


def test_sums_over_many_steps_keep_their_digits():
    """Gradients that sum over 65,536 steps, in float32 as in float64: a running sum would be off by 1e-5."""
    case = {**EVERYTHING, "B": "step", "C": "step", "reverse": False, "seq_idx": False, "lengths": False}
    inputs, options = make(case, batch=1, dim=3, length=65536, states=8, dtype=torch.float32)
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    got = run(KERNELS["cpu"], inputs, options)
    want = run(KERNELS["cpu"], wide, options, dtype=torch.float32)
    for name in ("dA", "dD", "ddelta_bias"):
        error = (got[name] - want[name]).abs().max() / want[name].abs().max()
        assert error < 5e-6, f"{name}: {error:.1e}"


def test_results_do_not_depend_on_threads_batch_or_padding():
    inputs, options = make(
        {**EVERYTHING, "seq_idx": False}, batch=3, dim=300, length=100, states=16, dtype=torch.float32
    )
    options["lengths"] = torch.tensor([100, 60, 33])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(KERNELS["cpu"], inputs, options)
        torch.set_num_threads(3)
        together = run(KERNELS["cpu"], inputs, options)
    finally:
        torch.set_num_threads(threads)
    for name in alone:
        assert torch.equal(alone[name], together[name]), name

    per_entry = {"u", "delta", "z", "B", "C", "initial_state"}
    single = {name: t[1:2] if name in per_entry and t.dim() > 2 else t for name, t in inputs.items()}
    single = {name: t[..., :60] if t.dim() > 2 and name != "initial_state" else t for name, t in single.items()}
    out = torch.empty_like(single["u"])
    final_state = torch.empty(1, 300, 16)
    rest = {
        "delta_softplus": options["delta_softplus"],
        "reverse": options["reverse"],
        "lengths": None,
        "seq_idx": None,
    }
    KERNELS["cpu"].forward(**single, **rest, chunk_size=CHUNK_SIZE, checkpoints=None, out=out, final_state=final_state)
    assert torch.equal(out, together["out"][1:2, :, :60])
    assert torch.equal(final_state, together["final_state"][1:2])
