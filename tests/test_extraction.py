"""Ways of extraction: threads, batches, precision, compilation, and the kinds of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_features import DIM, RATE, MaskingEncoder, TinyEncoder, direct, make_corpus, run

from parrot import features
from parrot.commands.experiment import embed_corpus
from parrot.corpora import Corpus, Utterance
from parrot.features import Extraction, extract


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    (tmp_path / "wav").mkdir()
    return make_corpus(tmp_path / "wav")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_an_encoder_computes_on_the_threads_it_asks_for(corpus, cache):
    before, encoder = torch.get_num_threads(), TinyEncoder()
    encoder.threads = 1
    torch.set_num_threads(2)
    try:
        run(corpus, cache, encoder)
        assert encoder.seen_threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_are_of_similar_lengths_and_depend_on_the_corpus_alone(corpus, cache):
    paths = [u.path for u in corpus.utterances]
    paths[0].write_bytes(paths[11].read_bytes())
    encoder, how = MaskingEncoder(), Extraction(clips=5)
    table = extract(corpus, encoder, cache, progress=False, how=how)
    assert encoder.batches == [[807, 814, 821, 828, 835], [842, 849, 856, 863, 870], [877, 877]]
    np.testing.assert_allclose(table.values, direct(corpus), atol=1e-6)
    np.testing.assert_array_equal(table.indices, np.arange(12))
    again = MaskingEncoder()
    assert extract(corpus, again, cache, progress=False, how=how).reused == 12
    assert not hasattr(again, "batches")
    soundfile.write(paths[3], 0.1 * np.ones(830), RATE, "PCM_16")  # its whole batch is computed again, and it kept
    changed = extract(corpus, again, cache, progress=False, how=how)
    assert [len(batch) for batch in again.batches] == [5]
    np.testing.assert_array_equal(np.delete(changed.values, 3, 0), np.delete(table.values, 3, 0))


def test_without_masking_only_equal_lengths_go_together(corpus, cache):
    class Noting(TinyEncoder):
        shapes = ()

        def embed(self, waveforms):
            self.shapes = (*self.shapes, tuple(waveforms.shape))
            return torch.cat([super(Noting, self).embed(clip[None]) for clip in waveforms])

    paths = [u.path for u in corpus.utterances]
    soundfile.write(paths[0], 0.1 * np.random.default_rng(5).standard_normal(807), RATE, "PCM_16")
    encoder = Noting()
    table = extract(corpus, encoder, cache, progress=False, how=Extraction(clips=3))
    assert encoder.shapes[:3] == ((2, 807), (1, 814), (1, 821))
    np.testing.assert_array_equal(table.values, direct(corpus))


def test_one_bad_clip_does_not_lose_its_batch(corpus, cache):
    class Picky(MaskingEncoder):
        def embed(self, waveforms, lengths=None):
            if 807 in (lengths or [waveforms.shape[1]]):
                raise RuntimeError("no room")
            return super().embed(waveforms, lengths)

    with pytest.warns(UserWarning, match="1 of 12"):
        table = extract(corpus, Picky(), cache, progress=False, how=Extraction(clips=4))
    assert [(path.name, reason) for path, reason in table.failures] == [("001.wav", "encoder tiny failed: no room")]
    np.testing.assert_allclose(table.values, np.delete(direct(corpus), 1, 0), atol=1e-6)


def test_ways_of_extraction_have_places_of_their_own(corpus, cache):
    exact = run(corpus, cache).values
    how = Extraction(precision="bf16")
    table = extract(corpus, TinyEncoder(), cache, progress=False, how=how)
    assert table.reused == 0
    assert table.values.dtype == np.float32
    assert (table.values != exact).any()
    np.testing.assert_allclose(table.values, exact, atol=2e-2)
    assert run(corpus, cache).values.tobytes() == exact.tobytes()
    suffixes = [
        Extraction(*options).suffix for options in ((), (8,), (1, "bf16"), (1, "fp32", True), (8, "bf16", True))
    ]
    assert suffixes == ["", "-8-clips", "-bf16", "-compiled", "-8-clips-bf16-compiled"]


def test_a_compiled_encoder_gives_what_the_plain_one_gives(corpus, cache, monkeypatch):
    compiled = []

    def fake(function, dynamic):
        compiled.append(dynamic)
        return function

    monkeypatch.setattr(torch, "compile", fake)  # what inductor makes of an encoder is measured, not tested
    table = extract(corpus, TinyEncoder(), cache, progress=False, how=Extraction(compile=True))
    assert compiled == [True]
    np.testing.assert_array_equal(table.values, direct(corpus))


@pytest.mark.parametrize("options", [{"clips": 0}, {"clips": 1.5}, {"precision": "fp16"}])
def test_ways_that_there_are_not(options):
    with pytest.raises(ValueError, match="Extraction: `"):
        Extraction(**options)


@pytest.mark.parametrize("kind", ["frames", "layers"])
def test_other_kinds_of_features(corpus, tmp_path, kind):
    encoder, embedded = TinyEncoder(), extract(corpus, TinyEncoder(), tmp_path / "cache", False)
    table = extract(corpus, encoder, tmp_path / "cache", False, kind=kind)
    assert np.array_equal(table.indices, embedded.indices)
    assert table.hashes == embedded.hashes
    assert table.reused == 0
    for got, mean, utterance in zip(table.rows[:], embedded.values, corpus.utterances, strict=True):
        waveform = soundfile.read(utterance.path, dtype="float32")[0]
        frames = encoder.frames(torch.from_numpy(waveform)[None])[0][0].detach().numpy()
        assert got.shape == (frames.shape if kind == "frames" else (2, DIM))
        np.testing.assert_allclose(got if kind == "frames" else got[0], frames if kind == "frames" else mean, atol=1e-6)
        assert np.array_equal(features.embed_clip(encoder, waveform, kind), got)
    again = extract(corpus, encoder, tmp_path / "cache", False, kind=kind)
    assert again.reused == len(corpus)
    assert all(np.array_equal(a, b) for a, b in zip(again.rows[:], table.rows[:], strict=True))


def test_an_unknown_kind_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="`kind` must be one of embeddings, frames, layers; got 'tokens'"):
        extract(corpus, TinyEncoder(), tmp_path, False, kind="tokens")
    with pytest.raises(ValueError, match="embeddings, which alone are compiled; got 'frames'"):
        extract(corpus, TinyEncoder(), tmp_path, False, how=features.Extraction(compile=True), kind="frames")


def test_recordings_of_one_name_in_two_folders_are_both_left_out(tmp_path):
    good = make_corpus(tmp_path, 2)
    bad = [Utterance(tmp_path / folder / "bad.wav", "s9", good.labels[0], "x") for folder in ("one", "two")]
    corpus = Corpus("two", tmp_path, (*good.utterances, *bad), good.labels)
    with pytest.warns(UserWarning, match="2 of 4 recordings can't be used"):
        rows, _, _, failures = embed_corpus(corpus, [TinyEncoder()], tmp_path / "cache", Extraction())
    assert rows.tolist() == [0, 1]
    assert [name for name, _ in failures] == ["bad.wav", "bad.wav"]
