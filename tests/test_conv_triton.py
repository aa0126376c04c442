"""The Triton kernels of causal_conv1d, run by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from interpreted import interpreted
from scan_cases import leaves, outputs_and_gradients, pairwise
from test_conv_cpu import EVERYTHING, REFERENCE, double, make, run
from tolerances import assert_close
from torch import Tensor

OPTIONS = {
    "width": (1, 2, 3, 4, 6),
    "length": (0, 1, 2, 15, 63, 257),
    "bias": (False, True),
    "silu": (False, True),
    "reverse": (False, True),
    "lengths": (False, True),
    "seq_idx": (None, "few", "recurring"),
    "initial_state": (False, True),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
}


@interpreted
def test_the_op_takes_it():
    from parrot_kernels import causal_conv1d

    inputs = {"x": torch.randn(2, 3, 20), "weight": torch.randn(3, 4), "bias": torch.randn(3)}
    results = {
        backend: outputs_and_gradients(
            lambda backend=backend, **i: causal_conv1d(
                **i, activation="silu", return_final_state=True, backend=backend
            ),
            leaves(inputs),
            (torch.ones(2, 3, 20), torch.ones(2, 3, 3)),
        )
        for backend in ("triton", "torch")
    }
    for name, want in results["torch"].items():
        assert_close(results["triton"][name], want, "conv_grad" if name.startswith("d") else "conv", name)


def launch(inputs, options, grads) -> dict[str, Tensor]:
    from parrot_kernels.triton_kernels import causal_conv1d

    return run(causal_conv1d, inputs, options, grads)


def check(inputs, options, grads) -> dict[str, Tensor]:
    want = run(REFERENCE, double(inputs), options, double(grads))
    if options["lengths"] is not None:  # what padding holds must not matter
        padding = torch.arange(inputs["x"].shape[2]) >= options["lengths"].unsqueeze(1)
        inputs["x"] = inputs["x"].masked_fill(padding.unsqueeze(1), torch.nan)
        grads["grad_out"] = grads["grad_out"].masked_fill(padding.unsqueeze(1), torch.nan)
    got = launch(inputs, options, grads)
    for name in got:
        assert_close(got[name], want[name], "conv_grad" if name.startswith("d") else "conv", name)
    return got


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", list(pairwise(OPTIONS)), ids=str)
@interpreted
def test_options(case):
    check(*make(case, batch=2, dim=10, dtype=case["dtype"]))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@interpreted
def test_layouts(layout, reverse):
    inputs, options, grads = make(EVERYTHING | {"reverse": reverse, "length": 40}, dim=9)
    for tensors in (inputs, grads):
        for name, t in tensors.items():
            if t.dim() > 1:
                last = layout == "channels_last"
                tensors[name] = t.mT.contiguous().mT if last else t.repeat_interleave(2, -1)[..., ::2]
    check(inputs, options, grads)


@pytest.mark.parametrize("absent", ["grad_out", "grad_final_state"])
@interpreted
def test_absent_output_gradients(absent):
    inputs, options, grads = make(EVERYTHING | {"length": 40}, dim=9)
    want = run(REFERENCE, double(inputs), options, double(grads) | {absent: None})
    got = launch(inputs, options, grads | {absent: None})
    for name in got:
        assert_close(got[name], want[name], "conv_grad" if name.startswith("d") else "conv", name)


@interpreted
def test_empty_and_short_sequences():
    inputs, options, grads = make(EVERYTHING | {"length": 20}, batch=4, dim=3)
    options["lengths"] = torch.tensor([0, 1, 2, 20], dtype=torch.int32)
    check(inputs, options, grads)


@interpreted
def test_nothing_at_all():
    for batch, dim in ((0, 3), (2, 0)):
        inputs, options, grads = make(EVERYTHING | {"length": 5}, batch=batch, dim=dim)
        got = launch(inputs, options, grads)
        assert torch.all(got["dweight"] == 0)
        assert torch.all(got["dbias"] == 0)


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
@interpreted
def test_results_do_not_depend_on_batch_or_padding(reverse):
    inputs, options, grads = make(EVERYTHING | {"length": 300, "reverse": reverse, "lengths": False}, batch=2, dim=3)
    options["lengths"] = torch.tensor([300, 60], dtype=torch.int32)
    together = launch(inputs, options, grads)
    again = launch(inputs, options, grads)
    assert all(torch.equal(value, again[name]) for name, value in together.items())
    for b, length in enumerate(options["lengths"].tolist()):
        one = {name: t[b : b + 1] if t.dim() == 3 else t for name, t in inputs.items()}
        one["x"] = one["x"][..., :length]
        grad = {name: t[b : b + 1] for name, t in grads.items()}
        grad["grad_out"] = grad["grad_out"][..., :length]
        ids = options["seq_idx"][b : b + 1, :length]
        alone = launch(one, options | {"lengths": None, "seq_idx": ids}, grad)
        for name in ("out", "dx"):
            assert torch.equal(alone[name][0], together[name][b, :, :length]), name
        for name in ("final_state", "dinitial_state"):
            assert torch.equal(alone[name][0], together[name][b]), name
        padded = {name: t[b : b + 1] if t.dim() == 3 else t for name, t in inputs.items()}
        grad["grad_out"] = grads["grad_out"][b : b + 1]
        rest = {"lengths": options["lengths"][b : b + 1], "seq_idx": options["seq_idx"][b : b + 1]}
        padded = launch(padded, options | rest, grad)
        for name in ("dweight", "dbias"):
            assert torch.equal(alone[name], padded[name]), name
