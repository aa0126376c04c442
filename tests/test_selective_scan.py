"""selective_scan against a plain loop, transformers and its own explicit backward: values and gradients."""

from __future__ import annotations

import pytest
import torch
from scan_cases import assert_all_close, leaves, outputs_and_gradients, places, skip_unless_served
from selective_scan_cases import CASES, EVERYTHING, cotangents, expected, make, plain_loop, run
from tolerances import assert_close, tolerance

from parrot_kernels.ops.selective_scan import selective_scan
from parrot_kernels.reference import selective_scan as reference

PLACES = pytest.mark.parametrize(("backend", "device"), places("selective_scan"))


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


@pytest.mark.sampled(8)
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
