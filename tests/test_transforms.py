"""The differentiable ops under torch.func's transforms, checkpointing and forward mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from parrot_kernels import (
    causal_conv1d,
    parallel_branch_fusion,
    selective_scan,
    sinkhorn_divergence,
    sinkhorn_hadamard,
)


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, Y, STEPS = random(2, 5, 3), random(2, 6, 3), random(2, 4, 7)
A, B, TAPS = -random(4, 3), random(2, 3, 7), random(4, 2)


def transport(x: Tensor) -> Tensor:
    out = sinkhorn_hadamard(x, Y, return_plan=True, n_iters=7)
    return sum(t.square().flatten(1).sum(1) for t in (*out[:7], out.cost[:, None]))


def fuse(x: Tensor) -> Tensor:
    return parallel_branch_fusion(x, Y[:, :5], n_iters=7).square().flatten(1).sum(1)


def diverge(x: Tensor) -> Tensor:
    return sinkhorn_divergence(x, Y, blur=0.3, n_iters=20)


def scan(u: Tensor) -> Tensor:
    out, state = selective_scan(u, STEPS, A, B, B, lengths=torch.tensor([7, 4]), return_final_state=True)
    return out.square().sum((1, 2)) + state.sum((1, 2))


def convolve(x: Tensor) -> Tensor:
    return causal_conv1d(x, TAPS, activation="silu").square().sum((1, 2))


OPS = {"sinkhorn_hadamard": (transport, X), "parallel_branch_fusion": (fuse, X), "sinkhorn_divergence": (diverge, X)}
OPS |= {"selective_scan": (scan, STEPS), "causal_conv1d": (convolve, STEPS)}
every_op = pytest.mark.parametrize(("function", "points"), list(OPS.values()), ids=list(OPS))


def gradient(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    leaf = points.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@every_op
def test_gradients_of_torch_func_are_autograds(function, points):
    want = gradient(function, points)
    assert torch.equal(torch.func.grad(lambda x: function(x).sum())(points), want)
    value, pull = torch.func.vjp(function, points)
    assert torch.equal(value, function(points))
    assert torch.equal(pull(torch.ones_like(value))[0], want)


@every_op
def test_vmap_and_gradients_mapped(function, points):
    several = torch.stack([points, 2 * points, points + 1])
    want = torch.stack([gradient(function, each) for each in several])
    assert torch.equal(torch.vmap(function)(several), torch.stack([function(each) for each in several]))
    mapped = torch.vmap(torch.func.grad(lambda x: function(x).sum()))(several)
    assert_close(mapped, want, "sinkhorn_grad")
    assert_close(torch.func.grad(lambda x: torch.vmap(function)(x).sum())(several), want, "sinkhorn_grad")


@every_op
def test_jacobian(function, points):
    want = torch.autograd.functional.jacobian(function, points)
    assert_close(torch.func.jacrev(function)(points), want, "sinkhorn_grad")


def test_vmap_over_what_has_no_batch():
    rows = [random(4, 3), random(4, 3) + 1]

    def run(A: Tensor, weight: Tensor) -> Tensor:
        return selective_scan(causal_conv1d(STEPS, weight), STEPS, -A, B, B)

    want = torch.stack([run(each, each[:, :2]) for each in rows])
    stacked = torch.stack(rows, -1)
    assert torch.equal(torch.vmap(run, in_dims=(-1, -1))(stacked, stacked[:, :2]), want)
    per_sample = torch.vmap(torch.func.grad(lambda A, w: run(A, w).sum()), in_dims=(-1, -1))(stacked, stacked[:, :2])
    leaf = rows[1].clone().requires_grad_()
    assert_close(per_sample[1], torch.autograd.grad(run(leaf, rows[1][:, :2]).sum(), leaf)[0], "scan_grad")


@every_op
def test_forward_mode_is_refused(function, points):
    ones = torch.ones_like(points)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(function, (points,), (ones,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(points, ones)
        with pytest.raises(RuntimeError, match="forward-mode"):
            function(dual)
        with torch.no_grad(), pytest.raises(RuntimeError, match="forward-mode"):
            function(dual)
        assert torch.equal(function(points), function(points.clone()))


@every_op
def test_differentiating_twice_raises_whatever_the_second_is_to(function, points):
    for to_points in (True, False):
        leaf = points.clone().requires_grad_()
        value = function(leaf)
        cotangent = torch.ones_like(value).requires_grad_()
        first = torch.autograd.grad(value, leaf, cotangent, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.grad(first.sum(), leaf if to_points else cotangent)
    with pytest.raises(RuntimeError, match="twice"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: function(x).sum())(x).sum())(points)


@every_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(function, points, reentrant):
    leaf = points.clone().requires_grad_()
    checkpoint(function, leaf, use_reentrant=reentrant).sum().backward()
    assert torch.equal(leaf.grad, gradient(function, points))


@every_op
def test_backward_twice_through_a_retained_graph(function, points):
    leaf = points.clone().requires_grad_()
    value = function(leaf).sum()
    value.backward(retain_graph=True)
    once = leaf.grad.clone()
    value.backward()
    assert torch.equal(leaf.grad, 2 * once)
