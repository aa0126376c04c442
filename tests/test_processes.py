"""The CPU kernels in forked processes and in many threads at once, and modules that are copied and stored."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import parrot_kernels
from parrot_kernels import native

built = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the extension is not built")
POINTS, STEPS = torch.rand(2, 150, 20), torch.rand(2, 64, 300)

FORK = """
import os, signal
import torch
from parrot_kernels import causal_conv1d, selective_scan, sinkhorn_hadamard

torch.set_num_threads(4)
# So few numbers that torch itself, which would wait, does not share them among threads; but our work on them.
x, u = torch.rand(8, 150, 20), torch.rand(2, 32, 300)

def work():
    points = x.clone().requires_grad_()
    cost = sinkhorn_hadamard(points, x + 1).cost
    gradient, = torch.autograd.grad(cost.sum(), points)
    scanned = selective_scan(causal_conv1d(u, u[0, :, :4]), u, -u[0, :, :8], u[:, :8], u[:, :8])
    return cost.detach(), gradient, scanned

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return work()

want = work()
for loaded in torch.utils.data.DataLoader(Data(), num_workers=2, batch_size=None, multiprocessing_context="fork"):
    assert all(torch.equal(g, w) for g, w in zip(loaded, want, strict=True))
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if all(torch.equal(g, w) for g, w in zip(work(), want, strict=True)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@built
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_forked_processes_get_the_same_bits_and_do_not_wait_for_lost_threads():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]


@built
def test_many_threads_at_once():
    def work() -> tuple[Tensor, ...]:
        points = POINTS.clone().requires_grad_()
        cost = parrot_kernels.sinkhorn_hadamard(points, POINTS + 1, n_iters=5).cost
        steps = STEPS.clone().requires_grad_()
        out = parrot_kernels.selective_scan(steps, STEPS, -STEPS[0, :, :8], STEPS[:, :8], STEPS[:, :8])
        return cost, out, *torch.autograd.grad([cost.sum(), out.sum()], [points, steps])

    want, wrong = work(), []

    def repeat() -> None:
        for _ in range(10):
            wrong.extend(i for i, (g, w) in enumerate(zip(work(), want, strict=True)) if not torch.equal(g, w))

    threads = [threading.Thread(target=repeat) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "module",
    [
        parrot_kernels.Mamba(16),
        parrot_kernels.BiMamba(16),
        parrot_kernels.SinkhornHadamard(eps=0.1, reach=(None, 0.5)),
        parrot_kernels.ParallelBranchFusion(),
        parrot_kernels.SinkhornDivergence(n_iters=10),
    ],
    ids=lambda module: type(module).__name__,
)
def test_copies_and_stored_modules_compute_the_same(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = torch.rand(2, 5, 16)
    inputs = (x,) if list(module.parameters()) else (x, x + 1)

    def result(module: torch.nn.Module) -> Tensor:
        out = module(*inputs)
        return out if isinstance(out, Tensor) else out.x_hadamard

    want = result(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(result(other), want)
