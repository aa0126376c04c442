"""The stand-ins for mamba-ssm and causal-conv1d: signatures, import names, and the values of the former."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from parrot_kernels import compat, modules
from parrot_kernels.compat import causal_conv1d as conv
from parrot_kernels.compat import mamba_layers
from parrot_kernels.compat import mamba_ssm as mamba

# As published: mamba-ssm 2.2.4 (but for prev_state, which is ours), causal-conv1d 1.5.0; the last two from the fork
# behind Vim and SSAMBA.
INNER = (
    "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D delta_bias "
    "B_proj_bias C_proj_bias delta_softplus"
)
SIGNATURES = {
    mamba.selective_scan_fn: "u delta A B C D z delta_bias delta_softplus return_last_state prev_state",
    mamba.selective_scan_ref: "u delta A B C D z delta_bias delta_softplus return_last_state prev_state",
    mamba.mamba_inner_fn: f"{INNER} checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps",
    mamba.mamba_inner_ref: INNER,
    mamba.selective_state_update: "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    conv.causal_conv1d_fn: ("x weight bias seq_idx initial_states return_final_states final_states_out activation"),
    conv.causal_conv1d_ref: "x weight bias initial_states return_final_states final_states_out activation",
    conv.causal_conv1d_update: "x conv_state weight bias activation cache_seqlens conv_state_indices",
    conv.causal_conv1d_update_ref: "x conv_state weight bias activation cache_seqlens",
    conv.causal_conv1d_varlen_states: "x cu_seqlens state_len",
    mamba.bimamba_inner_fn: INNER.replace(" A ", " A A_b "),
    mamba.mamba_inner_fn_no_out_proj: INNER.replace("out_proj_weight out_proj_bias ", ""),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    assert list(inspect.signature(function).parameters) == SIGNATURES[function].split()


def gradients(out, leaves, grad):
    return torch.autograd.grad(out, [t for t in leaves if t is not None], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("length", [1, 128, 372])
def test_selective_scan(dtype, groups, length):
    batch, dim, states = 2, 4, 8
    matrix = (batch, states, length) if groups is None else (batch, groups, states, length)
    leaves = [
        torch.randn(batch, dim, length, dtype=dtype),
        0.5 * torch.rand(batch, dim, length, dtype=dtype),
        -0.5 * torch.rand(dim, states),
        torch.randn(matrix, dtype=dtype),
        torch.randn(matrix, dtype=dtype),
        torch.randn(dim),
        torch.randn(batch, dim, length, dtype=dtype),
        0.5 * torch.rand(dim),
    ]
    leaves = [t.requires_grad_() for t in leaves]
    results = []
    for function in (mamba.selective_scan_fn, mamba.selective_scan_ref):
        out, last_state = function(*leaves, delta_softplus=True, return_last_state=True)
        assert out.dtype == dtype
        assert last_state.dtype == torch.float32
        total = out.float().sum() + last_state.square().sum()  # the gradient of the last state counts
        results.append([out, last_state, *torch.autograd.grad(total, leaves)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_close(got, want, "scan_grad", str(i))
    assert torch.equal(mamba.selective_scan_fn(*leaves, True), results[0][0])


def test_mixed_dtypes_run_in_the_widest():
    u, delta = torch.randn(2, 4, 9, dtype=torch.bfloat16), torch.rand(2, 4, 9)
    A, B = -torch.rand(4, 8), torch.randn(2, 8, 9, dtype=torch.bfloat16)
    out = mamba.selective_scan_fn(u, delta, A, B, B)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, mamba.selective_scan_fn(u.float(), delta, A, B.float(), B.float()).bfloat16())


def complex_inputs(batch=2, dim=4, states=3, length=9, groups=2):
    real = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(5)}
    u, delta, z = (torch.randn(batch, dim, length, **real) for _ in range(3))
    A = torch.complex(-torch.rand(dim, states, **real), torch.randn(dim, states, **real))
    B = torch.randn(batch, groups, states, 2 * length, **real)
    C = torch.randn(dim, states, dtype=torch.complex128, generator=real["generator"])
    return u, delta, A, B, C, torch.randn(dim, **real), z, torch.randn(dim, **real)


def test_complex_A_against_the_convolution_it_is():
    u, delta, A, B, C, D, z, bias = complex_inputs()
    out, last = mamba.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, return_last_state=True)
    dt = F.softplus(delta + bias[:, None])
    passed = dt.cumsum(-1)  # h_t = sum over s <= t of exp(A (dt_{s+1} + ... + dt_t)) dt_s B_s u_s
    gaps = (passed.unsqueeze(-1) - passed.unsqueeze(-2)).tril()
    B_steps = torch.view_as_complex(B.unflatten(-1, (-1, 2))).repeat_interleave(2, 1)
    states = torch.einsum(
        "bdtsn,bds,bdns->bdtn",
        torch.exp(gaps.unsqueeze(-1) * A[:, None, None]) * torch.ones(9, 9).tril()[..., None],
        (dt * u).to(A.dtype),
        B_steps,
    )
    want = (2 * torch.einsum("bdtn,dn->bdt", states, C).real + D[:, None] * u) * F.silu(z)
    assert_close(out, want, "scan")
    assert_close(torch.view_as_real(last), torch.view_as_real(states[:, :, -1]), "scan")


def test_complex_A_in_pieces_and_its_gradients():
    u, delta, A, B, C, D, z, bias = complex_inputs()
    whole = mamba.selective_scan_fn(u, delta, A, B, C, D, z, bias, True)
    state, pieces = None, []
    for piece in (slice(0, 4), slice(4, 9)):
        double = slice(2 * piece.start, 2 * piece.stop)
        steps = u[..., piece], delta[..., piece], A, B[..., double], C, D, z[..., piece], bias, True, True
        out, state = mamba.selective_scan_fn(*steps, prev_state=state)
        pieces.append(out)
    assert_close(torch.cat(pieces, -1), whole, "scan")

    inputs = [t.requires_grad_() for t in complex_inputs(batch=1, dim=2, states=2, length=3)]
    assert torch.autograd.gradcheck(lambda *t: mamba.selective_scan_fn(*t, delta_softplus=True), inputs)


def test_a_scan_in_pieces():
    generator = torch.Generator().manual_seed(6)
    u, delta = torch.randn(2, 2, 3, 10, generator=generator)
    A, B, C = -torch.rand(3, 4, generator=generator), *torch.randn(2, 2, 4, 10, generator=generator)
    for scan in (mamba.selective_scan_fn, mamba.selective_scan_ref):
        whole, last = scan(u, delta, A, B, C, return_last_state=True)
        first, state = scan(u[..., :6], delta[..., :6], A, B[..., :6], C[..., :6], return_last_state=True)
        rest, state = scan(
            u[..., 6:], delta[..., 6:], A, B[..., 6:], C[..., 6:], return_last_state=True, prev_state=state
        )
        assert_close(torch.cat([first, rest], -1), whole, "scan")
        assert_close(state, last, "scan")


@pytest.mark.parametrize("projected", ["B", "C", "both"])
def test_inner_fn_with_a_complex_A(projected):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=dtype)

    batch, dim, states, rank, length = 2, 3, 2, 2, 5
    A = torch.complex(-torch.rand(dim, states, generator=generator), normal(dim, states).float()).to(torch.complex128)
    xz, conv = normal(batch, 2 * dim, length), normal(dim, 1, 3)
    x_proj = normal(rank + 2 * states * (2 if projected == "both" else 1), dim)
    dt_proj, out_proj = normal(dim, rank), normal(4, dim)
    B = None if projected != "C" else normal(dim, states, dtype=torch.complex128)
    C = None if projected != "B" else normal(dim, states, dtype=torch.complex128)
    out = mamba.mamba_inner_fn(xz, conv, None, x_proj, dt_proj, out_proj, None, A, B, C)

    x, z = xz.chunk(2, 1)
    u = F.silu(F.conv1d(x, conv, padding=2, groups=dim)[..., :length])
    low = torch.einsum("rd,bdl->brl", x_proj, u)

    def steps(rows):  # (batch, 2 states, length), rows in pairs -> (batch, states, 2 length), columns in pairs
        return torch.stack([rows[:, 0::2], rows[:, 1::2]], -1).reshape(batch, states, 2 * length)

    B = steps(low[:, rank : rank + 2 * states]) if B is None else B
    C = steps(low[:, -2 * states :]) if C is None else C
    delta = torch.einsum("dr,brl->bdl", dt_proj, low[:, :rank])
    want = mamba.selective_scan_fn(u, delta, A, B, C, None, z, None, True)
    assert_close(out, torch.einsum("od,bdl->blo", out_proj, want), "scan")


def block(dim=12, states=8, rank=3, length=19, constant=(False, False), dtype=torch.float32):
    """The arguments of `mamba_inner_fn`."""
    projected = rank + states * (2 - sum(constant))
    tensors = {
        "xz": torch.randn(2, 2 * dim, length, dtype=dtype),
        "conv1d_weight": torch.randn(dim, 1, 3, dtype=dtype),
        "conv1d_bias": torch.randn(dim, dtype=dtype),
        "x_proj_weight": torch.randn(projected, dim, dtype=dtype),
        "delta_proj_weight": torch.randn(dim, rank, dtype=dtype),
        "out_proj_weight": torch.randn(dim // 2, dim, dtype=dtype),
        "out_proj_bias": torch.randn(dim // 2, dtype=dtype),
        "A": -0.5 * torch.rand(dim, states),
        "B": torch.randn(dim, states) if constant[0] else None,
        "C": torch.randn(dim, states) if constant[1] else None,
        "D": torch.randn(dim),
        "delta_bias": 0.5 * torch.rand(dim),
    }
    return {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}


def composed(inputs, A=None, reverse=False, norms=None):
    """What a Mamba block computes between its input and its output projection, from the plain references."""
    x, z = inputs["xz"].chunk(2, 1)
    u = conv.causal_conv1d_ref(x, inputs["conv1d_weight"].squeeze(1), inputs["conv1d_bias"], activation="silu")
    projected = F.linear(u.transpose(1, 2), inputs["x_proj_weight"])
    dt, rest = projected[..., :3], projected[..., 3:]
    B, C = inputs["B"], inputs["C"]
    if C is None:
        C, rest = rest[..., -8:] + inputs.get("C_proj_bias", 0), rest[..., :-8]
    if B is None:
        B = rest + inputs.get("B_proj_bias", 0)
    if norms is not None:
        dt, B, C = (F.rms_norm(t, t.shape[-1:], norms[f"{n}_rms_weight"], 1e-5) for n, t in zip(
            ("dt", "b", "c"), (dt, B, C), strict=True))  # fmt: skip
    delta = F.linear(dt, inputs["delta_proj_weight"]).transpose(1, 2)
    B, C = (m if m.dim() == 2 else m.transpose(1, 2) for m in (B, C))
    if reverse:
        u, delta, z = (t.flip(-1) for t in (u, delta, z))
        B, C = (m if m.dim() == 2 else m.flip(-1) for m in (B, C))
    A = inputs["A"] if A is None else A
    y = mamba.selective_scan_ref(u, delta, A, B, C, inputs["D"], z, inputs["delta_bias"], True)
    return y.flip(-1) if reverse else y


def out_projection(y, inputs):
    return F.linear(y.transpose(1, 2), inputs["out_proj_weight"], inputs["out_proj_bias"])


@pytest.mark.parametrize("constant", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_mamba_inner(constant, bias):
    inputs = block(constant=constant)
    if bias:
        inputs |= {
            f"{name}_proj_bias": torch.randn(8, requires_grad=True)
            for name, given in zip("BC", constant, strict=True)
            if not given
        }
    out, want = mamba.mamba_inner_fn(**inputs), out_projection(composed(inputs), inputs)
    assert out.shape == (2, 19, 6)
    assert_close(out, want, "scan_grad")
    assert torch.equal(mamba.mamba_inner_ref(**inputs), out)
    grad = torch.randn_like(out)
    leaves = {n: t for n, t in inputs.items() if t is not None}
    pairs = zip(gradients(out, leaves.values(), grad), gradients(want, leaves.values(), grad), strict=True)
    for name, (a, b) in zip(leaves, pairs, strict=True):
        assert_close(a, b, "scan_grad", name)


def test_mamba_inner_normalises_as_falcon():
    inputs = block()
    weights = {"b_rms_weight": torch.rand(8), "c_rms_weight": torch.rand(8), "dt_rms_weight": torch.rand(3)}
    got = mamba.mamba_inner_fn(**inputs, **weights, b_c_dt_rms_eps=1e-5)
    assert_close(got, out_projection(composed(inputs, norms=weights), inputs), "scan_grad")


def test_entry_points_of_the_forks():
    inputs, A_b = block(), -torch.rand(12, 8)
    without = {n: t for n, t in inputs.items() if not n.startswith("out_proj")}
    assert_close(mamba.mamba_inner_fn_no_out_proj(**without), composed(inputs), "scan_grad")
    both = composed(inputs) + composed(inputs, A=A_b, reverse=True)
    assert_close(mamba.bimamba_inner_fn(**inputs, A_b=A_b), out_projection(both, inputs), "scan_grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_update(dtype):
    state = torch.randn(3, 6, 8, dtype=dtype)
    want_state = state.clone()
    x, dt, z = (torch.randn(3, 6, dtype=dtype) for _ in range(3))
    A, B, C = -torch.rand(6, 8), torch.randn(3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    options = {"D": torch.randn(6), "z": z, "dt_bias": torch.randn(6), "dt_softplus": True}
    got = mamba.selective_state_update(state, x, dt, A, B, C, **options)
    want = mamba.selective_state_update_ref(want_state, x, dt, A, B, C, **options)
    assert got.dtype == dtype
    assert_close(got, want, "scan")
    assert_close(state, want_state, "scan")


def test_state_update_of_heads_groups_and_entries():
    batch, heads, dim, states, groups = 3, 4, 5, 8, 2
    cache = torch.randn(7, heads, dim, states)
    before, indices = cache.clone(), torch.tensor([5, 0, 2], dtype=torch.int32)
    x, dt, z = (torch.randn(batch, heads, dim) for _ in range(3))
    A, B, C = -torch.rand(heads, dim, states), torch.randn(batch, groups, states), torch.randn(batch, groups, states)
    D, dt_bias = torch.randn(heads, dim), torch.randn(heads, dim)
    got = mamba.selective_state_update(
        cache, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True, state_batch_indices=indices
    )
    assert got.shape == x.shape
    for h in range(heads):
        part, g = before[indices.long(), h].clone(), h * groups // heads
        want = mamba.selective_state_update_ref(
            part, x[:, h], dt[:, h], A[h], B[:, g], C[:, g], D[h], z[:, h], dt_bias[h], True
        )
        assert_close(got[:, h], want, "scan")
        assert_close(cache[indices.long(), h], part, "scan")
    untouched = [1, 3, 4, 6]
    assert torch.equal(cache[untouched], before[untouched])


def test_state_update_keeps_no_graph():
    state, x = torch.zeros(1, 2, 4), torch.randn(1, 2, requires_grad=True)
    B = torch.randn(1, 4)
    mamba.selective_state_update(state, x, x, -torch.rand(2, 4), B, B)
    assert not state.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(dtype):
    x, residual = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 5, 16)
    norm = mamba_layers.RMSNorm(16, eps=1e-5)
    torch.nn.init.uniform_(norm.weight)
    assert list(norm.state_dict()) == ["weight"]
    out, total = norm(x, residual=residual, prenorm=True, residual_in_fp32=True)
    assert (out.dtype, total.dtype) == (dtype, torch.float32)
    assert_close(total, x.float() + residual, "conv")
    assert_close(out, F.rms_norm(x.float() + residual, (16,), norm.weight, 1e-5).to(dtype), "conv")
    weight, bias = torch.rand(16), torch.rand(16)
    out = mamba_layers.layer_norm_fn(x, weight, bias, eps=1e-6)
    assert_close(out, F.layer_norm(x.float(), (16,), weight, bias, 1e-6).to(dtype), "conv")
    assert mamba_layers.rms_norm_fn(x, weight, None, prenorm=True)[1].dtype == dtype


def test_norms_drop_and_scale_before_the_residual_is_added():
    x, residual, weight, bias = torch.ones(2, 50, 16), torch.randn(2, 50, 16), torch.rand(16), torch.rand(16)
    rowscale = torch.rand(2, 50)
    out, total = mamba_layers.layer_norm_fn(x, weight, bias, residual, rowscale=rowscale, prenorm=True)
    assert_close(total, rowscale[..., None] + residual, "conv")
    assert_close(out, F.layer_norm(total, (16,), weight, bias, 1e-6), "conv")

    norm = mamba_layers.RMSNorm(16, dropout_p=0.25)
    out, total = norm(x, prenorm=True)
    assert set(total.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert 0.7 < (total > 0).float().mean() < 0.8
    assert_close(out, F.rms_norm(total, (16,), norm.weight, 1e-5), "conv")
    assert torch.equal(norm.eval()(x, prenorm=True)[1], x)


def test_norms_say_what_they_do_not_serve():
    x, weight = torch.randn(3, 8), torch.ones(8)
    nothing = {"x1": None, "weight1": None, "bias1": None, "return_dropout_mask": False}
    want = mamba_layers.rms_norm_fn(x, weight, None)
    assert torch.equal(mamba_layers.rms_norm_fn(x, weight, None, **nothing), want)
    for option in ({"x1": x}, {"weight1": weight}, {"bias1": weight}, {"return_dropout_mask": True}):
        with pytest.raises(NotImplementedError, match=f"`{next(iter(option))}` belongs to blocks that run attention"):
            mamba_layers.layer_norm_fn(x, weight, None, **option)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        mamba_layers.rms_norm_fn(x, weight, None, epsilon=1e-5)


def test_module_loads_and_runs_as_ours():
    ours, theirs = modules.Mamba(8), mamba_layers.Mamba(8, use_fast_path=False, layer_idx=3)
    theirs.load_state_dict(ours.state_dict())
    hidden = torch.randn(2, 7, 8)
    assert torch.equal(theirs(hidden), ours(hidden))
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0, max_batch_size=2)
    assert torch.equal(theirs(hidden, inference_params=params), ours(hidden))
    assert 3 in params.key_value_memory_dict


@pytest.fixture
def _clean():
    yield
    compat.uninstall()


@pytest.mark.usefixtures("_clean")
def test_install_serves_third_party_imports():
    assert compat.install() == ("mamba_ssm", "causal_conv1d")
    assert compat.install() == ("mamba_ssm", "causal_conv1d")  # again is harmless
    names = {}
    exec(
        "from mamba_ssm import Mamba, selective_scan_fn\n"
        "from mamba_ssm.modules.mamba_simple import Mamba as Simple\n"
        "from mamba_ssm.ops.selective_scan_interface import selective_scan_ref, mamba_inner_fn, mamba_inner_ref\n"
        "from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn_no_out_proj\n"
        "from mamba_ssm.ops.triton.selective_state_update import selective_state_update\n"
        "from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn\n"
        "from mamba_ssm.ops.triton.layer_norm import RMSNorm as Renamed\n"
        "from mamba_ssm.utils.generation import GenerationMixin\n"
        "from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf\n"
        "from causal_conv1d import causal_conv1d_fn, causal_conv1d_update\n"
        "from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref\n"
        "from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states\n"
        "import mamba_ssm.ops.triton.layernorm, causal_conv1d\n"
        "versions = mamba_ssm.__version__, causal_conv1d.__version__\n",
        names,
    )
    assert names["selective_scan_fn"] is mamba.selective_scan_fn
    assert names["causal_conv1d_fn"] is conv.causal_conv1d_fn
    assert all("parrot" in version for version in names["versions"])
    assert importlib.util.find_spec("mamba_ssm") is not None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm.modules.mamba2")
    with pytest.raises(NotImplementedError, match="downloads nothing"):
        names["load_config_hf"]("state-spaces/mamba-130m")
    compat.uninstall()
    assert not any(name.partition(".")[0] in ("mamba_ssm", "causal_conv1d") for name in sys.modules)


@pytest.mark.usefixtures("_clean")
def test_install_leaves_an_original_alone_unless_asked(tmp_path, monkeypatch):
    tmp_path.joinpath("causal_conv1d.py").write_text("original = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.install("causal_conv1d") == ()
    original = importlib.import_module("causal_conv1d")
    assert original.original
    assert compat.install() == ("mamba_ssm",)
    assert compat.install("causal_conv1d", override=True) == ("causal_conv1d",)
    assert importlib.import_module("causal_conv1d").causal_conv1d_fn is conv.causal_conv1d_fn
    compat.uninstall()
    assert sys.modules.pop("causal_conv1d") is original


def test_install_knows_its_packages():
    with pytest.raises(ValueError, match="`packages` must be among mamba_ssm, causal_conv1d; got 'flash_attn'"):
        compat.install("flash_attn")
