"""The package builds with and without a compiler, and the copy that results tells the truth about itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # cmake and ninja of the `test` extra; no compiler


@pytest.fixture
def source(tmp_path):
    """A copy of what a clone holds, so that nothing is built in the tree under test."""
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "parrot_kernels", "parrot"]
    target = tmp_path / "source"
    target.mkdir()
    for name in names:
        path = ROOT / name
        if path.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.so", "build_info.json")
            shutil.copytree(path, target / name, ignore=skip)
        else:
            shutil.copy2(path, target / name)
    build = target / "csrc" / "CMakeLists.txt"
    build.write_text(build.read_text().replace("-O3", "-O0"))  # nothing is computed with it
    return target


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    env = {**kept, **environment}
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)


def installed(source: Path, tmp_path: Path) -> tuple[Path, dict, str]:
    """Unpack the one wheel; returns its path, its build_info and what its doctor says."""
    (wheel,) = (source / "wheels").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    info = json.loads((site / "parrot_kernels" / "build_info.json").read_text())
    # An editable install, as in development, would lend its extension to the copy under test.
    program = (
        "import runpy, sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "runpy.run_module('parrot_kernels', run_name='__main__')"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    doctor = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    return wheel, info, doctor.stdout


def test_without_a_compiler_the_wheel_is_pure_python(source, tmp_path):
    done = build_wheel(source, PATH=str(BIN), PARROT_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "parrot-kernels: pure Python install: no C++ compiler" in done.stdout + done.stderr
    wheel, info, doctor = installed(source, tmp_path)
    assert wheel.name.endswith("py3-none-any.whl")
    assert info["cpu"] is False
    assert "no C++ compiler (g++ or clang++) was found" in doctor
    assert "sinkhorn_hadamard on cpu: torch" in doctor


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_with_a_compiler_the_wheel_has_the_cpu_kernels_and_nothing_of_torch(source, tmp_path):
    done = build_wheel(source, PARROT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr[-4000:]
    _, info, doctor = installed(source, tmp_path)
    assert info["cpu"] is True
    assert info["cuda"] is False
    assert re.search(r"CUDA kernels +none: it was built with PARROT_BUILD_CUDA=0", doctor)
    assert "sinkhorn_hadamard on cpu: cpu" in doctor
    (library,) = (tmp_path / "site" / "parrot_kernels").glob("_C*.so")
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libgomp.so.1" in linked
    assert "torch" not in linked
    assert "libc10" not in linked


def test_cuda_on_demand_is_loud_about_a_missing_nvcc(source):
    done = build_wheel(source, PATH=str(BIN), PARROT_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "PARROT_BUILD_CUDA=1, but" in done.stdout + done.stderr


def test_a_wrong_setting_is_refused(source):
    done = build_wheel(source, PARROT_BUILD_CUDA="maybe")
    assert done.returncode != 0
    assert "must be auto, 0 or 1; got 'maybe'" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_code_that_does_not_compile_leaves_a_working_install(source, tmp_path):
    (source / "csrc" / "bindings.cpp").write_text("#error broken on purpose\n")
    done = build_wheel(source, PARROT_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "pure Python install: the kernels did not compile" in done.stdout + done.stderr
    _, info, doctor = installed(source, tmp_path)
    assert info["cpu"] is False
    assert "did not compile it" in doctor
