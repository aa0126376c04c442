"""Runs the bodies of tests in a process where Triton interprets its kernels.

TRITON_INTERPRET must be set before triton is first imported, and other tests of the same session compile kernels.
So one worker process is spawned with it set, and a test decorated with `interpreted` runs its body there:
parameters are sent over, and its failure comes back with the worker's traceback.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock


def _call(module: str, name: str, arguments: dict[str, Any]) -> None:
    import torch

    torch.manual_seed(0)
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def _interpreting() -> bool:
    import triton.language as tl

    return os.environ.get("TRITON_INTERPRET") == "1" and type(tl.sum).__name__ != "JITFunction"


@functools.lru_cache(maxsize=1)
def _worker() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):  # the worker inherits it when first used
        if not pool.submit(_interpreting).result():
            raise RuntimeError("the worker process does not interpret Triton kernels")
    atexit.register(pool.shutdown)
    return pool


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: run the test's body in the interpreter process. Its parameters must pickle (no fixtures)."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        _worker().submit(_call, test.__module__, test.__name__, arguments).result()

    return run
