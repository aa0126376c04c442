"""``parrot features``: embed a corpus."""

from __future__ import annotations

import argparse

from .options import Subparsers, cache_options, corpus_option, extraction, load_corpus, load_encoders, new_command

DESCRIPTION = """\
Embed a corpus with one or more encoders and keep the embeddings in a cache, which `parrot train` reads. A file
that can't be used is listed and the others are kept; a run that was stopped goes on where it was.
Processes started by accelerate or torchrun share the work; on several machines they need a common cache folder."""

EXAMPLES = """\
examples:
  parrot features --corpus crema-d data/CREMA-D --encoder ssam:ssam_base.pth hubert:models/hubert-base
  parrot features --corpus crema-d data/CREMA-D --encoder hubert:facebook/hubert-base-ls960 --download
  torchrun --nproc-per-node 4 -m parrot features --corpus crema-d data/CREMA-D --encoder ssam:ssam_base.pth"""


def add_parser(commands: Subparsers) -> None:
    parser = new_command(commands, "features", run, "embed a corpus and keep the embeddings", DESCRIPTION, EXAMPLES)
    corpus_option(parser)
    parser.add_argument(
        "--encoder",
        "--encoders",
        dest="encoder",
        required=True,
        nargs="+",
        metavar="SPEC",
        help="see `parrot info` for what there is",
    )
    cache_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")


def run(args: argparse.Namespace) -> int:
    from parrot import distributed, features

    how, group = extraction(args), distributed.join(args.device)
    corpus = load_corpus(args.corpus)
    for encoder in load_encoders(args.encoder, args.download, args.device):
        table = features.extract(corpus, encoder, args.cache, progress=group.main, how=how, group=group)
        print(
            f"{encoder.name}: {len(table.rows)} of {len(corpus)} utterances, {encoder.embedding_dim} values each, "
            f"{table.reused} from the cache {args.cache}"
        )
        for path, reason in table.failures:
            print(f"  left out {path}: {reason}")
    return 0
