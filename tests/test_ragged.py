"""Sequences end to end in one array."""

from __future__ import annotations

import numpy as np
import torch

from parrot.ragged import Ragged, padded


def test_rows_and_selections():
    sequences = [np.arange(2 * n, dtype=np.float32).reshape(n, 2) + 10 * n for n in (3, 1, 4, 2)]
    ragged = Ragged.join(sequences)
    assert len(ragged) == 4
    assert ragged.shape == (10, 2)
    for got, want in zip(ragged[:], sequences, strict=True):
        assert np.array_equal(got, want)
    chosen = ragged.select(np.array([2, 0]))
    assert chosen.values is ragged.values
    assert chosen.lengths.tolist() == [4, 3]
    assert np.array_equal(chosen[1:][0], sequences[0])
    assert np.array_equal(ragged[np.array([3])][0], sequences[3])
    assert ragged.select(slice(0))[:] == []


def test_padding():
    batch, lengths = padded([np.full((2, 3), 7.0), np.ones((4, 3))])
    assert batch.dtype == torch.float32
    assert lengths.tolist() == [2, 4]
    assert torch.equal(batch[0], torch.tensor([[7.0] * 3] * 2 + [[0.0] * 3] * 2))
    assert torch.equal(batch[1], torch.ones(4, 3))
    assert padded([np.arange(3.0)])[0].shape == (1, 3)
