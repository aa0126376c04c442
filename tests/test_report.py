"""The report: everything it must say, and plots that open."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from parrot import report
from parrot.evaluation import CrossValidation, FoldResult, metrics
from parrot.training import TrainingConfig, TrainingResult

NAMES = ("anger", "neutral", "sad")
SYSTEMS = ("fcn-0", "cnn-1", "concat", "parrot")


def make_results(systems=SYSTEMS, seed=0):
    rng = np.random.default_rng(seed)
    table = {}
    for system in systems:
        table[system] = []
        for fold in range(2):
            labels = np.tile(np.arange(3), 8)
            logits = (2 * np.eye(3)[labels] + rng.standard_normal((24, 3))).astype(np.float32)
            history = {
                "train_loss": [1.2, 0.8, 0.5],
                "validation_loss": [1.1, 0.9, 1.0],
                "validation_accuracy": [0.3, 0.5, 0.5],
            }
            plan = rng.random((24, 24)).astype(np.float32) if system == "parrot" else None
            training = TrainingResult(history, 2, logits, plan, seconds=1.5)
            table[system].append(FoldResult(fold, np.arange(24) + 24 * fold, labels, training))
    sizes = [{"train": 40, "validation": 8, "test": 24}] * 2
    return CrossValidation(table, NAMES, TrainingConfig(device="cpu"), 0, sizes, reused=0)


def make_experiment(**changes):
    encoders = (
        report.EncoderFacts("ssam-demo", "ssam-demo", 160, "a" * 64, random=True),
        report.EncoderFacts("hubert:base", "hubert", 96, "b" * 64, random=False),
    )
    experiment = report.Experiment("a corpus", 48, 4, True, encoders, (("bad.wav", "silent: all 9 samples are zero"),))
    return dataclasses.replace(experiment, **changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = make_results()
    return results, report.write(results, folder, make_experiment())


def test_json_holds_all_figures(written):
    results, path = written
    document = json.loads((path.parent / "report.json").read_text())
    assert list(document["systems"]) == list(SYSTEMS)
    for system, entry in document["systems"].items():
        folds = results.systems[system]
        for name in ("wa", "ua", "macro_f1"):
            values = [metrics(f.labels, f.training.predictions)[name] for f in folds]
            assert entry["metrics"][name]["folds"] == values
            assert entry["metrics"][name]["mean"] == np.mean(values)
            assert entry["metrics"][name]["std"] == np.std(values)
        assert np.sum(entry["confusion"]) == 48
        assert entry["folds"][0]["history"]["train_loss"] == [1.2, 0.8, 0.5]
    assert document["chance"] == pytest.approx(1 / 3)
    assert document["seed"] == 0
    assert document["configuration"]["patience"] == 10
    assert document["experiment"]["encoders"][0]["fingerprint"] == "a" * 64
    assert document["environment"]["versions"]["torch"]


def test_markdown_has_the_table_every_fold_and_the_plots(written):
    results, path = written
    text = path.read_text()
    summary = results.summary()
    assert f"| PARROT | {report.percent(summary['parrot']['wa'])} |" in text
    assert "| ssam-demo, FCN |" in text
    assert "| hubert, CNN |" in text
    assert f"{100 * summary['concat']['macro_f1']['folds'][1]:.1f}" in text
    assert "Chance is 33.3 %." in text
    assert "`bad.wav`: silent" in text
    for name in ("comparison", "confusion", "learning_curves", "transport_plan"):
        assert f"({name}.png)" in text
        assert (path.parent / f"{name}.png").exists()
    assert not list(path.parent.glob(".*"))  # no temporary files


def test_plots_are_pictures_of_a_sensible_size(written):
    from matplotlib.image import imread

    for picture in written[1].parent.glob("*.png"):
        height, width = imread(picture).shape[:2]
        assert 400 < height < 2500, picture.name
        assert 600 < width < 2500, picture.name


def test_no_words_are_cut_off():
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    results, experiment = make_results(), make_experiment(corpus="the spoken demo corpus")
    first = results.systems["parrot"][0]
    with rc_context(report.STYLE):
        figures = [
            report.comparison_plot(results, experiment),
            report.confusion_plot(results, "parrot", "PARROT"),
            report.learning_plot(results, experiment),
            report.plan_plot(first.training.plan, first.labels, NAMES, experiment),
        ]
        for figure in figures:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            drawn, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
            assert drawn.x0 > -0.02
            assert drawn.y0 > -0.02
            assert drawn.x1 < width + 0.02
            assert drawn.y1 < height + 0.02


def test_equal_results_give_equal_files(written, tmp_path):
    again = report.write(make_results(), tmp_path, make_experiment())
    for path in sorted(written[1].parent.iterdir()):
        assert path.read_bytes() == (again.parent / path.name).read_bytes(), path.name


def test_honest_words_follow_the_facts():
    results = make_results()
    notes = " ".join(report.caveats(results, make_experiment()))
    assert "corpus is synthetic" in notes
    assert "Random encoders: ssam-demo." in notes
    assert "Not comparable with published figures" in notes
    assert "depends on the clips beside it" in notes
    encoders = tuple(dataclasses.replace(e, random=False) for e in make_experiment().encoders)
    real = report.caveats(make_results(SYSTEMS[:3]), make_experiment(synthetic=False, encoders=encoders))
    text = " ".join(real)
    assert "synthetic" not in text
    assert "Random" not in text
    assert "needs the same split" in text
    assert "beside it" not in text


def test_chance_is_the_commonest_class():
    results = make_results()
    for folds in results.systems.values():
        for fold in folds:
            fold.labels = np.repeat([0, 1, 2], [12, 6, 6])
    assert report.chance(results) == 0.5


def test_without_transport_or_second_encoder(tmp_path):
    experiment = make_experiment(encoders=make_experiment().encoders[:1], failures=())
    path = report.write(make_results(("fcn-0", "cnn-0")), tmp_path, experiment)
    assert not (tmp_path / "transport_plan.png").exists()
    assert "Left out" not in path.read_text()


def test_plan_is_sorted_by_emotion_in_multiples_of_uniform():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 2], [4, 6]))
    plan = np.where(labels[:, None] == labels, 0.03, 0.01)
    figure = report.plan_plot(plan, labels, NAMES, make_experiment())
    axes = figure.axes[0]
    mass = axes.images[0].get_array()
    assert mass.mean() == pytest.approx(1.0)
    blocks = np.repeat([0, 1], [4, 6])
    assert np.ptp(mass[blocks[:, None] == blocks]) < 1e-12
    assert [t.get_text() for t in axes.get_xticklabels()] == ["anger", "sad"]
    assert axes.get_xticks().tolist() == [1.5, 6.5]


def test_comparison_shows_mean_deviation_folds_and_chance():
    results = make_results()
    axes = report.comparison_plot(results, make_experiment()).axes[0]
    summary = results.summary()
    for bar, (system, entry) in zip(axes.patches, summary.items(), strict=True):
        assert bar.get_width() == pytest.approx(100 * entry["wa"]["mean"]), system
    texts = [t.get_text() for t in axes.texts]
    assert report.percent(summary["parrot"]["wa"]) in texts
    assert any("chance 33.3" in t for t in texts)
