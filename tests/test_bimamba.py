"""BiMamba and the mixers of Vim's and SSAMBA's code against their formulas, sequence by sequence, in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close
from torch import nn

from parrot_kernels import compat
from parrot_kernels.compat import mamba_layers
from parrot_kernels.modules import BiMamba, Mamba


def one_direction(weights, xz, suffix):
    """Convolution, recurrence and gate of one sequence (L, 2 d_inner), first step first."""
    A = -weights[f"A{suffix}_log"].exp()
    x, z = xz.chunk(2, dim=-1)
    taps = weights[f"conv1d{suffix}.weight"][:, 0]
    padded = torch.cat([x.new_zeros(taps.shape[1] - 1, x.shape[1]), x])
    projection, rows = weights[f"x_proj{suffix}.weight"], []
    rank, h = weights[f"dt_proj{suffix}.weight"].shape[1], torch.zeros_like(A)
    for t in range(len(x)):
        u = (padded[t : t + taps.shape[1]] * taps.T).sum(0)
        u = F.silu(u + weights[f"conv1d{suffix}.bias"] if f"conv1d{suffix}.bias" in weights else u)
        d, B, C = (projection @ u).split([rank, A.shape[1], A.shape[1]])
        delta = F.softplus(weights[f"dt_proj{suffix}.weight"] @ d + weights[f"dt_proj{suffix}.bias"])
        h = torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
        rows.append((h @ C + weights[f"D{suffix}"] * u) * F.silu(z[t]))
    return torch.stack(rows) if rows else torch.zeros_like(x)


def plain(weights, hidden, divide=True):
    """Vim's bidirectional block, version 2, with flips."""
    outputs = []
    for sequence in hidden:
        xz = F.linear(sequence, weights["in_proj.weight"], weights.get("in_proj.bias"))
        y = one_direction(weights, xz, "") + one_direction(weights, xz.flip(0), "_b").flip(0)
        outputs.append(F.linear(y / 2 if divide else y, weights["out_proj.weight"], weights.get("out_proj.bias")))
    return torch.stack(outputs)


CASES = [  # batch, length, d_model, options
    (2, 13, 8, {}),
    (1, 7, 12, {"d_state": 24, "expand": 3, "if_divide_out": False}),
    (3, 1, 5, {"d_state": 3, "d_conv": 2, "dt_rank": 4}),
    (1, 1, 9, {"conv_bias": False}),
    (2, 6, 33, {"expand": 1.5, "d_conv": 3, "dt_init": "constant", "bias": True}),
]


@pytest.mark.parametrize(("batch", "length", "d_model", "options"), CASES, ids=str)
def test_outputs_and_gradients(batch, length, d_model, options):
    block = BiMamba(d_model, **options, dtype=torch.float64)
    for weight in block.parameters():  # both directions initially share A and D
        nn.init.normal_(weight, std=0.5)
    hidden = torch.randn(batch, length, d_model, dtype=torch.float64, requires_grad=True)
    weights = dict(block.named_parameters())
    got, want = block(hidden), plain(weights, hidden, options.get("if_divide_out", True))
    assert_close(got, want, "scan")
    leaves, cotangent = [hidden, *weights.values()], torch.randn_like(want)
    got, want = (torch.autograd.grad(out, leaves, cotangent) for out in (got, want))
    for name, g, w in zip(["hidden", *weights], got, want, strict=True):
        assert w.any() or (length == 1 and name.endswith("_log")), name  # the first step has no state to decay
        assert_close(g, w, "scan_grad", name)


def test_state_dict_is_that_of_ssamba():
    mixer = BiMamba(192)  # SSAMBA tiny
    inner = {"": "", "_b": "_b"}
    want = {"in_proj.weight": (768, 192), "out_proj.weight": (192, 384)}
    for suffix in inner:
        want |= {
            f"A{suffix}_log": (384, 16),
            f"D{suffix}": (384,),
            f"conv1d{suffix}.weight": (384, 1, 4),
            f"conv1d{suffix}.bias": (384,),
            f"x_proj{suffix}.weight": (12 + 32, 384),
            f"dt_proj{suffix}.weight": (384, 12),
            f"dt_proj{suffix}.bias": (384,),
        }
    assert {name: tuple(weight.shape) for name, weight in mixer.state_dict().items()} == want
    # Optimizers number the parameters: in the order of Vim's an optimizer's state loads too.
    order = "in_proj conv1d x_proj dt_proj conv1d_b x_proj_b dt_proj_b out_proj"
    assert [name for name, _ in mixer.named_children()] == order.split()


def test_both_directions_start_as_mamba_does():
    block = BiMamba(64, d_state=24, dtype=torch.bfloat16)
    for suffix in ("", "_b"):
        A_log, D = getattr(block, f"A{suffix}_log"), getattr(block, f"D{suffix}")
        assert A_log.dtype == D.dtype == torch.float32
        assert A_log._no_weight_decay
        assert D._no_weight_decay
        torch.testing.assert_close(A_log.exp(), torch.arange(1.0, 25).expand(128, 24))
        bias = getattr(block, f"dt_proj{suffix}").bias
        assert bias._no_reinit
        delta = F.softplus(bias.float())
        assert delta.min() >= 0.9e-3
        assert delta.max() <= 1.1e-1
    assert not torch.equal(block.dt_proj.bias, block.dt_proj_b.bias)


def test_ignores_padding_whatever_it_holds():
    block = BiMamba(6, dtype=torch.float64)
    lengths = torch.tensor([5, 0, 9, 1])
    hidden = torch.randn(4, 9, 6, dtype=torch.float64)
    for row, length in zip(hidden, lengths, strict=True):
        row[length:] = float("nan")
    hidden.requires_grad_()
    out = block(hidden, lengths=lengths)
    out.square().sum().backward()
    got = {name: weight.grad.clone() for name, weight in block.named_parameters()}
    block.zero_grad()
    for i, length in enumerate(lengths.tolist()):
        assert (out[i, length:] == 0).all()
        assert (hidden.grad[i, length:] == 0).all()
        alone = block(hidden[i : i + 1, :length].detach())
        assert_close(out[i : i + 1, :length], alone, "scan", f"sequence {i}")
        alone.square().sum().backward()
    for name, weight in block.named_parameters():
        assert_close(got[name], weight.grad, "scan_grad", name)


def test_keeps_packed_sequences_apart():
    block = BiMamba(6, dtype=torch.float64)
    pieces = [torch.randn(1, length, 6, dtype=torch.float64) for length in (4, 1, 6)]
    seq_idx = torch.tensor([[0] * 4 + [1] + [2] * 6])
    packed = block(torch.cat(pieces, dim=1), seq_idx=seq_idx)
    assert_close(packed, torch.cat([block(piece) for piece in pieces], dim=1), "scan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_recurrence_in_full(dtype):
    block = BiMamba(16, dtype=dtype)
    hidden = torch.randn(2, 9, 16, dtype=dtype)
    weights = {name: weight.double() for name, weight in block.state_dict().items()}
    assert_close(block(hidden), plain(weights, hidden.double()), "scan", scale=4)


def test_either_spelling_decides_on_the_division():
    weights, hidden = BiMamba(6).state_dict(), torch.randn(2, 5, 6)

    def run(make, **options):
        block = make(6, **options)
        block.load_state_dict(weights)
        return block(hidden)

    half, full = run(BiMamba), run(BiMamba, if_divide_out=False)
    assert_close(half, full / 2, "scan")
    assert torch.equal(run(BiMamba, if_devide_out=True), half)
    assert torch.equal(run(BiMamba, if_devide_out=False), full)
    theirs = partial(mamba_layers.Mamba, bimamba_type="v2")
    assert torch.equal(run(theirs), full)  # the default of Vim's constructor
    assert torch.equal(run(theirs, if_divide_out=True), half)
    assert torch.equal(run(theirs, if_devide_out=True), half)


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"BiMamba: `hidden` must be of shape \(B, L, 6\)"):
        BiMamba(6)(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="BiMamba: `dt_init` must be one of"):
        BiMamba(6, dt_init="zeros")
    with pytest.raises(ValueError, match="`bimamba_type` must be one of 'none', 'v2'"):
        mamba_layers.Mamba(6, bimamba_type="v3")
    block = mamba_layers.Mamba(6, bimamba_type="v2", layer_idx=0)
    with pytest.raises(NotImplementedError, match="`inference_params` runs sequences in pieces"):
        block(torch.zeros(2, 3, 6), inference_params=object())
    with pytest.raises(NotImplementedError, match="`step` runs sequences in pieces"):
        block.step(torch.zeros(2, 1, 6), *block.allocate_inference_cache(2))


def test_layer_scale():
    block = mamba_layers.Mamba(6, bimamba_type="v2", init_layer_scale=0.25, dtype=torch.float64)
    assert torch.equal(block.gamma, torch.full((6,), 0.25, dtype=torch.float64))
    nn.init.normal_(block.gamma)
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    assert_close(block(hidden), plain(block.state_dict(), hidden, divide=False) * block.gamma, "scan")

    causal = mamba_layers.Mamba(6, init_layer_scale=0.25, dtype=torch.float64)
    nn.init.normal_(causal.gamma)
    states = causal.allocate_inference_cache(2, 5)
    steps = [causal.step(hidden[:, t : t + 1], *states)[0] for t in range(5)]
    assert_close(torch.cat(steps, 1), causal(hidden), "scan")
    unscaled = Mamba(6, dtype=torch.float64)
    unscaled.load_state_dict({name: weight for name, weight in causal.state_dict().items() if name != "gamma"})
    assert_close(causal(hidden), unscaled(hidden) * causal.gamma, "scan")


@pytest.fixture
def vim_layer():
    """A layer as Vim's models make them from ``mamba_ssm``: add, norm, mix."""
    compat.install(override=True)
    from mamba_ssm.modules.mamba_simple import Mamba as Mixer
    from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn

    class Layer(nn.Module):
        def __init__(self, d_model, rms_norm, index, **options):
            super().__init__()
            self.mixer = partial(Mixer, d_state=16, layer_idx=index, init_layer_scale=None, **options)(d_model)
            self.norm = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=1e-5)
            self.add_norm = rms_norm_fn if rms_norm else layer_norm_fn

        def forward(self, hidden, residual=None):
            norm = self.norm
            hidden, residual = self.add_norm(
                hidden, norm.weight, norm.bias, residual=residual, prenorm=True, residual_in_fp32=True, eps=norm.eps
            )
            return self.mixer(hidden, inference_params=None), residual

    yield Layer
    compat.uninstall()


@pytest.mark.parametrize("rms_norm", [True, False])
@pytest.mark.parametrize("spelling", ["if_divide_out", "if_devide_out"])
def test_runs_models_in_the_style_of_vim_and_ssamba(vim_layer, spelling, rms_norm):
    options = {"bimamba_type": "v2", spelling: True, "device": None, "dtype": torch.float64}
    forward, backward = (vim_layer(8, rms_norm, index, **options).double() for index in range(2))
    hidden = residual = torch.randn(2, 5, 8, dtype=torch.float64)
    # SSAMBA's if_bidirectional: layers in pairs, the second on the flipped sequence.
    (h_f, r_f), (h_b, r_b) = forward(hidden, residual), backward(hidden.flip(1), residual.flip(1))
    got = h_f + h_b.flip(1) + r_f + r_b.flip(1)

    def normed(x):
        return F.rms_norm(x, (8,), eps=1e-5) if rms_norm else F.layer_norm(x, (8,), eps=1e-5)

    total = 2 * hidden
    want = plain(forward.mixer.state_dict(), normed(total)) + 2 * total
    want += plain(backward.mixer.state_dict(), normed(total.flip(1))).flip(1)
    assert_close(got, want, "scan")


def test_there_are_no_single_steps():
    block = BiMamba(8, d_state=4)
    with pytest.raises(NotImplementedError, match="whole sequence"):
        block.allocate_inference_cache(2)
    with pytest.raises(NotImplementedError, match="whole sequence"):
        block.step(torch.zeros(2, 1, 8), torch.zeros(2, 16, 4), torch.zeros(2, 16, 4))
