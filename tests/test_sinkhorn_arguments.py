"""What sinkhorn_hadamard says of bad arguments."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from sinkhorn_cases import OP, op, problem

from parrot_kernels.ops.sinkhorn_hadamard import sinkhorn_hadamard

NAN, INF = math.nan, math.inf
SIZES = (4, 5, 6, 3)  # B, N, M, D

# What is wrong, what to change in the arguments of a good call, the error, and what it says.
BAD = [
    ("x is a list", {"x": [[1.0]]}, TypeError, r"`x` must be a torch.Tensor; got list"),
    ("x has one dimension", {"x": torch.zeros(3)}, ValueError, r"`x` must be of shape \(B, N, D\); got \(3,\)"),
    ("integers", {"x": torch.zeros(4, 5, 3, dtype=torch.int64)}, TypeError, r"`x` must be of dtype float32, float64"),
    ("no features", {"x": torch.zeros(4, 5, 0), "y": torch.zeros(4, 6, 0)}, ValueError, "at least one feature"),
    (
        "y of another dtype",
        {"y": torch.zeros(4, 6, 3, dtype=torch.float64)},
        TypeError,
        r"`y` must be of dtype float32; got float64",
    ),
    (
        "y with other features",
        {"y": torch.zeros(4, 6, 2)},
        ValueError,
        r"`y` must be of shape \(B, M, D\) with B = 4, D = 3",
    ),
    ("y with another batch", {"y": torch.zeros(3, 6, 3)}, ValueError, r"with B = 4, D = 3; got \(3, 6, 3\)"),
    (
        "y on another device",
        {"y": torch.zeros(4, 6, 3, device="meta")},
        ValueError,
        r"`y` must be on cpu.*Move it with",
    ),
    ("a of another size", {"a": torch.ones(4, 6)}, ValueError, r"`a` must be of shape \(B, N\) with B = 4, N = 5"),
    ("a of one problem", {"a": torch.ones(5)}, ValueError, r"`a` must be of shape \(B, N\)"),
    (
        "a is negative",
        {"a": -torch.ones(4, 5)},
        ValueError,
        r"`a` must be finite and not negative; got values from -1.0",
    ),
    (
        "b is NaN",
        {"b": torch.full((4, 6), NAN)},
        ValueError,
        r"`b` must be finite and not negative; got values from nan",
    ),
    ("b is infinite", {"b": torch.full((4, 6), INF)}, ValueError, r"`b` must be finite"),
    ("b is of integers", {"b": torch.ones(4, 6, dtype=torch.int32)}, TypeError, r"`b` must be of dtype"),
    ("lengths are floats", {"x_lengths": torch.ones(4)}, TypeError, r"`x_lengths` must be of dtype int32, int64"),
    (
        "lengths of another size",
        {"x_lengths": torch.ones(3, dtype=torch.int32)},
        ValueError,
        r"`x_lengths` must be of shape \(B\)",
    ),
    (
        "a length is too large",
        {"y_lengths": torch.tensor([1, 2, 3, 7])},
        ValueError,
        r"`y_lengths` must be between 0 and 6; got values from 1 to 7",
    ),
    (
        "a length is negative",
        {"x_lengths": torch.tensor([1, 2, 3, -1])},
        ValueError,
        r"`x_lengths` must be between 0 and 5",
    ),
    (
        "an unknown cost",
        {"cost": "manhattan"},
        ValueError,
        r"`cost` must be one of 'euclidean', 'sqeuclidean', 'cosine'; got 'manhattan'",
    ),
    ("no cost", {"cost": None}, TypeError, r"`cost` must be a torch.Tensor; got NoneType"),
    ("a cost of another shape", {"cost": torch.ones(4, 6, 5)}, ValueError, r"`cost` must be of shape \(B, N, M\)"),
    ("an unknown scale", {"cost_scale": "mean"}, ValueError, r"`cost_scale` must be one of 'max'"),
    ("a scale of zero", {"cost_scale": 0}, ValueError, r'`cost_scale` must be a positive number or "max"; got 0'),
    ("eps is zero", {"eps": 0.0}, ValueError, r"`eps` must be a positive number; got 0.0"),
    ("eps is negative", {"eps": -1.0}, ValueError, r"`eps` must be a positive number; got -1.0"),
    ("eps is NaN", {"eps": NAN}, ValueError, r"`eps` must be a positive number; got nan"),
    ("eps is a string", {"eps": "small"}, TypeError, r"`eps` must be a positive number; got 'small'"),
    (
        "an eps tensor with a zero",
        {"eps": torch.tensor([0.1, 0.1, 0.0, 0.1])},
        ValueError,
        r"`eps` must be positive and finite; got values from 0.0",
    ),
    ("an eps tensor of another size", {"eps": torch.ones(5)}, ValueError, r"`eps` must be of shape \(B\) with B = 4"),
    ("no iterations", {"n_iters": 0}, ValueError, r"`n_iters` must be at least 1; got 0"),
    ("half an iteration", {"n_iters": 0.5}, TypeError, r"`n_iters` must be an int; got 0.5"),
    ("tol is negative", {"tol": -1e-3}, ValueError, r"`tol` must be None or a number that is not negative; got -0.001"),
    ("tol is a string", {"tol": "tight"}, TypeError, r"`tol` must be None or a number"),
    ("reach is zero", {"reach": 0.0}, ValueError, r"`reach` must be None, a positive number, or a pair"),
    ("reach of three", {"reach": (1.0, 1.0, 1.0)}, ValueError, r"`reach` must be None, a positive number, or a pair"),
    ("reach of strings", {"reach": ("a", None)}, TypeError, r"`reach` must be None, a positive number, or a pair"),
    (
        "an unknown gradient",
        {"gradient": "exact"},
        ValueError,
        r"`gradient` must be one of 'unrolled', 'implicit', 'detached'",
    ),
    (
        "an unknown backend",
        {"backend": "fpga"},
        ValueError,
        r"`backend` must be one of None, 'cpu', 'cuda', 'triton', 'torch'",
    ),
    ("a backend for another device", {"backend": "cuda"}, RuntimeError, r"backend='cuda' can't serve this call"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(changes, kind, message):
    arguments = problem("plain", SIZES, torch.float32) | {"backend": "torch"} | changes
    with pytest.raises(kind, match=f"^{OP}: .*" + message):
        sinkhorn_hadamard(**arguments)


def test_bad_values_are_found_inside_compiled_code():
    torch._dynamo.reset()
    arguments = problem("plain", SIZES, torch.float32)
    compiled = torch.compile(functools.partial(op, backend="torch"), fullgraph=True, backend="aot_eager")
    compiled(**arguments, x_lengths=torch.tensor([1, 2, 3, 5]))
    with pytest.raises(ValueError, match="`x_lengths` must be between 0 and 5; got values from 1 to 6"):
        compiled(**arguments, x_lengths=torch.tensor([1, 2, 3, 6]))


def test_padding_may_hold_any_weight():
    arguments = problem("plain", SIZES, torch.float32)
    weights = torch.full((4, 5), 0.5)
    weights[:, 2:] = torch.tensor([NAN, INF, -1])
    op(**arguments, a=weights, x_lengths=torch.tensor([2, 1, 0, 2]), backend="torch")
    with pytest.raises(ValueError, match="`a` must be finite and not negative"):
        op(**arguments, a=weights, x_lengths=torch.tensor([2, 1, 0, 3]), backend="torch")
