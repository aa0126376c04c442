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


def _begin() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise RuntimeError("the worker process does not interpret Triton kernels")
    # Three quarters of a test's time would go for nothing. A launch patches the functions of triton.language, and each
    # call of a device function all of them again: once for those in triton.language.core, and for good, is enough.
    # And whether integers overflow is computed for an assertion that is not made.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._patch_lang(tl.sum.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@functools.lru_cache(maxsize=1)
def _worker() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):  # the worker inherits it when first used
        pool.submit(_begin).result()
    atexit.register(pool.shutdown)
    return pool


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: run the test's body in the interpreter process. Its parameters must pickle (no fixtures)."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        _worker().submit(_call, test.__module__, test.__name__, arguments).result()

    return run
