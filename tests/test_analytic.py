"""The model of the kernels' times: what it reads out of compiled code, and that its page shows its rows."""

from __future__ import annotations

import dataclasses
import re

import pytest

from benchmarks import analytic, analytic_cases, sass, table
from parrot_kernels.triton_kernels import aot

SOURCE = """def kernel(x):
    for d in range(D):
        total += x
        if rare:
            total = 0
    store(total)
"""
LISTING = """
.text.kernel:
	//## File "{file}", line 2
        /*0000*/                   MOV R1, RZ ;
.L_x_1:
	//## File "{file}", line 3
        /*0010*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0020*/                   FFMA R1, R2, R2, R1 ;
	//## File "{file}", line 5
        /*0030*/              @!P0 FADD R1, R2, -R2 ;
	//## File "{file}", line 2
        /*0040*/               @P1 BRA `(.L_x_1) ;
	//## File "{file}", line 6
        /*0050*/                   STG.E desc[UR4][R4.64], R1 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
"""
TOOLS = aot.cuda_tool("nvdisasm") and aot.cuda_tool("cuobjdump")
needs_tools = pytest.mark.skipif(not TOOLS, reason="needs nvdisasm and cuobjdump, which Triton carries")


@pytest.fixture
def function(tmp_path) -> sass.Function:
    file = tmp_path / "kernel.py"
    file.write_text(SOURCE)
    (found,) = sass.parse(LISTING.format(file=file))
    return found


def test_a_loop_is_found_by_its_source_line_and_turns_as_declared(function):
    (loop,), reached = sass.loops(function)
    assert (loop.header, loop.branch, sorted(loop.body)) == (1, 4, [1, 2, 3, 4])
    assert len(reached) == len(function.instructions) - 1  # not the branch to itself after the end
    assert sass.contexts(function.instructions[4]) == ["> for d in range(D):", "def kernel(x):"]
    assert sass.source(function, loop) == ["for d in range(D):", "def kernel(x):"]
    assert sass.passes(function, {"for d in": 120}) == [1, 120, 120, 120, 120, 1, 1, 0]


def test_a_share_holds_for_the_lines_of_a_block_but_not_for_its_head(function):
    assert sass.passes(function, {"for d": 10}, {"^if rare": 0.5}) == [1, 10, 10, 5, 10, 1, 1, 0]
    assert sass.passes(function, {"for d": 10}, {"^> total \\+=": 0}) == [1, 0, 0, 10, 10, 1, 1, 0]


def test_instructions_are_counted_by_the_unit_that_serves_them(function):
    mix = sass.mix(function, sass.passes(function, {"for d": 10}))
    assert {pipe: dict(found) for pipe, found in mix.items()} == {
        "integer": {"MOV": 1}, "memory": {"LDG": 10, "STG": 1}, "fma": {"FFMA": 10, "FADD": 10},
        "control": {"BRA": 10, "EXIT": 1},
    }  # fmt: skip


def case_of(kernel: str, backend: str, shape: str) -> analytic_cases.Case:
    return next(
        c for c in analytic_cases.CASES if (c.kernel, c.backend) == (kernel, backend) and c.shape.startswith(shape)
    )


@needs_tools
def test_a_kernel_needs_at_least_what_its_formulas_need():
    case = case_of("sinkhorn_hadamard_forward", "triton", "1024x32x32")
    made = analytic.row(case, "90")
    assert made["counted"]["multiply_adds"] >= made["needed"]["multiply_adds"]
    assert made["model_ms"] == max(made["unit_ms"].values()) >= made["floor_ms"]
    assert made["unit_ms"][made["bound_by"]] == made["model_ms"]


def test_the_multiprocessor_with_most_blocks_sets_the_time(function):
    case = case_of("sinkhorn_hadamard_forward", "triton", "1024x32x32")
    mix = sass.mix(function, sass.passes(function, {"for d": 10}))

    def issue(blocks: int, warps: int) -> float:
        return analytic.seconds(mix, dataclasses.replace(case, blocks=blocks, warps=warps), "90")["issue"]

    clock = analytic.DEVICES["90"].clock
    assert issue(1, 1) == issue(132, 4) == pytest.approx(43 / clock)  # on each of four schedulers, one warp
    assert issue(133, 4) == issue(264, 4) == pytest.approx(86 / clock)


@needs_tools
def test_loops_that_do_not_turn_as_declared_are_found():
    case = case_of("sinkhorn_hadamard_forward", "triton", "1024x32x32")
    with pytest.raises(RuntimeError, match="do its loops turn as declared"):
        analytic.row(dataclasses.replace(case, trips={}), "90")


def test_occupancy_is_that_of_the_scarcest():
    h100 = analytic.DEVICES["90"]
    assert analytic.occupancy(h100, 255, 0, 8) == 1
    assert analytic.occupancy(h100, 128, 0, 4) == 4
    assert analytic.occupancy(h100, 32, 0, 4) == 16
    assert analytic.occupancy(h100, 32, 75 << 10, 4) == 3


def test_every_figure_of_the_page_comes_from_a_row():
    page = analytic.PAGE.read_text()
    made = analytic.tables()
    assert set(made) <= {match[2] for match in table.BLOCK.finditer(page)}
    assert table.fill(page, made) == page
    forged = re.sub(r"\| 1024x32x32x120, 50 iterations \| 1 \|", r"\g<0> 9", page, count=1)
    assert forged != page == table.fill(forged, made)
