"""``parrot info``: what there is."""

from __future__ import annotations

import argparse

from .options import Subparsers, new_command

DESCRIPTION = "Show the encoders, corpora and systems there are, and which kernels serve on this machine."


def add_parser(commands: Subparsers) -> None:
    new_command(commands, "info", run, "show encoders, corpora, systems and kernels", DESCRIPTION)


def run(args: argparse.Namespace) -> int:
    import runpy

    from parrot import corpora, encoders
    from parrot.model import INPUTS, SYSTEMS, VARIANTS

    print("encoders  " + ", ".join(encoders.available()))
    print("corpora   " + ", ".join(corpora.available()))
    print("systems   " + ", ".join(SYSTEMS))
    print("          " + ", ".join((*VARIANTS, *INPUTS)) + "\n")
    try:
        runpy.run_module("parrot_kernels", run_name="__main__")  # the doctor
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0
