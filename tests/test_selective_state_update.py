"""selective_state_update: one step in place, against the step as a function in float64 and against the whole scan."""

from __future__ import annotations

import pytest
import torch
from scan_cases import leaves, outputs_and_gradients, pairwise, places, skip_unless_served
from selective_scan_cases import EVERYTHING, cotangents, make
from selective_scan_cases import run as run_scan
from tolerances import assert_close

from parrot_kernels import selective_scan, selective_state_update
from parrot_kernels.reference import selective_state_update as reference

PLACES = pytest.mark.parametrize(("backend", "device"), places("selective_state_update"))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {
    "dtype": DTYPES,
    "state": ("compute", "same", "other"),
    "layout": ("contiguous", "channels_last", "sliced"),
    "indices": (None, "some", "padded"),
    "B": ("one", "groups"),
    "C": ("one", "groups"),
    "D": (False, True),
    "z": (False, True),
    "dt_bias": (False, True),
    "dt_softplus": (False, True),
}
ALL = {"dtype": torch.float32, "state": "compute", "layout": "contiguous", "indices": None, "B": "one", "C": "groups",
       "D": True, "z": True, "dt_bias": True, "dt_softplus": True}  # fmt: skip


def laid_out(t, layout):
    if layout == "channels_last":
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "sliced":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype, device=t.device)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    return t


def make_step(case, batch=3, dim=18, states=5, device="cpu", seed=0):
    """state, the other inputs, and the indices."""
    generator = torch.Generator().manual_seed(seed)
    dtype, compute = case["dtype"], torch.float64 if case["dtype"] == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return t if t.dim() == 1 else laid_out(t, case["layout"])

    state_dtype = {"compute": compute, "same": dtype, "other": torch.float16 if dtype != torch.float16 else DTYPES[0]}
    entries = batch if case["indices"] is None else batch + 4
    matrices = {name: (batch, states) if case[name] == "one" else (batch, 3, states) for name in "BC"}
    inputs = {
        "x": normal(batch, dim),
        "dt": normal(batch, dim) if case["dt_softplus"] else normal(batch, dim).abs() * 0.5,
        "A": -normal(dim, states, dtype=compute).abs(),
        "B": normal(*matrices["B"]),
        "C": normal(*matrices["C"]),
        "D": normal(dim, dtype=compute) if case["D"] else None,
        "z": normal(batch, dim) if case["z"] else None,
        "dt_bias": normal(dim, dtype=compute).abs() if case["dt_bias"] else None,
        "dt_softplus": case["dt_softplus"],
    }
    state = normal(entries, dim, states, dtype=state_dtype[case["state"]])
    indices = None if case["indices"] is None else torch.randperm(entries, generator=generator)[:batch].to(device)
    if case["indices"] == "padded":
        indices[1:2] = -1
    return state, inputs, indices


def expected(state, inputs, indices):
    """(out, new state) in float64."""
    inputs = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    new, out = state.to(torch.float64, copy=True), torch.empty_like(inputs["x"])
    reference.update(state=new, indices=indices, out=out, **inputs)
    return out, new


@PLACES
@pytest.mark.parametrize("case", list(pairwise(OPTIONS)), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_options(case, backend, device):
    skip_unless_served("selective_state_update", backend, device, case["dtype"])
    state, inputs, indices = make_step(case, device=device)
    want, want_state = expected(state, inputs, indices)
    before = {name: t.clone() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
    untouched = state.clone()
    out = selective_state_update(state, **inputs, state_indices=indices, backend=backend)
    assert out.dtype == case["dtype"]
    assert_close(out.cpu(), want.cpu(), "scan", "out")
    narrow = state.float() if state.dtype == torch.float64 != case["dtype"] else state  # no better than computed
    assert_close(narrow.cpu(), want_state.cpu(), "scan", "state")
    assert all(torch.equal(inputs[name], t) for name, t in before.items())
    if indices is not None:
        rest = torch.ones(len(state), dtype=torch.bool).index_fill(0, indices[indices >= 0].cpu(), False)
        assert torch.equal(state[rest], untouched[rest])
        assert (out[indices < 0] == 0).all()


@PLACES
@pytest.mark.parametrize("states", [1, 8, 16, 24, 33, 64])
@pytest.mark.parametrize("dim", [1, 3, 16, 105])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, dim, states, backend, device):
    skip_unless_served("selective_state_update", backend, device, dtype)
    state, inputs, _ = make_step(ALL | {"dtype": dtype, "C": "one"}, dim=dim, states=states, device=device)
    want, want_state = expected(state, inputs, None)
    assert_close(selective_state_update(state, **inputs, backend=backend).cpu(), want.cpu(), "scan")
    assert_close(state.cpu(), want_state.cpu(), "scan")


@PLACES
@pytest.mark.parametrize("empty", ["batch", "dim", "states"])
def test_nothing_at_all(empty, backend, device):
    skip_unless_served("selective_state_update", backend, device, torch.float32)
    state, inputs, _ = make_step(ALL | {"C": "one"}, **{empty: 0}, device=device)
    out = selective_state_update(state, **inputs, backend=backend)
    assert out.shape == inputs["x"].shape
    want, _ = expected(state, inputs, None)
    assert_close(out.cpu(), want.cpu(), "scan")


@PLACES
@pytest.mark.parametrize("shift", [-60.0, 60.0, 1e4])
def test_extreme_steps(shift, backend, device):
    skip_unless_served("selective_state_update", backend, device, torch.float32)
    state, inputs, _ = make_step(ALL, states=16, device=device)
    inputs["dt"] = inputs["dt"] + shift
    want, want_state = expected(state, inputs, None)
    assert_close(selective_state_update(state, **inputs, backend=backend).cpu(), want.cpu(), "scan")
    assert_close(state.cpu(), want_state.cpu(), "scan")


@PLACES
@pytest.mark.parametrize("B", ["step", "group"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_steps_are_the_whole(dtype, B, backend, device):
    skip_unless_served("selective_state_update", backend, device, dtype)
    case = EVERYTHING | {"reverse": False, "lengths": False, "seq_idx": False, "B": B}
    inputs, _ = make(case, dim=18, length=9, states=16, dtype=dtype, device=device)
    want, want_state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    state = inputs["initial_state"].clone()
    parameters = inputs["D"], inputs["delta_bias"]
    outs = []
    for t in range(9):
        u, delta, B_t, C, z = (inputs[name][..., t] for name in ("u", "delta", "B", "C", "z"))
        outs.append(
            selective_state_update(
                state, u, delta, inputs["A"], B_t, C, parameters[0], z, parameters[1], True, backend=backend
            )
        )
    assert_close(torch.stack(outs, -1), want, "scan")
    assert_close(state, want_state, "scan")


@pytest.mark.parametrize("B", ["step", "group"])
def test_the_step_as_a_function_is_the_whole(B):
    case = EVERYTHING | {"reverse": False, "lengths": False, "seq_idx": False, "B": B}
    inputs, options = make(case)

    def step_by_step(u, delta, A, B, C, D, z, delta_bias, initial_state):
        outs, state = [], initial_state
        for t in range(u.shape[2]):
            u_, delta_, B_, C_, z_ = (x[..., t] for x in (u, delta, B, C, z))
            out, state = reference.selective_state_update(state, u_, delta_, A, B_, C_, D, z_, delta_bias, True)
            outs.append(out)
        return torch.stack(outs, -1), state

    got, want = outputs_and_gradients(step_by_step, leaves(inputs), cotangents(inputs)), run_scan(inputs, options)
    for name in want:
        assert_close(got[name], want[name], "scan_grad" if name.startswith("d") else "scan", name)


@PLACES
def test_batch_mates_and_runs_change_no_bit(backend, device):
    skip_unless_served("selective_state_update", backend, device, torch.float32)
    state, inputs, _ = make_step(ALL, batch=5, dim=105, states=24, device=device)
    first, again = state.clone(), state.clone()
    out = selective_state_update(first, **inputs, backend=backend)
    assert torch.equal(out, selective_state_update(again, **inputs, backend=backend))
    assert torch.equal(first, again)
    for b in range(5):
        row = {n: t[b : b + 1] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
        alone = state[b : b + 1].clone()
        assert torch.equal(selective_state_update(alone, **row, backend=backend)[0], out[b])
        assert torch.equal(alone[0], first[b])


def test_threads_change_no_bit():
    skip_unless_served("selective_state_update", "cpu", "cpu", torch.float32)
    state, inputs, _ = make_step(ALL, batch=2, dim=1536, states=16)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            new = state.clone()
            results.append((selective_state_update(new, **inputs), new))
    finally:
        torch.set_num_threads(threads)
    for out, new in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(new, results[0][1])


@pytest.mark.parametrize("indices", [None, "padded"])
def test_gradients_reach_everything_but_the_state(indices):
    case = ALL | {"dtype": torch.float64, "indices": indices}
    state, inputs, index = make_step(case)
    grads = {n: t.requires_grad_() for n, t in inputs.items() if isinstance(t, torch.Tensor)}
    new = state.clone()
    out = selective_state_update(new, **inputs, state_indices=index)
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, list(grads.values()), weight)
    rows = state if index is None else state[index.clamp(min=0)]
    want_out, want_rows = reference.selective_state_update(rows, **inputs)
    valid = torch.ones(3, dtype=torch.bool) if index is None else index >= 0
    want = torch.autograd.grad(want_out, list(grads.values()), weight * valid.unsqueeze(1))
    for name, g, w in zip(grads, got, want, strict=True):
        assert_close(g, w, "scan_grad", name)
    assert not new.requires_grad
    assert torch.equal((new if index is None else new[index])[valid], want_rows[valid])


@PLACES
def test_a_padded_row_may_hold_anything(backend, device):
    state, inputs, index = make_step(ALL | {"indices": "padded"}, device=device)
    want_state = state.clone()
    want = selective_state_update(want_state, **inputs, state_indices=index, backend=backend)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name][1] = torch.nan
    out = selective_state_update(state, **inputs, state_indices=index, backend=backend)
    assert not out[1].any()
    assert torch.equal(out, want)
    assert torch.equal(state, want_state)


def test_a_backward_that_needs_the_overwritten_state_notices():
    state, inputs, _ = make_step(ALL)
    weight = torch.ones_like(state, requires_grad=True)
    product = (weight * state).sum()
    selective_state_update(state, **inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode():
    state, inputs, _ = make_step(ALL)
    want, want_state = expected(state, inputs, None)
    with torch.inference_mode():
        own = state.clone()
        assert_close(selective_state_update(own, **inputs), want, "scan")
        assert_close(own, want_state, "scan")


@pytest.mark.parametrize("indices", [None, "padded"])
def test_opcheck(indices):
    state, inputs, index = make_step(ALL | {"indices": indices})
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    arguments = (state, *(inputs[n] for n in names), None if index is None else index.int(), True, None)
    torch.library.opcheck(torch.ops.parrot_kernels.selective_state_update.default, arguments)


def test_compiles_as_a_whole():
    state, inputs, index = make_step(ALL | {"indices": "padded", "state": "other"})
    want_state = state.clone()
    want = selective_state_update(want_state, **inputs, state_indices=index)
    compiled = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    assert_close(compiled(state, **inputs, state_indices=index), want, "scan")
    assert torch.equal(state, want_state)


def test_bad_input():
    A, u, B = -torch.rand(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    state = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="selective_state_update: `state` must be of shape"):
        selective_state_update(state[..., :3], u, u, A, B, B)
    with pytest.raises(ValueError, match="`B` must be of shape"):
        selective_state_update(state, u, u, A, torch.randn(4), B)
    with pytest.raises(ValueError, match="`C` must be in groups that divide d = 3"):
        selective_state_update(state, u, u, A, B, torch.randn(2, 2, 4))
    with pytest.raises(TypeError, match="`A` must be real"):
        selective_state_update(state, u, u, A.to(torch.complex64), B, B)
    with pytest.raises(TypeError, match="`dt` must be of dtype float32"):
        selective_state_update(state, u, u.double(), A, B, B)
    with pytest.raises(ValueError, match="`state_indices` must be below the 2 entries"):
        selective_state_update(state, u, u, A, B, B, state_indices=torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="triton runs on CUDA tensors"):
        selective_state_update(state, u, u, A, B, B, backend="triton")
