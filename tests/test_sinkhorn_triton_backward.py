"""The Triton backward of sinkhorn_hadamard, run by Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import interpreted
from sinkhorn_cases import CASES, problem
from test_sinkhorn_cpu import FP32, launch_arguments
from test_sinkhorn_cpu_backward import GRADIENTS, assert_matches, cotangents, run
from torch import Tensor

MODES = ("unrolled", "detached")


def points(batch: int, n: int, m: int, dim: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, n, dim), "y": torch.randn(batch, m, dim)}


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("case", CASES)
@interpreted
def test_every_option(case, gradient):
    assert_matches(problem(case, (3, 9, 13, 5), FP32), gradient=gradient, kernels="triton")


@interpreted
def test_ad_hoc():
    pass
