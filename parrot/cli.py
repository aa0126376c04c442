"""The command ``parrot``: what its subcommands in :mod:`parrot.commands` have in common."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence

import parrot
from parrot.commands import bench, convert, corpora, demo, features, info, predict, reproduce, serve, train
from parrot.workers import launched

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says of a disk or a quota
SHARED = ("features", "train")  # what the processes of a launcher can do together
COMMANDS = (demo, corpora, features, train, reproduce, predict, serve, convert, info, bench)

DESCRIPTION = """\
Speech emotion recognition with two encoders, fused by optimal transport and products (PARROT,
arXiv 2506.01138), and the baselines it is compared with."""

EXAMPLES = """\
examples:
  parrot demo                        everything at once on a spoken corpus made on this machine
  parrot predict runs/demo/corpus/AudioWAV/1001_*.wav --model runs/demo/model
  parrot features --corpus crema-d data/CREMA-D --encoder ssam:ssam_base.pth
  parrot train --corpus crema-d data/CREMA-D --encoders ssam:ssam_base.pth hubert:models/hubert-base
  parrot info                        encoders, corpora, systems, and which kernels serve here
  parrot bench                       the kernels beside their peers

`parrot COMMAND --help` tells more. Work that is done is kept: run a command again to go on with it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 2 after an error, 130 when interrupted."""
    args = _parser().parse_args(argv)
    showwarning = warnings.showwarning
    if not args.debug:
        warnings.showwarning = _show_warning
    try:
        if launched() and args.command not in SHARED:
            raise ValueError(f"processes of a launcher can share {' and '.join(SHARED)} only. Start it plainly.")
        if launched() and int(os.environ["RANK"]) > 0:  # the first process speaks for all
            warnings.showwarning = lambda *_, **__: None
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                return args.run(args)
        return args.run(args)
    except KeyboardInterrupt:
        print("\nparrot: interrupted. What was finished is kept; run the command again to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at exit)
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"parrot {args.command}: error: {_explain(error)}", file=sys.stderr)
        return 2
    finally:
        warnings.showwarning = showwarning
        if launched():
            from parrot import distributed

            distributed.leave()


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. Install what the pipeline needs: pip install 'parrot-kernels[demo]'"
    if isinstance(error, OSError) and error.errno in FULL and "make room" not in str(error):
        return f"{error}. What was finished is kept: make room, and run the command again."
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"parrot: warning: {message}", file=file or sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parrot", description=DESCRIPTION, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"parrot-kernels {parrot.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
