"""The tables of docs/ablation.md are those of the saved rows, and the program that measures them runs."""

from __future__ import annotations

import pytest

from benchmarks import ablation, machine, rows

MEASURED = rows.load(ablation.RESULTS)
PAGE = (machine.ROOT / "docs" / "ablation.md").read_text()


@pytest.mark.parametrize("table", [ablation.accuracy_table, ablation.batch_table])
def test_the_page_has_the_tables_of_the_rows(table):
    lines = table(MEASURED)
    assert len(lines) > 2
    assert "\n".join(lines) in PAGE


def test_what_has_no_rows_is_said():
    measured = [variant for variant, _ in ablation.by_variant(MEASURED)]
    lacking = ", ".join(f"`{variant.name}`" for variant in ablation.VARIANTS if variant not in measured)
    assert ("No rows yet: " in PAGE) == bool(lacking)
    assert lacking in PAGE.replace("\n", " ")


def test_only_the_paper_s_transport_depends_on_the_batch():
    for variant, found in ablation.by_variant(MEASURED):
        apart = variant.system in ("concat", "parrot-reference", "parrot-frames")
        assert (sum(row["sensitivity"] for row in found) == 0) == apart, variant.name
        same = all(len(set(row["accuracy"].values())) == 1 for row in found)
        assert same == apart, variant.name


@pytest.mark.slow
def test_the_program_runs_and_goes_on(tmp_path, capsys, monkeypatch):
    pytest.importorskip("parselmouth")
    from parrot.corpora import demo

    demo.synthesise(tmp_path / "corpus", voices=5, sentences=2, progress=False)
    monkeypatch.setattr(ablation, "FOLDS", 2)
    command = ["--results", str(tmp_path / "rows.jsonl"), "run", str(tmp_path / "corpus"), "--workers", "1"]
    command += ["--cache", str(tmp_path / "cache"), "--epochs", "1", "--seeds", "0", "--systems"]
    assert ablation.main([*command, "parrot"]) == 0
    assert ablation.main([*command, "parrot", "parrot-frames"]) == 0
    measured = rows.load(tmp_path / "rows.jsonl")
    assert [(row["system"], row["fold"]) for row in measured] == [
        (system, fold) for system in ("parrot", "parrot-frames") for fold in range(2)
    ]
    capsys.readouterr()
    assert ablation.main(["--results", str(tmp_path / "rows.jsonl"), "tables"]) == 0
    out = capsys.readouterr().out
    assert f"| `parrot` | none: the paper | {50 * sum(r['accuracy']['32'] for r in measured[:2]):.1f} ± " in out
