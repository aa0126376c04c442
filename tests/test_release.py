"""What names the version names the same one, and the distributions say what they hold."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import parrot
import parrot_kernels
from parrot.cli import main

ROOT = Path(__file__).resolve().parents[1]


def found(pattern: str, path: str) -> str:
    match = re.search(pattern, (ROOT / path).read_text(), re.MULTILINE)
    assert match, f"{path} has nothing like {pattern}"
    return match[1]


def test_versions_agree():
    version = found(r'^version = "(.*)"$', "pyproject.toml")
    assert found(r"^version: (.*)$", "CITATION.cff") == version.removesuffix(".dev0")
    assert found(r"^## (\S+) \(", "CHANGELOG.md") == version.removesuffix(".dev0")


def test_the_packages_tell_the_installed_version(capsys):
    installed = importlib.metadata.version("parrot-kernels")
    assert parrot_kernels.__version__ == parrot.__version__ == installed
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"parrot-kernels {installed}\n"


def test_dates_agree():
    date = found(r"^## \S+ \((.*)\)$", "CHANGELOG.md")
    assert date == "unreleased" or found(r'^date-released: "(.*)"$', "CITATION.cff") == date


def test_typed_packages_ship_their_marker():
    for package in ("parrot_kernels", "parrot"):
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in found(rf"^{package} = (\[.*\])$", "pyproject.toml")


def test_oldest_supported_versions_are_those_that_are_tested():
    for name in ("torch", "transformers"):
        oldest = found(rf'"{name}>=([\d.]+)"', "pyproject.toml")
        assert re.search(rf'"{name}=={oldest}(\.0)?"', (ROOT / "tests" / "install_matrix.py").read_text())


def test_the_modules_of_parrot_are_there_without_an_import():
    """In a new process: here other tests have imported them."""
    names = ("corpora", "distributed", "encoders", "evaluation", "features", "model", "prediction", "store", "training")
    code = "import parrot; " + "; ".join(f"assert parrot.{name}.__doc__" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {*names, *parrot.__all__} <= set(dir(parrot))
    with pytest.raises(AttributeError, match="no attribute 'copora'"):
        parrot.copora  # noqa: B018
