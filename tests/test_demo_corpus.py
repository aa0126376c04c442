"""The spoken demo corpus: reproducible, resumable, well-formed, and neither trivial nor hopeless."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from parrot import corpora
from parrot.corpora import CorpusError, crema_d, demo
from parrot.corpora.splits import speaker_folds

pytest.importorskip("parselmouth")

SMALL = {"voices": 2, "sentences": 1, "progress": False}


def digests(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((root / "AudioWAV").iterdir())}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return demo.synthesise(tmp_path_factory.mktemp("small"), processes=1, **SMALL)


@pytest.fixture(scope="module", params=[(8, 1), pytest.param((10, 2), marks=pytest.mark.slow)], ids=str)
def corpus(request, tmp_path_factory) -> corpora.Corpus:
    voices, sentences = request.param
    root = demo.synthesise(tmp_path_factory.mktemp("demo"), voices, sentences, progress=False)
    return corpora.load("demo", root)


def test_names_are_crema_d(small):
    got = corpora.load("crema-d", small)
    assert len(got) == 2 * 1 * 6 * 2
    assert set(got.speakers) == {"1001", "1002"}
    assert {u.sentence for u in got.utterances} == {"IEO"}
    assert np.bincount(got.targets).tolist() == [4] * 6


def test_says_that_it_is_synthetic(small):
    recipe = json.loads((small / demo.RECIPE_FILE).read_text())
    assert recipe["synthetic"] is True
    assert recipe["version"] == demo.VERSION
    assert recipe["seed"] == 0
    assert "Synthetic speech" in recipe["note"]
    assert corpora.load("demo", small).name == "demo"


def test_same_bytes_from_any_number_of_processes(small, tmp_path):
    assert digests(demo.synthesise(tmp_path, processes=3, **SMALL)) == digests(small)


def test_seeds_differ(small, tmp_path):
    other = digests(demo.synthesise(tmp_path, seed=1, **SMALL))
    assert other.keys() == digests(small).keys()
    assert not set(other.values()) & set(digests(small).values())


def test_finishes_what_is_missing_and_leaves_the_rest(small, tmp_path):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    files = sorted((tmp_path / "AudioWAV").iterdir())
    for path in files[3:17]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    with pytest.raises(CorpusError, match="wanted 24 clips, found 10"):
        corpora.load("demo", tmp_path)
    demo.synthesise(tmp_path, **SMALL)
    assert digests(tmp_path) == digests(small)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_killed_run_is_resumed(small, tmp_path):
    program = f"from parrot.corpora import demo; demo.synthesise({str(tmp_path)!r}, **{SMALL!r}, processes=1)"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("AudioWAV/1*.wav"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {p.name for p in tmp_path.glob("AudioWAV/1*.wav")}
    assert written
    assert {name: digests(small)[name] for name in written}.items() <= digests(tmp_path).items()
    demo.synthesise(tmp_path, **SMALL)
    assert {name: hash_ for name, hash_ in digests(tmp_path).items() if name.endswith(".wav")} == digests(small)


def test_complete_corpus_needs_no_synthesiser(small, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    demo.synthesise(small, **SMALL)
    with pytest.raises(ImportError, match=r"pip install 'parrot-kernels\[demo\]'"):
        demo.synthesise(tmp_path, **SMALL)


def test_synthesiser_errors_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "VOICES", (("English (Great Britain)", "Nobody"), *demo.VOICES[1:]))
    with pytest.raises(RuntimeError, match="Nobody"):
        demo.synthesise(tmp_path, **SMALL)


def test_never_mixes_with_other_recordings(small, tmp_path):
    recording = tmp_path / "AudioWAV" / "1001_DFA_ANG_XX.wav"
    recording.parent.mkdir()
    recording.touch()
    with pytest.raises(CorpusError, match="not of the demo corpus"):
        demo.synthesise(tmp_path, **SMALL)
    with pytest.raises(CorpusError, match=r"other settings \(seed\)"):
        demo.synthesise(small, seed=5, **SMALL)
    with pytest.raises(CorpusError, match="no readable"):
        corpora.load("demo", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"voices": 0}, "voices must be between 1 and 18, got 0"),
        ({"voices": 99}, "voices must be between 1 and 18, got 99"),
        ({"sentences": 13}, "sentences must be between 1 and 12, got 13"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"processes": 0}, "processes must be between 1 and"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.synthesise(tmp_path, **arguments)


def test_recordings_are_well_formed(corpus):
    for utterance in corpus.utterances:
        samples, rate = soundfile.read(utterance.path)
        assert rate == 16_000
        assert samples.ndim == 1
        assert 1.0 <= len(samples) / rate <= 4.0
        assert np.abs(samples).max() < 0.96  # no clipping
        assert np.sqrt(np.mean(samples**2)) > 0.005  # no silence
        assert not (np.convolve(samples == 0, np.ones(400), "valid") == 400).any()  # no digital gap


def acoustics(path: Path) -> np.ndarray:
    """Duration, loudness, pitch, pitch range and energy in five bands."""
    samples, rate = soundfile.read(path)
    frames = np.lib.stride_tricks.sliding_window_view(samples, 640)[::160] * np.hanning(640)
    energy = (frames**2).sum(1)
    frames = frames[energy > 1e-3 * energy.max()]
    # Pitch as in Boersma (1993): the autocorrelation over that of the window, with a small octave cost.
    lags = np.arange(rate // 450, rate // 60)
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(640), 2048)) ** 2)[: rate // 60]
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2048)) ** 2)[:, : rate // 60] / window
    strength = correlation[:, lags] / correlation[:, :1] - 0.03 * np.log2(lags)
    best = strength.argmax(1)
    pitch = 12 * np.log2(rate / lags[best[strength.max(1) > 0.45]])
    spectrum = (np.abs(np.fft.rfft(frames)) ** 2).mean(0)
    bands = [np.log(band.sum()) for band in np.split(spectrum, [20, 40, 80, 160])]
    low, median, high = np.percentile(pitch, [20, 50, 80])
    return np.array([len(frames) / 100, bands[0], median, high - low, *np.diff(bands)])


def test_emotions_are_heard_but_not_plain(corpus):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values = np.stack([acoustics(u.path) for u in corpus.utterances])
    mean = {label: values[corpus.targets == i].mean(0) for i, label in enumerate(corpus.labels)}
    duration, _, pitch, pitch_range = range(4)
    assert mean["sad"][duration] > mean["neutral"][duration] > mean["anger"][duration]
    assert mean["fear"][pitch] > mean["neutral"][pitch] > mean["sad"][pitch]
    assert mean["happy"][pitch_range] > mean["sad"][pitch_range]

    hits = []
    for fold in speaker_folds(corpus.speakers, validation_fraction=0):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(values[fold.train], corpus.targets[fold.train])
        hits += (model.predict(values[fold.test]) == corpus.targets[fold.test]).tolist()
    assert 0.4 < np.mean(hits) < 0.85  # chance is 1/6


def test_all_voices_and_sentences_are_known_to_the_synthesiser(tmp_path):
    requests = [
        {
            "language": language, "voice": voice, "text": text, "sample_rate": 16_000,
            "pitch": 1.0, "pitch_range": 1.0, "words_per_minute": 165,
        }
        for (language, voice), text in zip(demo.VOICES, list(crema_d.SENTENCES.values()) * 2, strict=False)
    ]  # fmt: skip
    lengths = [len(speech) for speech in demo._speak(requests)]
    assert len(lengths) == len(demo.VOICES)
    assert min(lengths) > 8_000
