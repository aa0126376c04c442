"""Other copies of the compiled extension, beside the package's own, in the process of the tests."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

from parrot_kernels import native


def load(library: Path) -> ModuleType:
    name = f"{library.stem}._C"  # pybind11 returns the module that it has by a name, from whichever file
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    for dtype, code in native.DTYPE_CODES.items():
        module.register_dtype(dtype, code)
    return module


@functools.cache
def with_instruction_set(isa: str) -> ModuleType:
    """A copy whose kernels run on ``isa``; skips the test where the extension in use runs on nothing above."""
    used = native.extension()
    if used.isa <= isa:
        pytest.skip(f"there is nothing above {isa}")
    with mock.patch.dict(os.environ, PARROT_CPU_ISA=isa):
        module = load(Path(shutil.copy(used.__file__, f"{_folder().name}/{isa}.so")))
    if module.isa != isa:
        raise RuntimeError(f"PARROT_CPU_ISA={isa}, but the extension chose {module.isa}")
    return module


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Kept until the process ends: the inode of a deleted library would make the next one pass for it."""
    return tempfile.TemporaryDirectory()
