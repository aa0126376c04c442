"""parallel_branch_fusion against its reference: values, gradients, and what PyTorch asks of an op."""

from __future__ import annotations

import itertools
from unittest import mock

import cuda_emulated
import pytest
import torch
from interpreted import interpreted
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from parrot_kernels import backends, native, parallel_branch_fusion
from parrot_kernels.ops import parallel_branch_fusion as module
from parrot_kernels.ops import sinkhorn_hadamard, sinkhorn_kernels
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


def test_a_part_given_twice():
    x, y = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 3, dtype=torch.float64)
    parts = ("x", "y_to_x", "x", "y_to_x")
    got, half = parallel_branch_fusion(x, y, parts=parts), parallel_branch_fusion(x, y, parts=parts[:2])
    assert torch.equal(got, torch.cat([half, half], -1))
    torch.testing.assert_close(*(torch.autograd.grad(row.sum() * by, x) for row, by in ((got, 1), (half, 2))))


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


class Recorded(TorchDispatchMode):
    """Names of the PyTorch functions that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# What costs no launch: memory, and views of it; values are read of tensors on CPUs only.
FREE = {"empty", "empty_like", "new_empty", "split", "slice", "view", "detach", "aminmax", "_local_scalar_dense"}


def check_one_launch(backend, shape, dtype, parts, gradient):
    """On a device the row takes one kernel, and its gradients one: what PyTorch launches beside them is returned."""
    x, y = (t.detach() for t in pair(*shape, dtype=dtype))
    eps = torch.full(shape[:1], 0.05)
    row, cotangent, gradients = expected(x, y, parts=parts, n_iters=7, gradient=gradient)
    numbers = [7.0, *[-1.0] * 4, 0.0, 0.0, 1.0]
    options = ("euclidean", gradient, None, numbers, list(parts))
    cotangent = cotangent.to(dtype)
    chosen = [
        mock.patch.object(m, "choose_backend", return_value=backend) for m in (sinkhorn_kernels, sinkhorn_hadamard)
    ]
    with chosen[0], chosen[1]:
        with Recorded() as forward:
            got, *saved = module._compute_forward(x, y, eps, *options)
        with Recorded() as backward:
            results = module._compute_backward(cotangent, x, y, eps, saved, *options, [True, True, False])
    assert_close(got, row, "sinkhorn")
    for got, want in zip(results[:2], gradients, strict=True):
        assert_close(got, want, "sinkhorn_grad")
    return forward.names - FREE, backward.names - FREE


LAUNCHES = list(
    itertools.product(
        [(2, 7, 5), (1, 33, 3)],
        [torch.float32, torch.bfloat16],
        [PARTS, ("x", "y_to_x"), ("hadamard", "y")],
        ["unrolled", "detached"],
    )
)[::5]  # each value of each


class Unrecorded:
    """A Triton kernel, interpreted: what the interpreter does by PyTorch is not recorded."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize(("shape", "dtype", "parts", "gradient"), LAUNCHES, ids=str)
@interpreted
def test_one_launch_of_triton(shape, dtype, parts, gradient):
    from parrot_kernels.triton_kernels import sinkhorn_hadamard, sinkhorn_hadamard_backward

    kernels = (
        (sinkhorn_hadamard, "_sinkhorn_hadamard_forward"),
        (sinkhorn_hadamard_backward, "_sinkhorn_hadamard_backward"),
    )
    unrecorded = [mock.patch.object(of, name, Unrecorded(getattr(of, name))) for of, name in kernels]
    with unrecorded[0], unrecorded[1]:
        assert check_one_launch("triton", shape, dtype, parts, gradient) == (set(), set())


@pytest.mark.slow
@interpreted
def test_larger_problems_of_triton():
    check_one_launch("triton", (1, 70, 3), torch.float32, PARTS, "unrolled")  # the backward streams
    check_one_launch("triton", (1, 300, 2), torch.float32, PARTS, "unrolled")  # the forward, too


@pytest.mark.parametrize(("shape", "dtype", "parts", "gradient"), LAUNCHES, ids=str)
def test_one_launch_of_cuda(shape, dtype, parts, gradient):
    cuda_emulated.module()
    sizes = mock.patch.object(native, "workspace_size", lambda name, **a: getattr(cuda_emulated.module(), name)(**a))
    with sizes, mock.patch.object(native, "call_cuda", lambda name, device, **a: cuda_emulated.call(name, **a)):
        forward, backward = check_one_launch("cuda", shape, dtype, parts, gradient)
    # Half precision: the kernel adds up dx and dy in fp32, which are rounded afterwards.
    assert (forward, backward) == (set(), set() if dtype == torch.float32 else {"copy_"})
