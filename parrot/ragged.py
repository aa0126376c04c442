"""Sequences of different lengths, end to end in one array in memory: frames of clips, or their waveforms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Ragged:
    """n sequences; row i is ``values[starts[i] : starts[i] + lengths[i]]``.

    In memory what :class:`parrot.store.StoredSequences` is on disk.

    Attributes:
        values: (total, ...) of any dtype.
        starts, lengths: (n,) int64.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def join(cls, sequences: Iterable[np.ndarray]) -> Self:
        """Of arrays (length_i, ...) that agree in all but the length; at least one."""
        sequences = list(sequences)
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        return cls(np.concatenate(sequences), lengths.cumsum() - lengths, lengths)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of ``values``."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """That of ``values``."""
        return self.values.dtype

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The sequences of a slice or of an index array, as views."""
        pairs = zip(self.starts[rows], self.lengths[rows], strict=True)
        return [self.values[start : start + length] for start, length in pairs]

    def select(self, rows: Any) -> Self:
        """The sequences of a slice, of integers or of a mask; the values are shared."""
        return type(self)(self.values, self.starts[rows], self.lengths[rows])


def padded(sequences: Sequence[np.ndarray], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Sequences (length_i, ...) as one float32 tensor (n, longest, ...), zero past their ends, and their lengths (n,).

    At least one sequence.
    """
    lengths = [len(sequence) for sequence in sequences]
    batch = np.zeros((len(sequences), max(lengths), *sequences[0].shape[1:]), dtype=np.float32)
    for row, sequence in zip(batch, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(batch).to(device), torch.tensor(lengths, device=device)
