"""selective_scan against a plain loop, transformers, its own explicit backward, and under torch.compile."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scan_cases import assert_all_close, leaves, outputs_and_gradients, pairwise, places, skip_unless_served
from tolerances import assert_close, tolerance
from torch import Tensor

from parrot_kernels.ops import selective_scan as op
from parrot_kernels.ops.selective_scan import selective_scan, selective_state_update
from parrot_kernels.reference import selective_scan as reference

PLACES = pytest.mark.parametrize(("backend", "device"), places("selective_scan"))
OPTIONS = {
    "delta_softplus": (False, True),
    "delta_bias": (False, True),
    "D": (False, True),
    "z": (False, True),
    "B": ("constant", "step", "group"),
    "C": ("constant", "step", "group"),
    "reverse": (False, True),
    "lengths": (False, True),
    "seq_idx": (False, True),
    "initial_state": (False, True),
}
EVERYTHING = {
    "delta_softplus": True,
    "delta_bias": True,
    "D": True,
    "z": True,
    "B": "group",
    "C": "step",
    "reverse": True,
    "lengths": True,
    "seq_idx": True,
    "initial_state": True,
}
CASES = list(pairwise(OPTIONS))


def plain_loop(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, lengths, seq_idx
) -> tuple[Tensor, Tensor]:
    """The definition, one sequence and one step at a time, in the dtype of its inputs."""
    (batch, dim, length), states = u.shape, A.shape[1]
    outs, finals = [], []
    for b in range(batch):
        n = length if lengths is None else int(lengths[b])
        h = u.new_zeros(dim, states) if initial_state is None else initial_state[b]
        out, before = [u.new_zeros(dim)] * length, None
        for t in reversed(range(n)) if reverse else range(n):
            if seq_idx is not None and before is not None and seq_idx[b, t] != seq_idx[b, before]:
                h = torch.zeros_like(h)
            before = t
            dt = delta[b, :, t] + (0 if delta_bias is None else delta_bias)
            if delta_softplus:
                dt = torch.logaddexp(dt, torch.zeros_like(dt))
            B_t, C_t = (_at(matrix, b, t, dim) for matrix in (B, C))
            h = torch.exp(dt[:, None] * A) * h + dt[:, None] * B_t * u[b, :, t, None]
            y = (C_t * h).sum(1) + (0 if D is None else D * u[b, :, t])
            out[t] = y if z is None else y * z[b, :, t] / (1 + torch.exp(-z[b, :, t]))
        outs.append(torch.stack(out, 1) if out else u.new_zeros(dim, 0))
        finals.append(h)
    return torch.stack(outs), torch.stack(finals)


def _at(matrix: Tensor, b: int, t: int, dim: int) -> Tensor:
    if matrix.dim() == 2:
        return matrix
    if matrix.dim() == 3:
        return matrix[b, :, t].expand(dim, -1)
    groups = matrix.shape[1]
    return torch.stack([matrix[b, d * groups // dim, :, t] for d in range(dim)])


def make(case, batch=3, dim=6, length=15, states=8, dtype=torch.float64, device="cpu", seed=0):
    """Inputs (tensors to differentiate) and options of a case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    matrices = {
        "constant": lambda: normal(dim, states, dtype=compute),
        "step": lambda: normal(batch, states, length),
        "group": lambda: normal(batch, 3, states, length),
    }
    inputs = {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length).mul(0.5).add(0 if case["delta_softplus"] else 1).abs(),
        "A": -0.1 - normal(dim, states, dtype=compute).abs(),
        "B": matrices[case["B"]](),
        "C": matrices[case["C"]](),
        "D": normal(dim, dtype=compute) if case["D"] else None,
        "z": normal(batch, dim, length) if case["z"] else None,
        "delta_bias": normal(dim, dtype=compute).abs() if case["delta_bias"] else None,
        "initial_state": normal(batch, dim, states, dtype=compute) if case["initial_state"] else None,
    }
    lengths = torch.randint(1, length + 1, (batch,), generator=generator) if length else torch.zeros(batch).int()
    lengths[0] = length
    starts = (torch.rand(batch, length, generator=generator) < 0.2).long()
    options = {
        "delta_softplus": case["delta_softplus"],
        "reverse": case["reverse"],
        "lengths": lengths.to(device) if case["lengths"] else None,
        "seq_idx": starts.cumsum(1).to(device) if case["seq_idx"] else None,
    }
    return inputs, options


def cotangents(inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, dim, length = inputs["u"].shape
    out, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, dim, length), (batch, dim, inputs["A"].shape[1]))
    )
    return out.to(inputs["u"].device), state.to(inputs["u"].device)


def run(inputs, options, backend="torch"):
    return outputs_and_gradients(
        lambda **i: selective_scan(**i, **options, return_final_state=True, backend=backend),
        leaves(inputs),
        cotangents(inputs),
    )


def expected(inputs, options):
    return outputs_and_gradients(
        lambda **i: plain_loop(**i, **options), leaves(inputs, torch.float64), cotangents(inputs)
    )


@PLACES
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_options_pairwise(case, dtype, backend, device):
    skip_unless_served("selective_scan", backend, device, dtype)
    inputs, options = make(case, states=5, dtype=dtype, device=device)
    assert_all_close(run(inputs, options, backend), expected(inputs, options), "scan")


@PLACES
@pytest.mark.parametrize("states", [8, 16, 24])
@pytest.mark.parametrize("length", [0, 1, 2, 15, 63, 129])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sizes(states, length, dtype, backend, device):
    skip_unless_served("selective_scan", backend, device, dtype)
    case = EVERYTHING | {"B": "step", "reverse": length % 2 == 0, "seq_idx": length == 15, "lengths": length != 63}
    inputs, options = make(case, batch=2, dim=7, length=length, states=states, dtype=dtype, device=device)
    assert_all_close(run(inputs, options, backend), expected(inputs, options), "scan")


@PLACES
@pytest.mark.parametrize("length", [1134, 4096])
def test_long(length, backend, device):
    skip_unless_served("selective_scan", backend, device, torch.float32)
    case = EVERYTHING | {"B": "step", "lengths": False}
    inputs, options = make(case, batch=1, dim=5, length=length, states=16, dtype=torch.float32, device=device)
    assert_all_close(run(inputs, options, backend), expected(inputs, options), "scan")


@pytest.mark.parametrize("length", [2, 31, 32, 33, 70])
@pytest.mark.parametrize("keep_checkpoints", [True, False])
def test_explicit_backward_is_autograd_of_the_step_loop(length, keep_checkpoints):
    inputs, options = make(EVERYTHING, length=length)
    want = outputs_and_gradients(
        lambda **i: reference.selective_scan(**i, **options), leaves(inputs), cotangents(inputs)
    )
    nan = float("nan")
    batch, dim, states = 3, *inputs["A"].shape
    out, final_state = torch.full_like(inputs["u"], nan), inputs["u"].new_full((batch, dim, states), nan)
    checkpoints = inputs["u"].new_full((batch, -(-length // 32), dim, states), nan) if keep_checkpoints else None
    shared = inputs | options | {"chunk_size": 32, "checkpoints": checkpoints}
    reference.forward(**shared, out=out, final_state=final_state)
    gradients = {f"d{name}": torch.full_like(t, nan) for name, t in inputs.items()}
    grad_out, grad_final_state = cotangents(inputs)
    reference.backward(**shared, grad_out=grad_out, grad_final_state=grad_final_state, **gradients)
    assert_all_close({"out": out, "final_state": final_state} | gradients, want, "scan")


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_from_one_output_alone(used):
    inputs, options = make(EVERYTHING)
    got, want = leaves(inputs), leaves(inputs)
    selective_scan(**got, **options, return_final_state=True)[used].sum().backward()
    plain_loop(**want, **options)[used].sum().backward()
    for name in inputs:
        wanted = torch.zeros_like(want[name]) if want[name].grad is None else want[name].grad
        assert_close(got[name].grad, wanted, "scan_grad", name)


def test_transformers_slow_path():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig

    config = MambaConfig(
        hidden_size=12, state_size=16, expand=2, conv_kernel=4, time_step_rank=3, num_hidden_layers=1, vocab_size=11
    )
    mixer = modeling.MambaMixer(config, layer_idx=0).double()
    torch.nn.init.uniform_(mixer.A_log)
    hidden = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    parameters = dict(mixer.named_parameters())
    slow = getattr(mixer, "slow_forward", mixer.forward)(hidden)
    grad = torch.randn_like(slow)
    want = torch.autograd.grad(slow, [hidden, *parameters.values()], grad)

    u, gate = mixer.in_proj(hidden).transpose(1, 2).chunk(2, 1)
    u = mixer.act(mixer.conv1d(u)[..., :19])
    dt, B, C = mixer.x_proj(u.transpose(1, 2)).split([3, 16, 16], -1)
    y = selective_scan(
        u,
        (dt @ mixer.dt_proj.weight.t()).transpose(1, 2),
        -torch.exp(mixer.A_log),
        B.transpose(1, 2),
        C.transpose(1, 2),
        mixer.D,
        gate,
        mixer.dt_proj.bias,
        True,
    )
    out = mixer.out_proj(y.transpose(1, 2))
    got = torch.autograd.grad(out, [hidden, *parameters.values()], grad)
    # transformers passes A, D and the bias through float32 (an accuracy of 6e-8), and some of its products.
    scale = 1e-6 / tolerance("scan", torch.float64)
    assert_close(out, slow, "scan", scale=scale)
    for name, g, w in zip(["hidden", *parameters], got, want, strict=True):
        assert_close(g, w, "scan", name, scale=scale)


@PLACES
def test_strides(backend, device):
    """Sliced, channels-last, expanded and reversed-stride views give what contiguous copies give."""
    skip_unless_served("selective_scan", backend, device, torch.float32)
    case = EVERYTHING | {"B": "group", "C": "constant"}
    inputs, options = make(case, length=37, dtype=torch.float32, device=device)
    want = run(inputs, options, backend)

    def channels_last(t):
        return t if t.dim() < 2 else t.transpose(1, -1).contiguous().transpose(1, -1)

    def sliced(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 1 : 1 + 2 * t.shape[-1] : 2] = t
        return wide[..., 1 : 1 + 2 * t.shape[-1] : 2]

    views = {name: (channels_last if i % 2 else sliced)(t) for i, (name, t) in enumerate(inputs.items())}
    assert not any(views[name].is_contiguous() for name in ("u", "delta", "B", "z"))
    views = {name: v.requires_grad_() for name, v in views.items()}
    got = outputs_and_gradients(
        lambda **i: selective_scan(**i, **options, return_final_state=True, backend=backend),
        views,
        cotangents(inputs),
    )
    assert_all_close(got, want, "scan")
    expanded = inputs["u"][:1].expand(3, -1, -1)
    same = selective_scan(**(inputs | {"u": expanded}), **options, backend=backend)
    assert_close(same, selective_scan(**(inputs | {"u": expanded.contiguous()}), **options, backend=backend), "scan")


def test_output_keeps_the_layout_of_the_input():
    inputs, options = make(EVERYTHING)
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert selective_scan(**inputs, **options).stride() == inputs["u"].stride()


@PLACES
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read_and_gets_no_gradient(reverse, backend, device):
    skip_unless_served("selective_scan", backend, device, torch.float32)
    case = EVERYTHING | {"reverse": reverse, "lengths": False}
    inputs, options = make(case, batch=5, length=40, dtype=torch.float32, device=device)
    lengths = torch.tensor([40, 0, 1, 33, 7], device=device)
    padding = torch.arange(40, device=device) >= lengths[:, None]
    per_step = ("u", "delta", "B", "C", "z")

    def filled(value):
        return {
            name: t.masked_fill(padding.view(5, *(1,) * (t.dim() - 2), 40), value) if name in per_step else t
            for name, t in inputs.items()
        }

    options |= {"lengths": lengths}
    clean, dirty = run(filled(0.0), options, backend), run(filled(float("nan")), options, backend)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    for name in ("out", *(f"d{n}" for n in per_step)):
        t = clean[name]
        assert (t.masked_select(padding.view(5, *(1,) * (t.dim() - 2), 40)) == 0).all(), name
    assert torch.equal(clean["final_state"][1], inputs["initial_state"][1])
    for b, n in enumerate(lengths.tolist()):  # each alone, without its padding
        alone = {name: t if t is None or t.dim() < 3 or t.shape[0] != 5 else t[b : b + 1] for name, t in inputs.items()}
        alone = {name: t[..., :n] if name in per_step else t for name, t in alone.items()}
        own = options | {"lengths": None, "seq_idx": options["seq_idx"][b : b + 1, :n]}
        out, state = selective_scan(**alone, **own, return_final_state=True, backend=backend)
        assert torch.equal(out[0], clean["out"][b, :, :n])
        assert torch.equal(state[0], clean["final_state"][b])


@PLACES
@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_are_the_whole(reverse, backend, device):
    skip_unless_served("selective_scan", backend, device, torch.float64)
    case = EVERYTHING | {"reverse": reverse, "lengths": False, "seq_idx": False, "B": "step"}
    inputs, options = make(case, length=45, device=device)
    want = run(inputs, options, backend)

    def in_pieces(u, delta, A, B, C, D, z, delta_bias, initial_state):
        outs, state = [], initial_state
        cuts = [(0, 13), (13, 14), (14, 45)]
        for start, stop in reversed(cuts) if reverse else cuts:
            u_, delta_, B_, C_, z_ = (t[..., start:stop] for t in (u, delta, B, C, z))
            out, state = selective_scan(
                u_, delta_, A, B_, C_, D, z_, delta_bias, initial_state=state, return_final_state=True,
                backend=backend, **options,
            )  # fmt: skip
            outs.append(out)
        return torch.cat(outs[::-1] if reverse else outs, -1), state

    assert_all_close(outputs_and_gradients(in_pieces, leaves(inputs), cotangents(inputs)), want, "scan")


@pytest.mark.parametrize("B", ["step", "group"])
def test_single_steps_are_the_whole(B):
    case = EVERYTHING | {"reverse": False, "lengths": False, "seq_idx": False, "B": B}
    inputs, options = make(case)
    want = run(inputs, options)

    def step_by_step(u, delta, A, B, C, D, z, delta_bias, initial_state):
        outs, state = [], initial_state
        for t in range(u.shape[2]):
            u_, delta_, B_, C_, z_ = (x[..., t] for x in (u, delta, B, C, z))
            out, state = selective_state_update(state, u_, delta_, A, B_, C_, D, z_, delta_bias, True)
            outs.append(out)
        return torch.stack(outs, -1), state

    assert_all_close(outputs_and_gradients(step_by_step, leaves(inputs), cotangents(inputs)), want, "scan")


def test_step_leaves_its_state_alone_and_keeps_dtypes():
    state = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    before, u = state.clone(), torch.randn(2, 3, dtype=torch.bfloat16)
    B = torch.randn(2, 4, dtype=torch.bfloat16)
    out, new = selective_state_update(state, u, u.abs(), -torch.rand(3, 4), B, B)
    assert out.dtype == new.dtype == torch.bfloat16
    assert torch.equal(state, before)
    assert not torch.equal(new, before)


@PLACES
@pytest.mark.parametrize("shift", [-60.0, 60.0, 1e4])
def test_extreme_steps(shift, backend, device):
    """Steps so small that nothing moves, and so large that the states underflow, stay finite and right."""
    skip_unless_served("selective_scan", backend, device, torch.float32)
    case = EVERYTHING | {"delta_softplus": True}
    inputs, options = make(case, dtype=torch.float32, device=device)
    inputs["delta"] = inputs["delta"] + shift
    got, want = run(inputs, options, backend), expected(inputs, options)
    assert all(torch.isfinite(t).all() for t in got.values())
    assert_all_close(got, want, "scan")
    if shift < 0:
        inputs["z"] = inputs["D"] = None
        _, state = selective_scan(**inputs, **(options | {"seq_idx": None}), return_final_state=True)
        assert_close(state, inputs["initial_state"], "scan")


@PLACES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_error_is_that_of_pytorch(dtype, backend, device):
    """The error is at most twice that of the same formulas in fp32 PyTorch, rounded to the dtype at the end."""
    skip_unless_served("selective_scan", backend, device, dtype)
    inputs, options = make(EVERYTHING, length=63, dtype=dtype, device=device)
    got, want = run(inputs, options, backend), expected(inputs, options)

    def rounded(**i):
        out, state = plain_loop(**{k: v.float() for k, v in i.items()}, **options)
        return out.to(dtype), state

    baseline = outputs_and_gradients(rounded, leaves(inputs), cotangents(inputs))
    assert got["out"].dtype == got["du"].dtype == got["dB"].dtype == dtype
    assert got["final_state"].dtype == got["dA"].dtype == torch.float32
    for name, exact in want.items():
        error, allowed = ((r[name].double() - exact).abs().max() for r in (got, baseline))
        floor = tolerance("scan", torch.float32) * exact.abs().max()
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


@PLACES
def test_runs_and_batches_agree_bitwise(backend, device):
    skip_unless_served("selective_scan", backend, device, torch.float32)
    inputs, options = make(EVERYTHING, batch=4, dim=33, length=50, states=16, dtype=torch.float32, device=device)
    first, second = run(inputs, options, backend), run(inputs, options, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for b in range(4):
        alone = {n: t[b : b + 1] if t.shape[0] == 4 and t.dim() > 2 else t for n, t in inputs.items()}
        own = options | {n: options[n][b : b + 1] for n in ("lengths", "seq_idx")}
        out, state = selective_scan(**alone, **own, return_final_state=True, backend=backend)
        assert torch.equal(out[0], first["out"][b])
        assert torch.equal(state[0], first["final_state"][b])


def test_gradcheck():
    inputs, options = make(EVERYTHING, batch=2, dim=3, length=5, states=2)
    names = list(inputs)

    def function(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), **options, return_final_state=True)

    assert torch.autograd.gradcheck(function, tuple(leaves(inputs).values()))


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

    def keywords(function):
        definition = bindings.split(f'"{function}"', 1)[1].split("m.def(", 1)[0]
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


def test_bad_input_of_the_step():
    A, u, B = -torch.rand(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    state = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="selective_state_update: `state` must be of shape"):
        selective_state_update(state[..., :3], u, u, A, B, B)
    with pytest.raises(ValueError, match="`B` must be of shape"):
        selective_state_update(state, u, u, A, torch.randn(4), B)
    with pytest.raises(TypeError, match="`A` must be real"):
        selective_state_update(state, u, u, A.to(torch.complex64), B, B)


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
