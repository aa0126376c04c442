"""Reading checkpoints without executing them, and `parrot convert`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parrot import encoders
from parrot.cli import main
from parrot.encoders import SSAM, SSAMBA
from parrot.encoders.checkpoint import read_state_dict

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "data" / "ssam_golden.safetensors")


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, torch.Tensor]:
    return {key.removeprefix("model."): value for key, value in golden.items() if key.startswith("model.")}


class ConfigDict:
    """Pickles as ml_collections.ConfigDict does: as an object of that class, with a nested one in its state."""

    def __init__(self, **fields):
        self._fields, self._locked, self._allow_dotted_keys = fields, True, False

    def __getstate__(self):
        return dict(self.__dict__)


def save_official(path: Path, weights: dict, legacy: bool, monkeypatch) -> None:
    """A file as the official training script leaves it, whose configuration class is gone afterwards."""
    module = types.ModuleType("ml_collections.config_dict.config_dict")
    module.ConfigDict = ConfigDict
    network = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(3)).sum().backward()
    optimizer.step()
    config = ConfigDict(model=ConfigDict(img_size=(200, 80), name="ssam"), lr=1e-3)
    content = {
        "model": OrderedDict(weights),
        "optimizer": optimizer.state_dict(),
        "epoch": 99,
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "args": argparse.Namespace(config=config, output_dir=Path("runs"), dtype=torch.float16, size=torch.Size([2])),
    }
    content["model"]._metadata = OrderedDict({"": {"version": 1}})
    with monkeypatch.context() as patch:
        patch.setattr(ConfigDict, "__module__", module.__name__)
        for name in ("ml_collections", "ml_collections.config_dict", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModuleNotFoundError, match="ml_collections"):
        torch.load(path, weights_only=False)


@FORMATS
def test_official_files_load_and_convert(golden, weights, legacy, tmp_path, monkeypatch, capsys):
    official, converted = tmp_path / "checkpoint-99.pth", tmp_path / "out" / "ssam.safetensors"
    save_official(official, weights, legacy, monkeypatch)
    assert main(["convert", str(official), str(converted)]) == 0
    out = capsys.readouterr().out
    assert "SSAM with" in out
    assert f"--encoder ssam:{converted}" in out
    for path in (official, converted):
        encoder = encoders.load(f"ssam:{path}")
        for clip in ("short", "exact", "long"):
            got = encoder.embed(golden[f"{clip}.waveform"])
            assert (got - golden[f"{clip}.scene_embedding"]).abs().max() <= 1e-5
    copy = load_file(converted)
    assert copy.keys() == weights.keys()
    assert all(torch.equal(copy[key], weights[key]) for key in weights)
    with safe_open(converted, "pt") as file:
        assert file.metadata() == {"format": "pt", "encoder": "SSAM", "source": "checkpoint-99.pth"}


def test_ssamba_files_load_and_convert(tmp_path, capsys):
    original = SSAMBA(16, 2)
    weights = {f"module.{key}": value for key, value in original.state_dict().items()}
    weights |= {"module.p_input_fdim": torch.tensor(128), "module.mask_embed": torch.zeros(1, 1, 16)}
    torch.save(weights, tmp_path / "amba.pth")
    target = tmp_path / "amba.safetensors"
    assert main(["convert", str(tmp_path / "amba.pth"), str(target)]) == 0
    assert f"--encoder ssamba:{target}" in capsys.readouterr().out
    assert load_file(target).keys() == {key.removeprefix("module.") for key in weights}
    for path in (tmp_path / "amba.pth", target):
        loaded = encoders.load(f"ssamba:{path}")
        assert loaded.fingerprint == original.fingerprint


class Call:
    """Unpickled, it would call a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Build(Call):
    """... as the state of another object, an element and a key."""

    def __reduce__(self):
        inner = Call(*self.call[0:1], *self.call[1])
        return list, (), None, iter([inner]), iter([(inner, inner)])


@FORMATS
@pytest.mark.parametrize("where", ["args", "model", "key", "tensor", "whole"])
def test_code_in_a_pickle_is_not_executed(weights, where, legacy, tmp_path):
    mark = tmp_path / "executed"
    for number, call in enumerate(
        (
            Call(os.system, f"touch {mark}"),
            Call(exec, f"open({str(mark)!r}, 'w')"),
            Call(Path.touch, mark),
            Build(os.system, f"touch {mark}"),
            Call(eval, "__import__('os').system('touch ' + %r)" % str(mark)),  # noqa: UP031
        )
    ):
        content = {
            "args": {"model": weights, "args": call},
            "model": {"model": {**weights, "extra": call}},
            "key": {"model": weights, "args": [call, {"nested": call}]},
            "tensor": {"model": {**weights, "cls_token": Call(torch.load, call)}},
            "whole": call,
        }[where]
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        if where in ("args", "key"):
            assert read_state_dict(path).keys() == weights.keys()
        else:
            with pytest.raises(ValueError, match="must hold a dictionary of tensors"):
                read_state_dict(path)
        assert (
            main(["convert", str(path), str(tmp_path / f"{number}.safetensors")]) == (where not in ("args", "key")) * 2
        )
        assert not mark.exists()


def test_those_pickles_do_execute_otherwise(tmp_path):
    torch.save(Build(os.system, f"touch {tmp_path / 'executed'}"), tmp_path / "a.pth")
    with contextlib.suppress(TypeError):
        torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_pickle_can_not_reach_the_reader():
    """State and items set on the names that the reader resolves leave it as it was."""
    from parrot.encoders import checkpoint

    for name in (
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ctorch\nFloatStorage\n",
        "ccollections\nOrderedDict\n",
        "cos\nx\n",
    ):
        for program in ("(dS'call'\nS'x'\nsb.", "(N(dS'call'\nS'x'\nstb.", "S'a'\nS'b'\ns.", "S'a'\na."):
            with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):
                checkpoint._Unpickler(io.BytesIO((name + program).encode())).load()
    for kind in (checkpoint._Inert, checkpoint._Function, checkpoint._StorageType, checkpoint._Dict):
        assert not hasattr(kind, "a")
    assert not vars(checkpoint._rebuild_tensor)


def test_tensors_keep_their_layout_and_types(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    weights = {
        "view": base[1:, ::2],
        "transposed": base.t(),
        "shared": base,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8):
        weights[str(dtype)] = torch.arange(-3, 4).to(dtype)
    weights["bool"] = torch.tensor([True, False])
    for legacy in (False, True):
        torch.save({"state_dict": weights}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        got = read_state_dict(tmp_path / "a.pth")
        assert got.keys() == weights.keys()
        for key, want in weights.items():
            assert got[key].dtype == want.dtype
            assert torch.equal(got[key], want)
            assert got[key].is_contiguous()


def damaged(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="can't be read") as caught:
        encoders.load(f"ssam:{path}")
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_it_says_what_is_wrong_with_a_file(weights, tmp_path):
    path = tmp_path / "a.pth"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
    assert "Git LFS pointer" in damaged(path, pointer)
    assert "git lfs pull" in damaged(tmp_path / "a.safetensors", pointer)
    assert "it is empty" in damaged(path, b"")
    assert "a web page" in damaged(path, b"<!DOCTYPE html><html>Google Drive can't scan this file")
    assert "neither a safetensors nor a torch.save file (5 bytes)" in damaged(path, b"hello")
    assert "not one that torch.save wrote" in damaged(path, pickle.dumps({"a": 1}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no data.pkl" in damaged(path, path.read_bytes())
    assert "header is damaged" in damaged(tmp_path / "b.safetensors", (5).to_bytes(8, "little") + b"hello")
    with pytest.raises(ValueError, match=r"no checkpoint file at .*nowhere\.pth"):
        encoders.load(f"ssam:{tmp_path / 'nowhere.pth'}")
    with pytest.raises(ValueError, match="it is a folder"):
        encoders.load(f"ssam:{tmp_path}")
    for content, got in (([1, 2], "got a list"), ({"a": 1}, "got entries that are none: a"), ({}, "got an empty one")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"must hold a dictionary of tensors, or one under 'model'; {got}"):
            encoders.load(f"ssam:{path}")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(weights, kind, tmp_path):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for size in (1, 7, 9, 100, len(whole) // 2, len(whole) - 1):
        assert "Download it again" in damaged(path, whole[:size]) or size < 9


def test_a_flipped_bit_is_noticed(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        place = max(archive.infolist(), key=lambda info: info.file_size).header_offset
    content[place + 2_000] ^= 1
    assert "it is damaged: Bad CRC-32" in damaged(tmp_path / "a.pth", bytes(content))


def test_another_encoders_file_is_refused(weights, tmp_path):
    save_file(weights, tmp_path / "ssam.safetensors")
    torch.save(SSAMBA(16, 2).state_dict(), tmp_path / "ssamba.pth")
    with pytest.raises(ValueError, match=r"ssam\.safetensors does not fit.*missing v\.pos_embed"):
        encoders.load(f"ssamba:{tmp_path / 'ssam.safetensors'}")
    with pytest.raises(ValueError, match=r"ssamba\.pth does not fit.*missing pos_embed"):
        encoders.load(f"ssam:{tmp_path / 'ssamba.pth'}")


def test_convert_refuses(weights, tmp_path, capsys):
    def fails(*argv):
        assert main(["convert", *map(str, argv)]) == 2
        return capsys.readouterr().err

    torch.save(weights, tmp_path / "a.pth")
    target = tmp_path / "a.safetensors"
    assert "must end in .safetensors" in fails(tmp_path / "a.pth", tmp_path / "a.bin")
    target.write_bytes(b"mine")
    assert "is there already" in fails(tmp_path / "a.pth", target)
    torch.save({**weights, "cls_token": torch.zeros(1, 1, 8)}, tmp_path / "b.pth")
    assert "wanted (1, 1, 32)" in fails(tmp_path / "b.pth", target, "--force")
    assert target.read_bytes() == b"mine"
    assert main(["convert", str(tmp_path / "a.pth"), str(target), "--force"]) == 0
    assert SSAM.from_file(target).fingerprint == SSAM.from_file(tmp_path / "a.pth").fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.safetensors", "b.pth"]


@FORMATS
def test_a_small_file_that_asks_for_much_memory_by_strides(legacy, tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"weight": torch.ones(1).expand(10**6, 10**6)}, path, _use_new_zipfile_serialization=not legacy)
    assert path.stat().st_size < 5000
    with pytest.raises(ValueError, match=r"shape \(1000000, 1000000\) in a storage of 1 values"):
        read_state_dict(path)


def test_a_small_file_that_asks_for_much_memory_by_compression(tmp_path):
    plain, path = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(10**6)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"is compressed, as torch\.save leaves none"):
        read_state_dict(path)
