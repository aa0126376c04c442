"""What the ahead-of-time compiler needs to know of a kernel: one record per kernel x tile x dtypes x options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def launch_options(num_warps: int, max_registers: int | None, amd: bool) -> dict[str, Any]:
    """Options of a launch, the same ahead of time and at run time.

    Triton's default for fused multiply-adds differs between versions; ours does not. With ``max_registers`` the
    assembler uses up to that many of NVIDIA's registers a thread instead of spilling to fit more programs.
    """
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return options if amd or max_registers is None else options | {"maxnreg": max_registers}


@dataclass(frozen=True)
class Specialization:
    """A kernel as one launch would compile it.

    Args:
        kernel: the ``@triton.jit`` function.
        tile: the tile and the options, for people: "128x64 fp32 euclidean".
        arguments: Triton type ("*fp32", "i32", "fp32") of each argument that is not a constant, in order.
        constants: the ``tl.constexpr`` arguments, and None for each absent pointer.
        num_warps: warps per program.
        max_registers: cap of registers a thread, see `launch_options`.
        quick: part of the short list that the tests compile.
    """

    kernel: Any
    tile: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    max_registers: int | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    @property
    def signature(self) -> dict[str, str]:
        """Every argument's type, in the order of the kernel's parameters."""
        return {name: "constexpr" if name in self.constants else self.arguments[name] for name in self.kernel.arg_names}

    @property
    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Pointers are 16-byte aligned, as torch's allocations are."""
        kinds = self.signature.values()
        return {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")}
