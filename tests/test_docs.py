"""The documentation's examples run, and its site builds without a broken link."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/troubleshooting.md",
    *(f"docs/guides/{p.name}" for p in (ROOT / "docs" / "guides").glob("*.md")),
]
ON_THE_DEMO_CORPUS = ["docs/encoders.md", "docs/corpora.md", "docs/scale.md"]
NEEDS = {
    "README.md": "transformers",
    "docs/guides/transformers.md": "transformers",
    "docs/troubleshooting.md": "ot",
    **dict.fromkeys(ON_THE_DEMO_CORPUS, "transformers"),
}


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run_examples(page: str) -> None:
    """All blocks of a page, one after the other, in one namespace."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    blocks = examples(page)
    assert blocks
    torch.manual_seed(0)
    namespace: dict = {}
    for block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_examples_run(page):
    run_examples(page)


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory):
    """The folder in which `parrot demo` was begun."""
    pytest.importorskip("parselmouth")
    from parrot.corpora import demo

    folder = tmp_path_factory.mktemp("docs")
    demo.synthesise(folder / "runs/demo/corpus", voices=5, sentences=1, processes=1, progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", ON_THE_DEMO_CORPUS)
def test_examples_run_on_the_demo_corpus(page, demo_corpus, monkeypatch):
    monkeypatch.chdir(demo_corpus)
    run_examples(page)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("latex2mathml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("index.html"))
    assert pages
    for page in pages:
        text = page.read_text()
        assert "arithmatex" not in text, f"a formula of {page} was not converted"
        assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?://', text), f"{page} fetches from elsewhere"


@pytest.mark.parametrize("name", ["parrot_kernels", "parrot"])
def test_every_public_name_is_documented(name):
    package = importlib.import_module(name)
    page = (ROOT / "docs" / "api" / f"{name.removeprefix('parrot_')}.md").read_text()
    for public in package.__all__:
        assert re.search(rf"\b{public}\b", page), f"{name}.{public} is on no page"
        assert getattr(package, public).__doc__, f"{name}.{public} has no docstring"
