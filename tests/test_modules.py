"""The modules against transcriptions of their formulas and against transformers' Mamba."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from parrot_kernels.modules import BiMamba, Mamba, ParallelBranchFusion, SinkhornDivergence, SinkhornHadamard
from parrot_kernels.ops.sinkhorn_hadamard import sinkhorn_hadamard

# --- Mamba


def mamba_step_by_step(weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """The block's formulas, one sequence and one step at a time."""
    inner, state = weights["A_log"].shape
    rank = weights["dt_proj.weight"].shape[1]
    taps = weights["conv1d.weight"].shape[-1]
    outputs = []
    for u in hidden:
        x, z = (u @ weights["in_proj.weight"].T).split(inner, dim=-1)
        past, h, rows = torch.zeros(taps, inner, dtype=u.dtype), torch.zeros(inner, state, dtype=u.dtype), []
        for t in range(len(u)):
            past = torch.cat([past[1:], x[t][None]])
            x_t = F.silu((past * weights["conv1d.weight"][:, 0].T).sum(0) + weights["conv1d.bias"])
            d, B, C = (weights["x_proj.weight"] @ x_t).split([rank, state, state])
            delta = F.softplus(weights["dt_proj.weight"] @ d + weights["dt_proj.bias"])
            decay = torch.exp(delta[:, None] * -torch.exp(weights["A_log"]))
            h = decay * h + (delta * x_t)[:, None] * B
            rows.append(weights["out_proj.weight"] @ ((h @ C + weights["D"] * x_t) * F.silu(z[t])))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("d_model", "length", "options"),
    [
        (8, 13, {}),
        (12, 7, {"d_state": 24, "expand": 3}),
        (5, 1, {"d_state": 3, "d_conv": 2, "dt_rank": 4}),
        (33, 6, {"expand": 1.5, "d_conv": 3, "dt_init": "constant"}),
    ],
)
def test_mamba_computes_its_formulas(d_model, length, options):
    block = Mamba(d_model, **options, dtype=torch.float64)
    hidden = torch.randn(2, length, d_model, dtype=torch.float64)
    assert_close(block(hidden), mamba_step_by_step(block.state_dict(), hidden), "scan")


def test_mamba_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    block = Mamba(20, d_state=24, expand=3)
    config = transformers.MambaConfig(hidden_size=20, state_size=24, expand=3, use_mambapy=False)
    mixer = MambaMixer(config, layer_idx=0).eval()
    mixer.load_state_dict(block.state_dict())  # strict: the same keys and shapes
    hidden = torch.randn(3, 17, 20)
    want = getattr(mixer, "slow_forward", mixer)(hidden)  # older versions name their plain path
    assert_close(block(hidden), want, "scan")

    cotangent = torch.randn_like(want)
    want.backward(cotangent)
    block(hidden).backward(cotangent)
    wanted = dict(mixer.named_parameters())
    for name, weight in block.named_parameters():
        assert_close(weight.grad, wanted[name].grad, "scan_grad", name)


def test_mamba_starts_as_mamba_ssm_does():
    block = Mamba(64, d_state=24, expand=3, bias=True)
    shapes = {name: tuple(weight.shape) for name, weight in block.state_dict().items()}
    assert shapes == {
        "A_log": (192, 24),
        "D": (192,),
        "in_proj.weight": (384, 64),
        "in_proj.bias": (384,),
        "conv1d.weight": (192, 1, 4),
        "conv1d.bias": (192,),
        "x_proj.weight": (4 + 48, 192),
        "dt_proj.weight": (192, 4),
        "dt_proj.bias": (192,),
        "out_proj.weight": (64, 192),
        "out_proj.bias": (64,),
    }
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 25).expand(192, 24))
    assert (block.D == 1).all()
    delta = F.softplus(block.dt_proj.bias)
    assert delta.min() >= 0.99e-3
    assert delta.max() <= 1.01e-1
    assert delta.log().std() > 1  # spread over the two decades
    assert block.dt_proj.weight.abs().max() <= 4**-0.5


def test_mamba_ignores_padding_whatever_it_holds():
    block = Mamba(6, dtype=torch.float64)
    lengths = torch.tensor([5, 0, 9, 1])
    hidden = torch.randn(4, 9, 6, dtype=torch.float64)
    for row, length in zip(hidden, lengths, strict=True):
        row[length:] = float("nan")
    hidden.requires_grad_()
    for reverse in (False, True):
        block.zero_grad()
        hidden.grad = None
        out = block(hidden, lengths=lengths, reverse=reverse)
        out.square().sum().backward()
        got = {name: weight.grad.clone() for name, weight in block.named_parameters()}
        block.zero_grad()
        for i, length in enumerate(lengths.tolist()):
            assert (out[i, length:] == 0).all()
            assert (hidden.grad[i, length:] == 0).all()
            alone = hidden[i : i + 1, :length].detach()
            single = block(alone.flip(1)).flip(1) if reverse else block(alone)
            assert_close(out[i : i + 1, :length], single, "scan", f"sequence {i}")
            single.square().sum().backward()
        for name, weight in block.named_parameters():
            assert_close(got[name], weight.grad, "scan_grad", name)


def test_mamba_keeps_packed_sequences_apart():
    block = Mamba(6, dtype=torch.float64)
    pieces = [torch.randn(1, length, 6, dtype=torch.float64) for length in (4, 1, 6)]
    seq_idx = torch.tensor([[0] * 4 + [1] + [2] * 6])
    packed = block(torch.cat(pieces, dim=1), seq_idx=seq_idx)
    assert_close(packed, torch.cat([block(piece) for piece in pieces], dim=1), "scan")


def test_mamba_gradients():
    block = Mamba(4, d_state=3, dtype=torch.float64)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    names = list(dict(block.named_parameters()))
    weights = [weight.detach().clone().requires_grad_() for weight in block.parameters()]

    def run(hidden, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), hidden)

    assert torch.autograd.gradcheck(run, (hidden, *weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mamba_in_half_precision_keeps_the_recurrence_in_full(dtype):
    block = Mamba(16, dtype=dtype)
    assert block.A_log.dtype == block.D.dtype == torch.float32
    hidden = torch.randn(2, 9, 16, dtype=dtype)
    weights = {name: weight.double() for name, weight in block.state_dict().items()}
    # Four half-precision projections round one after another.
    assert_close(block(hidden), mamba_step_by_step(weights, hidden.double()), "scan", scale=4)


def test_mamba_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"`hidden` must be of shape \(B, L, 6\)"):
        Mamba(6)(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="`dt_init` must be one of 'random', 'constant'"):
        Mamba(6, dt_init="zeros")
    with pytest.raises(RuntimeError, match="backend='cuda'"):
        Mamba(6, backend="cuda")(torch.zeros(2, 3, 6))


# --- Mamba in pieces


@dataclass
class Generation:
    """What mamba-ssm's models pass as inference_params."""

    seqlen_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)


STEPPED = [
    (8, {}),
    (12, {"d_state": 24, "expand": 3, "bias": True}),
    (5, {"d_state": 3, "d_conv": 2, "dt_rank": 4, "expand": 1.5}),
    (6, {"d_conv": 1, "conv_bias": False}),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("d_model", "options"), STEPPED)
def test_mamba_step_by_step_is_the_whole(d_model, options, batch):
    block = Mamba(d_model, **options, dtype=torch.float64)
    hidden = torch.randn(batch, 9, d_model, dtype=torch.float64)
    states = block.allocate_inference_cache(batch, 9)
    assert states[0].shape == (batch, block.d_inner, block.d_conv)
    assert states[1].shape == (batch, block.d_inner, block.d_state)
    assert not any(state.any() for state in states)
    outputs = []
    for t in range(9):
        out, *got = block.step(hidden[:, t : t + 1], *states)
        assert out.shape == (batch, 1, d_model)
        assert all(new is old for new, old in zip(got, states, strict=True))  # updated in place
        outputs.append(out)
    assert_close(torch.cat(outputs, 1), block(hidden), "scan")
    inputs = block.in_proj(hidden).chunk(2, dim=-1)[0].transpose(1, 2)
    assert_close(states[0], inputs[..., -block.d_conv :], "scan", "as mamba-ssm keeps it, the newest last")


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 1, 3], [1, 8], [2, 0, 7]], ids=str)
def test_mamba_prefill_and_generation_are_the_whole(pieces):
    layers = [Mamba(6, layer_idx=i, dtype=torch.float64) for i in range(2)]
    hidden = torch.randn(2, 9, 6, dtype=torch.float64)
    generation, outputs = Generation(), []
    for piece in hidden.split(pieces, dim=1):
        outputs.append(layers[1](layers[0](piece, generation), inference_params=generation))
        generation.seqlen_offset += piece.shape[1]
    assert_close(torch.cat(outputs, 1), layers[1](layers[0](hidden)), "scan")
    assert set(generation.key_value_memory_dict) == {0, 1}

    generation.seqlen_offset = 0  # the next text starts afresh, in the same memory
    states = [state for layer in generation.key_value_memory_dict.values() for state in layer]
    again = layers[0](hidden[:, :5], inference_params=generation)
    assert_close(again, layers[0](hidden[:, :5]), "scan")
    held = [state for layer in generation.key_value_memory_dict.values() for state in layer]
    assert all(now is before for now, before in zip(held, states, strict=True))


def test_mamba_in_pieces_has_gradients_within_a_piece():
    block = Mamba(6, dtype=torch.float64)
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    states = block.allocate_inference_cache(2)
    block.step(hidden[:, :3], *states)
    out, *_ = block.step(hidden[:, 3:], *states)
    out.square().sum().backward()  # the states were overwritten in the meantime
    assert not any(state.requires_grad for state in states)
    got = {name: weight.grad.clone() for name, weight in block.named_parameters()}

    block.zero_grad()
    with torch.no_grad():
        before = [state.clone() for state in block.allocate_inference_cache(2)]
        block.step(hidden[:, :3], *before)
    x, z = block.in_proj(hidden[:, 3:]).transpose(1, 2).chunk(2, dim=1)
    weight, bias = block.conv1d.weight, block.conv1d.bias
    u = F.silu(F.conv1d(torch.cat([before[0][..., 1:], x], -1), weight, bias, groups=block.d_inner))
    d, B, C = block.x_proj(u.transpose(1, 2)).split([block.dt_rank, block.d_state, block.d_state], dim=-1)
    delta, h, rows = F.softplus(block.dt_proj(d)), before[1], []
    for t in range(4):
        dt = delta[:, t, :, None]
        h = torch.exp(dt * -block.A_log.exp()) * h + dt * u[:, :, t, None] * B[:, t, None]
        rows.append((h @ C[:, t, :, None])[..., 0] + block.D * u[..., t])
    want = block.out_proj(torch.stack(rows, 1) * F.silu(z.transpose(1, 2)))
    assert_close(out, want, "scan")
    want.square().sum().backward()
    for name, weight in block.named_parameters():
        assert_close(got[name], weight.grad, "scan_grad", name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mamba_cache_in_half_precision(dtype):
    block = Mamba(16, dtype=dtype)
    conv_state, ssm_state = block.allocate_inference_cache(2, 9)
    assert (conv_state.dtype, ssm_state.dtype) == (dtype, torch.float32)
    hidden = torch.randn(2, 9, 16, dtype=dtype)
    outputs = [block.step(hidden[:, t : t + 1], conv_state, ssm_state)[0] for t in range(9)]
    assert_close(torch.cat(outputs, 1), block(hidden), "scan", scale=4)
    assert {state.dtype for state in block.allocate_inference_cache(2, 9, dtype=torch.float32)} == {torch.float32}


def test_mamba_takes_the_arguments_of_mamba_ssm_in_their_order():
    theirs = "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias"
    theirs = [*theirs.split(), "use_fast_path", "layer_idx", "device", "dtype"]
    assert list(inspect.signature(Mamba).parameters)[: len(theirs)] == theirs


def test_mamba_in_pieces_says_what_is_wrong():
    block, hidden = Mamba(6, layer_idx=0), torch.zeros(2, 3, 6)
    with pytest.raises(ValueError, match=r"`conv_state` must be of shape \(2, 12, 4\)"):
        block.step(hidden, *block.allocate_inference_cache(3))
    with pytest.raises(ValueError, match=r"`ssm_state` must be of shape \(2, 12, 16\)"):
        block.step(hidden, torch.zeros(2, 12, 4), torch.zeros(2, 12, 8))
    with pytest.raises(ValueError, match="`layer_idx` must be an int"):
        Mamba(6)(hidden, Generation())
    for option in ({"reverse": True}, {"lengths": torch.tensor([1, 2])}, {"seq_idx": torch.zeros(2, 3).int()}):
        with pytest.raises(ValueError, match="`inference_params` must be None with `lengths`"):
            block(hidden, Generation(), **option)


# --- SinkhornHadamard


def test_sinkhorn_hadamard_is_the_op_with_options():
    options = {"cost": "cosine", "cost_scale": 0.5, "eps": 0.2, "n_iters": 7, "reach": (None, 1.0), "tol": 1e-9}
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    module = SinkhornHadamard(**options, gradient="implicit", return_plan=True)
    assert not list(module.parameters())
    assert "eps=0.2" in repr(module)
    got, want = module(x, y), sinkhorn_hadamard(x, y, **options, return_plan=True)
    for name, value in want._asdict().items():
        assert torch.equal(getattr(got, name), value), name


def test_sinkhorn_hadamard_takes_an_option_per_call():
    x, y = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    overrides = {"x_lengths": torch.tensor([3, 5]), "cost": torch.rand(2, 5, 6), "eps": torch.tensor([0.1, 0.3])}
    module = SinkhornHadamard(n_iters=9)
    got, want = module(x, y, **overrides), sinkhorn_hadamard(x, y, n_iters=9, **overrides)
    assert torch.equal(got.y_to_x, want.y_to_x)
    assert module(x, y).plan is None
    assert module(x, y, return_plan=True).plan.shape == (2, 5, 6)
    with pytest.raises(TypeError, match="epsilon"):
        SinkhornHadamard(epsilon=0.1)


# --- ParallelBranchFusion


@pytest.mark.parametrize("module", [SinkhornHadamard, SinkhornDivergence, ParallelBranchFusion])
def test_a_wrong_option_is_refused_at_once(module):
    with pytest.raises(ValueError, match="`n_iters` must be at least 1; got 0"):
        module(n_iters=0)
    with pytest.raises(ValueError, match="`backend` must be one of None, 'cpu'"):
        module(backend="c++")
    option = "blur" if module is SinkhornDivergence else "eps"
    with pytest.raises(ValueError, match=f"`{option}` must be a positive number; got -1"):
        module(**{option: -1})


def test_fused_row_of_parrot():
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    fusion = ParallelBranchFusion(eps=0.1)
    solved = sinkhorn_hadamard(x, y, eps=0.1)
    want = torch.cat([x * y, solved.x_to_y, y, solved.y_to_x, x], dim=1)
    assert torch.equal(fusion(x, y), want)
    assert fusion.width(3) == 15
    plan = fusion.plan(x, y)
    torch.testing.assert_close(solved.y_to_x, 7 * plan @ y)
    torch.testing.assert_close(solved.x_to_y, 7 * plan.T @ x)


def test_fusion_of_a_batch_is_that_of_its_problems():
    x, y = torch.randn(4, 7, 3), torch.randn(4, 7, 3)
    fusion = ParallelBranchFusion()
    got = fusion(x, y)
    assert got.shape == (4, 7, 15)
    for i in range(4):
        assert torch.equal(got[i], fusion(x[i], y[i]))


@pytest.mark.parametrize("parts", [("x", "y"), ("hadamard",), ("y", "hadamard", "x", "x")])
def test_fusion_without_transport_solves_none(parts, monkeypatch):
    fusion = ParallelBranchFusion(parts)
    monkeypatch.setattr(fusion.transport, "forward", None)  # calling it fails
    x, y = torch.randn(5, 2), torch.randn(5, 2)
    branches = {"x": x, "y": y, "hadamard": x * y}
    assert torch.equal(fusion(x, y), torch.cat([branches[part] for part in parts], dim=1))
    assert fusion.width(2) == 2 * len(parts)


def test_fusion_is_permutation_equivariant():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    order = torch.randperm(9)
    fusion = ParallelBranchFusion()
    assert_close(fusion(x[order], y[order]), fusion(x, y)[order], "sinkhorn")


def test_fusion_of_one_row_and_of_none():
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    assert_close(ParallelBranchFusion()(x, y), torch.cat([x * y, x, y, y, x], dim=1), "sinkhorn")
    assert ParallelBranchFusion()(x[:0], y[:0]).shape == (0, 20)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
def test_fusion_gradients(gradient):
    x, y = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fusion = ParallelBranchFusion(eps=0.3, n_iters=400 if gradient == "implicit" else 5, gradient=gradient)
    if gradient == "detached":
        plan = fusion.plan(x, y).detach()
        want = torch.cat([x * y, 4 * plan.T @ x, y, 4 * plan @ y, x], dim=1)
        cotangent = torch.randn_like(want)
        got = torch.autograd.grad(fusion(x, y), (x, y), cotangent)
        for g, w in zip(got, torch.autograd.grad(want, (x, y), cotangent), strict=True):
            assert_close(g, w, "sinkhorn_grad")
    else:
        # The scale of the cost is a constant to the gradient, which finite differences would see move.
        fusion.transport.options["cost_scale"] = 2.0
        assert torch.autograd.gradcheck(fusion, (x, y))


def test_fusion_says_what_is_wrong():
    with pytest.raises(ValueError, match="`parts` must be one of 'hadamard', 'x_to_y'"):
        ParallelBranchFusion(("x", "z"))
    with pytest.raises(ValueError, match="`parts` must be at least one of"):
        ParallelBranchFusion(())
    with pytest.raises(ValueError, match=r"`y` must be of x's shape \(5, 2\); got \(4, 2\)"):
        ParallelBranchFusion()(torch.zeros(5, 2), torch.zeros(4, 2))


@pytest.mark.parametrize("block", [Mamba, BiMamba])
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3, 2], TypeError, "`lengths` must be a torch.Tensor; got list"),
        (torch.tensor([3.0, 2.0]), TypeError, "`lengths` must be of dtype int32, int64; got float32"),
        (torch.tensor([[3], [2]]), ValueError, r"`lengths` must be of shape \(B\)"),
    ],
)
def test_bad_lengths(block, lengths, error, message):
    with pytest.raises(error, match=f"{block.__name__}: {message}"):
        block(8)(torch.randn(2, 3, 8), lengths=lengths)
