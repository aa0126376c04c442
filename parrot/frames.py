"""PARROT with one transport problem per utterance, between the frame sequences of two encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from parrot.epsilon import Epsilon
from parrot.model_config import ParrotConfig
from parrot.sharing import Shareable
from parrot_kernels.modules import SinkhornHadamard

# Frames of either side with what is transported to them; the names are those of the transport's outputs.
SIDES = {
    "parrot": (("x_hadamard", "y_to_x", "x"), ("y_hadamard", "x_to_y", "y")),
    "ot": (("y_to_x", "x"), ("x_to_y", "y")),
}


class FrameParrot(Shareable, nn.Module):
    r"""Two encoders' frames, projected, transported onto each other within each utterance, and classified.

    For one utterance with frames X (T_1, d_1) and Y (T_2, d_2)::

        x_i = A X_i + a,   y_j = B Y_j + b                        (projection values each)
        P   = the entropic plan between the x_i and the y_j       (Euclidean cost over its maximum, uniform weights)
        y_to_x_i = T_1 sum_j P_ij y_j,   x_to_y_j = T_2 sum_i P_ij x_i
        h   = [mean_i ReLU(U [x_i * y_to_x_i, y_to_x_i, x_i]),  mean_j ReLU(V [y_j * x_to_y_j, x_to_y_j, y_j])]
        logits = linear(dropout(h))

    The ReLU comes before the mean because the mean alone would undo the transport: with the plan's marginals,
    mean_i y_to_x_i = mean_j y_j. With p = projection, h = hidden and n parts per side (3; for "ot" 2), it has
    p (d_1 + d_2 + 2) + 2 h (n p + 1) + C (2 h + 1) parameters.

    An utterance's logits do not depend on its batch or its padding, to the last bit on the CPU with a given number
    of threads: linear layers run utterance by utterance (how a matrix product rounds depends on its size), and the
    transport op has this property itself.

    Args:
        dims: frame widths of the two encoders.
        n_classes: number of classes.
        config: with ``transport="frames"`` and a fusion that transports.

    Raises:
        ValueError: not two encoders, or another configuration.
    """

    inputs = "frames"

    def __init__(self, dims: Sequence[int], n_classes: int, config: ParrotConfig | None = None) -> None:
        super().__init__()
        config = config or ParrotConfig(transport="frames", gradient="unrolled")
        if config.transport != "frames":
            raise ValueError(
                f"FrameParrot: `transport` must be 'frames' in the configuration; got {config.transport!r}. "
                "The others are Parrot's."
            )
        if len(dims) != 2:
            raise ValueError(f"FrameParrot: `dims` must be the frame widths of two encoders; got {list(dims)}.")
        self.config, self.dims, self.n_classes = config, tuple(dims), n_classes
        self.sides = SIDES[config.fusion]
        self.streams = nn.ModuleList(nn.Linear(dim, config.projection) for dim in dims)
        self.epsilon = Epsilon(config.eps, start=config.eps_start, epochs=config.eps_epochs, learned=config.learn_eps)
        self.transport = SinkhornHadamard(
            eps=config.eps, n_iters=config.n_iters, reach=config.reach, gradient=config.gradient,
            return_hadamard=config.fusion == "parrot",
        )  # fmt: skip
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(len(side) * config.projection, config.hidden), nn.ReLU()) for side in self.sides
        )
        self.classifier = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(2 * config.hidden, n_classes))

    @property
    def batch_dependent(self) -> bool:
        """Whether an utterance's logits depend on the others of its batch: never."""
        return False

    def arguments(self) -> dict[str, Any]:
        return {"dims": list(self.dims), "n_classes": self.n_classes, "config": asdict(self.config)}

    def forward(self, *features: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Logits (B, n_classes) of one tensor (B, T_k, d_k), or pair of it and the lengths (B,), per encoder.

        Raises:
            ValueError: another number of encoders or of utterances, other widths, or lengths not within 1 to T_k.
        """
        (x, x_lengths), (y, y_lengths) = self._project(features)
        if not x_lengths:
            return x.new_zeros(0, self.classifier[-1].out_features)
        out = self._transport(x, y, x_lengths, y_lengths)
        frames = {"x": x, "y": y, **out._asdict()}
        logits = []
        for k, counts in enumerate(zip(x_lengths, y_lengths, strict=True)):
            means = [
                hidden(torch.cat([frames[part][k, :n] for part in side], dim=-1)).mean(0)
                for hidden, side, n in zip(self.hidden, self.sides, counts, strict=True)
            ]
            logits.append(self.classifier(torch.cat(means)))
        return torch.stack(logits)

    def plan(self, *features: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """The plans (B, T_1, T_2), T_k the longest of the lengths, zero past an utterance's frames."""
        (x, x_lengths), (y, y_lengths) = self._project(features)
        return self._transport(x, y, x_lengths, y_lengths, return_plan=True).plan

    def set_epoch(self, epoch: int) -> None:
        """Tell a schedule of eps which epoch, from 1, begins."""
        self.epsilon.set_epoch(epoch)

    def _transport(self, x: Tensor, y: Tensor, x_lengths: list[int], y_lengths: list[int], **options):
        lengths = {"x_lengths": torch.tensor(x_lengths, device=x.device)}
        lengths["y_lengths"] = torch.tensor(y_lengths, device=x.device)
        return self.transport(x, y, **lengths, eps=self.epsilon(), **options)

    def _project(self, features: Sequence[Tensor | tuple[Tensor, Tensor]]) -> list[tuple[Tensor, list[int]]]:
        """Per encoder the projected frames (B, T, projection), zero past the ends, and the lengths."""
        if len(features) != 2:
            raise ValueError(f"FrameParrot: wanted the frames of 2 encoders; got {len(features)}.")
        streams = []
        for k, (given, dim, stream) in enumerate(zip(features, self.dims, self.streams, strict=True)):
            frames, lengths = given if isinstance(given, tuple) else (given, None)
            if frames.dim() != 3 or frames.shape[2] != dim:
                raise ValueError(
                    f"FrameParrot: the frames of encoder {k} must be (B, T, {dim}); got {tuple(frames.shape)}."
                )
            batch, longest = frames.shape[:2]
            lengths = [longest] * batch if lengths is None else torch.as_tensor(lengths).tolist()
            if len(lengths) != batch or not all(1 <= n <= longest for n in lengths):
                raise ValueError(
                    f"FrameParrot: the lengths of encoder {k} must be {batch} integers from 1 to {longest}; "
                    f"got {lengths}."
                )
            # Copies begin where memory is aligned, as slices need not: that too can change how a product rounds.
            clips = [stream(clip[:n].clone()) for clip, n in zip(frames, lengths, strict=True)]
            empty = frames.new_zeros(0, longest, self.config.projection)
            streams.append((pad_sequence(clips, batch_first=True) if clips else empty, lengths))
        if len(streams[0][1]) != len(streams[1][1]):
            raise ValueError(
                "FrameParrot: wanted the same utterances from both encoders; "
                f"got {[len(lengths) for _, lengths in streams]}."
            )
        return streams
