"""PARROT and its baselines: small networks over frozen utterance embeddings.

Layers follow the reimplementation by the authors of arXiv 2506.01138. An embedding of d values is read as a
sequence of one channel; embeddings are not standardised. Where a stream comes as frames (B, T, d) it is averaged
over T first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parrot.encoders import Encoder, load
from parrot.epsilon import Epsilon
from parrot.fine_tuning import FineTuned
from parrot.frames import FrameParrot
from parrot.fusion import FUSIONS, build_fusion
from parrot.layer_weights import LayerWeighted
from parrot.model_config import ParrotConfig
from parrot.sharing import Shareable

HEADS = ("fcn", "cnn")
# The named systems, in the order of the comparison table: a trailing number is the encoder of a single-encoder one.
SYSTEMS = ("fcn-0", "fcn-1", "cnn-0", "cnn-1", "concat", "hadamard", "ot", "parrot")


# Systems beyond the paper, each a single change to its configuration. Beside them there are "parrot-layers" and
# "parrot-finetuned", the paper's configuration on other inputs.
VARIANTS = {
    "parrot-unrolled": ParrotConfig(gradient="unrolled"),
    "parrot-unbalanced": ParrotConfig(reach=0.5),
    "parrot-reference": ParrotConfig(transport="reference"),
    "parrot-first-pairs": ParrotConfig(pairs="first"),
    "parrot-frames": ParrotConfig(transport="frames", gradient="unrolled"),
    "parrot-learned-eps": ParrotConfig(learn_eps=True, gradient="unrolled"),
    "parrot-annealed-eps": ParrotConfig(eps_start=0.5),
}
INPUTS = {"parrot-layers": "layers", "parrot-finetuned": "waveforms"}


class EmbeddingCNN(nn.Sequential):
    """Two convolutions over an embedding: (B, dim) to (B, width), channel-major, width = filters[1] * (dim // 4)."""

    def __init__(self, dim: int, filters: tuple[int, int] = (64, 128)) -> None:
        if dim < 4:
            raise ValueError(f"EmbeddingCNN: `dim` must be at least 4, two poolings halve it; got {dim}.")
        super().__init__(
            nn.Unflatten(1, (1, dim)),
            nn.Conv1d(1, filters[0], 3, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(filters[0], filters[1], 3, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Flatten(),
        )
        self.width = filters[1] * (dim // 4)


class Classifier(nn.Sequential):
    """Linear, ReLU, dropout, Linear: (B, width) to logits (B, n_classes)."""

    def __init__(self, width: int, n_classes: int, config: ParrotConfig) -> None:
        if n_classes < 1:
            raise ValueError(f"Classifier: `n_classes` must be at least 1; got {n_classes}.")
        super().__init__(
            nn.Linear(width, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, n_classes),
        )


class Parrot(Shareable, nn.Module):
    """Two or more encoders' embeddings, each convolved and projected, fused, classified.

    With x, y (B, projection) the projected streams and P the entropic plan between the rows of the mini-batch
    (Euclidean cost over its maximum, uniform weights), the fused row of the default fusion is
    [x * y, B P^T x, y, B P y, x]. So logits depend on which rows share a batch; in a batch of one the transported
    features are the streams themselves.

    The paper has two encoders; K streams are fused pair by pair, see :class:`parrot.fusion.PairwiseFusion`. With
    filters (c_1, c_2), p = projection, h = hidden, C classes and a fusion of n parts (for two encoders 5, in general
    3 pairs + K), the parameters are::

        sum_k [4 c_1 + 3 c_1 c_2 + c_2 + c_2 (d_k // 4) p + p]  +  h (n p + 1) + C (h + 1)

    Args:
        dims: embedding widths of the encoders, two or more.
        n_classes: number of classes.
        config: the paper's by default.

    Raises:
        ValueError: fewer than two encoders, an embedding narrower than 4, or ``transport="frames"``.
    """

    inputs = "embeddings"
    reference_is_set: Tensor

    def __init__(self, dims: Sequence[int], n_classes: int, config: ParrotConfig | None = None) -> None:
        super().__init__()
        config = config or ParrotConfig.paper()
        if len(dims) < 2:
            raise ValueError(f"Parrot: `dims` must be the embedding widths of two or more encoders; got {list(dims)}.")
        if config.transport == "frames":
            raise ValueError("Parrot: `transport` 'frames' is that of parrot.frames.FrameParrot. Use that class.")
        self.config, self.dims, self.n_classes = config, tuple(dims), n_classes
        cnns = [EmbeddingCNN(dim, config.filters) for dim in dims]
        self.streams = nn.ModuleList(nn.Sequential(cnn, nn.Linear(cnn.width, config.projection)) for cnn in cnns)
        self.fusion = build_fusion(
            config.fusion, len(dims), config.pairs,
            eps=config.eps, n_iters=config.n_iters, reach=config.reach, gradient=config.gradient,
        )  # fmt: skip
        self.epsilon = Epsilon(config.eps, start=config.eps_start, epochs=config.eps_epochs, learned=config.learn_eps)
        if config.transport == "reference":
            for k, dim in enumerate(dims):
                self.register_buffer(f"reference_{k}", torch.zeros(config.reference_size, dim))
            self.register_buffer("reference_is_set", torch.tensor(False))
        self.classifier = Classifier(self.fusion.width(config.projection), n_classes, config)

    @property
    def row_modules(self) -> tuple[nn.Module, ...]:
        """What works row by row, before the rows of a batch meet."""
        return tuple(self.streams)

    @property
    def batch_dependent(self) -> bool:
        """Whether, in evaluation, a row's logits depend on the other rows of its batch."""
        return self.fusion.solves_transport and self.config.transport == "batch"

    def arguments(self) -> dict[str, Any]:
        return {"dims": list(self.dims), "n_classes": self.n_classes, "config": asdict(self.config)}

    def project(self, *features: Tensor) -> list[Tensor]:
        """Each stream (B, d_k) or (B, T, d_k) projected to (B, projection)."""
        if len(features) != len(self.dims):
            raise ValueError(f"Parrot: wanted {len(self.dims)} feature tensors, one per encoder; got {len(features)}.")
        pooled = [_pooled("Parrot", k, x, dim) for k, (x, dim) in enumerate(zip(features, self.dims, strict=True))]
        if any(x.shape[0] != pooled[0].shape[0] for x in pooled):  # len would fix the batch size under torch.export
            raise ValueError(f"Parrot: wanted the same rows from all encoders; got {[len(x) for x in pooled]} rows.")
        return [stream(x) for stream, x in zip(self.streams, pooled, strict=True)]

    def forward(self, *features: Tensor) -> Tensor:
        """Logits (B, n_classes) of one (B, d_k) or (B, T, d_k) tensor per encoder.

        Raises:
            ValueError: another number of tensors, other widths, or unequal numbers of rows.
        """
        streams = self.project(*features)
        if self._among_references:
            return self.classifier(self.fusion(*self._with_references(streams), eps=self.epsilon())[:, 0])
        return self.classifier(self.fusion(*streams, eps=self.epsilon()))

    def plan(self, *features: Tensor) -> Tensor | None:
        """The transport plan (B, B) of a batch, between the first two encoders; None for a fusion without transport.

        With ``transport="reference"``, in evaluation, the plans (B, 1 + R, 1 + R) of each row, first, with R others.
        """
        if not self.fusion.solves_transport:
            return None
        streams = self.project(*features)
        streams = self._with_references(streams) if self._among_references else streams
        return self.fusion.plan(*streams, eps=self.epsilon())

    def set_epoch(self, epoch: int) -> None:
        """Tell a schedule of eps which epoch, from 1, begins."""
        self.epsilon.set_epoch(epoch)

    def set_reference(self, *features: Tensor) -> None:
        """Store the rows that evaluation transports among: one (reference_size, d_k) tensor per encoder.

        Raises:
            ValueError: the configuration has no reference set, or other shapes.
        """
        if self.config.transport != "reference":
            raise ValueError("Parrot.set_reference: `transport` must be 'reference' in the configuration; got 'batch'.")
        wanted = [(self.config.reference_size, dim) for dim in self.dims]
        if (got := [tuple(x.shape) for x in features]) != wanted:
            raise ValueError(f"Parrot.set_reference: `features` must be of shapes {wanted}; got {got}.")
        for k, x in enumerate(features):
            getattr(self, f"reference_{k}").copy_(x)
        self.reference_is_set.fill_(True)

    @property
    def _among_references(self) -> bool:
        return self.config.transport == "reference" and not self.training

    def _with_references(self, streams: list[Tensor]) -> list[Tensor]:
        """(B, 1 + R, projection): one problem per row, the row first."""
        if not torch.compiler.is_compiling() and not self.reference_is_set:
            raise RuntimeError(
                "Parrot: there is no reference set yet. Call `set_reference` with rows of training data."
            )
        stored = self.project(*(getattr(self, f"reference_{k}") for k in range(len(self.dims))))
        rows = streams[0].shape[0]
        return [
            torch.cat([x[:, None], others.expand(rows, -1, -1)], 1) for x, others in zip(streams, stored, strict=True)
        ]


class SingleEncoderClassifier(Shareable, nn.Module):
    """The single-encoder baselines: a classifier on one embedding ("fcn") or on its convolved form ("cnn").

    Args:
        dim: embedding width.
        n_classes: number of classes.
        head: "fcn" or "cnn".
        encoder: which of several feature tensors is this one's; a tensor given alone is always taken.
        config: filters, hidden width and dropout; the paper's by default.
    """

    def __init__(
        self, dim: int, n_classes: int, head: str = "fcn", *, encoder: int = 0, config: ParrotConfig | None = None
    ) -> None:
        super().__init__()
        config = config or ParrotConfig.paper()
        if head not in HEADS:
            raise ValueError(f"SingleEncoderClassifier: `head` must be one of {', '.join(HEADS)}; got {head!r}.")
        self.dim, self.n_classes, self.head, self.encoder, self.config = dim, n_classes, head, encoder, config
        self.stem = EmbeddingCNN(dim, config.filters) if head == "cnn" else nn.Identity()
        width = self.stem.width if isinstance(self.stem, EmbeddingCNN) else dim
        self.classifier = Classifier(width, n_classes, config)

    @property
    def row_modules(self) -> tuple[nn.Module, ...]:
        """What works row by row, before dropout."""
        return (self.stem,)

    @property
    def batch_dependent(self) -> bool:
        """Whether a row's logits depend on the other rows of its batch: never."""
        return False

    def arguments(self) -> dict[str, Any]:
        config = asdict(self.config)
        return {
            "dim": self.dim, "n_classes": self.n_classes, "head": self.head, "encoder": self.encoder, "config": config
        }  # fmt: skip

    def forward(self, *features: Tensor) -> Tensor:
        """Logits (B, n_classes) of the encoder's (B, dim) or (B, T, dim) tensor, alone or among all encoders'."""
        index = self.encoder if len(features) > 1 else 0
        if not 0 <= index < len(features):
            raise ValueError(
                f"SingleEncoderClassifier: wanted the tensor of encoder {self.encoder}, alone or among all; "
                f"got {len(features)} tensors."
            )
        return self.classifier(self.stem(_pooled("SingleEncoderClassifier", index, features[index], self.dim)))


def build(
    name: str,
    dims: Sequence[Any],
    n_classes: int,
    encoders: Sequence[str | Encoder] | None = None,
) -> nn.Module:
    """A named system of :data:`SYSTEMS`, in the paper's configuration; every one takes ``model(*features)``.

    Args:
        name: "fcn-K" or "cnn-K" (encoder K alone), "concat", "hadamard", "ot" or "parrot"; or one of :data:`VARIANTS`;
            "parrot-layers", which learns how to weigh the encoders' layers; or "parrot-finetuned", which trains the
            encoders too. :func:`inputs_of` tells what each takes.
        dims: embedding widths of all encoders; for "parrot-layers" pairs (number of hidden states, width); not read
            for "parrot-finetuned".
        n_classes: number of classes.
        encoders: for "parrot-finetuned" alone: the encoders, which are then trained, or specs that
            :func:`parrot.encoders.load` takes.

    Raises:
        ValueError: an unknown name, an encoder that ``dims`` lacks, or no encoders for "parrot-finetuned".
    """
    if name == "parrot-layers":
        return LayerWeighted([states for states, _ in dims], Parrot([dim for _, dim in dims], n_classes))
    if name == "parrot-finetuned":
        if not encoders:
            raise ValueError(
                "model.build: 'parrot-finetuned' trains encoders; give them, or their specs, as `encoders`."
            )
        widths = [(load(encoder) if isinstance(encoder, str) else encoder).embedding_dim for encoder in encoders]
        return FineTuned(encoders, Parrot(widths, n_classes))
    head, _, number = name.partition("-")
    if name in VARIANTS:
        model = FrameParrot if VARIANTS[name].transport == "frames" else Parrot
        return model(dims, n_classes, VARIANTS[name])
    if name in FUSIONS:
        return Parrot(dims, n_classes, ParrotConfig(fusion=name))
    if head not in HEADS or not number.isdigit() or int(number) >= len(dims):
        raise ValueError(
            f"model.build: `name` must be one of {', '.join((*SYSTEMS, *VARIANTS, *INPUTS))}, of an encoder among the "
            f"{len(dims)} given; got {name!r}."
        )
    return SingleEncoderClassifier(dims[int(number)], n_classes, head, encoder=int(number))


def from_pretrained(folder_or_id: str | Path, *, download: bool = False, **options: Any) -> Any:
    """A saved model of whichever class, see :meth:`parrot.sharing.Shareable.from_pretrained`."""
    return Shareable.from_pretrained(folder_or_id, download=download, **options)


def inputs_of(name: str) -> str:
    """What the system ``name`` takes, one of :data:`parrot.features.KINDS`; "embeddings" for an unknown name."""
    if name in VARIANTS and VARIANTS[name].transport == "frames":
        return "frames"
    return INPUTS.get(name, "embeddings")


def _pooled(model: str, index: int, x: Tensor, dim: int) -> Tensor:
    """(B, dim) from (B, dim) or from frames (B, T, dim)."""
    if x.dim() not in (2, 3) or x.shape[-1] != dim or (x.dim() == 3 and x.shape[1] == 0):
        raise ValueError(
            f"{model}: feature tensor {index} must be (B, {dim}) or (B, T, {dim}), T at least 1; got {tuple(x.shape)}."
        )
    return x.mean(1) if x.dim() == 3 else x
