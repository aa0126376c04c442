"""The doctor: ``python -m parrot_kernels`` tells what this machine has and what serves each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import backends, native


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> list[tuple[str, str]]:
    """(name, value) pairs: versions, devices, what the extension was built with."""
    rows = [
        ("parrot-kernels", _version("parrot-kernels")),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("transformers", _version("transformers")),
        ("mamba-ssm", _version("mamba-ssm")),
        ("causal-conv1d", _version("causal-conv1d")),
        ("processor", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            rows.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, compute capability {capability}"))
    else:
        why = "torch is a CPU build" if torch.version.cuda is None else "no driver or no device is visible to torch"
        rows.append(("cuda", f"none: {why}"))
    info = native.build_info()
    if (missing := native.why_missing()) is None:
        module = native.extension()
        rows.append(
            (
                "extension",
                f"CPU kernels for instruction set x86-64-{module.isa}"
                if platform.machine() in ("x86_64", "AMD64")
                else "CPU kernels",
            )
        )
        rows.append(("  built with", str(info.get("compiler", "unknown"))))
        if module.has_cuda:
            rows.append(
                ("  CUDA kernels", f"{info.get('nvcc', 'unknown')}; architectures {info.get('cuda_archs', '?')}")
            )
        else:
            rows.append(("  CUDA kernels", f"none: {info.get('cuda_reason', 'built without CUDA')}"))
    else:
        rows.append(("extension", f"none: {missing}"))
    for variable in ("TRITON_INTERPRET", "PARROT_CPU_ISA", "OMP_NUM_THREADS"):
        if variable in os.environ:
            rows.append((f"${variable}", os.environ[variable]))
    return rows


def main() -> int:
    width = max(len(name) for name, _ in facts())
    print("parrot_kernels doctor\n")
    for name, value in facts():
        print(f"  {name:<{width}}  {value}")
    print("\nWhat serves each op (float32):\n")
    states: dict[tuple[str, str], list[str]] = {}
    for op, backend, state in backends.report():
        states.setdefault((backend, state), []).append(op)
    for backend in backends.NAMES:
        for (named, state), ops in states.items():
            if named == backend:
                every = "every op" if len(ops) == len(backends.IMPLEMENTED) else ", ".join(ops)
                print(f"  {backend:<6}  {every}: {state}")
    print()
    for op in backends.IMPLEMENTED:
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                continue
            first = next(
                b for b in backends.preferred(op, device) if backends.why_not(op, b, device, torch.float32) is None
            )
            print(f"  {op} on {device}: {first}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
