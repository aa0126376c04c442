"""The choice of a backend, its reasons, and the doctor."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from parrot_kernels import backends, checks, native


@pytest.fixture
def fake_op(monkeypatch):
    monkeypatch.setitem(
        backends.IMPLEMENTED, "fake", {"cpu": frozenset({torch.float32}), "triton": frozenset({torch.float32})}
    )
    monkeypatch.setattr(backends, "_warned", set())
    return "fake"


def test_extension_is_built_where_a_compiler_is():
    """A development install on a machine with a compiler must have the CPU kernels: else the suite tests nothing."""
    assert native.why_missing("cpu") is None, native.why_missing("cpu")


def test_an_extension_older_than_its_checkout_is_told(monkeypatch):
    native._warn_if_stale()  # this one is of this checkout: a warning would be an error
    monkeypatch.setattr(native, "build_info", lambda: {"contract": "00000000"})
    with pytest.warns(RuntimeWarning, match=r"\(00000000\) .* Build it again: pip install --no-deps -e \."):
        native._warn_if_stale()


def test_cpu_is_served_by_the_compiled_kernel(fake_op):
    assert backends.select(fake_op, "cpu", torch.float32) == "cpu"


def test_fallback_warns_once_and_names_the_reason(fake_op):
    with pytest.warns(RuntimeWarning, match="does not take float64"):
        assert backends.select(fake_op, "cpu", torch.float64) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select(fake_op, "cpu", torch.float64) == "torch"


def test_a_size_that_a_backend_cannot_take_is_a_reason(fake_op):
    with pytest.raises(RuntimeError, match="at most 256"):
        backends.select(fake_op, "cpu", torch.float32, "cpu", unsupported={"cpu": "it takes at most 256 points"})


def test_no_warning_where_torch_is_all_there_is(monkeypatch):
    monkeypatch.setitem(backends.IMPLEMENTED, "bare", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("bare", "cpu", torch.float32) == "torch"


@pytest.mark.parametrize(
    ("backend", "message"),
    [("cuda", "no cuda kernel"), ("triton", "CUDA tensors"), ("fpga", "one of")],
)
def test_a_named_backend_is_obeyed_or_raises(fake_op, monkeypatch, backend, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises((RuntimeError, ValueError), match=message):
        backends.select(fake_op, "cpu", torch.float32, backend)


def test_missing_extension_is_explained(fake_op, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "the compiled extension is absent: no C++ compiler"))
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler.*install g\+\+"):
        backends.select(fake_op, "cpu", torch.float32, "cpu")
    with pytest.warns(RuntimeWarning, match=r"torch backend serves.*install g\+\+"):
        assert backends.select(fake_op, "cpu", torch.float32) == "torch"
    with pytest.raises(RuntimeError, match=r"install g\+\+"):
        native.extension()


def test_the_doctor_tells_what_serves():
    done = subprocess.run([sys.executable, "-m", "parrot_kernels"], capture_output=True, text=True, check=True)
    assert torch.__version__ in done.stdout
    for op in backends.IMPLEMENTED:
        assert f"{op} on cpu: " in done.stdout


class TestTensorCheck:
    def test_a_wrong_shape_names_the_known_sizes(self):
        sizes = {}
        checks.tensor("op", "x", torch.zeros(2, 3), shape=("B", "N"), sizes=sizes)
        with pytest.raises(ValueError, match=r"op: `y` must be of shape \(B, M\) with B = 2; got \(5, 4\)"):
            checks.tensor("op", "y", torch.zeros(5, 4), shape=("B", "M"), sizes=sizes)
        assert sizes == {"B": 2, "N": 3}

    def test_dtype_device_and_type(self):
        with pytest.raises(TypeError, match=r"torch\.Tensor; got list"):
            checks.tensor("op", "x", [1.0])
        with pytest.raises(TypeError, match="float32, float64"):
            checks.tensor("op", "x", torch.zeros(1, dtype=torch.int8), dtypes=(torch.float32, torch.float64))
        with pytest.raises(ValueError, match="on meta"):
            checks.tensor("op", "x", torch.zeros(1), like=torch.zeros(1, device="meta"))

    def test_lengths(self):
        checks.lengths_in_range("op", "lengths", torch.tensor([0, 5]), 5)
        with pytest.raises(ValueError, match="between 0 and 5; got values from -1 to 6"):
            checks.lengths_in_range("op", "lengths", torch.tensor([-1, 6]), 5)


def test_a_scan_on_a_gpu_goes_to_the_kernels_with_a_backward(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    assert backends.select("selective_scan", "cuda", torch.float32) == "cuda"
    assert backends.select("sinkhorn_hadamard", "cuda", torch.float32) == "triton"
