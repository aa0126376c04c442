"""A few hundred cases of the fuzzing of tests/fuzz_ops.py, and what it found."""

from __future__ import annotations

import os
import signal

import fuzz_files
import fuzz_ops
import fuzz_readers
import pytest
import torch
from fuzz_cases import CASES
from scan_cases import places

import parrot_kernels
from parrot.corpora.audio import AudioError, load_waveform
from parrot_kernels import native, selective_scan, sinkhorn_hadamard, sinkhorn_transport

needs_kernels = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")


@needs_kernels
@pytest.mark.parametrize("op", CASES)
def test_random_cases_of_an_op(op):
    threads, limit = torch.get_num_threads(), native.workspace_limit()
    try:
        outcomes = [fuzz_ops.check(op, seed) for seed in range(25)]
    finally:
        torch.set_num_threads(threads)
        parrot_kernels.set_workspace_limit(limit)
    assert sum(outcome.results for outcome in outcomes) > 20
    assert sum(outcome.undecided for outcome in outcomes) <= 3


@pytest.mark.parametrize(("backend", "device"), places("selective_scan"))
@pytest.mark.parametrize(("dim", "states"), [(0, 3), (2, 0), (0, 0)])
def test_a_scan_without_channels_or_without_states(backend, device, dim, states):
    if backend == "triton":
        pytest.skip("the interpreter runs in a process of its own")
    sizes = {"u": (2, dim, 5), "delta": (2, dim, 5), "A": (dim, states), "B": (2, states, 5), "C": (2, 1, states, 5)}
    inputs = {name: torch.ones(size, device=device, requires_grad=True) for name, size in sizes.items()}
    D = torch.full((dim,), 2.0, device=device, requires_grad=True)
    out, final_state = selective_scan(**inputs, D=D, return_final_state=True, backend=backend)
    assert torch.equal(out, torch.full_like(out, 2.0))
    assert final_state.shape == (2, dim, states)
    out.sum().backward()
    for name in ("B", "C"):
        assert torch.equal(inputs[name].grad, torch.zeros(sizes[name], device=device))


@pytest.mark.parametrize(("backend", "device"), places("sinkhorn_hadamard"))
def test_a_constant_plan_gives_no_gradient_to_a_cost_tensor(backend, device):
    if backend == "triton":
        pytest.skip("the interpreter runs in a process of its own")
    x, y = torch.randn(2, 5, 3, device=device), torch.randn(2, 4, 3, device=device)
    cost = torch.rand(2, 5, 4, device=device, requires_grad=True)
    lengths = torch.tensor([0, 5], device=device)
    x.requires_grad_()
    options = {"cost": cost, "x_lengths": lengths, "gradient": "detached", "backend": backend}
    sum(t.sum() for t in sinkhorn_transport(x, y, **options)).backward()
    assert cost.grad is None or not cost.grad.any()
    sinkhorn_hadamard(x, y, **options).cost.sum().backward()
    assert cost.grad is not None
    assert cost.grad[1].any()
    assert not cost.grad[0].any()


@pytest.mark.parametrize("reader", fuzz_files.READERS)
def test_damaged_files_are_read_or_refused(reader):
    failures = []
    assert fuzz_files.run([reader], cases=25, first=0, seconds=60.0, report=failures.append) == 0, failures


def test_a_recording_with_a_nonsensical_header_takes_no_memory(tmp_path):
    data = bytearray(fuzz_files.READERS["flac"].files()["a.flac"])
    data[22:26] = b"\x7f" * 4  # the number of samples
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(AudioError, match=r"truncated|not a readable"):
        load_waveform(tmp_path / "a.flac", 16000)
    data = bytearray(fuzz_files.READERS["wav"].files()["a.wav"])
    data[24:28] = (1_999_999_999).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(AudioError, match="a sample rate of 1999999999 Hz"):
        load_waveform(tmp_path / "a.wav", 16000)


def test_the_fuzz_of_files_sees_crashes_and_code_that_is_run(monkeypatch):
    def read(folder, rng):
        os.kill(os.getpid(), signal.SIGSEGV) if rng.random() < 0.5 else os.system("true")

    reader = fuzz_readers.Reader(lambda: {"a": b"content"}, read, (ValueError,))
    monkeypatch.setitem(fuzz_files.READERS, "broken", reader)
    outcomes = [outcome for _, outcome in fuzz_files.run_batch("broken", range(8))]
    assert len(outcomes) == 8
    assert {outcome.split(":")[0] for outcome in outcomes} == {
        "FAILED the process ended with -11",
        "FAILED BaseException",
    }
