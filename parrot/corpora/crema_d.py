"""CREMA-D: 7442 acted clips of 91 speakers, 12 sentences, 6 emotions (Cao et al., 2014).

The label is the emotion the actor was asked for, read from the file name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from parrot.corpora.base import Corpus, NamedFilesReader, Utterance

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


# What its speakers did not record.
_MISSING = (("1008", "WSI"), ("1009", "MTI"), ("1019", "ITH"), ("1002", "TIE", "NEU"), ("1076", "ITS", "NEU"))


def file_names() -> list[str]:
    """The 7442 file names of the complete corpus, in order."""
    names = []
    for speaker in map(str, range(1001, 1092)):
        for sentence in SENTENCES:
            for emotion in EMOTIONS:
                if (speaker, sentence) in _MISSING or (speaker, sentence, emotion) in _MISSING:
                    continue
                levels = ("LO", "MD", "HI") if sentence == "IEO" and emotion != "NEU" else ("XX",)
                names += [f"{speaker}_{sentence}_{emotion}_{level}.wav" for level in levels]
    return sorted(names)


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


READER = NamedFilesReader(
    name="crema-d",
    title="CREMA-D",
    folders=("AudioWAV", "."),
    example="1001_DFA_ANG_XX.wav",
    parse=_parse,
    labels=tuple(sorted(EMOTIONS.values())),
    names=file_names,
    renamed=(("1040_ITH_SAD_X.wav", "1040_ITH_SAD_XX.wav"),),
)


def read(root: str | os.PathLike) -> Corpus:
    """Read the WAV files in ``root/AudioWAV``, or in ``root`` itself, sorted by name.

    Files that are not WAV and hidden files are passed over; every WAV file must have a name of CREMA-D.

    Raises:
        CorpusError: the folder is missing or has no WAV file, or some names are not CREMA-D's; the error
            says what is wrong with each.
    """
    return READER.read(root)
