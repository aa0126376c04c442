"""EmoBox metadata (Ma et al., 2024): a corpus by its JSONL list, and the official folds.

Give the folder ``data/<corpus>`` of an EmoBox checkout; recordings are looked for under the checkout, where the
lists say ``downloads/<corpus>/...``. Speakers are not in the JSONL but in ``data.seg.wrd.stm`` beside it. Two
things are made uniform: labels, through ``label_map.json`` without regard to case ("boredem" is boredom), and
Emo-DB's speakers, "male_03" being "03" as in its file names.

The official folds are not speaker-independent everywhere: CREMA-D, Emo-DB and MESD have every speaker (or voice
group) on both sides. RAVDESS and IEMOCAP keep speakers apart.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parrot.corpora.base import CorpusError, Problem, Reader, Utterance, is_file
from parrot.corpora.splits import Fold, hold_out


class _EmoBoxReader(Reader):
    name = "emobox"

    def scan(self, root: Path) -> tuple[list[Utterance], list[Problem]]:
        listing = root / f"{root.resolve().name}.jsonl"
        if not listing.is_file():
            raise CorpusError(
                self.name, root, [f"no {listing.name} in it: give the folder data/<corpus> of an EmoBox checkout"]
            )
        try:
            rows = _read_jsonl(listing)
            speakers = _speakers(root / "data.seg.wrd.stm")
            names = _label_names(root / "label_map.json")
        except (OSError, ValueError) as error:
            raise CorpusError(self.name, root, [str(error)]) from error
        checkout = root.resolve().parents[1]
        utterances, problems = [], []
        for row in rows:
            if row["key"] not in speakers:
                problems.append(Problem("incomplete", row["key"], "no speaker in data.seg.wrd.stm"))
                continue
            label = names.get(str(row["emo"]).lower(), str(row["emo"])).lower()
            path = checkout / row["wav"]
            if not is_file(path):
                problems.append(Problem("missing", str(path), "no such file"))
            utterances.append(Utterance(path, speakers[row["key"]], label, ""))
        return utterances, problems


READER = _EmoBoxReader()


def folds(
    metadata: str | os.PathLike, paths: Sequence[str | os.PathLike], labels: Sequence, seed: int = 0,
    validation_fraction: float = 0.1,
) -> list[Fold]:  # fmt: skip
    """The official folds of an EmoBox corpus, for recordings found by file name.

    Validation rows are those of EmoBox where it lists some; else ``validation_fraction`` of each label's training
    rows, drawn by ``default_rng(100 * seed + fold)``.

    Args:
        metadata: the folder ``data/<corpus>``.
        paths: the file of each utterance.
        labels: the label of each utterance.

    Raises:
        ValueError: there are no fold lists, or an utterance is in no part of a fold or in two.
    """
    metadata = Path(metadata)
    corpus = metadata.resolve().name
    row_of = {Path(path).name: row for row, path in enumerate(paths)}
    if len(row_of) != len(paths):
        raise ValueError("emobox.folds: `paths` must have different file names.")
    result: list[Fold] = []
    while (folder := metadata / f"fold_{len(result) + 1}").is_dir():
        number = len(result) + 1
        part_of = np.full(len(paths), "", dtype=object)
        for part in ("train", "valid", "test"):
            listing = folder / f"{corpus}_{part}_fold_{number}.jsonl"
            if part == "valid" and not listing.is_file():
                continue
            if not listing.is_file():
                raise ValueError(f"emobox.folds: {listing} is missing.")
            for row in _read_jsonl(listing):
                place = row_of.get(Path(row["wav"]).name)
                if place is None:
                    continue
                if part_of[place]:
                    raise ValueError(f"emobox.folds: {row['wav']} is in {part_of[place]} and {part} of fold {number}.")
                part_of[place] = part
        unlisted = np.flatnonzero(part_of == "")
        if len(unlisted):
            raise ValueError(
                f"emobox.folds: {len(unlisted)} of {len(paths)} recordings are in no part of fold {number}, such as "
                f"{Path(paths[unlisted[0]]).name}: give the metadata of the same corpus."
            )
        train, test = np.flatnonzero(part_of == "train"), np.flatnonzero(part_of == "test")
        validation = np.flatnonzero(part_of == "valid")
        if not len(validation):
            validation = hold_out(train, np.asarray(labels)[train], validation_fraction, 100 * seed + number - 1)
            train = np.setdiff1d(train, validation)
        result.append(Fold(number - 1, train, validation, test))
    if not result:
        raise ValueError(f"emobox.folds: no folder fold_1 in {metadata}: give the folder data/<corpus> of EmoBox.")
    return result


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line, f"{path.name}, line {number}")
        missing = [name for name in ("key", "wav", "emo") if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"{path.name}, line {number}: no field {', '.join(missing)}: not EmoBox metadata")
        rows.append(row)
    return rows


def _speakers(path: Path) -> dict[str, str]:
    """Speaker by key, from lines ``key channel speaker start end <...> emotion``."""
    speakers = {}
    for line in _text(path).split("\n"):
        fields = line.split()
        if len(fields) >= 3:
            gendered = re.fullmatch(r"(?:fe)?male_(\d+)", fields[2])
            speakers[fields[0]] = gendered[1] if gendered else fields[2]
    return speakers


def _label_names(path: Path) -> dict[str, str]:
    return {str(raw).lower(): str(name) for raw, name in _parsed(_text(path), path.name).items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not text in UTF-8: {error}") from None


def _parsed(text: str, where: str) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a JSON object: not EmoBox metadata")
    return content
