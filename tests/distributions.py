"""What the scripts that build and install the package share: logged commands, Pythons, environments, the sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PACKAGES = ("parrot_kernels", "parrot")
IGNORED = ("__pycache__", "*.so", "build_info.json", "*.egg-info", "build", "dist", "site", "runs", ".*")


class Failed(Exception):
    pass


class Log:
    """A step's commands and all they print, and the folder that its files are in."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / "logs" / (re.sub(r"[^\w.=+-]+", "-", name) + ".log")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")

    def run(self, *command: object, **environment: str) -> str:
        """Standard output; raises Failed with the last line of errors."""
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "CXX")
        env = {**{k: v for k, v in os.environ.items() if k not in dropped}, **environment}
        arguments = [str(part) for part in command]
        done = subprocess.run(arguments, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        with self.path.open("a") as file:
            file.write(f"$ {' '.join(arguments)}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            raise Failed(f"{' '.join(arguments[:4])}: status {done.returncode}: {lines[-1]}")
        return done.stdout

    def environment(self, name: str, python: str) -> Path:
        """A fresh virtual environment; returns its interpreter."""
        path = self.folder / "environments" / name
        shutil.rmtree(path, ignore_errors=True)
        self.run(python, "-m", "venv", path)
        return path / "bin" / "python"


def find_python(version: str) -> str | None:
    """An interpreter of this version: the running one, on PATH, or pyenv's."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in (sys.executable, f"python{version}", *map(str, pyenv)):
        try:
            done = subprocess.run([candidate, "-c", program], capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def build_sdist(log: Log) -> Path:
    """The sdist of a copy of the sources, which stays in ``source``; raises Failed if it lacks any."""
    source = log.folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*IGNORED))
    python = log.environment("sdist", sys.executable)
    log.run(python, "-m", "pip", "install", "--quiet", "build")
    log.run(python, "-m", "build", "--sdist", "--outdir", log.folder / "dist", source)
    (archive,) = (log.folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    kept = [path for folder in ("csrc", *PACKAGES) for path in (source / folder).rglob("*") if path.is_file()]
    if lost := sorted({str(path.relative_to(source)) for path in kept} - names):
        raise Failed(f"the sdist lacks {', '.join(lost[:3])}: {len(lost)} files")
    return archive


def check_contents(log: Log, sdist: Path, wheels: list[Path]) -> None:
    """twine check --strict and check-wheel-contents."""
    python = log.environment("checks", sys.executable)
    log.run(python, "-m", "pip", "install", "--quiet", "twine", "check-wheel-contents")
    log.run(python, "-m", "twine", "check", "--strict", sdist, *wheels)
    log.run(python.with_name("check-wheel-contents"), "--toplevel", ",".join(PACKAGES), *wheels)
