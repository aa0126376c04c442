"""Builds the extension with its CUDA kernels emulated on the host (cuda_emulation.h)."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import extensions
import pytest

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=CUDA_HOME / "bin")


def _toolkits() -> Iterator[Path]:
    if NVCC is not None:
        yield Path(NVCC).resolve().parents[1] / "include"
    yield CUDA_HOME / "include"


@functools.lru_cache(maxsize=1)
def module() -> ModuleType:
    """The extension, built by the first process that asks for it; skips the test where it can't be."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++")
    toolkit = next((path for path in _toolkits() if (path / "cuda_bf16.h").exists()), None)
    if compiler is None or toolkit is None:
        pytest.skip("needs g++ and the headers of the CUDA toolkit")
    include = [SOURCES, SOURCES / "include", SOURCES / "cuda", SOURCES / "cpu", toolkit, pybind11.get_include()]
    include.append(Path(sys.base_prefix) / "include" / f"python3.{sys.version_info.minor}")
    command = [compiler, "-std=c++17", "-Og", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    command += [f"-I{path}" for path in include]
    folder = SOURCES.parent / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{_fingerprint(command)}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in folder.glob("*.so"):
                old.unlink()
            _build(command, library)
    return extensions.load(library)


def _fingerprint(command: list[str]) -> str:
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted([*SOURCES.rglob("*"), *TESTS.glob("cuda_emulation.*")]):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compile_one(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            emulated = ["-include", TESTS / "cuda_emulation.h", "-x", "c++", "-c", source, "-o", target]
            subprocess.run([*command, *emulated], check=True)
            return target

        sources = [TESTS / "cuda_emulation.cpp", *sorted((SOURCES / "cuda").glob("*.cu"))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        subprocess.run([*command, "-shared", *objects, "-o", f"{folder}/_C.so"], check=True)
        os.replace(f"{folder}/_C.so", library)


def call(function: str, **arguments: object) -> None:
    """`native.call_cuda` without a device."""
    getattr(module(), function)(**arguments, stream=0)
