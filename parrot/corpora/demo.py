"""The spoken demo corpus: synthetic utterances on which the whole pipeline runs when no real corpus is at hand.

Every speaker is a synthetic voice, every emotion nothing but prosody: pitch level and range, tempo, loudness,
spectral tilt, breathiness, tremor and roughness, in the directions reported for acted speech (Banse & Scherer
1996; Juslin & Laukka 2003). Speakers differ in voice, habit and expressiveness and no two takes are alike, so
the emotions overlap. Results on this corpus say that the code works, never how well a model hears emotion.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from parrot.corpora import crema_d
from parrot.corpora.base import Corpus, CorpusError, Problem, Reader, Utterance
from parrot.files import write_atomically

VERSION = 1
SAMPLE_RATE = 16_000
RECIPE_FILE = "synthetic_corpus.json"

# (espeak-ng accent, voice variant), female and male in turn.
VOICES = (
    ("English (Great Britain)", "Female1"), ("English (Great Britain)", "Male1"),
    ("English (America)", "Female2"), ("English (America)", "Male3"),
    ("English (Scotland)", "Annie"), ("English (Scotland)", "Denis"),
    ("English (Received Pronunciation)", "Female4"), ("English (Received Pronunciation)", "Male7"),
    ("English (Lancaster)", "Linda"), ("English (Lancaster)", "Michael"),
    ("English (America)", "Female3"), ("English (America)", "Male2"),
    ("English (Great Britain)", "Female5"), ("English (Great Britain)", "Male4"),
    ("English (West Midlands)", "Steph"), ("English (West Midlands)", "Male5"),
    ("English (Scotland)", "Linda"), ("English (America)", "Lee"),
)  # fmt: skip

LEVELS = {"LO": 0.9, "HI": 1.3}


@dataclasses.dataclass(frozen=True)
class Prosody:
    """How an utterance departs from a voice's plain reading; all zero is the plain reading."""

    pitch: float = 0.0  # semitones
    pitch_range: float = 0.0  # octaves of the multiplier
    tempo: float = 0.0  # octaves of the multiplier
    loudness: float = 0.0  # dB
    tilt: float = 0.0  # dB per octave, positive is brighter
    breath: float = 0.0  # dB of the breath noise
    tremor: float = 0.0  # depth of the 5 to 8 Hz modulation
    roughness: float = 0.0  # depth of the 30 to 60 Hz modulation

    def array(self) -> np.ndarray:
        return np.array(dataclasses.astuple(self))


EMOTIONS = {
    "ANG": Prosody(2.0, 0.5, 0.25, 6.0, 3.0, -3.0, 0.0, 0.30),
    "DIS": Prosody(-2.0, -0.1, -0.20, 0.0, -0.5, 2.0, 0.0, 0.35),
    "FEA": Prosody(4.5, -0.3, 0.25, -3.0, 1.0, 6.0, 0.45, 0.0),
    "HAP": Prosody(4.0, 0.6, 0.12, 3.0, 1.5, 0.0, 0.0, 0.0),
    "NEU": Prosody(),
    "SAD": Prosody(-2.0, -0.6, -0.30, -5.0, -2.5, 5.0, 0.10, 0.0),
}  # fmt: skip
TAKE_SPREAD = Prosody(1.0, 0.20, 0.10, 2.1, 0.85, 2.5, 0.07, 0.07)  # standard deviations
SPEAKER_SPREAD = Prosody(0.7, 0.10, 0.06, 2.1, 0.55, 2.1, 0.02, 0.03)  # standard deviations
EXPRESSIVENESS = (0.6, 1.3)  # each speaker makes more of some cues than of others


@dataclasses.dataclass(frozen=True)
class _Clip:
    path: Path
    request: dict
    prosody: Prosody
    rng: np.random.Generator


def synthesise(
    root: str | os.PathLike,
    voices: int = 10,
    sentences: int = 4,
    seed: int = 0,
    processes: int = 2,
    progress: bool = True,
) -> Path:
    """Write the demo corpus below ``root`` in CREMA-D's layout and return ``root``.

    ``root/AudioWAV/<speaker>_<sentence>_<emotion>_<level>.wav`` holds ``voices * sentences * 6 * 2`` clips
    (16 kHz, mono, 16 bit), with CREMA-D's sentences and codes; ``root/synthetic_corpus.json`` says that it is
    synthetic, by which version of the generator and with which seed. The same arguments give the same bytes,
    whatever the number of processes. A complete corpus is left as it is, an interrupted one is finished.

    Args:
        voices: number of speakers, 1 to 18; female and male in turn.
        sentences: number of sentences, 1 to 12.
        seed: seed of everything random.
        processes: synthesiser processes that run at a time.
        progress: show a progress bar.

    Raises:
        ValueError: an argument is out of range.
        CorpusError: ``root`` holds something else: real recordings, or a demo corpus with other settings.
        ImportError: praat-parselmouth is missing (``pip install 'parrot-kernels[demo]'``).
    """
    for name, value, least, most in (
        ("voices", voices, 1, len(VOICES)),
        ("sentences", sentences, 1, len(crema_d.SENTENCES)),
        ("seed", seed, 0, 2**63 - 1),
        ("processes", processes, 1, 64),
    ):
        if not least <= value <= most:
            raise ValueError(f"demo.synthesise: {name} must be between {least} and {most}, got {value}")
    root = Path(root)
    recipe = _recipe(voices, sentences, seed)
    _claim(root, recipe)
    speakers = [_speaker_clips(root, speaker, sentences, seed) for speaker in range(voices)]
    todo = [clips for clips in speakers if not all(clip.path.exists() for clip in clips)]
    if not todo:
        return root
    if importlib.util.find_spec("parselmouth") is None:
        raise ImportError(
            "demo.synthesise: the demo corpus is spoken by praat-parselmouth, which is not installed. "
            "Install it with: pip install 'parrot-kernels[demo]'"
        )
    from tqdm.auto import tqdm

    total = sum(len(clips) for clips in speakers)
    done = total - sum(len(clips) for clips in todo)
    with (
        tqdm(total=total, initial=done, desc="speaking", unit="clip", disable=not progress) as bar,
        ThreadPoolExecutor(processes) as pool,
    ):
        try:
            for future in [pool.submit(_write_speaker, clips, bar) for clips in todo]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return root


class _DemoReader(Reader):
    name = "demo"
    labels = crema_d.READER.labels
    note = "synthetic speech: what comes out shows that everything works, no more"

    def scan(self, root: Path) -> tuple[list[Utterance], list[Problem]]:
        advice = "make it with `parrot demo`, or parrot.corpora.demo.synthesise"
        try:
            recipe = json.loads((root / RECIPE_FILE).read_text())
            wanted = math.prod(len(recipe[key]) for key in ("voices", "sentences", "emotions", "levels"))
        except (OSError, ValueError, KeyError, TypeError):
            raise CorpusError("demo", root, [f"no readable {RECIPE_FILE} in it: {advice}"]) from None
        utterances, problems = crema_d.READER.scan(root)
        if len(utterances) != wanted:
            problems.append(Problem("missing", "AudioWAV", f"wanted {wanted} clips, found {len(utterances)}: {advice}"))
        return utterances, problems


READER = _DemoReader()


def read(root: str | os.PathLike) -> Corpus:
    """Read a demo corpus as the corpus ``"demo"``; the files are parsed as CREMA-D's.

    Raises:
        CorpusError: ``root`` is not a complete demo corpus.
    """
    return READER.read(root)


def _recipe(voices: int, sentences: int, seed: int) -> dict:
    return {
        "synthetic": True,
        "note": "Synthetic speech (Praat, espeak-ng). No human speaker, no felt or acted emotion: emotions are "
        "expressed by prosody rules only. Scores on it show that the software works, not how well a model "
        "recognises emotion.",
        "generator": "parrot.corpora.demo",
        "version": VERSION,
        "seed": seed,
        "voices": {str(1001 + i): " / ".join(VOICES[i]) for i in range(voices)},
        "sentences": dict(list(crema_d.SENTENCES.items())[:sentences]),
        "emotions": list(EMOTIONS),
        "levels": list(LEVELS),
        "sample_rate": SAMPLE_RATE,
    }


def _claim(root: Path, recipe: dict) -> None:
    """Make ``root`` the home of this recipe, or say why it can't be."""
    marker = root / RECIPE_FILE
    # Looked for before the marker, which another process that makes the same corpus writes before any clip.
    occupied = any(root.glob("AudioWAV/*.wav")) or any(root.glob("*.wav"))
    if marker.is_file():
        try:
            found = json.loads(marker.read_text())
        except ValueError:
            found = {}
        different = [key for key, value in recipe.items() if found.get(key) != value]
        if different:
            problem = f"it holds a demo corpus with other settings ({', '.join(different)})"
            raise CorpusError("demo", root, [f"{problem}: choose another folder or delete this one"])
    elif occupied:
        problem = "it holds WAV files that are not of the demo corpus"
        raise CorpusError("demo", root, [f"{problem}: choose another folder"])
    else:
        (root / "AudioWAV").mkdir(parents=True, exist_ok=True)
        write_atomically(marker, (json.dumps(recipe, indent=2) + "\n").encode())


def _speaker_clips(root: Path, speaker: int, sentences: int, seed: int) -> list[_Clip]:
    """All takes of one speaker, in the order in which they are spoken."""
    language, voice = VOICES[speaker]
    rng = np.random.default_rng([seed, speaker])
    habit = SPEAKER_SPREAD.array() * rng.standard_normal(len(SPEAKER_SPREAD.array()))
    expressiveness = rng.uniform(*EXPRESSIVENESS, size=habit.shape)
    clips = []
    for s, (code, text) in enumerate(list(crema_d.SENTENCES.items())[:sentences]):
        for e, (emotion, target) in enumerate(EMOTIONS.items()):
            for v, (level, strength) in enumerate(LEVELS.items()):
                rng = np.random.default_rng([seed, speaker, s, e, v])
                take = TAKE_SPREAD.array() * rng.standard_normal(habit.shape)
                prosody = Prosody(*(strength * expressiveness * target.array() + habit + take))
                pitch = 2.0 ** (prosody.pitch / 12)
                request = {
                    "language": language,
                    "voice": voice,
                    "text": text,
                    "sample_rate": SAMPLE_RATE,
                    # espeak-ng: F0 = base * (0.25 + 0.75 * multiplier), with a range that stays the same in Hz.
                    "pitch": float(np.clip((pitch - 0.25) / 0.75, 0.5, 2.0)),
                    "pitch_range": float(np.clip(pitch * 2.0**prosody.pitch_range, 0.1, 2.0)),
                    "words_per_minute": round(float(np.clip(165 * 2.0**prosody.tempo, 110, 280))),
                }
                path = root / "AudioWAV" / f"{1001 + speaker}_{code}_{emotion}_{level}.wav"
                clips.append(_Clip(path, request, prosody, rng))
    return clips


def _write_speaker(clips: Sequence[_Clip], bar) -> None:
    import soundfile

    for clip, speech in zip(clips, _speak([clip.request for clip in clips]), strict=True):
        if not clip.path.exists():
            buffer = io.BytesIO()
            soundfile.write(buffer, _perform(speech, clip.prosody, clip.rng), SAMPLE_RATE, "PCM_16", format="WAV")
            write_atomically(clip.path, buffer.getvalue())
        bar.update()


def _speak(requests: list[dict]) -> Iterator[np.ndarray]:
    """Plain speech for each request, from a fresh synthesiser process."""
    program = Path(__file__).with_name("demo_voice.py")
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps(requests).encode())
        stdin.seek(0)
        with subprocess.Popen(
            [sys.executable, str(program)], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr
        ) as process:
            try:
                for _ in requests:
                    header = process.stdout.read(8)
                    size = 4 * struct.unpack("<q", header)[0] if len(header) == 8 else -1
                    samples = process.stdout.read(max(size, 0))
                    if len(samples) != size:
                        stderr.seek(0)
                        reason = stderr.read().decode(errors="replace").strip() or "no reason given"
                        raise RuntimeError(f"demo.synthesise: the speech synthesiser stopped: {reason}")
                    yield np.frombuffer(samples, "<f4").astype(np.float64)
            finally:
                process.kill()


def _perform(speech: np.ndarray, prosody: Prosody, rng: np.random.Generator) -> np.ndarray:
    """Give plain speech its voice quality and loudness; returns int16 samples with pauses and room noise."""
    rate, n = SAMPLE_RATE, len(speech)
    time = np.arange(n) / rate

    def oscillation(low: float, high: float) -> np.ndarray:
        return np.sin(2 * np.pi * (rng.uniform(low, high) * time + rng.uniform()))

    # Tremor moves pitch (by reading the samples at an oscillating pace) and loudness; roughness only loudness.
    tremor, roughness = np.clip([prosody.tremor, prosody.roughness], 0.0, 0.8)
    wave = oscillation(5.0, 8.0)
    pace = 1.0 + 0.08 * tremor * wave
    position = np.cumsum(pace)
    speech = np.interp(position * (n - 1) / position[-1], np.arange(n), speech)
    speech = speech * (1.0 + 0.6 * tremor * wave) * (1.0 + roughness * oscillation(30.0, 60.0))

    speech = _tilt(speech, prosody.tilt)
    speech /= np.sqrt(np.mean(speech**2)) + 1e-12
    envelope = np.sqrt(np.convolve(speech**2, np.hanning(321) / np.hanning(321).sum(), mode="same"))
    breath = _tilt(rng.standard_normal(n), 3.0)
    speech = speech + 10 ** ((prosody.breath - 24) / 20) * envelope * breath / np.std(breath)

    speech = speech * 10 ** ((-27 + np.clip(prosody.loudness, -10, 10)) / 20)
    before, after = (round(rate * pause) for pause in rng.uniform(0.1, 0.35, size=2))
    speech = np.concatenate([np.zeros(before), speech, np.zeros(after)])
    speech = speech + 10 ** (-62 / 20) * rng.standard_normal(len(speech))
    speech *= min(1.0, 0.95 / np.abs(speech).max())
    return np.round(32767 * speech).astype(np.int16)


def _tilt(signal: np.ndarray, slope: float) -> np.ndarray:
    """Filter by ``slope`` dB per octave around 1 kHz, level below 250 Hz."""
    frequency = np.fft.rfftfreq(len(signal), 1 / SAMPLE_RATE)
    octaves = np.log2(np.maximum(frequency, 250.0) / 1000.0)
    return np.fft.irfft(np.fft.rfft(signal) * 10 ** (slope * octaves / 20), len(signal))
