"""The report of a cross-validation: report.json, report.md and four plots."""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parrot.evaluation import METRICS, CrossValidation
from parrot.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT = 1
METRIC_TITLES = {"wa": "WA (accuracy)", "ua": "UA (balanced accuracy)", "macro_f1": "macro-F1"}
FUSION_TITLES = {
    "concat": "Concatenation",
    "hadamard": "Hadamard only",
    "ot": "OT only",
    "parrot": "PARROT",
    "parrot-unrolled": "PARROT, gradient through the plan",
    "parrot-unbalanced": "PARROT, unbalanced transport",
    "parrot-reference": "PARROT, transport among references",
    "parrot-first-pairs": "PARROT, each with the first encoder",
    "parrot-layers": "PARROT, learned layer weights",
    "parrot-finetuned": "PARROT, fine-tuned encoders",
    "parrot-frames": "PARROT, transport between frames",
    "parrot-learned-eps": "PARROT, learned eps",
    "parrot-annealed-eps": "PARROT, annealed eps",
}
# Systems whose predictions depend on the batch.
TRANSPORTS = (
    "ot",
    *(s for s in FUSION_TITLES if s.startswith("parrot") and s not in ("parrot-reference", "parrot-frames")),
)


@dataclass(frozen=True)
class EncoderFacts:
    """One encoder of an experiment, as :class:`parrot.encoders.Encoder` has it.

    ``random``: its weights are random, not pretrained.
    """

    spec: str
    name: str
    embedding_dim: int
    fingerprint: str
    random: bool
    sample_rate: int = 16000
    normalisation: str = "as decoded"


@dataclass(frozen=True)
class Experiment:
    """What a cross-validation was run on.

    Attributes:
        corpus: name of the corpus.
        utterances: number of utterances used.
        speakers: number of their speakers.
        synthetic: whether no human spoke.
        encoders: in the order of the systems' streams.
        failures: (file name, reason) of utterances that could not be used.
    """

    corpus: str
    utterances: int
    speakers: int
    synthetic: bool
    encoders: tuple[EncoderFacts, ...]
    failures: tuple[tuple[str, str], ...] = ()

    def title(self, system: str) -> str:
        """A system's name for people."""
        if system in FUSION_TITLES:
            return FUSION_TITLES[system]
        head, _, stream = system.partition("-")
        if stream.isdigit() and int(stream) < len(self.encoders):
            return f"{self.encoders[int(stream)].name}, {head.upper()}"
        return system


def environment() -> dict[str, Any]:
    """Versions and hardware that figures may depend on."""
    import torch

    versions = {}
    for name in ("parrot-kernels", "torch", "triton", "transformers", "numpy", "scipy", "scikit-learn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__
    return {
        "python": platform.python_version(),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def chance(results: CrossValidation) -> float:
    """Accuracy of always answering the commonest class: 1 / n_classes for a balanced corpus."""
    counts = results.confusion(next(iter(results.systems))).sum(axis=1)
    return float(counts.max() / counts.sum())


def percent(entry: dict[str, Any]) -> str:
    """ "mean ± deviation" in per cent."""
    return f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"


def caveats(results: CrossValidation, experiment: Experiment) -> list[str]:
    """What a reader must know before reading the figures."""
    notes = []
    if experiment.synthetic:
        notes.append(
            "**The corpus is synthetic.** No human spoke: a speech synthesiser read the sentences, and each emotion "
            "is a set of prosody rules. The figures show that the software works from WAV files to this report; "
            "they say nothing about recognising emotion in human speech."
        )
    random = [e.name for e in experiment.encoders if e.random]
    if random:
        notes.append(
            f"**Random encoders: {' and '.join(random)}.** Small networks of the real architectures with random "
            "weights from a fixed seed. Nothing was pretrained, so nothing follows about pretrained encoders, nor "
            "about which fusion is better on them."
        )
    if experiment.synthetic or random:
        notes.append(
            "**Not comparable with published figures.** Those of PARROT (arXiv 2506.01138) were obtained with "
            "pretrained encoders on recorded speech."
        )
    else:
        notes.append(
            "**Comparing with published figures** (PARROT, arXiv 2506.01138) needs the same split; theirs is "
            "unpublished. Here no speaker is in more than one of training, validation and test."
        )
    if any(system in TRANSPORTS for system in results.systems):
        notes.append(
            f"**Transport joins the clips of a batch.** PARROT and OT only solve one transport problem per batch of "
            f"{results.config.batch_size} clips, in testing too (in corpus order), so a clip's prediction depends on "
            "the clips beside it."
        )
    notes.append(
        f"± is the population standard deviation over {len(results.fold_sizes)} folds, the spread between groups of "
        "speakers. Differences smaller than it are not evidence that one system is better."
    )
    return notes


def write(results: CrossValidation, folder: str | Path, experiment: Experiment) -> Path:
    """Write ``report.json``, ``report.md`` and the plots into ``folder``; returns the path of ``report.md``.

    Nothing in them depends on when or where they were written: equal results give equal files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = to_json(results, experiment)
    pictures = _plots(results, experiment, folder)
    write_atomically(folder / "report.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(folder / "report.md", _markdown(results, experiment, document, pictures).encode())
    return folder / "report.md"


def to_json(results: CrossValidation, experiment: Experiment) -> dict[str, Any]:
    """The whole report as JSON-able values; metrics are fractions, not per cent."""
    summary = results.summary()
    systems = {}
    for system, folds in results.systems.items():
        systems[system] = {
            "title": experiment.title(system),
            "metrics": summary[system],
            "confusion": results.confusion(system).tolist(),
            "folds": [
                {
                    "fold": result.fold,
                    "metrics": result.metrics,
                    "best_epoch": result.training.best_epoch,
                    "seconds": result.training.seconds,
                    "history": result.training.history,
                }
                for result in folds
            ],
        }
    return {
        "format": FORMAT,
        "experiment": asdict(experiment),
        "labels": list(results.label_names),
        "chance": chance(results),
        "configuration": {**asdict(results.config), "device": results.config.resolved_device().type},
        "seed": results.seed,
        "folds": results.fold_sizes,
        "systems": systems,
        "caveats": [note.replace("**", "") for note in caveats(results, experiment)],
        "environment": environment(),
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _markdown(
    results: CrossValidation, experiment: Experiment, document: dict[str, Any], pictures: dict[str, str]
) -> str:
    systems = document["systems"]
    folds = range(len(results.fold_sizes))
    encoders = " and ".join(f"{e.name} ({e.embedding_dim} values)" for e in experiment.encoders)
    lines = [
        f"# PARROT and its baselines on {experiment.corpus}",
        "",
        f"{experiment.utterances} utterances of {experiment.speakers} {'synthetic ' if experiment.synthetic else ''}"
        f"speakers, {len(results.label_names)} emotions; encoders {encoders}; {len(folds)} speaker-disjoint folds. "
        f"Chance is {100 * document['chance']:.1f} %.",
        "",
        "## Results",
        "",
        "Per cent, mean ± standard deviation over the folds.",
        "",
        *_table(
            ["system", *METRIC_TITLES.values()],
            [[s["title"], *(percent(s["metrics"][m]) for m in METRICS)] for s in systems.values()],
        ),
    ]
    lines += [f"![{text}]({name})\n" for name, text in pictures.items() if name == "comparison.png"]
    lines += ["## How to read them", "", *(f"- {note}" for note in caveats(results, experiment)), ""]
    if len(pictures) > 1:
        lines += ["## Plots", "", *(f"![{t}]({n})\n" for n, t in pictures.items() if n != "comparison.png")]
    lines += ["## Every fold", ""]
    for metric in METRICS:
        rows = [
            [s["title"], *(f"{100 * value:.1f}" for value in s["metrics"][metric]["folds"])] for s in systems.values()
        ]
        lines += _table([METRIC_TITLES[metric], *(f"fold {k + 1}" for k in folds)], rows)
    lines += _table(
        ["utterances", *(f"fold {k + 1}" for k in folds)],
        [[part, *(str(size[part]) for size in results.fold_sizes)] for part in ("train", "validation", "test")],
    )
    config, facts = document["configuration"], document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines += [
        "## Settings",
        "",
        f"- Training: Adam, learning rate {config['learning_rate']:g}, batches of {config['batch_size']}, at most "
        f"{config['epochs']} epochs, patience {config['patience']} on the validation cross-entropy, best weights "
        f"restored; device {config['device']}.",
        f"- Seed {results.seed}: folds from it, models, shuffling and dropout of fold k from "
        f"100 x {results.seed} + k, k from 0.",
        *(
            f"- Encoder {e.name}: `{e.spec}`, {e.embedding_dim} values, fingerprint `{e.fingerprint[:16]}`"
            f"{', random weights' if e.random else ''}."
            for e in experiment.encoders
        ),
        f"- Python {facts['python']}, {versions}; {facts['processor']}"
        f"{', ' + facts['gpu'] if facts['gpu'] else ''}, {facts['system']}.",
        "",
        "All figures, learning curves and confusion matrices are in [report.json](report.json).",
        "",
    ]
    if experiment.failures:
        lines += ["## Left out", "", "These files could not be used:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in experiment.failures] + [""]
    return "\n".join(lines)


# --- plots -----------------------------------------------------------------------------------------------------
# Colours of Okabe and Ito, which colour-blind readers tell apart: one accent for PARROT, blue for the other
# fusions, grey for single encoders.

INK, MUTED, GRID = "#222222", "#7a7a7a", "#dddddd"
ACCENT, FUSION, SINGLE = "#d55e00", "#0072b2", "#9aa3ab"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "figure.dpi": 160,
    "savefig.facecolor": "white",
    "legend.frameon": False,
}


def colour(system: str) -> str:
    return ACCENT if system == "parrot" else FUSION if system in FUSION_TITLES else SINGLE


def _plots(results: CrossValidation, experiment: Experiment, folder: Path) -> dict[str, str]:
    """Draw and save the plots; returns file name -> caption."""
    import matplotlib

    focus = next((s for s in ("parrot", "ot") if s in results.systems), next(reversed(results.systems)))
    title = experiment.title(focus)
    pictures = {}
    with matplotlib.rc_context(STYLE):
        figures = {
            "comparison.png": (comparison_plot(results, experiment), "Accuracy of each system, with its deviation"),
            "confusion.png": (confusion_plot(results, focus, title), f"Confusion matrix of {title}"),
            "learning_curves.png": (learning_plot(results, experiment), "Learning curves of every fold"),
        }
        first = results.systems[focus][0]
        if first.training.plan is not None:
            labels = first.labels[: len(first.training.plan)]
            figures["transport_plan.png"] = (
                plan_plot(first.training.plan, labels, results.label_names, experiment),
                "Transport plan of one test batch, clips sorted by emotion",
            )
        for name, (figure, caption) in figures.items():
            save_picture(figure, folder / name)
            pictures[name] = caption
    return pictures


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": "parrot-kernels"})
    write_atomically(path, png.getvalue())


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def comparison_plot(results: CrossValidation, experiment: Experiment) -> Figure:
    """Mean accuracy of each system with its deviation, every fold as a dot, and the chance line."""
    summary = results.summary()
    systems = list(summary)
    figure = _figure(7.6, 1.3 + 0.42 * len(systems))
    axes = figure.subplots()
    for row, system in enumerate(systems):
        entry = summary[system]["wa"]
        mean, std = 100 * entry["mean"], 100 * entry["std"]
        axes.barh(row, mean, height=0.62, color=colour(system), alpha=0.9, linewidth=0)
        axes.errorbar(mean, row - 0.1, xerr=std, color=INK, capsize=3, linewidth=1.3, zorder=3)
        folds = [100 * value for value in entry["folds"]]
        axes.scatter(folds, [row + 0.17] * len(folds), s=13, facecolor="white", edgecolor=INK, linewidth=0.7, zorder=4)
        axes.text(
            1.02, row, percent(entry), transform=axes.get_yaxis_transform(), va="center",
            weight="bold" if system == "parrot" else "normal",
        )  # fmt: skip
    level = 100 * chance(results)
    axes.axvline(level, color=INK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=2)
    axes.text(level, -0.62, f" chance {level:.1f} %", va="bottom", ha="left", fontsize=9)
    axes.set_yticks(range(len(systems)), [experiment.title(system) for system in systems])
    axes.set_ylim(len(systems) - 0.5, -1.0)
    reach = max(max(e["wa"]["mean"] + e["wa"]["std"], *e["wa"]["folds"]) for e in summary.values())
    axes.set_xlim(0, min(100, 10 * np.ceil(10 * reach + 0.3)))
    axes.set_xlabel("accuracy on unseen speakers, %: mean and deviation, and every fold")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_title(f"Accuracy on {experiment.corpus}")
    return figure


def confusion_plot(results: CrossValidation, system: str, title: str) -> Figure:
    """Confusion matrix over all folds, in per cent of the true class."""
    counts = results.confusion(system)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(counts)
    figure = _figure(max(4.8, 1.6 + 0.8 * n), max(3.4, 1.3 + 0.7 * n))
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i in range(n):
        for j in range(n):
            ink, weight = "white" if share[i, j] > 55 else INK, "bold" if i == j else "normal"
            axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=ink, weight=weight)
    _name_axes(axes, range(n), results.label_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{title}, % of each true emotion")
    return figure


def _name_axes(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    turn = {} if max(map(len, names)) <= 8 else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(places, names, **turn)
    axes.set_yticks(places, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plan_plot(plan: np.ndarray, labels: np.ndarray, names: Sequence[str], experiment: Experiment) -> Figure:
    """Heat map of a transport plan, rows and columns sorted by emotion; 1 is the plan that tells nothing apart."""
    from matplotlib.colors import LogNorm

    order = np.argsort(labels, kind="stable")
    mass = plan[np.ix_(order, order)] * plan.size / plan.sum()
    top = max(1.05, float(mass.max()))
    present, sizes = np.unique(labels, return_counts=True)
    ends = np.cumsum(sizes)
    figure = _figure(7.2, 6.0)
    axes = figure.subplots()
    norm = LogNorm(1 / top, top, clip=True)
    image = axes.imshow(mass, cmap="PuOr_r", norm=norm, interpolation="nearest")
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color=INK, linewidth=0.9)
        axes.axvline(end - 0.5, color=INK, linewidth=0.9)
    _name_axes(axes, ends - (sizes + 1) / 2, [names[k] for k in present])
    streams = [e.name for e in experiment.encoders] + ["stream 1", "stream 2"][len(experiment.encoders) :]
    axes.set_xlabel(f"clips as {streams[1]} hears them")
    axes.set_ylabel(f"clips as {streams[0]} hears them")
    axes.set_title(f"Transport plan of one test batch, {len(plan)} clips")
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.03)
    ticks = [top**power for power in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" if tick < 10 else f"{tick:.0f}" for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("mass, in multiples of the uniform plan's")
    return figure


def learning_plot(results: CrossValidation, experiment: Experiment) -> Figure:
    """One panel a system: cross-entropy of every fold over the epochs, a dot where the weights were taken."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    systems = list(results.systems)
    columns = min(4, len(systems))
    rows = -(-len(systems) // columns)
    figure = _figure(2.5 * columns + 0.4, 2.15 * rows + 0.75)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    top = 0.0
    for axes, system in zip(grid.flat, systems, strict=False):
        for result in results.systems[system]:
            history = result.training.history
            epochs = range(1, len(history["train_loss"]) + 1)
            axes.plot(epochs, history["train_loss"], color=MUTED, linewidth=0.9, alpha=0.8)
            axes.plot(epochs, history["validation_loss"], color=FUSION, linewidth=1.1, alpha=0.85)
            best = result.training.best_epoch
            axes.plot(
                best, history["validation_loss"][best - 1], "o", color=FUSION, markersize=4.5,
                markeredgecolor="white", markeredgewidth=0.8,
            )  # fmt: skip
            top = max(top, history["train_loss"][0], history["validation_loss"][0])
        axes.set_title(experiment.title(system), fontsize=10, pad=5)
        axes.grid()
    for axes in grid.flat[len(systems) :]:
        axes.set_visible(False)
    grid.flat[0].set_ylim(0, 1.5 * top)
    grid.flat[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [
        Line2D([], [], color=MUTED, linewidth=1.2, label="training"),
        Line2D([], [], color=FUSION, linewidth=1.2, label="validation"),
        Line2D([], [], color=FUSION, marker="o", linestyle="", markeredgecolor="white", label="weights kept"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("cross-entropy, one line a fold", fontsize=10)
    return figure
