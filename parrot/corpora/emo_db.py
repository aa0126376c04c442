"""Emo-DB: 535 acted clips of 10 speakers, 10 German sentences, 7 emotions (Burkhardt et al., 2005)."""

from __future__ import annotations

import re
from pathlib import Path

from parrot.corpora.base import NamedFilesReader, Utterance

EMOTIONS = {
    "W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happy", "T": "sad", "N": "neutral",
}  # fmt: skip
SPEAKERS = ("03", "08", "09", "10", "11", "12", "13", "14", "15", "16")
TEXTS = ("a01", "a02", "a04", "a05", "a07", "b01", "b02", "b03", "b09", "b10")
_NAME = re.compile(r"(\d\d)([ab]\d\d)([A-Z])([a-z])\.wav")

# The recordings that were kept: after an emotion's code, a line for each speaker with its texts and their takes.
_RECORDINGS = """
W
03 a01a a02bc a04c a05ab a07c b01ac b02b b03c b09a b10bc
08 a01ac a02c a04c a05a a07c b01a b02d b03d b09ac b10a
09 a01b a02b a04a a05bc a07bd b01b b02cd b03b b09a b10a
10 a01a a02a a04ab a05b a07b b02b b03b b09b b10a
11 a01c a02c a04c a05d a07c b01d b02b b03ab b09a b10a
12 a01c a02ac a04c a05b a07a b01a b02abd b09c b10a
13 a01b a02a a04c a05ac a07b b01a b02a b03c b09a b10ac
14 a01ac a02ac a04bc a05ab a07c b01c b02bd b03b b09ac b10c
15 a01a a02bd a04ab a05a b01c b02ac b03ab b09b b10a
16 a01b a02b a04bc a05bc a07a b01ab b02b b03b b09b b10ab
L
03 a04c a07a b01b b02a b09a
08 a01c a02a a04a a05c a07a b01b b02a b03c b09c b10a
09 a02a a04a a05c b03b
10 a02b a05d a07a b01b b02a b03a b09b b10c
11 a01d a02d a05c a07d b01b b03c b09d b10d
12 a01b a05b a07a b03a b10d
13 a01b a02c a04b a05c a07b b01d b02c b03b b09a b10a
14 a02a a04b a05b a07cd b03b b09b b10b
15 a01a a02a a05b a07d b01b b02b b03c b09a b10c
16 a01b a02b a04ac a05a a07ab b01ac b02b b03a b09ab b10b
E
03 b10c
09 a01a a02ab a05d a07b b01a b03d b09a
10 b01a
11 a02c b01b
12 a02c b02a
13 a01ac a02c a05a b01c b03d b09c b10c
14 a01a a02a a04d a07b b01b b03d b09a b10b
15 a01a a02a a05b a07b b01c
16 a01c a02ac a04a a05a a07a b01b b02b b03a b09b b10b
A
03 a04d a05a b02a b10b
08 a01b a02bc b01a b09b b10a
09 b10a
10 a01c a02b a05a a07ad b01a b02a b09d
11 a01ab a04c a05d a07c b01b b02b b09d b10de
12 a02c a05b a07c b02d b09c b10c
13 a01c a02d a04c a05a b01b b03c b09b
14 a01ac a02b a04a a05ac a07a b01c b02a b03d b09c b10d
15 a02c a04bc a07c b02a b03a b09c b10c
16 a04b a05b b01a b02a b03d b09b b10a
F
03 a01a a02c a04d a05c a07ab b01a
08 a01d a02e a04f a05e a07d b01de b02f b03e b09d b10d
09 a01a a04d b03ad
10 a02a a04d b01a b10c
11 a02b a04d a05bc b01c b02d b03c b09d
12 a01b b02b
13 a01d a02a a04c a07d b01c b02b b03d b09bc b10a
14 a02d a05ab a07d b01ac b02b b09c
15 a01b a04d a05b a07ab b09a
16 a01c a04a a05c a07ab b01a b02d b03ad b09b b10b
N
03 a01c a02c a04c a05d a07c b01b b02a b03b b09c b10ac
08 a01a a02a a04c a05b a07a b01a b02b b03b b09b b10c
09 a01b a04b a05b a07a b01a b02a b03b b09d b10d
10 a01b a02a a04b b02a
11 a01d a02c a04d a05a b01c b02a b03b b09a b10c
12 a01b a02b a05d b02a
13 a01b a02c a05b a07a b01c b02b b03a b09a b10c
14 a01a a02c a05a a07a b01a b02a b10b
15 a01b a02a a04c a05a a07c b01a b02d b03b b09b b10bc
16 a01c a02b a04c a07b b03b
T
03 a02a a04a a05c b01d b02b b03c b09c
08 a02b a04b a05a a07ab b02c b03c b09b b10c
09 a05b a07a b02b b03a
10 a05b a07a b03b
11 a02c a05d a07a b02d b03d b09d b10d
12 a05a b01a b03a b09d
13 a02a a04a a05c a07c b03d
14 a02b a04bc a05ac a07c b02c b03a b09d b10c
15 a02a b02c b03c b09a
16 a01b a02c a04c a05b a07d b01b b03a b10bd
"""


def file_names() -> list[str]:
    """The 535 file names of the complete corpus, in order."""
    names, emotion = [], ""
    for line in _RECORDINGS.split("\n"):
        first, _, rest = line.partition(" ")
        if first in EMOTIONS:
            emotion = first
        for item in rest.split():
            names += [f"{first}{item[:3]}{emotion}{take}.wav" for take in item[3:]]
    return sorted(names)


def _parse(path: Path) -> Utterance:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("not an Emo-DB name, wanted <speaker><text><emotion><take>.wav such as 03a01Wa.wav")
    speaker, text, emotion, _ = match.groups()
    for what, code, known in (("speaker", speaker, SPEAKERS), ("text", text, TEXTS), ("emotion", emotion, EMOTIONS)):
        if code not in known:
            raise ValueError(f"unknown {what} {code!r}, wanted one of {', '.join(known)}")
    return Utterance(path, speaker, EMOTIONS[emotion], text)


READER = NamedFilesReader(
    name="emo-db",
    title="Emo-DB",
    folders=("wav", "."),
    example="03a01Wa.wav",
    parse=_parse,
    labels=tuple(sorted(EMOTIONS.values())),
    names=file_names,
)
