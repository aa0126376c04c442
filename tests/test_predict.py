"""`parrot predict` on files, folders and streams: answers, batches, bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from parrot import encoders
from parrot.cli import main
from parrot.model import build
from parrot.prediction import Predictor, Stream, recordings

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("transformers")
RATE, LABELS = 16000, ["angry", "calm", "sad"]


def tone(seconds, pitch, rate=RATE):
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * time) * (1 + 0.5 * np.sin(7 * time))).astype(np.float32)


def pcm(samples):
    return (samples * 32767).astype("<i2").tobytes()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saved models, untrained, of each kind that matters here."""
    folder = tmp_path_factory.mktemp("models")
    pair = [encoders.load(spec) for spec in ("ssam-demo", "hubert-demo")]
    facts = [
        {"spec": encoder.name, "name": encoder.name, "fingerprint": encoder.fingerprint, "random": True}
        for encoder in pair
    ]
    for name in ("parrot", "parrot-reference", "concat"):
        torch.manual_seed(0)
        model = build(name, [encoder.embedding_dim for encoder in pair], len(LABELS))
        if name == "parrot-reference":
            size = model.config.reference_size
            model.set_reference(*(torch.randn(size, encoder.embedding_dim) for encoder in pair))
        model.description = {"labels": LABELS, "encoders": facts, "batch_size": 4, "system": name, "synthetic": True}
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    (folder / "inner").mkdir()
    for k in range(6):
        path = folder / ("inner" if k > 3 else ".") / f"clip{k}.wav"
        soundfile.write(path, tone(0.3 + 0.05 * k, 120 + 40 * k), RATE)
    (folder / "notes.txt").write_text("no recording")
    return folder


def lines(capsys, *argv, status=0):
    assert main(["predict", *map(str, argv)]) == status
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def feed(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(data)}))


@pytest.mark.parametrize("name", ["parrot", "parrot-reference", "concat"])
def test_a_folder_gives_one_object_per_recording(models, clips, capsys, name):
    answers, err = lines(capsys, clips, "--json", "--model", models / name)
    assert [answer["path"] for answer in answers] == [str(path) for path in recordings([clips])]
    assert len(answers) == 6
    for answer in answers:
        assert list(answer["probabilities"]) == LABELS
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max(LABELS, key=answer["probabilities"].get)
    assert err.count("Transport joins the clips of a batch (here 4)") == (name == "parrot")


def test_answers_do_not_depend_on_other_clips_with_references(models, clips, capsys):
    together, _ = lines(capsys, clips, "--json", "--model", models / "parrot-reference")
    for answer in together:
        alone, err = lines(capsys, answer["path"], "--json", "--model", models / "parrot-reference")
        assert alone == [answer]  # every bit
        assert err == ""


def test_answers_depend_on_the_batch_as_in_the_paper(models, clips, capsys):
    together, _ = lines(capsys, clips, "--json", "--model", models / "parrot")
    alone, err = lines(capsys, together[0]["path"], "--json", "--model", models / "parrot")
    assert alone[0]["probabilities"] != together[0]["probabilities"]
    assert err.count("One clip alone is a batch of one") == 1


def test_bad_files_are_objects_and_take_no_place_in_a_batch(models, clips, capsys, tmp_path):
    (tmp_path / "empty.wav").touch()
    good, _ = lines(capsys, clips, "--json", "--model", models / "parrot")
    paths = [answer["path"] for answer in good]
    mixed = [*paths[:2], tmp_path / "empty.wav", *paths[2:], tmp_path / "missing.wav"]
    answers, _ = lines(capsys, *mixed, "--json", "--model", models / "parrot", status=2)
    assert [answer["path"] for answer in answers] == [str(path) for path in mixed]
    assert [answer for answer in answers if "error" not in answer] == good
    errors = [answer for answer in answers if "error" in answer]
    assert [error["error"] for error in errors] == ["empty file (0 bytes)", "no such file"]
    assert all(set(error) == {"path", "error"} for error in errors)


def test_wrong_use_is_one_clear_message(models, clips, capsys, tmp_path):
    def message(*argv):
        assert main(["predict", *map(str, argv), "--model", str(models / "concat")]) == 2
        return capsys.readouterr().err

    assert "one of both" in message()
    assert "one of both" in message(clips, "--stream")
    assert "without a recording" in message(tmp_path)
    assert "wanted 0 < hop <= window" in message("--stream", "--hop", "5")
    assert "s16le, f32le; got 'u8'" in message("--stream", "--sample-format", "u8")
    build("concat", (8, 8), 2).save_pretrained(tmp_path / "bare")
    assert main(["predict", str(clips), "--model", str(tmp_path / "bare")]) == 2
    assert "does not say its labels, encoders, batch_size" in capsys.readouterr().err


def test_a_stream_is_answered_window_by_window(models, capsys, monkeypatch):
    sound = tone(2.25, 200)
    feed(monkeypatch, pcm(sound))
    options = ["--stream", "--window", "1", "--hop", "0.5", "--model", models / "parrot-reference"]
    answers, err = lines(capsys, *options)
    assert [(a["start"], a["end"]) for a in answers] == [(0, 1), (0.5, 1.5), (1, 2), (1.25, 2.25)]
    assert err == ""
    predictor = Predictor.load(models / "parrot-reference")
    heard = np.frombuffer(pcm(sound), "<i2").astype(np.float32) / 32768
    wanted = predictor.answer(predictor.probabilities([predictor.embed_samples(heard[8000:24000], RATE)])[0])
    assert {"start": 0.5, "end": 1.5, **wanted} == answers[1]


def test_the_paper_s_mode_says_once_what_a_window_is(models, capsys, monkeypatch):
    feed(monkeypatch, pcm(tone(2, 200)))
    answers, err = lines(capsys, "--stream", "--window", "1", "--model", models / "parrot")
    assert len(answers) == 2
    assert err.count("batch of one") == 1


def test_silence_in_a_stream_is_an_object_and_the_rest_goes_on(models, capsys, monkeypatch):
    feed(monkeypatch, pcm(np.concatenate([tone(1, 200), np.zeros(RATE, np.float32), tone(1, 300)])))
    options = ["--stream", "--window", "1", "--model", models / "concat"]
    answers, _ = lines(capsys, *options, status=2)
    assert ["error" in answer for answer in answers] == [False, True, False]
    assert answers[1] == {"start": 1.0, "end": 2.0, "error": "silent: all samples are zero"}


def test_formats_and_channels_are_read_alike():
    left, right = tone(1, 200), tone(1, 300)
    both = np.stack([left, right], axis=1)
    stereo = list(Stream(sample_format="f32le", channels=2, window=1).windows(io.BytesIO(both.tobytes())))
    np.testing.assert_allclose(stereo[0][1], (left + right) / 2, atol=1e-7)
    mono = list(Stream(window=1).windows(io.BytesIO(pcm(left))))
    np.testing.assert_allclose(mono[0][1], left, atol=1e-4)


class Dripping(io.BytesIO):
    """A pipe that gives some bytes at a time, cutting samples in two."""

    def read1(self, size=-1):
        return super().read1(777)


@pytest.mark.parametrize(("window", "hop"), [(1.0, 1.0), (1.0, 0.3), (0.5, 0.01), (3.0, 1.0)])
@pytest.mark.parametrize("seconds", [0.0, 0.2, 1.0, 1.77])
def test_windows_hold_every_sample_whatever_the_pieces(window, hop, seconds):
    sound = tone(seconds, 200)
    layout = Stream(sample_format="f32le", window=window, hop=hop)
    found = list(layout.windows(Dripping(sound.tobytes())))
    width, step = round(window * RATE), round(hop * RATE)
    covered = np.zeros(len(sound), bool)
    for k, (start, samples) in enumerate(found):
        np.testing.assert_array_equal(samples, sound[start : start + len(samples)])
        assert len(samples) == min(width, len(sound))
        assert start == k * step or k == len(found) - 1
        covered[start : start + len(samples)] = True
    assert covered.all()


@pytest.mark.parametrize(
    ("data", "match"),
    [(b"RIFF" + bytes(5000), "header of an audio file"), (bytes(8) + b"x", "ended within a sample: 1 bytes")],
)
def test_streams_that_are_no_raw_samples(data, match):
    with pytest.raises(ValueError, match=match):
        list(Stream().windows(io.BytesIO(data)))


@pytest.mark.slow
def test_a_pipe_gets_its_answers_while_it_is_open(models):
    program = [sys.executable, "-m", "parrot", "predict", "--stream", "--window", "1", "--hop", "1", "--model"]
    with subprocess.Popen(
        [*program, str(models / "concat")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False
    ) as process:
        process.stdin.write(pcm(tone(1.2, 220)))
        process.stdin.flush()
        first = json.loads(process.stdout.readline())
        assert (first["start"], first["end"]) == (0.0, 1.0)
        process.stdin.close()
        (last,) = map(json.loads, process.stdout.read().splitlines())
        assert last["end"] == pytest.approx(1.2)
    assert process.returncode == 0


@pytest.mark.parametrize(("inputs", "wanted"), [("waveforms", "meta"), ("embeddings", "cpu")])
def test_a_model_with_encoders_of_its_own_computes_where_they_do(inputs, wanted, monkeypatch):
    model = torch.nn.Linear(3, 2)
    model.inputs, model.batch_dependent, model.description = inputs, False, {"labels": ["a", "b"], "batch_size": 4}
    predictor = Predictor(model, [torch.nn.Linear(3, 2, device="meta")])
    assert model.weight.device.type == wanted
    devices = []

    def predict(model, features, size, device):
        devices.append(device.type)
        return np.zeros((1, 2), np.float32)

    monkeypatch.setattr("parrot.training.predict", predict)
    assert predictor.probabilities([[np.ones(3, np.float32)]]).tolist() == [[0.5, 0.5]]
    assert devices == [wanted]
