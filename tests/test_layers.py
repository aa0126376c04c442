"""Imports run one way: parrot -> parrot_kernels.modules -> ops -> {reference, triton_kernels, native}."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file under the key may import, of our own packages, only what the value lists (and its own package).
ALLOWED = {
    "parrot_kernels/reference": (),
    "parrot_kernels/triton_kernels": ("parrot_kernels.checks",),
    "parrot_kernels/ops": (
        "parrot_kernels.reference",
        "parrot_kernels.triton_kernels",
        "parrot_kernels.native",
        "parrot_kernels.backends",
        "parrot_kernels.checks",
    ),
    "parrot_kernels/modules": ("parrot_kernels.ops", "parrot_kernels.checks"),
    "parrot_kernels/compat": (
        "parrot_kernels.ops",
        "parrot_kernels.modules",
        "parrot_kernels.reference",  # the peers publish a `*_ref` of their own
        "parrot_kernels.checks",
    ),
    "parrot": ("parrot_kernels", "parrot_kernels.modules"),
}


def own_imports(path: Path) -> set[str]:
    """Absolute names of everything of ours that a file imports, wherever in the file."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("parrot", "parrot_kernels", "benchmarks", "tests")}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_run_one_way(layer):
    own = layer.replace("/", ".")
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        for name in filter(is_module, own_imports(path)):
            inside = name == own or name.startswith(own + ".")
            is_parent = own.startswith(name + ".")  # `from .. import checks` names the parent package as well
            allowed = any(name == a or (name.startswith(a + ".") and a != "parrot_kernels") for a in ALLOWED[layer])
            assert inside or is_parent or allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_extension_knows_nothing_of_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            text = path.read_text()
            assert "#include <torch" not in text, path
            assert "#include <ATen" not in text, path
            if path.name != "bindings.cpp":
                assert "Python.h" not in text, path
                assert "pybind11" not in text, path
