"""The speed that was aimed at, beside what the rows say: ``python -m benchmarks.targets amd-epyc-4-threads``.

A line is one aim. ``measured`` is the case that is worst against its aim, among those with rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from . import end_to_end, rows, selective_scan, sinkhorn_hadamard

Group = dict[str, dict]
GPU = "no kernel has run on a GPU yet"


@dataclass(frozen=True)
class Target:
    """At least ``wanted[shape]`` of ``value`` at each shape; the value is None where a row is missing."""

    op: str
    text: str
    mode: str
    wanted: dict[str, float]
    value: Callable[[Group], float | None]
    reasons: dict[str, str] = field(default_factory=dict)  # by shape
    absent: str = "no rows"  # why a case may have none


def slower(*peers: str) -> Callable[[Group], float | None]:
    """How many times longer than ours the fastest of the peers takes; of all peers where none is named."""

    def value(group: Group) -> float | None:
        own = rows.own(group)
        times = [r["p50_ms"] for n, r in group.items() if not rows.is_ours(r) and (not peers or n in peers)]
        return min(times) / own["p50_ms"] if own and times else None

    return value


def memory(peer: str) -> Callable[[Group], float | None]:
    """How many times our peak memory the peer takes."""

    def value(group: Group) -> float | None:
        own, other = rows.own(group), group.get(peer)
        return other["peak_mib"] / own["peak_mib"] if own and other and own["peak_mib"] and other["peak_mib"] else None

    return value


def of_floor(group: Group) -> float | None:
    """The fraction of the floor's speed."""
    own = rows.own(group)
    return own["floor_ms"] / own["p50_ms"] if own and own.get("floor_ms") else None


def tenfold_or_near_the_floor(group: Group) -> float | None:
    """Over 10 is met; within 1.5 of the floor counts as 10."""
    ratio, fraction = slower()(group), of_floor(group)
    return max(ratio, 10.0) if ratio and fraction and fraction >= 1 / 1.5 else ratio


SINKHORN = [str(case) for case in sinkhorn_hadamard.CASES]
SCAN = [str(case) for case in selective_scan.CASES]
TORCH = slower("torch eager", "torch.compile of one iteration")
LOOPS = slower("transformers' slow path", "materialised loop, unbind")
CALL = "the call from Python outlasts the kernel"
SHARED_ITERATION = "threads share the products, not the iteration: its barriers would cost more than they save"
SECOND_LEVEL = "the kernel matrix about fills L1: an iteration is bound by L2; and fresh pages for the outputs"
AT_THE_FLOOR = "at the floor: the products with the features, which every method needs, take most of the time"
LONG = "some peers are too slow for it"
FRESH_PAGES = "a quarter of the time goes into fresh pages for output and gradients, which glibc returns to the system"
WALK = "most is multiply-adds at the rate of their pipe, the rest transposes, gates and the sums of dB and dC"
ONE_PIPE = "multiply-adds and exponentials fill the same pipes, and the floor counts only the latter"


def _sinkhorn() -> Iterable[Target]:
    aims = {"forward": (12, 12, 8, 8, 6), "both": (8, 8, 6, 6, 4)}
    reasons = dict(zip(SINKHORN, (CALL, SHARED_ITERATION, SECOND_LEVEL, AT_THE_FLOOR, "bound by memory"), strict=True))
    for mode, factors in aims.items():
        for shape, factor in zip(SINKHORN, factors, strict=True):
            text = f"the faster of eager and compiled torch, {factor} times longer"
            yield Target("sinkhorn_hadamard", text, mode, {shape: factor}, TORCH, reasons, LONG)
    for mode in aims:
        wanted = dict.fromkeys(SINKHORN, 4.0)
        absent = LONG if mode == "both" else "no rows"
        yield Target("sinkhorn_hadamard", "OTT-JAX, 4 times longer", mode, wanted, slower("OTT-JAX"), reasons, absent)
    for mode in aims:
        loop = slower("plain scaling loop in torch")
        wanted = dict.fromkeys(SINKHORN, 1.0)
        yield Target("sinkhorn_hadamard", "never slower than a plain scaling loop", mode, wanted, loop, reasons, LONG)


def _scan() -> Iterable[Target]:
    for mode in rows.MODES:
        for text, factor, value in (
            ("transformers' slow path and the materialised loop, 40 times longer", 40.0, LOOPS),
            ("mambapy, 20 times longer", 20.0, slower("mambapy pscan")),
            ("the fastest of all, 10 times longer, or within 1.5x of the floor", 10.0, tenfold_or_near_the_floor),
        ):
            large = dict.fromkeys(("8x384x1000x16", "4x1536x1000x16"), FRESH_PAGES)
            why = dict.fromkeys(SCAN, WALK) | large if mode == "both" else {}
            yield Target("selective_scan", text, mode, dict.fromkeys(SCAN, factor), value, why)
    reasons = dict.fromkeys(SCAN, ONE_PIPE)
    text = "half of the speed of the floor of exponentials"
    yield Target("selective_scan", text, "forward", dict.fromkeys(SCAN, 0.5), of_floor, reasons)


def _transformers() -> Iterable[Target]:
    slow, op = "transformers' slow path", "transformers_mamba"
    yield Target(op, "MambaModel on its slow path, 5 times longer", "forward", {"1x512": 5.0}, slower(slow))
    text = "MambaModel on its slow path, 10 times the peak memory"
    yield Target(op, text, "forward", {"1x512": 10.0}, memory(slow))
    yield Target(op, "cached generation, no slower", "generate", {"1x1": 1.0}, slower(slow))


def _end_to_end() -> Iterable[Target]:
    shape = end_to_end.SHAPES["embedding"]
    shared = "nine tenths of ours are linear layers and convolutions, at the rate of the machine"
    text = "SSAM base and HuBERT base with a sequential scan, 3 times longer"
    yield Target("embedding", text, "forward", {shape: 3.0}, slower("sequential scan"), {shape: shared})
    shape, text = end_to_end.SHAPES["training_step"], "a step of PARROT at most 1.3 times that of concatenation"
    yield Target("training_step", text, "both", {shape: 1 / 1.3}, slower("concatenation"))


TARGETS = (*_sinkhorn(), *_scan(), *_transformers(), *_end_to_end())
# What needs a machine or a measurement that there is none of.
UNMEASURED = (
    ("sinkhorn_hadamard", "on a GPU: 20x eager and 5x compiled torch, 1.2x flash-sinkhorn at N = 10,000", GPU),
    ("selective_scan", "on a GPU: 1.2x the selective scan of mamba-ssm", GPU),
    ("causal_conv1d", "on a GPU: causal-conv1d, no slower", GPU),
)


def line(target: Target, groups: dict[tuple, Group]) -> str:
    found = {}
    for shape in target.wanted:
        value = target.value(groups.get((target.op, shape, target.mode, "default"), {}))
        if value is not None:
            found[shape] = value / target.wanted[shape]
    where = next(iter(target.wanted)) if len(target.wanted) == 1 else f"{len(target.wanted)} cases"
    start = f"| `{target.op}` | {rows.TITLES[target.mode]} | {target.text} | {where} |"
    if not found:
        return f"{start} - | not measured | {target.absent} |"
    worst = min(found, key=found.get)
    value = found[worst] * target.wanted[worst]
    measured = f"{100 * value:.0f} %" if target.value is of_floor else f"{value:.1f}x"
    if len(target.wanted) > 1:
        measured += f" at {worst}"
    met = sum(ratio >= 1 for ratio in found.values())
    absent = len(target.wanted) - len(found)
    reasons = [] if met == len(found) else [target.reasons.get(worst, "cause not found")]
    reasons += [f"{absent} not measured: {target.absent}"] if absent else []
    verdict = "yes" if met == len(target.wanted) else "no" if met == 0 else f"{met} of {len(target.wanted)}"
    return f"{start} {measured} | {verdict} | {'; '.join(reasons)} |"


def table(measured: list[dict]) -> list[str]:
    timed = rows.cases(measured)
    groups = rows.newest(timed)
    counted = [row for group in groups.values() for row in group.values() if row["allocator"] == "default"]
    return [
        f"### Aims, {measured[0]['device']}, at {rows.commits(counted)}",
        "",
        "| op | mode | aim | at | measured (worst) | met | why not |",
        "|---" * 7 + "|",
        *(line(target, groups) for target in TARGETS),
        *(f"| `{op}` | - | {text} | - | - | not measured | {reason} |" for op, text, reason in UNMEASURED),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    rows.device_argument(parser)
    print("\n".join(table(rows.load(rows.RESULTS / f"{parser.parse_args(argv).device}.jsonl"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
