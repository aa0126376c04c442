"""What the commands share: how a parser is made, common options, and what these become."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch and its company take seconds to import: `parrot --help` does without them
    from parrot.corpora import Corpus
    from parrot.encoders import Encoder
    from parrot.features import Extraction
    from parrot.training import TrainingConfig

Subparsers = argparse._SubParsersAction


def new_command(
    commands: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    examples: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command to ``parrot``; its options are the caller's to add."""
    parser = commands.add_parser(
        name, help=summary, description=description, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def corpus_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus", required=True, nargs=2, metavar=("NAME", "DIR"), help="a corpus that `parrot info` lists, and where"
    )


def named_corpora(values: Sequence[str]) -> list[tuple[str, str]]:
    """(NAME, DIR) of each corpus in ``NAME:DIR ...`` or ``NAME DIR ...``."""
    rest, found = list(values), []
    while rest:
        name, colon, folder = rest.pop(0).partition(":")
        if not colon and rest:
            folder = rest.pop(0)
        if not folder:
            raise ValueError(f"--corpus wants NAME:DIR, such as crema-d:data/CREMA-D; got {name + colon!r}.")
        found.append((name, folder))
    return found


def cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/features"),
        metavar="DIR",
        help="embeddings are kept here (%(default)s)",
    )
    parser.add_argument("--download", action="store_true", help="let encoders be fetched from the Hugging Face Hub")
    parser.add_argument(
        "--clips", type=int, default=1, metavar="N", help="clips of similar length that an encoder takes at once (1)"
    )
    parser.add_argument("--bf16", action="store_true", help="let encoders compute in bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile encoders with torch.compile")


def extraction(args: argparse.Namespace) -> Extraction:
    from parrot.features import Extraction

    return Extraction(args.clips, "bf16" if args.bf16 else "fp32", args.compile)


def training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", help="what to train (every system of the paper)")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="speaker-disjoint folds (%(default)s)")
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="the most epochs (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="clips in a batch (%(default)s)")
    parser.add_argument(
        "--encoder-learning-rate",
        type=float,
        default=1e-5,
        metavar="X",
        help="Adam's for the encoders of parrot-finetuned (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of folds and training (%(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that train (all cores; 1 on a GPU); figures don't depend on it",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")


def training_config(args: argparse.Namespace) -> TrainingConfig:
    from parrot.training import TrainingConfig

    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more; got {args.seed}.")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers must be 1 or more; got {args.workers}.")
    config = TrainingConfig(
        epochs=args.epochs, batch_size=args.batch_size, device=args.device,
        encoder_learning_rate=args.encoder_learning_rate,
    )  # fmt: skip
    config.resolved_device()
    return config


def load_corpus(corpus: Sequence[str]) -> Corpus:
    from parrot import corpora

    return corpora.load(*corpus)


def load_encoders(specs: Sequence[str], download: bool, device: str) -> list[Encoder]:
    from parrot import encoders
    from parrot.training import TrainingConfig

    where = TrainingConfig(device=device).resolved_device()
    return [encoders.load(spec, download=download).to(where) for spec in specs]
