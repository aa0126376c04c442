"""The streaming Triton backward of sinkhorn_hadamard with small tiles, in the interpreter, against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted import interpreted
from sinkhorn_cases import CASES, cotangents, oracle, problem, with_gradients
from tolerances import assert_close

GRADIENTS = ("dx", "dy", "da", "db", "dcost", "deps")


def streaming(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: in the interpreter, with the streaming kernels for every size and new memory filled with NaN."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        from parrot_kernels.ops import sinkhorn_hadamard as op
        from parrot_kernels.triton_kernels import sinkhorn_streaming, sinkhorn_streaming_backward, sinkhorn_tiles

        tiles = sinkhorn_tiles.Tiles(own=16, other=16, depth=16, features=16, chunk=32, vector=16)
        kernels = op.Kernels(
            functools.partial(sinkhorn_streaming.forward, tiles=tiles),
            functools.partial(sinkhorn_streaming_backward.backward, tiles=tiles),
        )
        torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
        try:
            with mock.patch.dict(op.KERNELS, triton=kernels):
                test(**arguments)
        finally:
            torch.use_deterministic_algorithms(False)

    return interpreted(run)


def launch(arguments: dict[str, Any], outer: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    from sinkhorn_cases import op

    return with_gradients(functools.partial(op, backend="triton", **options), arguments, outer)


def compare(arguments: dict[str, Any], gradient: str = "unrolled", scale: float = 1.0) -> dict[str, torch.Tensor]:
    from sinkhorn_cases import to

    outer = cotangents(arguments)
    got = launch(arguments, outer, gradient=gradient)
    want = with_gradients(functools.partial(oracle, gradient=gradient), to(arguments, torch.float64), outer)
    for name in GRADIENTS:
        if name in got:
            assert_close(got[name], want[name], "sinkhorn_grad", name, scale)
    return got


@pytest.mark.parametrize("gradient", ["unrolled", "detached"])
@pytest.mark.parametrize("case", CASES)
@streaming
def test_every_option(case, gradient):
    options = {**CASES[case], "n_iters": 4}
    compare(problem(options, (3 if "lengths" in options else 1, 19, 35, 5), torch.float32), gradient)
