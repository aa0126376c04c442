"""The feature cache: complete, bit-exact, and proof against crashes, damage, bad files and company."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from parrot import features, store
from parrot.corpora import Corpus, Utterance
from parrot.features import extract
from parrot.store import FeatureStore

RATE = 16_000
DIM = 6


class TinyEncoder(nn.Module):
    """A few random filters; counts its calls."""

    name, sample_rate, embedding_dim, min_samples, threads = "tiny", RATE, DIM, 400, None

    def __init__(self, seed: int = 0, seconds: float = 0.0):
        super().__init__()
        self.fingerprint = f"{seed:032x}"
        self.seconds, self.calls = seconds, 0
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(DIM, 1, 64, generator=generator))
        self.eval()

    def embed(self, waveforms: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        assert waveforms.shape[0] == 1
        self.seen_threads = torch.get_num_threads()
        assert waveforms.dtype == torch.float32
        time.sleep(self.seconds)
        self.calls += 1
        return nn.functional.conv1d(waveforms[:, None], self.weight, stride=32).tanh().mean(-1)

    def frames(self, waveforms: torch.Tensor, lengths=None) -> tuple[torch.Tensor, torch.Tensor]:
        found = nn.functional.conv1d(waveforms[:, None], self.weight, stride=32).tanh().transpose(1, 2)
        return found, torch.full((len(found),), found.shape[1])

    def hidden_states(self, waveform: torch.Tensor) -> tuple[torch.Tensor, ...]:
        frames = self.frames(waveform[None])[0][0]
        return frames, 2 * frames


class MaskingEncoder(TinyEncoder):
    """Takes clips of different lengths at once; notes the lengths."""

    maskable = True

    def embed(self, waveforms: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
        lengths = lengths or [waveforms.shape[1]] * len(waveforms)
        self.batches = [*getattr(self, "batches", []), lengths]
        frames = nn.functional.conv1d(waveforms[:, None], self.weight, stride=32).tanh()
        counts = [(length - 64) // 32 + 1 for length in lengths]
        return torch.stack([row[:, :count].mean(-1) for row, count in zip(frames, counts, strict=True)])


def make_corpus(root: Path, n: int = 12) -> Corpus:
    rng = np.random.default_rng(0)
    utterances = []
    for i in range(n):
        path = root / f"{i:03d}.wav"
        if not path.exists():
            soundfile.write(path, 0.1 * rng.standard_normal(800 + 7 * i), RATE, "PCM_16")
        utterances.append(Utterance(path, f"s{i % 5}", "ab"[i % 2], "x"))
    return Corpus("toy", root, tuple(utterances), ("a", "b"))


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    (tmp_path / "wav").mkdir()
    return make_corpus(tmp_path / "wav")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def run(corpus: Corpus, cache: Path, encoder: TinyEncoder | None = None) -> features.FeatureTable:
    table = extract(corpus, encoder or TinyEncoder(), cache, progress=False)
    assert table.values.shape == table.rows.shape  # read now: tests go on to damage the files
    return table


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/shard-*.safetensors"))


def direct(corpus: Corpus) -> np.ndarray:
    encoder = TinyEncoder()
    with torch.inference_mode():
        rows = [encoder.embed(torch.from_numpy(soundfile.read(u.path, dtype="float32")[0])[None])
                for u in corpus.utterances]  # fmt: skip
    return torch.cat(rows).numpy()


def test_values_are_the_encoders(corpus, cache):
    table = run(corpus, cache)
    assert table.values.dtype == np.float32
    np.testing.assert_array_equal(table.values, direct(corpus))
    np.testing.assert_array_equal(table.indices, np.arange(len(corpus)))
    assert table.failures == []
    assert table.reused == 0


def test_second_run_computes_nothing_and_gives_the_same_bits(corpus, cache):
    first, encoder = run(corpus, cache), TinyEncoder()
    second = run(corpus, cache, encoder)
    assert encoder.calls == 0
    assert second.reused == len(corpus)
    assert second.values.tobytes() == first.values.tobytes()
    assert len(shards(cache)) == 1


def test_keyed_by_content_and_encoder(corpus, cache):
    first = run(corpus, cache)
    paths = [u.path for u in corpus.utterances]
    paths[0].rename(paths[0].with_name("renamed.wav"))  # same content under another name
    renamed = Utterance(paths[0].with_name("renamed.wav"), "s0", "a", "x")
    soundfile.write(paths[1], 0.1 * np.ones(900), RATE, "PCM_16")  # other content under the same name
    changed = Corpus("toy", corpus.root, (renamed, *corpus.utterances[1:]), corpus.labels)
    encoder = TinyEncoder()
    second = run(changed, cache, encoder)
    assert encoder.calls == 1
    np.testing.assert_array_equal(np.delete(second.values, 1, 0), np.delete(first.values, 1, 0))
    assert (second.values[1] != first.values[1]).any()

    other = TinyEncoder(seed=1)
    assert (run(changed, cache, other).values != second.values).any()
    assert other.calls == len(corpus)


def test_same_content_twice_is_computed_once(corpus, cache):
    paths = [u.path for u in corpus.utterances]
    paths[1].write_bytes(paths[0].read_bytes())
    encoder = TinyEncoder()
    table = run(corpus, cache, encoder)
    assert encoder.calls == len(corpus) - 1
    np.testing.assert_array_equal(table.values[0], table.values[1])


def test_grows_with_the_corpus(tmp_path, cache):
    small = run(make_corpus(tmp_path, 5), cache)
    encoder = TinyEncoder()
    large = run(make_corpus(tmp_path, 9), cache, encoder)
    assert encoder.calls == 4
    np.testing.assert_array_equal(large.values[:5], small.values)


def test_bad_files_are_listed_and_lose_nothing(corpus, cache):
    good = run(corpus, cache / "all good").values
    paths = [u.path for u in corpus.utterances]
    paths[2].write_bytes(b"")
    soundfile.write(paths[5], np.zeros(900), RATE)
    soundfile.write(paths[6], 0.1 * np.ones(100), RATE)
    paths[8].unlink()
    with pytest.warns(UserWarning, match="4 of 12 recordings can't be used; the first: .*002.wav: empty file"):
        table = run(corpus, cache)
    reasons = {path.name: reason for path, reason in table.failures}
    assert list(reasons) == ["002.wav", "005.wav", "006.wav", "008.wav"]
    for reason, words in zip(reasons.values(), ("empty", "silent", "too short", "no such file"), strict=True):
        assert words in reason
    kept = [0, 1, 3, 4, 7, 9, 10, 11]
    assert table.indices.tolist() == kept
    np.testing.assert_array_equal(table.values, good[kept])


def test_a_repaired_file_is_tried_again(corpus, cache):
    path = corpus.utterances[3].path
    content = path.read_bytes()
    path.write_bytes(content[:20])
    with pytest.warns(UserWarning, match="1 of 12"):
        run(corpus, cache)
    path.write_bytes(content)
    encoder = TinyEncoder()
    table = run(corpus, cache, encoder)
    assert encoder.calls == 1
    np.testing.assert_array_equal(table.values, direct(corpus))


def test_an_encoder_that_fails_on_one_clip(corpus, cache):
    class Picky(TinyEncoder):
        def embed(self, waveforms):
            if waveforms.shape[1] == 807:
                raise RuntimeError("no room")
            return super().embed(waveforms) * (float("nan") if waveforms.shape[1] == 814 else 1.0)

    with pytest.warns(UserWarning, match="2 of 12"):
        table = run(corpus, cache, Picky())
    assert [reason for _, reason in table.failures] == [
        "encoder tiny failed: no room",
        "encoder tiny gave values that are not finite",
    ]
    assert len(table.values) == 10


def test_errors(corpus, cache):
    with pytest.raises(ValueError, match=r"training mode, wanted evaluation: call encoder.eval\(\)"):
        run(corpus, cache, TinyEncoder().train())
    wrong = TinyEncoder()
    wrong.embedding_dim = DIM + 1
    with pytest.raises(ValueError, match=r"wanted an embedding of shape \(1, 7\), got \(1, 6\)"):
        run(corpus, cache, wrong)
    for utterance in corpus.utterances:
        utterance.path.write_bytes(b"")
    with pytest.raises(ValueError, match="12 of 12 recordings can't be used"):
        run(corpus, cache)


def test_an_interrupt_keeps_what_is_done(corpus, cache):
    class Interrupted(TinyEncoder):
        def embed(self, waveforms):
            if self.calls == 7:
                raise KeyboardInterrupt
            return super().embed(waveforms)

    with pytest.raises(KeyboardInterrupt):
        run(corpus, cache, Interrupted())
    table = run(corpus, cache)
    assert table.reused == 7
    np.testing.assert_array_equal(table.values, direct(corpus))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # still a valid safetensors file
    path.write_bytes(data)


def rewrite(path: Path, **changes) -> None:
    tensors = load_file(path)
    save_file({**tensors, **changes}, path)


def lose_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    save_file({"keys": tensors["keys"]}, path)


def lose_metadata(path: Path) -> None:
    rewrite(path)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, lose_a_tensor, lose_metadata])
def test_a_corrupt_shard_is_set_aside_and_extracted_again(corpus, cache, monkeypatch, damage):
    monkeypatch.setattr(features, "FLUSH_SECONDS", -1.0)  # a shard for each clip
    first = run(corpus, cache)
    assert len(shards(cache)) == len(corpus)
    victim = shards(cache)[4]
    damage(victim)
    encoder = TinyEncoder()
    with pytest.warns(RuntimeWarning, match=f"corrupt shard set aside as .*{victim.name}.corrupt"):
        second = run(corpus, cache, encoder)
    assert encoder.calls == 1
    assert second.values.tobytes() == first.values.tobytes()
    assert victim.with_name(victim.name + ".corrupt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(corpus, cache).values.tobytes() == first.values.tobytes()


def test_a_shard_of_another_encoder_is_not_believed(corpus, cache):
    first = run(corpus, cache)
    run(corpus, cache, TinyEncoder(seed=1))
    own, other = (next(cache.glob(f"{seed:032x}-*")) for seed in (0, 1))
    (own / "shard-000001.safetensors").write_bytes((other / "shard-000001.safetensors").read_bytes())
    with pytest.warns(RuntimeWarning, match="belongs to another encoder"):
        assert run(corpus, cache).values.tobytes() == first.values.tobytes()


def test_other_files_in_the_folder_do_no_harm(corpus, cache):
    first = run(corpus, cache)
    folder = shards(cache)[0].parent
    (folder / "shard-mine.safetensors").write_bytes(b"someone else's")
    with pytest.warns(RuntimeWarning, match="corrupt shard set aside as .*shard-mine.safetensors.corrupt"):
        assert run(corpus, cache).values.tobytes() == first.values.tobytes()
    grown = make_corpus(corpus.root, 14)
    assert run(grown, cache).reused == 12
    assert [path.name for path in shards(cache)] == ["shard-000001.safetensors", "shard-000002.safetensors"]


def test_a_shard_of_other_types_is_not_believed(corpus, cache):
    first = run(corpus, cache)
    shard = shards(cache)[0]
    with safe_open(shard, "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    save_file({**tensors, "values": tensors["values"].astype(np.float64)}, shard, metadata)
    with pytest.warns(RuntimeWarning, match="unexpected types U8 and F64"):
        assert run(corpus, cache).values.tobytes() == first.values.tobytes()


def fill_the_disk(monkeypatch, after: int) -> None:
    """Let all writes after the first few fail as on a full disk, halfway through the file."""
    done, sync = [], os.fsync

    def fsync(descriptor):
        done.append(descriptor)
        if len(done) > after:
            os.ftruncate(descriptor, 50)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_told_and_loses_nothing(corpus, cache, monkeypatch):
    monkeypatch.setattr(features, "FLUSH_SECONDS", -1.0)  # a shard for each clip
    with monkeypatch.context() as full:
        fill_the_disk(full, after=5)
        with pytest.raises(
            OSError, match=r"can't write to the cache .*: No space left on device. What it holds is kept"
        ) as e:
            run(corpus, cache)
    assert e.value.errno == errno.ENOSPC
    assert len(shards(cache)) == 5
    assert not list(cache.glob("*/.*.tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = run(corpus, cache)
    assert table.reused == 5
    np.testing.assert_array_equal(table.values, direct(corpus))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_writing_to_a_device_that_is_full(corpus, cache, monkeypatch):
    """The system's own ENOSPC, from a temporary file that leads to /dev/full."""
    cached = FeatureStore(cache, "f" * 32, 3)
    monkeypatch.setattr("parrot.files.uuid.uuid4", lambda: uuid.UUID(int=0))
    (cached.folder / f".shard-000001.safetensors.{'0' * 32}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        cached.add({bytes(32): np.ones(3, np.float32)})
    assert shards(cache) == []
    cached.add({bytes(32): np.ones(3, np.float32)})
    assert FeatureStore(cache, "f" * 32, 3)[bytes(32)].tolist() == [1, 1, 1]


def test_a_cache_that_is_a_file(corpus, cache):
    cache.write_text("notes")
    with pytest.raises(OSError, match=r"can't use the cache .*use another cache folder"):
        run(corpus, cache)
    assert cache.read_text() == "notes"


def test_hashes_tell_recordings_that_are_the_same(corpus, cache):
    paths = [u.path for u in corpus.utterances]
    paths[1].write_bytes(paths[0].read_bytes())
    hashes = run(corpus, cache).hashes
    assert hashes[0] == hashes[1] == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert len(set(hashes)) == len(corpus) - 1


def test_the_first_value_of_a_key_stays(cache):
    one, two = (FeatureStore(cache, "f", 3) for _ in range(2))
    key, other = bytes(32), bytes(31) + b"x"
    one.add({key: np.ones(3, np.float32)})
    two.add({key: np.zeros(3, np.float32), other: np.zeros(3, np.float32)})
    for view in (two, FeatureStore(cache, "f", 3)):
        assert view[key].tolist() == [1, 1, 1]
        assert view[other].tolist() == [0, 0, 0]
    assert [len(load_file(path)["keys"]) for path in shards(cache)] == [1, 1]


def test_a_held_lock_is_an_error_not_a_hang(cache, monkeypatch):
    holder = FeatureStore(cache, "f", 3)
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
    with holder._locked(), pytest.raises(RuntimeError, match=r"another process has held the lock .* for 0.2 s"):
        FeatureStore(cache, "f", 3)


CHILD = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import numpy as np
import test_features as t
t.features.FLUSH_SECONDS = 0.02
corpus = t.make_corpus(Path({wav!r}), {n})
table = t.run(corpus, Path({cache!r}), t.TinyEncoder(seconds={seconds}))
np.save(sys.argv[1], table.values)
"""


def start(corpus: Corpus, cache: Path, result: Path, seconds: float = 0.002) -> subprocess.Popen:
    paths = [str(Path(__file__).parent), str(Path(features.__file__).parents[1])]
    wav = str(corpus.utterances[0].path.parent)
    program = CHILD.format(paths=paths, wav=wav, n=len(corpus), cache=str(cache), seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", program, str(result)])


@pytest.mark.slow
def test_killed_at_any_time_nothing_is_lost(tmp_path, cache):
    """kill -9 again and again, each time a little after the run has made progress."""
    corpus = make_corpus(tmp_path, 150)
    rng = np.random.default_rng(0)
    kills = 0
    before = -1
    while len(shards(cache)) > before and kills < 6:
        before = len(shards(cache))
        process = start(corpus, cache, tmp_path / "result.npy", seconds=0.01)
        while process.poll() is None and len(shards(cache)) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    done = sum(len(load_file(path)["keys"]) for path in shards(cache))  # every shard can be read
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = run(corpus, cache)
    assert table.reused == done > 0
    assert not list(cache.glob("*/.*.tmp"))
    np.testing.assert_array_equal(table.values, direct(corpus))


@pytest.mark.slow  # test_store.py has two processes write at once
def test_two_processes_share_a_cache(tmp_path, cache):
    corpus = make_corpus(tmp_path, 150)
    results = [tmp_path / f"{i}.npy" for i in range(2)]
    processes = [start(corpus, cache, result) for result in results]
    assert [process.wait(120) for process in processes] == [0, 0]
    one, two = (np.load(result) for result in results)
    assert one.tobytes() == two.tobytes()
    np.testing.assert_array_equal(one, direct(corpus))
    keys = np.concatenate([load_file(path)["keys"] for path in shards(cache)])
    assert len(keys) == len(np.unique(keys, axis=0)) == len(corpus)
    assert run(corpus, cache).reused == len(corpus)
