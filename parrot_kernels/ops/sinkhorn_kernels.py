"""The launchers of Sinkhorn-Hadamard by backend, and which of them serves a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, native
from ..reference import sinkhorn_hadamard as reference

OP = "sinkhorn_hadamard"


class Kernels(NamedTuple):
    """A backend's launchers; keywords as in `reference.sinkhorn_hadamard`.

    And, for a fused row: ``x_copy``, ``y_copy`` and ``paired_hadamard``, where to write x, y and x * y; the gradients
    of these, ``grad_x_copy`` and so on, to add to dx and dy; and ``row_stride``, with which those and what is
    transported are slices of one contiguous tensor, instead of contiguous.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


def _in_full_precision(function: Callable[..., None]) -> Callable[..., None]:
    """Autocast would reach the products inside."""

    @functools.wraps(function)
    def run(*, x: Tensor, **arguments: Any) -> None:
        with torch.autocast(x.device.type, enabled=False):
            function(x=x, **arguments)

    return run


def _with_row(launch: Callable[..., None], strided: bool = True) -> Callable[..., None]:
    """For kernels that write x_to_y and y_to_x only, and always, and unless ``strided`` contiguous."""

    @functools.wraps(launch)
    def run(*, row_stride: int | None = None, **arguments: Any) -> None:
        if row_stride is None:
            return launch(**arguments)
        x, y = arguments["x"], arguments["y"]
        sources = {"x_copy": x, "y_copy": y, "paired_hadamard": None}
        targets = {name: arguments.pop(name) for name in sources}
        for name, points in (("x_to_y", y), ("y_to_x", x)):
            given = arguments[name]
            if given is None or not (strided or given.is_contiguous()):
                targets[name], sources[name] = given, torch.empty_like(points, memory_format=torch.contiguous_format)
                arguments[name] = sources[name]
        launch(**arguments)
        for name, target in targets.items():
            if target is not None and name != "paired_hadamard":
                target.copy_(sources[name])
        if targets["paired_hadamard"] is not None:
            torch.mul(x, y, out=targets["paired_hadamard"])

    return run


def _with_row_gradients(launch: Callable[..., None]) -> Callable[..., None]:
    """For kernels that don't add the gradients of the parts in which nothing is transported."""

    @functools.wraps(launch)
    def run(*, row_stride: int | None = None, **arguments: Any) -> None:
        if row_stride is None:
            return launch(**arguments)
        copies = (arguments.pop("grad_x_copy"), arguments.pop("grad_y_copy"))
        paired = arguments.pop("grad_paired_hadamard")
        launch(**arguments)
        totals, partners = (arguments["dx"], arguments["dy"]), (arguments["y"], arguments["x"])
        for total, copy, partner in zip(totals, copies, partners, strict=True):
            if total is not None and copy is not None:
                total += copy
            if total is not None and paired is not None:
                total.addcmul_(paired, partner)

    return run


def _triton_forward(*, x: Tensor, y: Tensor, **arguments: Any) -> None:
    from ..triton_kernels import sinkhorn_hadamard, sinkhorn_streaming  # import triton, which may be absent

    resident = sinkhorn_hadamard.why_not(x.shape[1], y.shape[1]) is None
    run = sinkhorn_hadamard.forward if resident else _with_row(sinkhorn_streaming.forward, strided=False)
    run(x=x, y=y, **arguments)


_reference_backward = _with_row_gradients(_in_full_precision(reference.backward))


@_with_row
def _cpu_forward(**arguments: Any) -> None:
    native.call_cpu("sinkhorn_hadamard_forward", workspace_limit=native.workspace_limit(), **arguments)


@_with_row_gradients
def _cpu_backward(*, gradient: str, **arguments: Any) -> None:
    if gradient == "implicit":  # one dense linear system in float64: LAPACK's work, by way of PyTorch
        _reference_backward(gradient=gradient, **arguments)
    else:
        limit = native.workspace_limit()
        native.call_cpu("sinkhorn_hadamard_backward", gradient=gradient, workspace_limit=limit, **arguments)


def _triton_backward(*, x: Tensor, y: Tensor, gradient: str, **arguments: Any) -> None:
    from ..triton_kernels import sinkhorn_hadamard_backward, sinkhorn_streaming_backward

    if gradient == "implicit":  # one dense linear system in float64, by way of PyTorch
        run = _reference_backward
    elif sinkhorn_hadamard_backward.why_not(x.shape[1], y.shape[1]) is None:
        run = sinkhorn_hadamard_backward.backward
    else:
        run = _with_row_gradients(sinkhorn_streaming_backward.backward)
    run(x=x, y=y, gradient=gradient, **arguments)


def _cuda_forward(*, x: Tensor, row_stride: int | None = None, **arguments: Any) -> None:
    native.call_cuda("sinkhorn_hadamard_forward_cuda", x.device, x=x, **arguments)


def _cuda_backward(
    *, x: Tensor, y: Tensor, eps: Tensor, gradient: str, dx: Tensor | None, dy: Tensor | None,
    row_stride: int | None = None, **arguments: Any,
) -> None:  # fmt: skip
    if gradient == "implicit":  # one dense linear system in float64, by way of PyTorch
        _reference_backward(x=x, y=y, eps=eps, gradient=gradient, dx=dx, dy=dy, **arguments)
        return
    batch, N, M = x.shape[0], x.shape[1], y.shape[1]
    wide = x.dtype == torch.float64
    needs_workspace = native.workspace_size("sinkhorn_hadamard_needs_workspace", N=N, M=M, wide=wide)
    workspace = eps.new_empty(batch, N, M) if needs_workspace else None
    sums = [t if t is None or t.dtype == eps.dtype else torch.empty_like(t, dtype=eps.dtype) for t in (dx, dy)]
    given = {"x": x, "y": y, "eps": eps, "gradient": gradient, "workspace": workspace, **arguments}
    native.call_cuda("sinkhorn_hadamard_backward_cuda", x.device, dx=sums[0], dy=sums[1], **given)
    for target, wider in zip((dx, dy), sums, strict=True):
        if target is not None and wider is not None and target is not wider:
            target.copy_(wider)


def why_not_cuda(x: Tensor, y: Tensor) -> str | None:
    """None if the shared memory of a block holds such a problem, else the reason."""
    extension = native.extension()
    with torch.cuda.device(x.device):
        limit = extension.shared_memory_limit()
    N, M = x.shape[1], y.shape[1]
    needed = extension.sinkhorn_hadamard_shared_memory(N=N, M=M, wide=x.dtype == torch.float64)
    if needed <= limit:
        return None
    return (
        f"the cuda kernel keeps a problem in the shared memory of a block: {N} by {M} points take {needed} bytes, "
        f"this device has {limit}"
    )


KERNELS = {
    "torch": Kernels(_with_row(_in_full_precision(reference.forward)), _reference_backward),
    "cpu": Kernels(_cpu_forward, _cpu_backward),
    "cuda": Kernels(_cuda_forward, _cuda_backward),
    "triton": Kernels(_triton_forward, _triton_backward),
}


def choose_backend(x: Tensor, y: Tensor, backend: str | None) -> str:
    """`backends.select` for these points."""
    device, unsupported = x.device.type, {}
    cuda_serves = device == "cuda" and backends.why_not(OP, "cuda", device, x.dtype) is None
    if cuda_serves and (why := why_not_cuda(x, y)) is not None:
        unsupported["cuda"] = why
    return backends.select(OP, device, x.dtype, backend, unsupported)
