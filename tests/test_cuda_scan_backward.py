"""The CUDA kernels of selective_scan, forward and backward, emulated on the host, against the fp64 reference."""

from __future__ import annotations

import contextlib

import cuda_emulated
import pytest
import torch
from selective_scan_cases import CASES, EVERYTHING, cotangents, make
from test_scan_cpu import REFERENCE, run
from tolerances import assert_close

from parrot_kernels import native
from parrot_kernels.ops.selective_scan import KERNELS

pytestmark = pytest.mark.skipif(not cuda_emulated.SOURCES.exists(), reason="needs the sources of the extension")
CUDA = KERNELS["cuda"]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    extension = cuda_emulated.module()
    monkeypatch.setattr(native, "extension", lambda: extension)
    monkeypatch.setattr(native, "call_cuda", lambda function, device, **a: cuda_emulated.call(function, **a))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("PARROT_EMULATED_MULTIPROCESSORS", "0")


def check(inputs, options, **how):
    double = {name: None if t is None else t.double() for name, t in inputs.items()}
    want = run(REFERENCE, double, options, dtype=inputs["u"].dtype, **how)
    if options["lengths"] is not None:  # what padding holds must not matter
        padding = torch.arange(inputs["u"].shape[2]) >= options["lengths"].unsqueeze(1)
        for name in ("u", "delta", "z", "B", "C"):
            t = inputs[name]
            if t is not None and t.dim() > 2:
                inputs[name] = t.masked_fill(padding.view(padding.shape[0], *(1,) * (t.dim() - 2), -1), torch.nan)
    got = run(CUDA, inputs, options, **how)
    for name in got:
        assert_close(got[name], want[name], "scan_grad" if name.startswith("d") else "scan", name)
    return got


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(case):
    check(*make(case, dim=9, length=45, states=9, dtype=torch.float32))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_options_of_any_dtype_and_size(case):
    check(*make(case, dim=6, length=35, states=35, dtype=torch.float64))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("states", [1, 8, 16, 24, 32, 37, 64, 70])
def test_state_sizes_and_dtypes(states, dtype):
    check(*make(EVERYTHING, batch=2, dim=105 if states < 20 else 21, length=45, states=states, dtype=dtype))


@pytest.mark.parametrize("states", [2, 16, 24, 32, 64])
def test_constant_matrices(states):
    case = EVERYTHING | {"B": "constant", "C": "constant"}
    check(*make(case, batch=2, dim=12, length=40, states=states, dtype=torch.float32))


@pytest.mark.parametrize("length", [0, 1, 2, 15, 32, 33, 63, 129, 1134])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(length, reverse):
    case = EVERYTHING | {"reverse": reverse}
    check(*make(case, batch=2, dim=3, length=length, states=16, dtype=torch.float32), checkpoints=reverse)


@pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_absent_output_gradients(dtype, grads):
    check(*make(EVERYTHING, dim=6, length=40, dtype=dtype), grads=grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_sequences(dtype):
    inputs, options = make(EVERYTHING, batch=3, dim=6, length=40, dtype=dtype)
    options["lengths"] = torch.tensor([0, 40, 1])
    check(inputs, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_batch(dtype):
    inputs, options = make(EVERYTHING | {"lengths": False}, batch=1, dim=6, length=4, dtype=dtype)
    per_entry = ("u", "delta", "z", "B", "C", "initial_state")
    inputs = {name: t[:0] if name in per_entry else t for name, t in inputs.items()}
    got = run(CUDA, inputs, options | {"seq_idx": options["seq_idx"][:0]})
    assert all(torch.equal(t, torch.zeros_like(t)) for t in got.values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "states_last", "mixed"])
def test_layouts(layout, reverse):
    case = EVERYTHING | {"reverse": reverse, "lengths": False}
    inputs, options = make(case, dim=66, length=70, states=16, dtype=torch.float32)
    names = {"states_last": ("B", "C"), "mixed": ("z",)}
    for name in names.get(layout, ("u", "delta", "z", "A", "B", "C", "initial_state")):
        t = inputs[name]
        inputs[name] = t.repeat_interleave(2, -1)[..., ::2] if layout == "sliced" else t.mT.contiguous().mT
    check(inputs, options)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("softplus", [False, True])
def test_extreme_steps(softplus, scale):
    inputs, options = make(EVERYTHING, dim=6, length=70, states=16, dtype=torch.float32)
    if softplus:
        inputs["delta"] = inputs["delta"] * scale if scale > 1 else inputs["delta"] - 14
    else:
        options["delta_softplus"], inputs["delta_bias"] = False, None
        inputs["delta"] = inputs["delta"] * scale
        inputs["u"], inputs["B"] = inputs["u"] / scale**0.5, inputs["B"] / scale**0.5
    check(inputs, options)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_batch_mates_and_parallel_chunks_change_no_bit(reverse, monkeypatch):
    inputs, options = make(
        EVERYTHING | {"reverse": reverse}, batch=3, dim=6, length=800, states=16, dtype=torch.float32
    )
    options["lengths"] = torch.tensor([800, 600, 33])
    whole = run(CUDA, inputs, options)
    monkeypatch.setenv("PARROT_EMULATED_MULTIPROCESSORS", "50")
    parallel = run(CUDA, inputs, options)
    for name in whole:
        assert torch.equal(whole[name], parallel[name]), name

    def second(t, time=-1):
        return t[1:2].narrow(time, 0, 600)

    per_step = ("u", "delta", "z", "B", "C")
    alone = {n: second(t) if n in per_step else t[1:2] if n == "initial_state" else t for n, t in inputs.items()}
    rest = options | {"lengths": None, "seq_idx": second(options["seq_idx"])}
    grad_out, grad_final_state = cotangents(inputs)
    monkeypatch.setattr("test_scan_cpu.cotangents", lambda _: (second(grad_out), grad_final_state[1:2]))
    got = run(CUDA, alone, rest)
    for name in ("out", "du", "ddelta", "dz", "dB", "dC"):
        assert torch.equal(got[name], second(whole[name])), name
    for name in ("final_state", "dinitial_state"):
        assert torch.equal(got[name], whole[name][1:2]), name
