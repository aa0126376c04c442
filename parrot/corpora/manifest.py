"""Your own data: a CSV or JSONL file that names a recording, its speaker and its label on each line.

    path,speaker,label,sentence
    clips/0001.wav,anna,anger,s1

``sentence`` may be left out. Paths are relative to the manifest's folder. Speakers matter: folds are made so that
nobody is heard in training and tested.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

from parrot.corpora.base import CorpusError, Problem, Reader, Utterance, is_file

COLUMNS = ("path", "speaker", "label")
_FILES = ("manifest.csv", "manifest.jsonl")


class _ManifestReader(Reader):
    name = "manifest"

    def scan(self, root: Path) -> tuple[list[Utterance], list[Problem]]:
        path = root
        if root.is_dir():
            path = next((root / name for name in _FILES if (root / name).is_file()), root)
        if not path.is_file() or path.suffix.lower() not in (".csv", ".jsonl"):
            found = "a folder without one" if root.is_dir() else f"{path.name}, " + (
                "another kind of file" if path.exists() else "which does not exist"
            )  # fmt: skip
            raise CorpusError(
                self.name, root, [f"wanted a .csv or .jsonl file, or a folder with {_FILES}; got {found}"]
            )
        try:
            rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
        except (UnicodeDecodeError, csv.Error, ValueError) as error:
            raise CorpusError(self.name, root, [f"{path.name} can't be read: {error}"]) from error
        utterances, problems = [], []
        for line, row in rows:
            empty = [column for column in COLUMNS if not str(row.get(column) or "").strip()]
            where = f"{path.name}, line {line}"
            if empty:
                problems.append(Problem("incomplete", where, f"no {', '.join(empty)}"))
                continue
            audio, speaker, label = (str(row[column]).strip() for column in COLUMNS)
            utterances.append(Utterance(path.parent / audio, speaker, label, str(row.get("sentence") or "").strip()))
        for twice, count in Counter(u.path for u in utterances).items():
            if count > 1:
                problems.append(Problem("repeated", str(twice), f"on {count} lines of {path.name}"))
        problems += [
            Problem("missing", str(u.path), "no such file") for u in dict.fromkeys(utterances) if not is_file(u.path)
        ]
        return utterances, problems


def _csv_rows(path: Path) -> list[tuple[int, dict]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}; wanted {', '.join(COLUMNS)} and perhaps sentence")
        return [(reader.line_num, row) for row in reader]


def _json_rows(path: Path) -> list[tuple[int, dict]]:
    rows = []
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {line} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {line} is not a JSON object")
        rows.append((line, row))
    return rows


READER = _ManifestReader()
