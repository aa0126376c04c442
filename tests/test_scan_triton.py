"""The Triton kernels of selective_scan, run by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from interpreted import interpreted
from selective_scan_cases import CASES, EVERYTHING, OPTIONS, make
from test_scan_cpu import REFERENCE, run
from tolerances import assert_close
from torch import Tensor

LENGTHS, STATES, DTYPES = (1, 2, 15, 37), (3, 8, 16, 24), (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [dict(zip(("length", "states", "dtype"), shape, strict=True)) for shape in product(LENGTHS, STATES, DTYPES)]
SHAPES = [shape for shape in SHAPES if shape["length"] >= 15 or shape["states"] == 8]


def case_of(shape) -> dict[str, object]:
    return CASES[SHAPES.index(shape) % len(CASES)]


def launch(inputs, options, **how) -> dict[str, Tensor]:
    from parrot_kernels.ops.selective_scan import KERNELS

    return run(KERNELS["triton"], inputs, options, **how)


def check(inputs, options, scale=1.0, **how) -> dict[str, Tensor]:
    double = {name: None if t is None else t.double() for name, t in inputs.items()}
    want = run(REFERENCE, double, options, dtype=inputs["u"].dtype, **how)
    if options["lengths"] is not None:  # what padding holds must not matter
        padding = torch.arange(inputs["u"].shape[2]) >= options["lengths"].unsqueeze(1)
        for name in ("u", "delta", "z", "B", "C"):
            t = inputs[name]
            if t is not None and t.dim() > 2:
                inputs[name] = t.masked_fill(padding.view(padding.shape[0], *(1,) * (t.dim() - 2), -1), torch.nan)
    got = launch(inputs, options, **how)
    for name in got:
        assert_close(got[name], want[name], "scan_grad" if name.startswith("d") else "scan", name, scale)
    return got


@pytest.mark.sampled(20)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@interpreted
def test_options(shape):
    check(*make(case_of(shape), batch=2, dim=6, **shape))


def test_every_pair_of_options_is_met():
    """By what `test_options` compares, at lengths at which each option matters."""
    (shapes,) = (mark.args[1] for mark in test_options.pytestmark if mark.name == "parametrize")
    cases = [case_of(shape) for shape in shapes if shape["length"] >= 15]
    for a, b in combinations(OPTIONS, 2):
        assert {(case[a], case[b]) for case in cases} == set(product(OPTIONS[a], OPTIONS[b])), (a, b)


@pytest.mark.parametrize("length", [n for n in LENGTHS if n >= 15])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_changes_the_reference(option, length):
    """So that a kernel which overlooks it can't pass."""
    results = []
    for value in OPTIONS[option]:
        inputs, options = make(EVERYTHING | {option: value}, batch=2, dim=6, length=length)
        same, _ = make(EVERYTHING, batch=2, dim=6, length=length)  # random numbers are drawn in order: reuse them
        inputs = {name: None if t is None else same[name] if same[name].shape == t.shape else t
                  for name, t in inputs.items()}  # fmt: skip
        results.append(run(REFERENCE, inputs, options)["out"])
    assert all(not torch.allclose(x, y) for x, y in combinations(results, 2))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("states", [1, 4, 12, 32, 40, 64])
@interpreted
def test_state_sizes(states):
    check(*make(EVERYTHING, batch=1, dim=6, length=10, states=states, dtype=torch.float32))


@interpreted
def test_states_are_split_without_waste():
    from parrot_kernels.triton_kernels.selective_scan import split

    held = {states: sum(split(states)[:2]) for states in (1, 4, 8, 12, 16, 24, 32, 40, 48, 64, 70, 256)}
    assert held == {1: 4, 4: 4, 8: 8, 12: 12, 16: 16, 24: 24, 32: 32, 40: 40, 48: 48, 64: 64, 70: 72, 256: 256}
    assert all(lanes <= 32 and min(first, rest or first) >= 4 for first, rest, lanes in map(split, range(1, 300)))


@pytest.mark.parametrize("length", [0, pytest.param(129, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reverse", [False, True])
@interpreted
def test_lengths(length, reverse):
    check(*make({**EVERYTHING, "reverse": reverse}, batch=1, length=length, dtype=torch.float32))


@pytest.mark.parametrize("length", [12, pytest.param(40, marks=pytest.mark.slow)])
@interpreted
def test_empty_and_short_sequences(length):
    inputs, options = make(EVERYTHING, batch=4, length=length, dtype=torch.float32)
    options["lengths"] = torch.tensor([0, length, 1, 8])
    check(inputs, options)


@interpreted
def test_many_channels():
    inputs, options = make({**EVERYTHING, "B": "step"}, batch=1, dim=99, length=4, dtype=torch.float32)
    check(inputs, options)
    check(*make({**EVERYTHING, "C": "constant"}, batch=1, dim=99, length=4, dtype=torch.float32))


@interpreted
def test_nothing_at_all():
    case = {**EVERYTHING, "B": "step", "lengths": False, "seq_idx": False}
    for batch, dim in ((0, 6), (1, 0)):
        inputs, options = make(case, batch=1, dim=dim, length=5, dtype=torch.float32)
        inputs = {name: t[:batch] if t.dim() == 3 else t for name, t in inputs.items()}
        got = launch(inputs, options)
        assert all(torch.all(gradient == 0) for name, gradient in got.items() if name.startswith("d"))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "states_last"])
@interpreted
def test_layouts(layout):
    inputs, options = make({**EVERYTHING, "lengths": False}, batch=2, dim=9, length=20, dtype=torch.float32)
    for name in ("B", "C") if layout == "states_last" else ("u", "delta", "z", "A", "B", "C", "initial_state"):
        t = inputs[name]
        inputs[name] = t.repeat_interleave(2, -1)[..., ::2] if layout == "sliced" else t.mT.contiguous().mT
    check(inputs, options)


@pytest.mark.parametrize("length", [12, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1e-6, 1e4])
@interpreted
def test_extreme_steps(scale, length):
    inputs, options = make(EVERYTHING, batch=2, length=length, dtype=torch.float32)
    options["delta_softplus"], inputs["delta_bias"] = False, None
    inputs["delta"] = inputs["delta"] * scale
    inputs["u"], inputs["B"] = inputs["u"] / scale**0.5, inputs["B"] / scale**0.5
    check(inputs, options)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False)])
@interpreted
def test_absent_output_gradients(grads):
    check(*make(EVERYTHING, batch=2, length=20, dtype=torch.float32), grads=grads)


@interpreted
def test_softplus_keeps_small_steps():
    inputs, options = make({**EVERYTHING, "lengths": False, "z": False}, batch=1, length=6, dtype=torch.float32)
    inputs["delta_bias"] = None
    inputs["delta"] = torch.linspace(-40, 40, inputs["delta"].numel()).view_as(inputs["delta"])
    inputs["initial_state"], inputs["D"], options["seq_idx"] = None, None, None
    inputs["delta"][:, ::2] = inputs["delta"][:, ::2].clamp(max=-12)
    exact = run(REFERENCE, {k: None if t is None else t.double() for k, t in inputs.items()}, options)
    got = launch(inputs, options)
    assert torch.allclose(got["final_state"][:, ::2].double(), exact["final_state"][:, ::2], rtol=1e-4, atol=1e-12)


@pytest.mark.slow
@interpreted
def test_backward_without_checkpoints():
    check(*make(EVERYTHING, batch=1, length=40, dtype=torch.float32), checkpoints=False)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reverse", [False, True])
@interpreted
def test_no_bit_depends_on_the_batch_or_the_padding(reverse):
    from parrot_kernels.ops.selective_scan import selective_scan

    n, per_step = 33, ("u", "delta", "z", "B", "C", "out", "seq_idx")
    inputs, options = make(
        {**EVERYTHING, "B": "step", "reverse": reverse}, batch=2, length=41, states=12, dtype=torch.float32
    )
    options["lengths"] = torch.tensor([41, n])

    def results(inputs, grad_out, grad_final_state, **options):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
        outputs = selective_scan(**leaves, **options, return_final_state=True, backend="triton")
        gradients = torch.autograd.grad(outputs, list(leaves.values()), (grad_out, grad_final_state))
        return dict(zip(("out", "final_state", *leaves), (*outputs, *gradients), strict=True))

    def second(name, t):
        return t[1:, ..., :n] if name in per_step else t[1:] if name in ("initial_state", "final_state") else t

    cotangents = torch.randn_like(inputs["u"]), torch.randn_like(inputs["initial_state"])
    together, again = (results(inputs, *cotangents, **options) for _ in range(2))
    assert all(torch.equal(t, again[name]) for name, t in together.items())
    alone = {name: second(name, t) for name, t in inputs.items()}
    options |= {"lengths": None, "seq_idx": options["seq_idx"][1:, :n]}
    got = results(alone, cotangents[0][1:, :, :n], cotangents[1][1:], **options)
    for name, t in together.items():
        if t.dim() > 2:  # what is not summed over the batch
            assert torch.equal(got[name], second(name, t)), name
            assert name not in per_step or not t[1, ..., n:].any(), name
