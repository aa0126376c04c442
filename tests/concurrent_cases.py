"""Every CPU op, forward and backward, for processes and threads that compute at once.

As a program: `python concurrent_cases.py fork|spawn|forkserver` computes in the workers of a DataLoader, and
`python concurrent_cases.py threads` makes the first call of the extension from many threads at the same moment.
"""

from __future__ import annotations

import os
import sys
import threading

import torch
from torch import Tensor


def every_op(size: int = 20) -> list[Tensor]:
    """Outputs of all ops and the gradients of all float inputs; the same at every call, on any number of threads.

    Without ``gradient="implicit"``: its linear algebra is torch's, whose last digits depend on the threads, and which
    waits for ever for threads that a fork has lost.
    """
    import parrot_kernels as ops

    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random).requires_grad_()

    found: list[Tensor] = []

    def keep(inputs: list[Tensor], *outputs: Tensor) -> None:
        found.extend(t.detach().clone() for t in outputs)
        found.extend(torch.autograd.grad([t.sum() for t in outputs], inputs))

    x, y = leaf(4, size, 8), leaf(4, size + 3, 8)
    for gradient in ("unrolled", "detached"):
        out = ops.sinkhorn_hadamard(x, y, n_iters=5, eps=0.3, gradient=gradient)
        keep([x, y], out.x_hadamard, out.y_hadamard, out.cost)
    keep([x, y], ops.sinkhorn_divergence(x, y, n_iters=5))
    first, second = leaf(6, 8), leaf(6, 8)
    fused = ops.parallel_branch_fusion(first, second, n_iters=5)
    keep([first, second], *([fused] if isinstance(fused, Tensor) else [t for t in fused if t.requires_grad]))

    u, weight, A = leaf(2, 12, 70), leaf(12, 4), leaf(12, 8)
    delta, B, C, state = leaf(2, 12, 70), leaf(2, 8, 70), leaf(2, 8, 70), leaf(2, 12, 8)
    keep([u, weight], ops.causal_conv1d(u, weight, activation="silu"))
    keep([u, delta, A, B, C, state], ops.selective_scan(u, delta, -A, B, C, initial_state=state))

    with torch.no_grad():  # in place, and without gradients
        step, taps = state.detach().clone(), torch.zeros(2, 12, 3)
        found += [ops.causal_conv1d_update(u[..., 0], taps, weight), taps]
        found += [ops.selective_state_update(step, u[..., 0], delta[..., 0], -A, B[..., 0], C[..., 0]), step]
    return found


def environment() -> dict[str, str]:
    """That of this process, in which others find what it finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def differences(got: list[Tensor], want: list[Tensor]) -> list[int]:
    return [i for i, (g, w) in enumerate(zip(got, want, strict=True)) if not torch.equal(g, w)]


class Computed(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        torch.set_num_threads(1 + index)
        return every_op()


def in_workers(context: str) -> None:
    want = every_op()
    loader = torch.utils.data.DataLoader(Computed(), num_workers=2, batch_size=None, multiprocessing_context=context)
    assert [differences(loaded, want) for loaded in loader] == [[]] * 4


def first_call_in_threads(count: int = 8) -> None:
    results: list[list[Tensor]] = []
    together = threading.Barrier(count)

    def work() -> None:
        together.wait()
        results.append(every_op())  # imports the package, too

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "parrot_kernels" in sys.modules
    want = every_op()
    assert [differences(result, want) for result in results] == [[]] * count


if __name__ == "__main__":
    if sys.argv[1] == "threads":
        first_call_in_threads()
    else:
        in_workers(sys.argv[1])
