"""RAVDESS, its speech: 1440 clips of 24 actors, 2 statements, 8 emotions (Livingstone and Russo, 2018)."""

from __future__ import annotations

import re
from pathlib import Path

from parrot.corpora.base import NamedFilesReader, Utterance

EMOTIONS = {
    "01": "neutral", "02": "calm", "03": "happy", "04": "sad", "05": "angry", "06": "fearful", "07": "disgust",
    "08": "surprised",
}  # fmt: skip
_NAME = re.compile(r"-".join([r"(\d\d)"] * 7) + r"\.wav")


def file_names() -> list[str]:
    """The 1440 file names of the complete corpus, in order: all combinations, neutral in one intensity only."""
    return sorted(
        f"03-01-{emotion}-{intensity}-{statement}-{repetition}-{actor:02d}.wav"
        for emotion in EMOTIONS
        for intensity in (("01",) if emotion == "01" else ("01", "02"))
        for statement in ("01", "02")
        for repetition in ("01", "02")
        for actor in range(1, 25)
    )


def _parse(path: Path) -> Utterance:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("not a RAVDESS name, wanted seven two-digit codes such as 03-01-05-01-02-01-12.wav")
    modality, channel, emotion, _, statement, _, actor = match.groups()
    if (modality, channel) != ("03", "01"):
        raise ValueError(f"wanted audio-only speech, 03-01-..., got modality {modality}, vocal channel {channel}")
    if emotion not in EMOTIONS:
        raise ValueError(f"unknown emotion {emotion!r}, wanted one of {', '.join(EMOTIONS)}")
    return Utterance(path, actor, EMOTIONS[emotion], statement)


READER = NamedFilesReader(
    name="ravdess",
    title="RAVDESS",
    folders=("Actor_*", "*peech*/Actor_*", "."),
    example="Actor_12/03-01-05-01-02-01-12.wav",
    parse=_parse,
    labels=tuple(sorted(EMOTIONS.values())),
    names=file_names,
)
