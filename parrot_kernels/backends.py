"""Which backends exist, which one serves a call, and why another does not.

A backend is a place where an op is computed: ``cpu`` (compiled, vectorised C++), ``cuda`` (compiled CUDA C++),
``triton`` and ``torch`` (plain PyTorch on any device, the reference). ``backend=None`` picks by device; a name
given explicitly is obeyed or raises.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping

import torch

from . import checks, native

NAMES = ("cpu", "cuda", "triton", "torch")

# The first usable backend serves. Without device measurements Triton comes before CUDA C++.
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}
# Except for the scan, whose Triton backward runs through the caches what CUDA C++ keeps in registers, and for single
# steps, which are over before Triton's launcher is through with their arguments.
PREFERENCE_OF = dict.fromkeys(
    [(op, "cuda") for op in ("selective_scan", "selective_state_update", "causal_conv1d_update")],
    ("cuda", "triton", "torch"),
)


# What is implemented beside `torch`, which serves every op, dtype and option: op -> backend -> dtypes.
IMPLEMENTED: dict[str, dict[str, frozenset[torch.dtype]]] = {
    "sinkhorn_hadamard": {
        "cpu": frozenset(checks.FLOATS),
        "cuda": frozenset(checks.FLOATS),
        "triton": frozenset({torch.float32, torch.float16, torch.bfloat16}),
    },
    "selective_scan": {
        "cpu": frozenset(checks.FLOATS),
        "cuda": frozenset(checks.FLOATS),
        "triton": frozenset({torch.float32, torch.float16, torch.bfloat16}),
    },
    "causal_conv1d": {
        "cpu": frozenset(checks.FLOATS),
        "cuda": frozenset(checks.FLOATS),
        "triton": frozenset({torch.float32, torch.float16, torch.bfloat16}),
    },
    "selective_state_update": {
        "cpu": frozenset(checks.FLOATS),
        "cuda": frozenset(checks.FLOATS),
        "triton": frozenset({torch.float32, torch.float16, torch.bfloat16}),
    },
    "causal_conv1d_update": {
        "cpu": frozenset(checks.FLOATS),
        "cuda": frozenset(checks.FLOATS),
        "triton": frozenset({torch.float32, torch.float16, torch.bfloat16}),
    },
}


def preferred(op: str, device_type: str) -> tuple[str, ...]:
    """The backends of ``op`` on such a device, the first choice first."""
    return PREFERENCE_OF.get((op, device_type)) or PREFERENCE.get(device_type, ("torch",))


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.lru_cache(maxsize=1)
def _triton_import_error() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as exception:  # a broken driver stack raises more than ImportError
        return f"triton does not import ({exception}); install it with `pip install triton`"
    return None


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None if ``backend`` can serve ``op`` on this kind of device and dtype, else the reason."""
    if backend == "torch":
        return None
    implemented = IMPLEMENTED[op].get(backend)
    if implemented is None:
        return f"{op} has no {backend} kernel"
    if dtype not in implemented:
        return f"the {backend} kernel of {op} does not take {str(dtype).removeprefix('torch.')}"
    if backend == "triton":
        if device_type != "cuda" and not interpreting():
            return "triton runs on CUDA tensors (on CPU tensors only with TRITON_INTERPRET=1)"
        return _triton_import_error()
    if backend != device_type:
        return f"the {backend} backend takes {backend} tensors, these are on {device_type}"
    return native.why_missing(backend)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def select(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    requested: str | None = None,
    unsupported: Mapping[str, str] | None = None,
) -> str:
    """The backend that serves this call.

    Args:
        op: the op's name.
        device_type: "cpu", "cuda", ... of the inputs.
        dtype: dtype of the inputs.
        requested: the caller's ``backend=``; obeyed or an error.
        unsupported: backends that can't take this call for another reason (a size, an option), with that reason.
    """
    unsupported = unsupported or {}

    def reason(backend: str) -> str | None:
        return unsupported.get(backend) or why_not(op, backend, device_type, dtype)

    if requested is not None:
        checks.choice(op, "backend", requested, (None, *NAMES))
        if (why := reason(requested)) is not None:
            raise RuntimeError(
                f"{op}: backend={requested!r} can't serve this call: {why}. Leave `backend` out to let one be chosen."
            )
        return requested
    preference = preferred(op, device_type)
    reasons = {}
    for backend in preference:
        if (why := reason(backend)) is None:
            break
        if backend in IMPLEMENTED[op]:
            reasons[backend] = why
    if backend == "torch" and reasons:
        because = "; ".join(reasons.values())
        _warn_once(f"{op}: the torch backend serves, which is slower: {because}. Pass backend='torch' to silence this.")
    return backend


def report() -> list[tuple[str, str, str]]:
    """(op, backend, "ready" or the reason) for every op and backend on this machine, for float32."""
    rows = []
    for op, implemented in IMPLEMENTED.items():
        for backend in (*implemented, "torch"):
            device = "cpu" if backend in ("cpu", "torch") else "cuda"
            why = why_not(op, backend, device, torch.float32)
            if why is None and device == "cuda" and not torch.cuda.is_available():
                why = "ready, but no CUDA device is visible"
            rows.append((op, backend, why or "ready"))
    return rows
