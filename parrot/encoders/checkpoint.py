"""Tensors out of checkpoint files, without running any of the code that a pickle can hold.

``torch.save`` files are pickles, and a pickle is a program: it may call any function there is. The reader here follows
its structure (dictionaries, lists, tensors) but resolves no name in it: the few that rebuild tensors are played by
functions of this module, every other by :class:`_Inert`, which takes any call and does nothing. So the objects that a
training script saves beside the weights (an argparse Namespace, a configuration of a library that is not installed)
are no obstacle, and a hostile file does nothing. Only the bytes of the tensors asked for are read.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file of torch < 1.6
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
WRAPPERS = ("model", "state_dict")  # where training scripts keep the weights among other things
DOWNLOAD_AGAIN = "Download it again and compare the sizes."


def read_state_dict(path: str | Path, family: str = "checkpoint") -> dict[str, Tensor]:
    """The weights in a ``.safetensors`` or ``torch.save`` file, on the CPU; nothing in the file is executed.

    The kind of file is told from its content. A dictionary that holds the weights as "model" or "state_dict" is
    unwrapped, everything beside them is left unread, and the prefix ``module.`` of DataParallel is taken off.

    Args:
        path: the file.
        family: what the message of an error calls the checkpoint.

    Raises:
        ValueError: there is no such file; it is empty, truncated, damaged, a Git LFS pointer, a web page or anything
            else that is no checkpoint; or it holds no dictionary of tensors.
    """
    path = Path(path)
    check_file(path, family)
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            with open(path, "rb") as file:
                weights = _read_torch(file)
    except _Refused as error:
        _fail(path, family, str(error))
    except Exception as error:  # whatever a damaged pickle, archive or header leads its parser to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _fail(path, family, f"it is damaged: {reason}. {DOWNLOAD_AGAIN}")
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def check_file(path: Path, family: str) -> None:
    """Raise a ValueError that says what a file is, if it is plainly no complete checkpoint."""
    wanted = "Give the path of a .safetensors or .pth file."
    if path.is_dir():
        _fail(path, family, f"it is a folder. {wanted}")
    if not path.is_file():
        raise ValueError(f"{family}: no checkpoint file at {path}. {wanted}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        _fail(path, family, f"it is empty. {DOWNLOAD_AGAIN}")
    if head.startswith(b"version https://git-lfs"):
        _fail(path, family, "it is a Git LFS pointer, not the file itself. Run `git lfs pull` where it lies.")
    if head.lstrip().startswith(b"<"):
        _fail(path, family, f"it is a web page, as servers send instead of a large file. {DOWNLOAD_AGAIN}")
    if head.startswith(b"PK"):
        if not _has_index(path):
            _fail(path, family, f"it is truncated ({size} bytes, its index is missing). {DOWNLOAD_AGAIN}")
    elif _is_safetensors(path):
        _check_safetensors(path, family, size)
    elif not head.startswith(b"\x80"):
        _fail(path, family, f"it is neither a safetensors nor a torch.save file ({size} bytes). {wanted}")


def _has_index(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an index that speaks of several disks
        return False


def mismatches(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``weights`` from being loaded into a model whose state dict is ``expected``."""
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    problems += [
        f"{key} of shape {tuple(weights[key].shape)}, wanted {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems += [  # copying them would round, silently
        f"{key} of {weights[key].dtype}, wanted real floating point"
        for key, value in expected.items()
        if key in weights and value.is_floating_point() and not weights[key].is_floating_point()
    ]
    return problems


def first(problems: list[str], count: int = 8) -> str:
    rest = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + rest


def _fail(path: Path, family: str, why: str) -> NoReturn:
    raise ValueError(f"{family}: {path} can't be read: {why}")


# --- safetensors


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or head[8:] == b"{"


def _check_safetensors(path: Path, family: str, size: int) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            _fail(path, family, f"it is truncated or no safetensors file ({size} bytes). {DOWNLOAD_AGAIN}")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            wanted = 8 + length + max(ends, default=0)
            short = size < wanted
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            _fail(path, family, f"its safetensors header is damaged ({error}). {DOWNLOAD_AGAIN}")
    if short:
        _fail(path, family, f"it is truncated: wanted {wanted} bytes, got {size}. {DOWNLOAD_AGAIN}")


# --- torch.save


class _Refused(Exception):
    """A file that is whole but not what is wanted."""


class _Inert:
    """Plays every class and function that a pickle names. It takes what the unpickler does and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(_Inert)

    def _nothing(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = _nothing


class _Function(_Inert):
    """One of the names that the reader does resolve."""

    __slots__ = ("call",)
    call: Callable[..., Any]

    def __new__(cls, call: Callable[..., Any]) -> _Function:
        self = object.__new__(cls)
        self.call = call
        return self

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class _StorageType(_Inert):
    __slots__ = ("dtype",)
    dtype: torch.dtype

    def __new__(cls, dtype: torch.dtype) -> _StorageType:
        self = object.__new__(cls)
        self.dtype = dtype
        return self


class _Dict(dict):
    """Plays OrderedDict; the attributes that a state dict carries are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _LazyTensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, storages: Callable[[_Storage], bytes]) -> Tensor:
        """A contiguous copy; as_strided raises where sizes, strides and offset reach beyond the storage."""
        data = storages(self.storage)
        wanted = self.storage.numel * self.storage.dtype.itemsize
        if math.prod(self.size) > self.storage.numel:  # strides of 0 could ask for any amount of memory
            raise _Refused(f"it is damaged: a tensor of shape {self.size} in a storage of {self.storage.numel} values.")
        if len(data) != wanted:
            raise _Refused(f"it is truncated: wanted {wanted} bytes of a tensor, got {len(data)}. {DOWNLOAD_AGAIN}")
        if not wanted:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    return _LazyTensor(storage, offset, tuple(size), tuple(stride)) if isinstance(storage, _Storage) else _Inert()


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


class _Unpickler(pickle.Unpickler):
    # Fresh objects for each name: what a file does to one must not reach the next file.
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _Function(_rebuild_tensor)
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return _Function(_rebuild_parameter)
        if module == "torch" and name in DTYPES:
            return _StorageType(DTYPES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType):
            return _Storage(pid[1].dtype, str(pid[2]), int(pid[4]))
        return _Inert()


def _read_torch(file: BinaryIO) -> dict[str, Tensor]:
    return _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)


def _read_zip(file: BinaryIO) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise _Refused("it is an archive, but not one that torch.save wrote (no data.pkl).")
        (root,) = roots
        order = archive.read(root + "byteorder").decode() if root + "byteorder" in names else "little"
        if order != sys.byteorder:
            raise _Refused(f"its numbers are {order}-endian, this machine's are {sys.byteorder}-endian.")
        with archive.open(root + "data.pkl") as stream:
            content = _Unpickler(stream).load()
        # A name in the index whose size is another than the tensor's is not read at all.
        return _tensors_of(content, lambda storage: archive.read(_entry(archive, f"{root}data/{storage.key}", storage)))


def _entry(archive: zipfile.ZipFile, name: str, storage: _Storage) -> str:
    info, wanted = archive.getinfo(name), storage.numel * storage.dtype.itemsize
    if info.compress_type != zipfile.ZIP_STORED:  # a small file of this kind could ask for any amount of memory
        raise _Refused(f"{name} is compressed, as torch.save leaves none. Save the weights again.")
    if (size := info.file_size) != wanted:
        raise _Refused(f"it is damaged: wanted {wanted} bytes of {name}, got {size}. {DOWNLOAD_AGAIN}")
    return name


def _read_legacy(file: BinaryIO) -> dict[str, Tensor]:
    file.seek(0)
    if _Unpickler(file).load() != LEGACY_MAGIC:
        raise _Refused("it is a pickle, but not one that torch.save wrote.")
    _Unpickler(file).load()  # version of the protocol
    system = _Unpickler(file).load()
    if isinstance(system, dict) and system.get("little_endian", True) != (sys.byteorder == "little"):
        raise _Refused("its numbers have another byte order than this machine's.")
    storages: dict[str, _Storage] = {}

    class Unpickler(_Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            storage = super().persistent_load(pid)
            if isinstance(storage, _Storage):
                storages[storage.key] = storage
            return storage

    content = Unpickler(file).load()
    # The storages follow, each as its number of elements (8 bytes) and its data.
    places: dict[str, int] = {}
    for key in _Unpickler(file).load():
        numel = int.from_bytes(file.read(8), "little")
        if key not in storages or storages[key].numel != numel:
            raise _Refused(
                f"it is damaged or truncated: a tensor of {numel} values is not the one wanted. {DOWNLOAD_AGAIN}"
            )
        places[key] = file.tell()
        file.seek(numel * storages[key].dtype.itemsize, 1)
    if file.tell() > (size := file.seek(0, 2)):
        raise _Refused(f"it is truncated ({size} bytes). {DOWNLOAD_AGAIN}")

    def read(storage: _Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return _tensors_of(content, read)


def _tensors_of(content: Any, storages: Callable[[_Storage], bytes]) -> dict[str, Tensor]:
    """The weights in what was unpickled: itself a dictionary of tensors, or one that holds it."""
    if not isinstance(content, Mapping):
        got = "objects other than tensors" if isinstance(content, _Inert) else f"a {type(content).__name__}"
        raise _Refused(f"it must hold a dictionary of tensors, or one under 'model'; got {got}.")
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    others = [str(key) for key, value in content.items() if not isinstance(value, _LazyTensor)]
    if others or not content:
        got = f"entries that are none: {', '.join(others[:8])}" if others else "an empty one"
        raise _Refused(f"it must hold a dictionary of tensors, or one under 'model'; got {got}.")
    return {str(key): value.read(storages) for key, value in content.items()}
