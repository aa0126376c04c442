"""``parrot predict``: tell the emotion of recordings, or of a stream."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Subparsers, new_command

if TYPE_CHECKING:
    from parrot.prediction import Predictor

DESCRIPTION = """\
Tell the emotion of recordings with a trained model. WAV, FLAC, OGG and MP3 files of any rate are read; of a folder,
all below it. --json prints one object per line, as soon as it is known: path, label and probabilities, or path and
error. The exit status is 2 if there was an error.

--stream reads raw PCM from standard input, as arecord, ffmpeg and sox write it, and prints one object per window:
start and end in seconds, label and probabilities, or error.

PARROT and OT only solve one transport problem per batch of clips, so there the answer for a clip depends on the
clips given with it: many clips of a kind are answered as in testing, one clip alone is a batch of one, where
transport does nothing. So is each window of a stream. Models trained as parrot-reference or parrot-frames answer
each clip alone."""

EXAMPLES = """\
examples:
  parrot predict speech.wav --model runs/demo/model
  parrot predict recordings/ --model runs/crema-d/model --json > answers.jsonl
  arecord -q -t raw -f S16_LE -r 16000 -c 1 | parrot predict --stream --model runs/crema-d/model
  ffmpeg -v error -i talk.mp4 -f f32le -ar 48000 -ac 2 - | parrot predict --stream --rate 48000 --channels 2 \\
      --sample-format f32le --window 4 --hop 2 --model runs/crema-d/model
  sox talk.flac -t raw -e signed -b 16 -L -r 16000 -c 1 - | parrot predict --stream --model runs/crema-d/model"""


def model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a folder that demo or train wrote: .../model, or a Hub id"
    )
    parser.add_argument(
        "--encoders", nargs="+", metavar="SPEC", help="where the model's encoders are now, if they have moved"
    )
    parser.add_argument("--download", action="store_true", help="let model and encoders be fetched from the Hub")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")


def add_parser(commands: Subparsers) -> None:
    parser = new_command(commands, "predict", run, "tell the emotion of recordings", DESCRIPTION, EXAMPLES)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="recordings, or folders of them")
    model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON lines, errors among them")
    stream = parser.add_argument_group("stream")
    stream.add_argument("--stream", action="store_true", help="read raw PCM from standard input, print JSON lines")
    stream.add_argument("--rate", type=int, default=16000, metavar="HZ", help="samples per second (%(default)s)")
    stream.add_argument(
        "--sample-format", default="s16le", metavar="F", help="s16le or f32le, little endian (%(default)s)"
    )
    stream.add_argument("--channels", type=int, default=1, metavar="N", help="interleaved channels (%(default)s)")
    stream.add_argument("--window", type=float, default=3.0, metavar="S", help="seconds of a window (%(default)s)")
    stream.add_argument("--hop", type=float, default=1.0, metavar="S", help="seconds between windows (%(default)s)")


def run(args: argparse.Namespace) -> int:
    from parrot.prediction import Predictor, Stream, recordings

    if args.stream == bool(args.files):
        raise ValueError("name recordings or folders, or give --stream to read standard input: one of both.")
    layout = Stream(args.rate, args.sample_format, args.channels, args.window, args.hop)
    predictor = Predictor.load(args.model, args.encoders, device=args.device, download=args.download)
    if args.stream:
        if predictor.batch_dependent:
            print(f"parrot predict: note: {_batch_note(1, 1)}", file=sys.stderr)
        return _print_lines(predictor.stream(sys.stdin.buffer, layout))
    paths = list(recordings(args.files))
    if args.json:
        if predictor.batch_dependent:
            print(f"parrot predict: note: {_batch_note(len(paths), predictor.batch_size)}", file=sys.stderr)
        return _print_lines(predictor.files(paths))

    answers = list(predictor.files(paths))
    good = [answer for answer in answers if "error" not in answer]
    _print_answers(good)
    if good:
        if predictor.batch_dependent:
            print(f"parrot predict: note: {_batch_note(len(good), predictor.batch_size)}", file=sys.stderr)
        if _is_toy(predictor):
            print("This model was trained on synthetic speech or random encoders: expect nothing of it on real speech.")
    for answer in answers:
        if "error" in answer:
            print(f"parrot predict: error: {answer['path']}: {answer['error']}", file=sys.stderr)
    return 0 if len(good) == len(answers) else 2


def _print_lines(answers: Iterable[dict[str, Any]]) -> int:
    failed = False
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False), flush=True)
        failed |= "error" in answer
    return 2 if failed else 0


def _is_toy(predictor: Predictor) -> bool:
    facts = predictor.model.description
    return bool(facts.get("synthetic")) or any(encoder.get("random") for encoder in facts["encoders"])


def _print_answers(answers: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not answers:
        return
    table = Table()
    for column in ("file", "label", "per cent", "then"):
        table.add_column(column, justify="right" if column == "per cent" else "left", overflow="fold")
    for answer in answers:
        (_, first), *others = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
        others = ", ".join(f"{label} {100 * share:.0f}" for label, share in others[:2])
        table.add_row(Path(answer["path"]).name, answer["label"], f"{100 * first:.0f}", others)
    Console().print(table)


def _batch_note(n: int, batch_size: int) -> str:
    if n == 1:
        return (
            "One clip alone is a batch of one: transport does nothing there, and the answer may differ from that "
            "among other clips."
        )
    return (
        f"Transport joins the clips of a batch (here {min(n, batch_size)}): with other clips beside it a clip's "
        "answer may differ."
    )
