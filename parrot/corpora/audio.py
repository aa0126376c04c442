"""Reading speech: any file that libsndfile reads, as mono float32 at the rate an encoder wants."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
RATES = (1000, 1_000_000)  # Hz; a damaged header may say anything, and resampling takes memory in proportion
_BLOCK = 1 << 20  # samples read at a time: a damaged header may also promise any number


class AudioError(ValueError):
    """A recording can't be used; ``reason`` says why, ``kind`` in a word or two."""

    def __init__(self, path: str | os.PathLike, reason: str, kind: str = "unreadable"):
        self.path, self.reason, self.kind = Path(path), reason, kind
        super().__init__(f"{path}: {reason}")


def load_waveform(path: str | os.PathLike, sample_rate: int, min_samples: int = 1) -> np.ndarray:
    """Read a recording as mono float32 samples in [-1, 1], as decoded: no gain, no trimming.

    Channels are averaged. Other rates are resampled with SciPy's polyphase filter (`resample_poly`: linear
    phase, the same samples on every run, and SciPy is installed anyway).

    Args:
        path: WAV, FLAC, OGG, MP3 or another format of libsndfile.
        sample_rate: wanted rate in Hz.
        min_samples: the least number of samples, at ``sample_rate``, that the caller can use.

    Returns:
        Samples (n,) float32, n >= ``min_samples``.

    Raises:
        AudioError: the file is missing, unreadable, a Git LFS pointer, truncated, empty, silent, too short,
            or holds values that are not finite.
    """
    return decode_waveform(read_audio_file(path), path, sample_rate, min_samples)


def read_audio_file(path: str | os.PathLike) -> bytes:
    """A file's content, undecoded; raises `AudioError` if it can't be had."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise AudioError(path, "no such file", "missing") from None
    except OSError as error:
        raise AudioError(path, f"unreadable: {error.strerror or error}") from None


def decode_waveform(data: bytes, path: str | os.PathLike, sample_rate: int, min_samples: int = 1) -> np.ndarray:
    """`load_waveform` for a file's content; ``path`` names it in errors."""
    import soundfile

    if not data:
        raise AudioError(path, "empty file (0 bytes)", "empty")
    if data.startswith(_LFS_POINTER):
        raise AudioError(
            path, "a Git LFS pointer, not the recording: run 'git lfs pull' in the corpus folder", "LFS pointer"
        )
    lost = _missing_wav_bytes(data)
    if lost:
        raise AudioError(path, f"truncated: {lost} bytes fewer than its header says", "truncated")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, promised, exact = file.samplerate, file.frames, file.format == "FLAC"
            blocks = []
            while (block := file.read(_BLOCK // file.channels + 1, dtype="float32", always_2d=True)).size:
                blocks.append(block.mean(axis=1))
    except soundfile.LibsndfileError as error:
        raise AudioError(path, f"not a readable audio file: {error.error_string}") from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if exact and samples.size < promised:  # libsndfile says nothing of it either
        raise AudioError(path, f"truncated: {promised - samples.size} samples fewer than its header says", "truncated")
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioError(path, f"a sample rate of {rate} Hz, wanted {RATES[0]} to {RATES[1]}", "sample rate")
    if not samples.size:
        raise AudioError(path, "empty recording (0 samples)", "empty")
    if not np.isfinite(samples).all():
        raise AudioError(path, "holds values that are not finite", "not finite")
    if not samples.any():
        raise AudioError(path, f"silent: all {samples.size} samples are zero", "silent")
    samples = resample(samples, rate, sample_rate)
    if samples.size < min_samples:
        raise AudioError(
            path, f"too short: {samples.size} samples at {sample_rate} Hz, wanted at least {min_samples}", "too short"
        )
    return samples


def _missing_wav_bytes(data: bytes) -> int:
    """How many bytes of its samples a WAV file lacks; libsndfile reads what is there and says nothing."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    place = 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"data":
            streamed = size >= 0x7FFFF000  # written to a pipe, whose length nobody knew
            return 0 if streamed else max(0, size - (len(data) - place - 8))
        place += 8 + size + size % 2
    return 0


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples (n,) float32 at another rate; the same array where the rates are equal."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    divisor = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // divisor, rate // divisor).astype(np.float32, copy=False)
