"""``parrot serve``: a page in the browser that analyses recordings."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Subparsers, new_command
from .predict import model_options

DESCRIPTION = """\
Serve a page that takes a recording, uploaded or from the microphone, and shows class probabilities, the waveform and
the transport plan. It listens on this machine alone, makes no public link and reports nothing to anyone. Needs the
extra `app`: pip install 'parrot-kernels[app]'."""

EXAMPLES = """\
examples:
  parrot serve --model runs/demo/model --among runs/demo/corpus
  parrot serve --model runs/crema-d/model --port 8000"""


def add_parser(commands: Subparsers) -> None:
    parser = new_command(commands, "serve", run, "a page in the browser", DESCRIPTION, EXAMPLES)
    model_options(parser)
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="of the page (%(default)s)")
    parser.add_argument(
        "--among",
        type=Path,
        metavar="DIR",
        help="recordings, evenly chosen, that fill a clip's batch where predictions depend on it",
    )


def run(args: argparse.Namespace) -> int:
    from parrot.prediction import Predictor

    if not 0 < args.port < 65536:
        raise ValueError(f"--port must be from 1 to 65535; got {args.port}.")
    try:
        from parrot import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs Gradio. Install it: pip install 'parrot-kernels[app]'") from None
    predictor = Predictor.load(args.model, args.encoders, device=args.device, download=args.download)
    others = _others(predictor, args.among) if args.among and predictor.batch_dependent else ()
    page = app.page(predictor, others)
    print(f"Page     {app.launch(page, args.port)} (Ctrl-C ends it)", flush=True)
    page.block_thread()
    return 0


def _others(predictor, folder: Path) -> list:
    """Clips for a batch, from all over the folder."""
    from parrot.prediction import recordings

    paths = list(recordings([folder]))
    count = min(len(paths), predictor.batch_size - 1)
    return [predictor.embed_file(paths[k * len(paths) // count]) for k in range(count)]
