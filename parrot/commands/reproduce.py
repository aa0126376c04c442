"""``parrot reproduce``: the paper's tables, ours beside the published ones."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import Subparsers, cache_options, extraction, load_corpus, load_encoders, named_corpora, new_command

if TYPE_CHECKING:
    from parrot.features import Extraction
    from parrot.reproduce import CorpusData, Result, Stream

DESCRIPTION = """\
Train every row of a table of the paper on your corpora and encoders, and print it beside the published figures.

  table1   each encoder alone, with a fully connected and with a convolutional head
  table2   each pair of two attention encoders, or of a Mamba and an attention encoder, in four fusions:
           concatenation, Hadamard product, optimal transport, PARROT

Over speaker-disjoint folds and several seeds, with the paper's training protocol. Every finished run is kept, so a
run that was killed goes on where it was; neither that nor --jobs changes the figures. An encoder's place in the
paper follows from its spec; NAME=SPEC says it: audio-mamba-tiny, -small, -base, hubert, wavlm, wav2vec2,
unispeech-sat, mms. The demo encoders are random and stand in for audio-mamba-base and hubert."""

EXAMPLES = """\
examples:
  parrot reproduce table2 --corpus crema-d:data/CREMA-D --encoders ssam:ssam_base.pth hubert:models/hubert-base
  parrot reproduce table2 --corpus crema-d:data/CREMA-D --encoders ssam:ssam_base.pth mms:models/mms-1b
  parrot reproduce table1 --corpus demo:runs/demo/corpus --encoders ssam-demo hubert-demo --seeds 1 --epochs 5"""


def add_parser(commands: Subparsers) -> None:
    parser = new_command(
        commands, "reproduce", run, "the paper's tables, ours beside the published", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("table", choices=("table1", "table2"), help="which table")
    parser.add_argument(
        "--corpus",
        required=True,
        nargs="+",
        metavar="NAME:DIR",
        help="corpora that `parrot info` lists, and where; or NAME DIR ...",
    )
    parser.add_argument(
        "--encoders", required=True, nargs="+", metavar="[NAME=]SPEC", help="see `parrot info` for what there is"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="everything goes here (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions (%(default)s)")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="folds (%(default)s)")
    parser.add_argument(
        "--split", choices=("speaker", "stratified"), default="speaker",
        help="folds without a speaker on two sides, or (MESD names no speakers) by label alone (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="the most epochs (%(default)s)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that train (all cores; 1 on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    cache_options(parser)


def run(args: argparse.Namespace) -> int:
    from parrot import reproduce, reproduce_report
    from parrot.training import TrainingConfig

    started = time.perf_counter()
    config = TrainingConfig(epochs=args.epochs, device=args.device)
    named = [_named(argument) for argument in args.encoders]
    encoders = load_encoders([spec for _, spec in named], args.download, args.device)
    streams = _streams(named, encoders)
    reproduce.rows_of(args.table, streams)  # says at once if there is none
    corpora = [load_corpus(named) for named in named_corpora(args.corpus)]
    data = [_data(corpus, streams, encoders, args.cache, extraction(args)) for corpus in corpora]
    result = reproduce.run(
        args.table, data, streams, args.output / "results",
        seeds=args.seeds, folds=args.folds, split=args.split, jobs=args.jobs, config=config,
    )  # fmt: skip
    paths = reproduce_report.write(result, args.output)
    _print(result)
    total = sum(len(records) for records in result.runs.values())
    print(
        f"Trained  {total - result.reused} runs, reused {result.reused}; {time.perf_counter() - started:.0f} s in all"
    )
    print("Written  " + " ".join(str(path) for path in paths))
    return 0


def _named(argument: str) -> tuple[str | None, str]:
    """A name, if one is given, and a spec. A name has no colon, so that a path may have an equals sign."""
    name, equals, spec = argument.partition("=")
    return (name, spec) if equals and ":" not in name else (None, argument)


def _streams(named: Sequence[tuple[str | None, str]], encoders: Sequence) -> list[Stream]:
    from parrot import published
    from parrot.reproduce import Stream

    from .experiment import encoder_facts

    streams = []
    facts = encoder_facts([spec for _, spec in named], encoders)
    for (name, spec), fact in zip(named, facts, strict=True):
        name = name or published.role(spec, fact.embedding_dim) or fact.name
        known = published.ENCODERS.get(name)
        streams.append(Stream(name, known.mamba if known else spec.startswith("ssam"), fact))
    return streams


def _data(corpus, streams: Sequence[Stream], encoders: Sequence, cache: Path, how: Extraction) -> CorpusData:
    from parrot.corpora.splits import name_copies
    from parrot.reproduce import CorpusData

    from .experiment import embed_corpus

    rows, hashes, features, failures = embed_corpus(corpus, encoders, cache, how)
    return CorpusData(
        corpus.name,
        {stream.name: matrix for stream, matrix in zip(streams, features["embeddings"], strict=True)},
        corpus.targets[rows],
        tuple(corpus.speakers[row] for row in rows),
        corpus.labels,
        failures,
        tuple(name_copies(hashes, [corpus.utterances[row].path.name for row in rows])),
    )


def _print(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from parrot import reproduce_report as report

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    entries = report.summary(result)
    for corpus in result.corpora:
        mine = report.of_corpus(entries, corpus)
        table = Table(title=f"{corpus.title}, per cent")
        for column in report.header(result):
            table.add_column(column, justify="left" if column in ("encoders", "system") else "right")
        for entry in mine:
            table.add_row(*report.cells(entry), style="bold" if entry["system"] == "parrot" else None)
        folds = Table(title=f"{corpus.title}, accuracy of every fold")
        for column in ("encoders", "system", "seed", *(f"fold {k + 1}" for k in range(result.folds))):
            folds.add_column(column, justify="left" if column in ("encoders", "system") else "right")
        for row in report.fold_rows(result, mine, "wa"):
            folds.add_row(*row)
        console.print(table)
        console.print(folds)
    print("\n".join(report.caveats(result)) + "\n")
