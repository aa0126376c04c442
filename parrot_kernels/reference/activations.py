"""Activations that give an element the same bits wherever it lies in a tensor.

torch's own sigmoid, silu and softplus take another path for the tail of a vector loop on CPU, so that a result
would depend on its batch-mates; exp and log1p do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

SOFTPLUS_THRESHOLD = 20.0  # torch's: the identity beyond


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def silu_derivative(x: Tensor) -> Tensor:
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def softplus(x: Tensor) -> Tensor:
    return torch.where(x > SOFTPLUS_THRESHOLD, x, torch.log1p(torch.exp(x)))


def softplus_derivative(x: Tensor) -> Tensor:
    return torch.where(x > SOFTPLUS_THRESHOLD, 1.0, sigmoid(x))
