"""The entropic regularisation of a model: a constant, a schedule over epochs, or a parameter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Epsilon(nn.Module):
    """The eps of a transport problem, in units of its largest cost.

    - constant: ``eps``. No parameter, no buffer.
    - annealed: from ``start`` to ``eps`` in equal ratios over the first ``epochs`` epochs, then ``eps``::

          eps_e = start^(1 - t) eps^t,   t = min(1, (e - 1) / epochs),   e = 1, 2, ...

      The current value is a buffer: weights restored from the best epoch bring its eps with them.
    - learned: exp(w) with a parameter w that starts at log eps, so steps are relative and eps stays positive.

    Raises:
        ValueError: a value that is not positive, or both annealed and learned.
    """

    def __init__(self, eps: float, *, start: float | None = None, epochs: int = 10, learned: bool = False) -> None:
        super().__init__()
        for name, value in (("eps", eps), ("start", start), ("epochs", epochs)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Epsilon: `{name}` must be positive; got {value!r}.")
        if learned and start is not None:
            raise ValueError(f"Epsilon: `learned` goes without a schedule; got `start` {start!r} too. Choose one.")
        self.eps, self.start, self.epochs = eps, start, epochs
        self.log = nn.Parameter(torch.tensor(math.log(eps))) if learned else None
        self.register_buffer("current", None if start is None else torch.tensor(float(start)))

    def forward(self) -> float | Tensor:
        """The number, or a tensor () that carries the gradient or the schedule."""
        if self.log is not None:
            return self.log.exp()
        return self.eps if self.current is None else self.current

    def extra_repr(self) -> str:
        return "" if self.start is None else f"{self.eps}, start={self.start}, epochs={self.epochs}"

    def set_epoch(self, epoch: int) -> None:
        """Tell the schedule which epoch, from 1, begins.

        Raises:
            ValueError: an epoch before the first.
        """
        if epoch < 1:
            raise ValueError(f"Epsilon.set_epoch: `epoch` counts from 1; got {epoch}.")
        if self.current is not None:
            done = min(1.0, (epoch - 1) / self.epochs)
            self.current.fill_(self.start ** (1 - done) * self.eps**done)
