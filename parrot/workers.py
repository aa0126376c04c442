"""Runs in parallel processes: any number of them gives the same results, and none outlives its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt

_fit: Callable[..., Any] | None = None  # of this worker process


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched() -> bool:
    """Whether a launcher (`accelerate launch`, `torchrun`) has started this process as one of several."""
    # Schedulers of clusters set the first of these too.
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def run_all(fit: Callable[..., Any], runs: Sequence[tuple], workers: int) -> Iterator[tuple[tuple, Any]]:
    """``(run, fit(*run))`` of all runs, as they finish; one worker computes in this process, in order.

    Args:
        fit: picklable, with all that the runs share; it is sent to each worker once.
        runs: arguments of each call.
        workers: the most processes.

    Raises:
        RuntimeError: a worker process died.
    """
    if workers <= 1 or len(runs) <= 1:
        for run in runs:
            yield run, fit(*run)
        return
    pool = ProcessPoolExecutor(min(workers, len(runs)), get_context("spawn"), _start_worker, (fit,))
    try:
        with _interrupts_held():  # which workers inherit, as they start
            futures = {pool.submit(_run_in_worker, *run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, most likely for want of memory. Use fewer workers; what was finished is kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(fit: Callable[..., Any]) -> None:
    global _fit
    _fit = fit
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a terminal sends to all: end without a word, the parent speaks
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        # Gradients of some MB are freed and allocated every step: keep the memory instead of giving it back to
        # the system and faulting its pages in again, a fifth of the time of a step.
        malloc = ctypes.CDLL(None).mallopt
        malloc(_M_MMAP_MAX, 0)
        malloc(_M_TRIM_THRESHOLD, 2**31 - 1)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(*run: Any) -> Any:
    return _fit(*run)
