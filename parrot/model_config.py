"""Sizes and options of PARROT."""

from __future__ import annotations

from dataclasses import dataclass

from parrot.fusion import FUSIONS, PAIRS, TRANSPORTED

TRANSPORTS = ("batch", "reference", "frames")


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
        transport: "batch" (the paper: the rows of a batch are the points); "reference": so only in training, and in
            evaluation each row is transported among ``reference_size`` stored rows, whatever shares its batch; or
            "frames": the points are the frames of one utterance, see :class:`parrot.frames.FrameParrot`.
        reference_size: rows of the reference set; 31 give problems of the size of the paper's batches.
        learn_eps: eps is a parameter, see :class:`parrot.epsilon.Epsilon`; needs a gradient through the plan.
        eps_start: if given, eps comes down (or up) from this value to ``eps`` over the first ``eps_epochs`` epochs.
        eps_epochs: see ``eps_start``.
        pairs: which of three or more encoders are fused with one another: "all" pairs, or each with the "first".
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
    learn_eps: bool = False
    eps_start: float | None = None
    eps_epochs: int = 10
    pairs: str = "all"

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"ParrotConfig: `fusion` must be one of {', '.join(FUSIONS)}; got {self.fusion!r}.")
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"ParrotConfig: `transport` must be one of {', '.join(TRANSPORTS)}; got {self.transport!r}."
            )
        if self.pairs not in PAIRS:
            raise ValueError(f"ParrotConfig: `pairs` must be one of {', '.join(PAIRS)}; got {self.pairs!r}.")
        transports = any(part in TRANSPORTED for part in FUSIONS[self.fusion])
        if self.transport == "frames" and not transports:
            raise ValueError(
                f"ParrotConfig: `transport` 'frames' wants a fusion that transports, 'ot' or 'parrot': sequences of "
                f"different lengths have no other product; got {self.fusion!r}."
            )
        if self.learn_eps and (self.gradient == "detached" or not transports):
            raise ValueError(
                "ParrotConfig: `learn_eps` needs a gradient through a plan; got "
                f"gradient {self.gradient!r} and fusion {self.fusion!r}. Use 'unrolled' or 'implicit' with 'ot' or "
                "'parrot'."
            )
        if self.learn_eps and self.eps_start is not None:
            raise ValueError("ParrotConfig: eps is either learned or annealed; got `learn_eps` and `eps_start`.")

    @classmethod
    def paper(cls) -> ParrotConfig:
        """The configuration of arXiv 2506.01138, where the paper is silent that of its reimplementation."""
        return cls()
