"""The compiled extension: loaded once, called with plain pointers.

The extension is built without torch: of a tensor it reads, as Python code would, the address, dtype, sizes and
strides, so one build serves every torch version. See ``csrc/bindings.cpp`` for the other side.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

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
        for dtype, code in DTYPE_CODES.items():
            module.register_dtype(dtype, code)
        return module, ""
    except ModuleNotFoundError:
        reason = build_info().get("reason", "the package was installed without building it")
        return None, f"the compiled extension is absent: {reason}"
    except ImportError as exception:
        return None, f"the compiled extension is present but does not load: {exception}"


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


def call_cuda(function: str, device: torch.device, **arguments: Any) -> None:
    """Launch a CUDA kernel of the extension on torch's current stream of ``device``."""
    launch = getattr(extension(), function)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        launch(**arguments, stream=stream)


def workspace_size(function: str, **arguments: Any) -> int:
    """What a function of the extension that sizes a workspace answers."""
    return getattr(extension(), function)(**arguments)
