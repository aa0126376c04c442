"""The CPU kernels in forked processes and in many threads at once, and modules that are copied and stored."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import concurrent_cases as cases
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


SLOW = pytest.mark.slow


@built
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize(
    "way", ["threads", "fork", pytest.param("spawn", marks=SLOW), pytest.param("forkserver", marks=SLOW)]
)
def test_every_op_in_the_workers_of_a_loader_and_first_called_by_many_threads(way):
    done = subprocess.run(
        [sys.executable, cases.__file__, way],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=Path(parrot_kernels.__file__).parents[1],
        env=cases.environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]


@built
def test_sixteen_threads_while_settings_change(request):
    """The number of torch's threads, the workspace limit, above these problems' needs, and the loaded extension."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    request.addfinalizer(partial(native.set_workspace_limit, native.workspace_limit()))
    want, wrong, finished = cases.every_op(), [], threading.Event()

    def change() -> None:
        turn = 0
        while not finished.is_set():
            native.set_workspace_limit((1 << 30, 1 << 16)[turn % 2])
            native._load.cache_clear()  # and the extension is looked for again
            turn += 1

    def work(threads: int) -> None:
        try:
            for turn in range(3):
                torch.set_num_threads(1 + (threads + turn) % 4)
                wrong.extend(cases.differences(cases.every_op(), want))
        except Exception as error:
            wrong.append(error)

    changing = threading.Thread(target=change)
    working = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in [changing, *working]:
        thread.start()
    for thread in working:
        thread.join()
    finished.set()
    changing.join()
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
