"""The accuracy of every op, backend and dtype over the stress set, outputs and every gradient, against float64.

    python -m benchmarks.accuracy                                           # PyTorch and C++, minutes
    TRITON_INTERPRET=1 python -m benchmarks.accuracy --backends triton      # small sizes, in the interpreter
    python -m benchmarks.accuracy --update docs/accuracy.md                 # write the tables into the page, from rows

A row holds, by quantity (an output, or "d" and an input): ``errors``, those of the backend; ``pytorch``, those of the
reference in the same dtypes; ``ulp``, how far the float64 result moves when every input changes by one unit in the
last place of the compute dtype, up or down at random: what the problem itself does to rounding. Each is the largest
absolute difference over the largest absolute value, this taken for at least the smallest normal number of the result's
dtype; it is absolute where all values are 0, and for ``error``, a residual that vanishes at convergence. A value that
the dtype cannot hold must come out as the infinity of its sign, and counts neither way.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from parrot_kernels import backends

from . import machine, rows, stress, table

RESULTS = rows.RESULTS / "accuracy"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF_LEAST = 2e-5  # well below the rounding of either half-precision dtype
Results = dict[str, Tensor]


def evaluate(solve: stress.Solve, inputs: stress.Inputs, backend: str) -> Results:
    """Outputs, and the gradients of a random combination of them, in float64. Single steps have none."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    if solve.__name__.endswith("steps"):
        with torch.no_grad():
            return {name: value.double() for name, value in solve(backend, **inputs).items()}
    out = solve(backend, **leaves)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for value in out.values():
        # bfloat16 has few enough bits for every dtype: all get the same gradients
        cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64).bfloat16().double()
        if value.requires_grad:
            loss = loss + (value.double() * cotangent).sum()
    names = [name for name, leaf in leaves.items() if leaf.numel()]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
    results = {name: value.detach().double() for name, value in out.items()}
    return results | {f"d{n}": g.double() for n, g in zip(names, gradients, strict=True) if g is not None}


def error(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """The metric above; infinite where a value is NaN, or infinite without need."""
    if want.numel() == 0:
        return 0.0
    held = want.to(dtype).isfinite()
    overflown = ~held & got.isinf() & (got.sign() == want.sign())
    difference = torch.where(overflown, 0.0, (got - want).abs())
    largest = torch.where(held, want, 0.0).abs().max().item()
    scale = max(largest, torch.finfo(dtype).tiny) if largest else 1.0
    worst = math.inf if difference.isnan().any() else difference.max().item()
    return worst / scale


def errors(got: Results, want: Results, dtypes: dict[str, torch.dtype]) -> dict[str, float]:
    found = {name: error(got[name], want[name], dtypes[name]) for name in want}
    if "error" in want:  # a residual that vanishes at convergence: relative to the mass of a
        found["error"] = (got["error"] - want["error"]).abs().max().item()
    return found


def shaken(inputs: stress.Inputs, ulp: float) -> stress.Inputs:
    generator = torch.Generator().manual_seed(2)
    signs = (torch.randint(0, 2, t.shape, generator=generator) * 2 - 1 for t in inputs.values())
    return {name: t * (1 + ulp * s) for (name, t), s in zip(inputs.items(), signs, strict=True)}


def measure(dtype: torch.dtype, wanted: Iterable[str], small: bool, only: str = "") -> Iterator[dict]:
    """A row per case and backend."""
    compute = torch.float32 if dtype in stress.HALF else dtype
    for case in stress.cases(dtype, small):
        kernel = case.op.replace("divergence", "hadamard")
        serving = [b for b in wanted if backends.why_not(kernel, b, "cpu", dtype) is None]
        if not serving or only not in case.op:
            continue
        started = time.perf_counter()
        inputs = stress.rounded(case, dtype)
        double = {name: value.double() for name, value in inputs.items()}
        exact = case.exact or case.solve
        want = evaluate(exact, double, "torch")
        with torch.no_grad():
            held = {name: value.dtype for name, value in case.solve("torch", **inputs).items()}
        if case.exact:
            want = {name: want[name] for name in held}
        held |= {f"d{name}": value.dtype for name, value in inputs.items()}
        ulp = errors(evaluate(exact, shaken(double, torch.finfo(compute).eps), "torch"), want, held)
        plain = errors(evaluate(case.solve, inputs, "torch"), want, held)
        for backend in serving:
            got = plain if backend == "torch" else errors(evaluate(case.solve, inputs, backend), want, held)
            yield {
                "op": case.op, "case": case.name, "backend": backend, "small": small,
                "dtype": str(dtype).removeprefix("torch."),
                "errors": brief(got), "pytorch": brief(plain), "ulp": brief(ulp),
            }  # fmt: skip
        print(f"{case.op} {case.name} {dtype}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


def brief(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.2e}") for name, value in values.items()}


def is_gradient(quantity: str) -> bool:
    return quantity.startswith("d") and quantity != "divergence"


def worst(row: dict, gradients: bool, field: str = "errors") -> float:
    return max((v for name, v in row[field].items() if is_gradient(name) == gradients), default=math.nan)


def excess(row: dict) -> float:
    """The error over that of plain PyTorch, both at least what nobody notices in this dtype."""
    least = HALF_LEAST if row["dtype"] in ("float16", "bfloat16") else torch.finfo(getattr(torch, row["dtype"])).eps
    return max(max(value, least) / max(row["pytorch"][name], least) for name, value in row["errors"].items())


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


def summary(measured: list[dict]) -> list[str]:
    lines = [
        f"### Worst over the set, {measured[0]['device']}, at {rows.commits(measured)}", "",
        "| op | dtype | backend | cases | outputs | in | gradients | in | times PyTorch's error | in |",
        "|---" * 10 + "|",
    ]  # fmt: skip
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in measured:
        groups.setdefault((row["op"], row["dtype"], row["backend"]), []).append(row)
    for (op, dtype, backend), group in groups.items():
        if (dtype, backend) == ("float64", "torch"):  # the truth itself
            continue
        cells = []
        for gradients in (False, True):
            found = [row for row in group if not math.isnan(worst(row, gradients))]
            top = max(found, key=lambda row: worst(row, gradients), default=None)
            cells += [number(worst(top, gradients)), top["case"]] if top else ["-", "-"]
        top = max(group, key=excess)
        cells += ["-", "-"] if backend == "torch" or dtype == "float64" else [f"{excess(top):.1f}", top["case"]]
        lines.append(f"| `{op}` | {dtype} | {backend} | {len(group)} | {' | '.join(cells)} |")
    return lines


def by_case(measured: list[dict]) -> list[str]:
    """fp32 on the C++ backend, case by case, beside what the problem does to rounding."""
    counted = [row for row in measured if row["dtype"] == "float32" and row["backend"] == "cpu"]
    if not counted:
        return []
    lines = [
        f"### float32 by case, {counted[0]['device']}, at {rows.commits(counted)}", "",
        "| op | case | outputs | PyTorch | one ulp of the inputs | gradients | PyTorch | one ulp of the inputs |",
        "|---" * 8 + "|",
    ]  # fmt: skip
    for row in counted:
        cells = [number(worst(row, side, field)) for side in (False, True) for field in ("errors", "pytorch", "ulp")]
        lines.append(f"| `{row['op']}` | {row['case']} | {' | '.join(cells)} |")
    return lines


def tables(measured: list[dict]) -> dict[str, list[str]]:
    newest = {(row["op"], row["dtype"], row["backend"], row["case"]): row for row in measured}
    kept = [row for key in sorted(newest, key=lambda key: key[:3]) for row in (newest[key],)]
    made = {"summary": summary(kept), "cases": by_case(kept)} if kept else {}
    return {name: lines for name, lines in made.items() if lines}


def write(measured: list[dict], path: Path) -> None:
    """Rows of the same backends and dtypes replace the earlier ones; the file is whole at any time."""
    fresh = {(row["backend"], row["dtype"]) for row in measured}
    earlier = rows.load(path) if path.exists() else []
    earlier = [row for row in earlier if (row["backend"], row["dtype"]) not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in earlier + measured))
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["torch", "cpu"], choices=["torch", "cpu", "triton"])
    parser.add_argument("--dtypes", nargs="+", default=[str(d).removeprefix("torch.") for d in DTYPES])
    parser.add_argument("--op", default="", help="only ops whose name holds this; nothing is written")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{machine.device_name('cpu')}.jsonl")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write the tables of the rows into this page")
    arguments = parser.parse_args(argv)
    if arguments.update:
        made = tables(rows.load(arguments.results))
        arguments.update.write_text(table.fill(arguments.update.read_text(), made))
        return 0
    origin = {"device": machine.device_name("cpu"), "commit": machine.commit(), "versions": machine.versions("triton")}
    for dtype in arguments.dtypes:
        found = measure(getattr(torch, dtype), arguments.backends, "triton" in arguments.backends, arguments.op)
        measured = [{**row, **origin} for row in found]
        if measured and arguments.op:
            print("\n".join([*summary(measured), "", *by_case(measured)]))
        elif measured:
            write(measured, arguments.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
