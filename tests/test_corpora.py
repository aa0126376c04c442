"""Reading recordings and corpus folders: what is accepted, what is refused and what the errors say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from parrot import corpora
from parrot.corpora import Corpus, CorpusError, Utterance, crema_d
from parrot.corpora.audio import AudioError, load_waveform

RATE = 16_000


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def write(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str | None = None) -> Path:
    soundfile.write(path, samples, rate, subtype)
    return path


class TestAudio:
    @pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
    def test_samples_come_as_decoded(self, tmp_path, subtype):
        samples = tone(440, RATE)
        got = load_waveform(write(tmp_path / "a.wav", samples, subtype=subtype), RATE)
        assert got.dtype == np.float32
        assert got.shape == samples.shape
        np.testing.assert_allclose(got, samples, atol=2e-4 if subtype == "PCM_16" else 2e-6)

    @pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
    def test_containers(self, tmp_path, suffix):
        got = load_waveform(write(tmp_path / f"a.{suffix}", tone(440, RATE)), RATE)
        assert abs(got.std() - tone(440, RATE).std()) < 0.01

    def test_channels_are_averaged(self, tmp_path):
        left, right = tone(300, RATE), tone(500, RATE)
        got = load_waveform(write(tmp_path / "a.wav", np.stack([left, right], 1), subtype="FLOAT"), RATE)
        np.testing.assert_allclose(got, (left + right) / 2, atol=1e-6)

    @pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
    def test_other_rates_are_resampled(self, tmp_path, rate):
        got = load_waveform(write(tmp_path / "a.wav", tone(1000, rate), rate, "FLOAT"), RATE)
        wanted = tone(1000, RATE)
        assert len(got) == len(wanted)
        inner = slice(200, -200)  # the recording's edges are steps
        np.testing.assert_allclose(got[inner], wanted[inner], atol=2e-3)

    def test_resampling_does_not_alias(self, tmp_path):
        got = load_waveform(write(tmp_path / "a.wav", tone(10_000, 48_000), 48_000, "FLOAT"), RATE)
        assert np.abs(got[200:-200]).max() < 5e-3

    def test_repeatable(self, tmp_path):
        path = write(tmp_path / "a.wav", tone(1000, 44_100), 44_100)
        assert (load_waveform(path, RATE) == load_waveform(path, RATE)).all()

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "empty file"),
            (b"not audio at all" * 9, "not a readable audio file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        ],
    )
    def test_bad_files(self, tmp_path, content, reason):
        path = tmp_path / "a.wav"
        path.write_bytes(content)
        with pytest.raises(AudioError, match=reason) as info:
            load_waveform(path, RATE)
        assert info.value.path == path
        assert str(info.value) == f"{path}: {info.value.reason}"

    @pytest.mark.parametrize(
        ("samples", "reason"),
        [
            (np.zeros(0), r"empty recording \(0 samples\)"),
            (np.zeros(900), "silent: all 900 samples are zero"),
            (np.stack([tone(440, RATE), -tone(440, RATE)], 1), "silent"),
            (np.array([0.1, np.nan, 0.2]), "not finite"),
            (np.array([0.1, np.inf, 0.2]), "not finite"),
            (tone(440, RATE)[:300], "too short: 300 samples at 16000 Hz, wanted at least 400"),
        ],
    )
    def test_bad_samples(self, tmp_path, samples, reason):
        with pytest.raises(AudioError, match=reason):
            load_waveform(write(tmp_path / "a.wav", samples, subtype="FLOAT"), RATE, min_samples=400)

    def test_length_is_judged_at_the_wanted_rate(self, tmp_path):
        path = write(tmp_path / "a.wav", tone(440, 48_000)[:900], 48_000)
        with pytest.raises(AudioError, match="too short: 300 samples"):
            load_waveform(path, RATE, min_samples=400)

    def test_missing_and_folder(self, tmp_path):
        with pytest.raises(AudioError, match="no such file"):
            load_waveform(tmp_path / "no.wav", RATE)
        with pytest.raises(AudioError, match="unreadable"):
            load_waveform(tmp_path, RATE)


def make_tree(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


class TestCremaD:
    NAMES = ("1002_IEO_ANG_HI.wav", "1001_DFA_NEU_XX.wav", "1040_ITH_SAD_X.wav", "1091_WSI_FEA_XX.wav")

    @pytest.mark.parametrize("subfolder", ["AudioWAV", "."])
    def test_reads_names(self, tmp_path, subfolder):
        make_tree(tmp_path / subfolder, [*self.NAMES, "README.txt", "._1001_DFA_NEU_XX.wav"])
        corpus = corpora.load("crema-d", tmp_path)
        assert corpus.name == "crema-d"
        assert corpus.labels == ("anger", "disgust", "fear", "happy", "neutral", "sad")
        assert [(u.speaker, u.sentence, u.label) for u in corpus.utterances] == [
            ("1001", "DFA", "neutral"),
            ("1002", "IEO", "anger"),
            ("1040", "ITH", "sad"),
            ("1091", "WSI", "fear"),
        ]
        assert corpus.speakers == ("1001", "1002", "1040", "1091")
        assert corpus.targets.tolist() == [4, 0, 5, 2]
        assert len(corpus) == 4
        assert all(u.path.is_file() for u in corpus.utterances)

    def test_accepts_what_the_corpus_names_look_like(self):
        pattern = re.compile(
            r"^(10\d{2})_(IEO|TIE|IOM|IWW|TAI|MTI|IWL|ITH|DFA|ITS|TSI|WSI)_(ANG|DIS|FEA|HAP|NEU|SAD)_(LO|MD|HI|XX?)\.wav$"
        )
        parts = (
            ["1001", "1091", "2001", "101"], [*crema_d.SENTENCES, "ABC"], [*crema_d.EMOTIONS, "SUR"],
            ["LO", "MD", "HI", "X", "XX", "XXX", "L"],
        )  # fmt: skip
        for speaker in parts[0]:
            for sentence in parts[1]:
                for emotion in parts[2]:
                    for level in parts[3]:
                        name = f"{speaker}_{sentence}_{emotion}_{level}.wav"
                        try:
                            crema_d._parse(Path(name))
                            accepted = True
                        except ValueError:
                            accepted = False
                        assert accepted == bool(pattern.match(name)), name

    def test_lists_all_that_is_wrong(self, tmp_path):
        bad = {
            "1001_IEO_JOY_HI.wav": "unknown emotion 'JOY', wanted one of ANG, DIS, FEA, HAP, NEU, SAD",
            "1001_ABC_ANG_HI.wav": "unknown sentence 'ABC'",
            "1001_IEO_ANG_ZZ.wav": "unknown level 'ZZ'",
            "1001_IEO_ANG_HI.WAV": "not a CREMA-D name",
            "noise.wav": "not a CREMA-D name",
        }
        make_tree(tmp_path / "AudioWAV", [*self.NAMES, *bad])
        with pytest.raises(CorpusError) as info:
            crema_d.read(tmp_path)
        assert len(info.value.problems) == len(bad)
        for name, problem in bad.items():
            assert any(p.startswith(f"{name}: {problem}") for p in info.value.problems), problem
            assert f"{name}: {problem}" in str(info.value)

    def test_long_lists_are_cut_in_the_message_only(self, tmp_path):
        make_tree(tmp_path, ["1001_DFA_NEU_XX.wav", *(f"x{i}.wav" for i in range(50))])
        with pytest.raises(CorpusError, match="and 30 more") as info:
            crema_d.read(tmp_path)
        assert len(info.value.problems) == 50

    def test_missing_or_empty_folder(self, tmp_path):
        with pytest.raises(CorpusError, match="no such folder"):
            crema_d.read(tmp_path / "nowhere")
        with pytest.raises(CorpusError, match="no WAV files"):
            crema_d.read(tmp_path)


class TestCorpus:
    def test_unknown_label(self):
        utterances = (Utterance(Path("a.wav"), "1", "anger", "s"), Utterance(Path("b.wav"), "2", "joy", "s"))
        with pytest.raises(CorpusError, match=r"b.wav: unknown label 'joy', wanted one of anger, sad") as info:
            Corpus("mine", Path("."), utterances, ("anger", "sad"))
        assert len(info.value.problems) == 1

    def test_no_utterances(self):
        with pytest.raises(CorpusError, match="no utterances"):
            Corpus("mine", Path("."), (), ("anger",))

    def test_unknown_name(self, tmp_path):
        with pytest.raises(ValueError, match=r"name must be one of crema-d, emo-db, .*, demo, got 'cremad'"):
            corpora.load("cremad", tmp_path)
        assert set(corpora.available()) == {
            "crema-d", "emo-db", "mesd", "ravdess", "iemocap", "emobox", "manifest", "demo",
        }  # fmt: skip
