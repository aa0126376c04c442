"""The sinkhorn_hadamard operator on every backend, against the PyTorch reference in float64."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from sinkhorn_cases import (
    CASES,
    CONSTANTS,
    INPUTS,
    OP,
    OUTPUTS,
    cotangents,
    everywhere,
    op,
    oracle,
    problem,
    takes,
    to,
    with_gradients,
)
from tolerances import assert_close, tolerance
from torch import Tensor

from parrot_kernels import backends
from parrot_kernels.ops import sinkhorn_hadamard as module
from parrot_kernels.ops.sinkhorn_hadamard import SinkhornHadamardOutput, sinkhorn_hadamard

FP32, FP64 = torch.float32, torch.float64
GRADIENTS = ("unrolled", "implicit", "detached")
SIZES = (4, 5, 6, 3)

# The interpreter takes seconds for each: quick are the twins in test_sinkhorn_triton.py, and the other backends.
everywhere_slowly = functools.partial(everywhere, interpreter=[pytest.mark.slow])


def single(arguments: dict, p: int, drop_batch: bool = False) -> dict:
    """Problem p alone, as a batch of one or without the batch dimension."""
    index = p if drop_batch else slice(p, p + 1)
    return {n: v[index].clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}


def assert_matches_oracle(arguments: dict, backend: str, device: str, gradient: str = "unrolled") -> None:
    given = cotangents(arguments)
    want = with_gradients(functools.partial(oracle, gradient=gradient), to(arguments, FP64), given)
    got = with_gradients(functools.partial(op, gradient=gradient, backend=backend), to(arguments, device), given)
    for name, value in got.items():
        if name in ("n_iters", "converged"):
            assert torch.equal(value.cpu(), want[name]), name
        else:
            assert_close(value.cpu(), want[name], "sinkhorn_grad" if name[0] == "d" else "sinkhorn", name)


# Against the reference


@pytest.mark.sampled(8)
@everywhere
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
def test_every_option(backend, device, dtype, case, gradient):
    if takes(backend, dtype):
        assert_matches_oracle(problem(case, SIZES, dtype), backend, device, gradient)
    else:
        with pytest.raises(RuntimeError, match="does not take"):
            op(**to(problem(case, SIZES, dtype), device), backend=backend)


@pytest.mark.sampled(3)
@everywhere
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 1, 5, 3), (2, 5, 1, 3), (3, 7, 13, 1), (2, 7, 13, 3), (1, 33, 17, 120)], ids=str
)
def test_odd_shapes(backend, device, sizes):
    for case in ("plain", "everything"):
        assert_matches_oracle(problem(case, sizes, FP32), backend, device)


@everywhere
@pytest.mark.parametrize("sizes", [(0, 5, 6, 3), (2, 0, 4, 3), (2, 4, 0, 3), (2, 0, 0, 3)], ids=str)
def test_nothing_to_transport(backend, device, sizes):
    arguments = to(problem("plain", sizes, FP32), device)
    results = with_gradients(functools.partial(op, backend=backend), arguments, cotangents(arguments))
    assert results.pop("converged").all()
    for name, value in results.items():
        assert value.abs().sum() == 0, name


@everywhere_slowly
def test_lengths_cut_the_problem_out(backend, device):
    """A padded problem has the results of the same problem without its padding."""
    arguments = to(problem("lengths", SIZES, FP32), device)
    got = op(**arguments, backend=backend)
    for p, (n, m) in enumerate(zip(arguments.pop("x_lengths"), arguments.pop("y_lengths"), strict=True)):
        if n == 0:
            assert all(got[name][p].abs().sum() == 0 for name in (*OUTPUTS, "error", "n_iters"))
            assert got["converged"][p]
            continue
        alone = single(arguments, p, drop_batch=True)
        want = op(**alone | {"x": alone["x"][:n], "y": alone["y"][:m]}, backend=backend)
        cut = {"x_to_y": m, "y_hadamard": m, "g": m, "y_to_x": n, "x_hadamard": n, "f": n}
        for name, size in cut.items():
            assert_close(got[name][p, :size], want[name], "sinkhorn", name)
            assert got[name][p, size:].abs().sum() == 0
        assert_close(got["plan"][p, :n, :m], want["plan"], "sinkhorn", "plan")
        assert got["plan"][p].sum().item() == pytest.approx(got["plan"][p, :n, :m].sum().item())


@everywhere_slowly
def test_padding_does_not_set_the_scale(backend, device):
    """Far from the origin, whatever stands in for padding is farther away than any valid point."""
    x, y = torch.randn(2, 5, 3, device=device) + 100, torch.randn(2, 4, 3, device=device) + 100
    lengths = {"x_lengths": torch.tensor([5, 3], device=device), "y_lengths": torch.tensor([2, 4], device=device)}
    got = sinkhorn_hadamard(x, y, **lengths, backend=backend)
    for p, (n, m) in enumerate(((5, 2), (3, 4))):
        want = sinkhorn_hadamard(x[p, :n], y[p, :m], backend=backend)
        assert_close(got.cost[p], want.cost, "sinkhorn", "cost")
        assert_close(got.y_to_x[p, :n], want.y_to_x, "sinkhorn", "y_to_x")


@everywhere
def test_one_problem_without_a_batch(backend, device):
    arguments = to(problem("everything", SIZES, FP32), device)
    given = cotangents(single(arguments, 1))
    batch = with_gradients(functools.partial(op, backend=backend), single(arguments, 1), given)
    alone = with_gradients(
        functools.partial(op, backend=backend),
        single(arguments, 1, drop_batch=True),
        {n: c[0] for n, c in given.items()},
    )
    for name, value in alone.items():
        assert torch.equal(value, batch[name][0]), name


@everywhere_slowly
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_loses_only_the_last_rounding(backend, device, dtype):
    if not takes(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    arguments = problem("unbalanced", SIZES, dtype)
    given = to(cotangents(arguments), dtype)
    exact = with_gradients(oracle, to(arguments, FP64), given)
    got = with_gradients(functools.partial(op, backend=backend), to(arguments, device), given)
    for name in ("x_to_y", "y_to_x", "x_hadamard", "y_hadamard", "dx", "dy"):
        assert got[name].dtype == dtype
        twice_the_rounding = torch.finfo(dtype).eps * exact[name].abs()
        slack = tolerance("sinkhorn_grad", FP32) * max(1, exact[name].abs().max())
        assert ((got[name].double().cpu() - exact[name]).abs() <= twice_the_rounding + slack).all(), name
    for name in ("f", "g", "plan", "cost", "error"):
        assert got[name].dtype == FP32
        assert_close(got[name].cpu(), exact[name], "sinkhorn", name)


@everywhere_slowly
def test_strides_do_not_matter(backend, device):
    arguments = to(problem("everything", SIZES, FP32), device)

    def spread(t: Tensor) -> Tensor:  # the same values at every second place of a transposed buffer
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), math.nan, dtype=t.dtype, device=t.device)
        strided = wide.movedim(-1, 0).contiguous().movedim(0, -1)[..., ::2]
        return strided.copy_(t)

    want = with_gradients(functools.partial(op, backend=backend), arguments, given := cotangents(arguments))
    got = with_gradients(
        lambda **k: op(**{n: spread(v) if n in INPUTS else v for n, v in k.items()}, backend=backend),
        arguments,
        given,
    )
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


@everywhere_slowly
def test_expanded_inputs(backend, device):
    arguments = to(problem("plain", (1, 5, 6, 3), FP32), device)
    want = op(**arguments, backend=backend)
    eps = torch.tensor(0.05, device=device)
    got = op(
        **{n: v.expand(3, -1, -1) for n, v in arguments.items() if n in "xy"}, n_iters=12, eps=eps, backend=backend
    )
    for name in OUTPUTS:
        assert torch.equal(got[name], want[name].expand_as(got[name])), name


# Each problem by itself


@pytest.mark.sampled(3)
@everywhere
@pytest.mark.parametrize("sizes", [(5, 6, 7, 3), (3, 1, 9, 2), (3, 9, 1, 2), (2, 8, 5, 1), (3, 33, 40, 20)], ids=str)
def test_batch_mates_do_not_matter(backend, device, sizes):
    arguments = to(problem("everything", sizes, FP32), device)
    given = cotangents(arguments)
    batch = with_gradients(functools.partial(op, backend=backend), arguments, given)
    for p in range(sizes[0]):
        mates = {n: c[p : p + 1] for n, c in given.items()}
        alone = with_gradients(functools.partial(op, backend=backend), single(arguments, p), mates)
        for name, value in alone.items():
            assert torch.equal(value[0], batch[name][p]), f"{name} of problem {p}"


@pytest.mark.sampled(3)
@everywhere
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_padding_does_not_matter_and_gets_no_gradient(backend, device, gradient):
    arguments = to(problem("everything", SIZES, FP32), device)
    given = cotangents(arguments)
    rows = torch.arange(5, device=device) < arguments["x_lengths"][:, None]
    cols = torch.arange(6, device=device) < arguments["y_lengths"][:, None]
    padding = {
        "x": ~rows[..., None],
        "y": ~cols[..., None],
        "a": ~rows,
        "b": ~cols,
        "cost": ~(rows[:, :, None] & cols[:, None]),
    }
    rows, cols = rows & cols.any(1, keepdim=True), cols & rows.any(1, keepdim=True)
    pairs = rows[:, :, None] & cols[:, None]
    valid = {"x": rows[..., None], "y": cols[..., None], "a": rows, "b": cols, "cost": pairs}
    valid |= {"y_to_x": valid["x"], "x_to_y": valid["y"], "f": rows, "g": cols, "plan": pairs}
    valid |= {"x_hadamard": valid["x"], "y_hadamard": valid["y"]}
    solve = functools.partial(op, gradient=gradient, backend=backend)
    want = with_gradients(solve, arguments, given)
    filled = {n: v.masked_fill(padding[n], math.nan) if n in padding else v for n, v in arguments.items()}
    given = {n: c.to(device) for n, c in given.items()}
    nans = {n: c.masked_fill(~valid[n], math.nan) if n in valid and n != "cost" else c for n, c in given.items()}
    nans["cost"] = given["cost"].masked_fill(~pairs.any((1, 2)), math.nan)
    for cotangent in (given, nans):
        got = with_gradients(solve, filled, cotangent)
        for name, value in got.items():
            assert torch.equal(value, want[name]), name
            mask = valid.get(name.removeprefix("d"))
            if mask is not None and name != "cost":
                assert value.masked_fill(mask, 0).abs().sum() == 0, name


@everywhere_slowly
def test_a_nan_stays_in_its_problem(backend, device):
    arguments = to(problem("weights", SIZES, FP32), device)
    want = op(**arguments, backend=backend)
    arguments["x"][2, 1, 0] = math.nan
    got = op(**arguments, backend=backend)
    others = [0, 1, 3]
    for name in OUTPUTS:
        assert torch.equal(got[name][others], want[name][others]), name
    assert got["plan"][2].isnan().any()
    assert not got["converged"][2]


@pytest.mark.sampled(3)
@everywhere
def test_threads_and_repetition_do_not_matter(backend, device):
    arguments = to(problem("everything", (3, 40, 50, 8), FP32), device)
    given, before, found = cotangents(arguments), torch.get_num_threads(), []
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            found.append(with_gradients(functools.partial(op, backend=backend), arguments, given))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert torch.equal(value, found[2][name]), name


# torch.library, torch.compile, vmap, autocast, autograd


@pytest.mark.sampled(12)
@everywhere
@pytest.mark.parametrize(("case", "gradient"), [("plain", "unrolled"), *(("everything", g) for g in GRADIENTS)])
def test_opcheck(backend, device, case, gradient):
    arguments = to(problem(case, (2, 5, 6, 3), FP32), device)
    inputs = [arguments.get(n) for n in ("x", "y", "a", "b", "x_lengths", "y_lengths", "cost")]
    inputs = [t.to(torch.int32) if t is not None and not t.is_floating_point() else t for t in inputs]
    inputs.append(arguments.get("eps", torch.full((2,), 0.05, device=device)))
    inputs = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    numbers = [
        12.0,
        -1.0,
        -1.0,
        -1.0,
        0.7,
        1.0,
        1.0,
        1.0,
    ]  # without tol, which leaves a part of the histories unwritten
    kind = "euclidean" if inputs[6] is None else "matrix"
    torch.library.opcheck(module._forward, (*inputs, kind, gradient, backend, numbers))


@pytest.mark.sampled(3)
@everywhere
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compile(backend, device, gradient):
    torch._dynamo.reset()
    arguments = to(problem("everything", SIZES, FP32), device)
    given = cotangents(arguments)
    solve = functools.partial(op, gradient=gradient, backend=backend)
    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    want = with_gradients(solve, arguments, given)
    got = with_gradients(compiled, arguments, given)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    arguments = problem("plain", SIZES, FP32)

    def loss(x: Tensor, y: Tensor, eps: float) -> Tensor:
        out = sinkhorn_hadamard(x, y, eps=eps, n_iters=5, backend="torch")
        return (out.x_hadamard * x).sum() + out.cost.sum()

    compiled = torch.compile(loss, fullgraph=True)
    for eps in (0.05, 0.1):
        x = [arguments["x"].clone().requires_grad_() for _ in range(2)]
        results = [f(leaf, arguments["y"], eps) for f, leaf in zip((loss, compiled), x, strict=True)]
        for result in results:
            result.backward()
        assert_close(results[1], results[0], "sinkhorn")
        assert_close(x[1].grad, x[0].grad, "sinkhorn_grad")


@everywhere_slowly
def test_vmap(backend, device):
    x, y = (torch.randn(3, 2, n, 4, device=device) for n in (5, 6))

    def solve(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return sinkhorn_hadamard(x, y, backend=backend, n_iters=5)[:6]

    leaves = [[x.clone().requires_grad_(), y[0].clone().requires_grad_()] for _ in range(2)]
    got = torch.vmap(solve, in_dims=(0, None))(*leaves[0])
    want = [torch.stack(t) for t in zip(*(solve(each, leaves[1][1]) for each in leaves[1][0]), strict=True)]
    twice = torch.vmap(torch.vmap(solve), in_dims=(0, None))(x, y[0])  # of problems without a batch
    for t, u, v in zip(got, want, twice, strict=True):
        assert torch.equal(t, u)
        assert torch.equal(t, v)
    for results, leaf in ((got, leaves[0]), (want, leaves[1])):
        torch.autograd.backward([t.square().sum() for t in results])
        assert leaf[0].grad.abs().sum() > 0
    assert torch.equal(leaves[0][0].grad, leaves[1][0].grad)
    assert_close(leaves[0][1].grad, leaves[1][1].grad, "sinkhorn_grad")


@everywhere_slowly
def test_autocast_changes_nothing(backend, device):
    arguments = to(problem("everything", SIZES, FP32), device)
    given, found = cotangents(arguments), []
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            found.append(with_gradients(functools.partial(op, backend=backend), arguments, given))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_differentiating_twice_raises():
    arguments = problem("plain", SIZES, FP64)
    x = arguments["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(op(**arguments, backend="torch")["cost"].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiating twice is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", CONSTANTS)
def test_what_detached_holds_constant_has_no_gradient(name):
    arguments = problem("plain", SIZES, FP64)
    arguments["x"].requires_grad_()
    out = op(**arguments, gradient="detached", backend="torch")
    assert out["cost"].requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        out[name].sum().backward()


def test_only_what_is_needed_is_kept(monkeypatch):
    kept = []
    allocate = module.allocate
    monkeypatch.setattr(module, "allocate", lambda *a: kept.append(allocate(*a)) or kept[-1])
    arguments = problem("plain", SIZES, FP64)
    x = arguments.pop("x")
    for gradient in GRADIENTS:
        sinkhorn_hadamard(x, **arguments, gradient=gradient, backend="torch")
        sinkhorn_hadamard(x.requires_grad_(), **arguments, gradient=gradient, backend="torch")
        x = x.detach()
    sizes = [0 if t.f_history is None else t.f_history.numel() for t in kept]
    assert sizes == [0, 4 * 12 * 5, 0, 0, 0, 0]
    assert all(t.plan is None for t in kept)


def test_inputs_are_left_as_they_are():
    arguments = problem("everything", SIZES, FP32)
    before = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with_gradients(functools.partial(op, backend="torch"), arguments, cotangents(arguments))
    for name, value in arguments.items():
        assert torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("sizes", [(3, 5, 6, 4), (1, 1, 1, 1)])
def test_results_and_gradients_share_no_memory(sizes, gradient):
    arguments = problem("everything", sizes, FP64)
    leaves = {n: t.requires_grad_() for n, t in arguments.items() if n in INPUTS and isinstance(t, Tensor)}
    out = list(sinkhorn_hadamard(**arguments, gradient=gradient, return_plan=True))
    differentiable = [t for t in out if t.requires_grad]
    given = [torch.ones_like(t) for t in differentiable]
    gradients = torch.autograd.grad(differentiable, list(leaves.values()), given, allow_unused=True)
    tensors = [*leaves.values(), *out, *given, *(t for t in gradients if t is not None)]
    storages = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
    assert len(set(storages)) == len(storages)


# Symmetries


def test_swapping_the_sides_when_converged():
    arguments = problem({"a": True, "b": True, "eps": 0.3, "tol": 1e-14, "n_iters": 5000}, SIZES, FP64)
    one, other = op(**arguments), op(**arguments | dict(zip("xyab", (arguments[n] for n in "yxba"), strict=True)))
    assert_close(one["plan"], other["plan"].mT, "sinkhorn")
    assert_close(one["x_to_y"], other["y_to_x"], "sinkhorn")
    assert_close(one["y_hadamard"], other["x_hadamard"], "sinkhorn")


def test_permuting_the_points():
    arguments = problem("weights", SIZES, FP64)
    order = torch.randperm(5)
    permuted = op(**arguments | {"x": arguments["x"][:, order], "a": arguments["a"][:, order]})
    out = op(**arguments)
    assert_close(permuted["y_to_x"], out["y_to_x"][:, order], "sinkhorn")
    assert_close(permuted["x_to_y"], out["x_to_y"], "sinkhorn")


def test_translating_and_scaling_the_points():
    arguments = problem("weights", SIZES, FP64)
    shift = torch.tensor([3.0, -1.0, 2.0], dtype=FP64)
    moved = op(**arguments | {"x": 7 * arguments["x"] + shift, "y": 7 * arguments["y"] + shift})
    out = op(**arguments)
    assert_close(moved["plan"], out["plan"], "sinkhorn")  # costs are divided by the largest
    assert_close(
        moved["y_to_x"],
        7 * out["y_to_x"] + out["plan"].sum(2, keepdim=True) / arguments["a"][..., None] * shift,
        "sinkhorn",
    )


def test_the_default_backend_is_chosen_by_device():
    arguments = problem("plain", SIZES, FP32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = backends.select(OP, "cpu", FP32)
    want = op(**arguments, backend=chosen)
    got = op(**arguments)
    assert isinstance(sinkhorn_hadamard(**arguments), SinkhornHadamardOutput)
    assert torch.equal(got["x_to_y"], want["x_to_y"])


def test_the_plan_is_returned_on_request_only():
    arguments = problem("plain", SIZES, FP32)
    assert sinkhorn_hadamard(**arguments, backend="torch").plan is None
    assert sinkhorn_hadamard(**arguments, backend="torch", return_plan=True).plan.shape == (4, 5, 6)
