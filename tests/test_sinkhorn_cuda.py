"""The CUDA kernels of sinkhorn_hadamard, run thread by thread on the host, against the reference in float64."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from typing import Any

import cuda_emulated
import pytest
import torch
from sinkhorn_cases import CASES, OP, problem
from test_sinkhorn_cpu import FP32, FP64, allocate, expected, launch_arguments, points
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import native
from parrot_kernels.ops.sinkhorn_kernels import KERNELS, why_not_cuda


@pytest.fixture(scope="module")
def emulated():
    return cuda_emulated.module()


def forward(module: Any, histories: bool = True, **given: Any) -> dict[str, Tensor]:
    arguments = launch_arguments(**given)
    out = allocate(arguments, histories)
    getattr(module, f"{OP}_forward_cuda")(**arguments, **out, stream=0)
    return out


def assert_matches(module: Any, given: dict[str, Any], scale: float = 1.0) -> None:
    got, want = forward(module, **given), expected(**given)
    assert torch.equal(got["iterations"], want["iterations"])
    assert torch.equal(got["converged"], want["converged"])
    done = torch.arange(got["f_history"].shape[1]) < want["iterations"][:, None]
    for name in want.keys() - {"iterations", "converged"}:
        if name.endswith("history"):  # unspecified past the last iteration
            got[name], want[name] = (t.masked_fill(~done[:, :, None], 0) for t in (got[name], want[name]))
        assert_close(got[name], want[name].to(FP64), "sinkhorn", name, scale)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [FP32, FP64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_option(emulated, case, dtype):
    assert_matches(emulated, problem(case, (4, 19, 23, 5), dtype))


# One size for each number of rows and columns that a thread may hold, and some that no register tile holds.
SIZES = [
    (1, 1, 1, 1), (2, 1, 9, 3), (2, 9, 1, 3), (3, 7, 13, 1), (2, 33, 31, 20), (1, 10, 50, 150), (1, 100, 100, 6),
    (1, 9, 210, 3), (1, 133, 40, 3), (1, 130, 100, 3), (1, 140, 150, 3),
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(emulated, size, dtype):
    for cost in ("euclidean", "cosine") if size[1] < 50 else ("sqeuclidean",):
        assert_matches(emulated, {**points(*size, dtype), "cost": cost, "n_iters": 8})


@pytest.mark.parametrize("reach", [None, 0.3, (None, 0.1), (0.1, None)], ids=str)
@pytest.mark.parametrize("eps", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_any_eps(emulated, eps, reach):
    # C rounds to a part of itself, in units of eps; potentials, of the size of eps where it is large, likewise.
    given = {**points(1, 40, 30, 17), "cost": "sqeuclidean", "eps": eps, "reach": reach, "n_iters": 30}
    assert_matches(emulated, given, scale=max(1.0, 0.02 / eps, eps))


@pytest.mark.parametrize("eps", [0.05, 0.003])
def test_weights_of_zero(emulated, eps):
    generator = torch.Generator().manual_seed(1)
    given = {**points(2, 40, 30, 5), "eps": eps}
    for name, size in (("a", 40), ("b", 30)):
        weights = torch.rand(2, size, generator=generator)
        weights[:, ::4] = 0
        given[name] = weights / weights.sum(1, keepdim=True)
    assert_matches(emulated, given, scale=max(1.0, 0.02 / eps, eps))


def test_point_without_mass_beside_points_without_mass(emulated):
    """The densities there are beyond float32: the kernel has to fall back to log-domain steps."""
    given = {**points(1, 12, 12, 2), "eps": 0.004, "n_iters": 20}
    given["x"][0, 0] = given["y"][0, 0] = 30.0
    given["a"] = given["b"] = torch.tensor([[0.0] + [1 / 11] * 11])
    assert_matches(emulated, given, scale=10)


def test_offsets_follow_a_potential_that_climbs(emulated):
    """The first row's potential climbs 20 bits an iteration, 114 in all, for what is nearest takes a millionth of its
    mass. With respect to its first offset, the kernel's entries for the other columns have few digits, or none."""
    bits = torch.tensor([[[0, 100.5, 126], [400, 0, 0]]])
    given = {"x": torch.tensor([[[0.0], [1.0]]]), "y": torch.tensor([[[0.0], [1.0], [-1.0]]])}
    given |= {"a": torch.tensor([[2**-9, 2**19.5]]), "b": torch.tensor([[2**-29, 2**-5, 2**19.5]])}
    given |= {"cost": bits * math.log(2), "cost_scale": 1.0, "eps": 1.0, "n_iters": 12}
    assert_close(forward(emulated, **given)["y_to_x"], expected(**given)["y_to_x"].to(FP64), "sinkhorn")


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_any_mass(emulated, factor):
    given = points(1, 20, 30, 5)
    given["a"], given["b"] = (torch.rand(1, size) * factor for size in (20, 30))
    assert_matches(emulated, given)


@pytest.mark.parametrize("reach", [None, 0.5])
@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
def test_far_outlier(emulated, cost, reach):
    given = {**points(1, 40, 30, 17), "cost": cost, "reach": reach}
    given["x"][0, 3] = 1e6
    assert_matches(emulated, given)


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cosine"])
def test_coincident_equal_and_zero_points(emulated, cost):
    given = points(1, 40, 30, 17)
    coincident = {"x": given["x"], "y": given["x"][:, :30].clone(), "cost": cost, "eps": 0.002}
    assert_matches(emulated, coincident, scale=10)
    assert_matches(
        emulated, {"x": torch.full_like(given["x"], 3.0), "y": torch.full_like(given["y"], 3.0), "cost": cost}
    )
    given["x"][:, 2] = given["y"][:, 1] = 0
    assert_matches(emulated, {**given, "cost": cost})


def test_strides(emulated):
    given = points(2, 20, 30, 5)
    spread = {name: t.repeat_interleave(2, -1)[..., ::2].mT.contiguous().mT for name, t in given.items()}
    want, got = forward(emulated, **given), forward(emulated, **spread)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("case", ["scaling", "refreshing", "log domain"])
def test_bits_depend_on_nothing_but_the_problem(emulated, case):
    """Neither on the batch, nor on the size it is padded to, what the padding holds, or whether histories are kept."""
    sizes = (2, 37, 70, 6)
    given = points(*sizes)
    a, b = torch.rand(2, 37) / 37, torch.rand(2, 70) / 70
    options = {"n_iters": 9, "eps": 1e-3 if case == "refreshing" else 0.05}
    if case == "log domain":
        a = a * 1e9
    want = forward(emulated, **given, a=a, b=b, **options)
    alone = forward(emulated, histories=False, **{n: t[1:] for n, t in given.items()}, a=a[1:], b=b[1:], **options)
    for name in want.keys() - {"f_history", "g_history"}:
        assert torch.equal(alone[name][0], want[name][1]), name

    def padded(t: Tensor, size: int) -> Tensor:
        filler = torch.full((t.shape[0], size, *t.shape[2:]), torch.nan)
        return torch.cat([t, filler], 1)

    got = forward(
        emulated,
        x=padded(given["x"], 100),
        y=padded(given["y"], 19),
        a=padded(a, 100),
        b=padded(b, 19),
        x_lengths=torch.full((2,), 37),
        y_lengths=torch.full((2,), 70),
        **options,
    )
    for name, value in got.items():
        for dim, size in enumerate(want[name].shape):
            assert not value.narrow(dim, size, value.shape[dim] - size).any(), f"{name}: padding is not zero"
            value = value.narrow(dim, 0, size)
        assert torch.equal(value, want[name]), name


def test_nan_stays_in_its_problem(emulated):
    given = points(3, 20, 30, 5)
    want = forward(emulated, **given)
    given["x"][1, 3, 2] = torch.nan
    got = forward(emulated, **given)
    for name in want:
        assert torch.equal(got[name][::2], want[name][::2]), name
    assert got["y_to_x"][1].isnan().any()


def test_which_sizes_fit(emulated):
    """What the 227 KiB of a block on sm_90 hold, and the 99 KiB on sm_89."""

    def needed(N: int, M: int, wide: bool = False) -> int:
        return emulated.sinkhorn_hadamard_shared_memory(N=N, M=M, wide=wide)

    assert emulated.shared_memory_limit() == 227 * 1024
    assert needed(200, 200) <= 227 * 1024 < needed(256, 256)
    assert needed(128, 128, wide=True) <= 227 * 1024
    assert needed(128, 128) <= 99 * 1024 < needed(150, 150)


def test_the_launcher_speaks_the_binding(emulated, monkeypatch):
    """Without a device at least the keywords can be compared with those of the binding."""
    calls = {}
    monkeypatch.setattr(native, "call_cuda", lambda name, _, **arguments: calls.update({name: {*arguments, "stream"}}))
    arguments = launch_arguments(**points(1, 3, 4, 2))
    row = dict.fromkeys(("x_copy", "y_copy", "paired_hadamard"))
    KERNELS["cuda"].forward(**arguments, **allocate(arguments), **row)
    for name, keywords in calls.items():
        signature = getattr(emulated, name).__doc__
        known = set(re.findall(r"(\w+): ", signature.split("*, ")[1].split(") ->")[0]))
        assert keywords <= known
        assert known - keywords <= {"x_copy", "y_copy", "paired_hadamard"}  # of a fused row
    assert set(calls) == {f"{OP}_forward_cuda"}


def test_a_size_that_does_not_fit_is_a_reason(emulated, monkeypatch):
    monkeypatch.setattr(native, "extension", lambda: emulated)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    assert why_not_cuda(torch.empty(1, 128, 3), torch.empty(1, 128, 3)) is None
    assert "300 by 300 points take" in why_not_cuda(torch.empty(1, 300, 3), torch.empty(1, 300, 3))


def test_products_that_nobody_asked_for(emulated):
    arguments = launch_arguments(**points(1, 5, 6, 3))
    want, got = allocate(arguments), allocate(arguments)
    got["x_hadamard"] = got["y_hadamard"] = None
    for out in (want, got):
        emulated.sinkhorn_hadamard_forward_cuda(**arguments, **out, stream=0)
    assert torch.equal(got["y_to_x"], want["y_to_x"])
    assert torch.equal(got["x_to_y"], want["x_to_y"])
