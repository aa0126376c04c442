"""Model cards: a README in Markdown with the header that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from parrot.report import METRIC_TITLES, TRANSPORTS, Experiment, caveats, chance, percent

if TYPE_CHECKING:
    from parrot.evaluation import CrossValidation

HUB_METRICS = {"wa": "accuracy", "ua": "balanced_accuracy", "macro_f1": "f1"}
FEATURES = {
    "embeddings": "(batch, width) tensors",
    "layers": "(batch, layers + 1, width) tensors: the mean over time of every hidden state",
    "frames": "(batch, frames, width) tensors, or pairs of them and the lengths",
    "waveforms": "(batch, samples) tensors, or pairs of them and the lengths",
}
PAPER = "[arXiv 2506.01138](https://arxiv.org/abs/2506.01138)"
TASK = ("audio-classification", "Speech emotion recognition")

PURPOSE = """\
For research on speech emotion recognition. A class is the one of a few labels that fits a clip best by the data the
model was trained on, not what a person feels; do not decide about people with it."""

USE = """\
```sh
parrot predict clip.wav --model THIS_FOLDER --json
```

```python
import parrot

model = parrot.from_pretrained("THIS_FOLDER")
model.description["labels"], model.description["encoders"]
logits = model(*features)  # one per encoder: FEATURES
```"""

BATCH = """\
**Predictions depend on the batch.** As in the paper, transport joins the clips of a batch, here {batch_size}: with
other clips beside it a clip's answer may differ, and one clip alone is a batch of one, where transport does nothing.
Models trained as `parrot-reference` or `parrot-frames` don't have this property."""
ALONE = "A clip's prediction does not depend on other clips."


FROZEN = """\
They are not in this folder; `parrot predict --encoders SPEC ...` says where they are, and a fingerprint of their
weights and settings keeps others out. Embeddings are not standardised."""
TRAINED = """\
Their weights were trained on with the model's and are in this folder. Their specs must be found all the same, where
they were: they say how the encoders are built, and a fingerprint keeps others out. Embeddings are not standardised."""


def run_card(description: dict[str, Any], results: CrossValidation, experiment: Experiment) -> str:
    """The card of a model that ``parrot train`` made.

    Args:
        description: as in :class:`parrot.sharing.Shareable`.
        results: the cross-validation of its system among others.
        experiment: what it ran on.
    """
    from huggingface_hub import EvalResult, ModelCardData

    from parrot.model import inputs_of

    system, summary = description["system"], results.summary()
    title = experiment.title(system)
    scores = [
        EvalResult(
            *TASK[:1], experiment.corpus.lower().replace(" ", "-"), experiment.corpus, HUB_METRICS[metric],
            round(entry["mean"], 4), task_name=TASK[1], metric_name=METRIC_TITLES[metric],
        )
        for metric, entry in summary[system].items()
    ]  # fmt: skip
    header = ModelCardData(
        model_name=f"{title} on {experiment.corpus}", eval_results=scores, metrics=sorted(HUB_METRICS.values()),
        **_common(),
    )  # fmt: skip
    config, sizes, inputs = results.config, results.fold_sizes, inputs_of(system)
    frozen = inputs != "waveforms"
    counts = [fold["test"] for fold in sizes]
    tested = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    encoders = [
        [
            e["name"], f"`{e['spec']}`", f"{e['embedding_dim']}", f"{e['sample_rate']} Hz, {e['normalisation']}",
            "random" if e["random"] else "pretrained", f"`{e['fingerprint'][:16]}`",
        ]
        for e in description["encoders"]
    ]  # fmt: skip
    rows = [
        [f"**{experiment.title(name)}**" if name == system else experiment.title(name)]
        + [percent(entry[metric]) for metric in METRIC_TITLES]
        for name, entry in summary.items()
    ]
    parts = [
        f"# {title} on {experiment.corpus}",
        f"A classifier of speech emotion over {len(encoders)} {'frozen' if frozen else 'fine-tuned'} "
        f"encoder{'s' * (len(encoders) > 1)}, trained with parrot-kernels; the method is that of {PAPER}. Labels: "
        f"{', '.join(description['labels'])}.",
        "## Use",
        USE.replace("FEATURES", FEATURES[inputs]),
        "## Encoders",
        FROZEN if frozen else TRAINED,
        _table(["encoder", "spec", "width", "input", "weights", "fingerprint"], encoders),
        "## Data and protocol",
        f"{experiment.utterances} utterances of {experiment.speakers} speakers of {experiment.corpus}; "
        f"{len(experiment.failures)} could not be used. The figures are those of a cross-validation over {len(sizes)} "
        f"speaker-disjoint folds ({tested} clips tested in each), seed {results.seed}: at most "
        f"{config.epochs} epochs, batches of {config.batch_size}, Adam at {config.learning_rate:g}, early stopping on "
        f"validation speakers after {config.patience} epochs. The weights here are those of one more run that trained "
        "on all speakers but the held-out validation speakers, so they themselves were not tested.",
        "## Results",
        f"Per cent, mean ± deviation over folds; always answering the commonest class gives "
        f"{100 * chance(results):.1f}.",
        _table(["system", *METRIC_TITLES.values()], rows),
        "## Limits",
        PURPOSE,
        BATCH.format(**description) if system in TRANSPORTS else ALONE,
        "\n".join(f"- {note}" for note in caveats(results, experiment)),
    ]  # fmt: skip
    return _card(header, parts)


def plain_card(config: dict[str, Any]) -> str:
    """The card of a model of which no run is known; ``config`` is the content of its config.json."""
    from huggingface_hub import ModelCardData

    from parrot.sharing import Shareable

    labels = config["description"].get("labels")
    inputs = getattr(Shareable.classes[config["architecture"]], "inputs", "embeddings")
    parts = [
        f"# {config['architecture']}",
        f"A classifier of speech emotion over speech encoders, made with {config['written_by']}; the "
        f"method is that of {PAPER}." + (f" Labels: {', '.join(labels)}." if labels else ""),
        "## Use",
        USE.replace("FEATURES", FEATURES[inputs]),
        "## Limits",
        "This folder does not say what the model was trained on, nor how good it is.",
        PURPOSE,
    ]
    return _card(ModelCardData(**_common()), parts)


def _common() -> dict[str, Any]:
    return {
        "library_name": "parrot-kernels",
        "pipeline_tag": TASK[0],
        "tags": ["speech-emotion-recognition", "optimal-transport", "model_hub_mixin"],
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _card(header: Any, parts: list[str]) -> str:
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
