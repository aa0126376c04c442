"""parallel_branch_fusion against its reference: values, gradients, and what PyTorch asks of an op."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import assert_close

from parrot_kernels import backends, parallel_branch_fusion
from parrot_kernels.ops import parallel_branch_fusion as module
from parrot_kernels.ops.parallel_branch_fusion import PARTS
from parrot_kernels.reference.parallel_branch_fusion import parallel_branch_fusion as reference

FP64 = torch.float64
BACKENDS = [name for name in ("cpu", "torch") if backends.why_not("sinkhorn_hadamard", name, "cpu", FP64) is None]


def pair(*shape, dtype=FP64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=FP64).to(dtype).requires_grad_() for _ in range(2))


def expected(x, y, parts=PARTS, eps=0.05, **options):
    x, y = (t.detach().double().requires_grad_() for t in (x, y))
    batched = (x, y) if x.dim() == 3 else (x[None], y[None])
    eps = torch.full((len(batched[0]),), eps, dtype=FP64)
    row = reference(x=batched[0], y=batched[1], parts=parts, eps=eps, **options)
    row = row if x.dim() == 3 else row[0]
    cotangent = torch.randn(row.shape, generator=torch.Generator().manual_seed(1), dtype=FP64)
    return row, cotangent, torch.autograd.grad(row, (x, y), cotangent, materialize_grads=True)


@pytest.mark.parametrize("dtype", [FP64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 33, 17), (9, 120)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_and_gradients(backend, shape, dtype):
    x, y = pair(*shape, dtype=dtype)
    got = parallel_branch_fusion(x, y, backend=backend)
    row, cotangent, gradients = expected(x, y)
    assert got.is_contiguous()
    assert_close(got, row, "sinkhorn")
    for name, g, want in zip("xy", torch.autograd.grad(got, (x, y), cotangent.to(dtype)), gradients, strict=True):
        assert_close(g, want, "sinkhorn_grad", name)


SOME = [parts for n in (1, 2, 3) for parts in itertools.permutations(PARTS, n)][::3]


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "detached"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_parts_in_any_order(backend, gradient):
    x, y = pair(2, 6, 3)
    for parts in SOME:
        options = {"cost": "sqeuclidean", "n_iters": 300 if gradient == "implicit" else 7, "gradient": gradient}
        got = parallel_branch_fusion(x, y, parts=parts, backend=backend, **options)
        row, cotangent, gradients = expected(x, y, parts=parts, **options)
        assert_close(got, row, "sinkhorn", str(parts))
        for g, want in zip(torch.autograd.grad(got, (x, y), cotangent, materialize_grads=True), gradients, strict=True):
            assert_close(g, want, "sinkhorn_grad", str(parts), scale=100.0 if gradient == "implicit" else 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_untouched_inputs(backend):
    x, y = (t.detach().mT for t in pair(2, 5, 11))
    before = x.clone(), y.clone()
    x.requires_grad_(), y.requires_grad_()
    got = parallel_branch_fusion(x, y, backend=backend)
    row, cotangent, gradients = expected(x, y)
    assert_close(got, row, "sinkhorn")
    for g, want in zip(torch.autograd.grad(got, (x, y), cotangent.mT.contiguous().mT), gradients, strict=True):
        assert_close(g, want, "sinkhorn_grad")
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_gradcheck_with_eps():
    x, y = pair(2, 4, 3)
    eps = torch.tensor([0.3, 0.5], dtype=FP64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, y, eps: parallel_branch_fusion(x, y, eps=eps, n_iters=4, cost_scale=2.0), (x, y, eps)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_compile_and_vmap(backend):
    x, y = pair(2, 5, 3)
    numbers = [12.0, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 1.0]
    eps = torch.full((2,), 0.1, dtype=FP64)
    torch.library.opcheck(module._forward, (x, y, eps, "euclidean", "unrolled", backend, numbers, list(PARTS)))

    def fuse(x, y):
        return parallel_branch_fusion(x, y, backend=backend)

    torch.testing.assert_close(torch.compile(fuse, fullgraph=True)(x, y), fuse(x, y), rtol=0, atol=0)
    mapped = torch.vmap(fuse)(x, y)
    torch.testing.assert_close(mapped, fuse(x, y), rtol=0, atol=0)
    got = torch.autograd.grad(mapped.sum(), (x, y))
    assert all(torch.equal(g, w) for g, w in zip(got, torch.autograd.grad(fuse(x, y).sum(), (x, y)), strict=True))


def test_refusals():
    x, y = pair(3, 4, 2)
    with pytest.raises(ValueError, match="`parts`"):
        parallel_branch_fusion(x, y, parts=())
    with pytest.raises(ValueError, match=r"one of .* got 'z'"):
        parallel_branch_fusion(x, y, parts=("x", "z"))
    with pytest.raises(ValueError, match="of x's shape"):
        parallel_branch_fusion(x, y[:, :3])
    gradient = torch.autograd.grad(parallel_branch_fusion(x, y).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    assert parallel_branch_fusion(x[:0], y[:0]).shape == (0, 4, 10)
    assert parallel_branch_fusion(x[:, :0], y[:, :0]).shape == (3, 0, 10)
