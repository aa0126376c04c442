"""Entropic transport without the Hadamard products: the plan, or the features it carries over."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from .sinkhorn_hadamard import sinkhorn_hadamard


def sinkhorn_plan(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The entropic transport plan P_ij = exp((f_i + g_j - C_ij) / eps) between two sets of features.

    Args:
        x, y: points (B, N, D) and (B, M, D), or (N, D) and (M, D) for one problem.
        options: keyword arguments of :func:`parrot_kernels.sinkhorn_hadamard`, which defines f, g and C: all but
            ``return_plan``.

    Returns:
        (B, N, M) or (N, M), in fp32, for fp64 inputs in fp64. After the last iteration its sums over i are the
        weights of y (balanced), those over j the weights of x up to the error of the iteration. Differentiable in x,
        y, a cost tensor, a, b and an eps tensor unless ``gradient="detached"``.

    Memory and errors are those of sinkhorn_hadamard.
    """
    plan = sinkhorn_hadamard(x, y, return_plan=True, return_hadamard=False, **options).plan
    return cast(Tensor, plan)  # since it was asked for


def sinkhorn_transport(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Each set of features carried over to the other by the entropic plan P::

        x_to_y_j = (1 / b_j) sum_i P_ij x_i        y_to_x_i = (1 / a_i) sum_j P_ij y_j

    Args:
        x, y: points (B, N, D) and (B, M, D), or (N, D) and (M, D) for one problem.
        options: keyword arguments of :func:`parrot_kernels.sinkhorn_hadamard`: all but ``return_plan`` and
            ``return_hadamard``.

    Returns:
        x_to_y (B, M, D) and y_to_x (B, N, D), or without B, in the inputs' dtype. Gradients as of sinkhorn_hadamard.

    Memory and errors are those of sinkhorn_hadamard.
    """
    out = sinkhorn_hadamard(x, y, return_plan=False, return_hadamard=False, **options)
    return out.x_to_y, out.y_to_x
