"""Fuzzing of every public op on the CPU kernels against the differentiable reference in float64.

    python tests/fuzz_ops.py [--cases N] [--seconds S] [--seed FIRST] [--op NAME]

A case is its op and its seed, and nothing else. It draws shapes (0 and 1 among them), dtypes, strides, expanded inputs,
options, which inputs want gradients and which outputs have some; what lies outside of a strided input, and in the
padding, is NaN. Compared are the outputs, the gradients (exactly 0 at padding), the inputs before and after, and a
second run, bit for bit. A failure prints the line that runs its case again.

Tolerances are those of tests/tolerances.py. Where a result is further off, the bound becomes what rounding the inputs
may do to the reference; how often is printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from fuzz_case import Case
from fuzz_cases import CASES
from tolerances import tolerance
from torch import Tensor

import parrot_kernels

# Times what rounding does to the reference: rounding each float64 input once, or computing in float32 throughout.
SLACK = {torch.float64: 1000, torch.float32: 64}


@dataclass
class Outcome:
    """What a case came to."""

    results: int = 0
    ill_conditioned: list[str] = field(default_factory=list)
    undecided: bool = False  # the iteration stopped elsewhere because an error lay at the threshold


def draw(op: str, seed: int) -> Case:
    return CASES[op](random.Random(f"{op} {seed}"))


def run(function: Callable[..., dict[str, Tensor]], case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name, and the gradients of the inputs that want some as "d<name>"."""
    leaves = {name: t.detach().clone().requires_grad_(name in case.wanted) for name, t in tensors.items()}
    out = function(leaves)
    given = {n: case.cotangents[n] for n, t in out.items() if n in case.cotangents and t.requires_grad}
    results = {name: t.detach() for name, t in out.items()}
    if not case.wanted:
        return results
    wanted = {name: leaves[name] for name in case.wanted}
    if given:
        grads = [cotangent.to(case.dtype).to(out[name].dtype) for name, cotangent in given.items()]
        found = torch.autograd.grad([out[n] for n in given], list(wanted.values()), grads, allow_unused=True)
    else:
        found = (None,) * len(wanted)
    for (name, leaf), g in zip(wanted.items(), found, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if g is None else g
    return results


def check(op: str, seed: int) -> Outcome:
    """Run one case; AssertionError where a result is wrong."""
    case = draw(op, seed)
    torch.set_num_threads(case.threads)
    parrot_kernels.set_workspace_limit(case.workspace)
    outcome = Outcome()
    with torch.no_grad():
        tensors = case.poisoned()
    before = {name: t.clone() for name, t in tensors.items()}
    got = run(case.call, case, tensors)
    again = run(case.call, case, tensors)
    for name, t in before.items():
        assert torch.equal(_bits(t), _bits(tensors[name])), f"{name} was changed"
    for name, t in got.items():
        assert torch.equal(_bits(t), _bits(again[name])), f"{name}: another result in a second run"

    wide = {name: t.double() for name, t in case.tensors.items()}
    want = run(case.oracle, case, wide)
    if "n_iters" in want and not torch.equal(got["n_iters"].long(), want["n_iters"].long()):
        near = case.dtype != torch.float64 and (got["n_iters"] - want["n_iters"]).abs().max() <= 1
        assert near or case.options["tol"] == 0, "n_iters"  # whether an error is exactly 0 is a matter of rounding
        outcome.undecided = True
        return outcome
    rounded: dict[str, Tensor] = {}
    assert want.keys() == got.keys(), f"{sorted(got)} for {sorted(want)}"
    for name, expected in want.items():
        value = got[name]
        assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)} for {tuple(expected.shape)}"
        if not value.is_floating_point():
            if name != "converged":  # an error may lie at the threshold
                assert torch.equal(value.long(), expected.long()), name
            continue
        if not value.numel() or (name[0] == "d" and not case.gradients_count):
            continue
        outcome.results += 1
        assert torch.isfinite(expected).all(), f"{name}: the reference is not finite"
        if expected.abs().max() > min(torch.finfo(value.dtype).max, 1e-6 * torch.finfo(case.compute).max):
            continue  # it overflows, here or on the way
        if (padding := case.padding.get(name)) is not None:
            assert (value.masked_select(padding) == 0).all(), f"{name}: not 0 at padding"
        worst = (value.double() - expected).abs().max().item()
        kind = case.kind + ("_grad" if name[0] == "d" else "")
        relative = max(tolerance(kind, value.dtype), tolerance(kind, case.dtype)) * case.terms
        if name[0] == "d" and case.options.get("gradient") == "implicit":
            relative *= 100  # the condition of the system it solves
        bound = relative * case.cancelling(name) * max(1.0, expected.abs().max().item())
        if not worst <= bound:
            rounded = rounded or run(case.oracle, case, _rounded(case, wide, seed))
            assert torch.isfinite(value).all(), f"{name}: not finite"
            allowed = SLACK[case.compute] * (rounded[name] - expected).abs().max().item()
            assert worst <= allowed, f"{name}: worst error {worst:.3e}, bound {bound:.3e} (rounding: {allowed:.3e})"
            outcome.ill_conditioned.append(name)
    return outcome


def _bits(t: Tensor) -> Tensor:
    """For comparisons in which NaN equals NaN."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return t.contiguous().view(integers[t.element_size()]) if t.is_floating_point() else t


def _rounded(case: Case, wide: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    if case.compute == torch.float32:
        return {name: t.float() for name, t in wide.items()}
    generator, unit = torch.Generator().manual_seed(seed), torch.finfo(torch.float64).eps
    return {n: t * (1 + unit * torch.randn(t.shape, generator=generator, dtype=t.dtype)) for n, t in wide.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; those of the others follow")
    parser.add_argument("--op", choices=CASES, help="this op only")
    options = parser.parse_args()
    ops, start = [options.op] if options.op else list(CASES), time.monotonic()
    count: Counter[str] = Counter()
    loose: Counter[str] = Counter()
    failures = results = undecided = done = 0
    for i in range(options.cases):
        if time.monotonic() - start > options.seconds:
            break
        # Each op takes its turn, so that a case's seed does not tell which op it is.
        op, seed = ops[i % len(ops)], options.seed + i
        try:
            outcome = check(op, seed)
        except Exception as exception:
            failures += 1
            print(f"FAILED {op}: {type(exception).__name__}: {exception}\n    {draw(op, seed).describe()}")
            print(f"    python tests/fuzz_ops.py --op {op} --seed {seed} --cases 1", flush=True)
        else:
            results += outcome.results
            undecided += outcome.undecided
            loose.update(f"{op}.{name}" for name in outcome.ill_conditioned)
        count[op] += 1
        done += 1
    print(f"{done} cases, {failures} failed; {results} tensors compared in {time.monotonic() - start:.0f} s")
    print("cases: " + ", ".join(f"{op} {n}" for op, n in count.items()))
    print(f"held to the bound of rounding: {sum(loose.values())} tensors {dict(loose.most_common(12))}")
    print(f"iterations of another number, at the threshold: {undecided} cases")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
