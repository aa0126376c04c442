"""Lengths, indices and counts in int64 that do not fit into the int32 which the kernels read."""

from __future__ import annotations

import pytest
import torch

from parrot_kernels import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
    sinkhorn_hadamard,
)

WRAPPED = 2**32 + 1  # converted plainly it would be 1


def steps(length=4):
    return torch.ones(1, 2, length)


CALLS = {
    "sinkhorn_hadamard: `x_lengths` must be between 0 and 4": lambda n: sinkhorn_hadamard(
        torch.rand(1, 4, 2), torch.rand(1, 4, 2), x_lengths=n
    ),
    "selective_scan: `lengths` must be between 0 and 4": lambda n: selective_scan(
        steps(), steps(), -torch.ones(2, 3), torch.ones(1, 3, 4), torch.ones(1, 3, 4), lengths=n
    ),
    "selective_scan: `seq_idx` must be within int32": lambda n: selective_scan(
        steps(), steps(), -torch.ones(2, 3), torch.ones(1, 3, 4), torch.ones(1, 3, 4), seq_idx=n.expand(1, 4)
    ),
    "causal_conv1d: `lengths` must be between 0 and 4": lambda n: causal_conv1d(steps(), torch.ones(2, 2), lengths=n),
    "causal_conv1d: `seq_idx` must be within int32": lambda n: causal_conv1d(
        steps(), torch.ones(2, 2), seq_idx=n.expand(1, 4)
    ),
    "selective_state_update: `state_indices` must be below the 3 entries": lambda n: selective_state_update(
        torch.zeros(3, 2, 4), *torch.ones(2, 1, 2), -torch.ones(2, 4), *torch.ones(2, 1, 4), state_indices=n
    ),
    "causal_conv1d_update: `state_indices` must be below the 3 entries": lambda n: causal_conv1d_update(
        torch.ones(1, 2), torch.zeros(3, 2, 3), torch.ones(2, 4), state_indices=n
    ),
}


@pytest.mark.parametrize("wanted", CALLS)
def test_what_does_not_fit_is_refused(wanted):
    with pytest.raises(ValueError, match=wanted):
        CALLS[wanted](torch.tensor([WRAPPED]))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_ring_after_more_steps_than_int32_counts(gradients):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 2, generator=generator), torch.randn(3, 4, generator=generator)
    ring = torch.randn(2, 3, 5, generator=generator)
    seen = torch.tensor([2**40 + 3, 2**31 + 1])
    weight.requires_grad_(gradients)
    states = ring.clone(), ring.clone()
    outs = [
        causal_conv1d_update(x, state, weight, cache_seqlens=count)
        for state, count in zip(states, (seen, (seen % 5).int()), strict=True)
    ]
    assert torch.equal(*outs)
    assert torch.equal(*states)
    assert not torch.equal(states[0], ring)


UPDATES = {
    "scan": lambda x, n: selective_state_update(
        torch.zeros(3, 2, 4), x, x, -torch.ones(2, 4), *torch.ones(2, 1, 4), state_indices=n
    ),
    "convolution": lambda x, n: causal_conv1d_update(x, torch.zeros(3, 2, 3), torch.ones(2, 4), state_indices=n),
}


@pytest.mark.parametrize("update", UPDATES)
def test_an_index_past_the_end_is_refused_where_gradients_are_wanted(update):
    with pytest.raises(ValueError, match="`state_indices` must be below the 3 entries of the state; got 3"):
        UPDATES[update](torch.ones(1, 2, requires_grad=True), torch.tensor([3]))
