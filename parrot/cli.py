"""The command ``parrot``: demo, features, train, predict, info."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch and its company take seconds to import: `parrot --help` does without them
    import numpy as np

    from parrot.corpora import Corpus
    from parrot.encoders import Encoder
    from parrot.evaluation import CrossValidation
    from parrot.report import EncoderFacts, Experiment
    from parrot.training import TrainingConfig

DEMO_ENCODERS = ("ssam-demo", "hubert-demo")
MODEL_FORMAT = 1

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

`parrot COMMAND --help` tells more. Work that is done is kept: run a command again to go on with it."""

HELP = {
    "demo": """\
Make a small corpus of synthetic speech, embed it with two small random encoders, train PARROT and its baselines
on speaker-disjoint folds, and report. Needs no data and no network. The figures show that everything works, not
how well emotion is recognised. A second run reuses everything and gives the same figures.""",
    "features": """\
Embed a corpus with one or more encoders and keep the embeddings in a cache, which `parrot train` reads. A file
that can't be used is listed and the others are kept; a run that was stopped goes on where it was.""",
    "train": """\
Cross-validate systems on a corpus over speaker-disjoint folds, report, and train one of them on all speakers as a
model for `parrot predict`. The systems: fcn-K and cnn-K (encoder K alone, from 0), concat, hadamard, ot, parrot.""",
    "predict": """\
Tell the emotion of recordings with a trained model. WAV, FLAC, OGG and MP3 files of any rate are read.

PARROT and OT only solve one transport problem per batch of clips, so there the answer for a clip depends on the
clips given with it: many clips of a kind are answered as in testing, one clip alone is a batch of one, where
transport does nothing.""",
    "info": "Show the encoders, corpora and systems there are, and which kernels serve on this machine.",
}

HELP_EXAMPLES = {
    "demo": """\
examples:
  parrot demo
  parrot demo --output runs/small --voices 5 --sentences 2 --epochs 10
  parrot demo --seed 1 --workers 4""",
    "features": """\
examples:
  parrot features --corpus crema-d data/CREMA-D --encoder ssam:ssam_base.pth hubert:models/hubert-base
  parrot features --corpus crema-d data/CREMA-D --encoder hubert:facebook/hubert-base-ls960 --download""",
    "train": """\
examples:
  parrot train --corpus crema-d data/CREMA-D --encoders ssam:ssam_base.pth hubert:models/hubert-base
  parrot train --corpus crema-d data/CREMA-D --encoders ssam-demo hubert-demo --systems concat parrot --epochs 5
  parrot train --corpus crema-d data/CREMA-D --encoders hubert:models/hubert-base --systems fcn-0 cnn-0""",
    "predict": """\
examples:
  parrot predict speech.wav --model runs/demo/model
  parrot predict *.wav --model runs/crema-d/model --json > answers.json""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0, 2 after an error, 130 when interrupted."""
    args = _parser().parse_args(argv)
    showwarning = warnings.showwarning
    if not args.debug:
        warnings.showwarning = _show_warning
    try:
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


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. Install what the pipeline needs: pip install 'parrot-kernels[demo]'"
    if isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"parrot: warning: {message}", file=file or sys.stderr)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="parrot", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=HELP[name], epilog=HELP_EXAMPLES.get(name), formatter_class=formatter,
            allow_abbrev=False,
        )  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    demo = command("demo", _demo, "train and compare everything on a corpus made here")
    demo.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="everything goes here (%(default)s)"
    )
    demo.add_argument("--voices", type=int, default=10, metavar="N", help="speakers of the corpus (%(default)s)")
    demo.add_argument("--sentences", type=int, default=4, metavar="N", help="sentences of each (%(default)s)")
    _training_options(demo)

    features = command("features", _features, "embed a corpus and keep the embeddings")
    _corpus_option(features)
    features.add_argument(
        "--encoder", required=True, nargs="+", metavar="SPEC", help="see `parrot info` for what there is"
    )
    _cache_options(features)
    features.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")

    train = command("train", _train, "cross-validate, report, and save a model")
    _corpus_option(train)
    train.add_argument(
        "--encoders", required=True, nargs="+", metavar="SPEC", help="one or two; see `parrot info` for what there is"
    )
    train.add_argument("--output", type=Path, metavar="DIR", help="report and model go here (runs/NAME)")
    train.add_argument(
        "--final", metavar="SYSTEM", help="the system saved as a model (parrot if it is trained, else the last)"
    )
    _cache_options(train)
    _training_options(train)

    predict = command("predict", _predict, "tell the emotion of recordings")
    predict.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recordings")
    predict.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a folder that demo or train wrote: .../model"
    )
    predict.add_argument(
        "--encoders", nargs="+", metavar="SPEC", help="where the model's encoders are now, if they have moved"
    )
    predict.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    predict.add_argument("--json", action="store_true", help="print JSON")

    command("info", _info, "show encoders, corpora, systems and kernels")
    return parser


def _corpus_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus", required=True, nargs=2, metavar=("NAME", "DIR"), help="a corpus that `parrot info` lists, and where"
    )


def _cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/features"),
        metavar="DIR",
        help="embeddings are kept here (%(default)s)",
    )
    parser.add_argument("--download", action="store_true", help="let encoders be fetched from the Hugging Face Hub")


def _training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", help="what to train (everything there is)")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="speaker-disjoint folds (%(default)s)")
    parser.add_argument("--epochs", type=int, default=50, metavar="N", help="the most epochs (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="clips in a batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of folds and training (%(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that train (all cores; 1 on a GPU); figures don't depend on it",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")


# --- commands --------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from parrot import corpora
    from parrot.corpora import demo, splits

    started = time.perf_counter()
    config = _training_config(args)
    splits.speaker_folds([str(voice) for voice in range(args.voices)], args.folds)  # says at once if too few
    root = demo.synthesise(args.output / "corpus", args.voices, args.sentences)
    args.encoders, args.cache, args.download, args.final = list(DEMO_ENCODERS), args.output / "features", False, None
    _run_experiment(corpora.load("demo", root), args, config, synthetic=True, started=started)
    clip = next(iter(sorted((root / "AudioWAV").glob("*.wav"))))
    print(f"Try      parrot predict {clip} --model {args.output / 'model'}")
    return 0


def _features(args: argparse.Namespace) -> int:
    from parrot import features

    corpus = _load_corpus(args.corpus)
    for encoder in _load_encoders(args.encoder, args.download, args.device):
        table = features.extract(corpus, encoder, args.cache)
        print(
            f"{encoder.name}: {len(table.values)} of {len(corpus)} utterances, {encoder.embedding_dim} values each, "
            f"{table.reused} from the cache {args.cache}"
        )
        for path, reason in table.failures:
            print(f"  left out {path}: {reason}")
    return 0


def _train(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    config = _training_config(args)
    corpus = _load_corpus(args.corpus)
    args.output = args.output or Path("runs") / corpus.name
    _run_experiment(corpus, args, config, synthetic=corpus.name == "demo", started=started)
    return 0


def _training_config(args: argparse.Namespace) -> TrainingConfig:
    from parrot.training import TrainingConfig

    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more; got {args.seed}.")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers must be 1 or more; got {args.workers}.")
    config = TrainingConfig(epochs=args.epochs, batch_size=args.batch_size, device=args.device)
    config.resolved_device()
    return config


def _load_corpus(corpus: Sequence[str]) -> Corpus:
    from parrot import corpora

    return corpora.load(*corpus)


def _load_encoders(specs: Sequence[str], download: bool, device: str) -> list[Encoder]:
    from parrot import encoders
    from parrot.training import TrainingConfig

    where = TrainingConfig(device=device).resolved_device()
    return [encoders.load(spec, download=download).to(where) for spec in specs]


def _encoder_facts(specs: Sequence[str], encoders: Sequence[Encoder]) -> tuple[EncoderFacts, ...]:
    from parrot.report import EncoderFacts

    return tuple(
        EncoderFacts(spec, encoder.name, encoder.embedding_dim, encoder.fingerprint, random=spec.endswith("-demo"))
        for spec, encoder in zip(specs, encoders, strict=True)
    )


def _run_experiment(
    corpus: Corpus, args: argparse.Namespace, config: TrainingConfig, *, synthetic: bool, started: float
) -> None:
    """Features, folds, training, report, model: what demo and train share."""
    from parrot import evaluation, report
    from parrot.corpora.splits import assert_no_leakage, speaker_folds

    if len(args.encoders) > 2:
        raise ValueError(f"--encoders must be one or two; got {len(args.encoders)}.")
    encoders = _load_encoders(args.encoders, args.download, args.device)
    dims = [encoder.embedding_dim for encoder in encoders]
    systems = _systems(args.systems, dims, len(corpus.labels))
    final = args.final or ("parrot" if "parrot" in systems else systems[-1])
    if final not in systems:
        raise ValueError(f"--final must be one of the systems trained ({', '.join(systems)}); got {final!r}.")
    speaker_folds(corpus.speakers, args.folds)  # says at once if there are too few speakers

    rows, features, failures = _embed_corpus(corpus, encoders, args.cache)
    speakers = [corpus.speakers[row] for row in rows]
    labels = corpus.targets[rows]
    folds = speaker_folds(speakers, args.folds, args.seed)
    for fold in folds:
        assert_no_leakage(fold, speakers)
    results = evaluation.cross_validate(
        systems, features, labels, folds, corpus.labels, config=config, seed=args.seed, workers=args.workers,
        store=args.output / "results",
    )  # fmt: skip
    experiment = report.Experiment(
        "the spoken demo corpus" if synthetic else corpus.name, len(rows), len(set(speakers)), synthetic,
        _encoder_facts(args.encoders, encoders), failures,
    )  # fmt: skip
    path = report.write(results, args.output, experiment)
    model = evaluation.train_final(
        final, features, labels, evaluation.final_fold(speakers, args.folds, args.seed), corpus.labels,
        args.output / "model", {"format": MODEL_FORMAT, **_origin(experiment)}, config=config, seed=args.seed,
    )  # fmt: skip
    _print_table(results, experiment)
    total = sum(len(folds) for folds in results.systems.values())
    print(
        f"Trained  {total - results.reused} runs, reused {results.reused}; {time.perf_counter() - started:.0f} s in all"
    )
    print(f"Report   {path}")
    print(f"Model    {model} ({experiment.title(final)}, trained on all speakers)")


def _systems(names: Sequence[str] | None, dims: Sequence[int], n_classes: int) -> list[str]:
    """The systems to train, each known to build."""
    import torch

    from parrot import model

    if names is None:
        names = model.SYSTEMS if len(dims) == 2 else ("fcn-0", "cnn-0")
    with torch.device("meta"):
        for name in names:
            model.build(name, dims, n_classes)
    return list(dict.fromkeys(names))


def _embed_corpus(
    corpus: Corpus, encoders: Sequence[Encoder], cache: Path
) -> tuple[np.ndarray, list[np.ndarray], tuple[tuple[str, str], ...]]:
    """The utterances that all encoders could embed, their features, and (file name, reason) of the others."""
    import numpy as np

    from parrot import features

    tables = [features.extract(corpus, encoder, cache) for encoder in encoders]
    rows = tables[0].indices
    for table in tables[1:]:
        rows = np.intersect1d(rows, table.indices)
    failures = {str(path.name): reason for table in tables for path, reason in table.failures}
    return rows, [t.values[np.searchsorted(t.indices, rows)] for t in tables], tuple(sorted(failures.items()))


def _origin(experiment: Experiment) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "corpus": experiment.corpus,
        "synthetic": experiment.synthetic,
        "encoders": [asdict(encoder) for encoder in experiment.encoders],
    }


def _print_table(results: CrossValidation, experiment: Experiment) -> None:
    from rich.console import Console
    from rich.table import Table

    from parrot import report

    table = Table()
    table.add_column("system")
    for title in report.METRIC_TITLES.values():
        table.add_column(title, justify="right", no_wrap=True)
    for system, entry in results.summary().items():
        style = "bold" if system == "parrot" else None
        table.add_row(experiment.title(system), *(report.percent(entry[m]) for m in report.METRIC_TITLES), style=style)
    notes = []
    if experiment.synthetic:
        notes.append("The corpus is synthetic: the figures show that everything works, no more.")
    if any(encoder.random for encoder in experiment.encoders):
        notes.append("The encoders are random, not pretrained.")
    print(
        f"\n{experiment.utterances} utterances of {experiment.speakers} speakers, {len(results.fold_sizes)} "
        f"speaker-disjoint folds; per cent, mean ± deviation over folds; chance is {100 * report.chance(results):.1f}"
    )
    Console().print(table)
    print("\n".join(notes) + "\n" if notes else "")


def _predict(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from parrot import report, training
    from parrot.corpora.audio import AudioError, load_waveform
    from parrot.model import build

    weights, description = training.load_checkpoint(args.model)
    if description.get("format") != MODEL_FORMAT:
        raise ValueError(
            f"{args.model} holds a model of format {description.get('format')!r}; this version reads {MODEL_FORMAT}. "
            "Train it again."
        )
    model = build(description["system"], description["dims"], len(description["labels"]))
    model.load_state_dict(weights)
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
    encoders = _load_encoders(specs, False, args.device)
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


def _info(args: argparse.Namespace) -> int:
    import runpy

    from parrot import corpora, encoders
    from parrot.model import SYSTEMS

    print("encoders  " + ", ".join(encoders.available()))
    print("corpora   " + ", ".join(corpora.available()))
    print("systems   " + ", ".join(SYSTEMS) + "\n")
    try:
        runpy.run_module("parrot_kernels", run_name="__main__")  # the doctor
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0
