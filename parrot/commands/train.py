"""``parrot train``: cross-validate, report, and save a model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .experiment import run_experiment
from .options import (
    Subparsers,
    cache_options,
    corpus_option,
    load_corpus,
    new_command,
    training_config,
    training_options,
)

DESCRIPTION = """\
Cross-validate systems on a corpus over speaker-disjoint folds, report, and train one of them on all speakers as a
model for `parrot predict`. The systems: fcn-K and cnn-K (encoder K alone, from 0), concat, hadamard, ot, parrot.
Beyond the paper: parrot-unrolled (gradient through the plan), parrot-unbalanced, and parrot-reference (a prediction
does not depend on the other clips of its batch: each clip is transported among stored training clips), parrot-frames
(nor does it here: transport between the frames of the clip), parrot-learned-eps, parrot-annealed-eps, parrot-layers
(learned weights of the encoders' layers), parrot-finetuned (the encoders are trained too). Three or more encoders are
fused in all pairs, by parrot-first-pairs each with the first.

Processes started by accelerate or torchrun share each run: batches stay as they are, figures agree with those of one
process up to rounding. For many short runs on one machine --workers is faster."""

EXAMPLES = """\
examples:
  parrot train --corpus crema-d data/CREMA-D --encoders ssam:ssam_base.pth hubert:models/hubert-base
  parrot train --corpus crema-d data/CREMA-D --encoders ssam-demo hubert-demo --systems concat parrot --epochs 5
  parrot train --corpus crema-d data/CREMA-D --encoders hubert:models/hubert-base --systems fcn-0 cnn-0
  torchrun --nproc-per-node 2 -m parrot train --corpus manifest all.csv --encoders ssam-demo hubert-demo"""


def add_parser(commands: Subparsers) -> None:
    parser = new_command(commands, "train", run, "cross-validate, report, and save a model", DESCRIPTION, EXAMPLES)
    corpus_option(parser)
    parser.add_argument(
        "--encoders", required=True, nargs="+", metavar="SPEC", help="one or more; see `parrot info` for what there is"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="report and model go here (runs/NAME)")
    parser.add_argument(
        "--final", metavar="SYSTEM", help="the system saved as a model (parrot if it is trained, else the last)"
    )
    cache_options(parser)
    training_options(parser)


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    config = training_config(args)
    corpus = load_corpus(args.corpus)
    args.output = args.output or Path("runs") / corpus.name
    run_experiment(corpus, args, config, synthetic=corpus.name == "demo", started=started)
    return 0
