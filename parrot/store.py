"""Features on disk: content-addressed, in shards that are memory-mapped, and proof against crashes and company.

A store is a folder of numbered safetensors shards that belong to one encoder. A shard maps the SHA-256 of audio
files (``keys``, (n, 32) uint8) to features (``values``): (n, dim) for one vector per file, or, in a ragged store,
the (frames, dim) of all files after each other, file i's from ``offsets[i]`` to ``offsets[i + 1]``. A shard is
written whole or not at all and never changes. Writers hold a lock only while they add a shard, and first take over
what others have added: several processes can share a store, and a key that has a value keeps it. When small shards
pile up they are merged into large ones; who has them open reads on.

In memory are the keys, 40 bytes each; values are read from the disk as they are asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from parrot.files import write_atomically

FORMAT = "v1"  # part of the folder name: a change in how recordings are read or kept starts a new store
LOCK_SECONDS = 60.0
SHARD_BYTES = 256 << 20  # a shard below this is small
MERGE = 64  # so many small shards become large ones
FOLD = 1 << 16  # new keys that are kept in a dictionary before they are sorted into the index
MAPPED_BYTES = 256 << 20  # resident pages of the files, about, before they are given back
FAULT_BYTES = 2 << 20  # the most that the system maps around a byte that is read
_SHARD_NUMBER = re.compile(r"shard-(\d+)\.")
_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}


class FeatureStore:
    """The features of one encoder, by the SHA-256 of the audio file's content.

    Args:
        folder: where stores lie; this one's is ``folder/IDENTITY-v1``, made if missing.
        identity: of the encoder, its configuration and weights, and of how features were made with it.
        dim: width of the features.
        ragged: (frames, dim) for each file, at least one frame, instead of (dim,).
        dtype: np.float32 or np.float16, in which values are kept.
        verify: compare the checksum of every shard, which reads all of it once. Without, only the header, the sizes
            and the owner are checked.

    Raises:
        RuntimeError: another process holds the lock for a minute.
        OSError: the folder can't be made, read or written; the disk is full. What is in the store stays.

    A shard that is truncated, damaged or another encoder's is renamed to ``*.corrupt`` with a `RuntimeWarning` that
    names it and says why; the others are kept.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        identity: str,
        dim: int,
        *,
        ragged: bool = False,
        dtype: Any = np.float32,
        verify: bool = True,
    ):
        self.folder = Path(folder) / f"{identity}-{FORMAT}"
        self.identity, self.dim, self.ragged, self.dtype = identity, dim, ragged, np.dtype(dtype)
        if self.dtype.name not in ("float32", "float16"):
            raise ValueError(f"FeatureStore: `dtype` must be float32 or float16; got {self.dtype}.")
        self._verify = verify
        self._forget()
        with self._explained("use"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock", timeout=LOCK_SECONDS)
        with self._locked(), self._explained("read"):
            for stale in self.folder.glob(".*.tmp"):  # files are only written under the lock
                stale.unlink()
            self._refresh()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, key: bytes) -> bool:
        return key in self._recent or self._find(as_keys([key]))[0] >= 0

    def __getitem__(self, key: bytes) -> np.ndarray:
        return self.rows(as_keys([key]))[0]

    def rows(self, keys: np.ndarray | Sequence[bytes]) -> StoredRows | StoredSequences:
        """The features of these keys, (n, 32) uint8 or n digests, in their order, as an array that stays on disk.

        Raises:
            KeyError: the store lacks one.
        """
        keys = as_keys(keys)
        with self._locked(), self._explained("read"):
            self._refresh()
            found = self._find(keys)
            if (missing := np.flatnonzero(found < 0)).size:
                first = keys[missing[0]].tobytes().hex()
                raise KeyError(f"{self.folder} lacks {missing.size} of {len(keys)} keys, the first: {first}")
            for shard in self._shards:
                shard.map()  # under the lock: nobody merges it away meanwhile
            kind = StoredSequences if self.ragged else StoredRows
            return kind(self, keys, tuple(self._shards), found)

    def add(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """Write the features ``rows`` (SHA-256 digest -> (dim,), or (frames, dim)) that no process has added yet."""
        if not rows:
            return
        with self._locked(), self._explained("write to"):
            self._refresh()
            new = {key: row for key, row in rows.items() if key not in self}
            if not new:
                return
            parts = [np.asarray(row, self.dtype) for row in new.values()]
            for part in parts:
                if part.ndim != 1 + self.ragged or part.shape[-1] != self.dim or not len(part):
                    wanted = f"(frames, {self.dim})" if self.ragged else f"({self.dim},)"
                    raise ValueError(f"FeatureStore.add: wanted features of shape {wanted}; got {part.shape}.")
            lengths = [len(part) for part in parts] if self.ragged else None
            values = np.concatenate(parts) if self.ragged else np.stack(parts)
            self._write(as_keys(list(new)), [values], lengths)
            self._refresh()
            small = [shard for shard in self._shards if shard.nbytes < SHARD_BYTES]
            if len(small) >= MERGE:
                self._merge(small)

    def _merge(self, small: list[_Shard]) -> None:
        group: list[_Shard] = []
        for shard in small:
            group.append(shard)
            if sum(member.nbytes for member in group) < SHARD_BYTES and shard is not small[-1]:
                continue
            if len(group) > 1:
                keys, lengths, values = [], [], []
                for member in group:
                    found = member.read_keys()
                    # A merge that was cut short left rows in two shards: each is taken from the one it is read from.
                    kept = np.flatnonzero(self._find(found) == member.first + np.arange(len(found)))
                    keys.append(found[kept])
                    if self.ragged:
                        lengths.append(np.diff(member.offsets)[kept])
                        values += [member.values[slice(*member.offsets[i : i + 2])] for i in kept]
                    else:
                        values.append(member.values if len(kept) == len(found) else member.values[kept])
                if any(map(len, keys)):
                    self._write(np.concatenate(keys), values, np.concatenate(lengths) if self.ragged else None)
                for member in group:
                    member.path.unlink()
            group = []
        self._refresh()

    def _write(self, keys: np.ndarray, values: list[np.ndarray], lengths: Sequence[int] | None) -> None:
        """Write a shard in the safetensors format, without a second copy of its values in memory."""
        total = sum(len(part) for part in values)
        arrays: dict[str, tuple[str, tuple[int, ...], list[np.ndarray]]] = {}
        if lengths is not None:
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            arrays["offsets"] = ("int64", offsets.shape, [offsets])
        arrays["values"] = (self.dtype.name, (total, self.dim), values)
        arrays["keys"] = ("uint8", keys.shape, [keys])
        digest = hashlib.sha256()
        for name in ("keys", "offsets", "values"):
            for part in arrays[name][2] if name in arrays else ():
                digest.update(_bytes(part))
        header: dict[str, Any] = {"__metadata__": {"fingerprint": self.identity, "sha256": digest.hexdigest()}}
        end = 0
        for name, (dtype, shape, _) in arrays.items():
            start, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)

        def pieces() -> Iterator[bytes | memoryview]:
            yield len(text).to_bytes(8, "little") + text
            for _, _, parts in arrays.values():
                for part in parts:
                    yield _bytes(part)

        taken = (_SHARD_NUMBER.match(path.name) for path in self.folder.glob("shard-*"))
        number = max((int(match[1]) for match in taken if match), default=0) + 1
        write_atomically(self.folder / f"shard-{number:06d}.safetensors", pieces())

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Say of an error of the system which store it is about and that nothing in it is lost."""
        try:
            yield
        except Timeout:  # an OSError too, which is explained elsewhere
            raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"features: can't {doing} the cache {self.folder}: {error.strerror or error}. What it holds is kept; "
                "make room or use another cache folder, and run again",
            ) from error

    def _locked(self):
        try:
            with self._explained("lock"):
                return self._lock.acquire()
        except Timeout:
            raise RuntimeError(
                f"features: another process has held the lock of {self.folder} for {LOCK_SECONDS:g} s: "
                "wait for it, end it, or use another cache folder"
            ) from None

    def _forget(self) -> None:
        self._shards: list[_Shard] = []
        self._sorted, self._places = np.zeros(0, "S32"), np.zeros(0, np.int64)
        self._recent: dict[bytes, int] = {}

    def _refresh(self) -> None:
        """Take over the shards that appeared since the last look; earlier ones win."""
        paths = {path.name: path for path in sorted(self.folder.glob("shard-*.safetensors"))}
        verified = {shard.path.name for shard in self._shards}
        if not verified <= paths.keys():  # some were merged
            self._forget()
        known = {shard.path.name for shard in self._shards}
        new = []
        for name, path in paths.items():
            if name in known:
                continue
            first = self._shards[-1].stop if self._shards else 0
            try:
                shard = _Shard(path, self, first, self._verify and name not in verified)
            except (SafetensorError, ValueError) as error:
                aside = path.with_name(path.name + ".corrupt")
                os.replace(path, aside)
                warnings.warn(
                    f"features: corrupt shard set aside as {aside} ({error}); its embeddings are extracted again",
                    RuntimeWarning,
                    stacklevel=4,
                )
                continue
            self._shards.append(shard)
            new.append(shard)
        self._enter(new)

    def _enter(self, shards: list[_Shard]) -> None:
        """Put the keys of shards into the index."""
        if len(self._recent) + sum(len(shard) for shard in shards) <= FOLD:
            for shard in shards:
                for place, key in enumerate(shard.read_keys(), shard.first):
                    if self._find(key[None])[0] < 0:
                        self._recent[key.tobytes()] = place
            return
        parts = [self._sorted, as_keys(list(self._recent)).view("S32")[:, 0]]
        places = [self._places, np.fromiter(self._recent.values(), np.int64, len(self._recent))]
        for shard in shards:
            parts.append(shard.read_keys().view("S32")[:, 0])
            places.append(np.arange(shard.first, shard.stop))
        keys = np.concatenate(parts)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        self._sorted, self._places, self._recent = keys[first], np.concatenate(places)[order][first], {}

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key (n, 32), counted through all shards; -1 where it is in none."""
        found = np.full(len(keys), -1)
        if len(self._sorted):
            wanted = np.ascontiguousarray(keys).view("S32")[:, 0]
            at = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
            found = np.where(self._sorted[at] == wanted, self._places[at], -1)
        if self._recent:
            for i in np.flatnonzero(found < 0):
                found[i] = self._recent.get(keys[i].tobytes(), -1)
        return found


class _Shard:
    """A file of a store, whose places in the store's index are ``first`` to ``stop``."""

    def __init__(self, path: Path, store: FeatureStore, first: int, verify: bool):
        self.path, self.first = path, first
        names = {"keys", "values"} | ({"offsets"} if store.ragged else set())
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            missing = names - set(file.keys())
        if missing:
            raise ValueError(f"no tensor {', '.join(sorted(missing))}")
        if metadata.get("fingerprint") != store.identity:
            raise ValueError("it belongs to another encoder")
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        start = 8 + size
        self._parts = {
            name: (tuple(header[name]["shape"]), *(start + offset for offset in header[name]["data_offsets"]))
            for name in names
        }
        (keys, *_), (values, *_) = self._parts["keys"], self._parts["values"]
        wanted = {"keys": "U8", "values": _NAMES[store.dtype.name], "offsets": "I64"}
        if any(header[name]["dtype"] != wanted[name] for name in names):
            raise ValueError(f"unexpected types {header['keys']['dtype']} and {header['values']['dtype']}")
        if keys[1:] != (32,) or values[1:] != (store.dim,) or not (store.ragged or values[0] == keys[0]):
            raise ValueError(f"unexpected shapes {keys} and {values}")
        self._n, self._dtype = keys[0], store.dtype
        self.offsets = None
        if store.ragged:
            self.offsets = np.frombuffer(self._read("offsets"), np.int64)
            steps = np.diff(self.offsets)
            if len(steps) != self._n or self.offsets[0] != 0 or self.offsets[-1] != values[0] or (steps < 1).any():
                raise ValueError(f"offsets that do not part {values[0]} frames among {self._n} files")
        if verify:
            digest = hashlib.sha256()
            for name in ("keys", "offsets", "values"):
                for piece in self._pieces(name) if name in names else ():
                    digest.update(piece)
            if metadata.get("sha256") != digest.hexdigest():
                raise ValueError("its checksum does not match")

    def __len__(self) -> int:
        return self._n

    @property
    def stop(self) -> int:
        return self.first + self._n

    @property
    def nbytes(self) -> int:
        return self._parts["values"][2] - self._parts["values"][1]

    def read_keys(self) -> np.ndarray:
        """(n, 32) uint8."""
        return np.frombuffer(self._read("keys"), np.uint8).reshape(-1, 32)

    @cached_property
    def _mapped(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def map(self) -> None:
        """Open the file, so that it can be read even when it has been merged into another."""
        _ = self._mapped

    @property
    def values(self) -> np.ndarray:
        """(n, dim), or (frames of all, dim), on disk."""
        shape, start, _ = self._parts["values"]
        return np.frombuffer(self._mapped, self._dtype, shape[0] * shape[1], start).reshape(shape)

    def release(self) -> None:
        """Give back the memory of what was read; the system keeps it as long as it has room."""
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def _read(self, name: str) -> bytes:
        return b"".join(self._pieces(name))

    def _pieces(self, name: str) -> Iterator[bytes]:
        _, start, end = self._parts[name]
        with open(self.path, "rb") as file:
            file.seek(start)
            for at in range(start, end, 1 << 20):
                yield file.read(min(1 << 20, end - at))


class StoredRows:
    """(n, dim) features that stay on disk: indexing reads rows, ``np.asarray`` all of them.

    Pickled, it is the place of the store and the keys: another process reads the same files.

    Attributes:
        shape, ndim, dtype, nbytes: as of an array.
        keys: (n, 32) uint8, the SHA-256 of each row's file.
    """

    ndim = 2

    def __init__(self, store: FeatureStore, keys: np.ndarray, shards: tuple[_Shard, ...], places: np.ndarray):
        self._store, self._shards, self._places, self.keys = store, shards, places, keys
        self._firsts = np.array([shard.first for shard in shards], np.int64)
        self._read_bytes = 0
        self.dtype = store.dtype

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._store.dim

    @property
    def nbytes(self) -> int:
        return len(self) * self._store.dim * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        """Rows (m, dim) of a slice, of m integers or of a mask; the row (dim,) of one integer."""
        places = self._places[index]
        if np.ndim(places) == 0:
            return self._gather(places[None])[0]
        return self._gather(places)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("StoredRows: an array of what is on disk is a copy; got copy=False.")
        return np.asarray(self[:], dtype)

    def __reduce__(self):
        store = self._store
        return _reopen, (store.folder.parent, store.identity, store.dim, store.ragged, store.dtype, self.keys)

    def select(self, index: Any) -> StoredRows:
        """The rows of a slice, of integers or of a mask, on disk as they are."""
        return type(self)(self._store, self.keys[index], self._shards, self._places[index])

    def _gather(self, places: np.ndarray) -> np.ndarray:
        rows = np.empty((len(places), self._store.dim), self.dtype)
        for shard, wanted, at in self._by_shard(places):
            rows[wanted] = shard.values[at]
        self._count(rows.nbytes, len(rows))
        return rows

    def _by_shard(self, places: np.ndarray) -> Iterator[tuple[_Shard, np.ndarray, np.ndarray]]:
        """Each shard that holds some of the places, which these are, and where in the shard."""
        shards = np.searchsorted(self._firsts, places, side="right") - 1
        for number in np.unique(shards):
            wanted = np.flatnonzero(shards == number)
            yield self._shards[number], wanted, places[wanted] - self._firsts[number]

    def _count(self, nbytes: int, reads: int) -> None:
        self._read_bytes += nbytes + reads * FAULT_BYTES
        if self._read_bytes > MAPPED_BYTES:
            for shard in self._shards:
                shard.release()
            self._read_bytes = 0


class StoredSequences(StoredRows):
    """Features of one (frames, dim) for each of n files, on disk: indexing by integers gives a list of arrays."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) frames of each file."""
        lengths = np.empty(len(self), np.int64)
        for shard, wanted, at in self._by_shard(self._places):
            lengths[wanted] = np.diff(shard.offsets)[at]
        return lengths

    @property
    def shape(self) -> tuple[int, int]:
        """All frames, and their width."""
        return int(self.lengths.sum()), self._store.dim

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum()) * self._store.dim * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise ValueError("StoredSequences: files have different numbers of frames; index them one by one.")

    def _gather(self, places: np.ndarray) -> list[np.ndarray]:
        rows: list[np.ndarray] = [np.empty(0)] * len(places)
        for shard, wanted, at in self._by_shard(places):
            for i, row in zip(wanted, at, strict=True):
                rows[i] = shard.values[shard.offsets[row] : shard.offsets[row + 1]].copy()
        self._count(sum(row.nbytes for row in rows), len(rows))
        return rows


def _reopen(folder: Path, identity: str, dim: int, ragged: bool, dtype: np.dtype, keys: np.ndarray) -> StoredRows:
    return FeatureStore(folder, identity, dim, ragged=ragged, dtype=dtype, verify=False).rows(keys)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def as_keys(digests: np.ndarray | Iterable[bytes]) -> np.ndarray:
    """SHA-256 digests as (n, 32) uint8."""
    if isinstance(digests, np.ndarray):
        return digests
    joined = b"".join(digests)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32) if joined else np.zeros((0, 32), np.uint8)
