"""causal_conv1d against a plain loop and torch's own convolution, its explicit backward, and under torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scan_cases import assert_all_close, leaves, outputs_and_gradients, pairwise, places, skip_unless_served
from tolerances import assert_close, tolerance
from torch import Tensor

from parrot_kernels import native
from parrot_kernels.ops import causal_conv1d as op
from parrot_kernels.ops.causal_conv1d import causal_conv1d
from parrot_kernels.reference import causal_conv1d as reference

PLACES = pytest.mark.parametrize(("backend", "device"), places("causal_conv1d"))
OPTIONS = {
    "width": (1, 2, 3, 4, 6),
    "length": (1, 2, 15, 63),
    "bias": (False, True),
    "activation": (None, "silu", "swish"),
    "reverse": (False, True),
    "lengths": (False, True),
    "seq_idx": (False, True),
    "initial_state": (False, True),
}
EVERYTHING = {
    "width": 4,
    "length": 15,
    "bias": True,
    "activation": "silu",
    "reverse": True,
    "lengths": True,
    "seq_idx": True,
    "initial_state": True,
}


def plain_loop(x, weight, bias, initial_state, activation, reverse, lengths, seq_idx) -> tuple[Tensor, Tensor]:
    """The definition, one sequence and one step at a time, in the dtype of its inputs."""
    (batch, dim, length), width = x.shape, weight.shape[1]
    outs, finals = [], []
    for b in range(batch):
        n = length if lengths is None else int(lengths[b])
        times = list(reversed(range(n)) if reverse else range(n))
        ids = [0] * n if seq_idx is None else [int(seq_idx[b, t]) for t in times]
        history = x.new_zeros(dim, width - 1) if initial_state is None else initial_state[b]
        # (input, sequence) in scan order; the history belongs to the sequence of the first step
        line = [(history[:, k], ids[0] if ids else 0) for k in range(width - 1)]
        line += [(x[b, :, t], i) for t, i in zip(times, ids, strict=True)]
        out = [x.new_zeros(dim)] * length
        for s, t in enumerate(times):
            pre = x.new_zeros(dim) if bias is None else bias
            for k in range(width):
                tap, sequence = line[s + k]
                if sequence == ids[s]:
                    pre = pre + weight[:, k] * tap
            out[t] = pre if activation is None else pre / (1 + torch.exp(-pre))
        outs.append(torch.stack(out, 1) if out else x.new_zeros(dim, 0))
        last = [tap if i == line[-1][1] else torch.zeros_like(tap) for tap, i in line[len(line) - (width - 1) :]]
        finals.append(torch.stack(last, 1) if last else x.new_zeros(dim, 0))
    return torch.stack(outs), torch.stack(finals)


def make(case, batch=3, dim=7, dtype=torch.float64, device="cpu", seed=0):
    """Inputs (tensors to differentiate) and options of a case."""
    generator = torch.Generator().manual_seed(seed)
    width, length = case["width"], case["length"]

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "x": normal(batch, dim, length),
        "weight": normal(dim, width, dtype=compute),
        "bias": normal(dim, dtype=compute) if case["bias"] else None,
        "initial_state": normal(batch, dim, width - 1) if case["initial_state"] else None,
    }
    lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    lengths[0] = length
    starts = (torch.rand(batch, length, generator=generator) < 0.3).long()
    options = {
        "activation": case["activation"],
        "reverse": case["reverse"],
        "lengths": lengths.to(device) if case["lengths"] else None,
        "seq_idx": starts.cumsum(1).to(device) if case["seq_idx"] else None,
    }
    return inputs, options


def cotangents(inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch, dim, length = inputs["x"].shape
    out, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, dim, length), (batch, dim, inputs["weight"].shape[1] - 1))
    )
    return out.to(inputs["x"].device), state.to(inputs["x"].device)


def run(inputs, options, backend="torch"):
    return outputs_and_gradients(
        lambda **i: causal_conv1d(**i, **options, return_final_state=True, backend=backend),
        leaves(inputs),
        cotangents(inputs),
    )


def expected(inputs, options):
    return outputs_and_gradients(
        lambda **i: plain_loop(**i, **options), leaves(inputs, torch.float64), cotangents(inputs)
    )


@PLACES
@pytest.mark.parametrize("case", list(pairwise(OPTIONS)), ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_options_pairwise(case, dtype, backend, device):
    skip_unless_served("causal_conv1d", backend, device, dtype)
    inputs, options = make(case, dtype=dtype, device=device)
    assert_all_close(run(inputs, options, backend), expected(inputs, options), "conv")


@PLACES
@pytest.mark.parametrize("length", [0, 129, 1134])
@pytest.mark.parametrize("reverse", [False, True])
def test_sizes(length, reverse, backend, device):
    skip_unless_served("causal_conv1d", backend, device, torch.float32)
    case = EVERYTHING | {"length": length, "reverse": reverse}
    inputs, options = make(case, batch=2, dtype=torch.float32, device=device)
    assert_all_close(run(inputs, options, backend), expected(inputs, options), "conv")


@PLACES
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_torch_convolution(width, backend, device):
    skip_unless_served("causal_conv1d", backend, device, torch.float32)
    case = EVERYTHING | {"width": width, "length": 50, "reverse": False, "lengths": False, "seq_idx": False}
    inputs, options = make(case, dtype=torch.float32, device=device)

    def convolution(x, weight, bias, initial_state):
        extended = torch.cat([initial_state, x], -1)
        out = F.silu(F.conv1d(extended, weight.unsqueeze(1), bias, groups=x.shape[1]))
        return out, extended[..., extended.shape[-1] - (width - 1) :]

    want = outputs_and_gradients(convolution, leaves(inputs), cotangents(inputs))
    assert_all_close(run(inputs, options, backend), want, "conv")


@pytest.mark.parametrize("case", list(pairwise(OPTIONS)), ids=str)
def test_explicit_backward_is_autograd_of_the_reference(case):
    inputs, options = make(case)
    want = outputs_and_gradients(
        lambda **i: reference.causal_conv1d(**i, **options), leaves(inputs), cotangents(inputs)
    )
    gradients = {f"d{n}": None if t is None else torch.full_like(t, float("nan")) for n, t in inputs.items()}
    grad_out, grad_final_state = cotangents(inputs)
    silu = options.pop("activation") is not None
    reference.backward(
        grad_out=grad_out, grad_final_state=grad_final_state, **inputs, **options, silu=silu, **gradients
    )
    outputs = {name: want[name] for name in ("out", "final_state")}
    assert_all_close(outputs | {n: g for n, g in gradients.items() if g is not None}, want, "conv")


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_from_one_output_alone(used):
    inputs, options = make(EVERYTHING)
    got, want = leaves(inputs), leaves(inputs)
    causal_conv1d(**got, **options, return_final_state=True)[used].sum().backward()
    plain_loop(**want, **options)[used].sum().backward()
    for name in inputs:
        wanted = torch.zeros_like(want[name]) if want[name].grad is None else want[name].grad
        assert_close(got[name].grad, wanted, "conv_grad", name)


@PLACES
def test_strides(backend, device):
    skip_unless_served("causal_conv1d", backend, device, torch.float32)
    inputs, options = make(EVERYTHING | {"length": 37}, dtype=torch.float32, device=device)
    want = run(inputs, options, backend)

    def channels_last(t):
        return t.transpose(1, -1).contiguous().transpose(1, -1)

    def sliced(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 1 : 1 + 2 * t.shape[-1] : 2] = t
        return wide[..., 1 : 1 + 2 * t.shape[-1] : 2]

    for x_view, state_view in ((channels_last, sliced), (sliced, channels_last)):
        views = {
            "x": x_view(inputs["x"]),
            "weight": sliced(inputs["weight"]),
            "bias": sliced(inputs["bias"]),
            "initial_state": state_view(inputs["initial_state"]),
        }
        assert not any(v.is_contiguous() for v in views.values())
        got = outputs_and_gradients(
            lambda **i: causal_conv1d(**i, **options, return_final_state=True, backend=backend),
            {name: v.requires_grad_() for name, v in views.items()},
            cotangents(inputs),
        )
        assert_all_close(got, want, "conv")
    last = channels_last(inputs["x"])
    assert causal_conv1d(last, inputs["weight"], backend=backend).stride() == last.stride()


@PLACES
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read_and_gets_no_gradient(reverse, backend, device):
    skip_unless_served("causal_conv1d", backend, device, torch.float32)
    case = EVERYTHING | {"length": 40, "reverse": reverse, "lengths": False}
    inputs, options = make(case, batch=6, dtype=torch.float32, device=device)
    lengths = torch.tensor([40, 0, 1, 33, 2, 3], device=device)
    padding = (torch.arange(40, device=device) >= lengths[:, None]).unsqueeze(1)
    options |= {"lengths": lengths}
    clean, dirty = (
        run(inputs | {"x": inputs["x"].masked_fill(padding, value)}, options, backend) for value in (0, float("nan"))
    )
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    for name in ("out", "dx"):
        assert (clean[name].masked_select(padding) == 0).all(), name
    assert torch.equal(clean["final_state"][1], inputs["initial_state"][1])
    for b, n in enumerate(lengths.tolist()):  # each alone, without its padding
        out, state = causal_conv1d(
            inputs["x"][b : b + 1, :, :n],
            inputs["weight"],
            inputs["bias"],
            initial_state=inputs["initial_state"][b : b + 1],
            return_final_state=True,
            backend=backend,
            **(options | {"lengths": None, "seq_idx": options["seq_idx"][b : b + 1, :n]}),
        )
        assert torch.equal(out[0], clean["out"][b, :, :n])
        assert torch.equal(state[0], clean["final_state"][b])


@PLACES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_pieces_are_the_whole(reverse, packed, backend, device):
    skip_unless_served("causal_conv1d", backend, device, torch.float64)
    case = EVERYTHING | {"length": 30, "reverse": reverse, "lengths": False, "seq_idx": packed}
    inputs, options = make(case, device=device)
    cuts = [(0, 11), (11, 12), (12, 14), (14, 30)]
    if packed:  # no sequence starts at a cut, so that every piece continues the one before
        seq_idx = options.pop("seq_idx").clone()
        for start, _ in cuts[1:]:
            seq_idx[:, start:] -= seq_idx[:, start : start + 1] - seq_idx[:, start - 1 : start]
    else:
        seq_idx = options.pop("seq_idx")
    want = run(inputs, options | {"seq_idx": seq_idx}, backend)

    def in_pieces(x, weight, bias, initial_state):
        outs, state = [], initial_state
        for start, stop in reversed(cuts) if reverse else cuts:
            ids = None if seq_idx is None else seq_idx[:, start:stop]
            out, state = causal_conv1d(
                x[..., start:stop], weight, bias, seq_idx=ids, initial_state=state, return_final_state=True,
                backend=backend, **options,
            )  # fmt: skip
            outs.append(out)
        return torch.cat(outs[::-1] if reverse else outs, -1), state

    assert_all_close(outputs_and_gradients(in_pieces, leaves(inputs), cotangents(inputs)), want, "conv")


@PLACES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_error_is_that_of_pytorch(dtype, backend, device):
    """The error is at most twice that of the same formulas in fp32 PyTorch, rounded to the dtype at the end."""
    skip_unless_served("causal_conv1d", backend, device, dtype)
    inputs, options = make(EVERYTHING | {"length": 63}, dtype=dtype, device=device)
    got, want = run(inputs, options, backend), expected(inputs, options)

    def rounded(**i):
        out, state = plain_loop(**{k: v.float() for k, v in i.items()}, **options)
        return out.to(dtype), state.to(dtype)

    baseline = outputs_and_gradients(rounded, leaves(inputs), cotangents(inputs))
    assert got["out"].dtype == got["dx"].dtype == got["final_state"].dtype == dtype
    assert got["dweight"].dtype == torch.float32
    for name, exact in want.items():
        error, allowed = ((r[name].double() - exact).abs().max() for r in (got, baseline))
        floor = tolerance("conv", torch.float32) * exact.abs().max()
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


@PLACES
def test_runs_and_batches_agree_bitwise(backend, device):
    skip_unless_served("causal_conv1d", backend, device, torch.float32)
    inputs, options = make(EVERYTHING | {"length": 51}, batch=4, dim=33, dtype=torch.float32, device=device)
    first, second = run(inputs, options, backend), run(inputs, options, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for b in range(4):
        own = {n: options[n][b : b + 1] for n in ("lengths", "seq_idx")}
        alone = {n: inputs[n][b : b + 1] for n in ("x", "initial_state")}
        out, state = causal_conv1d(**(inputs | alone), **(options | own), return_final_state=True, backend=backend)
        assert torch.equal(out[0], first["out"][b])
        assert torch.equal(state[0], first["final_state"][b])


def test_sequences_of_a_pack_do_not_meet():
    inputs, options = make(EVERYTHING | {"length": 20, "reverse": False, "lengths": False, "seq_idx": False})
    x = inputs["x"].clone()
    x[..., :10] = float("nan")
    options["seq_idx"] = (torch.arange(20) >= 10).long().expand(3, -1)
    out, state = causal_conv1d(**(inputs | {"x": x}), **options, return_final_state=True)
    alone, alone_state = causal_conv1d(x[..., 10:], inputs["weight"], inputs["bias"], "silu", return_final_state=True)
    assert torch.equal(out[..., 10:], alone)
    assert torch.equal(state, alone_state)


def test_gradcheck():
    inputs, options = make(EVERYTHING | {"length": 6}, batch=2, dim=3)
    names = list(inputs)

    def function(*tensors):
        return causal_conv1d(**dict(zip(names, tensors, strict=True)), **options, return_final_state=True)

    assert torch.autograd.gradcheck(function, tuple(leaves(inputs).values()))


def test_double_backward_raises():
    inputs, options = make(EVERYTHING)
    x = inputs.pop("x").requires_grad_()
    (gradient,) = torch.autograd.grad(causal_conv1d(x, **inputs, **options).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiating twice is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", [EVERYTHING, EVERYTHING | dict.fromkeys(("bias", "lengths", "initial_state"), False)])
def test_opcheck(case):
    inputs, options = make(case, dtype=torch.float32)
    i32 = [None if options[n] is None else options[n].int() for n in ("lengths", "seq_idx")]
    tensors = [inputs["x"], inputs["weight"], inputs["bias"], *i32, inputs["initial_state"]]
    torch.library.opcheck(op._forward, (*tensors, True, True, None))
    tracked = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(op._forward, (*tracked, True, True, None))
    gradients = [c.float() for c in cotangents(inputs)]
    detached = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(op._backward, (*gradients, *detached, True, True, None))


def test_compiled_without_a_graph_break_equals_eager():
    inputs, options = make(EVERYTHING, dtype=torch.float32)

    def function(**i):
        return causal_conv1d(**i, **options, return_final_state=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(compiled, leaves(inputs), cotangents(inputs))
    want = outputs_and_gradients(function, leaves(inputs), cotangents(inputs))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_inputs_are_not_mutated():
    inputs, options = make(EVERYTHING | {"reverse": False, "lengths": False, "length": 1}, dtype=torch.float32)
    before = {n: t.clone() for n, t in inputs.items()}
    grads = [c.float() for c in cotangents(inputs)]
    grads_before = [g.clone() for g in grads]
    torch.autograd.backward(causal_conv1d(**leaves(inputs), **options, return_final_state=True), grads)
    causal_conv1d(**inputs, **options)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)
    assert all(torch.equal(g, b) for g, b in zip(grads, grads_before, strict=True))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
def test_empty(shape):
    batch, dim = shape
    inputs, options = make(EVERYTHING | {"lengths": False}, batch=max(batch, 1), dim=dim)
    if batch == 0:
        inputs = {n: t[:0] if t.dim() > 2 else t for n, t in inputs.items()}
        options |= {"seq_idx": options["seq_idx"][:0]}
    result = run(inputs, options)
    assert result["out"].shape == (*shape, 15)
    assert all(torch.isfinite(t).all() for t in result.values())


BAD = {
    "x of two dimensions": ({"x": torch.zeros(7, 15)}, ValueError, r"`x` must be of shape \(b, d, l\)"),
    "x no tensor": ({"x": None}, TypeError, "`x` must be a torch.Tensor"),
    "x of integers": ({"x": torch.zeros(3, 7, 15).int()}, TypeError, "`x` must be of dtype float32"),
    "weight of other channels": ({"weight": torch.zeros(6, 4)}, ValueError, r"`weight` must be of shape \(d, w\)"),
    "weight of nn.Conv1d": ({"weight": torch.zeros(7, 1, 4)}, ValueError, r"`weight` must be of shape \(d, w\)"),
    "weight without taps": ({"weight": torch.zeros(7, 0)}, ValueError, "`weight` must be of at least one tap"),
    "bias of other channels": ({"bias": torch.zeros(6)}, ValueError, "`bias` must be of shape"),
    "unknown activation": ({"activation": "gelu"}, ValueError, "`activation` must be one of None, 'silu', 'swish'"),
    "lengths too long": ({"lengths": torch.tensor([1, 2, 16])}, ValueError, "`lengths` must be between 0 and 15"),
    "lengths negative": ({"lengths": torch.tensor([-1, 2, 3])}, ValueError, "`lengths` must be between 0 and 15"),
    "lengths of floats": ({"lengths": torch.ones(3)}, TypeError, "`lengths` must be of dtype int32, int64"),
    "seq_idx of another shape": ({"seq_idx": torch.zeros(3, 14).int()}, ValueError, "`seq_idx` must be of shape"),
    "initial_state of width": ({"initial_state": torch.zeros(3, 7, 4)}, ValueError, r"`initial_state` must be .*, 3\)"),
    "another device": ({"weight": torch.zeros(7, 4, device="meta")}, ValueError, "`weight` must be on cpu"),
    "no such backend": ({"backend": "fpga"}, ValueError, "`backend` must be one of"),
    "backend of another device": ({"backend": "triton"}, RuntimeError, "backend='triton' can't serve this call"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    change, kind, message = BAD[name]
    inputs, options = make(EVERYTHING, dtype=torch.float32)
    with pytest.raises(kind, match="causal_conv1d: .*" + message):
        causal_conv1d(**(inputs | options | {"backend": "torch"} | change))


@pytest.mark.slow
@pytest.mark.skipif(native.why_missing("cpu") is not None, reason=str(native.why_missing("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_thousand_repetitions_agree_bitwise(dtype):
    """A race between threads would show in one of them; more channels than one thread takes at once."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 512, 32)
    inputs = {
        "x": torch.randn(shape, generator=generator).to(dtype).requires_grad_(),
        "weight": torch.randn(shape[1], 4, generator=generator).requires_grad_(),
        "bias": torch.randn(shape[1], generator=generator).requires_grad_(),
    }
    given = torch.randn(shape, generator=generator).to(dtype)

    def solve() -> list[Tensor]:
        out = causal_conv1d(**inputs, activation="silu", backend="cpu")
        return [out, *torch.autograd.grad(out, list(inputs.values()), given)]

    first = solve()
    for repetition in range(10_000):
        for tensor, again in zip(first, solve(), strict=True):
            assert torch.equal(tensor, again), f"repetition {repetition}"
