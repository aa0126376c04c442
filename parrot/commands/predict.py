"""``parrot predict``: tell the emotion of recordings."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Subparsers, load_encoders, new_command

if TYPE_CHECKING:
    import numpy as np

    from parrot.encoders import Encoder

DESCRIPTION = """\
Tell the emotion of recordings with a trained model. WAV, FLAC, OGG and MP3 files of any rate are read.

PARROT and OT only solve one transport problem per batch of clips, so there the answer for a clip depends on the
clips given with it: many clips of a kind are answered as in testing, one clip alone is a batch of one, where
transport does nothing."""

EXAMPLES = """\
examples:
  parrot predict speech.wav --model runs/demo/model
  parrot predict *.wav --model runs/crema-d/model --json > answers.json"""


def add_parser(commands: Subparsers) -> None:
    parser = new_command(commands, "predict", run, "tell the emotion of recordings", DESCRIPTION, EXAMPLES)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recordings")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a folder that demo or train wrote: .../model"
    )
    parser.add_argument(
        "--encoders", nargs="+", metavar="SPEC", help="where the model's encoders are now, if they have moved"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from parrot import report, training
    from parrot.corpora.audio import AudioError, load_waveform
    from parrot.model import from_pretrained

    model = from_pretrained(args.model)
    description = model.description
    encoders = _model_encoders(args, description["encoders"])

    embedded: list[list[np.ndarray]] = []
    answers: list[dict[str, Any]] = []
    for path in args.files:
        try:
            rows = []
            for encoder in encoders:
                device = next(encoder.parameters()).device
                waveform = load_waveform(path, encoder.sample_rate, encoder.min_samples)
                with torch.inference_mode():
                    rows.append(encoder.embed(torch.from_numpy(waveform)[None].to(device))[0].float().cpu().numpy())
        except AudioError as error:
            answers.append({"file": str(path), "error": error.reason})
        else:
            embedded.append(rows)
            answers.append({"file": str(path)})
    good = [answer for answer in answers if "error" not in answer]
    if good:
        features = [np.stack(rows) for rows in zip(*embedded, strict=True)]
        logits = training.predict(model, features, description["batch_size"])
        for answer, row in zip(good, torch.from_numpy(logits).double().softmax(1).tolist(), strict=True):
            answer["emotion"] = description["labels"][int(np.argmax(row))]
            answer["probabilities"] = dict(zip(description["labels"], row, strict=True))

    transports = description["system"] in report.TRANSPORTS
    if args.json:
        print(
            json.dumps({"system": description["system"], "batch_dependent": transports, "answers": answers}, indent=1)
        )
    else:
        _print_answers(good)
        if good and transports:
            print(_batch_note(len(good), description["batch_size"]))
        if good and (description["synthetic"] or any(encoder["random"] for encoder in description["encoders"])):
            print("This model was trained on synthetic speech or random encoders: expect nothing of it on real speech.")
    for answer in answers:
        if "error" in answer:
            print(f"parrot predict: error: {answer['file']}: {answer['error']}", file=sys.stderr)
    return 0 if len(good) == len(answers) else 2


def _model_encoders(args: argparse.Namespace, wanted: Sequence[dict[str, Any]]) -> list[Encoder]:
    """The encoders that the model was trained on, known by their fingerprints."""
    specs = args.encoders or [encoder["spec"] for encoder in wanted]
    if len(specs) != len(wanted):
        raise ValueError(f"--encoders must be {len(wanted)}, as the model was trained on; got {len(specs)}.")
    encoders = load_encoders(specs, False, args.device)
    for spec, encoder, facts in zip(specs, encoders, wanted, strict=True):
        if encoder.fingerprint != facts["fingerprint"]:
            raise ValueError(
                f"the model was trained on the encoder {facts['spec']!r} with fingerprint {facts['fingerprint'][:16]}; "
                f"{spec!r} has {encoder.fingerprint[:16]}, so its weights or settings differ. Name the right one with "
                "--encoders, or train again."
            )
    return encoders


def _print_answers(answers: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not answers:
        return
    table = Table()
    for column in ("file", "emotion", "per cent", "then"):
        table.add_column(column, justify="right" if column == "per cent" else "left", overflow="fold")
    for answer in answers:
        (_, first), *others = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
        others = ", ".join(f"{label} {100 * share:.0f}" for label, share in others[:2])
        table.add_row(Path(answer["file"]).name, answer["emotion"], f"{100 * first:.0f}", others)
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
