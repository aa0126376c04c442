"""The Triton kernels of the one-token updates, run by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import test_causal_conv1d_update as conv_cases
import test_selective_state_update as state_cases
import torch
from interpreted import interpreted
from scan_cases import pairwise
from tolerances import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATE_CASES = list(pairwise(state_cases.OPTIONS | {"dtype": DTYPES}))
CONV_CASES = [c for c in pairwise(conv_cases.OPTIONS | {"dtype": DTYPES}) if c["width"] - 1 + c["extra"] > 0]


def name(case):
    return "-".join(map(str, case.values()))


def check_state(state, inputs, indices):
    from parrot_kernels import selective_state_update

    want, want_state = state_cases.expected(state, inputs, indices)
    before = {n: t.clone() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
    untouched = state.clone()
    out = selective_state_update(state, **inputs, state_indices=indices, backend="triton")
    assert_close(out, want, "scan", "out")
    narrow = state.float() if state.dtype == torch.float64 else state  # no better than computed
    assert_close(narrow, want_state, "scan", "state")
    assert all(torch.equal(inputs[n], t) for n, t in before.items())
    if indices is not None:
        rest = torch.ones(len(state), dtype=torch.bool).index_fill(0, indices[indices >= 0], False)
        assert torch.equal(state[rest], untouched[rest])
        assert (out[indices < 0] == 0).all()
    return out


def check_conv(inputs):
    from parrot_kernels import causal_conv1d_update

    want, want_state = conv_cases.expected(inputs)
    before = {n: t.clone() for n, t in inputs.items() if isinstance(t, torch.Tensor) and n != "state"}
    out = causal_conv1d_update(**inputs, backend="triton")
    assert_close(out, want, "conv", "out")
    assert torch.equal(inputs["state"], want_state)
    assert all(torch.equal(inputs[n], t) for n, t in before.items())
    return out


@pytest.mark.sampled(30)
@pytest.mark.parametrize("case", STATE_CASES, ids=name)
@interpreted
def test_state_update(case):
    check_state(*state_cases.make_step(case, dim=21, states=11))


@pytest.mark.slow
@pytest.mark.parametrize("states", [1, 8, 24, 33, 130])
@pytest.mark.parametrize("dim", [0, 1, 4, 35])
@interpreted
def test_sizes_and_batches_of_a_state(states, dim):
    state, inputs, _ = state_cases.make_step(state_cases.ALL | {"C": "one"}, dim=dim, states=states)
    one = {n: t[:1] if n in ("x", "dt", "z", "B", "C") else t for n, t in inputs.items()}
    alone = state[:1].clone()
    out = check_state(state, inputs, None)
    assert torch.equal(check_state(alone, one, None), out[:1])
    assert torch.equal(alone, state[:1])


@interpreted
def test_steps_make_a_scan():
    from parrot_kernels import selective_scan, selective_state_update

    u, delta, z = torch.randn(3, 2, 6, 9).unbind()
    B, C, A = torch.randn(2, 5, 9), torch.randn(2, 5, 9), -torch.rand(6, 5)
    want, last = selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, return_final_state=True, backend="torch")
    state = torch.zeros(2, 6, 5)
    for t in range(9):
        step = (u[..., t], delta[..., t], A, B[..., t], C[..., t])
        out = selective_state_update(state, *step, z=z[..., t], dt_softplus=True, backend="triton")
        assert_close(out, want[..., t], "scan", "out")
    assert_close(state, last, "scan", "state")


@pytest.mark.parametrize("case", CONV_CASES, ids=name)
@interpreted
def test_conv_update(case):
    check_conv(conv_cases.make_steps(case, dim=70))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(("kept", "steps"), [(3, 1), (40, 1), (40, 7), (40, 50), (4, 33)])
@interpreted
def test_histories_and_steps_of_several_tiles(kept, steps, ring):
    case = conv_cases.ALL | {"extra": kept - 3, "steps": steps, "ring": ring}
    check_conv(conv_cases.make_steps(case, dim=19))


@pytest.mark.parametrize("dim", [0, 1, 300])
@interpreted
def test_sizes_and_batches_of_a_convolution(dim):
    inputs = conv_cases.make_steps(conv_cases.ALL, dim=dim)
    one = inputs | {"x": inputs["x"][:1], "state": inputs["state"][:1].clone()}
    out = check_conv(inputs)
    assert torch.equal(check_conv(one), out[:1])
    assert torch.equal(one["state"], inputs["state"][:1])


@interpreted
def test_the_block_takes_single_steps():
    from parrot_kernels import Mamba

    block = Mamba(8, d_state=4, backend="triton").requires_grad_(False)
    hidden = torch.randn(2, 3, 8)
    states = block.allocate_inference_cache(2)
    outs = [block.step(hidden[:, t : t + 1], *states)[0] for t in range(3)]
    assert_close(torch.cat(outs, 1), block(hidden), "scan", "out")
