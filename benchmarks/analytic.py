"""What a GPU needs at least for our kernels, from their compiled code: a model, not a measurement.

    python -m benchmarks.analytic                          # compiles for sm_90, writes rows
    python -m benchmarks.analytic --kernel scan --show     # what each loop consists of
    python -m benchmarks.analytic --tables                 # rows into docs/gpu_status.md, nothing is compiled

A kernel is compiled, disassembled, and its instructions are counted: each once for every turn of the loops around it,
with the turns that a stated shape takes (`analytic_cases`). Each kind of instruction has a unit that serves so many
lanes a clock; the busiest unit of the busiest multiprocessor, or the memory if that takes longer, sets the time. So it
is a lower bound: nothing waits for a result, a barrier or a bank, every memory access is one transaction, and caches
never miss twice. `floor` is the same bound for the multiply-adds, exponentials and bytes of the formulas alone.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from parrot_kernels.triton_kernels import aot

from . import analytic_cases, machine, rows, sass
from .table import fill

RESULTS = rows.RESULTS / "model"
PAGE = machine.ROOT / "docs" / "gpu_status.md"


@dataclass(frozen=True)
class Device:
    """A GPU as its maker describes it."""

    name: str
    multiprocessors: int
    clock: float  # Hz, at which its peak of fp32 holds
    bandwidth: float  # bytes/s
    registers: int = 65536  # of a multiprocessor, as the following
    shared: int = 228 << 10
    warps: int = 64
    blocks: int = 32


# H100: NVIDIA's data sheet of the SXM module, 67 TFLOP/s of fp32 on 132 x 128 lanes (hence the clock), 3.35 TB/s. A100:
# data sheet of the SXM module with 80 GB, 19.5 TFLOP/s on 108 x 64 lanes, 2.04 TB/s, 164 KiB of shared memory.
DEVICES = {
    "90": Device("h100-sxm", 132, 67e12 / (2 * 132 * 128), 3.35e12),
    "80": Device("a100-sxm-80gb", 108, 19.5e12 / (2 * 108 * 64), 2.039e12, shared=164 << 10),
}
# Lanes a clock of one of a multiprocessor's four parts: CUDA C++ programming guide, throughput of native arithmetic
# instructions. An instruction of any kind takes one turn of its part's scheduler, which issues for 32 lanes.
LANES = {
    "90": {"issue": 32, "fma": 32, "integer": 16, "special": 4, "double": 16},
    "80": {"issue": 32, "fma": 16, "integer": 16, "special": 4, "double": 8},
}
MEMORY_LANES = 32  # of a whole multiprocessor: loads, stores and shuffles


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel."""

    function: sass.Function
    registers: int
    shared: int  # bytes, but for what a launch adds


def usage(cubin: Path) -> dict[str, tuple[int, int]]:
    """Registers of a thread and static shared memory of each kernel of a cubin."""
    command = [aot.cuda_tool("cuobjdump") or "cuobjdump", "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+).* SHARED:(\d+)", text)
    return {name: (int(registers), int(shared)) for name, registers, shared in found}


@functools.lru_cache(maxsize=1)  # the kernels of a file come one after the other
def compiled(source: str, arch: str) -> list[Kernel]:
    """The kernels of a CUDA C++ file, or the one of "module:tile", a Triton specialization."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, extra = Path(folder) / "kernel.cubin", 0
        if source.endswith(".cu"):
            done = aot.nvcc(source, arch, cubin, "-lineinfo")
            if done.returncode:
                raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
        else:
            module, tile = source.split(":", 1)
            (spec,) = (s for s in aot.declared(module) if f"{s.name} {s.tile}" == tile)
            kernel = aot.compiled(spec, arch)
            cubin.write_bytes(kernel.asm["cubin"])
            extra = kernel.metadata.shared
        figures = usage(cubin)
        return [Kernel(f, figures[f.name][0], figures[f.name][1] + extra) for f in sass.disassemble(cubin.read_bytes())]


def occupancy(device: Device, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    by_warp = 32 * math.ceil(registers / 8) * 8
    by_shared = device.shared // (shared + 1024)  # 1 KiB of a block is the system's
    return min(device.blocks, device.warps // warps, device.registers // (by_warp * warps), by_shared)


def seconds(mix: dict[str, Counter[str]], case: analytic_cases.Case, arch: str) -> dict[str, float]:
    """Time of each unit on the multiprocessor with most blocks, and that of the memory."""
    device = DEVICES[arch]
    warps = math.ceil(case.blocks / device.multiprocessors) * case.warps
    counts = {pipe: sum(found.values()) for pipe, found in mix.items()}
    counts["issue"] = sum(counts.values())
    clocks = {
        pipe: math.ceil(warps / 4) * counts.get(pipe, 0) * 32 / lanes for pipe, lanes in LANES[arch].items()
    }  # fmt: skip
    clocks["memory"] = warps * counts.get("memory", 0) * 32 / MEMORY_LANES
    return {pipe: value / device.clock for pipe, value in clocks.items()} | {"dram": case.bytes / device.bandwidth}


def floor(case: analytic_cases.Case, arch: str) -> float:
    """Seconds for what the formulas need."""
    device, lanes = DEVICES[arch], LANES[arch]
    per_second = 4 * device.multiprocessors * device.clock
    return max(
        case.multiply_adds / (lanes["fma"] * per_second),
        case.exponentials / (lanes["special"] * per_second),
        case.bytes / device.bandwidth,
    )


def row(case: analytic_cases.Case, arch: str) -> dict:
    """The model of one kernel."""
    (kernel,) = (k for k in compiled(case.source, arch) if re.search(case.symbol, k.function.name))
    mix = sass.mix(kernel.function, sass.passes(kernel.function, case.trips, case.share))
    shared = kernel.shared + case.shared
    times = seconds(mix, case, arch)
    bound = max(times, key=lambda name: times[name])
    opcodes = sum(mix.values(), Counter())
    counted = {
        "multiply_adds": opcodes["FFMA"] + opcodes["FMUL"],
        "exponentials": mix.get("special", Counter())["MUFU"],
    }
    lanes = 32 * case.warps * case.blocks
    if counted["multiply_adds"] * lanes < case.multiply_adds:
        raise RuntimeError(f"{case.kernel}: fewer multiplications counted than needed; do its loops turn as declared?")
    return {
        "op": case.op, "kernel": case.kernel, "backend": case.backend, "shape": case.shape, "dtype": case.dtype,
        "arch": f"sm_{arch}", "device": DEVICES[arch].name, "launches": case.launches,
        "blocks": case.blocks, "warps": case.warps, "registers": kernel.registers, "shared_bytes": shared,
        "blocks_per_multiprocessor": occupancy(DEVICES[arch], kernel.registers, shared, case.warps),
        "instructions_per_warp": {pipe: round(sum(found.values())) for pipe, found in sorted(mix.items())},
        "opcodes_per_warp": {name: round(count) for name, count in opcodes.most_common(16)},
        "barriers_per_warp": round(opcodes["BAR"]),
        "needed": {"multiply_adds": case.multiply_adds, "exponentials": case.exponentials, "bytes": case.bytes},
        "counted": {name: round(count * lanes) for name, count in counted.items()},
        "unit_ms": {name: value * 1e3 for name, value in times.items()},
        "bound_by": bound, "model_ms": times[bound] * 1e3, "floor_ms": floor(case, arch) * 1e3,
    }  # fmt: skip


def show(case: analytic_cases.Case, arch: str) -> None:
    """What the loops of one kernel consist of, and how often each turns."""
    (kernel,) = (k for k in compiled(case.source, arch) if re.search(case.symbol, k.function.name))
    times = sass.passes(kernel.function, case.trips, case.share)
    code = kernel.function.instructions
    print(f"\n{case.kernel} [{case.backend}] {case.shape}, {len(code)} instructions")
    for loop in sass.loops(kernel.function)[0]:
        if times[loop.branch]:
            inside = sass.mix(kernel.function, [float(i in loop.body) for i in range(len(code))])
            parts = " ".join(f"{pipe} {round(sum(found.values()))}" for pipe, found in sorted(inside.items()))
            print(f"  {times[loop.branch]:10.1f} turns of {parts}: {sass.source(kernel.function, loop)[0][:90]}")


def table(measured: list[dict]) -> list[str]:
    """Lines of Markdown for the newest rows of one architecture: milliseconds of a launch."""
    newest = {(r["kernel"], r["backend"], r["shape"], r["dtype"]): r for r in measured}
    if not newest:
        return []
    first = next(iter(newest.values()))
    lines = [
        f"### {first['arch']}, modelled for {first['device']}, compiled at {rows.commits(newest.values())}", "",
        "| kernel | shape | launches | registers | warps an SM | multiply-adds | integers, comparisons | special | "
        "loads, stores, shuffles | all instructions | memory | floor of the formulas |", "|---" * 12 + "|",
    ]  # fmt: skip
    for r in newest.values():
        units = (r["unit_ms"][name] for name in ("fma", "integer", "special", "memory", "issue", "dram"))
        cells = " | ".join(f"**{ms:.3g}**" if ms == r["model_ms"] else f"{ms:.3g}" for ms in units)
        warps = r["blocks_per_multiprocessor"] * r["warps"]
        name = f"`{r['kernel']}`, {r['backend']}, {r['dtype']}"
        lines.append(
            f"| {name} | {r['shape']} | {r['launches']} | {r['registers']} | {warps} | {cells} | {r['floor_ms']:.3g} |"
        )
    return lines


def sources() -> str:
    """The commit that changed the kernels last; ``-dirty`` where the checkout's differ from it."""
    paths = ["--", "csrc/cuda", "parrot_kernels/triton_kernels", ":(exclude)parrot_kernels/triton_kernels/aot.py"]

    def git(*command: str) -> str:
        return subprocess.run(["git", *command, *paths], cwd=machine.ROOT, capture_output=True, text=True).stdout

    found = git("log", "-1", "--format=%h", "--abbrev=12").strip() or "unknown"
    return f"{found}-dirty" if git("status", "--porcelain") else found


def tables(folder: Path = RESULTS) -> dict[str, list[str]]:
    """A table for each architecture that there are rows of."""
    return {f"model_{path.stem}": table(rows.load(path)) for path in sorted(folder.glob("*.jsonl"))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.analytic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=sorted(DEVICES), default="90")
    parser.add_argument("--kernel", default="", help="regular expression on kernel, backend and shape")
    parser.add_argument("--show", action="store_true", help="print the loops as well")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows")
    parser.add_argument("--tables", action="store_true", help=f"only write the tables of all rows into {PAGE.name}")
    arguments = parser.parse_args(argv)
    if arguments.tables:
        PAGE.write_text(fill(PAGE.read_text(), tables(arguments.results)))
        return 0
    context = {"commit": sources(), "date": time.strftime("%Y-%m-%d")}
    if triton := machine.versions("triton").get("triton"):
        context["versions"] = {"triton": triton}
    found = []
    for case in analytic_cases.CASES:
        if re.search(arguments.kernel, f"{case.kernel} {case.backend} {case.shape}"):
            found.append(row(case, arguments.arch) | context)
            if arguments.show:
                show(case, arguments.arch)
    print("\n".join(table(found)))
    if not arguments.no_save:
        rows.append(found, arguments.results / f"sm_{arguments.arch}.jsonl")
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
