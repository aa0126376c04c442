"""causal_conv1d_update: new steps in place, against the function in float64 and against the whole convolution."""

from __future__ import annotations

import pytest
import torch
from scan_cases import pairwise, places, skip_unless_served
from test_selective_state_update import DTYPES, laid_out
from tolerances import assert_close

from parrot_kernels import causal_conv1d, causal_conv1d_update
from parrot_kernels.reference import causal_conv1d_update as reference

PLACES = pytest.mark.parametrize(("backend", "device"), places("causal_conv1d_update"))
OPTIONS = {
    "dtype": DTYPES,
    "state": ("compute", "same", "other"),
    "layout": ("contiguous", "channels_last", "sliced"),
    "width": (1, 2, 4, 5),
    "extra": (0, 1, 9),
    "steps": (None, 0, 1, 4, 21),
    "ring": (False, True),
    "indices": (None, "some", "padded"),
    "bias": (False, True),
    "activation": (None, "silu"),
}
CASES = [c for c in pairwise(OPTIONS) if c["width"] - 1 + c["extra"] > 0]
ALL = {"dtype": torch.float32, "state": "same", "layout": "contiguous", "width": 4, "extra": 1, "steps": None,
       "ring": False, "indices": None, "bias": True, "activation": "silu"}  # fmt: skip


def make_steps(case, batch=3, dim=18, device="cpu", seed=0):
    """The inputs, with ``state``."""
    generator = torch.Generator().manual_seed(seed)
    dtype, compute = case["dtype"], torch.float64 if case["dtype"] == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return t if t.dim() == 1 else laid_out(t, case["layout"])

    state_dtype = {"compute": compute, "same": dtype, "other": torch.float16 if dtype != torch.float16 else DTYPES[0]}
    entries = batch if case["indices"] is None else batch + 4
    indices = None if case["indices"] is None else torch.randperm(entries, generator=generator)[:batch].to(device)
    if case["indices"] == "padded":
        indices[1:2] = -1
    return {
        "x": normal(batch, dim) if case["steps"] is None else normal(batch, dim, case["steps"]),
        "state": normal(entries, dim, case["width"] - 1 + case["extra"], dtype=state_dtype[case["state"]]),
        "weight": normal(dim, case["width"], dtype=compute),
        "bias": normal(dim, dtype=compute) if case["bias"] else None,
        "activation": case["activation"],
        "cache_seqlens": torch.randint(0, 99, (batch,), generator=generator).to(device) if case["ring"] else None,
        "state_indices": indices,
    }


def expected(inputs):
    """out in float64 and the new state in its dtype."""
    x = inputs["x"].unsqueeze(-1) if inputs["x"].dim() == 2 else inputs["x"]
    new, out = inputs["state"].clone(), torch.empty_like(x, dtype=torch.float64)
    bias = None if inputs["bias"] is None else inputs["bias"].double()
    how = {"seen": inputs["cache_seqlens"], "indices": inputs["state_indices"]}
    how["silu"] = inputs["activation"] is not None
    reference.update(x=x.double(), state=new, weight=inputs["weight"].double(), bias=bias, out=out, **how)
    return out.view(inputs["x"].shape), new


@PLACES
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_options(case, backend, device):
    skip_unless_served("causal_conv1d_update", backend, device, case["dtype"])
    inputs = make_steps(case, device=device)
    want, want_state = expected(inputs)
    before = {n: t.clone() for n, t in inputs.items() if isinstance(t, torch.Tensor) and n != "state"}
    out = causal_conv1d_update(**inputs, backend=backend)
    assert (out.shape, out.dtype) == (inputs["x"].shape, case["dtype"])
    assert_close(out.cpu(), want.cpu(), "conv", "out")
    assert torch.equal(inputs["state"], want_state)
    assert all(torch.equal(inputs[name], t) for name, t in before.items())
    if inputs["state_indices"] is not None:
        assert (out[inputs["state_indices"] < 0] == 0).all()


@PLACES
@pytest.mark.parametrize("dim", [0, 1, 3, 16, 105])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_sizes(batch, dim, backend, device):
    skip_unless_served("causal_conv1d_update", backend, device, torch.float32)
    inputs = make_steps(ALL, batch=batch, dim=dim, device=device)
    want, want_state = expected(inputs)
    assert_close(causal_conv1d_update(**inputs, backend=backend).cpu(), want.cpu(), "conv")
    assert torch.equal(inputs["state"], want_state)


@PLACES
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pieces_are_the_whole(dtype, ring, extra, backend, device):
    skip_unless_served("causal_conv1d_update", backend, device, dtype)
    inputs = make_steps(ALL | {"dtype": dtype, "steps": 14, "extra": extra}, device=device)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    want = causal_conv1d(x, weight, bias, "silu")
    state, outs, seen = torch.zeros_like(inputs["state"]), [], torch.zeros(3, dtype=torch.int32, device=device)
    for piece in x.split([1, 1, 5, 1, 6], -1):
        how = {"cache_seqlens": seen if ring else None, "backend": backend}
        outs.append(causal_conv1d_update(piece, state, weight, bias, "silu", **how))
        seen = seen + piece.shape[-1]
    assert_close(torch.cat(outs, -1), want, "conv")


@PLACES
def test_batch_mates_and_runs_change_no_bit(backend, device):
    skip_unless_served("causal_conv1d_update", backend, device, torch.float32)
    inputs = make_steps(ALL, batch=5, dim=105, device=device)
    state = inputs.pop("state")
    first, again = state.clone(), state.clone()
    out = causal_conv1d_update(state=first, **inputs, backend=backend)
    assert torch.equal(out, causal_conv1d_update(state=again, **inputs, backend=backend))
    assert torch.equal(first, again)
    for b in range(5):
        alone = inputs | {"x": inputs["x"][b : b + 1], "state": state[b : b + 1].clone()}
        assert torch.equal(causal_conv1d_update(**alone, backend=backend)[0], out[b])
        assert torch.equal(alone["state"][0], first[b])


def test_threads_change_no_bit():
    skip_unless_served("causal_conv1d_update", "cpu", "cpu", torch.float32)
    inputs = make_steps(ALL | {"steps": 3}, batch=4, dim=2048 + 7)
    state, threads, results = inputs.pop("state"), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            new = state.clone()
            results.append((causal_conv1d_update(state=new, **inputs), new))
    finally:
        torch.set_num_threads(threads)
    for out, new in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(new, results[0][1])


@pytest.mark.parametrize("indices", [None, "padded"])
@pytest.mark.parametrize("ring", [False, True])
def test_gradients_reach_everything_but_the_state(ring, indices):
    inputs = make_steps(ALL | {"dtype": torch.float64, "steps": 3, "ring": ring, "indices": indices})
    index, seen, state = inputs["state_indices"], inputs["cache_seqlens"], inputs["state"].clone()
    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    out = causal_conv1d_update(**inputs)
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, weight)
    rows = state if index is None else state[index.clamp(min=0)]
    valid = torch.ones(3, dtype=torch.bool) if index is None else index >= 0
    want_out, _ = reference.causal_conv1d_update(leaves[0], rows, leaves[1], leaves[2], "silu", seen)
    for g, w in zip(got, torch.autograd.grad(want_out, leaves, weight * valid.view(-1, 1, 1)), strict=True):
        assert_close(g, w, "conv_grad")
    assert not inputs["state"].requires_grad
    assert torch.equal(inputs["state"], expected(inputs | {"state": state})[1])


def test_a_backward_that_needs_the_overwritten_state_notices():
    inputs = make_steps(ALL)
    product = (torch.ones_like(inputs["state"], requires_grad=True) * inputs["state"]).sum()
    causal_conv1d_update(**inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("indices", [None, "padded"])
def test_opcheck(indices):
    inputs = make_steps(ALL | {"steps": 2, "ring": True, "indices": indices})
    index = None if indices is None else inputs["state_indices"].int()
    arguments = (inputs["state"], inputs["x"], inputs["weight"], inputs["bias"], inputs["cache_seqlens"].int())
    torch.library.opcheck(torch.ops.parrot_kernels.causal_conv1d_update.default, (*arguments, index, True, None))


def test_compiles_as_a_whole():
    inputs = make_steps(ALL | {"indices": "padded", "state": "other"})
    want, want_state = expected(inputs)
    compiled = torch.compile(causal_conv1d_update, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**inputs), want, "conv")
    assert torch.equal(inputs["state"], want_state)


def test_bad_input():
    x, weight = torch.zeros(2, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="`state` must be of at least 3 inputs a channel; got 2"):
        causal_conv1d_update(x, torch.zeros(2, 3, 2), weight)
    with pytest.raises(ValueError, match="causal_conv1d_update: `state` must be of shape"):
        causal_conv1d_update(x, torch.zeros(3, 3, 3), weight)
    with pytest.raises(ValueError, match="`activation` must be one of"):
        causal_conv1d_update(x, torch.zeros(2, 3, 3), weight, activation="relu")
    with pytest.raises(ValueError, match="`weight` must be of at least one tap"):
        causal_conv1d_update(x, torch.zeros(2, 3, 3), weight[:, :0])
    with pytest.raises(TypeError, match="`x` must be of dtype"):
        causal_conv1d_update(x.long(), torch.zeros(2, 3, 3), weight)
    with pytest.raises(ValueError, match="`state_indices` must be below the 2 entries"):
        causal_conv1d_update(x, torch.zeros(2, 3, 3), weight, state_indices=torch.tensor([5, 0]))
