"""Which contract a compiled extension keeps. setup.py reads this file by itself: nothing of ours, no torch."""

from __future__ import annotations

import zlib
from pathlib import Path


def stamp(sources: Path) -> str | None:
    """A checksum of what says how kernels are called, in csrc/; None where there is none, as beside a wheel."""
    contract = sources / "bindings.cpp"
    if not contract.exists():
        return None
    total = 0
    for path in [contract, *sorted((sources / "include").glob("*.h"))]:
        total = zlib.crc32(path.read_bytes(), total)
    return f"{total:08x}"
