"""The kernels and shapes that `analytic` models: how often their loops turn, and what the formulas need.

Loops and lines are named by regular expressions on the source, see `sass.passes`; what options leave out of the stated
case (padding, packed sequences, reversal, an absorption, points near each other) is named with a share of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil


@dataclass(frozen=True)
class Case:
    """One launch of a kernel; of `launches` in a call of its op."""

    op: str
    kernel: str
    backend: str
    shape: str
    source: str  # a file of csrc/cuda, or "module:kernel and tile" of a Triton specialization
    blocks: int
    warps: int
    multiply_adds: float  # what the formulas need, as the following two
    exponentials: float
    bytes: float
    trips: Mapping[str, float | tuple[float, int]]
    share: Mapping[str, float] = field(default_factory=dict)
    symbol: str = "."  # regular expression on the kernel's name
    shared: int = 0  # bytes of shared memory that the launch asks for
    launches: int = 1
    dtype: str = "fp32"


def _sinkhorn(B: int = 1024, D: int = 120, K: int = 50) -> list[Case]:
    """Problems that one block holds, 50 iterations, euclidean, uniform weights."""
    found = []

    def case(kernel, backend, source, N, M, warps, trips, share, symbol=".", shared=0) -> Case:
        back = "backward" in kernel
        # Costs and two projections, an iteration's two half-steps; backward costs, the projections' gradients and those
        # through the distances, an iteration's six products.
        absorbs = backend == "cuda" or N * M <= 128 * 64  # else an iteration takes exponentials instead
        multiply_adds = N * M * ((9 * D + 6 * K) if back else (3 * D + 2 * K * absorbs))
        exponentials = N * M * (1 if absorbs else 2 * K)
        moved = 4 * (N + M) * ((4 * D + K) if back else (3 * D + 1))
        shape = f"{B}x{N}x{M}x{D}, {K} iterations"
        needed = (B * multiply_adds, B * exponentials, B * moved)
        return Case(
            "sinkhorn_hadamard", kernel, backend, shape, source, B, warps, *needed, trips, share, symbol, shared
        )  # fmt: skip

    trips = {r"^for d in range\(D\)": D, r"^while ": K}
    share = {r"^if \(untrusted\(": 0.0, r"^if max_vector\(outside": 0.0}
    for tile, warps in ((32, 1), (64, 4), (128, 8)):
        source = f"sinkhorn_hadamard:sinkhorn_hadamard_forward {tile}x{tile} fp32 euclidean"
        found.append(case("sinkhorn_hadamard_forward", "triton", source, tile, tile, warps, trips, share))
    for tile, warps in ((32, 2), (64, 8)):
        source = f"sinkhorn_hadamard_backward:sinkhorn_hadamard_backward {tile}x{tile} euclidean plain"
        found.append(case("sinkhorn_hadamard_backward", "triton", source, tile, tile, warps, trips, share))

    # CUDA C++: 128 x 128 fills 16 warps, 64 x 128 the 8 of the backward.
    depth = ceil(D / 16)
    unused = {
        r"(inverse_lengths|given_costs|refresh|refresh_rows|refresh_columns|run_log_domain|log_step)\(": 0.0,
        r"(write_padding|write_weights|write_deps)\(": 0.0,
        r"^> Backward<T, 1, false>": 0.0, r"damp_[xy];|exp2\(potential - offset\)|^if \(n == 0": 0.0,
        r"^if \(p\.plan\)|f_history|g_history": 0.0, r"total_error\(\)": 1 / (K + 1),
    }  # fmt: skip
    costs = {
        r"^for \(int d = 0; d < kFeatures.*pairwise_costs": 16, r"^for \(int d0 = 0.*pairwise_costs": depth,
        r"^for \(int slot = 0; slot < warps": 1,
    }  # fmt: skip
    threads = 512
    trips = costs | {
        r"^for \(int item": 4,
        r"^for \(int i = warp; .*find_costs": 8, r"^for \(int j = lane; .*find_costs": 4,
        r"^for \(int k = 1;;.*run_scaling": K + 1, r"^for \(int j = thread; .*for \(int k = 1;;": 128 / threads,
        r"^for \(int k = 0; k < count": (128, 32),
    }  # fmt: skip
    found.append(
        case("sinkhorn_hadamard_forward", "cuda", "sinkhorn_hadamard_forward_f32.cu", 128, 128, 16, trips, unused,
             "forward_kernelIfLi4E", 4 * (128 * 128 + 4224 + 14 * 128))
    )  # fmt: skip
    tiles = r"^for \(int task = warp.*"
    trips = costs | {
        r"^for \(int slot = 0; slot < warps": 0.5,
        r"^for \(int item.*> stage\(y": 8, r"^for \(int item.*(stage\(x|stage_source)": 4,
        r"^for \(int i = warp; .*find_costs": 8,
        r"^for \(int j = lane_index.*column_lse_parts": 4, r"^for \(int i = first.*column_lse_parts": 8,
        r"^for \(int j = thread; j < m": 0.5,
        # through_projections and through_distances, by rows and by columns
        tiles + r"through_(projections|distances)<true>": 2, tiles + r"through_(projections|distances)<false>": 4,
        r"^for \(int term": 2,
        r"^for \(int start = 0.*<true>": 4, r"^for \(int start = 0.*<false>": 2,
        r"^for \(int item = lane": 2, r"^for \(int k = 0; k < end": (32, 16),
        r"^for \(int part = 0; part < 3": 2, r"^for \(int d0 = 0.*through_kernel": depth,
        r"^for \(int d = 0; d < kFeatures.*through_kernel": (16, 16),
        r"^for \(; k >= 0.*unroll\(": K,
    }  # fmt: skip
    found.append(
        case("sinkhorn_hadamard_backward", "cuda", "sinkhorn_hadamard_backward_f32.cu", 64, 128, 8, trips, unused,
             "backward_kernelIfLi4E", 4 * (64 * 128 + 3200 + 8 * 64 + 10 * 128))
    )  # fmt: skip
    return found


def _streaming(N: int = 10_000, D: int = 64, K: int = 50) -> list[Case]:
    """One problem of N x N, tiles of 64 x 32 (64 x 16 where the gradient of the cost is made), chunks of 1024."""
    pairs, points, rows, chunks = N * N, 4 * N * D, ceil(N / 64), ceil(N / 1024)
    share = {r"^if tl\.max\(tl\.max\(tl\.where\(near": 0.0}
    depths = {r"^for k in tl\.range\(0, depths": ceil(D / 16)}
    by_chunk = depths | {r"^for (step|position) in tl\.range\(first|^for step in range\(first": N / 32 / chunks}
    shape = f"{N}x{N}x{D}, {K} iterations"

    def case(kernel, module, tile, blocks, warps, multiply_adds, exponentials, moved, trips, launches) -> Case:
        return Case(
            "sinkhorn_hadamard", kernel, "triton", shape, f"{module}:{kernel} {tile} fp32 euclidean", blocks, warps,
            multiply_adds, exponentials, moved, trips, share, launches=launches,
        )  # fmt: skip

    near = r"^if tl\.max\(tl\.max\(tl\.where\(|near_differences"
    share[near] = 0.0
    forward, backward = "sinkhorn_streaming", "sinkhorn_streaming_backward"
    every = depths | {r"^for step in tl\.range\(0, others": N / 32}
    gradient = depths | {
        r"^for position in tl\.range\(0, others": N / 16, r"^for k in tl\.range\(0, tl\.load\(iterations": K,
    }  # fmt: skip
    return [
        case("sinkhorn_reduce_costs", forward, "64x32", rows * chunks, 4, pairs * D, pairs, 2 * points, by_chunk,
             2 * K + 2),
        case("sinkhorn_project", forward, "64x32", rows, 8, 2 * pairs * D, pairs, 4 * points, every, 2),
        case("sinkhorn_sweep", backward, "64x32", rows * chunks, 4, pairs * D, 2 * pairs, 2 * points, by_chunk, 2 * K),
        case("sinkhorn_points_gradient", backward, "64x16", rows, 8, pairs * (3 * D + 2 * K), 2 * K * pairs,
             6 * points + 16 * N * K, gradient, 2),
    ]  # fmt: skip


def _scan(B: int = 8, D: int = 1536, L: int = 2048) -> list[Case]:
    """Softplus, D and z, N states; time contiguous."""
    found = []

    def case(kernel, backend, source, N, trips, share, symbol=".", dtype="fp32") -> Case:
        back, size = "backward" in kernel, 2 if dtype == "bf16" else 4
        elements = B * D * L
        moved = size * elements * (7 if back else 4) + 4 * elements * N / 32 * back
        needed = ((6 if back else 2) * elements * N, elements * N, moved)
        return Case(
            "selective_scan", kernel, backend, f"{B}x{D}x{L}, {N} states", source, B * D // 32, 4, *needed, trips,
            share, symbol, dtype=dtype,
        )  # fmt: skip

    for N, dtype in ((16, "fp32"), (24, "fp32"), (16, "bf16")):
        source = f"selective_scan:selective_scan_forward 32x{N} {dtype}, steps contiguous"
        trips = {r"^for first in range\(0, n, STEPS\)": L / 8, r"^for first in range\(tl\.cdiv": 0}
        found.append(case("selective_scan_forward", "triton", source, N, trips, {}, dtype=dtype))
    for N in (16, 24):
        trips = {
            r"^for j in range\(1, tiles\)": 7, r"^for k in range\(0, tiles\)": 8,
            r"^for first_state in range\(0, N, STATES\): < for i": N / 8, r"^for first in range\(0, CHUNK": 4,
            r"^for i in range\(0, used\)": L / 32, r"^for first": 0,
        }  # fmt: skip
        source = "selective_scan_backward:selective_scan_backward 32x8 fp32, steps contiguous"
        found.append(case("selective_scan_backward", "triton", source, N, trips, {}))

    share = {
        r"^> four_steps\(.*std::true_type": 0.0, r"^if \(p\.seq_idx\.data\)|p\.checkpoints\)": 0.0,
        r"^if \(\(s0 \+ kTile\) % kChunk == 0": 32 / 256,
    }  # fmt: skip
    trips = {
        r"^for \(int s0 = begin": L / 32, r"^for \(int s = 0; s < kTile": 8, r"^for \(int t = max\(begin": 0,
    }  # fmt: skip
    for N, dtype, letter in ((16, "fp32", "f"), (24, "fp32", "f"), (16, "bf16", "13__nv_bfloat16")):
        source = f"selective_scan_forward_{'f32' if dtype == 'fp32' else dtype}.cu"
        symbol = f"scan_forwardI{letter}Li{N // 4}ELb0E"
        found.append(case("selective_scan_forward", "cuda", source, N, trips, share, symbol, dtype))
    trips = {
        r"^for \(int tile = \(length": L / 32, r"^for \(int q = 0; q < kStretches": 3,
        r"^for \(int s = q \* kStretch": 2, r"^for \(int q = kStretches - 1": 4,
        r"^for \(int i = threadIdx\.x; i < count": 0, r"y\[i / kTile\]": 0,
    }  # fmt: skip
    for N in (16, 24):
        symbol = f"3runIfLi{N // 4}ELi4ELb0E"
        found.append(
            case("selective_scan_backward", "cuda", "selective_scan_backward_f32.cu", N, trips, share, symbol)
        )  # fmt: skip
    return found


def _conv(B: int = 8, D: int = 1536, L: int = 2048) -> list[Case]:
    """Width 4, SiLU, time contiguous."""
    elements = B * D * L

    def case(back: bool, backend: str, source: str, blocks: int, trips, share=None, symbol=".", dtype="fp32") -> Case:
        kernel = "causal_conv1d_backward" if back else "causal_conv1d_forward"
        moved = (3 if back else 2) * elements * (2 if dtype == "bf16" else 4)
        needed = ((12 if back else 4) * elements, elements, moved)
        return Case(
            "causal_conv1d", kernel, backend, f"{B}x{D}x{L}", source, blocks, 4, *needed, trips, share or {}, symbol,
            dtype=dtype,
        )  # fmt: skip

    def triton(back: bool, dtype: str = "fp32") -> Case:
        name = "causal_conv1d_backward" if back else "causal_conv1d_forward"
        source = f"causal_conv1d:{name} 4x256 {dtype} width 4, steps contiguous"
        return case(back, "triton", source, B * D // 4 * (L // 256), {r"^for j in range\(WIDTH\)": 4}, dtype=dtype)

    trips = {r"^for \(int k = 0; k < kIterations": 8, r"^for \(int i = place": 0}
    share = {
        r"^> (convolve<true>|load_steps<0>\(window|run\(std::true_type)|p\.seq_idx\.data": 0.0,
        r"^> load_steps<WIDTH - 1>\(gradient|p\.grad_final_state\.data|kSteps > line\.length|!p\.grad_out": 0.0,
        # Vectors serve all but the three steps before a tile.
        r"load_history\(|^> if \(first \+ i < stop && d \+ c|^if \(first \+ i < stop && d \+ c": 0.0,
        r"base\[\(first \+ i\) \* plane\.stride\[2\] \+ c": 0.0, r"^> first \+ i >= 0 && first \+ i < stop \?": 3 / 11,
    }  # fmt: skip
    cuda = [
        case(back, "cuda", "causal_conv1d_f32.cu", B * D // 4, trips, share,
             f"4conv{'8backward' if back else '7forward'}IfLi4ELi1E")
        for back in (False, True)
    ]  # fmt: skip
    return [triton(False), triton(True), triton(False, "bf16"), *cuda]


def _update(B: int = 128, D: int = 1536, N: int = 16) -> list[Case]:
    """One token of a state in fp32."""
    states = B * D * N
    moved = 4 * (2 * states + 4 * B * D)
    source = "selective_state_update:selective_state_update 32x16 fp32 state 16 fp32"
    return [
        Case("selective_state_update", "selective_state_update", "triton", f"{B}x{D}, {N} states", source,
             B * D // 32, 4, 2 * states, states, moved, {})
    ]  # fmt: skip


CASES = [*_sinkhorn(), *_streaming(), *_scan(), *_conv(), *_update()]
