"""Builds the extension with its CUDA kernels emulated on the host (cuda_emulation.h)."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from parrot_kernels import native

SOURCES = Path(__file__).parents[1] / "csrc"
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_HOME / "bin")


def _toolkits() -> Iterator[Path]:
    if NVCC is not None:
        yield Path(NVCC).resolve().parents[1] / "include"
    yield CUDA_HOME / "include"


@functools.lru_cache(maxsize=1)
def module() -> ModuleType:
    """The extension, built once a process; skips the test where it can't be."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    toolkit = next((path for path in _toolkits() if (path / "cuda_bf16.h").exists()), None)
    if compiler is None or toolkit is None:
        pytest.skip("needs g++ and the headers of the CUDA toolkit")
    tests = Path(__file__).parent
    include = [SOURCES, SOURCES / "include", SOURCES / "cuda", SOURCES / "cpu", toolkit, pybind11.get_include()]
    include.append(Path(sys.base_prefix) / "include" / f"python3.{sys.version_info.minor}")
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-U_FORTIFY_SOURCE",
        "-Wno-unknown-pragmas",
        *(f"-I{path}" for path in include),
    ]
    with tempfile.TemporaryDirectory() as folder:

        def build(source: Path) -> Path:
            target = Path(folder) / f"{source.stem}.o"
            emulated = ["-include", tests / "cuda_emulation.h", "-x", "c++", "-c", source, "-o", target]
            subprocess.run([*command, *emulated], check=True)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, [tests / "cuda_emulation.cpp", *sorted((SOURCES / "cuda").glob("*.cu"))]))
        library = Path(folder) / "_C.so"
        subprocess.run([*command, "-shared", *objects, "-o", library], check=True)
        loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
        result = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
        loader.exec_module(result)
    for dtype, code in native.DTYPE_CODES.items():
        result.register_dtype(dtype, code)
    return result


def call(function: str, **arguments: object) -> None:
    """`native.call_cuda` without a device."""
    getattr(module(), function)(**arguments, stream=0)
