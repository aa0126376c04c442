"""The second stage of sums over programs: partial sums are added in an order that only their number determines."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .specialization import Specialization, launch_options

ROWS = 8  # partial sums loaded at a time
ITEMS = 128  # sums of one program
NUM_WARPS = 4


@triton.jit(
    do_not_specialize=["entries", "rows", "groups", "major", "minor", "s_batch", "s_group", "s_major", "s_minor"]
)
def _sum_partials(
    partials,  # (batch, groups, entries, rows, major, minor)
    total,  # (batch, groups, major, minor)
    entries,
    rows,
    groups,
    major,
    minor,
    s_batch,
    s_group,
    s_major,
    s_minor,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    count = major.to(tl.int64) * minor
    blocks = tl.cdiv(count, ITEMS)
    pid = tl.program_id(0).to(tl.int64)
    outer = pid // blocks
    item = pid % blocks * ITEMS + tl.arange(0, ITEMS)
    row = tl.arange(0, ROWS).to(tl.int64)
    partials += outer * entries * rows * count
    sums = tl.zeros([ITEMS], tl.float32)
    for _ in range(entries):
        # Rows of zeros, which padding gives, leave the bits of the sum as they are.
        for first in range(0, rows, ROWS):
            mask = (first + row < rows)[:, None] & (item < count)[None, :]
            tile = tl.load(partials + ((first + row) * count)[:, None] + item[None, :], mask=mask, other=0.0)
            sums += tl.sum(tile, 0)
        partials += rows * count
    total += outer // groups * s_batch + outer % groups * s_group
    tl.store(total + item // minor * s_major + item % minor * s_minor, sums, mask=item < count)


def sum_partials(partials: Tensor, total: Tensor) -> None:
    """Fill ``total`` (batch, groups, major, minor), any strides, with the sums of contiguous fp32 ``partials``.

    ``partials`` is (batch, groups, entries, rows, major, minor), summed over entries and rows.
    """
    batch, groups, major, minor = total.shape
    programs = batch * groups * triton.cdiv(major * minor, ITEMS)
    if programs > 0:
        _sum_partials[(programs,)](
            partials,
            total,
            *partials.shape[2:4],
            groups,
            major,
            minor,
            *total.stride(),
            ROWS=ROWS,
            ITEMS=ITEMS,
            **launch_options(NUM_WARPS, None, amd=False),
        )


def specializations() -> Iterator[Specialization]:
    """One per dtype of the sums."""
    for dtype in ("fp32", "fp16", "bf16"):
        sizes = ("entries", "rows", "groups", "major", "minor", "s_batch", "s_group", "s_major", "s_minor")
        yield Specialization(
            kernel=_sum_partials,
            tile=f"{ROWS}x{ITEMS} {dtype}",
            arguments={"partials": "*fp32", "total": f"*{dtype}", **dict.fromkeys(sizes, "i32")},
            constants={"ROWS": ROWS, "ITEMS": ITEMS},
            num_warps=NUM_WARPS,
            quick=dtype == "fp32",
        )
