"""The command line, end to end: a small demo, prediction, a corpus with a bad file, and every kind of error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from parrot.cli import main

pytest.importorskip("parselmouth")

DEMO = ["--voices", "5", "--sentences", "1", "--epochs", "2", "--workers", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a finished two-epoch demo."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--output", str(folder), *DEMO]) == 0
    return folder


@pytest.fixture(scope="module")
def clips(demo):
    return sorted(str(path) for path in (demo / "corpus" / "AudioWAV").glob("1001_*.wav"))


def fails(capsys, *argv):
    """Run a command that must fail; returns its message."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return err.strip().splitlines()[-1]


def test_demo_trains_every_system_and_reports(demo):
    document = json.loads((demo / "report.json").read_text())
    systems = ["fcn-0", "fcn-1", "cnn-0", "cnn-1", "concat", "hadamard", "ot", "parrot"]
    assert list(document["systems"]) == systems
    for entry in document["systems"].values():
        assert len(entry["metrics"]["wa"]["folds"]) == 5
        assert [len(fold["history"]["train_loss"]) for fold in entry["folds"]] == [2] * 5
    assert document["experiment"]["synthetic"]
    assert all(encoder["random"] for encoder in document["experiment"]["encoders"])
    assert (demo / "report.md").exists()
    assert (demo / "transport_plan.png").exists()


def test_a_second_demo_reuses_everything_and_shows_the_same_figures(demo, capsys):
    before = {name: (demo / name).read_bytes() for name in ("report.json", "report.md", "model/config.json")}
    assert main(["demo", "--output", str(demo), *DEMO]) == 0
    out = capsys.readouterr().out
    assert "Trained  0 runs, reused 40" in out
    assert f"Report   {demo / 'report.md'}" in out
    assert "The corpus is synthetic" in out
    parrot = json.loads(before["report.json"])["systems"]["parrot"]["metrics"]["wa"]
    assert f"{100 * parrot['mean']:.1f} ± {100 * parrot['std']:.1f}" in out
    for name, content in before.items():
        assert (demo / name).read_bytes() == content, name


def test_the_model_has_a_card_of_its_run(demo):
    from huggingface_hub import ModelCard

    text = (demo / "model" / "README.md").read_text()
    report = json.loads((demo / "report.json").read_text())
    header = ModelCard(text).data
    assert (header.library_name, header.pipeline_tag) == ("parrot-kernels", "audio-classification")
    wa = report["systems"]["parrot"]["metrics"]["wa"]
    scores = {score.metric_type: score for score in header.eval_results}
    assert scores["accuracy"].metric_value == pytest.approx(wa["mean"], abs=1e-4)
    assert scores["accuracy"].dataset_name == "the spoken demo corpus"
    assert f"| **PARROT** | {100 * wa['mean']:.1f} ± {100 * wa['std']:.1f} |" in text
    assert "60 utterances of 5 speakers" in text
    assert "5 speaker-disjoint folds" in text
    assert "Labels: anger, disgust, fear, happy, neutral, sad." in text
    assert "**Predictions depend on the batch.**" in text
    assert "**The corpus is synthetic.**" in text
    for encoder in report["experiment"]["encoders"]:
        assert f"`{encoder['fingerprint'][:16]}`" in text


def test_predict_tells_what_a_batch_does(demo, clips, capsys):
    assert main(["predict", clips[0], "--model", str(demo / "model")]) == 0
    out, err = capsys.readouterr()
    assert "1001_IEO_ANG_HI.wav" in out
    assert "One clip alone is a batch of one" in err
    assert "expect nothing of it on real speech" in out
    assert main(["predict", *clips[:3], "--model", str(demo / "model")]) == 0
    assert "Transport joins the clips of a batch (here 3)" in capsys.readouterr().err


def test_predict_answers_what_it_can_and_names_the_rest(demo, clips, tmp_path, capsys):
    (tmp_path / "empty.wav").touch()
    status = main(["predict", str(tmp_path / "empty.wav"), clips[0], "missing.wav", "--model", str(demo / "model")])
    out, err = capsys.readouterr()
    assert status == 2
    assert "1001_IEO_ANG_HI.wav" in out
    assert "empty.wav: empty file (0 bytes)" in err
    assert "missing.wav: no such file" in err


def test_predict_refuses_other_encoders(demo, clips, capsys):
    message = fails(capsys, "predict", clips[0], "--model", demo / "model", "--encoders", "hubert-demo", "ssam-demo")
    assert "the model was trained on the encoder 'ssam-demo' with fingerprint" in message
    assert "--encoders wants 2 specs" in fails(
        capsys, "predict", clips[0], "--model", demo / "model", "--encoders", "ssam-demo"
    )


def test_features_and_train_leave_a_bad_file_out(demo, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    shutil.copytree(demo / "corpus", corpus)
    bad = corpus / "AudioWAV" / "1002_IEO_SAD_LO.wav"
    bad.write_bytes(b"not a recording")
    cache = ["--cache", str(demo / "features")]
    source = ["--corpus", "demo", str(corpus)]
    assert main(["features", *source, "--encoder", "hubert-demo", *cache]) == 0
    out = capsys.readouterr().out
    assert "hubert-demo: 59 of 60 utterances, 96 values each, 59 from the cache" in out
    assert f"left out {bad}" in out

    options = ["--encoders", "hubert-demo", "--epochs", "1", "--workers", "1", "--device", "cpu", "--seed", "2"]
    assert main(["train", *source, *cache, *options, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "59 utterances of 5 speakers" in out
    assert "(hubert-demo, CNN, trained on all speakers)" in out
    document = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(document["systems"]) == ["fcn-0", "cnn-0"]
    assert document["experiment"]["failures"][0][0] == bad.name
    clip = str(corpus / "AudioWAV" / "1003_IEO_SAD_LO.wav")
    assert main(["predict", clip, "--model", str(tmp_path / "run" / "model")]) == 0
    assert "batch" not in "".join(capsys.readouterr())  # a single encoder does not depend on it


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--epochs", "0"], "`epochs` must be an integer of at least 1; got 0"),
        (["demo", "--seed", "-1"], "--seed must be 0 or more; got -1"),
        (["demo", "--workers", "0"], "--workers must be 1 or more; got 0"),
        (["demo", "--voices", "4"], "wanted at least n_folds = 5 different speakers, got 4"),
        (["demo", "--voices", "99"], "voices must be between 1 and 18, got 99"),
        (["demo", "--device", "abacus"], "`device` must be auto, cpu or cuda; got 'abacus'"),
        (["train", "--corpus", "nope", "x", "--encoders", "ssam-demo"], "name must be one of crema-d, emo-db"),
        (["train", "--corpus", "crema-d", "/nowhere", "--encoders", "ssam-demo"], "/nowhere"),
        (["predict", "a.wav", "--model", "/nowhere"], "is no folder"),
    ],
)
def test_an_error_is_one_clear_message(argv, message, tmp_path, capsys):
    extra = ["--output", tmp_path] if argv[0] == "demo" else []
    line = fails(capsys, *argv, *extra)
    assert line.startswith(f"parrot {argv[0]}: error: ")
    assert message in line
    assert not (tmp_path / "corpus").exists()


def test_bad_choices_are_found_before_the_work(demo, tmp_path, capsys):
    source = ["train", "--corpus", "demo", demo / "corpus", "--cache", tmp_path / "cache", "--output", tmp_path / "run"]
    pair = ["--encoders", "ssam-demo", "hubert-demo"]
    assert "got 'magic'" in fails(capsys, *source, *pair, "--systems", "magic")
    assert "--final must be one of the systems trained (concat)" in fails(
        capsys, *source, *pair, "--systems", "concat", "--final", "parrot"
    )
    assert "two or more encoders" in fails(capsys, *source, "--encoders", "ssam-demo", "--systems", "parrot")
    assert "n_folds = 6" in fails(capsys, *source, *pair, "--folds", "6")
    assert "`spec` must be one of" in fails(capsys, *source, "--encoders", "whisper")
    assert not (tmp_path / "cache").exists()


def test_debug_shows_where(demo):
    with pytest.raises(ValueError, match="is no folder"):
        main(["predict", "a.wav", "--model", str(demo / "nothing"), "--debug"])


def test_interruption_is_no_error(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("parrot.commands.demo.training_config", interrupt)
    assert main(["demo"]) == 130
    assert "run the command again to go on" in capsys.readouterr().err


COMMANDS = ["demo", "features", "train", "reproduce", "predict", "serve", "convert", "info", "bench"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    if command != ["info"]:
        assert "examples:\n  parrot " in text
    if command == ["predict"]:
        assert "one clip alone is a batch of one" in text


def test_info_and_module_entry():
    done = subprocess.run(
        [sys.executable, "-m", "parrot", "info"], capture_output=True, text=True, check=True, timeout=120
    )
    assert "ssam-demo, hubert-demo" in done.stdout
    assert "crema-d" in done.stdout
    assert "fcn-0, fcn-1, cnn-0, cnn-1, concat, hadamard, ot, parrot" in done.stdout
    assert "What serves each op" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "title", "alone"),
    [
        ("parrot-frames", "PARROT, transport between frames", True),
        ("parrot-layers", "PARROT, learned layer weights", False),
        pytest.param("parrot-finetuned", "PARROT, fine-tuned encoders", False, marks=pytest.mark.slow),
    ],
)
def test_other_inputs_from_training_to_prediction(demo, clips, tmp_path, capsys, system, title, alone):
    options = ["--cache", tmp_path / "features", "--output", tmp_path, "--folds", "2", "--epochs", "1", *DEMO[6:]]
    systems = ["--systems", "concat", system, "--final", system]
    corpus = ["--corpus", "demo", demo / "corpus", "--encoders", "ssam-demo", "hubert-demo"]
    assert main([str(a) for a in ("train", *corpus, *systems, *options)]) == 0
    assert title in json.loads((tmp_path / "report.json").read_text())["systems"][system]["title"]
    capsys.readouterr()
    card = (tmp_path / "model" / "README.md").read_text()
    assert {"parrot-frames": "frames", "parrot-layers": "layers + 1", "parrot-finetuned": "samples"}[system] in card
    trained = system == "parrot-finetuned"
    assert ("2 fine-tuned encoders" in card, "are in this folder" in card) == (trained, trained)

    def answers(*files):
        assert main(["predict", *files, "--model", str(tmp_path / "model"), "--json"]) == 0
        out, err = capsys.readouterr()
        assert ("alone" in err or "Transport joins" in err) != alone
        return [json.loads(line) for line in out.splitlines()]

    assert (answers(clips[1]) == answers(*clips[:3])[1:2]) == alone


@pytest.mark.slow
def test_three_encoders(demo, tmp_path, capsys):
    options = ["--cache", tmp_path / "features", "--output", tmp_path, "--folds", "2", "--epochs", "1", *DEMO[6:]]
    corpus = ["--corpus", "demo", demo / "corpus", "--encoders", "ssam-demo", "hubert-demo", "hubert-demo#0"]
    assert main([str(a) for a in ("train", *corpus, *options)]) == 0
    systems = ["fcn-0", "fcn-1", "fcn-2", "cnn-0", "cnn-1", "cnn-2", "concat", "hadamard", "ot", "parrot"]
    assert list(json.loads((tmp_path / "report.json").read_text())["systems"]) == systems
    clip = next((demo / "corpus" / "AudioWAV").glob("*.wav"))
    assert main(["predict", str(clip), "--model", str(tmp_path / "model")]) == 0
