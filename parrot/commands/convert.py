"""``parrot convert``: the weights of a published checkpoint as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Subparsers, new_command

DESCRIPTION = """\
Copy the weights of an official SSAM or SSAMBA checkpoint (.pth) into a safetensors file, which loads faster and can
be shared. Only tensors are read: the training arguments and the optimizer beside them are left, no code in the file
is run, and no library that wrote it is needed. The tensors keep their values and types; the keys lose the prefix
"module." that SSAMBA's have."""

EXAMPLES = """\
examples:
  parrot convert checkpoint-99.pth ssam_base.safetensors
  parrot convert amba_base_400.pth ssamba_base.safetensors
  parrot features --corpus crema-d data/CREMA-D --encoder ssam:ssam_base.safetensors"""


def add_parser(commands: Subparsers) -> None:
    parser = new_command(
        commands, "convert", run, "checkpoints of SSAM and SSAMBA as safetensors", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("source", type=Path, metavar="IN.pth", help="the published checkpoint")
    parser.add_argument("target", type=Path, metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def run(args: argparse.Namespace) -> int:
    from parrot.encoders.convert import convert

    encoder = convert(args.source, args.target, force=args.force)
    family = type(encoder).__name__
    parameters = sum(weight.numel() for weight in encoder.state_dict().values())
    print(
        f"{family} with {parameters / 1e6:.1f} million weights, embeddings of {encoder.embedding_dim} values\n"
        f"Written  {args.target}\n"
        f"Use      --encoder {family.lower()}:{args.target}"
    )
    return 0
