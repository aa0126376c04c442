"""A reproduced table beside the published one: JSON, Markdown, LaTeX, CSV, a plot, and lines for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from parrot import published
from parrot.files import write_atomically
from parrot.report import ACCENT, FUSION, INK, SINGLE, STYLE, environment, save_picture
from parrot.reproduce import SYSTEMS, TITLES, CorpusData, Result, Row, paired_test

METRICS = {"wa": "accuracy", "macro_f1": "macro-F1"}
SPLITS = {
    "speaker": "No speaker is in more than one of training, validation and test",
    "stratified": "SPEAKERS ARE ON BOTH SIDES of these splits (stratified by label), which flatters every system",
}
REFERENCE = {"table1": "cnn", "table2": "parrot"}  # what the other systems on the same encoders are tested against


def summary(result: Result) -> list[dict[str, Any]]:
    """One entry per corpus and row, ours and published, in per cent; then the published rows nothing was given for."""
    entries = []
    for corpus in result.corpora:
        for row in result.rows:
            found = published.find(row.encoders, row.system, corpus.name)
            ours = {metric: result.values(corpus.name, row, metric) for metric in METRICS}
            entries.append(
                {
                    "corpus": corpus.name,
                    "encoders": list(row.encoders),
                    "kind": row.kind,
                    "system": row.system,
                    "random": _random(result, row.encoders),
                    "ours": {
                        metric: {"mean": float(v.mean()), "std": float(v.std()), "folds": v.tolist()}
                        for metric, v in ours.items()
                    },
                    "published": found and {"wa": found.accuracy, "macro_f1": found.macro_f1},
                    "test": _test(result, corpus, row),
                }
            )
        known = [set(row.encoders) for row in result.rows]
        for row in published.ROWS:
            if (row.table, row.corpus) == (result.table, corpus.name) and set(row.encoders) not in known:
                entries.append(
                    {
                        "corpus": corpus.name,
                        "encoders": list(row.encoders),
                        "kind": "published only",
                        "system": row.system,
                        "random": [],
                        "ours": None,
                        "published": {"wa": row.accuracy, "macro_f1": row.macro_f1},
                        "test": None,
                    }
                )
    return entries


def _random(result: Result, encoders: Sequence[str]) -> list[str]:
    return [stream.facts.spec for stream in result.streams if stream.name in encoders and stream.facts.random]


def _test(result: Result, corpus: CorpusData, row: Row) -> dict[str, dict[str, float | None]] | None:
    """The reference system against this one on the same encoders, paired by seed and fold."""
    reference = Row(row.encoders, REFERENCE[result.table], row.kind)
    if row == reference:
        return None
    return {
        metric: paired_test(result.values(corpus.name, reference, metric), result.values(corpus.name, row, metric))
        for metric in METRICS
    }


def caveats(result: Result) -> list[str]:
    """What a reader must know before comparing."""
    notes = []
    random = [f"{stream.facts.spec} (as {stream.title})" for stream in result.streams if stream.facts.random]
    if random:
        notes.append(
            f"RANDOM ENCODERS: {', '.join(random)}. Small networks with random weights, nothing pretrained: their rows "
            "show that the experiment runs, and their distance from the published figures means nothing."
        )
    if any(corpus.synthetic for corpus in result.corpora):
        notes.append("The demo corpus is synthetic speech: no published figure is of it, and nothing follows from it.")
    for corpus in result.corpora:
        if corpus.failures:
            notes.append(f"{corpus.title}: {len(corpus.failures)} recordings could not be used and are left out.")
    notes += [
        f"Published: {published.SOURCE}. Means over five folds; neither deviations nor the folds are published.",
        f"Ours: mean ± population deviation over {result.seeds} seed(s) x {result.folds} folds. "
        f"{SPLITS[result.split]}; whether that holds for the published figures is unknown.",
        f"Tests: two-sided, paired by seed and fold, {TITLES[REFERENCE[result.table]]} against the row. Folds share "
        "training data, so p is too small; with 5 pairs Wilcoxon's p is at least 0.0625.",
    ]
    if result.table == "table2":
        notes.append(
            f"Transport joins the clips of a batch of {result.config.batch_size}, in testing too (in corpus order): "
            "with Optimal transport and PARROT a clip's prediction depends on the clips beside it."
        )
    return notes


def write(result: Result, folder: str | Path) -> list[Path]:
    """Write ``TABLE.json``, ``.md``, ``.tex``, ``.csv``, ``_folds.csv`` and ``.png``; returns their paths.

    Nothing in them depends on when, where or in how many pieces the runs were made.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = summary(result)
    document = {
        "table": result.table,
        "source": published.SOURCE,
        "encoders": [{"name": s.name, "mamba": s.mamba, **asdict(s.facts)} for s in result.streams],
        "corpora": [
            {
                "name": corpus.name,
                "utterances": len(corpus.labels),
                "speakers": len(set(corpus.speakers)),
                "labels": list(corpus.label_names),
                "failures": [list(failure) for failure in corpus.failures],
            }
            for corpus in result.corpora
        ],
        "seeds": result.seeds,
        "folds": result.folds,
        "split": result.split,
        "configuration": {**asdict(result.config), "device": result.config.resolved_device().type},
        "rows": entries,
        "caveats": caveats(result),
        "environment": environment(),
    }
    texts = {
        ".json": json.dumps(document, indent=1) + "\n",
        ".md": _markdown(result, entries),
        ".tex": _latex(result, entries),
        ".csv": _csv(entries),
        "_folds.csv": _folds_csv(entries),
    }
    for suffix, text in texts.items():
        write_atomically(folder / f"{result.table}{suffix}", text.encode())
    _plot(result, entries, folder / f"{result.table}.png")
    return [folder / f"{result.table}{suffix}" for suffix in (*texts, ".png")]


# --- cells -----------------------------------------------------------------------------------------------------


def encoders_title(encoders: Sequence[str]) -> str:
    """ "Audio-Mamba base + HuBERT"."""
    known = published.ENCODERS
    return " + ".join(known[name].title if name in known else name for name in encoders)


def ours_cell(entry: dict[str, Any], metric: str) -> str:
    """ "mean ± deviation", or what there is instead."""
    if entry["ours"] is None:
        return "not run"
    return f"{entry['ours'][metric]['mean']:.2f} ± {entry['ours'][metric]['std']:.2f}"


def published_cell(entry: dict[str, Any], metric: str) -> str:
    return f"{entry['published'][metric]:.2f}" if entry["published"] else "–"


def paired_cell(entry: dict[str, Any], metric: str) -> str:
    """ "+difference (p of t, p of Wilcoxon)"."""
    if entry["test"] is None:
        return "–"
    test = entry["test"][metric]
    p = ", ".join("–" if test[name] is None else f"{test[name]:.3f}" for name in ("t_test", "wilcoxon"))
    return f"{test['difference']:+.2f} (p {p})"


def header(result: Result) -> list[str]:
    reference = TITLES[REFERENCE[result.table]]
    return [
        "encoders", "system", "accuracy", "published", "macro-F1", "published", f"{reference} minus row, accuracy",
    ]  # fmt: skip


def cells(entry: dict[str, Any]) -> list[str]:
    name = encoders_title(entry["encoders"]) + (" (RANDOM)" if entry["random"] else "")
    figures = [cell(entry, metric) for metric in METRICS for cell in (ours_cell, published_cell)]
    return [name, TITLES[entry["system"]], *figures, paired_cell(entry, "wa")]


def of_corpus(entries: Sequence[dict[str, Any]], corpus: CorpusData) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["corpus"] == corpus.name]


def fold_rows(result: Result, entries: Sequence[dict[str, Any]], metric: str) -> list[list[str]]:
    """Encoders, system, seed, and the value of every fold."""
    return [
        [encoders_title(entry["encoders"]), TITLES[entry["system"]], str(seed), *(f"{value:.2f}" for value in values)]
        for entry in entries
        if entry["ours"] is not None
        for seed, values in enumerate(entry["ours"][metric]["folds"])
    ]


# --- documents -------------------------------------------------------------------------------------------------


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _title(result: Result) -> str:
    what = "single encoders" if result.table == "table1" else "pairs of encoders"
    return f"Table {result.table[-1]} of PARROT: {what}, in per cent"


def _markdown(result: Result, entries: list[dict[str, Any]]) -> str:
    lines = [f"# {_title(result)}", "", *(f"- {note}" for note in caveats(result)), ""]
    lines += [f"![Ours and the published figures]({result.table}.png)", ""]
    for corpus in result.corpora:
        mine = of_corpus(entries, corpus)
        lines += [
            f"## {corpus.title}",
            "",
            f"{len(corpus.labels)} utterances of {len(set(corpus.speakers))} speakers, "
            f"{len(corpus.label_names)} emotions.",
            "",
            *_markdown_table(header(result), [cells(entry) for entry in mine]),
        ]
        for metric, title in METRICS.items():
            head = [title, "system", "seed", *(f"fold {k + 1}" for k in range(result.folds))]
            lines += _markdown_table(head, fold_rows(result, mine, metric))
        if corpus.failures:
            lines += ["Left out:", "", *(f"- `{name}`: {reason}" for name, reason in corpus.failures), ""]
    lines += ["## Encoders", ""]
    lines += _markdown_table(
        ["encoder", "spec", "values", "weights", "fingerprint"],
        [
            [
                s.title, f"`{s.facts.spec}`", str(s.facts.embedding_dim),
                "random" if s.facts.random else "from the checkpoint", f"`{s.facts.fingerprint[:16]}`",
            ]
            for s in result.streams
        ],
    )  # fmt: skip
    return "\n".join(lines)


def _latex(result: Result, entries: list[dict[str, Any]]) -> str:
    """A table for \\usepackage{booktabs}; the notes are comments above it."""
    lines = [f"% {note}" for note in caveats(result)]
    lines += [
        r"\begin{tabular}{llrrrr}",
        r"\toprule",
        r"encoders & system & accuracy & published & macro-F1 & published \\",
    ]
    for corpus in result.corpora:
        lines += [r"\midrule", rf"\multicolumn{{6}}{{l}}{{{_escape(corpus.title)}}} \\"]
        for entry in of_corpus(entries, corpus):
            row = " & ".join(_escape(cell) for cell in cells(entry)[:6])
            lines.append(row.replace("±", r"$\pm$").replace("–", "--") + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)


def _csv(entries: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f"{metric}_{part}" for metric in METRICS for part in ("mean", "std", "published", "difference", "t", "w")]
    writer.writerow(["corpus", "encoders", "kind", "system", "random_encoders", *names])
    for entry in entries:
        figures: list[Any] = []
        for metric in METRICS:
            ours, theirs = entry["ours"], entry["published"]
            test = entry["test"][metric] if entry["test"] else {"difference": "", "t_test": "", "wilcoxon": ""}
            figures += [
                ours[metric]["mean"] if ours else "", ours[metric]["std"] if ours else "",
                theirs[metric] if theirs else "", test["difference"], test["t_test"], test["wilcoxon"],
            ]  # fmt: skip
        writer.writerow(
            [entry["corpus"], "+".join(entry["encoders"]), entry["kind"], entry["system"], " ".join(entry["random"]),
             *figures]
        )  # fmt: skip
    return out.getvalue()


def _folds_csv(entries: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["corpus", "encoders", "system", "seed", "fold", *METRICS])
    for entry in entries:
        for seed, values in enumerate(entry["ours"]["wa"]["folds"] if entry["ours"] else []):
            for fold in range(len(values)):
                figures = [entry["ours"][metric]["folds"][seed][fold] for metric in METRICS]
                writer.writerow([entry["corpus"], "+".join(entry["encoders"]), entry["system"], seed, fold, *figures])
    return out.getvalue()


def _plot(result: Result, entries: list[dict[str, Any]], path: Path) -> None:
    """Per corpus: our mean accuracy with its deviation and every fold, and a diamond where a figure is published."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with matplotlib.rc_context(STYLE):
        parts = [(corpus, of_corpus(entries, corpus)) for corpus in result.corpora]
        heights = [len(part) for _, part in parts]
        figure = Figure(figsize=(8.4, 1.0 * len(parts) + 0.34 * sum(heights) + 0.4), layout="constrained")
        axes = figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0]
        for ax, (corpus, part) in zip(axes, parts, strict=True):
            for y, entry in enumerate(part):
                system = entry["system"]
                if entry["ours"] is not None:
                    wa = entry["ours"]["wa"]
                    colour = ACCENT if system == "parrot" else FUSION if system in SYSTEMS["table2"] else SINGLE
                    ax.barh(y, wa["mean"], height=0.66, color=colour, linewidth=0)
                    ax.errorbar(wa["mean"], y, xerr=wa["std"], color=INK, capsize=3, linewidth=1.2, zorder=3)
                    folds = np.ravel(wa["folds"])
                    ax.scatter(folds, [y + 0.2] * len(folds), s=9, facecolor="white", edgecolor=INK, linewidth=0.6)
                if entry["published"]:
                    ax.scatter(entry["published"]["wa"], y, marker="D", s=34, facecolor="none", edgecolor=INK, zorder=4)
            names = [", ".join(cells(entry)[:2]) for entry in part]
            ax.set_yticks(range(len(part)), names, fontsize=8)
            ax.set_ylim(len(part) - 0.5, -0.5)
            ax.set_xlim(0, 100)
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="x")
            ax.set_title(corpus.title + (" (RANDOM ENCODERS)" if any(e["random"] for e in part) else ""))
        axes[-1].set_xlabel("accuracy, %: mean and deviation of ours, every fold as a dot")
        if any(entry["published"] for entry in entries):
            diamond = Line2D([], [], marker="D", color="none", markeredgecolor=INK, markerfacecolor="none")
            figure.legend([diamond], ["published"], loc="outside lower right", fontsize=9)
        save_picture(figure, path)
