"""What selective_scan promises beside its values: registration, compilation, memory, bad input."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scan_cases import leaves, outputs_and_gradients
from selective_scan_cases import EVERYTHING, cotangents, make, run
from tolerances import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from parrot_kernels.ops import selective_scan as op
from parrot_kernels.ops.selective_scan import selective_scan


def test_double_backward_raises():
    inputs, options = make(EVERYTHING)
    u = inputs.pop("u").requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan(u, **inputs, **options).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiating twice is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "case", [EVERYTHING, EVERYTHING | dict.fromkeys(("z", "D", "lengths", "initial_state"), False)]
)
def test_opcheck(case):
    inputs, options = make(case, dtype=torch.float32)
    i32 = {n: None if options[n] is None else options[n].int() for n in ("lengths", "seq_idx")}
    ordered = [inputs[n] for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    arguments = (*ordered, i32["lengths"], i32["seq_idx"], inputs["initial_state"], True, True, True, None)
    torch.library.opcheck(op._forward, arguments)
    arguments = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    torch.library.opcheck(op._forward, arguments)
    *_, checkpoints = op._forward(*arguments)
    grad_out, grad_final_state = (c.float() for c in cotangents(inputs))
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments[:11])
    torch.library.opcheck(op._backward, (grad_out, grad_final_state, *detached, checkpoints.detach(), True, True, None))


def test_compiled_without_a_graph_break_equals_eager():
    inputs, options = make(EVERYTHING, dtype=torch.float32)

    def function(**i):
        return selective_scan(**i, **options, return_final_state=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(compiled, leaves(inputs), cotangents(inputs))
    want = outputs_and_gradients(function, leaves(inputs), cotangents(inputs))
    assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs)[0], want["out"])


def test_other_lengths_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selective_scan, fullgraph=True, dynamic=True, backend=counter)
    for length in (31, 33, 64, 100):
        inputs, options = make(EVERYTHING | {"B": "step"}, length=length, dtype=torch.float32)
        assert torch.equal(compiled(**inputs, **options), selective_scan(**inputs, **options))
    assert counter.frame_count == 1


def test_memory_kept_for_the_backward_is_of_the_order_of_the_inputs():
    inputs, options = make(EVERYTHING | {"B": "step"}, batch=1, dim=64, length=512, states=16, dtype=torch.float32)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        selective_scan(**leaves(inputs), **options)
    largest = max(t.numel() for t in seen)
    assert largest <= inputs["u"].numel()


def test_inputs_are_not_mutated():
    inputs, options = make(EVERYTHING | {"reverse": False, "lengths": False}, length=1, dtype=torch.float32)
    before = {n: t.clone() for n, t in inputs.items()}
    grads = [c.float() for c in cotangents(inputs)]
    grads_before = [g.clone() for g in grads]
    out = selective_scan(**leaves(inputs), **options, return_final_state=True)
    torch.autograd.backward(out, grads)
    selective_scan(**inputs, **options)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)
    assert all(torch.equal(g, b) for g, b in zip(grads, grads_before, strict=True))


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 0, 5), (2, 6, 0)])
def test_empty(shape):
    batch, dim, length = shape
    case = EVERYTHING | {"B": "step", "C": "step"}
    inputs, options = make(case, batch=max(batch, 1), dim=dim, length=length, states=4)
    if batch == 0:
        inputs = {n: t[:0] if t.dim() > 2 else t for n, t in inputs.items()}
        options |= {"lengths": options["lengths"][:0], "seq_idx": options["seq_idx"][:0]}
    result = run(inputs, options)
    assert result["out"].shape == shape
    assert result["final_state"].shape == (batch, dim, 4)
    assert all(torch.isfinite(t).all() for t in result.values())


def test_cuda_launcher_speaks_the_binding(monkeypatch):
    """Without a device at least the keywords can be compared with those of the binding."""
    bindings = Path(__file__).parents[1].joinpath("csrc", "bindings.cpp").read_text()
    shared = re.search(r"#define SCAN_INPUTS((?:.*\\\n)*.*)", bindings)

    def keywords(function):
        definition = bindings.split(f'"{function}"', 1)[1].split("m.def(", 1)[0]
        if shared is not None:
            definition = definition.replace("SCAN_INPUTS", shared[1])
        return set(re.findall(r'py::arg\("(\w+)"\)', definition))

    calls = {}

    class Extension:
        @staticmethod
        def selective_scan_workspace_cuda(**arguments):
            calls["selective_scan_workspace_cuda"] = set(arguments)
            return 8

    monkeypatch.setattr(op.native, "extension", Extension)
    monkeypatch.setattr(op.native, "call_cuda", lambda f, _, **arguments: calls.update({f: {*arguments, "stream"}}))
    monkeypatch.setattr(op.torch.cuda, "device", lambda _: nullcontext())
    inputs, options = make(EVERYTHING)
    op.KERNELS["cuda"].forward(
        **inputs, **options, chunk_size=32, checkpoints=None, out=inputs["u"], final_state=inputs["initial_state"]
    )
    assert calls == {function: keywords(function) for function in calls}
    assert len(calls) == 2


BAD = {
    "u of two dimensions": ({"u": torch.zeros(6, 15)}, ValueError, r"`u` must be of shape \(b, d, l\)"),
    "u no tensor": ({"u": [1.0]}, TypeError, "`u` must be a torch.Tensor"),
    "u of integers": ({"u": torch.zeros(3, 6, 15, dtype=torch.int64)}, TypeError, "`u` must be of dtype float32"),
    "delta too short": ({"delta": torch.zeros(3, 6, 14)}, ValueError, r"`delta` must be .* l = 15"),
    "delta of another dtype": ({"delta": torch.zeros(3, 6, 15).half()}, TypeError, "`delta` must be of dtype float32"),
    "complex A": ({"A": torch.zeros(6, 8, dtype=torch.complex64)}, TypeError, "`A` must be real"),
    "A of other channels": ({"A": torch.zeros(5, 8)}, ValueError, r"`A` must be of shape \(d, n\) with d = 6"),
    "B of one dimension": ({"B": torch.zeros(8)}, ValueError, r"`B` must be of shape \(d, n\) or \(b, n, l\)"),
    "B missing": ({"B": None}, TypeError, "`B` must be a torch.Tensor"),
    "groups that do not divide": ({"B": torch.zeros(3, 4, 8, 15)}, ValueError, "`B` must be in groups that divide d"),
    "C of other states": ({"C": torch.zeros(3, 9, 15)}, ValueError, "`C` must be of shape"),
    "C of another dtype": ({"C": torch.zeros(3, 8, 15).double()}, TypeError, "`C` must be of dtype float32"),
    "D of other channels": ({"D": torch.zeros(7)}, ValueError, "`D` must be of shape"),
    "z of another shape": ({"z": torch.zeros(3, 6, 1)}, ValueError, "`z` must be of shape"),
    "delta_bias of other channels": ({"delta_bias": torch.zeros(1)}, ValueError, "`delta_bias` must be of shape"),
    "initial_state of other states": ({"initial_state": torch.zeros(3, 6, 7)}, ValueError, "`initial_state` must be"),
    "lengths too long": ({"lengths": torch.tensor([1, 2, 16])}, ValueError, "`lengths` must be between 0 and 15"),
    "lengths negative": ({"lengths": torch.tensor([-1, 2, 3])}, ValueError, "`lengths` must be between 0 and 15"),
    "lengths of floats": ({"lengths": torch.ones(3)}, TypeError, "`lengths` must be of dtype int32, int64"),
    "lengths of another batch": ({"lengths": torch.tensor([1])}, ValueError, r"`lengths` must be of shape \(b\)"),
    "seq_idx of another shape": ({"seq_idx": torch.zeros(3, 14).int()}, ValueError, "`seq_idx` must be of shape"),
    "another device": ({"z": torch.zeros(3, 6, 15, device="meta")}, ValueError, "`z` must be on cpu"),
    "no such backend": ({"backend": "fpga"}, ValueError, "`backend` must be one of"),
    "backend of another device": ({"backend": "triton"}, RuntimeError, "backend='triton' can't serve this call"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    change, kind, message = BAD[name]
    inputs, options = make(EVERYTHING | {"B": "step"}, dtype=torch.float32)
    with pytest.raises(kind, match="selective_scan: .*" + message):
        selective_scan(**(inputs | options | {"backend": "torch"} | change))


def test_parameters_of_another_dtype_are_converted():
    inputs, options = make(EVERYTHING, dtype=torch.float32)
    want = run(inputs, options)
    converted = {n: t.double() if n in ("A", "D", "delta_bias", "initial_state") else t for n, t in inputs.items()}
    got = run(converted, options)
    assert got["dA"].dtype == torch.float64
    assert all(torch.equal(got[n].to(want[n].dtype), want[n]) for n in want)


def test_softplus_is_torch_softplus_at_its_threshold():
    inputs, options = make(EVERYTHING | {"delta_bias": False}, dtype=torch.float32)
    inputs["delta"] = torch.linspace(15, 25, inputs["delta"].numel()).view_as(inputs["delta"])
    direct = inputs | {"delta": F.softplus(inputs["delta"])}
    got = selective_scan(**inputs, **options)
    want = selective_scan(**direct, **(options | {"delta_softplus": False}))
    assert_close(got, want, "scan")
