"""Embeddings of a corpus, extracted once and kept in a store that survives crashes and company.

See :mod:`parrot.store` for the files. An embedding is found again whatever its audio file is called, and a file that
changed is a new one. The processes that `accelerate launch` or `torchrun` started share the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from parrot.corpora.audio import AudioError, decode_waveform, read_audio_file
from parrot.corpora.base import Corpus
from parrot.distributed import Group
from parrot.store import FeatureStore, StoredRows

if TYPE_CHECKING:
    from parrot.encoders.base import Encoder

FLUSH_SECONDS = 3.0
PRECISIONS = ("fp32", "bf16")
# What is kept of a clip: its embedding (d,), its frames (T, d), or the mean over the frames of each hidden state of the
# encoder (layers + 1, d).
KINDS = ("embeddings", "frames", "layers")


@dataclass(frozen=True)
class Extraction:
    """How clips go through the encoder. Whatever is not the default changes the last digits, or more of them, of the
    embeddings, so these have a place of their own in the store.

    Attributes:
        clips: clips in a batch, which are of similar length: sorted by the size of their files, so that batches
            depend on the corpus alone. Encoders that hide padding by a mask (``maskable``) take them padded, which
            changes a clip's embedding by rounding; the others take clips of equal length together.
        precision: "fp32", or "bf16": matrix products and convolutions under ``torch.autocast``; embeddings are kept
            in fp32 and agree with fp32's to about two digits.
        compile: run the encoder through ``torch.compile`` with dynamic lengths, which takes a minute to warm up.
    """

    clips: int = 1
    precision: str = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.clips, int) or self.clips < 1:
            raise ValueError(f"Extraction: `clips` must be an integer of at least 1; got {self.clips!r}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"Extraction: `precision` must be one of {', '.join(PRECISIONS)}; got {self.precision!r}.")

    @property
    def suffix(self) -> str:
        """What sets its embeddings apart in the store; empty for the default."""
        parts = [f"-{self.clips}-clips" * (self.clips > 1), f"-{self.precision}" * (self.precision != "fp32")]
        return "".join(parts) + "-compiled" * self.compile


@dataclass(frozen=True)
class FeatureTable:
    """Embeddings of the utterances of a corpus that could be embedded.

    Attributes:
        rows: (n, embedding_dim) float32, on disk; indexing reads, ``np.asarray`` reads everything. Of the other kinds
            n sequences, :class:`parrot.store.StoredSequences`.
        indices: (n,) int64, ascending; row i belongs to ``corpus.utterances[indices[i]]``.
        failures: path and reason of each utterance that could not be embedded.
        reused: how many rows were in the store already.
    """

    rows: StoredRows
    indices: np.ndarray
    failures: list[tuple[Path, str]]
    reused: int

    @cached_property
    def values(self) -> np.ndarray:
        """All ``rows`` in memory; of embeddings only."""
        return np.asarray(self.rows)

    @property
    def hashes(self) -> tuple[str, ...]:
        """The SHA-256 of the audio file of each row, in hex: one value for recordings that are the same."""
        return tuple(key.tobytes().hex() for key in self.rows.keys)


def extract(
    corpus: Corpus,
    encoder: Encoder,
    cache_dir: str | os.PathLike,
    progress: bool = True,
    *,
    how: Extraction | None = None,
    group: Group | None = None,
    kind: str = "embeddings",
) -> FeatureTable:
    """Embed every utterance of ``corpus`` and keep the embeddings below ``cache_dir``.

    By default utterances go through the encoder one at a time and unpadded, because padding changes the statistics
    that SSAM and group-norm encoders take over a clip. What is in the store is not computed again and comes back bit
    for bit. New embeddings are written every few seconds, so a killed run, or one killed process of it, loses no
    more than those. A recording that can't be used is listed in ``failures`` and tried again next time; the others
    are kept.

    In a group each process embeds every ``group.size``-th batch, waits for the others, and returns the whole table.
    A batch, and so the table, does not depend on the number of processes; bit for bit where they compute on as many
    threads (``encoder.threads``, or OMP_NUM_THREADS, which torchrun sets to 1).

    Args:
        corpus: what to embed.
        encoder: in evaluation mode, on the device where it shall run.
        cache_dir: folder of the stores, made if missing; encoders, corpora and processes can share it. The processes
            of a group must: on several machines, a folder that all see.
        progress: show a progress bar, of this process's part.
        how: batches, precision and compilation.
        group: the processes that share the work, see :func:`parrot.distributed.join`; this one alone by default.
        kind: what to keep of a clip, one of :data:`KINDS`.

    Raises:
        ValueError: there is no such kind, or it can't be compiled; the encoder is in training mode, gives embeddings of
            a wrong shape, or every utterance failed.
        RuntimeError: another process holds the store's lock for a minute, or the group does not share the folder.
        OSError: the store can't be read or written, because the disk is full, say; what it holds is kept.
    """
    from tqdm.auto import tqdm

    if encoder.training:
        raise ValueError("features.extract: the encoder is in training mode, wanted evaluation: call encoder.eval()")
    how, group = how or Extraction(), group or Group()
    if kind not in KINDS or (how.compile and kind != "embeddings"):
        wanted = "embeddings, which alone are compiled" if how.compile else ", ".join(KINDS)
        raise ValueError(f"features.extract: `kind` must be one of {wanted}; got {kind!r}.")
    identity = encoder.fingerprint + how.suffix + f"-{kind}" * (kind != "embeddings")
    store = FeatureStore(cache_dir, identity, encoder.embedding_dim, ragged=kind != "embeddings")
    embed = _function(encoder, kind)
    if how.compile:
        embed = torch.compile(embed, dynamic=True)
    found: list[tuple[int, bytes]] = []
    failed: list[tuple[int, str]] = []
    new: dict[bytes, np.ndarray] = {}
    reused = 0
    last_flush = time.monotonic()
    batches = _batches(corpus, how.clips)[group.rank :: group.size]
    bar = tqdm(total=sum(map(len, batches)), desc=f"features {encoder.name}", unit="clip", disable=not progress)
    try:
        for batch in batches:
            files: list[tuple[int, bytes, bytes]] = []
            for index in batch:
                try:
                    data = read_audio_file(corpus.utterances[index].path)
                    files.append((index, hashlib.sha256(data).digest(), data))
                except AudioError as error:
                    failed.append((index, error.reason))
            old = [key in store for _, key, _ in files]
            reused += sum(old)
            if not all(known or key in new for known, (_, key, _) in zip(old, files, strict=True)):
                outcomes = _embed_files(
                    encoder, embed, how, [(corpus.utterances[i].path, data) for i, _, data in files]
                )
            else:
                outcomes = [None] * len(files)
            for known, (index, key, _), outcome in zip(old, files, outcomes, strict=True):
                if isinstance(outcome, AudioError) and not known:
                    failed.append((index, outcome.reason))
                    continue
                if not known and outcome is not None:
                    new.setdefault(key, outcome)
                found.append((index, key))
            bar.update(len(batch))
            if time.monotonic() - last_flush > FLUSH_SECONDS:
                store.add(new)
                new.clear()
                last_flush = time.monotonic()
    finally:
        bar.close()
        store.add(new)
    parts = group.gather((found, failed, reused))  # waits for the others
    found = sorted(pair for part in parts for pair in part[0])
    failures = [(corpus.utterances[i].path, reason) for i, reason in sorted(pair for part in parts for pair in part[1])]
    if failures:
        summary = f"{len(failures)} of {len(corpus)} recordings can't be used; the first: " + ": ".join(
            map(str, failures[0])
        )
        if not found:
            raise ValueError(f"features.extract: {summary}")
        warnings.warn(f"features.extract: {summary}", stacklevel=2)
    try:
        rows = store.rows([key for _, key in found])
    except KeyError as error:
        raise RuntimeError(
            f"features.extract: what other processes embedded is not in {store.folder}. All of them, on all machines, "
            "must share the cache folder."
        ) from error
    indices = np.array([index for index, _ in found], dtype=np.int64)
    return FeatureTable(rows, indices, failures, sum(part[2] for part in parts))


def _batches(corpus: Corpus, clips: int) -> list[list[int]]:
    """Utterances of similar length together, which the sizes of their files tell; alone in the corpus's order."""
    order = list(range(len(corpus)))
    if clips > 1:
        order.sort(key=lambda index: (_size(corpus.utterances[index].path), index))
    return [order[start : start + clips] for start in range(0, len(order), clips)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it will say why
        return 0


def _embed_files(
    encoder: Encoder, embed: Callable[..., Tensor], how: Extraction, files: list[tuple[Path, bytes]]
) -> list[np.ndarray | AudioError]:
    """The embedding of each file, or why there is none."""
    outcomes: list[np.ndarray | AudioError | None] = [None] * len(files)
    together: dict[int, list[tuple[int, np.ndarray]]] = {}
    for place, (path, data) in enumerate(files):
        try:
            waveform = decode_waveform(data, path, encoder.sample_rate, encoder.min_samples)
        except AudioError as error:
            outcomes[place] = error
            continue
        length = 0 if getattr(encoder, "maskable", False) else len(waveform)
        together.setdefault(length, []).append((place, waveform))
    for members in together.values():
        try:
            rows = _embed(encoder, embed, how, [waveform for _, waveform in members])
        except (RuntimeError, ValueError) as error:
            if len(members) > 1:  # one of them, or too many of them: which?
                rows = []
                for _, waveform in members:
                    try:
                        rows += _embed(encoder, embed, how, [waveform])
                    except (RuntimeError, ValueError) as its_own:
                        rows.append(its_own)
            else:
                rows = [error]
        for (place, _), row in zip(members, rows, strict=True):
            path = files[place][0]
            if isinstance(row, Exception):
                outcomes[place] = AudioError(path, f"encoder {encoder.name} failed: {row}")
            elif row.ndim > 2 or row.shape[-1] != encoder.embedding_dim:
                raise ValueError(
                    f"features.extract: encoder {encoder.name}: wanted an embedding of shape "
                    f"(1, {encoder.embedding_dim}), got {(1, *row.shape)}"
                )
            elif not np.isfinite(row).all():
                outcomes[place] = AudioError(path, f"encoder {encoder.name} gave values that are not finite")
            else:
                outcomes[place] = row
    return outcomes


def _embed(
    encoder: Encoder, embed: Callable[..., Tensor], how: Extraction, waveforms: list[np.ndarray]
) -> list[np.ndarray]:
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    lengths = [len(waveform) for waveform in waveforms]
    batch = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waveforms], batch_first=True).to(device)
    with (
        torch.inference_mode(),
        _threads(encoder.threads),
        torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bf16"),
    ):
        embeddings = embed(batch, lengths) if len(set(lengths)) > 1 else embed(batch)
    return [embedding.float().cpu().numpy() for embedding in embeddings]


def _function(encoder: Encoder, kind: str) -> Callable[..., Sequence[Tensor]]:
    """Takes waveforms (B, samples) and, where they differ, their lengths; gives what the kind keeps of each clip."""

    def frames(waveforms: Tensor, lengths: Sequence[int] | None = None) -> list[Tensor]:
        found, counts = encoder.frames(waveforms, lengths)
        return [clip[:count] for clip, count in zip(found, counts.tolist(), strict=True)]

    def layers(waveforms: Tensor, lengths: Sequence[int] | None = None) -> list[Tensor]:
        clips = zip(waveforms, lengths or [waveforms.shape[1]] * len(waveforms), strict=True)
        return [torch.stack([state.mean(-2) for state in encoder.hidden_states(clip[:n])]) for clip, n in clips]

    return {"embeddings": encoder.embed, "frames": frames, "layers": layers}[kind]


def embed_clip(encoder: Encoder, waveform: np.ndarray, kind: str = "embeddings") -> np.ndarray:
    """What :func:`extract` by default keeps of a clip's samples (n,): (d,), (T, d) or (layers + 1, d) float32.

    Raises:
        ValueError: the encoder refuses the clip.
    """
    return _embed(encoder, _function(encoder, kind), Extraction(), [waveform])[0]


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Let torch compute on this many CPU threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
