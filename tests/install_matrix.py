"""Installs parrot-kernels in every way that is promised, each in a fresh virtual environment, and checks what results.

    python tests/install_matrix.py [--torch "torch==2.8.0 --index-url URL"] ...

Built from a copy of the sources: an sdist, and from the sdist wheels without a compiler, with g++ for each Python, and
with g++ and nvcc for one architecture. Installed: those wheels and two editable copies, under each torch and with the
oldest and the newest transformers. Checked in each: the doctor, every op against the reference
(tests/install_smoke.py), the time to import. torch is installed only where the index has a build for CPUs; elsewhere
the compiled kernels are run without torch. Logs and table.md go to runs/install-matrix; the exit status is 1 if any
step failed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distributions import PYTHONS, ROOT, Failed, Log, build_sdist, check_contents, find_python

OUTPUT = ROOT / "runs" / "install-matrix"
TORCHES = ("torch==2.8.0", "torch==2.13.0", "torch")  # the oldest supported, that of the Makefile, the newest
TRANSFORMERS = ("transformers==4.50.0", "transformers")  # the oldest supported and the newest
IMPORT_LIMIT = 1.0  # seconds beyond torch's own


class Row(NamedTuple):
    name: str
    status: str  # ok, FAILED or not available
    remark: str


def cpu_torch(python: Path, spec: str, log: Log) -> str | None:
    """The torch that ``spec`` would install, if it is a build for CPUs."""
    report = log.path.with_suffix(".json")
    log.run(python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", report, *spec.split())
    packages = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
    }
    return None if any(name.startswith("nvidia-") for name in packages) else packages["torch"]


def import_seconds(python: Path, log: Log) -> float:
    """The time that parrot_kernels takes to import once torch is imported, the best of three."""
    program = (
        "import time, torch; start = time.perf_counter(); import parrot_kernels; print(time.perf_counter() - start)"
    )
    return min(float(log.run(python, "-I", "-c", program)) for _ in range(3))


def check_copy(python: Path, expected: str, log: Log) -> str:
    """Doctor, ops and import time of the copy that is installed beside ``python``."""
    doctor = log.run(python, "-I", "-m", "parrot_kernels")
    if f"sinkhorn_hadamard on cpu: {expected}" not in doctor:
        raise Failed(f"the doctor does not say that {expected} serves")
    said = log.run(python, "-I", ROOT / "tests" / "install_smoke.py", expected)
    beside = "".join(f"{found}; " for found in re.findall(r"transformers \S+", said))
    seconds = import_seconds(python, log)
    if seconds > IMPORT_LIMIT:
        raise Failed(f"imports in {seconds:.2f} s beyond torch")
    return f"{beside}{expected} serves; import {seconds:.2f} s"


class Matrix:
    def __init__(self, torches: list[str]) -> None:
        self.torches = torches
        self.rows: list[Row] = []
        self.wheels: dict[str, Path] = {}  # by what was there when it was built
        self.sdist: Path | None = None
        self.pythons = {version: find_python(version) for version in PYTHONS}
        self.main = ".".join(map(str, sys.version_info[:2]))

    def row(self, name: str, step: Callable[..., str], *arguments: object, **variables: str) -> None:
        """Run one step and keep its outcome."""
        log = Log(OUTPUT, name)
        try:
            status, remark = "ok", step(log, *arguments, **variables)
        except Failed as failure:
            status, remark = "FAILED", str(failure)
        except LookupError as missing:
            status, remark = "not available", str(missing.args[0])
        self.rows.append(Row(name, status, remark))
        print(f"{status:<14} {name:<48} {remark}", flush=True)

    # Building

    def build_sdist(self, log: Log) -> str:
        self.sdist = build_sdist(log)
        return f"{self.sdist.stat().st_size / 1e6:.2f} MB"

    def build_wheel(self, log: Log, kind: str, version: str, expected: dict[str, bool], **variables: str) -> str:
        if self.sdist is None:
            raise LookupError("there is no sdist")
        python = log.environment(log.path.stem, self.interpreter(version))
        if "PATH" in variables:  # only what the environment itself brings
            variables["PATH"] = str(python.parent)
        target = OUTPUT / "dist" / f"{kind}-{version}"
        shutil.rmtree(target, ignore_errors=True)
        log.run(python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", target, self.sdist, **variables)
        (wheel,) = target.glob("*.whl")
        shutil.unpack_archive(wheel, target / "unpacked", "zip")
        info = json.loads((target / "unpacked" / "parrot_kernels" / "build_info.json").read_text())
        if {key: info[key] for key in expected} != expected:
            raise Failed(f"built {info}")
        self.wheels[f"{kind}-{version}"] = wheel
        return f"{wheel.stem.split('-', 2)[2]}, {wheel.stat().st_size / 1e6:.2f} MB"

    def interpreter(self, version: str) -> str:
        if self.pythons[version] is None:
            raise LookupError(f"no Python {version} on this machine")
        return self.pythons[version]

    def wheel(self, kind: str, version: str) -> Path:
        if f"{kind}-{version}" not in self.wheels:
            raise LookupError("its wheel was not built")
        return self.wheels[f"{kind}-{version}"]

    def check_distributions(self, log: Log) -> str:
        check_contents(log, self.sdist, list(self.wheels.values()))
        return f"twine check --strict and check-wheel-contents: {1 + len(self.wheels)} files"

    def check_libraries(self, log: Log) -> str:
        """The wheels link the C++ runtime and OpenMP: nothing of torch, nothing of CUDA's runtime."""
        python = log.environment("libraries", sys.executable)
        log.run(python, "-m", "pip", "install", "--quiet", "auditwheel")
        allowed = re.compile(r"lib(gomp|stdc\+\+|gcc_s|c|m|pthread|dl|rt)\.so|ld-linux")
        tags = set()
        for wheel in self.wheels.values():
            for library in (wheel.parent / "unpacked" / "parrot_kernels").glob("_C*.so"):
                needed = re.findall(r"\(NEEDED\).*\[(.*)\]", log.run("readelf", "-d", library))
                if strange := [name for name in needed if not allowed.match(name)]:
                    raise Failed(f"{library.name} links {strange}")
                shown = " ".join(log.run(python, "-m", "auditwheel", "show", wheel).split())
                tags |= set(re.findall(r'constrains the platform tag to "(\w+)"', shown))
        return f"links libgomp, libstdc++, libgcc, libc alone; symbols of {', '.join(sorted(tags))}"

    # Installing

    def install(self, log: Log, kind: str, version: str, torch: str, expected: str, *more: str) -> str:
        wheel = self.wheel(kind, version)
        python = log.environment(log.path.stem, self.interpreter(version))
        found = cpu_torch(python, torch, log)
        if found is None:
            raise LookupError(f"the index has no build of {torch} for CPUs and Python {version}")
        log.run(python, "-m", "pip", "install", "--quiet", *torch.split())
        log.run(python, "-m", "pip", "install", "--quiet", wheel, *more)
        return f"torch {found}; {check_copy(python, expected, log)}"

    def install_without_torch(self, log: Log, version: str) -> str:
        """All sources compile to byte code, and the kernels give the right numbers where there is no torch."""
        wheel = self.wheel("g++", version)
        python = log.environment(log.path.stem, self.interpreter(version))
        log.run(python, "-m", "pip", "install", "--quiet", "numpy")
        log.run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
        program = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
        package = Path(log.run(python, "-c", program).strip()) / "parrot_kernels"
        log.run(python, "-W", "error", "-m", "compileall", "-q", "-f", package, package.with_name("parrot"))
        (extension,) = package.glob("_C*.so")
        said = log.run(python, "-I", ROOT / "tests" / "install_smoke.py", "without-torch", extension)
        return said.strip()

    def install_editable(self, log: Log, torch: str, expected: str, **variables: str) -> str:
        copy = OUTPUT / log.path.stem
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(OUTPUT / "source", copy)
        python = log.environment(log.path.stem, sys.executable)
        if (found := cpu_torch(python, torch, log)) is None:
            raise LookupError(f"the index has no build of {torch} for CPUs")
        log.run(python, "-m", "pip", "install", "--quiet", *torch.split())
        if "PATH" in variables:
            variables["PATH"] = str(python.parent)
        log.run(python, "-m", "pip", "install", "-v", "--editable", copy, **variables)
        where = log.run(python, "-I", "-c", "import parrot_kernels; print(parrot_kernels.__file__)")
        if not where.startswith(str(copy)):
            raise Failed(f"imported {where.strip()}")
        return f"torch {found}; {check_copy(python, expected, log)}"

    def run(self) -> None:
        main, torch = self.main, self.torches[len(self.torches) // 2]
        cpu, nothing = {"cpu": True, "cuda": False}, {"cpu": False, "cuda": False}
        self.row("sdist", self.build_sdist)
        self.row("wheel from the sdist, no compiler", self.build_wheel, "pure", main, nothing, PATH="")
        for version in PYTHONS:
            name = f"wheel from the sdist, g++, Python {version}"
            self.row(name, self.build_wheel, "g++", version, cpu, PARROT_BUILD_CUDA="0")
        cuda = {"PARROT_BUILD_CUDA": "1", "PARROT_CUDA_ARCHS": "90"}
        both = {"cpu": True, "cuda": True}
        self.row("wheel from the sdist, g++ and nvcc for sm_90", self.build_wheel, "nvcc", main, both, **cuda)
        self.row("contents of the distributions", self.check_distributions)
        self.row("libraries of the wheels", self.check_libraries)
        self.row("pure wheel", self.install, "pure", main, torch, "torch")
        self.row("wheel with CUDA kernels", self.install, "nvcc", main, torch, "cpu")
        for each in self.torches:
            self.row(f"one wheel, {each}", self.install, "g++", main, each, "cpu")
        for each in TRANSFORMERS:
            self.row(f"wheel with {each}", self.install, "g++", main, torch, "cpu", each)
        for version in PYTHONS:
            if version != main:
                self.row(f"wheel, {torch}, Python {version}", self.install, "g++", version, torch, "cpu")
            self.row(f"kernels where there is no torch, Python {version}", self.install_without_torch, version)
        self.row("editable, g++", self.install_editable, torch, "cpu", PARROT_BUILD_CUDA="0")
        self.row("editable, no compiler", self.install_editable, torch, "torch", PATH="")

    def table(self) -> str:
        lines = ["| step | outcome | |", "| --- | --- | --- |"]
        return "\n".join([*lines, *(f"| {row.name} | {row.status} | {row.remark} |" for row in self.rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", help="what pip installs as torch; may be given several times")
    arguments = parser.parse_args()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    matrix = Matrix(arguments.torch or list(TORCHES))
    matrix.run()
    (OUTPUT / "table.md").write_text(matrix.table())
    failed = sum(row.status == "FAILED" for row in matrix.rows)
    print(f"{len(matrix.rows)} steps, {failed} failed; {OUTPUT / 'table.md'}, logs beside it")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
