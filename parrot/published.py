"""The figures that PARROT's authors published, and the encoders they are of.

Source: tables 1 and 2 of arXiv 2506.01138 (INTERSPEECH 2025), as far as one of its authors quotes them in
github.com/mohdmujtabaakhtar/mmakhtar-research, papers/parrot/README.md: the rows below and no others. All are means
over five folds, in per cent; neither deviations nor the folds are published.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2506.01138, tables 1 and 2, as quoted by an author in mmakhtar-research/papers/parrot/README.md"


@dataclass(frozen=True)
class PublishedEncoder:
    """``title`` in tables; ``mamba``: of the state-space family, else attention; ``weights``: where they come from."""

    title: str
    mamba: bool
    weights: str


ENCODERS = {
    "audio-mamba-tiny": PublishedEncoder("Audio-Mamba tiny", True, "SSAM tiny, 960 values"),
    "audio-mamba-small": PublishedEncoder("Audio-Mamba small", True, "SSAM small, 1920 values"),
    "audio-mamba-base": PublishedEncoder("Audio-Mamba base", True, "SSAM base, 3840 values"),
    "hubert": PublishedEncoder("HuBERT", False, "facebook/hubert-base-ls960"),
    "wavlm": PublishedEncoder("WavLM", False, "microsoft/wavlm-base"),
    "wav2vec2": PublishedEncoder("wav2vec 2.0", False, "facebook/wav2vec2-base"),
    "unispeech-sat": PublishedEncoder("UniSpeech-SAT", False, "microsoft/unispeech-sat-base"),
    "mms": PublishedEncoder("MMS", False, "facebook/mms-1b"),
}

CORPORA = {"crema-d": "CREMA-D", "emo-db": "Emo-DB", "mesd": "MESD"}

_ROWS = """
table1 audio-mamba-base          cnn     69.91 69.90  84.11 82.90  78.03 77.96
table1 hubert                    cnn     69.95 68.23  88.26 87.11  62.43 62.43
table2 wav2vec2+mms              concat  64.19 63.61  80.91 79.31  72.14 71.39
table2 wav2vec2+mms              parrot  65.21 65.01  81.52 80.96  71.10 70.96
table2 audio-mamba-base+hubert   concat  70.63 69.79  89.92 88.24  58.31 56.08
table2 audio-mamba-base+hubert   parrot  73.68 72.90  92.24 91.53  59.54 58.94
table2 audio-mamba-base+mms      concat  61.25 60.97  65.96 64.05  66.37 65.28
table2 audio-mamba-base+mms      parrot  63.26 63.24  66.36 57.29  69.05 68.72
"""


@dataclass(frozen=True)
class PublishedRow:
    """Accuracy and macro-F1 of one system, in per cent."""

    table: str
    encoders: tuple[str, ...]
    system: str
    corpus: str
    accuracy: float
    macro_f1: float


def _parse(line: str) -> list[PublishedRow]:
    table, encoders, system, *figures = line.split()
    pairs = zip(CORPORA, map(float, figures[::2]), map(float, figures[1::2]), strict=True)
    return [PublishedRow(table, tuple(encoders.split("+")), system, *pair) for pair in pairs]


ROWS: tuple[PublishedRow, ...] = tuple(row for line in _ROWS.strip().splitlines() for row in _parse(line))


def find(encoders: tuple[str, ...], system: str, corpus: str) -> PublishedRow | None:
    """The published figures of a system, whichever encoder is named first; None if there are none."""
    wanted = (sorted(encoders), system, corpus)
    return next((row for row in ROWS if (sorted(row.encoders), row.system, row.corpus) == wanted), None)


def role(spec: str, embedding_dim: int) -> str | None:
    """The key in :data:`ENCODERS` of the encoder that ``spec`` loads, by its kind, name and width; None if unknown.

    The demo encoders stand in for the two of the paper's best pair. A spec with a layer is none of the paper's.
    """
    if "#" in spec:
        return None
    kind, _, checkpoint = spec.partition(":")
    if kind == "ssam-demo":
        return "audio-mamba-base"
    if kind == "ssam":
        sizes = {960: "audio-mamba-tiny", 1920: "audio-mamba-small", 3840: "audio-mamba-base"}
        return sizes.get(embedding_dim)
    words = f"{checkpoint.rstrip('/').rsplit('/', 1)[-1]} {kind}".lower()
    return next((name for name in ("unispeech-sat", "wavlm", "wav2vec2", "mms", "hubert") if name in words), None)
