"""PARROT and its baselines: small networks over frozen utterance embeddings.

Layers follow the reimplementation by the authors of arXiv 2506.01138. An embedding of d values is read as a
sequence of one channel; embeddings are not standardised. Where a stream comes as frames (B, T, d) it is averaged
over T first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parrot.fusion import FUSIONS, build_fusion
from parrot.sharing import Shareable

HEADS = ("fcn", "cnn")
TRANSPORTS = ("batch", "reference")
# The named systems, in the order of the comparison table: a trailing number is the encoder of a single-encoder one.
SYSTEMS = ("fcn-0", "fcn-1", "cnn-0", "cnn-1", "concat", "hadamard", "ot", "parrot")


@dataclass(frozen=True)
class ParrotConfig:
    """Sizes and options; the defaults are the paper's configuration.

    Attributes:
        fusion: "parrot", or a part of it: "concat", "hadamard", "ot".
        filters: channels of the two convolutions.
        projection: width each stream is projected to before the fusion.
        hidden: width of the classifier's hidden layer.
        dropout: before the last layer.
        eps: entropic regularisation, in units of the largest cost of the batch.
        n_iters: Sinkhorn iterations, always all of them.
        gradient: "detached" (the paper: the plan is a constant), "unrolled" or "implicit".
        reach: relaxes the marginals (unbalanced transport), in units of the largest cost; None (the paper) does not.
        transport: "batch" (the paper: the rows of a batch are the points), or "reference": so only in training; in
            evaluation each row is transported among ``reference_size`` stored rows, whatever shares its batch.
        reference_size: rows of the reference set; 31 give problems of the size of the paper's batches.
    """

    fusion: str = "parrot"
    filters: tuple[int, int] = (64, 128)
    projection: int = 120
    hidden: int = 128
    dropout: float = 0.3
    eps: float = 0.05
    n_iters: int = 50
    gradient: str = "detached"
    reach: float | None = None
    transport: str = "batch"
    reference_size: int = 31

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"ParrotConfig: `fusion` must be one of {', '.join(FUSIONS)}; got {self.fusion!r}.")
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"ParrotConfig: `transport` must be one of {', '.join(TRANSPORTS)}; got {self.transport!r}."
            )

    @classmethod
    def paper(cls) -> ParrotConfig:
        """The configuration of arXiv 2506.01138, where the paper is silent that of its reimplementation."""
        return cls()


# Systems beyond the paper, each a single change to its configuration.
VARIANTS = {
    "parrot-unrolled": ParrotConfig(gradient="unrolled"),
    "parrot-unbalanced": ParrotConfig(reach=0.5),
    "parrot-reference": ParrotConfig(transport="reference"),
}


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
        super().__init__(
            nn.Linear(width, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, n_classes),
        )


class Parrot(Shareable, nn.Module):
    """Two encoders' embeddings, each convolved and projected, fused, classified.

    With x, y (B, projection) the projected streams and P the entropic plan between the rows of the mini-batch
    (Euclidean cost over its maximum, uniform weights), the fused row of the default fusion is
    [x * y, B P^T x, y, B P y, x]. So logits depend on which rows share a batch; in a batch of one the transported
    features are the streams themselves.

    Args:
        dims: embedding widths of the two encoders.
        n_classes: number of classes.
        config: the paper's by default.

    Raises:
        ValueError: not two encoders, or an embedding narrower than 4.
    """

    reference_is_set: Tensor

    def __init__(self, dims: Sequence[int], n_classes: int, config: ParrotConfig | None = None) -> None:
        super().__init__()
        config = config or ParrotConfig.paper()
        if len(dims) != 2:
            raise ValueError(f"Parrot: `dims` must be the embedding widths of two encoders; got {list(dims)}.")
        self.config, self.dims, self.n_classes = config, tuple(dims), n_classes
        cnns = [EmbeddingCNN(dim, config.filters) for dim in dims]
        self.streams = nn.ModuleList(nn.Sequential(cnn, nn.Linear(cnn.width, config.projection)) for cnn in cnns)
        self.fusion = build_fusion(
            config.fusion, eps=config.eps, n_iters=config.n_iters, reach=config.reach, gradient=config.gradient
        )
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
        if len(pooled[0]) != len(pooled[1]):
            raise ValueError(f"Parrot: wanted the same rows from both encoders; got {[len(x) for x in pooled]} rows.")
        return [stream(x) for stream, x in zip(self.streams, pooled, strict=True)]

    def forward(self, *features: Tensor) -> Tensor:
        """Logits (B, n_classes) of one (B, d_k) or (B, T, d_k) tensor per encoder.

        Raises:
            ValueError: another number of tensors, other widths, or unequal numbers of rows.
        """
        streams = self.project(*features)
        if self._among_references:
            return self.classifier(self.fusion(*self._with_references(streams))[:, 0])
        return self.classifier(self.fusion(*streams))

    def plan(self, *features: Tensor) -> Tensor | None:
        """The transport plan (B, B) of a batch; None for a fusion without transport.

        With ``transport="reference"``, in evaluation, the plans (B, 1 + R, 1 + R) of each row, first, with R others.
        """
        if not self.fusion.solves_transport:
            return None
        streams = self.project(*features)
        return self.fusion.plan(*(self._with_references(streams) if self._among_references else streams))

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
        if not self.reference_is_set:
            raise RuntimeError(
                "Parrot: there is no reference set yet. Call `set_reference` with rows of training data."
            )
        stored = self.project(*(getattr(self, f"reference_{k}") for k in range(len(self.dims))))
        return [
            torch.cat([x[:, None], others.expand(len(x), -1, -1)], 1) for x, others in zip(streams, stored, strict=True)
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


def build(name: str, dims: Sequence[int], n_classes: int) -> nn.Module:
    """A named system of :data:`SYSTEMS`, in the paper's configuration; every one takes ``model(*features)``.

    Args:
        name: "fcn-K" or "cnn-K" (encoder K alone), "concat", "hadamard", "ot" or "parrot"; or one of :data:`VARIANTS`.
        dims: embedding widths of all encoders.
        n_classes: number of classes.

    Raises:
        ValueError: an unknown name, or an encoder that ``dims`` lacks.
    """
    head, _, number = name.partition("-")
    if name in VARIANTS:
        return Parrot(dims, n_classes, VARIANTS[name])
    if name in FUSIONS:
        return Parrot(dims, n_classes, ParrotConfig(fusion=name))
    if head not in HEADS or not number.isdigit() or int(number) >= len(dims):
        raise ValueError(
            f"model.build: `name` must be one of {', '.join((*SYSTEMS, *VARIANTS))}, of an encoder among the "
            f"{len(dims)} given; got {name!r}."
        )
    return SingleEncoderClassifier(dims[int(number)], n_classes, head, encoder=int(number))


def from_pretrained(folder_or_id: str | Path, *, download: bool = False, **options: Any) -> Any:
    """A saved model of whichever class, see :meth:`parrot.sharing.Shareable.from_pretrained`."""
    return Shareable.from_pretrained(folder_or_id, download=download, **options)


def _pooled(model: str, index: int, x: Tensor, dim: int) -> Tensor:
    """(B, dim) from (B, dim) or from frames (B, T, dim)."""
    if x.dim() not in (2, 3) or x.shape[-1] != dim or (x.dim() == 3 and x.shape[1] == 0):
        raise ValueError(
            f"{model}: feature tensor {index} must be (B, {dim}) or (B, T, {dim}), T at least 1; got {tuple(x.shape)}."
        )
    return x.mean(1) if x.dim() == 3 else x
