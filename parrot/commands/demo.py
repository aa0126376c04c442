"""``parrot demo``: everything on a corpus made here."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .experiment import run_experiment
from .options import Subparsers, new_command, training_config, training_options

ENCODERS = ("ssam-demo", "hubert-demo")

DESCRIPTION = """\
Make a small corpus of synthetic speech, embed it with two small random encoders, train PARROT and its baselines
on speaker-disjoint folds, and report. Needs no data and no network. The figures show that everything works, not
how well emotion is recognised. A second run reuses everything and gives the same figures."""

EXAMPLES = """\
examples:
  parrot demo
  parrot demo --output runs/small --voices 5 --sentences 2 --epochs 10
  parrot demo --seed 1 --workers 4"""


def add_parser(commands: Subparsers) -> None:
    parser = new_command(
        commands, "demo", run, "train and compare everything on a corpus made here", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="everything goes here (%(default)s)"
    )
    parser.add_argument("--voices", type=int, default=10, metavar="N", help="speakers of the corpus (%(default)s)")
    parser.add_argument("--sentences", type=int, default=4, metavar="N", help="sentences of each (%(default)s)")
    training_options(parser)


def run(args: argparse.Namespace) -> int:
    from parrot import corpora
    from parrot.corpora import demo, splits

    started = time.perf_counter()
    config = training_config(args)
    splits.speaker_folds([str(voice) for voice in range(args.voices)], args.folds)  # says at once if too few
    root = demo.synthesise(args.output / "corpus", args.voices, args.sentences)
    args.encoders, args.cache, args.download, args.final = list(ENCODERS), args.output / "features", False, None
    args.clips, args.bf16, args.compile = 1, False, False
    run_experiment(corpora.load("demo", root), args, config, synthetic=True, started=started)
    clip = next(iter(sorted((root / "AudioWAV").glob("*.wav"))))
    print(f"Try      parrot predict {clip} --model {args.output / 'model'}")
    return 0
