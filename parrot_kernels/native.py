"""The compiled extension: loaded once, called with plain pointers.

The extension is built without torch: of a tensor it reads, as Python code would, the address, dtype, sizes and
strides, so one build serves every torch version. See ``csrc/bindings.cpp`` for the other side.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .build_stamp import stamp

DTYPE_CODES = {  # csrc/include/tensor_view.h
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 6,
}


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """The extension and an empty string, or None and why it can't be loaded."""
    try:  # torch is imported above, so that its OpenMP runtime is in the process before ours asks for one
        module = importlib.import_module("parrot_kernels._C")
        _warn_if_stale()
        for dtype, code in DTYPE_CODES.items():
            module.register_dtype(dtype, code)
        return module, ""
    except ModuleNotFoundError:
        reason = build_info().get("reason", "the package was installed without building it")
        return None, f"the compiled extension is absent: {reason}"
    except ImportError as exception:
        return None, f"the compiled extension is present but does not load: {exception}"


def _warn_if_stale() -> None:
    """In a checkout, what the kernels are called with may change after they were compiled."""
    built, wanted = build_info().get("contract"), stamp(Path(__file__).parents[1] / "csrc")
    if wanted is not None and wanted != built:
        warnings.warn(
            f"parrot_kernels: the compiled extension is called otherwise ({built or 'unknown'}) than this checkout "
            f"calls it ({wanted}): it may fail, or end the process. Build it again: pip install --no-deps -e .",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.lru_cache(maxsize=1)
def build_info() -> dict[str, Any]:
    """What setup.py recorded when this copy was built: compiler, CUDA architectures, reasons for what is missing."""
    path = Path(__file__).with_name("build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def why_missing(device_type: str = "cpu") -> str | None:
    """None if the extension serves this kind of device, else the reason with the remedy."""
    extension, reason = _load()
    if extension is None:
        return f"{reason}; install g++ (or clang++) and reinstall parrot-kernels"
    if device_type == "cuda" and not extension.has_cuda:
        reason = build_info().get("cuda_reason", "it was built without CUDA")
        return f"the compiled extension has no CUDA kernels: {reason}; reinstall with nvcc and PARROT_BUILD_CUDA=1"
    return None


def extension() -> ModuleType:
    """The extension module; raises with the reason and the remedy if there is none."""
    module, _ = _load()
    if module is None:
        raise RuntimeError(f"parrot_kernels: {why_missing()}")
    return module


def call_cpu(function: str, **arguments: Any) -> None:
    """Run a CPU kernel of the extension on as many threads as torch uses."""
    getattr(extension(), function)(**arguments, num_threads=torch.get_num_threads())


_workspace_limit: int | None = None


def workspace_limit() -> int:
    """The limit in force, see `set_workspace_limit`; PARROT_WORKSPACE_LIMIT is read at the first call."""
    global _workspace_limit
    if _workspace_limit is None:
        given = os.environ.get("PARROT_WORKSPACE_LIMIT", str(1 << 30))
        if not given.isdecimal():
            raise ValueError(f"parrot_kernels: PARROT_WORKSPACE_LIMIT must be a number of bytes, got {given!r}")
        _workspace_limit = int(given)
    return _workspace_limit


def set_workspace_limit(limit: int) -> None:
    """Bound what CPU kernels keep of matrices that are larger than their inputs and outputs.

    `sinkhorn_hadamard` keeps the cost and the kernel matrix of a problem, 2 N M numbers of the compute dtype, and its
    backward also the gradient of the cost, 3 N M. Where these are more than ``limit`` bytes they are computed again,
    tile by tile, whenever they are needed: slower, in O((N + M) (D + n_iters)) memory. Which way a problem goes is
    decided by its own size, not by threads or batch, and with it the last bits of the results. Small problems are
    worked on side by side, one per thread; each may use the limit. ``gradient="implicit"`` takes no notice of it.

    Args:
        limit: bytes, not negative. The default is 1 GiB, or the environment variable PARROT_WORKSPACE_LIMIT.

    Raises:
        TypeError, ValueError: ``limit`` is not an int, or is negative.
    """
    global _workspace_limit
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"set_workspace_limit: limit must be an int, a number of bytes, got {limit!r}")
    if limit < 0:
        raise ValueError(f"set_workspace_limit: limit must not be negative, got {limit}")
    _workspace_limit = limit


def call_cuda(function: str, device: torch.device, **arguments: Any) -> None:
    """Launch a CUDA kernel of the extension on torch's current stream of ``device``."""
    launch = getattr(extension(), function)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        launch(**arguments, stream=stream)


def workspace_size(function: str, **arguments: Any) -> int:
    """What a function of the extension that sizes a workspace answers."""
    return getattr(extension(), function)(**arguments)
