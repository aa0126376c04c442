"""The readers that fuzz_files.py damages files for: valid files, how they are read, and what may be raised."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.signal  # noqa: F401 (imported when resampling: once, not in every child under its alarm)
import soundfile
import torch
from safetensors.torch import save

import parrot
from parrot import evaluation, reproduce
from parrot.corpora import audio, emobox, manifest, splits
from parrot.encoders.checkpoint import read_state_dict
from parrot.model import Parrot
from parrot.model_config import ParrotConfig
from parrot.store import FeatureStore
from parrot.training import TrainingResult

KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(6)]


@dataclass(frozen=True)
class Reader:
    files: Callable[[], dict[str, bytes]]  # valid ones, by name
    read: Callable[[Path, random.Random], Any]  # from their folder
    raises: tuple[type[Exception], ...]  # as documented
    damages: Callable[[str], bool] = lambda file: True
    mend: Callable[[dict[str, bytes], str], None] | None = None  # the checksum of the damaged file


def _folder_files(write: Callable[[Path], Any]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _audio(format: str, subtype: str | None = None) -> Reader:
    @functools.cache
    def files() -> dict[str, bytes]:
        samples = 0.3 * np.sin(np.arange(1600) / 7.0)
        stream = io.BytesIO()
        soundfile.write(stream, np.stack([samples, -0.5 * samples], 1), 16000, format=format, subtype=subtype)
        return {f"a.{format.lower()}": stream.getvalue()}

    def read(folder: Path, rng: random.Random) -> None:
        (path,) = folder.iterdir()
        waveform = audio.load_waveform(path, 16000)
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        assert np.isfinite(waveform).all()

    return Reader(files, read, (audio.AudioError,))


def _manifest(suffix: str) -> Reader:
    rows = [{"path": f"{i}.wav", "speaker": f"s{i % 2}", "label": "joy", "sentence": "a"} for i in range(4)]
    if suffix == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        text = "path,speaker,label,sentence\n" + "\n".join(",".join(row.values()) for row in rows) + "\n"
    files = {f"manifest.{suffix}": text.encode(), **{row["path"]: row["path"].encode() for row in rows}}

    def read(folder: Path, rng: random.Random) -> None:
        manifest.READER.scan(folder)

    return Reader(lambda: files, read, (ValueError,), lambda file: file.startswith("manifest"))


def _emobox_files() -> dict[str, bytes]:
    rows = [{"key": f"k{i}", "wav": f"clips/{i}.wav", "emo": "hap", "dataset": "toy"} for i in range(6)]

    def lines(part: slice) -> bytes:
        return "\n".join(json.dumps(row) for row in rows[part]).encode()

    return {
        "data/toy/toy.jsonl": lines(slice(None)),
        "data/toy/data.seg.wrd.stm": "\n".join(f"k{i} 1 female_{i} 0 1 <o> hap" for i in range(6)).encode(),
        "data/toy/label_map.json": b'{"hap": "Happy", "sad": "Sad"}',
        "data/toy/fold_1/toy_train_fold_1.jsonl": lines(slice(0, 4)),
        "data/toy/fold_1/toy_test_fold_1.jsonl": lines(slice(4, 6)),
    }


def _read_emobox(folder: Path, rng: random.Random) -> None:
    root = folder / "data" / "toy"
    emobox.READER.scan(root)
    emobox.folds(root, [f"{i}.wav" for i in range(6)], ["hap"] * 6, validation_fraction=0.3)


def _weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(4, dtype=torch.float16), "n": torch.tensor(3)}


@functools.cache
def _pth(zipped: bool) -> dict[str, bytes]:
    stream = io.BytesIO()
    content = {"model": _weights(), "epoch": 3, "args": {"lr": 0.1}}
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return {"a.pth": stream.getvalue()}


def _read_checkpoint(folder: Path, rng: random.Random) -> None:
    (path,) = folder.iterdir()
    assert all(isinstance(value, torch.Tensor) for value in read_state_dict(path).values())


@functools.cache
def _model_files() -> dict[str, bytes]:
    torch.manual_seed(0)
    config = ParrotConfig(filters=(2, 2), projection=2, hidden=2) if "filters" in ParrotConfig.__annotations__ else None
    model = Parrot((8, 8), 3) if config is None else Parrot((8, 8), 3, config)
    return _folder_files(lambda folder: model.save_pretrained(folder))


def _mend_model(files: dict[str, bytes], victim: str) -> None:
    try:
        config = json.loads(files["config.json"])
        config["weights_sha256"] = hashlib.sha256(files["model.safetensors"]).hexdigest()
    except (ValueError, TypeError, RecursionError):
        return
    files["config.json"] = json.dumps(config).encode()


def _store(folder: Path, ragged: bool, verify: bool = True) -> FeatureStore:
    return FeatureStore(folder, "encoder", 3, ragged=ragged, verify=verify)


def _features(ragged: bool) -> Reader:
    @functools.cache
    def files() -> dict[str, bytes]:
        def write(folder: Path) -> None:
            for part in (KEYS[:4], KEYS[4:]):
                rows = {k: np.full((2, 3) if ragged else 3, i, np.float32) for i, k in enumerate(part)}
                _store(folder, ragged).add(rows)

        return _folder_files(write)

    def read(folder: Path, rng: random.Random) -> None:
        store = _store(folder, ragged, verify=rng.random() < 0.5)
        found = [key for key in KEYS if key in store]
        for key in found:
            assert np.asarray(store[key]).shape[-1] == 3
        if found:
            rows = store.rows(found)
            assert len(rows) == len(found)

    return Reader(files, read, (ValueError, OSError))


@functools.cache
def _result_files() -> dict[str, bytes]:
    result = TrainingResult([{"loss": 1.0}], 0, np.ones((4, 3), np.float32), np.ones((4, 4), np.float32), 1.5)
    return _folder_files(lambda folder: evaluation.save_result(folder / "fold.safetensors", result))


def _read_result(folder: Path, rng: random.Random) -> None:
    evaluation.load_result(folder / "fold.safetensors")


@functools.cache
def _split_files() -> dict[str, bytes]:
    folds = splits.speaker_folds([f"s{i % 5}" for i in range(20)])
    return _folder_files(lambda folder: splits.save(folder / "folds.json", folds, [f"{i}.wav" for i in range(20)]))


def _mend_splits(files: dict[str, bytes], victim: str) -> None:
    try:
        content = json.loads(files[victim])
        content.pop("sha256", None)
        files[victim] = json.dumps({**content, "sha256": splits._digest(content)}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return


READERS: dict[str, Reader] = {
    "wav": _audio("WAV"),
    "wav-float": _audio("WAV", "FLOAT"),
    "flac": _audio("FLAC"),
    "ogg": _audio("OGG"),
    "csv": _manifest("csv"),
    "jsonl": _manifest("jsonl"),
    "emobox": Reader(_emobox_files, _read_emobox, (ValueError,)),
    "pth": Reader(lambda: _pth(True), _read_checkpoint, (ValueError,)),
    "pth-legacy": Reader(lambda: _pth(False), _read_checkpoint, (ValueError,)),
    "safetensors": Reader(lambda: {"a.safetensors": save(_weights())}, _read_checkpoint, (ValueError,)),
    "model": Reader(_model_files, lambda folder, _: parrot.from_pretrained(folder), (ValueError,), mend=_mend_model),
    "store": _features(False),
    "store-ragged": _features(True),
    "result": Reader(_result_files, _read_result, ()),
    "run": Reader(lambda: {"run.json": b'{"metrics": {"wa": 0.5}}'}, lambda f, _: reproduce._load(f / "run.json"), ()),
    "folds": Reader(
        _split_files, lambda folder, _: splits.load(folder / "folds.json"), (ValueError,), mend=_mend_splits
    ),
}
