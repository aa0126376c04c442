"""``parrot corpora check``: is a corpus complete and sound?"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

from .options import Subparsers, new_command

DESCRIPTION = """\
`check` compares a folder with the complete corpus and decodes every recording. It lists the files that are missing,
extra, misnamed, silent, truncated, unreadable or Git LFS pointers, and ends with status 1 if there are any."""

EXAMPLES = """\
examples:
  parrot corpora check data/CREMA-D
  parrot corpora check data/emodb --name emo-db --all
  parrot corpora check my/manifest.csv"""

SHOWN = 10  # files of a kind


def add_parser(commands: Subparsers) -> None:
    parser = new_command(commands, "corpora", run, "check that a corpus is complete and sound", DESCRIPTION, EXAMPLES)
    parser.add_argument("action", choices=["check"], help="what to do")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the corpus, or a manifest's file")
    parser.add_argument("--name", help="which corpus it should be (by default what it looks like)")
    parser.add_argument("--all", action="store_true", help=f"list all files, not {SHOWN} of a kind")


def run(args: argparse.Namespace) -> int:
    from parrot import corpora

    name = args.name or corpora.recognise(args.folder)
    if name is None:
        raise ValueError(
            f"{args.folder} looks like none of {', '.join(corpora.available())}. --name NAME says what is wrong "
            "with it as that corpus."
        )
    report = corpora.check(name, args.folder)
    of = "" if report.expected is None else f" of {report.expected}"
    print(f"{name} in {args.folder}: {report.found}{of} utterances, {len(report.speakers)} speakers")
    print("labels    " + ", ".join(f"{label} {count}" for label, count in report.labels.items()))
    for remark in report.remarks:
        print(f"note      {remark}")
    for kind, problems in groupby(report.problems, key=lambda problem: problem.kind):
        problems = list(problems)
        print(f"{kind}: {len(problems)}", file=sys.stderr)
        shown = problems if args.all else problems[:SHOWN]
        for problem in shown:
            print(f"  {problem}", file=sys.stderr)
        if len(problems) > len(shown):
            print(f"  ... and {len(problems) - len(shown)} more (--all lists them)", file=sys.stderr)
    print("complete and sound" if report.ok else f"{len(report.problems)} problem(s)")
    return 0 if report.ok else 1
