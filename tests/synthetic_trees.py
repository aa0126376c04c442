"""Folders with the exact file names of CREMA-D, Emo-DB, MESD and RAVDESS, filled with short generated sounds.

Every file is 50 ms at the corpus's own rate and no two are alike: a tone whose pitch hangs on the label, in noise
drawn from the file's name.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from parrot.corpora import reader

RATES = {"crema-d": 16_000, "emo-db": 16_000, "mesd": 48_000, "ravdess": 48_000}
_FOLDERS = {
    "crema-d": "AudioWAV", "emo-db": "wav", "mesd": "Mexican Emotional Speech Database (MESD)", "ravdess": None,
}  # fmt: skip


def make_tree(name: str, root: Path, limit: int | None = None, seconds: float = 0.05, step: int = 1) -> Path:
    """Write the corpus ``name`` below ``root`` (of the first ``limit`` files one in ``step``) and return ``root``."""
    corpus, rate = reader(name), RATES[name]
    time = np.arange(round(rate * seconds)) / rate
    names = sorted(corpus.expected())[:limit:step]
    for file_name in names:
        folder = root / (_FOLDERS[name] or f"Actor_{file_name[-6:-4]}")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name
        tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * corpus.labels.index(corpus.parse(path).label)) * time)
        noise = np.random.default_rng(zlib.crc32(file_name.encode())).standard_normal(len(time))
        path.write_bytes(wav_bytes(tone + 0.1 * noise, rate))
    return root


def wav_bytes(samples: np.ndarray, rate: int) -> bytes:
    """A mono WAV file of 16 bits; by hand, since thousands are written."""
    data = (samples.clip(-1, 1) * 32767).astype("<i2").tobytes()
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data",
        len(data),
    ) + data  # fmt: skip
