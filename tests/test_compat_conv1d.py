"""The stand-ins for causal-conv1d: values, gradients, in-place states. Signatures are in test_compat.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scan_cases import pairwise
from tolerances import assert_close

from parrot_kernels.compat import causal_conv1d as conv


def gradients(out, leaves, grad):
    return torch.autograd.grad(out, [t for t in leaves if t is not None], grad)


def channels_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


CONVOLUTIONS = {
    "seqlen": (1, 2, 8, 151),
    "width": (2, 3, 4),
    "bias": (False, True),
    "activation": (None, "silu"),
    "initial": (False, True),
    "final": (False, True),
    "last": (False, True),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
}


@pytest.mark.parametrize("case", list(pairwise(CONVOLUTIONS)), ids=str)
def test_convolution(case):
    dtype, width = case["dtype"], case["width"]
    x = torch.randn(2, 20, case["seqlen"], dtype=dtype)[:, 4:14]
    x = (channels_last(x) if case["last"] else x).requires_grad_()
    weight = torch.randn(10, width, requires_grad=True)
    bias = torch.randn(10, requires_grad=True) if case["bias"] else None
    initial = torch.randn(2, 10, width - 1, dtype=dtype, requires_grad=True) if case["initial"] else None
    leaves, results = [x, weight, bias, initial], []
    for function in (conv.causal_conv1d_fn, conv.causal_conv1d_ref):
        out = function(
            x,
            weight,
            bias,
            initial_states=initial,
            return_final_states=case["final"],
            activation=case["activation"],
        )
        if case["final"]:
            out, final = out
            assert final.shape == (2, 10, width - 1)
            out = out + torch.sigmoid(final).sum(-1, keepdim=True)
        assert out.dtype == dtype
        results.append([out, *gradients(out, leaves, torch.ones_like(out))])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        # The original's own formula computes in half precision what we keep in fp32: two roundings of the output.
        assert_close(got.to(dtype), want.to(dtype), "conv_grad", str(i), scale=4)


def test_final_states_out_is_written_and_returned():
    x, weight, room = torch.randn(2, 5, 9), torch.randn(5, 4), torch.full((2, 5, 3), float("nan"))
    _, final = conv.causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=room)
    assert final is room
    assert torch.equal(room, x[..., -3:])
    with pytest.raises(ValueError, match=r"`final_states_out` must be of shape \(2, 5, 3\); got \(2, 3, 5\)"):
        conv.causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=room.mT)


def test_packed_sequences_and_padding():
    x = torch.randn(2, 6, 20, requires_grad=True)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    pieces = [[7, 5, 4], [1, 12]]  # the rest is padding
    seq_idx = torch.full((2, 20), -1, dtype=torch.int32)
    want = torch.zeros_like(x)
    for b, sizes in enumerate(pieces):
        start = 0
        for i, size in enumerate(sizes):
            part = slice(start, start + size)
            seq_idx[b, part] = i
            want[b, :, part] = conv.causal_conv1d_ref(x.detach()[b : b + 1, :, part], weight, bias, activation="silu")
            start += size
    out = conv.causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation="silu")
    assert_close(out, want, "conv")
    out.sum().backward()
    padding = (seq_idx < 0).unsqueeze(1).expand_as(x)
    assert (out[padding] == 0).all()
    assert (x.grad[padding] == 0).all()


UPDATES = {
    "seqlen": (None, 1, 4, 5),
    "width": (2, 3, 4),
    "extra": (0, 1, 9),
    "cache_seqlens": (False, True),
    "indices": (None, "all", "padded"),
    "bias": (False, True),
    "activation": (None, "silu"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
}


@pytest.mark.parametrize("case", list(pairwise(UPDATES)), ids=str)
def test_convolution_update(case):
    batch, dim, dtype, width = 6, 10, case["dtype"], case["width"]
    x = torch.randn(batch, dim, dtype=dtype)
    if case["seqlen"] is not None:
        x = channels_last(torch.randn(batch, dim, case["seqlen"], dtype=dtype))
    entries = batch if case["indices"] is None else 10 * batch
    state = channels_last(torch.randn(entries, dim, width - 1 + case["extra"], dtype=dtype))
    weight, bias = torch.randn(dim, width), torch.randn(dim) if case["bias"] else None
    seen = torch.randint(0, 100, (batch,), dtype=torch.int32) if case["cache_seqlens"] else None
    indices = None if case["indices"] is None else torch.randperm(entries)[:batch].int()
    valid = torch.ones(batch, dtype=torch.bool)
    if case["indices"] == "padded":
        valid[[0, 3]] = False
        indices[~valid] = -1
    rows = torch.arange(batch)[valid] if indices is None else indices[valid].long()

    want_state, part = state.clone(), state[rows].clone()
    want = torch.zeros_like(x)
    want[valid] = conv.causal_conv1d_update_ref(
        x[valid], part, weight, bias, case["activation"], None if seen is None else seen[valid]
    )
    want_state[rows] = part
    got = conv.causal_conv1d_update(x, state, weight, bias, case["activation"], seen, indices)
    assert_close(got, want, "conv", scale=4)
    assert torch.equal(state, want_state)


def test_convolution_update_needs_room():
    with pytest.raises(ValueError, match="`state` must be of at least 3 inputs a channel; got 2"):
        conv.causal_conv1d_update(torch.zeros(1, 2), torch.zeros(1, 2, 2), torch.zeros(2, 4))


def test_varlen_states():
    lengths = torch.randint(1, 32, (20,))
    x, cu_seqlens = torch.randn(int(lengths.sum()), 7), F.pad(lengths.cumsum(0), (1, 0))
    got = conv.causal_conv1d_varlen_states(x, cu_seqlens, 20)
    assert got.shape == (20, 7, 20)
    assert torch.equal(got, conv.causal_conv1d_varlen_states_ref(x, cu_seqlens, 20))
    start, end = cu_seqlens[4:6].tolist()
    assert torch.equal(got[4, :, -1], x[end - 1])
    assert (got[4, :, : max(0, 20 - (end - start))] == 0).all()
