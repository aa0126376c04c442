"""Trained models on recordings and on streams of samples: clips in, labels and probabilities out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from parrot import encoders as registry
from parrot import training
from parrot.corpora.audio import AudioError, decode_waveform, read_audio_file, resample
from parrot.features import embed_clip
from parrot.model import from_pretrained
from parrot.ragged import Ragged

if TYPE_CHECKING:
    from parrot.encoders import Encoder

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
SAMPLE_FORMATS = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}

Answer = dict[str, Any]
Clip = list[np.ndarray]  # what each encoder makes of one recording


class Predictor:
    """A trained model behind its encoders.

    Attributes:
        model: the model, in evaluation mode.
        encoders: its encoders, in the order of its streams.
        device: where the model computes: on the CPU, or beside the encoders if it takes waveforms.
        labels: the names of its classes.
        batch_size: clips that share one transport problem where predictions depend on the batch.
        batch_dependent: whether they do; where not, a clip's probabilities are the same bits beside any others.
    """

    def __init__(self, model: Any, encoders: Sequence[Encoder]) -> None:
        self.inputs: str = getattr(model, "inputs", "embeddings")
        # A model of waveforms holds encoders of its own; the others are small, and the same bits on any machine's CPU.
        self.device = next(encoders[0].parameters()).device if self.inputs == "waveforms" else torch.device("cpu")
        self.model, self.encoders = model.to(self.device), list(encoders)
        self.labels: list[str] = model.description["labels"]
        self.batch_size: int = model.description["batch_size"]
        self.batch_dependent: bool = model.batch_dependent

    @classmethod
    def load(
        cls,
        folder_or_id: str | os.PathLike,
        specs: Sequence[str] | None = None,
        *,
        device: str = "auto",
        download: bool = False,
    ) -> Predictor:
        """The predictor of a saved model.

        Args:
            folder_or_id: as :func:`parrot.from_pretrained` takes it.
            specs: where the model's encoders are now, if they have moved.
            device: of the encoders: "auto", "cpu" or "cuda".
            download: let model and encoders be fetched from the Hugging Face Hub.

        Raises:
            ValueError: the model was not written by training, or an encoder is not the one it was trained on.
        """
        where = training.TrainingConfig(device=device).resolved_device()
        model = from_pretrained(folder_or_id, download=download)
        if missing := [key for key in ("labels", "encoders", "batch_size") if key not in model.description]:
            raise ValueError(
                f"{folder_or_id} does not say its {', '.join(missing)}: it was saved without a description. Use it "
                "from Python, or train it with `parrot train`."
            )
        wanted = model.description["encoders"]
        specs = specs or [encoder["spec"] for encoder in wanted]
        if len(specs) != len(wanted):
            raise ValueError(f"--encoders wants {len(wanted)} specs, as the model was trained on; got {len(specs)}.")
        found = [registry.load(spec, download=download).to(where) for spec in specs]
        for spec, encoder, facts in zip(specs, found, wanted, strict=True):
            if encoder.fingerprint != facts["fingerprint"]:
                raise ValueError(
                    f"the model was trained on the encoder {facts['spec']!r} with fingerprint "
                    f"{facts['fingerprint'][:16]}; {spec!r} has {encoder.fingerprint[:16]}, so its weights or "
                    "settings differ. Name the right one with --encoders, or train again."
                )
        return cls(model, found)

    def embed_file(self, path: str | os.PathLike) -> Clip:
        """A recording as each encoder sees it; raises AudioError."""
        data = read_audio_file(path)
        return [self._embed(e, decode_waveform(data, path, e.sample_rate, e.min_samples)) for e in self.encoders]

    def embed_samples(self, samples: np.ndarray, sample_rate: int) -> Clip:
        """Mono samples (n,) float32 as each encoder sees them.

        Raises:
            ValueError: they are not finite, silent, or too short.
        """
        if not np.isfinite(samples).all():
            raise ValueError("holds values that are not finite")
        if not samples.any():
            raise ValueError("silent: all samples are zero")
        waveforms = [resample(samples, sample_rate, encoder.sample_rate) for encoder in self.encoders]
        for encoder, waveform in zip(self.encoders, waveforms, strict=True):
            if len(waveform) < encoder.min_samples:
                raise ValueError(
                    f"too short: {len(waveform)} samples at {encoder.sample_rate} Hz, wanted {encoder.min_samples}"
                )
        return [self._embed(encoder, waveform) for encoder, waveform in zip(self.encoders, waveforms, strict=True)]

    def _embed(self, encoder: Encoder, waveform: np.ndarray) -> np.ndarray:
        return waveform if self.inputs == "waveforms" else embed_clip(encoder, waveform, self.inputs)

    def features(self, clips: Sequence[Clip]) -> list[np.ndarray | Ragged]:
        """What the model takes: for each encoder the clips, one after the other."""
        join: Any = Ragged.join if self.inputs in ("frames", "waveforms") else np.stack
        return [join(rows) for rows in zip(*clips, strict=True)]

    def probabilities(self, clips: Sequence[Clip]) -> np.ndarray:
        """(clips, classes) float64; in batches of ``batch_size`` where predictions depend on the batch, else alone."""
        size = self.batch_size if self.batch_dependent else 1
        logits = training.predict(self.model, self.features(clips), size, self.device)
        return torch.from_numpy(logits).double().softmax(1).numpy()

    @torch.inference_mode()
    def plan(self, clips: Sequence[Clip]) -> np.ndarray | None:
        """The transport plan that the first clip is answered with; None for a system without transport.

        (clips, clips) where predictions depend on the batch, else (points, points): the clip first, then the
        reference set; or (frames, frames) of the clip.
        """
        if not hasattr(self.model, "plan"):
            return None
        rows = self.features(clips if self.batch_dependent else clips[:1])
        plan = self.model.plan(*(training.batch_of(matrix, slice(None), self.device) for matrix in rows))
        if plan is None:
            return None
        return (plan[0] if plan.dim() == 3 else plan).double().cpu().numpy()

    def answer(self, probabilities: np.ndarray) -> Answer:
        """The label and the probabilities of one clip."""
        return {
            "label": self.labels[int(np.argmax(probabilities))],
            "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True)),
        }

    def files(self, paths: Iterable[str | os.PathLike]) -> Iterator[Answer]:
        """One answer per recording, in order, as soon as its batch is full.

        Yields:
            ``{"path", "label", "probabilities"}``, or ``{"path", "error"}`` for a recording that can't be used; such
            ones are not part of a batch.
        """
        waiting: list[tuple[Answer, Clip | None]] = []
        good, size = 0, self.batch_size if self.batch_dependent else 1
        for path in paths:
            try:
                waiting.append(({"path": str(path)}, self.embed_file(path)))
                good += 1
            except ValueError as error:  # also what an encoder itself refuses
                reason = error.reason if isinstance(error, AudioError) else str(error)
                waiting.append(({"path": str(path), "error": reason}, None))
            if good in (0, size):
                yield from self._answers(waiting)
                waiting, good = [], 0
        yield from self._answers(waiting)

    def _answers(self, waiting: Sequence[tuple[Answer, Clip | None]]) -> Iterator[Answer]:
        clips = [clip for _, clip in waiting if clip is not None]
        rows = iter(self.probabilities(clips)) if clips else iter(())
        for answer, clip in waiting:
            yield answer if clip is None else {**answer, **self.answer(next(rows))}

    def stream(self, source: BinaryIO, layout: Stream) -> Iterator[Answer]:
        """One answer per window of a stream of raw samples, as soon as the window is complete; each for itself.

        Yields:
            ``{"start", "end", "label", "probabilities"}``, times in seconds, or ``{"start", "end", "error"}``.
        """
        for start, samples in layout.windows(source):
            times = {"start": start / layout.rate, "end": (start + len(samples)) / layout.rate}
            try:
                clip = self.embed_samples(samples, layout.rate)
            except ValueError as error:
                yield {**times, "error": str(error)}
            else:
                yield {**times, **self.answer(self.probabilities([clip])[0])}


@dataclass(frozen=True)
class Stream:
    """How raw samples come, and the windows they are cut into.

    Attributes:
        rate: samples per second of each channel.
        sample_format: "s16le" (16-bit integers) or "f32le" (32-bit floats in [-1, 1]), little endian.
        channels: interleaved channels, which are averaged.
        window: seconds of a window.
        hop: seconds from one window's start to the next one's.
    """

    rate: int = 16000
    sample_format: str = "s16le"
    channels: int = 1
    window: float = 3.0
    hop: float = 1.0

    def __post_init__(self) -> None:
        if self.sample_format not in SAMPLE_FORMATS:
            raise ValueError(
                f"Stream: `sample_format` must be one of {', '.join(SAMPLE_FORMATS)}; got {self.sample_format!r}."
            )
        if self.rate < 1 or self.channels < 1:
            raise ValueError(f"Stream: `rate` and `channels` must be 1 or more; got {self.rate}, {self.channels}.")
        if not 1 / self.rate <= self.hop <= self.window < float("inf"):
            raise ValueError(
                f"Stream: wanted 0 < hop <= window, in seconds; got hop {self.hop:g} and window {self.window:g}."
            )

    def windows(self, source: BinaryIO) -> Iterator[tuple[int, np.ndarray]]:
        """The first sample's number and the samples, mono float32 (n,), of each window.

        Windows overlap where ``hop`` is less than ``window``. If samples remain at the end that no window held, one
        more, of full length where there are enough, ends with the stream.

        Raises:
            ValueError: the stream is a file with a header, or ends within a sample.
        """
        width, hop = round(self.window * self.rate), max(1, round(self.hop * self.rate))
        held, first = np.zeros(0, np.float32), 0  # the last samples, at least a window of them, from number `first`
        start = covered = 0  # of the next window; samples that windows held
        for samples in self._samples(source):
            held = np.concatenate([held, samples])
            while start + width <= first + len(held):
                yield start, held[start - first : start - first + width]
                start, covered = start + hop, start + width
                held, first = held[max(0, covered - width - first) :], max(first, covered - width)
        end = first + len(held)
        if end > covered:
            start = max(first, end - width)
            yield start, held[start - first :]

    def _samples(self, source: BinaryIO) -> Iterator[np.ndarray]:
        """Pieces of the stream as they arrive, mono float32."""
        dtype = SAMPLE_FORMATS[self.sample_format]
        frame, rest, first = dtype.itemsize * self.channels, b"", True
        read = getattr(source, "read1", source.read)
        while data := read(1 << 16):
            rest += data
            if first and len(rest) >= 4:
                if rest[:4] in (b"RIFF", b"fLaC", b"OggS"):
                    raise ValueError(
                        "the stream has the header of an audio file; wanted raw samples. Name a file as an argument, "
                        "or let the program write raw: arecord -t raw, sox -t raw, ffmpeg -f s16le."
                    )
                first = False
            whole = len(rest) - len(rest) % frame
            if whole and not first:
                values = np.frombuffer(rest[:whole], dtype).reshape(-1, self.channels)
                scale = 2.0**-15 if dtype.kind == "i" else 1.0
                yield (values.astype(np.float32) * np.float32(scale)).mean(axis=1)
                rest = rest[whole:]
        if rest:
            raise ValueError(f"the stream ended within a sample: {len(rest)} bytes beyond frames of {frame} bytes.")


def recordings(paths: Iterable[str | os.PathLike]) -> Iterator[Path]:
    """The files named, and in place of a folder all recordings below it, sorted.

    Raises:
        ValueError: a folder holds no recording.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO and not p.name.startswith("."))
        if not found:
            raise ValueError(f"{path} is a folder without a recording ({', '.join(AUDIO)}).")
        yield from found
