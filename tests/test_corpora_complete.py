"""The real corpora by their exact file names: counts per label and speaker, folds, and what a check finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from synthetic_trees import RATES, make_tree, wav_bytes

from parrot import corpora
from parrot.corpora import CorpusError, splits

LABELS = {
    "crema-d": {"anger": 1271, "disgust": 1271, "fear": 1271, "happy": 1271, "sad": 1271, "neutral": 1087},
    "emo-db": {"anger": 127, "boredom": 81, "disgust": 46, "fear": 69, "happy": 71, "sad": 62, "neutral": 79},
    "mesd": {"anger": 143, "disgust": 144, "fear": 144, "happy": 144, "neutral": 143, "sad": 144},
    "ravdess": {
        "neutral": 96, "calm": 192, "happy": 192, "sad": 192, "angry": 192, "fearful": 192, "disgust": 192,
        "surprised": 192,
    },
}  # fmt: skip
SHORT_OF_CREMA_D = {"1008": 76, "1009": 76, "1019": 76, "1002": 81, "1076": 81}
SPEAKERS = {
    "crema-d": {str(s): SHORT_OF_CREMA_D.get(str(s), 82) for s in range(1001, 1092)},
    "emo-db": {
        "03": 49, "08": 58, "09": 43, "10": 38, "11": 55, "12": 35, "13": 61, "14": 69, "15": 56, "16": 71,
    },
    "mesd": {"F": 288, "M": 288, "C": 286},
    "ravdess": {f"{actor:02d}": 60 for actor in range(1, 25)},
}  # fmt: skip


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    for name in RATES:
        make_tree(name, root / name)
    return root


@pytest.mark.parametrize("name", RATES)
def test_counts(trees, name):
    corpus = corpora.load(name, trees / name)
    assert Counter(u.label for u in corpus.utterances) == LABELS[name]
    assert Counter(corpus.speakers) == SPEAKERS[name]
    assert corpus.labels == tuple(sorted(LABELS[name]))
    assert corpora.recognise(trees / name) == name


def test_details_of_the_names():
    levels = Counter(name[-6:-4] for name in corpora.reader("crema-d").expected())
    assert levels == {"LO": 455, "MD": 455, "HI": 455, "XX": 6077}
    texts = Counter(name[2:5] for name in corpora.reader("emo-db").expected())
    assert set(texts) == {"a01", "a02", "a04", "a05", "a07", "b01", "b02", "b03", "b09", "b10"}
    mesd = corpora.reader("mesd").expected()
    assert Counter(name.split("_")[2] for name in mesd) == {"A": 430, "B": 432}
    assert {"Sadness_M_A_afuera.wav", "Happiness_C_A_lento_dentro.wav", "Fear_M_A_basta_ya.wav"} < mesd
    assert not {"Anger_C_A_hoy.wav", "Neutral_C_A_tarde.wav"} & mesd


@pytest.mark.parametrize("name", [pytest.param("crema-d", marks=pytest.mark.slow), "emo-db", "mesd", "ravdess"])
def test_a_complete_corpus_passes_the_check(trees, name):
    report = corpora.check(name, trees / name)
    assert report.ok
    assert report.found == report.expected == sum(LABELS[name].values())
    assert report.labels == LABELS[name]
    assert report.speakers == SPEAKERS[name]


@pytest.mark.parametrize(("name", "smallest", "largest"), [("crema-d", 1400, 1560), ("emo-db", 73, 140)])
def test_speaker_disjoint_folds(trees, name, smallest, largest):
    corpus = corpora.load(name, trees / name)
    for make in (splits.speaker_folds, splits.grouped_folds):
        folds = make(corpus.speakers)
        splits.assert_no_leakage_in(
            folds, {"speaker": corpus.speakers, "recording": [u.path for u in corpus.utterances]}
        )
        assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(len(corpus)))
        assert all(smallest <= len(fold.test) <= largest for fold in folds)
    if name == "emo-db":
        assert all(len({corpus.speakers[i] for i in fold.test}) == 2 for fold in folds)


def test_mesd_is_no_speaker_disjoint_corpus(trees):
    corpus = corpora.load("mesd", trees / "mesd")
    with pytest.raises(ValueError, match=r"wanted at least n_folds = 5 different speakers, got 3 \(C, F, M\)"):
        splits.speaker_folds(corpus.speakers)
    folds = splits.leave_one_out_folds(corpus.speakers)
    assert [len(fold.test) for fold in folds] == [286, 288, 288]
    splits.assert_no_leakage_in(folds, {"voice": corpus.speakers})
    stratified = splits.stratified_folds([u.label for u in corpus.utterances])
    assert sorted(len(fold.test) for fold in stratified) == [172, 172, 172, 173, 173]
    with pytest.raises(ValueError, match="share 3 speaker"):
        splits.assert_no_leakage_in(stratified, {"speaker": corpus.speakers})
    assert any("not which of the 11 people" in remark for remark in corpora.check("mesd", trees / "mesd").remarks)


@pytest.fixture
def emo_db(tmp_path) -> Path:
    return make_tree("emo-db", tmp_path / "emo-db", limit=40)


def test_a_check_says_exactly_what_is_wrong(emo_db):
    folder = emo_db / "wav"
    files = sorted(folder.iterdir())
    files[0].unlink()
    files[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    files[2].write_bytes(files[2].read_bytes()[:-300])
    files[3].write_bytes(b"no sound")
    files[4].write_bytes(b"")
    files[5].write_bytes(wav_bytes(np.zeros(800), 16_000))
    files[7].write_bytes(files[6].read_bytes())
    (folder / "03a01Wz.wav").write_bytes(wav_bytes(np.full(800, 0.1), 16_000))
    (folder / "notes.wav").write_bytes(wav_bytes(np.full(800, 0.2), 16_000))
    report = corpora.check("emo-db", emo_db)
    assert not report.ok
    absent = corpora.reader("emo-db").expected() - {path.name for path in files[1:]}
    assert report.of_kind("missing") == tuple(sorted(absent))
    assert len(absent) == 535 - 39
    for kind, name in {
        "LFS pointer": files[1].name, "truncated": files[2].name, "unreadable": files[3].name,
        "empty": files[4].name, "silent": files[5].name, "extra": "03a01Wz.wav", "misnamed": "notes.wav",
    }.items():  # fmt: skip
        assert report.of_kind(kind) == (name,), kind
    assert f"identical recordings: {files[6].name}, {files[7].name}" in report.remarks
    assert any(p.reason == "truncated: 300 bytes fewer than its header says" for p in report.problems)


def test_dangling_links_are_missing(emo_db):
    victim = sorted((emo_db / "wav").iterdir())[0]
    victim.unlink()
    victim.symlink_to("nowhere")
    assert victim.name in corpora.check("emo-db", emo_db).of_kind("missing")


def test_the_old_name_of_crema_ds_clip_is_no_fault(tmp_path):
    folder = tmp_path / "AudioWAV"
    make_tree("crema-d", tmp_path, limit=1)
    (folder / "1040_ITH_SAD_X.wav").write_bytes(wav_bytes(np.ones(9), 16_000))
    report = corpora.check("crema-d", tmp_path)
    assert report.of_kind("extra") == ()
    assert "1040_ITH_SAD_XX.wav" not in report.of_kind("missing")


@pytest.mark.parametrize("name", ["crema-d", "mesd", "ravdess", "iemocap", "emobox", "manifest", "demo"])
def test_another_corpus_is_told_apart(emo_db, name):
    with pytest.raises(CorpusError, match="this looks like the corpus 'emo-db'"):
        corpora.load(name, emo_db)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "song.wav").write_bytes(wav_bytes(np.ones(9), 16_000))
    with pytest.raises(CorpusError, match=r"wanted files such as 03a01Wa.wav; found 1 WAV file.*such as song.wav"):
        corpora.load("emo-db", tmp_path)
    (tmp_path / "song.wav").rename(tmp_path / "song.txt")
    with pytest.raises(
        CorpusError, match=r"no WAV files such as 03a01Wa.wav in wav, the folder itself; found song.txt"
    ):
        corpora.load("emo-db", tmp_path)
    with pytest.raises(CorpusError, match="is a file"):
        corpora.load("emo-db", tmp_path / "song.txt")
    assert corpora.recognise(tmp_path) is None
