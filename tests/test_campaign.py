"""The campaign of a GPU machine: order, limits, resuming, missing tools; and the driver that its sanitizers watch."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import campaign, every_kernel, machine
from parrot_kernels.triton_kernels import aot


def stage(name: str, code: str, limit: float = 30, missing: str | None = None) -> campaign.Stage:
    return campaign.Stage(name, limit, lambda: [sys.executable, "-c", code], lambda: missing)


def outcomes(folder) -> dict[str, str]:
    return {name: found["outcome"] for name, found in json.loads((folder / "campaign.json").read_text()).items()}


def test_stages_run_in_order_and_leave_logs_and_outcomes(tmp_path, capfd):
    plan = [
        stage("good", "print('fine')"),
        stage("bad", "raise SystemExit(7)"),
        stage("absent", "", missing="ncu is not on the path"),
        stage("last", "print('after a failure')"),
    ]
    found = campaign.campaign(plan, tmp_path)
    assert outcomes(tmp_path) == {"good": "passed", "bad": "failed", "absent": "missing", "last": "passed"}
    assert list(found) == ["good", "bad", "absent", "last"]
    assert (found["bad"]["code"], found["good"]["commit"]) == (7, machine.commit())
    assert "fine" in (tmp_path / "good.log").read_text()
    assert "absent" in (said := capfd.readouterr().out)
    assert "ncu is not on the path" in said


def test_a_stage_past_its_limit_ends_with_what_it_started(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    found = campaign.campaign([stage("slow", child, limit=1), stage("next", "")], tmp_path)
    assert found["slow"]["outcome"] == "timeout"
    assert 1 <= found["slow"]["seconds"] < 20
    assert outcomes(tmp_path)["next"] == "passed"


def test_what_has_passed_on_this_commit_is_not_run_again(tmp_path, monkeypatch):
    count = tmp_path / "count"
    plan = [
        stage("once", f"open({str(count)!r}, 'a').write('x')"),
        stage("bad", f"open({str(count)!r}, 'a').write('y'); 1/0"),
    ]
    campaign.campaign(plan, tmp_path)
    campaign.campaign(plan, tmp_path)
    assert count.read_text() == "xyy"
    campaign.campaign(plan, tmp_path, only=["once"], again=True)
    assert count.read_text() == "xyyx"
    monkeypatch.setattr(machine, "commit", lambda: "another")
    campaign.campaign(plan, tmp_path, only=["once"])
    assert count.read_text() == "xyyxx"


def test_the_outcome_of_a_stage_is_on_disk_before_the_next_begins(tmp_path):
    look = f"import json; assert json.load(open({str(tmp_path / 'campaign.json')!r}))['first']['outcome'] == 'passed'"
    assert campaign.campaign([stage("first", ""), stage("second", look)], tmp_path)["second"]["outcome"] == "passed"


def test_a_budget_leaves_stages_for_later(tmp_path, capfd):
    assert campaign.campaign([stage("now", "", limit=500)], tmp_path, budget=31)["now"]["limit"] <= 31
    found = campaign.campaign([stage("long", "", limit=500), stage("short", "", limit=2)], tmp_path, budget=5)
    assert "long" not in found
    assert found["short"]["outcome"] == "passed"
    assert "long" in (said := capfd.readouterr().out)
    assert "left for later" in said


def test_without_a_device_each_stage_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(campaign.shutil, "which", lambda tool: None)
    (tmp_path / "peers").mkdir()
    assert campaign.main(["--list", "--output", str(tmp_path), "--peers", str(tmp_path / "peers")]) == 0
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"build", "doctor", "memcheck", "racecheck", "initcheck", "ceilings", "profiles", "tables"} <= set(told)
    assert {f"bench-{op}-{mode}" for op in campaign.OPS for mode in ("forward", "both")} <= set(told)
    assert "nvcc is not on the path" in told["build"]
    assert "no CUDA device" in told["memcheck"]
    assert "holds no *.tar.gz" in told["peers"]
    stages = ["--stages", "memcheck", "profiles"]
    assert campaign.main([*stages, "--output", str(tmp_path)]) == 0
    assert set(outcomes(tmp_path).values()) == {"missing"}
    with pytest.raises(SystemExit):
        campaign.main(["--stages", "nonsense", "--output", str(tmp_path)])


def test_every_command_of_the_plan_can_be_made(tmp_path):
    for made in campaign.stages(tmp_path, tmp_path):
        command = list(made.command()) if made.name != "tables" else ["-"]
        assert all(isinstance(part, str) for part in command), made.name
        assert made.limit <= 600  # what one command of a lent machine may take


def test_the_driver_reaches_every_op(capsys):
    assert every_kernel.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for op in ("sinkhorn_hadamard, sinkhorn", "sinkhorn_hadamard, streaming", "selective_scan", "causal_conv1d",
               "selective_state_update", "causal_conv1d_update"):  # fmt: skip
        assert f"{op} [cpu]" in said


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_driver_runs_on_a_device(dtype):
    assert every_kernel.main(["--dtype", dtype]) == 0


@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_kernels_of_the_ceilings_compile(arch):
    device_rates = pytest.importorskip("benchmarks.device_rates")
    for spec in device_rates.specializations():
        assert aot.compiled(spec, arch).asm["cubin"]


@pytest.mark.gpu
def test_ceilings_of_a_device_are_of_its_order():
    found = machine.ceilings("cuda")
    assert found["tensor_multiply_adds_per_s"] > found["multiply_adds_per_s"] > found["exponentials_per_s"] > 1e11
