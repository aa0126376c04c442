"""Corpora whose names don't tell everything: IEMOCAP, EmoBox metadata, manifests; and the command that checks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from synthetic_trees import make_tree, wav_bytes

from parrot import cli, corpora
from parrot.corpora import CorpusError, emobox, splits


def write_wav(path: Path, value: float = 0.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wav_bytes(np.full(800, value), 16_000))


class TestIemocap:
    TURNS = (
        ("Ses01F_impro01_F000", "neu"), ("Ses01F_impro01_M000", "fru"), ("Ses01F_impro01_M001", "exc"),
        ("Ses01M_script01_1_F002", "hap"), ("Ses05M_script03_2b_M010", "ang"), ("Ses05M_script03_2b_F011", "xxx"),
        ("Ses05F_impro04_M012", "sad"),
    )  # fmt: skip

    @pytest.fixture
    def root(self, tmp_path):
        for turn, emotion in self.TURNS:
            session = tmp_path / f"Session{turn[4]}"
            dialogue = turn[:-5]
            write_wav(session / "sentences" / "wav" / dialogue / f"{turn}.wav")
            evaluation = session / "dialog" / "EmoEvaluation" / f"{dialogue}.txt"
            evaluation.parent.mkdir(parents=True, exist_ok=True)
            with open(evaluation, "a") as file:
                file.write(f"[6.2901 - 8.2357]\t{turn}\t{emotion}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n")
        return tmp_path

    def test_reads_labels_and_the_turns_speaker(self, root):
        corpus = corpora.load("iemocap", root)
        assert [(u.path.stem, u.speaker, u.label, u.sentence) for u in corpus.utterances] == [
            ("Ses01F_impro01_F000", "1F", "neutral", "impro01"),
            ("Ses01F_impro01_M001", "1M", "happy", "impro01"),
            ("Ses01M_script01_1_F002", "1F", "happy", "script01_1"),
            ("Ses05F_impro04_M012", "5M", "sad", "impro04"),
            ("Ses05M_script03_2b_M010", "5M", "anger", "script03_2b"),
        ]
        assert corpus.labels == ("anger", "happy", "neutral", "sad")

    def test_a_missing_turn_and_counts(self, root):
        (root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav").unlink()
        with pytest.raises(CorpusError, match=r"Ses01F_impro01_F000.wav: no such file"):
            corpora.load("iemocap", root)
        report = corpora.check("iemocap", root)
        assert len(report.of_kind("missing")) == 1
        assert report.of_kind("count") == ("anger", "happy", "neutral", "sad")
        assert report.expected == 5531

    def test_another_folder(self, tmp_path):
        (tmp_path / "wav").mkdir()
        with pytest.raises(CorpusError, match=r"give the folder that holds Session1 to Session5; found wav"):
            corpora.load("iemocap", tmp_path)


RAW = {"W": "anger", "L": "boredem", "E": "disgust", "A": "fear", "F": "happy", "T": "sad", "N": "neutral"}
MALE = ("03", "10", "11", "12", "15")


class TestEmoBox:
    @pytest.fixture
    def metadata(self, tmp_path):
        """Emo-DB as EmoBox lists it, with its traps; folds by every fifth file."""
        make_tree("emo-db", tmp_path / "downloads" / "emodb")
        folder = tmp_path / "data" / "emodb"
        folder.mkdir(parents=True)
        stems = sorted(path.stem for path in (tmp_path / "downloads/emodb/wav").iterdir())
        rows = {
            stem: json.dumps({
                "key": f"emodb-{stem}", "dataset": "emodb", "wav": f"downloads/emodb/wav/{stem}.wav", "type": "raw",
                "emo": RAW[stem[5]], "channel": 1,
            })
            for stem in stems
        }  # fmt: skip
        (folder / "emodb.jsonl").write_text("\n".join(rows.values()) + "\n")
        names = {raw: raw.capitalize() for raw in RAW.values()}
        del names["neutral"]
        (folder / "label_map.json").write_text(json.dumps({**names, "boredem": "Boredom", "Neutral": "Neutral"}))
        with open(folder / "data.seg.wrd.stm", "w") as file:
            for stem in stems:
                speaker = ("male_" if stem[:2] in MALE else "female_") + stem[:2]
                file.write(f"emodb-{stem} 1 {speaker} 0 1.8 <id=emodb-{stem},lang=en,spk={speaker}> {RAW[stem[5]]}\n")
        for k in range(5):
            fold = folder / f"fold_{k + 1}"
            fold.mkdir()
            test = [row for place, row in enumerate(rows.values()) if place % 5 == k]
            train = [row for place, row in enumerate(rows.values()) if place % 5 != k]
            (fold / f"emodb_test_fold_{k + 1}.jsonl").write_text("\n".join(test))
            (fold / f"emodb_train_fold_{k + 1}.jsonl").write_text("\n".join(train))
            (fold / f"emodb_test_fold{k + 1}.jsonl").write_text('{"audio": "x.wav", "label": "anger"}\n')  # an old one
        return folder

    def test_is_the_corpus_the_folder_gives(self, metadata):
        listed = corpora.load("emobox", metadata)
        read = corpora.load("emo-db", metadata.parents[1] / "downloads" / "emodb")
        facts = [sorted((u.path.name, u.speaker, u.label) for u in c.utterances) for c in (listed, read)]
        assert facts[0] == facts[1]
        assert listed.labels == read.labels
        assert corpora.recognise(metadata) == "emobox"

    def test_official_folds(self, metadata):
        corpus = corpora.load("emobox", metadata)
        paths, labels = [u.path for u in corpus.utterances], [u.label for u in corpus.utterances]
        folds = emobox.folds(metadata, paths, labels)
        assert [len(fold.test) for fold in folds] == [107] * 5
        assert all(len(fold.train) + len(fold.validation) == 428 for fold in folds)
        assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(535))
        assert all(len({corpus.speakers[i] for i in fold.test}) == 10 for fold in folds)
        with pytest.raises(ValueError, match="share 10 speaker"):
            splits.assert_no_leakage_in(folds, {"speaker": corpus.speakers})
        for fold in folds:
            assert len(Counter(labels[i] for i in fold.validation)) == 7

    def test_folds_of_other_files(self, metadata):
        with pytest.raises(ValueError, match=r"1 of 1 recordings are in no part of fold 1, such as x.wav"):
            emobox.folds(metadata, ["x.wav"], ["anger"])
        with pytest.raises(ValueError, match="no folder fold_1"):
            emobox.folds(metadata.parent, ["x.wav"], ["anger"])

    def test_missing_recordings_are_told(self, metadata):
        (metadata.parents[1] / "downloads/emodb/wav/03a01Wa.wav").unlink()
        with pytest.raises(CorpusError, match=r"03a01Wa.wav: no such file"):
            corpora.load("emobox", metadata)
        report = corpora.check("emobox", metadata)
        assert [Path(file).name for file in report.of_kind("missing")] == ["03a01Wa.wav"]
        assert len(report.problems) == 1

    def test_not_metadata(self, metadata):
        (metadata / "emodb.jsonl").write_text('{"audio": "x.wav"}\n')
        with pytest.raises(CorpusError, match="line 1: no field key, wav, emo: not EmoBox metadata"):
            corpora.load("emobox", metadata)


class TestManifest:
    @pytest.fixture
    def clips(self, tmp_path):
        for k in range(4):
            write_wav(tmp_path / "clips" / f"{k}.wav", 0.1 + k / 10)
        return tmp_path

    def rows(self):
        return [
            {"path": f"clips/{k}.wav", "speaker": f"s{k % 2}", "label": "ab"[k % 2], "sentence": f"t{k}"}
            for k in range(4)
        ]

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    def test_reads(self, clips, suffix):
        path = clips / f"manifest.{suffix}"
        lines = [json.dumps(row) for row in self.rows()]
        if suffix == "csv":
            lines = ["path,speaker,label,sentence", *(",".join(row.values()) for row in self.rows())]
        path.write_text("\ufeff" * (suffix == "csv") + "\n".join(lines) + "\n")
        for root in (path, clips):
            corpus = corpora.load("manifest", root)
            assert [(u.path, u.speaker, u.label, u.sentence) for u in corpus.utterances] == [
                (clips / row["path"], row["speaker"], row["label"], row["sentence"]) for row in self.rows()
            ]
            assert corpus.labels == ("a", "b")
            assert corpora.check("manifest", root).ok

    def test_sentences_may_be_left_out(self, clips):
        (clips / "m.csv").write_text("speaker,path,label\ns,clips/0.wav,a\n")
        assert corpora.load("manifest", clips / "m.csv").sentences == ("",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("path,label\nclips/0.wav,a\n", "no column speaker; wanted path, speaker, label and perhaps sentence"),
            ("path,speaker,label\nclips/0.wav,,a\nclips/1.wav,s\n", "line 3: no label"),
            ("path,speaker,label\nclips/9.wav,s,a\n", "9.wav: no such file"),
            ("path,speaker,label\nclips/0.wav,s,a\nclips/0.wav,s,b\n", "on 2 lines of m.csv"),
            ("path,speaker,label\n", "no utterances in it"),
        ],
    )
    def test_faults(self, clips, text, message):
        (clips / "m.csv").write_text(text)
        with pytest.raises(CorpusError, match=message):
            corpora.load("manifest", clips / "m.csv")

    def test_faults_of_jsonl(self, clips):
        for text, message in (('{"path": \n', "line 1 is not JSON"), ("[1]\n", "line 1 is not a JSON object")):
            (clips / "m.jsonl").write_text(text)
            with pytest.raises(CorpusError, match=message):
                corpora.load("manifest", clips / "m.jsonl")

    def test_no_manifest(self, clips):
        with pytest.raises(CorpusError, match="got a folder without one"):
            corpora.load("manifest", clips)
        with pytest.raises(CorpusError, match=r"got 0.wav, another kind of file"):
            corpora.load("manifest", clips / "clips" / "0.wav")
        with pytest.raises(CorpusError, match=r"got m.csv, which does not exist"):
            corpora.load("manifest", clips / "m.csv")


class TestCommand:
    def test_complete(self, tmp_path, capsys):
        make_tree("mesd", tmp_path)
        assert cli.main(["corpora", "check", str(tmp_path)]) == 0
        told = capsys.readouterr()
        assert "862 of 862 utterances, 3 speakers" in told.out
        assert "not which of the 11 people speaks" in told.out
        assert "complete and sound" in told.out
        assert told.err == ""

    def test_problems_give_a_status(self, tmp_path, capsys):
        make_tree("emo-db", tmp_path, limit=500)
        (tmp_path / "wav" / "03a01Fa.wav").write_bytes(b"")
        assert cli.main(["corpora", "check", str(tmp_path)]) == 1
        told = capsys.readouterr()
        assert "emo-db in" in told.out
        assert "500 of 535 utterances" in told.out
        assert "36 problem(s)" in told.out
        assert "missing: 35" in told.err
        assert "... and 25 more" in told.err
        assert "empty: 1\n  03a01Fa.wav: empty file (0 bytes)" in told.err
        assert cli.main(["corpora", "check", str(tmp_path), "--all"]) == 1
        assert "more" not in capsys.readouterr().err

    def test_something_else(self, tmp_path, capsys):
        assert cli.main(["corpora", "check", str(tmp_path)]) == 2
        assert "looks like none of crema-d" in capsys.readouterr().err
        assert cli.main(["corpora", "check", str(tmp_path), "--name", "crema-d"]) == 2
        assert "found nothing" in capsys.readouterr().err


def test_a_line_of_a_manifest_ends_where_json_says(tmp_path):
    write_wav(tmp_path / "a.wav")
    row = '{"path": "a.wav", "speaker": "anna", "label": "x", "sentence": "one\u2028two\x85three"}'
    (tmp_path / "manifest.jsonl").write_text(f"{row}\r\n\n", encoding="utf-8")
    (utterance,) = corpora.load("manifest", tmp_path).utterances
    assert utterance.sentence == "one\u2028two\x85three"
