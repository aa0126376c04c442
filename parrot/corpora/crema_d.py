"""CREMA-D: 7442 acted clips of 91 speakers, 12 sentences, 6 emotions (Cao et al., 2014).

The label is the emotion the actor was asked for, read from the file name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from parrot.corpora.base import Corpus, CorpusError, Utterance

EMOTIONS = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
LEVELS = ("LO", "MD", "HI", "XX", "X")  # X: one clip carried a misspelt name until 2022
SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
_NAME = re.compile(r"(10\d{2})_([A-Z]{3})_([A-Z]{3})_([A-Z]{1,2})\.wav")


def read(root: str | os.PathLike) -> Corpus:
    """Read the WAV files in ``root/AudioWAV``, or in ``root`` itself, sorted by name.

    Files that are not WAV and hidden files are passed over; every WAV file must have a name of CREMA-D.

    Raises:
        CorpusError: the folder is missing or has no WAV file, or some names are not CREMA-D's; the error
            says what is wrong with each.
    """
    root = Path(root)
    folder = root / "AudioWAV" if (root / "AudioWAV").is_dir() else root
    if not folder.is_dir():
        raise CorpusError("crema-d", root, ["no such folder: give the folder that holds AudioWAV"])
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".wav" and not p.name.startswith("."))
    if not paths:
        raise CorpusError("crema-d", root, [f"no WAV files in {folder}: give the folder that holds AudioWAV"])
    utterances, problems = [], []
    for path in paths:
        try:
            utterances.append(_parse(path))
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
    if problems:
        raise CorpusError("crema-d", root, problems)
    return Corpus("crema-d", root, tuple(utterances), tuple(sorted(EMOTIONS.values())))


def _parse(path: Path) -> Utterance:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("not a CREMA-D name, wanted <speaker>_<sentence>_<emotion>_<level>.wav")
    speaker, sentence, emotion, level = match.groups()
    for what, code, known in (
        ("sentence", sentence, SENTENCES), ("emotion", emotion, EMOTIONS), ("level", level, LEVELS),
    ):  # fmt: skip
        if code not in known:
            raise ValueError(f"unknown {what} {code!r}, wanted one of {', '.join(known)}")
    return Utterance(path, speaker, EMOTIONS[emotion], sentence)
