"""Compiled GPU code as counts: instructions, the source line of each, loops, and how often a warp runs through what.

A loop is a back edge of the control flow graph with what it encloses; it is known by the source line of its branch.
How often it turns, and which lines are never reached, only the caller knows.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parrot_kernels.triton_kernels import aot

from . import machine

LINE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")

# Pipe of each opcode; of what is not listed here, the integer and logic pipe.
PIPES = {
    "fma": "FFMA FADD FMUL HFMA2 HADD2 HMUL2 IMAD FFMA32I FADD32I FMUL32I",
    "special": "MUFU I2F F2I F2F FRND POPC",
    "double": "DFMA DADD DMUL DSETP DMNMX",
    "tensor": "HMMA HGMMA IMMA DMMA QGMMA UTCHMMA",
    "memory": "LDS STS LDG STG LD ST LDSM STSM LDL STL SHFL LDGSTS ATOMS ATOMG RED ATOM",
    "control": (
        "BRA BRX EXIT RET CALL BSSY BSYNC BREAK WARPSYNC BAR NOP NANOSLEEP DEPBAR LDGDEPBAR MEMBAR ERRBAR CCTL YIELD "
        "LDC ULDC S2R S2UR CS2R R2UR UMOV ULEA UIADD3 UIMAD ULOP3 USHF USEL UISETP UPLOP3 UFLO REDUX VOTE VOTEU ELECT"
    ),
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: "LDS.128"
    operands: str
    predicate: str | None
    places: tuple[tuple[str, int], ...]  # file and line, then where that was inlined, outwards

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        return PIPE_OF.get(self.name, "integer")


@dataclass
class Function:
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]


@dataclass(frozen=True)
class Loop:
    header: int
    body: frozenset[int]  # instructions
    branch: int


def disassemble(cubin: bytes) -> list[Function]:
    """The kernels of a cubin that carries line numbers.

    Raises:
        FileNotFoundError: nvdisasm is nowhere.
    """
    tool = aot.cuda_tool("nvdisasm")
    if tool is None:
        raise FileNotFoundError("nvdisasm is neither in $CUDA_HOME/bin, nor on the path, nor with Triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", "-gi", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> list[Function]:
    """The kernels in what ``nvdisasm -c -gi`` prints."""
    functions: list[Function] = []
    places: tuple[tuple[str, int], ...] = ()
    new: list[tuple[str, int]] = []
    for line in text.splitlines():
        if found := re.match(r"\.text\.(\S+):", line):
            functions.append(Function(found[1], [], {}))
            places, new = (), []
        elif found := LINE.match(line):
            new.append((found[1], int(found[2])))
        elif found := re.match(r"(\.L_\S+):", line):
            functions[-1].labels[found[1]] = len(functions[-1].instructions)
        elif found := INSTRUCTION.match(line):
            places, new = tuple(new) or places, []
            functions[-1].instructions.append(Instruction(found[2], found[3], found[1], places))
    return functions


@functools.cache
def _lines(path: str) -> list[str]:
    """A file's lines; ours of this checkout, as a compilation cache may have kept the path of another."""
    ours = re.search(r"/((?:csrc|parrot_kernels/triton_kernels)/.*)", path)
    file = machine.ROOT / ours[1] if ours else Path(path)
    return file.read_text(errors="replace").splitlines() if file.exists() else []


@functools.cache
def context(path: str, number: int) -> tuple[str, ...]:
    """A source line, after "> ", and the heads of the blocks around it, innermost first, as indentation tells."""
    lines = _lines(path)
    if not 0 < number <= len(lines):
        return ()
    found = [f"> {lines[number - 1].strip()}"]
    indent = len(lines[number - 1]) - len(lines[number - 1].lstrip())
    for line in reversed(lines[: number - 1]):
        text, this = line.strip(), len(line) - len(line.lstrip())
        if text and this < indent and text[0] not in "#)}":
            found.append(text)
            indent = this
    return tuple(found)


def contexts(instruction: Instruction) -> list[str]:
    return [text for path, number in instruction.places for text in context(path, number)]


def _successors(function: Function) -> list[list[int]]:
    code, joins = function.instructions, {}
    after: list[list[int]] = []
    for i, instruction in enumerate(code):
        label = re.search(r"\.L_\w+", instruction.operands)
        target = function.labels.get(label[0]) if label else None
        following = [i + 1] if i + 1 < len(code) else []
        if instruction.name == "BSSY":
            joins[instruction.operands.split(",")[0]] = target
        if instruction.name == "BRA" and target is not None:
            always = instruction.predicate is None and not re.match(r"U?P\d", instruction.operands)
            after.append([target] if always else [target, *following])
        elif instruction.name in ("EXIT", "RET") and instruction.predicate is None:
            after.append([])
        elif instruction.name == "BSYNC" and (join := joins.get(instruction.operands.split(",")[0])) is not None:
            after.append([join, *(following if instruction.predicate else [])])
        else:
            after.append(following)
    return after


def _dominators(after: list[list[int]]) -> tuple[dict[int, int], dict[int, int]]:
    """Immediate dominator and reverse postorder of each node that is reached (Cooper, Harvey and Kennedy 2001)."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(after[0]))]
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(after[following])))
    order.reverse()
    rank = {node: i for i, node in enumerate(order)}
    before = defaultdict(list)
    for node in order:
        for following in after[node]:
            before[following].append(node)
    above = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [p for p in before[node] if p in above]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    if rank[best] > rank[other]:
                        best = above[best]
                    else:
                        other = above[other]
            if above.get(node) != best:
                above[node], changed = best, True
    return above, rank


def loops(function: Function) -> tuple[list[Loop], set[int]]:
    """The natural loops, and the instructions that are reached at all."""
    after = _successors(function)
    above, rank = _dominators(after)
    before = defaultdict(list)
    for node in rank:
        for following in after[node]:
            before[following].append(node)

    def dominates(a: int, b: int) -> bool:
        while rank[b] > rank[a]:
            b = above[b]
        return a == b

    found = []
    for node in sorted(rank):
        for header in after[node]:
            if header <= node and header != node and dominates(header, node):
                body, stack = {header}, [node]
                while stack:
                    inner = stack.pop()
                    if inner not in body:
                        body.add(inner)
                        stack += before[inner]
                found.append(Loop(header, frozenset(body), node))
    return found, set(rank)


def source(function: Function, loop: Loop) -> list[str]:
    """The innermost loop statement at or around the line of a loop's branch, and the heads around that."""
    texts = [text.removeprefix("> ") for text in contexts(function.instructions[loop.branch])]
    return texts[next((i for i, text in enumerate(texts) if re.match(r"(for|while)\b", text)), 0) :]


def passes(
    function: Function, trips: Mapping[str, float | tuple[float, int]], share: Mapping[str, float] | None = None
) -> list[float]:
    """How often a warp runs through each instruction.

    Args:
        trips: regular expression on a loop's statement and the heads around it (`source`) -> turns of the loop as
            compiled; or turns as written and how many FFMA one takes, from which it follows how far it was unrolled.
            The first that matches counts, and a loop that none matches turns once. Of loops from one line side by side
            the largest turns, the others are the rest of its unrolling.
        share: regular expression on a line or a head around it -> in what part of those turns it is reached; the
            smallest that matches counts.
    """
    found, reached = loops(function)
    code = function.instructions
    times = [1.0 if i in reached else 0.0 for i in range(len(code))]
    for loop in found:
        around = " < ".join(source(function, loop))
        turns = next((count for pattern, count in trips.items() if re.search(pattern, around)), 1.0)
        if isinstance(turns, tuple):
            turns = turns[0] / max(1, sum(code[i].name == "FFMA" for i in loop.body) // turns[1])
        larger = any(
            code[other.branch].places == code[loop.branch].places and len(other.body) > len(loop.body)
            for other in found
            if not (other.body & loop.body)
        )
        for i in loop.body:
            times[i] *= 0.0 if larger else turns
    parts = [(re.compile(pattern), part) for pattern, part in (share or {}).items()]
    for i, instruction in enumerate(code):
        if times[i]:
            around = contexts(instruction)
            matched = (part for pattern, part in parts if any(pattern.search(text) for text in around))
            times[i] *= min(matched, default=1.0)
    return times


def mix(function: Function, times: Sequence[float]) -> dict[str, Counter[str]]:
    """Pipe -> opcode -> how many of them a warp issues."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for instruction, count in zip(function.instructions, times, strict=True):
        found[instruction.pipe][instruction.name] += count
    return dict(found)
