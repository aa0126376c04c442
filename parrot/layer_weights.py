"""A model that learns how to weigh the layers of its encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parrot.sharing import Shareable


class LayerWeighted(Shareable, nn.Module):
    """A head on sums of the encoders' hidden states whose weights are learned with it, the encoders frozen.

    Encoder k gives its L_k hidden states averaged over time, (B, L_k, d_k); the head takes
    sum_l softmax(w_k)_l state_l, as in SUPERB (Yang et al. 2021, arXiv 2105.01051). The sum and the mean over time may
    change places, so nothing of the size of the frames is kept. The weights w_k start at zero: L_k parameters each.

    Args:
        n_states: L_k of each encoder, its layers and their input.
        head: takes embeddings, such as :class:`parrot.Parrot`; saved and loaded only if it is one.

    Raises:
        ValueError: the head transports among stored rows, which would not follow the weights.
    """

    inputs = "layers"

    def __init__(self, n_states: Sequence[int], head: nn.Module) -> None:
        super().__init__()
        transport = getattr(getattr(head, "config", None), "transport", "batch")
        if transport != "batch":
            raise ValueError(f"LayerWeighted: `head` must have `transport` 'batch'; got {transport!r}.")
        self.layer_weights = nn.ParameterList(nn.Parameter(torch.zeros(states)) for states in n_states)
        self.head = head

    @property
    def batch_dependent(self) -> bool:
        """Whether the head's is, in evaluation."""
        return self.head.batch_dependent

    def arguments(self) -> dict[str, Any]:
        n_states = [len(weights) for weights in self.layer_weights]
        return {"n_states": n_states, "n_classes": self.head.n_classes, "head": self.head.arguments()}

    @classmethod
    def build(cls, arguments: dict[str, Any]) -> LayerWeighted:
        from parrot.model import Parrot

        return cls(arguments["n_states"], Parrot.build(arguments["head"]))

    @property
    def row_modules(self) -> tuple[nn.Module, ...]:
        """Those of the head."""
        return self.head.row_modules

    def embeddings(self, *states: Tensor) -> list[Tensor]:
        """The weighted sums (B, d_k) of one (B, L_k, d_k) tensor per encoder."""
        wanted = [len(weights) for weights in self.layer_weights]
        got = [tuple(state.shape) for state in states]
        if len(got) != len(wanted) or any(len(s) != 3 or s[1] != n for s, n in zip(got, wanted, strict=True)):
            raise ValueError(
                f"LayerWeighted: wanted tensors (B, L_k, d_k) of {' and '.join(map(str, wanted))} hidden states, one "
                f"per encoder; got {got}."
            )
        weighted = zip(states, self.layer_weights, strict=True)
        return [torch.einsum("bld,l->bd", state, weights.softmax(0)) for state, weights in weighted]

    def forward(self, *states: Tensor) -> Tensor:
        """Logits (B, n_classes) of one (B, L_k, d_k) tensor per encoder."""
        return self.head(*self.embeddings(*states))

    def plan(self, *states: Tensor) -> Tensor | None:
        """The head's transport plan."""
        return self.head.plan(*self.embeddings(*states))

    def set_epoch(self, epoch: int) -> None:
        """Tell the head which epoch, from 1, begins."""
        self.head.set_epoch(epoch)
