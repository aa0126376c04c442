"""Compile every kernel ahead of time, without a GPU, and report registers, spills and shared memory.

    python -m parrot_kernels.triton_kernels.aot [--arch 80 90 gfx942] [--kernel REGEX] [--quick] [--json FILE]

Triton kernels are compiled as their launchers would: every tile and dtype that `specializations()` of each kernel
file declares. Where the sources and nvcc are at hand (or with `--cuda`), every CUDA C++ file of csrc/cuda is
compiled too. The exit code is 1 if a kernel does not compile, spills registers, or needs more shared memory than a
block of that architecture can have.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .specialization import Specialization, launch_options

MODULES = (
    "sinkhorn_hadamard",
    "sinkhorn_hadamard_backward",
    "sinkhorn_streaming",
    "sinkhorn_streaming_backward",
    "selective_scan",
    "selective_scan_backward",
    "causal_conv1d",
    "selective_state_update",
    "causal_conv1d_update",
    "reductions",
)
TRITON_ARCHS = ("80", "90", "100", "gfx942")
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Most shared memory (local data share) of one block, in KiB: CUDA C++ programming guide, "Technical specifications
# per compute capability", opt-in maximum; AMD CDNA3 instruction set, section 2.
SHARED_LIMIT_KIB = {
    "80": 163,
    "86": 99,
    "87": 163,
    "89": 99,
    "90": 227,
    "100": 227,
    "103": 227,
    "120": 99,
    "gfx942": 64,
}


@dataclass
class Row:
    """What one kernel needs on one architecture. ``None`` where no tool could tell."""

    kernel: str
    tile: str
    arch: str
    warps: int | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def complaint(self) -> str:
        """Why this row fails, or an empty string."""
        limit = SHARED_LIMIT_KIB.get(self.arch)
        if self.error:
            return self.error
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        if limit is not None and (self.shared_bytes or 0) > limit * 1024:
            return f"needs {self.shared_bytes} bytes of shared memory, a block has {limit} KiB"
        return ""


def declared(module: str) -> list[Specialization]:
    """The specializations of one kernel file."""
    return list(importlib.import_module(f"{__package__}.{module}").specializations())


def cuda_tool(name: str) -> str | None:
    """A CUDA tool: of $CUDA_HOME, of the path, of the usual place, or the one that Triton carries."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [str(Path(home) / "bin")] if home else []
    for path in (*places, None, "/usr/local/cuda/bin"):
        if found := shutil.which(name, path=path):
            return found
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else None


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a compiled Triton kernel. It has no arrays in local memory: a stack is spills."""
    tool = cuda_tool("cuobjdump")
    if tool is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    return {"registers": int(found[1]), "spill_bytes": int(found[2]) + int(found[3])} if found else {}


def _amdgcn_usage(assembly: str) -> dict[str, int]:
    """Registers and scratch bytes from the metadata of AMD assembly; spills of scalars go to vector registers."""
    number = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    scratch = number.get("private_segment_fixed_size")
    return {} if scratch is None else {"registers": number["vgpr_count"], "spill_bytes": scratch}


def compiled(spec: Specialization, arch: str) -> Any:
    """What Triton makes of a specialization for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)
    source = ASTSource(spec.kernel, spec.signature, dict(spec.constants), spec.attributes)
    options = launch_options(spec.num_warps, spec.max_registers, amd=target.backend == "hip")
    return triton.compile(source, target=target, options=options)


def compile_triton(module: str, position: int, arch: str) -> Row:
    """Compile the ``position``-th specialization of a kernel file for one architecture."""
    spec = declared(module)[position]
    row = Row(spec.name, spec.tile, arch, spec.num_warps)
    start = time.perf_counter()
    try:
        kernel = compiled(spec, arch)
    except Exception as exception:  # whatever a compiler raises becomes a row that fails
        row.error = f"does not compile: {type(exception).__name__}: {exception}"
        return row
    row.seconds = time.perf_counter() - start
    row.shared_bytes = kernel.metadata.shared
    usage = _amdgcn_usage(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _cubin_usage(kernel.asm["cubin"])
    row.registers, row.spill_bytes = usage.get("registers"), usage.get("spill_bytes")
    return row


def _demangle(names: Sequence[str]) -> dict[str, str]:
    tool = cuda_tool("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    lines = subprocess.run([tool, *names], capture_output=True, text=True).stdout.splitlines()
    return dict(zip(names, lines, strict=True)) if len(lines) == len(names) else {name: name for name in names}


def parse_ptxas(text: str, file: str, arch: str) -> Iterator[Row]:
    """Rows from what ``ptxas -v`` says of each entry function."""
    blocks = re.split(r"Compiling entry function '(\S+)' for '\S+'", text)[1:]
    functions = list(zip(blocks[::2], blocks[1::2], strict=True))
    readable = _demangle([name for name, _ in functions])
    for name, block in functions:
        used, spills = re.search(r"Used (\d+) registers", block), re.search(r"(\d+) bytes spill stores", block)
        if used is None or spills is None:
            yield Row(file, readable[name], arch, error="ptxas told nothing of it")
            continue
        shared = re.search(r"(\d+) bytes smem", block)
        variant = re.sub(r"\(anonymous namespace\)::|parrot::|cuda::|^void |\(.*$", "", readable[name])
        yield Row(file, variant, arch, None, int(used[1]), int(spills[1]), int(shared[1]) if shared else 0)


def nvcc(file: str, arch: str, output: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile one CUDA C++ file for one architecture into a cubin.

    Raises:
        FileNotFoundError: nvcc is nowhere.
    """
    tool = cuda_tool("nvcc")
    if tool is None:
        raise FileNotFoundError("nvcc is neither in $CUDA_HOME/bin, nor on the path, nor in /usr/local/cuda/bin")
    command = [tool, "-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{arch}", *options]
    command += ["-I", str(CSRC / "include"), "-I", str(CSRC / "cuda")]
    command += ["-cubin", "-o", str(output), str(CSRC / "cuda" / file)]
    return subprocess.run(command, capture_output=True, text=True)


def compile_cuda(file: str, arch: str) -> list[Row]:
    """Compile one CUDA C++ file with nvcc for one architecture; a row per kernel in it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = nvcc(file, arch, f"{folder}/out.cubin", "-Xptxas", "-v")
    if done.returncode != 0:
        return [Row(file, "", arch, error=f"does not compile: {done.stderr.strip()}")]
    rows = list(parse_ptxas(done.stderr, file, arch))
    for row in rows:
        row.seconds = (time.perf_counter() - start) / len(rows)
    return rows


def compile_all(
    archs: Sequence[str] | None = None,
    kernel: str = "",
    quick: bool = False,
    use_triton: bool = True,
    use_cuda: bool = False,
    jobs: int | None = None,
    progress: bool = False,
) -> list[Row]:
    """Compile in parallel processes; rows in the order kernel, tile, architecture as declared.

    Args:
        archs: architectures; by default ``TRITON_ARCHS`` for Triton, ``CUDA_ARCHS`` for CUDA C++.
        kernel: regular expression that the kernel's name and tile (or the file's name) must match.
        quick: only the specializations marked so.
    """
    tasks = []
    if use_triton:
        for module in MODULES:
            for position, spec in enumerate(declared(module)):
                if re.search(kernel, f"{spec.name} {spec.tile}") and (spec.quick or not quick):
                    tasks += [(compile_triton, module, position, arch) for arch in archs or TRITON_ARCHS]
    if use_cuda:
        for path in sorted((CSRC / "cuda").glob("*.cu")):
            if re.search(kernel, path.name):
                cuda_archs = [arch for arch in archs or CUDA_ARCHS if not arch.startswith("gfx")]
                tasks += [(compile_cuda, path.name, arch) for arch in cuda_archs]
    results: dict[int, list[Row]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs or os.cpu_count() or 1, max(1, len(tasks))), mp_context=context) as pool:
        futures = {pool.submit(*task): position for position, task in enumerate(tasks)}
        for count, future in enumerate(as_completed(futures), 1):
            result = future.result()
            results[futures[future]] = result if isinstance(result, list) else [result]
            if progress:
                print(f"\r{count}/{len(tasks)} compiled", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    return [row for position in range(len(tasks)) for row in results[position]]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each, with (the first line of) what is wrong at its end."""
    lines = [("kernel", "tile", "arch", "warps", "registers", "spill B", "shared B", "s")]
    for row in rows:
        arch = row.arch if row.arch.startswith("gfx") else f"sm_{row.arch}"
        figures = (row.warps, row.registers, row.spill_bytes, row.shared_bytes)
        figures = ("-" if figure is None else str(figure) for figure in figures)
        lines.append((row.kernel, row.tile, arch, *figures, f"{row.seconds:.1f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    marks = ["", *(f"  <- {row.complaint.splitlines()[0]}" if row.complaint else "" for row in rows)]
    return "\n".join(text.rstrip() + mark for text, mark in zip(texts, marks, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    program = "python -m parrot_kernels.triton_kernels.aot"
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", help="for example 80 90 gfx942; default: all that we ship for")
    parser.add_argument("--kernel", default="", help="regular expression on kernel name and tile, or .cu file name")
    parser.add_argument("--quick", action="store_true", help="a few representative tiles (Triton)")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--jobs", type=int, help="processes; default: one per core")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cuda", action="store_true", help="only CUDA C++, an error where it can't be compiled")
    which.add_argument("--triton", action="store_true", help="only Triton")
    options = parser.parse_args(arguments)

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    sources, tool = (CSRC / "cuda").is_dir(), cuda_tool("nvcc")
    why = "" if sources and tool else "no nvcc was found" if sources else f"the sources are not in {CSRC}"
    if options.cuda and why:
        parser.error(f"CUDA C++ can't be compiled: {why}")
    rows = compile_all(
        options.arch,
        options.kernel,
        options.quick,
        use_triton=not options.cuda,
        use_cuda=not options.triton and not why,
        jobs=options.jobs,
        progress=sys.stderr.isatty(),
    )
    print(table(rows))
    for row in rows:
        if row.error:
            print(f"\n{row.kernel} {row.tile} {row.arch}: {row.error}")
    bad = sum(bool(row.complaint) for row in rows)
    unknown = sum(row.spill_bytes is None and not row.error for row in rows)
    print(f"\n{len(rows)} kernels, {bad} with a complaint, {unknown} whose registers no tool could tell")
    if why and not options.triton:
        print(f"CUDA C++ left out: {why}")
    if options.json:
        facts = [asdict(row) | {"complaint": row.complaint} for row in rows]
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if not rows:
        print("nothing matches", file=sys.stderr)
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
