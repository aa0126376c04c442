"""Shared by the tests of the scan and of the convolution: option crossings and where to run them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from parrot_kernels import backends


def pairwise(options: dict[str, Sequence[object]]) -> Iterator[dict[str, object]]:
    """A small set of combinations in which every pair of values of every two options occurs."""
    sizes = [len(values) for values in options.values()]
    # An array for each pair of options, of length one along all others: their sum is what each combination would add.
    missing = {
        (a, b): np.ones([n if i in (a, b) else 1 for i, n in enumerate(sizes)], dtype=np.int32)
        for a, b in itertools.combinations(range(len(sizes)), 2)
    }
    while True:
        gain = sum(missing.values(), np.zeros(sizes, dtype=np.int32))
        best = np.unravel_index(gain.argmax(), sizes)
        if gain[best] == 0:
            return
        for pair, array in missing.items():
            array[tuple(chosen if i in pair else 0 for i, chosen in enumerate(best))] = 0
        yield {name: values[chosen] for (name, values), chosen in zip(options.items(), best, strict=True)}


def places(op: str) -> list:
    """(backend, device) for pytest.mark.parametrize: every backend of the op, on the device it is for."""
    params = []
    for backend in (*backends.IMPLEMENTED[op], "torch"):
        on_gpu = backend == "cuda" or (backend == "triton" and not backends.interpreting())
        device = "cuda" if on_gpu else "cpu"
        params.append(pytest.param(backend, device, marks=pytest.mark.gpu if on_gpu else (), id=f"{backend}-{device}"))
    return params


def skip_unless_served(op: str, backend: str, device: str, dtype: torch.dtype) -> None:
    if (why := backends.why_not(op, backend, device, dtype)) is not None:
        pytest.skip(why)


def leaves(inputs: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Fresh leaves that require gradients, optionally in another dtype."""
    return {
        name: None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_()
        for name, t in inputs.items()
    }


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor | None], cotangents: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs "out", "final_state" and the gradient "d<name>" of every input, for given output gradients."""
    out, final_state = function(**inputs)
    sum((result * c.to(result)).sum() for result, c in zip((out, final_state), cotangents, strict=True)).backward()
    result = {"out": out.detach(), "final_state": final_state.detach()}
    for name, leaf in inputs.items():
        if leaf is not None:
            result[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return result


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], kind: str, scale: float = 1.0) -> None:
    assert got.keys() == want.keys()
    for name in got:
        gradient = name.startswith("d")
        assert_close(got[name].cpu(), want[name].cpu(), f"{kind}_grad" if gradient else kind, name, scale)
