"""Ahead-of-time compilation of the kernels: nothing spills, and what is wrong is found and reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from parrot_kernels.triton_kernels import aot

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4poorPf' for 'sm_80'
ptxas info    : Function properties for _Z4poorPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, 360 bytes cmem[0]
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parrot_kernels.triton_kernels.aot", *arguments],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )


@pytest.mark.slow
def test_the_quick_set_compiles_without_spills(tmp_path):
    done = command("--triton", "--quick", "--arch", "80", "90", "--jobs", "2", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    table = " ".join(done.stdout.split())
    assert {row["arch"] for row in rows} == {"80", "90"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert f"{row['kernel']} {row['tile']}" in table


@pytest.mark.slow
def test_one_kernel_compiles_for_every_architecture():
    done = command("--triton", "--quick", "--kernel", "sinkhorn.* 32x32 .*all options", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert arch in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(aot.cuda_tool("nvcc") is None, reason="needs nvcc")
def test_cuda_sources_compile_without_spills():
    """One of them; test_cuda_compile.py compiles all."""
    done = command("--cuda", "--kernel", "selective_scan_forward_f64", "--arch", "90", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "selective_scan" in done.stdout


def test_every_tile_of_the_launcher_is_declared():
    from parrot_kernels.triton_kernels import sinkhorn_hadamard

    declared = {tuple(spec.constants.values())[-4:] for spec in aot.declared("sinkhorn_hadamard")}
    for N in (1, 16, 17, 32, 100, 128, 200, 256):
        for M in (1, 16, 17, 32, 100, 128, 200, 256):
            if sinkhorn_hadamard.why_not(N, M) is None:
                assert sinkhorn_hadamard.tile_of(N, M) in declared


def test_what_ptxas_says_is_read():
    good, poor = aot.parse_ptxas(PTXAS, "file.cu", "80")
    assert (good.registers, good.spill_bytes, good.shared_bytes, good.complaint) == (40, 0, 1024, "")
    assert (poor.registers, poor.spill_bytes, poor.shared_bytes) == (255, 12, 0)
    assert "spills 12 bytes" in poor.complaint
    assert "spills 12 bytes" in aot.table([good, poor]).splitlines()[-1]


@pytest.mark.parametrize(("arch", "limit"), [("80", 163), ("90", 227), ("gfx942", 64)])
def test_too_much_shared_memory_is_a_complaint(arch, limit):
    row = aot.Row("kernel", "tile", arch, shared_bytes=limit * 1024)
    assert row.complaint == ""
    row.shared_bytes += 1
    assert "shared memory" in row.complaint


def test_a_spill_or_an_error_gives_exit_code_one(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for row in (aot.Row("k", "t", "80", spill_bytes=8), aot.Row("k", "t", "80", error="does not compile: because")):
        monkeypatch.setattr(aot, "compile_all", lambda *_, row=row, **__: [row])
        assert aot.main(["--triton"]) == 1
        assert row.complaint in capsys.readouterr().out
    monkeypatch.setattr(aot, "compile_all", lambda *_, **__: [aot.Row("k", "t", "80", spill_bytes=0)])
    assert aot.main(["--triton"]) == 0


def test_a_kernel_that_does_not_compile_is_a_row(monkeypatch):
    from parrot_kernels.triton_kernels import specialization

    spec = aot.declared("sinkhorn_hadamard")[0]
    broken = specialization.Specialization(spec.kernel, "broken", spec.arguments, {**spec.constants, "BLOCK_N": 3}, 1)
    monkeypatch.setattr(aot, "declared", lambda module: [broken])
    assert "does not compile" in aot.compile_triton("sinkhorn_hadamard", 0, "80").complaint


def test_refusals_say_why(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert aot.main(["--triton", "--kernel", "no such kernel"]) == 1
    assert "nothing matches" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as refused:
        aot.main(["--triton"])
    assert refused.value.code == 2
    assert "unset it" in capsys.readouterr().err
    monkeypatch.setattr(aot, "cuda_tool", lambda name: None)
    with pytest.raises(FileNotFoundError, match="CUDA_HOME"):
        aot.compile_cuda("file.cu", "80")
