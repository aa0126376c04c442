"""`parrot demo` stopped at any moment, by Ctrl-C, by kill -9 and by a full disk, goes on to the same result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import concurrent_cases as cases
import pytest

pytest.importorskip("parselmouth", reason="the demo corpus is spoken by it")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")]

OPTIONS = ["--voices", "5", "--sentences", "1", "--folds", "3", "--systems", "fcn-0", "parrot", "--epochs", "4"]
WEIGHTS = "model.safetensors"
# A shell's $? is 130 for both. Python ends by the signal itself if it came within an exec() of a string, as dataclasses
# and named tuples make while modules are imported, even where the exception is handled.
INTERRUPTED = (130, -2)


def start(folder: Path, workers: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "parrot", "demo", "--output", str(folder), *OPTIONS, "--workers", str(workers)]
    return subprocess.Popen(
        command, text=True, env=cases.environment(), start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(folder: Path) -> str:
    process = start(folder)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output[-2000:]
    return output


def contents(folder: Path) -> dict[str, str]:
    """What a run computes, without its wall times."""
    found = {path: path.read_bytes() for path in [*folder.glob("corpus/AudioWAV/*.wav"), folder / "model" / WEIGHTS]}
    systems = json.loads((folder / "report.json").read_text())["systems"]
    digests = {path.name: hashlib.sha256(data).hexdigest() for path, data in found.items()}
    return digests | {"systems": json.dumps(without_seconds(systems))}


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(member) for key, member in value.items() if "seconds" not in key}
    return [without_seconds(member) for member in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return folder


@pytest.fixture
def begun(whole, tmp_path):
    """A run of which training is to do."""
    for part in ("corpus", "features"):
        shutil.copytree(whole / part, tmp_path / "run" / part)
    return tmp_path / "run"


def stop(process: subprocess.Popen, when, number: int, delay: float) -> bool:
    """Send a signal to the process and its children, as a terminal does, some time after ``when()``."""
    while process.poll() is None and not when():
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, number)
        return True
    return False


@pytest.mark.parametrize("delay", [0.5, 2.5])  # workers start, workers train
def test_ctrl_c_in_training_is_one_line_and_loses_nothing(begun, whole, delay):
    process = start(begun, workers=2)
    assert stop(process, (begun / "results").exists if delay < 1 else lambda: True, signal.SIGINT, 2 + delay)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED
    assert "Traceback" not in output
    assert output.count("interrupted. What was finished is kept; run the command again to go on.") == 1
    assert not list(begun.rglob(".*.tmp"))
    finish(begun)
    assert contents(begun) == contents(whole)


def test_ctrl_c_in_extraction(tmp_path, whole):
    shutil.copytree(whole / "corpus", tmp_path / "corpus")
    process = start(tmp_path)
    assert stop(process, (tmp_path / "features").exists, signal.SIGINT, 0.4)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED
    assert "Traceback" not in output
    finish(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_killed_at_random_moments(tmp_path, whole):
    chance, hits = random.Random(0), 0
    for stage in ("corpus/AudioWAV", "features", "results", "model"):
        process = start(tmp_path, workers=1 + chance.randrange(2))
        hits += stop(process, (tmp_path / stage).exists, signal.SIGKILL, chance.uniform(0, 1))
        process.communicate(timeout=60)
    assert hits >= 2
    finish(tmp_path)
    assert contents(tmp_path) == contents(whole)


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of some size in ``folder``, which only root may make."""
    folder.mkdir(exist_ok=True)
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("may not mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def size_of(*folders: Path) -> int:
    """In KiB, in pages of 4 KiB."""
    return sum(
        4 * -(-path.stat().st_size // 4096) for folder in folders for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("stage", ["corpus", "results", "model"])
def test_a_full_disk_is_told_and_a_rerun_goes_on(stage, whole, tmp_path):
    sizes = {part: size_of(whole / part) for part in ("corpus", "features", "results")}
    done = {"corpus": [], "results": ["corpus", "features"], "model": ["corpus", "features", "results"]}[stage]
    room = {"corpus": sizes["corpus"] // 2, "results": 4, "model": 940}[stage]
    with small_disk(tmp_path / "disk", f"{sum(sizes[part] for part in done) + room + 16}k") as disk:
        for part in done:
            shutil.copytree(whole / part, disk / part)
        process = start(disk)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 2, output[-2000:]
        assert "Traceback" not in output
        last = output.strip().splitlines()[-1]
        assert "No space left on device" in last
        assert "make room" in last
        assert str(disk / stage) in last
        assert not list(disk.rglob(".*.tmp"))
        remount(disk, "size=64m")
        finish(disk)
        assert contents(disk) == contents(whole)


def test_a_folder_that_can_only_be_read(whole, tmp_path):
    with small_disk(tmp_path / "disk", "64m") as disk:
        for part in ("corpus", "features"):
            shutil.copytree(whole / part, disk / part)
        remount(disk, "ro")
        process = start(disk)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == 2
        assert "Traceback" not in output
        assert f"{disk / 'features'}" in output.strip().splitlines()[-1]
