"""Embeddings of a corpus, extracted once and kept in a cache that survives crashes and company.

A cache is a folder with one folder per encoder fingerprint, which holds numbered safetensors shards. A shard
maps the SHA-256 of audio files to embeddings; it is written whole or not at all and never changes. So an
embedding is found again whatever its file is called, and a file that changed is a new one. Writers hold a lock
only while they add a shard, and first take over what others have added: several processes can share a cache,
and a key that has a value keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parrot.corpora.audio import AudioError, decode_waveform, read_audio_file
from parrot.corpora.base import Corpus
from parrot.files import write_atomically

if TYPE_CHECKING:
    from parrot.encoders.base import Encoder

FORMAT = "v1"  # part of the folder name: a change in how recordings are read or kept starts a new cache
FLUSH_SECONDS = 3.0
LOCK_SECONDS = 60.0
_SHARD_NUMBER = re.compile(r"shard-(\d+)\.")


@dataclass(frozen=True)
class FeatureTable:
    """Embeddings of the utterances of a corpus that could be embedded.

    Attributes:
        values: (n, embedding_dim) float32.
        indices: (n,) int64, ascending; row i belongs to ``corpus.utterances[indices[i]]``.
        failures: path and reason of each utterance that could not be embedded.
        reused: how many rows were in the cache already.
        hashes: the SHA-256 of the audio file of each row, in hex: one value for recordings that are the same.
    """

    values: np.ndarray
    indices: np.ndarray
    failures: list[tuple[Path, str]]
    reused: int
    hashes: tuple[str, ...] = ()


class FeatureCache:
    """The cached embeddings of one encoder, by the SHA-256 of the audio file's content.

    Args:
        cache_dir: folder of the cache, made if missing.
        fingerprint: identifies the encoder, its configuration and its weights.
        dim: size of an embedding.

    Raises:
        RuntimeError: another process holds the lock for a minute.
        OSError: the folder can't be made, read or written; the disk is full. What is in the cache stays.
    """

    def __init__(self, cache_dir: str | os.PathLike, fingerprint: str, dim: int):
        self.folder = Path(cache_dir) / f"{fingerprint}-{FORMAT}"
        self._fingerprint, self._dim = fingerprint, dim
        self._rows: dict[bytes, np.ndarray] = {}
        self._seen: set[str] = set()
        with self._explained("use"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock", timeout=LOCK_SECONDS)
        with self._locked(), self._explained("read"):
            for stale in self.folder.glob(".*.tmp"):  # files are only written under the lock
                stale.unlink()
            self._refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __getitem__(self, key: bytes) -> np.ndarray:
        return self._rows[key]

    def add(self, rows: dict[bytes, np.ndarray]) -> None:
        """Write the embeddings ``rows`` (SHA-256 digest -> (dim,) float32) that no process has added yet."""
        if not rows:
            return
        with self._locked(), self._explained("write to"):
            self._refresh()
            new = {key: row for key, row in rows.items() if key not in self._rows}
            if not new:
                return
            keys = np.frombuffer(b"".join(new), np.uint8).reshape(-1, 32)
            values = np.stack(list(new.values())).astype(np.float32, copy=False)
            metadata = {"fingerprint": self._fingerprint, "sha256": _checksum(keys, values)}
            taken = (_SHARD_NUMBER.match(path.name) for path in self.folder.glob("shard-*"))
            name = f"shard-{max((int(match[1]) for match in taken if match), default=0) + 1:06d}.safetensors"
            write_atomically(self.folder / name, save({"keys": keys, "values": values}, metadata))
            self._seen.add(name)
            self._rows.update(new)

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Say of an error of the system which cache it is about and that nothing in it is lost."""
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

    def _refresh(self) -> None:
        """Take over the shards that appeared since the last look; earlier ones win."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path.name in self._seen:
                continue
            try:
                keys, values = self._read_shard(path)
            except (SafetensorError, ValueError) as error:
                aside = path.with_name(path.name + ".corrupt")
                os.replace(path, aside)
                warnings.warn(
                    f"features: corrupt shard set aside as {aside} ({error}); its embeddings are extracted again",
                    RuntimeWarning,
                    stacklevel=4,
                )
                continue
            self._seen.add(path.name)
            for key, row in zip(keys, values, strict=True):
                self._rows.setdefault(key.tobytes(), row)

    def _read_shard(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            missing = {"keys", "values"} - set(file.keys())
            if missing:
                raise ValueError(f"no tensor {', '.join(sorted(missing))}")
            keys, values = file.get_tensor("keys"), file.get_tensor("values")
        if metadata.get("fingerprint") != self._fingerprint:
            raise ValueError("it belongs to another encoder")
        if keys.dtype != np.uint8 or values.dtype != np.float32:
            raise ValueError(f"unexpected types {keys.dtype} and {values.dtype}")
        if keys.shape != (len(values), 32) or values.shape != (len(keys), self._dim):
            raise ValueError(f"unexpected shapes {keys.shape} and {values.shape}")
        if metadata.get("sha256") != _checksum(keys, values):
            raise ValueError("its checksum does not match")
        return keys, values


def extract(corpus: Corpus, encoder: Encoder, cache_dir: str | os.PathLike, progress: bool = True) -> FeatureTable:
    """Embed every utterance of ``corpus``, each by itself, and keep the embeddings below ``cache_dir``.

    Utterances go through the encoder one at a time and unpadded, because padding changes the statistics that
    SSAM and group-norm encoders take over a clip. What is in the cache is not computed again and comes back bit
    for bit. New embeddings are written every few seconds, so a killed run loses no more than those. A recording
    that can't be used is listed in ``failures`` and tried again next time; the others are kept.

    Args:
        corpus: what to embed.
        encoder: in evaluation mode, on the device where it shall run.
        cache_dir: folder of the cache, made if missing; encoders, corpora and processes can share it.
        progress: show a progress bar.

    Returns:
        A `FeatureTable` in the corpus's order; all its rows are held in memory.

    Raises:
        ValueError: the encoder is in training mode, gives embeddings of a wrong shape, or every utterance failed.
        RuntimeError: another process holds the cache's lock for a minute.
        OSError: the cache can't be read or written, because the disk is full, say; what it holds is kept.
    """
    from tqdm.auto import tqdm

    if encoder.training:
        raise ValueError("features.extract: the encoder is in training mode, wanted evaluation: call encoder.eval()")
    cache = FeatureCache(cache_dir, encoder.fingerprint, encoder.embedding_dim)
    new: dict[bytes, np.ndarray] = {}
    keys: list[bytes] = []
    indices: list[int] = []
    failures: list[tuple[Path, str]] = []
    reused = 0
    last_flush = time.monotonic()
    bar = tqdm(corpus.utterances, desc=f"features {encoder.name}", unit="clip", disable=not progress)
    try:
        for index, utterance in enumerate(bar):
            try:
                data = read_audio_file(utterance.path)
                key = hashlib.sha256(data).digest()
                if key in cache:
                    reused += 1
                elif key not in new:
                    new[key] = _embed(encoder, data, utterance.path)
            except AudioError as error:
                failures.append((utterance.path, error.reason))
                continue
            keys.append(key)
            indices.append(index)
            if time.monotonic() - last_flush > FLUSH_SECONDS:
                cache.add(new)
                new.clear()
                last_flush = time.monotonic()
    finally:
        cache.add(new)
    if failures:
        summary = f"{len(failures)} of {len(corpus)} recordings can't be used; the first: " + ": ".join(
            map(str, failures[0])
        )
        if not keys:
            raise ValueError(f"features.extract: {summary}")
        warnings.warn(f"features.extract: {summary}", stacklevel=2)
    values = np.stack([cache[key] for key in keys])
    hashes = tuple(key.hex() for key in keys)
    return FeatureTable(values, np.array(indices, dtype=np.int64), failures, reused, hashes)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let torch compute on this many CPU threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _embed(encoder: Encoder, data: bytes, path: Path) -> np.ndarray:
    waveform = decode_waveform(data, path, encoder.sample_rate, encoder.min_samples)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode(), _threads(encoder.threads):
            embedding = encoder.embed(torch.from_numpy(waveform)[None].to(device))
    except (RuntimeError, ValueError) as error:
        raise AudioError(path, f"encoder {encoder.name} failed: {error}") from error
    if embedding.shape != (1, encoder.embedding_dim):
        raise ValueError(
            f"features.extract: encoder {encoder.name}: wanted an embedding of shape (1, {encoder.embedding_dim}), "
            f"got {tuple(embedding.shape)}"
        )
    row = embedding[0].float().cpu().numpy()
    if not np.isfinite(row).all():
        raise AudioError(path, f"encoder {encoder.name} gave values that are not finite")
    return row


def _checksum(keys: np.ndarray, values: np.ndarray) -> str:
    digest = hashlib.sha256(keys.tobytes())
    digest.update(values.tobytes())
    return digest.hexdigest()
