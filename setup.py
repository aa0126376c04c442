"""Builds the extension parrot_kernels._C from csrc/ with CMake and Ninja; metadata is in pyproject.toml.

Environment:
    PARROT_BUILD_CUDA   auto (default): with CUDA kernels if nvcc is found; 0: without; 1: with, or fail.
    PARROT_CUDA_ARCHS   compute capabilities, default "80;86;89;90;100;120" (the last one also as PTX).
    MAX_JOBS            parallel compile jobs, default one per core.

No compiler at all is fine: the package installs as pure Python, says so in one line, and Triton or PyTorch serve.
What was built, and why something was not, goes into build_info.json for the doctor, `python -m parrot_kernels`.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;86;89;90;100;120"
CONTRACT = runpy.run_path(str(ROOT / "parrot_kernels" / "build_stamp.py"))["stamp"](ROOT / "csrc")


def find_compiler() -> str | None:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if path := shutil.which(name):
            return path
    return None


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    for candidate in filter(None, candidates):
        if path := shutil.which(candidate):
            return path
    return None


def say(message: str) -> None:
    print(f"parrot-kernels: {message}", file=sys.stderr, flush=True)


class Build:
    """What this build makes, decided once from the environment."""

    def __init__(self) -> None:
        self.compiler = find_compiler()
        self.info: dict[str, object] = {"cpu": False, "cuda": False, "contract": CONTRACT}
        wanted = os.environ.get("PARROT_BUILD_CUDA", "auto").lower()
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"PARROT_BUILD_CUDA must be auto, 0 or 1; got {wanted!r}.")
        self.cuda_required = wanted == "1"
        self.nvcc = None if wanted == "0" else find_nvcc()
        if self.cuda_required and not (self.nvcc and self.compiler):
            missing = "nvcc" if self.compiler else "a C++ compiler"
            raise SystemExit(
                f"PARROT_BUILD_CUDA=1, but {missing} was not found. Install the CUDA toolkit and put nvcc on PATH (or "
                "set CUDA_HOME), or build without CUDA kernels: PARROT_BUILD_CUDA=0."
            )
        self.archs = os.environ.get("PARROT_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").replace(" ", ";")
        if self.compiler is None:
            self.info["reason"] = "no C++ compiler (g++ or clang++) was found when the package was installed"
            say(f"pure Python install: {self.info['reason']}.")
        if self.nvcc is None:
            self.info["cuda_reason"] = (
                "it was built with PARROT_BUILD_CUDA=0" if wanted == "0" else "nvcc was not found when it was built"
            )

    def write_info(self, command: BuildPython | BuildKernels) -> None:
        """Put the record beside the modules: in the sources of an editable install, else in what becomes the wheel."""
        beside_sources = command.editable_mode or getattr(command, "inplace", False)
        root = ROOT if beside_sources else Path(command.build_lib)
        package = root / "parrot_kernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "build_info.json").write_text(json.dumps(self.info, indent=1) + "\n")


BUILD = Build()


class BuildPython(build_py):
    """Puts build_info.json beside the modules also where there is nothing to compile."""

    def run(self) -> None:
        super().run()
        if BUILD.compiler is None:
            BUILD.write_info(self)


class BuildKernels(build_ext):
    """One CMake project instead of a list of sources."""

    editable_mode = False  # setuptools sets it on the instance

    def run(self) -> None:
        super().run()
        BUILD.write_info(self)  # not before: setuptools forgets `inplace` while it builds

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        cuda = BUILD.nvcc is not None
        built = self.build(target, cuda)
        if not built and BUILD.cuda_required:
            raise SystemExit("PARROT_BUILD_CUDA=1, but the kernels did not compile; the messages are above.")
        if not built and cuda:
            say("the CUDA kernels did not compile (messages above); building the CPU kernels alone.")
            BUILD.info["cuda_reason"] = "the nvcc that was found did not compile it"
            cuda = False
            built = self.build(target, cuda)
        BUILD.info |= {"cpu": built, "cuda": built and cuda, "compiler": self.version(BUILD.compiler)}
        if built and cuda:
            BUILD.info |= {"nvcc": self.version(BUILD.nvcc), "cuda_archs": BUILD.archs}
        if not built:
            BUILD.info["reason"] = f"{BUILD.compiler} did not compile it"
        if not built:  # the extension is optional: setuptools goes on without it
            say("pure Python install: the kernels did not compile (messages above).")
            raise CompileError("the kernels did not compile")

    def build(self, target: Path, cuda: bool) -> bool:
        import pybind11

        tree = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        tree.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT / "csrc"), "-B", str(tree), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CXX_COMPILER={BUILD.compiler}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPARROT_CUDA={'ON' if cuda else 'OFF'}",
        ]  # fmt: skip
        if cuda:
            configure += [f"-DCMAKE_CUDA_COMPILER={BUILD.nvcc}", f"-DPARROT_CUDA_ARCHS={BUILD.archs}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        make = ["cmake", "--build", str(tree), "--parallel", jobs]
        if any(subprocess.run(command, check=False).returncode for command in (configure, make)):
            return False
        shutil.copy2(next(tree.glob("_C*.so")), target)
        return True

    @staticmethod
    def version(program: str) -> str:
        lines = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()
        chosen = [line for line in lines.splitlines() if "release" in line] or lines.splitlines()[:1]
        return chosen[0] if chosen else program


setup(
    ext_modules=[Extension("parrot_kernels._C", sources=[], optional=True)] if BUILD.compiler else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
)
