"""Lengths and batches that are left open: one compiled graph for all, and an exported program that takes any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parrot import Parrot, ParrotConfig
from parrot_kernels import BiMamba, Mamba, ParallelBranchFusion, SinkhornHadamard

SIZES = (5, 33, 1000)  # on both sides of a chunk of the scan, and of the size that `modules.Linear` decides by


@pytest.fixture
def no_recompilation():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("block", [Mamba, BiMamba])
def test_one_graph_for_every_length(block, trained, no_recompilation):
    model = block(32).requires_grad_(trained)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in SIZES:
        x = torch.randn(2, length, 32)
        out = compiled(x)
        torch.testing.assert_close(out, model(x))
        if trained:
            out.sum().backward()


def test_one_graph_for_every_number_of_points(no_recompilation):
    compiled = torch.compile(SinkhornHadamard(n_iters=5), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in zip(SIZES, SIZES[::-1], strict=True):
        compiled(torch.randn(2, n, 8, requires_grad=True), torch.randn(2, m, 8)).cost.sum().backward()


class First(nn.Module):
    """A module's first output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        out = self.module(*inputs)
        return out if isinstance(out, Tensor) else out[0]


def referring() -> Parrot:
    model = Parrot((16, 12), 3, ParrotConfig(transport="reference", reference_size=4)).eval()
    model.set_reference(torch.randn(4, 16), torch.randn(4, 12))
    return model


BATCH, LENGTH, OTHER = (torch.export.Dim(name, min=2, max=5000) for name in ("batch", "length", "other"))
EXPORTED = {
    "Mamba": (Mamba(32), [(2, 5, 32)], [(3, 700, 32)], [{0: BATCH, 1: LENGTH}]),
    "BiMamba": (BiMamba(32), [(2, 5, 32)], [(3, 700, 32)], [{0: BATCH, 1: LENGTH}]),
    "SinkhornHadamard": (
        SinkhornHadamard(), [(2, 5, 4), (2, 6, 4)], [(3, 70, 4), (3, 40, 4)],
        [{0: BATCH, 1: LENGTH}, {0: BATCH, 1: OTHER}],
    ),
    "ParallelBranchFusion": (ParallelBranchFusion(), [(5, 4), (5, 4)], [(70, 4), (70, 4)], [{0: BATCH}, {0: BATCH}]),
    "Parrot": (Parrot((16, 12), 3).eval(), [(5, 16), (5, 12)], [(40, 16), (40, 12)], [{0: BATCH}, {0: BATCH}]),
    "Parrot, reference": (referring(), [(5, 16), (5, 12)], [(40, 16), (40, 12)], [{0: BATCH}, {0: BATCH}]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_takes_any_size(name):
    module, example, shapes, dynamic = EXPORTED[name]
    module = First(module).eval()
    inputs = tuple(torch.randn(shape) for shape in example)
    program = torch.export.export(module, inputs, dynamic_shapes={"inputs": tuple(dynamic)})
    others = tuple(torch.randn(shape) for shape in shapes)
    torch.testing.assert_close(program.module()(*others), module(*others))
