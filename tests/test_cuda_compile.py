"""The CUDA sources without a device: nvcc accepts them for every architecture without warnings or spills, and run
thread by thread on the host (cuda_emulation.h) they agree with the fp64 reference."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

import cuda_emulated
import pytest
import torch
from cuda_emulated import NVCC, SOURCES
from selective_scan_cases import CASES, EVERYTHING, make
from tolerances import assert_close

from parrot.files import write_atomically
from parrot_kernels.ops.selective_scan import CHUNK_SIZE
from parrot_kernels.reference import selective_scan as reference

KERNEL_FILES = sorted((SOURCES / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90)

pytestmark = pytest.mark.skipif(not SOURCES.exists(), reason="needs the sources of the extension")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc (on PATH or under CUDA_HOME)")


def compilations() -> list:
    """Every file for every architecture, but only one of them without the marker `slow`."""
    quick = ("selective_scan_forward_f64", ARCHITECTURES[-1])
    pairs = [(source, architecture) for source in KERNEL_FILES for architecture in ARCHITECTURES]
    return [
        pytest.param(
            source,
            architecture,
            id=f"{source.stem}-{architecture}",
            marks=() if (source.stem, architecture) == quick else pytest.mark.slow,
        )
        for source, architecture in pairs
    ]


def messages_of(command: list, source: Path) -> str:
    """What nvcc said when it compiled these very sources; it takes minutes, and is asked once."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr(command).encode() + version)
    headers = [path for folder in ("include", "cuda") for path in (SOURCES / folder).glob("*.*h")]
    for path in (source, *sorted(headers)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    kept = SOURCES.parent / "build" / "compiled" / f"{source.stem}-{digest.hexdigest()[:16]}.txt"
    if kept.exists():
        return kept.read_text()
    with tempfile.TemporaryDirectory() as folder:
        command = [*command, "-cubin", "-o", f"{folder}/kernels.cubin", source]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, done.stderr.encode())
    return done.stderr


@needs_nvcc
@pytest.mark.parametrize(("source", "architecture"), compilations())
def test_compiles_without_warnings_or_spills(source, architecture):
    command = [NVCC, "-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-Werror"]
    command += [f"-arch=sm_{architecture}", f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'cuda'}"]
    messages = messages_of(command, source)
    spilled = re.findall(r"(\d+) bytes spill stores", messages)
    assert all(int(size) == 0 for size in spilled), messages
    if re.search("_b?f[0-9]+$", source.stem):
        assert spilled, "ptxas reported no kernel"


@pytest.fixture(scope="module")
def emulated():
    return cuda_emulated.module()


def run(module, inputs, options, monkeypatch, multiprocessors=0):
    """(out, final_state) of the emulated kernel; with multiprocessors > 0 as a device that wide would run it."""
    monkeypatch.setenv("PARROT_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    u, A = inputs["u"], inputs["A"]
    (batch, dim, length), states = u.shape, A.shape[1]
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    out = torch.full_like(u, torch.nan)
    final_state = torch.full((batch, dim, states), torch.nan, dtype=compute)
    groups = max((inputs[name].shape[1] for name in "BC" if inputs[name].dim() == 4), default=1)
    size = module.selective_scan_workspace_cuda(batch=batch, dim=dim, groups=groups, length=length, state=states)
    arguments = {**inputs, **options, "out": out, "final_state": final_state, "checkpoints": None, "chunk_size": 32}
    arguments["workspace"] = torch.full((size,), torch.nan, dtype=compute) if size else None
    module.selective_scan_forward_cuda(**arguments, stream=0)
    return out, final_state, size


def expected(inputs, options):
    inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
    (batch, dim, length), states = inputs["u"].shape, inputs["A"].shape[1]
    out = torch.empty(batch, dim, length, dtype=torch.float64)
    final_state = torch.empty(batch, dim, states, dtype=torch.float64)
    reference.forward(**inputs, **options, chunk_size=CHUNK_SIZE, out=out, final_state=final_state)
    return out, final_state


def check(module, inputs, options, monkeypatch, multiprocessors=0):
    want = expected(inputs, options)
    if options["lengths"] is not None:  # what padding holds must not matter
        padding = torch.arange(inputs["u"].shape[2]) >= options["lengths"].unsqueeze(1)
        for name in ("u", "delta", "z", "B", "C"):
            t = inputs[name]
            if t is not None and t.dim() > 2:
                mask = padding.view(padding.shape[0], *(1,) * (t.dim() - 2), -1)
                inputs[name] = t.masked_fill(mask, torch.nan)
    out, final_state, size = run(module, inputs, options, monkeypatch, multiprocessors)
    assert_close(out, want[0], "scan", "out")
    assert_close(final_state, want[1], "scan", "final_state")
    return out, final_state, size


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(k for k, v in case.items() if v))
def test_options(emulated, case, monkeypatch):
    inputs, options = make(case, dtype=torch.float32)
    check(emulated, inputs, options, monkeypatch)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("states", [1, 8, 16, 24, 32, 37, 64, 70])
def test_state_sizes_and_dtypes(emulated, dtype, states, monkeypatch):
    inputs, options = make(EVERYTHING, batch=2, dim=105, length=45, states=states, dtype=dtype)
    check(emulated, inputs, options, monkeypatch)


@pytest.mark.parametrize("length", [0, 1, 2, 31, 32, 33, 64, 256, 257, 515])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(emulated, length, reverse, monkeypatch):
    inputs, options = make(
        {**EVERYTHING, "reverse": reverse}, batch=2, dim=3, length=length, states=16, dtype=torch.float32
    )
    check(emulated, inputs, options, monkeypatch)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "mixed"])
def test_layouts(emulated, layout, monkeypatch):
    inputs, options = make({**EVERYTHING, "lengths": False}, dim=66, length=70, states=16, dtype=torch.float32)
    names = ("u", "z") if layout == "mixed" else ("u", "delta", "z", "B", "C")
    for name in names:
        t = inputs[name]
        inputs[name] = t.repeat_interleave(2, -1)[..., ::2] if layout == "sliced" else t.mT.contiguous().mT
    check(emulated, inputs, options, monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_parallel_chunks_are_bitwise_the_same(emulated, packed, reverse, monkeypatch):
    case = {**EVERYTHING, "seq_idx": packed, "reverse": reverse}
    inputs, options = make(case, batch=2, dim=6, length=1100, states=24, dtype=torch.float32)
    if packed:
        options["seq_idx"] = options["seq_idx"] // 60
    alone = check(emulated, inputs, options, monkeypatch)
    assert alone[2] == 0
    for multiprocessors in (12, 100):
        parallel = check(emulated, inputs, options, monkeypatch, multiprocessors)
        assert parallel[2] > 0
        assert torch.equal(parallel[0], alone[0])
        assert torch.equal(parallel[1], alone[1])


def test_underflowing_states(emulated, monkeypatch):
    inputs, options = make(EVERYTHING, length=40, states=16, dtype=torch.float32)
    inputs["delta"] = inputs["delta"] * 1e4
    check(emulated, inputs, options, monkeypatch)
