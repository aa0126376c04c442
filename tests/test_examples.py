"""The scripts of examples/ run, and so does the notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "parrot_kernels.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_script_runs(name, tmp_path):
    if name == "transformers_mamba.py":
        pytest.importorskip("transformers")
    source = (EXAMPLES / name).read_text()
    assert source.count("\n") < 40
    command = [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / name)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "False" not in done.stdout  # the scripts print what they compare


def code_cells() -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_notebook_cells_run(monkeypatch):
    """Without a kernel: the cell that installs the package is for Colab alone."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    install, *cells = code_cells()
    assert "%pip install" in install
    namespace: dict = {}
    for cell in cells:
        exec(compile(cell, NOTEBOOK.name, "exec"), namespace)


def test_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_notebook_runs_in_jupyter():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
