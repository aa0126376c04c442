"""The workspace of the streaming Sinkhorn-Hadamard, the launches that its forward and backward share, and how each
kernel is tiled and compiled; the kernels are in `sinkhorn_tiles`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .sinkhorn_tiles import (
    COSTS,
    MATRIX,
    SIZES,
    _sinkhorn_prepare,
    _sinkhorn_project,
    _sinkhorn_reduce_costs,
    _sinkhorn_update,
)
from .specialization import Specialization, launch_options

MAX_REGISTERS = 255  # all that a thread can have
MAX_POINTS = 2**24  # of a side: inside a tile offsets have 32 bits


class Tiles(NamedTuple):
    """Sizes of the tiles, powers of two; at least 16 where they enter a product."""

    own: int = 64  # points of the own side in one program
    other: int = 32  # points of the other side in one step
    gradient_other: int = 16  # the same where the gradient of the cost is made
    depth: int = 16  # features in one step of a product over them
    features: int = 64  # features of a program that writes points
    chunk: int = 1024  # others of one program where results can be combined, a multiple of both
    vector: int = 256  # points in one step of an elementwise kernel
    num_warps: int = 4
    wide_warps: int = 8  # of a program that holds more than one tile


@dataclass
class Side:
    """The points of one side and what is kept for each of them."""

    points: Tensor  # (B, size, D)
    log_weights: Tensor  # (B, size), as the following three
    potential: Tensor
    shift: Tensor
    rest: Tensor
    rows: Tensor  # (B, size, padded features)
    norms: Tensor  # (B, size)
    counts: Tensor  # (B,)
    partial: Tensor  # (B, chunks of the other side, size), as the following
    sums: Tensor
    stride: int  # of its points in cost_matrix
    inverse_rho: float

    @property
    def size(self) -> int:
        return self.points.shape[1]

    @property
    def chunks(self) -> int:
        return self.partial.shape[1]


def tile_of(kernel: Any, tiles: Tiles) -> tuple[dict[str, int], int]:
    """The constants, but for the cost, and the warps of a kernel that goes over cost tiles."""
    gradient = "DETACHED" in kernel.arg_names
    other = tiles.gradient_other if gradient else tiles.other
    constants = {"OWN": tiles.own, "OTHER": other, "DEPTH": tiles.depth}
    for name, value in (("CHUNK", tiles.chunk), ("FEATURES", tiles.features)):
        if name in kernel.arg_names:
            constants[name] = value
    return constants, tiles.wide_warps if gradient or "FEATURES" in constants else tiles.num_warps


class Workspace:
    """The two sides of a batch of problems, prepared, and the launches that forward and backward share."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        x_lengths: Tensor | None,
        y_lengths: Tensor | None,
        cost_matrix: Tensor | None,
        eps: Tensor,
        cost: str,
        rho_x: float | None,
        rho_y: float | None,
        tiles: Tiles,
    ) -> None:
        if max(*x.shape[1:], y.shape[1]) > MAX_POINTS:
            raise ValueError(
                f"sinkhorn_hadamard: the triton kernels take at most {MAX_POINTS} points a side and as many features; "
                f"got x {tuple(x.shape)} and y {tuple(y.shape)}. Split the problem."
            )
        x, y, a, b, x_lengths, y_lengths, cost_matrix, eps = (
            t if t is None else t.contiguous() for t in (x, y, a, b, x_lengths, y_lengths, cost_matrix, eps)
        )
        self.tiles, self.cost, self.eps, self.D = tiles, COSTS[cost], eps, x.shape[2]
        self.cost_matrix = eps if cost_matrix is None else cost_matrix  # a pointer that is not read
        self.depths = triton.cdiv(self.D, tiles.depth)
        self.factors = torch.empty_like(eps)
        self.x = self._side(x, y.shape[1], y.shape[1], rho_x)
        self.y = self._side(y, x.shape[1], 1, rho_y)
        self._prepare(self.x, a, x_lengths, y_lengths, self.y.size)
        self._prepare(self.y, b, y_lengths, x_lengths, self.x.size)

    def _side(self, points: Tensor, others: int, stride: int, rho: float | None) -> Side:
        batch, size, _ = points.shape
        log_weights, potential, shift, rest, norms = self.eps.new_empty(5, batch, size)
        rows = self.eps.new_empty(batch, size, self.depths * self.tiles.depth) if self.cost != MATRIX.value else points
        partial, sums = self.eps.new_empty(2, batch, triton.cdiv(others, self.tiles.chunk), size)
        counts = torch.empty_like(self.eps, dtype=torch.int32)
        inverse_rho = 0.0 if rho is None else 1.0 / rho
        vectors = (log_weights, potential, shift, rest)
        return Side(points, *vectors, rows, norms, counts, partial, sums, stride, inverse_rho)

    def _prepare(self, side: Side, weights: Tensor | None, lengths: Tensor | None, other_lengths, others: int) -> None:
        kernel, blocks = self.by_blocks(_sinkhorn_prepare, side, self.tiles.own)
        kernel(
            side.points, weights, lengths, other_lengths, self.x.points, side.rows, side.norms, side.log_weights,
            side.potential, side.counts, side.size, others, self.x.size, self.D, self.depths, blocks,
            COST=self.cost, BLOCK=self.tiles.own, DEPTH=self.tiles.depth, **self.options,
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        return launch_options(self.tiles.num_warps, MAX_REGISTERS, amd=torch.version.hip is not None)

    def tile(self, kernel: Any) -> dict[str, Any]:
        """Constants and options of a kernel that goes over cost tiles."""
        constants, num_warps = tile_of(kernel, self.tiles)
        options = launch_options(num_warps, MAX_REGISTERS, amd=torch.version.hip is not None)
        return {"COST": self.cost, **constants, **options}

    def by_blocks(self, kernel: Any, side: Side, block: int, *others: int) -> tuple[Any, int]:
        """The kernel on the grid of (problems x blocks of the side's points, ...), and the blocks of one problem."""
        blocks = triton.cdiv(side.size, block)
        return kernel[(len(self.eps) * blocks, *others)], blocks

    def geometry(self, own: Side, other: Side, blocks: int) -> tuple[Any, ...]:
        """The first arguments of every kernel that goes over cost tiles."""
        return (
            *(own.points, other.points, own.rows, other.rows, own.norms, other.norms, self.cost_matrix),
            *(own.counts, other.counts, own.size, other.size, own.stride, other.stride),
            *(self.D, self.depths, blocks, own.chunks),
        )

    def sides(self) -> tuple[tuple[Side, Side], tuple[Side, Side]]:
        return (self.x, self.y), (self.y, self.x)

    def reduce(self, own: Side, other: Side, running: Tensor | None, factors: Tensor | None) -> None:
        """Into own.partial and own.sums the log-sum-exps over the others; without factors the largest costs."""
        kernel, blocks = self.by_blocks(_sinkhorn_reduce_costs, own, self.tiles.own, own.chunks)
        geometry = self.geometry(own, other, blocks)
        kernel(
            *geometry, factors, running, other.potential, own.partial, own.sums,
            **self.tile(_sinkhorn_reduce_costs),
        )  # fmt: skip

    def update(self, own: Side, other: Side, running: Tensor, history: Tensor | None = None, step: int = 0) -> None:
        """The potentials of one side from own.partial and own.sums."""
        n_iters = 0 if history is None else history.shape[1]
        kernel, blocks = self.by_blocks(_sinkhorn_update, own, self.tiles.vector)
        kernel(
            own.partial, own.sums, own.counts, other.counts, own.log_weights, self.eps, running, own.potential,
            own.shift, own.rest, history, own.size, blocks, own.chunks, n_iters, step, own.inverse_rho,
            BLOCK=self.tiles.vector, CHUNK=self.tiles.chunk, **self.options,
        )  # fmt: skip

    def exponents(self, own: Side, over: Side | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Vectors that give log2 of P, or of P over the weights of a side: of own and of the other side as of
        `log_ratio`, then what is to be added to it."""
        x = (self.x.potential, -self.x.log_weights if over is self.x else None)
        y = (self.y.shift, self.y.rest if over is self.y else self.y.rest + self.y.log_weights)
        of_own, of_other = (x, y) if own is self.x else (y, x)
        return of_own[0], of_other[0], of_own[1], of_other[1]

    def project(self, own: Side, other: Side, over: Side, values, projected, hadamard=None) -> None:
        """projected_i = sum_j P_ij values_j over the weights of a side."""
        kernel, blocks = self.by_blocks(
            _sinkhorn_project, own, self.tiles.own, triton.cdiv(self.D, self.tiles.features)
        )
        geometry = self.geometry(own, other, blocks)
        kernel(
            *geometry, self.factors, *self.exponents(own, over), values, values.shape[2], projected, hadamard,
            OWN_IS_X=own is self.x, **self.tile(_sinkhorn_project),
        )  # fmt: skip


def compiled(
    kernel: Any,
    tile: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = Tiles().num_warps,
    quick: bool = False,
) -> Specialization:
    """How a launch compiles a kernel: ``types`` by argument name, sizes int32 where it does not tell."""
    types = dict.fromkeys(SIZES, "i32") | dict(types)
    arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
    return Specialization(kernel, tile, arguments, constants, num_warps, MAX_REGISTERS, quick)


def over_tiles(kernel: Any, types: Mapping[str, str], label: str = "", **constants: Any) -> Iterator[Specialization]:
    """A kernel that goes over cost tiles: for every cost in fp32, for euclidean ones in half precision too."""
    shape, num_warps = tile_of(kernel, Tiles())
    floats = dict.fromkeys(("own_rows", "other_rows", "own_norms", "other_norms", "cost_matrix"), "*fp32")
    counts = dict.fromkeys(("own_counts", "other_counts", "running"), "*i32")
    for cost, dtype in itertools.product(COSTS, ("fp32", "fp16", "bf16")):
        if dtype == "fp32" or cost == "euclidean":
            points = dict.fromkeys(("own_points", "other_points"), f"*{dtype}")
            others = {name: kind.replace("input", dtype) for name, kind in types.items()}
            tile = f"{shape['OWN']}x{shape['OTHER']} {dtype} {cost}{label}"
            given = {"COST": COSTS[cost], **shape, **constants}
            quick = (dtype, cost) == ("fp32", "euclidean")
            yield compiled(kernel, tile, others | floats | counts | points, given, num_warps, quick)


def specializations() -> Iterator[Specialization]:
    """What the launchers can ask for, with every optional argument."""
    tiles = Tiles()
    vectors = dict.fromkeys(
        ("weights", "rows", "norms", "log_weights", "potential", "partial", "sums", "eps", "shift", "rest", "history",
         "factors", "own_exponent", "other_exponent", "own_rest", "other_rest"), "*fp32",
    )  # fmt: skip
    integers = dict.fromkeys(("lengths", "other_lengths", "counts", "other_counts", "running"), "*i32")
    types = {**vectors, **integers, "inverse_rho": "fp32"}
    for cost, dtype in (("euclidean", "fp32"), ("euclidean", "bf16"), ("cosine", "fp32"), ("matrix", "fp32")):
        constants = {"COST": COSTS[cost], "BLOCK": tiles.own, "DEPTH": tiles.depth}
        points = dict.fromkeys(("points", "centres"), f"*{dtype}")
        yield compiled(_sinkhorn_prepare, f"{tiles.own} {dtype} {cost}", types | points, constants)
    yield from over_tiles(_sinkhorn_reduce_costs, types)
    yield from over_tiles(_sinkhorn_reduce_costs, types, " largest", factors=None, running=None)
    values = types | dict.fromkeys(("values", "projected", "hadamard"), "*input")
    for own in "xy":
        yield from over_tiles(_sinkhorn_project, values, f" {own}", OWN_IS_X=own == "x")
    yield compiled(_sinkhorn_update, str(tiles.vector), types, {"BLOCK": tiles.vector, "CHUNK": tiles.chunk})
