"""Timing that is fair on a noisy machine: every provider of a case takes its turn in each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Work = Callable[[], object]


@dataclass(frozen=True)
class ForwardAndBackward:
    """A forward and the gradients of its outputs, together by a call or the backward alone."""

    forward: Callable[[], Sequence[Tensor]]
    inputs: Sequence[Tensor]
    gradients: Sequence[Tensor]

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.gradients)

    def backward_alone(self) -> Callable[[], tuple[Tensor, ...]]:
        outputs = self.forward()
        return lambda: torch.autograd.grad(outputs, self.inputs, self.gradients, retain_graph=True)


def graph_replay(work: Work) -> Work:
    """The same work, captured in a CUDA graph once; a call replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, tunes and allocates what must not happen in a capture
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()

    def replay() -> object:
        graph.replay()
        return outputs

    return replay


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(work: Work, device: str, repeats: int = 1) -> float:
    """Seconds of one call, averaged over ``repeats`` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleaved(works: dict[str, Work], device: str, seconds: float = 1.0, rounds: int = 40) -> dict[str, np.ndarray]:
    """Sample every work in turn, ``rounds`` times or until each has had about ``seconds``; at least 3 rounds.

    A short work is repeated within its turn so that a sample lasts about 2 ms at least, after a call that is not
    counted: caches and sleeping threads are as the work before left them.
    """
    first = {}
    for name, work in works.items():
        work()  # warm-up: compilation, page faults, thread pools
        first[name] = once(work, device)
    repeats = {name: max(1, min(1000, int(2e-3 / max(t, 1e-7)))) for name, t in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name, work in works.items():
            if index < 3 or sum(samples[name]) * repeats[name] < seconds:
                if first[name] < 0.1:
                    work()
                samples[name].append(once(work, device, repeats[name]))
    return {name: np.asarray(values) for name, values in samples.items()}
