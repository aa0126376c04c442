"""The feature store: what goes in comes out, from disk, whatever happens to the files and whoever else writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from parrot import store
from parrot.corpora.splits import Fold
from parrot.evaluation import digest
from parrot.model import build
from parrot.ragged import Ragged
from parrot.store import FeatureStore, StoredRows
from parrot.training import TrainingConfig, predict, train

DIM = 5


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def row(number: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(dim).astype(np.float32)


def frames(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((1 + number % 4, DIM)).astype(np.float32)


def shards(opened: FeatureStore) -> list[Path]:
    return sorted(opened.folder.glob("shard-*.safetensors"))


def filled(folder: Path, n: int = 20, **options) -> FeatureStore:
    """A store of several shards."""
    opened = FeatureStore(folder, "enc", DIM, **options)
    value = frames if options.get("ragged") else row
    for start in range(0, n, 4):
        opened.add({key(i): value(i) for i in range(start, min(n, start + 4))})
    return opened


def expected(numbers) -> np.ndarray:
    return np.stack([row(i) for i in numbers])


def test_rows_come_in_the_order_of_the_keys(tmp_path):
    filled(tmp_path)
    opened = FeatureStore(tmp_path, "enc", DIM)
    order = np.random.default_rng(0).permutation(20)
    rows = opened.rows([key(i) for i in order])
    assert isinstance(rows, StoredRows)
    assert (rows.shape, rows.ndim, rows.dtype, rows.nbytes) == ((20, DIM), 2, np.float32, 20 * DIM * 4)
    np.testing.assert_array_equal(np.asarray(rows), expected(order))
    assert rows.keys[3].tobytes() == key(order[3])
    assert len(opened) == 20
    assert key(7) in opened
    assert key(99) not in opened
    np.testing.assert_array_equal(opened[key(7)], row(7))


@pytest.mark.parametrize("index", [3, -1, slice(2, 11), slice(None, None, -3), np.array([5, 5, 0]), [1, 2], []])
def test_indexing_is_numpys(tmp_path, index):
    rows = filled(tmp_path).rows([key(i) for i in range(20)])
    whole = expected(range(20))
    index = np.zeros(0, np.int64) if isinstance(index, list) and not index else index
    np.testing.assert_array_equal(rows[index], whole[index])
    if not isinstance(index, int):
        np.testing.assert_array_equal(np.asarray(rows.select(index)), whole[index])


def test_masks_iteration_and_digest(tmp_path):
    rows = filled(tmp_path).rows([key(i) for i in range(20)])
    whole = expected(range(20))
    mask = whole[:, 0] > 0
    np.testing.assert_array_equal(rows[mask], whole[mask])
    np.testing.assert_array_equal(np.stack(list(rows)), whole)
    assert digest(rows) == digest(whole)
    with pytest.raises(IndexError):
        rows[20]
    with pytest.raises(ValueError, match="copy"):
        np.array(rows, copy=False)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(KeyError, match=f"lacks 1 of 2 keys, the first: {key(50).hex()}"):
        filled(tmp_path).rows([key(0), key(50)])


def test_no_rows_at_all(tmp_path):
    assert np.asarray(FeatureStore(tmp_path, "enc", DIM).rows([])).shape == (0, DIM)


def test_keys_that_end_in_zeros(tmp_path):
    """NumPy's strings, by which the index is sorted, end where only zeros follow."""
    keys = [bytes(32), bytes(31) + b"x", b"x" + bytes(31), b"x" + bytes(30) + b"\1"]
    opened = FeatureStore(tmp_path, "enc", DIM)
    opened.add({k: row(i) for i, k in enumerate(keys)})
    for reader in (opened, FeatureStore(tmp_path, "enc", DIM)):
        reader._enter([])
        np.testing.assert_array_equal(np.asarray(reader.rows(keys)), expected(range(4)))


def test_the_sorted_index_agrees_with_the_dictionary(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FOLD", 6)
    opened = filled(tmp_path, 50)
    assert len(opened._sorted) > 30
    assert len(opened) == len(FeatureStore(tmp_path, "enc", DIM)) == 50
    np.testing.assert_array_equal(np.asarray(opened.rows([key(i) for i in range(50)])), expected(range(50)))
    assert key(50) not in opened


def test_a_reader_in_another_process_gets_the_place_not_the_values(tmp_path):
    opened = FeatureStore(tmp_path, "enc", 1000)
    opened.add({key(i): row(i, 1000) for i in range(30)})
    rows = opened.rows([key(i) for i in range(29, -1, -1)])
    pickled = pickle.dumps(rows)
    assert len(pickled) < rows.nbytes / 10
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickled)), np.asarray(rows))


def test_half_precision(tmp_path):
    filled(tmp_path, dtype=np.float16)
    rows = FeatureStore(tmp_path, "enc", DIM, dtype=np.float16).rows([key(3)])
    np.testing.assert_array_equal(rows[0], row(3).astype(np.float16))
    with pytest.raises(ValueError, match="float32 or float16"):
        FeatureStore(tmp_path, "enc", DIM, dtype=np.float64)


def test_ragged(tmp_path):
    filled(tmp_path, ragged=True)
    order = [7, 0, 19, 7]
    rows = FeatureStore(tmp_path, "enc", DIM, ragged=True).rows([key(i) for i in order])
    assert rows.lengths.tolist() == [1 + i % 4 for i in order]
    assert rows.shape == (rows.lengths.sum(), DIM)
    assert len(rows) == 4
    for got, number in zip(rows[:], order, strict=True):
        np.testing.assert_array_equal(got, frames(number))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows.select([2])))[0], frames(19))
    assert digest(rows) == digest(Ragged.join([frames(number) for number in order]))
    with pytest.raises(ValueError, match="different numbers of frames"):
        np.asarray(rows)


@pytest.mark.parametrize(
    ("ragged", "bad"), [(False, (DIM + 1,)), (False, (2, DIM)), (True, (DIM,)), (True, (0, DIM)), (True, (2, DIM + 1))]
)
def test_features_of_another_shape_are_refused(tmp_path, ragged, bad):
    opened = FeatureStore(tmp_path, "enc", DIM, ragged=ragged)
    with pytest.raises(ValueError, match="wanted features of shape"):
        opened.add({key(0): np.zeros(bad, np.float32)})
    assert shards(opened) == []


@pytest.mark.parametrize("ragged", [False, True])
def test_small_shards_are_merged(tmp_path, monkeypatch, ragged):
    monkeypatch.setattr(store, "MERGE", 4)
    monkeypatch.setattr(store, "SHARD_BYTES", 900)
    value = frames if ragged else row
    early = filled(tmp_path, 8, ragged=ragged).rows([key(i) for i in range(8)])
    follower = FeatureStore(tmp_path, "enc", DIM, ragged=ragged)
    writer = filled(tmp_path, 200, ragged=ragged)
    assert len(shards(writer)) < 25  # of 50 that were written
    for opened in (writer, follower, FeatureStore(tmp_path, "enc", DIM, ragged=ragged)):
        rows = opened.rows([key(i) for i in range(200)])
        for i in range(200):
            np.testing.assert_array_equal(rows[i], value(i))
    assert not any(path.exists() for path in (shard.path for shard in early._shards))
    for i in range(8):  # the files it has open were merged away
        np.testing.assert_array_equal(early[i], value(i))
    assert sum(len(load_file(path)["keys"]) for path in shards(writer)) == 200
    if not ragged:
        assert {load_file(path)["values"].nbytes >= 900 for path in shards(writer)[:-4]} == {True}


def test_a_merge_that_was_cut_short_loses_nothing_and_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MERGE", 4)
    opened = FeatureStore(tmp_path, "enc", DIM)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path, 16)
    assert len(shards(opened)) == 5  # the four and the merged one
    again = FeatureStore(tmp_path, "enc", DIM)
    assert len(again) == 16
    np.testing.assert_array_equal(np.asarray(again.rows([key(i) for i in range(16)])), expected(range(16)))
    again.add({key(16): row(16)})
    np.testing.assert_array_equal(np.asarray(again.rows([key(i) for i in range(17)])), expected(range(17)))
    assert sum(len(load_file(path)["keys"]) for path in shards(again)) == 17


def test_a_disk_that_is_full_when_shards_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MERGE", 4)
    opened, sync, calls = filled(tmp_path, 12), os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"can't write to the cache .*No space left"):
            opened.add({key(i): row(i) for i in range(12, 16)})
    again = FeatureStore(tmp_path, "enc", DIM)
    np.testing.assert_array_equal(np.asarray(again.rows([key(i) for i in range(16)])), expected(range(16)))


def test_a_cache_of_an_earlier_version_is_read(tmp_path):
    """As safetensors itself writes it."""
    folder = tmp_path / "enc-v1"
    folder.mkdir()
    keys = np.frombuffer(b"".join(key(i) for i in range(6)), np.uint8).reshape(-1, 32)
    values = expected(range(6))
    checksum = hashlib.sha256(keys.tobytes() + values.tobytes()).hexdigest()
    metadata = {"fingerprint": "enc", "sha256": checksum}
    save_file({"keys": keys, "values": values}, folder / "shard-000001.safetensors", metadata)
    rows = FeatureStore(tmp_path, "enc", DIM).rows(keys)
    np.testing.assert_array_equal(np.asarray(rows), values)


def test_others_can_read_a_shard(tmp_path):
    opened = filled(tmp_path, 4, ragged=True)
    (path,) = shards(opened)
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["values"], np.concatenate([frames(i) for i in range(4)]))
    assert tensors["offsets"].tolist() == [0, 1, 3, 6, 10]
    assert tensors["keys"].tobytes() == b"".join(key(i) for i in range(4))
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        assert size % 8 == 0
        json.loads(file.read(size))


@pytest.mark.parametrize("damage", ["truncated", "other encoder", "offsets", "ragged", "values"])
def test_a_bad_shard_is_named_and_the_others_are_kept(tmp_path, damage):
    opened = filled(tmp_path, 20, ragged=True)
    bad = shards(opened)[2]
    with safe_open(bad, "numpy") as file:
        metadata = file.metadata()
    tensors = load_file(bad)
    if damage == "truncated":
        bad.write_bytes(bad.read_bytes()[:-40])
        why = "incomplete|invalid|large|[Ee]rror|Header"
    elif damage == "other encoder":
        save_file(tensors, bad, {**metadata, "fingerprint": "other"})
        why = "belongs to another encoder"
    elif damage == "offsets":
        save_file({**tensors, "offsets": tensors["offsets"][::-1].copy()}, bad, metadata)
        why = "offsets that do not part"
    elif damage == "ragged":
        save_file({name: tensors[name] for name in ("keys", "values")}, bad, metadata)
        why = "no tensor offsets"
    else:
        tensors["values"][0, 0] += 1
        save_file(tensors, bad, metadata)
        why = "checksum does not match"
    with pytest.warns(RuntimeWarning, match=rf"{re.escape(bad.name)}.corrupt \(.*({why})"):
        again = FeatureStore(tmp_path, "enc", DIM, ragged=True)
    assert len(again) == 16
    np.testing.assert_array_equal(again[key(0)], frames(0))
    again.add({key(i): frames(i) for i in range(20)})
    np.testing.assert_array_equal(again[key(9)], frames(9))


def test_without_verification_only_the_sizes_are_checked(tmp_path):
    opened = filled(tmp_path, 4)
    (path,) = shards(opened)
    data = bytearray(path.read_bytes())
    data[-40 * 4] ^= 1
    path.write_bytes(data)
    assert len(FeatureStore(tmp_path, "enc", DIM, verify=False)) == 4


WRITER = """
import sys
sys.path[:0] = {paths!r}
import test_store as t
t.store.MERGE, t.store.SHARD_BYTES = 4, 2000
opened = t.FeatureStore({folder!r}, "enc", t.DIM)
for i in t.np.random.default_rng(int(sys.argv[1])).permutation(120):
    opened.add({{t.key(i): t.row(i)}})
"""


def test_two_processes_write_and_merge_at_once(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(store.__file__).parents[1])]
    program = WRITER.format(paths=paths, folder=str(tmp_path))
    writers = [subprocess.Popen([sys.executable, "-c", program, str(seed)]) for seed in range(2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    opened = FeatureStore(tmp_path, "enc", DIM)
    np.testing.assert_array_equal(np.asarray(opened.rows([key(i) for i in range(120)])), expected(range(120)))
    assert sum(len(load_file(path)["keys"]) for path in shards(opened)) == 120


def resident(rows: StoredRows) -> int:
    """Bytes of the shards' pages that this process holds."""
    names, total, counted = {str(shard.path) for shard in rows._shards}, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = line.split(maxsplit=5)[-1] in names
        elif counted and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's account of memory")
def test_memory_stays_bounded(tmp_path, monkeypatch):
    """40 MB of features, read at random under a limit of 8 MB."""
    n, dim = 40_000, 256
    values = np.random.default_rng(0).standard_normal((n, dim), np.float32)
    keys = [key(i) for i in range(n)]
    opened = FeatureStore(tmp_path, "enc", dim)
    opened.add(dict(zip(keys, values, strict=True)))
    rows = opened.rows(keys)
    monkeypatch.setattr(store, "MAPPED_BYTES", 1 << 40)
    np.asarray(rows)
    held = resident(rows)
    monkeypatch.setattr(store, "MAPPED_BYTES", 8 << 20)
    most = 0
    for batch in np.random.default_rng(1).permutation(n).reshape(-1, 32)[:300]:
        np.testing.assert_array_equal(rows[batch], values[batch])
        most = max(most, resident(rows))
    assert held > 30 << 20  # without a limit
    assert most < 12 << 20


@pytest.mark.parametrize("system", ["parrot", "cnn-1", "parrot-reference"])
def test_training_from_disk_is_training_from_memory(tmp_path, system):
    n, dims = 120, (12, 8)
    labels = np.arange(n) % 3
    rows = []
    for which, dim in enumerate(dims):
        opened = FeatureStore(tmp_path, f"enc{which}", dim)
        for start in range(0, n, 30):
            opened.add({key(i): row(10 * i + which, dim) + labels[i] for i in range(start, start + 30)})
        rows.append(opened.rows([key(i) for i in range(n)]))
    order = np.random.default_rng(0).permutation(n)
    fold = Fold(0, order[:70], order[70:90], order[90:])
    results, states = [], []
    for features in (rows, [np.asarray(r) for r in rows]):
        torch.manual_seed(0)
        model = build(system, dims, 3)
        results.append(train(model, features, labels, fold, TrainingConfig(epochs=3, device="cpu"), seed=1))
        states.append(model.state_dict())
    assert results[0].history == results[1].history
    np.testing.assert_array_equal(results[0].test_logits, results[1].test_logits)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    np.testing.assert_array_equal(predict(model, rows), predict(model, [np.asarray(r) for r in rows]))


def test_rows_that_are_not_finite_are_named_by_training(tmp_path):
    opened = FeatureStore(tmp_path, "enc", DIM)
    opened.add({key(i): row(i) if i != 7 else np.full(DIM, np.nan, np.float32) for i in range(20)})
    rows = opened.rows([key(i) for i in range(20)])
    fold = Fold(0, np.arange(12), np.arange(12, 16), np.arange(16, 20))
    with pytest.raises(ValueError, match="row 7 is not"):
        train(build("fcn-0", [DIM], 2), [rows], np.arange(20) % 2, fold)
