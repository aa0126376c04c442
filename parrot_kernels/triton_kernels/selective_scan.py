"""Selective scan: one program per block of channels, which walks the time axis in tiles of a few steps.

A tile is shaped (steps, n, channels, lanes): state n * LANES + lane of a channel. Its last two axes are the threads
of the program, the first two lie in the registers of each, so that the recurrence runs inside a thread, step by
step; what picks step k out of a tile costs nothing once compiled, since k is known. The sum over states is one over
registers and LANES threads. Inputs are loaded and activated in a layout of their own, a tile ahead, without
repeating anything, and go through shared memory to the threads of their channel.

A number of states between powers of two is split into two tiles, 24 into 16 and 8, so that few are wasted.

Everything runs over scan steps: step s lies at time s, or n - 1 - s in reverse. Padding has steps of size zero.
A tile's first step is a multiple of its size, so no bit depends on the padding or on the batch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .specialization import Specialization, launch_options

STEPS = 8  # of a tile
NUM_WARPS = 4
MAX_REGISTERS = 255

LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2.0))
SOFTPLUS_THRESHOLD: tl.constexpr = tl.constexpr(20.0)


@triton.jit
def pick(tile, k, step):
    """Step k of a tile, with an axis of one step; adding -0.0 is what a compiler may drop."""
    return tl.sum(tl.where(step == k, tile, -0.0), 0, keep_dims=True)


@triton.jit
def time_of(s, n, REVERSE: tl.constexpr):
    """The time of scan steps; padding stays where it is."""
    return (tl.where(s < n, n - 1 - s, s) if REVERSE else s).to(tl.int64)


@triton.jit
def load_steps(x, s, n, d, valid_d, x_d, x_l, REVERSE: tl.constexpr):
    """(steps, 1, channels, 1) of a (channels, time) tensor in fp32, zero in the padding."""
    address = x + d * x_d + time_of(s, n, REVERSE) * x_l
    return tl.load(address, mask=valid_d & (s < n), other=0.0).to(tl.float32)


@triton.jit
def store_steps(x, value, s, n, L, d, valid_d, x_d, x_l, REVERSE: tl.constexpr):
    """Store what `load_steps` would load; zeros into the padding."""
    address = x + d * x_d + time_of(s, n, REVERSE) * x_l
    tl.store(address, tl.where(s < n, value, 0.0), mask=valid_d & (s < L))


@triton.jit
def load_matrix(x, s, n, d, valid_d, state, x_d, x_n, x_l, N, CONSTANT: tl.constexpr, REVERSE: tl.constexpr):
    """B or C: (1, states, channels, lanes) if it is constant, else (steps, states, 1, lanes)."""
    if CONSTANT:
        return tl.load(x + d * x_d + state * x_n, mask=valid_d & (state < N), other=0.0).to(tl.float32)
    else:
        address = x + state * x_n + time_of(s, n, REVERSE) * x_l
        return tl.load(address, mask=(state < N) & (s < n), other=0.0).to(tl.float32)


@triton.jit
def load_restarts(seq_idx, s, n, REVERSE: tl.constexpr):
    """Whether a step is the first of another packed sequence than the step before."""
    mask = (s > 0) & (s < n)
    here = tl.load(seq_idx + time_of(s, n, REVERSE), mask=mask, other=0)
    before = tl.load(seq_idx + time_of(s - 1, n, REVERSE), mask=mask, other=0)
    return here != before


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); log(1 + e) keeps its digits for small e by Kahan's quotient."""
    e = tl.exp(tl.minimum(x, SOFTPLUS_THRESHOLD))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > SOFTPLUS_THRESHOLD, x, log1p)


@triton.jit
def step_size(raw, s, n, SOFTPLUS: tl.constexpr):
    """softplus(raw) or raw, zero in the padding."""
    return tl.where(s < n, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def in_place(address, state, N):
    """Zeros, by a load that never happens: what they are added to stays in the threads that would load it.

    Triton lays a tile out as the last load it depends on, so this has to come after the loads of the inputs.
    """
    return tl.load(address, mask=state < -N, other=0.0)


@triton.jit
def decays(dt, A2, restarts, nothing):
    a = tl.exp2(dt * A2 + nothing)
    if restarts is not None:
        a = tl.where(restarts, 0.0, a)
    return a


@triton.jit
def run(a, b, h, step, STEPS: tl.constexpr):
    """The states of a tile, and the last of them."""
    states = tl.zeros_like(a)
    for k in tl.static_range(STEPS):
        h = pick(a, k, step) * h + pick(b, k, step)
        states = tl.where(step == k, h, states)
    return states, h


@triton.jit
def sum_states(tile):
    return tl.sum(tl.sum(tile, 1, keep_dims=True), 3, keep_dims=True)


@triton.jit
def outputs(dt, dtu, A2, B_t, C_t, restarts, nothing, h, step, STEPS: tl.constexpr):
    """What some of the states add to y, (steps, 1, channels, 1), and those states after the tile."""
    states, h = run(decays(dt, A2, restarts, nothing), dtu * B_t + nothing, h, step, STEPS)
    return sum_states(states * C_t), h


SIZES = ["D", "L", "N", "groups", "groups_per_B", "groups_per_C", "blocks", "chunks"]
STRIDES = [f"{tensor}_{axis}" for tensor in ("u", "delta", "z", "out") for axis in ("b", "d", "l")]
STRIDES += [f"{tensor}_{axis}" for tensor in ("B", "C") for axis in ("b", "g", "d", "n", "l")]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _selective_scan_forward(
    u,  # (batch, D, L)
    delta,  # (batch, D, L)
    A,  # (D, N)
    B,  # (D, N), (batch, N, L) or (batch, groups, N, L)
    C,  # as B
    skip,  # (D,) or None
    z,  # (batch, D, L) or None
    delta_bias,  # (D,) or None
    lengths,  # (batch,) or None
    seq_idx,  # (batch, L) or None
    initial_state,  # (batch, D, N) or None
    out,  # (batch, D, L)
    final_state,  # (batch, D, N)
    checkpoints,  # (batch, chunks, D, N) or None
    u_b,
    u_d,
    u_l,
    delta_b,
    delta_d,
    delta_l,
    z_b,
    z_d,
    z_l,
    out_b,
    out_d,
    out_l,
    B_b,
    B_g,
    B_d,
    B_n,
    B_l,
    C_b,
    C_g,
    C_d,
    C_n,
    C_l,
    D,
    L,
    N,
    groups,  # of channels that share B and C
    groups_per_B,  # how many of them share B
    groups_per_C,
    blocks,  # of channels in a group
    chunks,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    CHUNK: tl.constexpr,  # steps between checkpoints
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,  # of the first tile
    MORE: tl.constexpr,  # of the second, or 0
):
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    group = pid // blocks % groups
    b = pid // blocks // groups
    size = D // groups
    local = block * CHANNELS + tl.arange(0, CHANNELS)[None, None, :, None]
    valid_d = local < size
    d = group * size + local
    step = tl.arange(0, STEPS)[:, None, None, None]
    lane = tl.arange(0, LANES)[None, None, None, :]
    state = tl.arange(0, STATES // LANES)[None, :, None, None] * LANES + lane
    n = L
    if lengths is not None:
        n = tl.minimum(tl.load(lengths + b), L)

    u += b * u_b
    delta += b * delta_b
    out += b * out_b
    if z is not None:
        z += b * z_b
    if seq_idx is not None:
        seq_idx += b * L
    B += b * B_b + group // groups_per_B * B_g
    C += b * C_b + group // groups_per_C * C_g
    bias = tl.zeros([1, 1, CHANNELS, 1], tl.float32)
    if delta_bias is not None:
        bias = tl.load(delta_bias + d, mask=valid_d, other=0.0)
    if skip is not None:
        D_d = tl.load(skip + d, mask=valid_d, other=0.0)

    row = b * D + d
    mask = valid_d & (state < N)
    A2 = tl.load(A + d * N + state, mask=mask, other=0.0) * LOG2E
    h = tl.zeros([1, STATES // LANES, CHANNELS, LANES], tl.float32)
    if initial_state is not None:
        h = tl.load(initial_state + row * N + state, mask=mask, other=0.0)
    B_next = load_matrix(B, step, n, d, valid_d, state, B_d, B_n, B_l, N, CONSTANT_B, REVERSE)
    C_next = load_matrix(C, step, n, d, valid_d, state, C_d, C_n, C_l, N, CONSTANT_C, REVERSE)
    if MORE > 0:
        state1 = STATES + tl.arange(0, MORE // LANES)[None, :, None, None] * LANES + lane
        mask1 = valid_d & (state1 < N)
        A2_1 = tl.load(A + d * N + state1, mask=mask1, other=0.0) * LOG2E
        h1 = tl.zeros([1, MORE // LANES, CHANNELS, LANES], tl.float32)
        if initial_state is not None:
            h1 = tl.load(initial_state + row * N + state1, mask=mask1, other=0.0)
        B_next1 = load_matrix(B, step, n, d, valid_d, state1, B_d, B_n, B_l, N, CONSTANT_B, REVERSE)
        C_next1 = load_matrix(C, step, n, d, valid_d, state1, C_d, C_n, C_l, N, CONSTANT_C, REVERSE)
    u_next = load_steps(u, step, n, d, valid_d, u_d, u_l, REVERSE)
    raw_next = load_steps(delta, step, n, d, valid_d, delta_d, delta_l, REVERSE)

    for first in range(0, n, STEPS):
        s = first + step
        ahead = s + STEPS
        if checkpoints is not None:
            kept = (b * chunks + first // CHUNK) * D + d
            tl.store(checkpoints + kept * N + state, h, mask=mask & (first % CHUNK == 0))
            if MORE > 0:
                tl.store(checkpoints + kept * N + state1, h1, mask=mask1 & (first % CHUNK == 0))
        u_t = u_next
        raw = raw_next
        B_t = B_next
        C_t = C_next
        u_next = load_steps(u, ahead, n, d, valid_d, u_d, u_l, REVERSE)
        raw_next = load_steps(delta, ahead, n, d, valid_d, delta_d, delta_l, REVERSE)
        if not CONSTANT_B:
            B_next = load_matrix(B, ahead, n, d, valid_d, state, B_d, B_n, B_l, N, CONSTANT_B, REVERSE)
        if not CONSTANT_C:
            C_next = load_matrix(C, ahead, n, d, valid_d, state, C_d, C_n, C_l, N, CONSTANT_C, REVERSE)
        restarts = None
        if seq_idx is not None:
            restarts = load_restarts(seq_idx, s, n, REVERSE)
        if z is not None:
            gate = load_steps(z, s, n, d, valid_d, z_d, z_l, REVERSE)

        if MORE > 0:
            B_t1 = B_next1
            C_t1 = C_next1
            if not CONSTANT_B:
                B_next1 = load_matrix(B, ahead, n, d, valid_d, state1, B_d, B_n, B_l, N, CONSTANT_B, REVERSE)
            if not CONSTANT_C:
                C_next1 = load_matrix(C, ahead, n, d, valid_d, state1, C_d, C_n, C_l, N, CONSTANT_C, REVERSE)
        nothing = in_place(A + d * N + state, state, N)
        if MORE > 0:
            nothing1 = in_place(A + d * N + state1, state1, N)

        dt = step_size(raw + bias, s, n, SOFTPLUS)
        dtu = dt * u_t
        y, h = outputs(dt, dtu, A2, B_t, C_t, restarts, nothing, h, step, STEPS)
        if MORE > 0:
            y1, h1 = outputs(dt, dtu, A2_1, B_t1, C_t1, restarts, nothing1, h1, step, STEPS)
            y += y1
        if skip is not None:
            y += D_d * u_t
        if z is not None:
            y *= gate * sigmoid(gate)
        store_steps(out, y, s, n, L, d, valid_d, out_d, out_l, REVERSE)

    tl.store(final_state + row * N + state, h, mask=mask)
    if MORE > 0:
        tl.store(final_state + row * N + state1, h1, mask=mask1)
    for first in range(tl.cdiv(n, STEPS) * STEPS, L, STEPS):
        if checkpoints is not None:
            kept = (b * chunks + first // CHUNK) * D + d
            tl.store(checkpoints + kept * N + state, h, mask=mask & (first % CHUNK == 0))
            if MORE > 0:
                tl.store(checkpoints + kept * N + state1, h1, mask=mask1 & (first % CHUNK == 0))
        zero = tl.zeros([STEPS, 1, CHANNELS, 1], tl.float32)
        store_steps(out, zero, first + step, n, L, d, valid_d, out_d, out_l, REVERSE)


def split(states: int) -> tuple[int, int, int]:
    """(states of the first tile, of the second, lanes of a channel): powers of two that hold ``states``."""
    whole = max(4, triton.next_power_of_2(states))
    half = whole // 2
    rest = max(4, triton.next_power_of_2(states - half)) if states > half else 0
    pair = (half, rest) if half >= 4 and half + rest < whole else (whole, 0)
    return *pair, min(32, max(4, pair[0] // 4))


def matrix_strides(matrix: Tensor) -> tuple[int, int, int, int, int]:
    """Strides of B or C along batch, group, channel, state and time; 0 along what it does not have."""
    strides = matrix.stride()
    if matrix.dim() == 2:
        return 0, 0, *strides, 0
    batch, *group, state, time = strides
    return batch, *(group or (0,)), 0, state, time


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def groups_of(B: Tensor, C: Tensor) -> tuple[int, int, int]:
    """Groups of channels that share both B and C; how many of them share B, and C."""
    groups_B, groups_C = (m.shape[1] if m.dim() == 4 else 1 for m in (B, C))
    groups = math.lcm(groups_B, groups_C)
    return groups, groups // groups_B, groups // groups_C


def _shape_arguments(u: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> dict[str, int]:
    (_, D, L), N = u.shape, A.shape[1]
    states, more, lanes = split(N)
    channels = 32 // lanes * NUM_WARPS
    groups, groups_per_B, groups_per_C = groups_of(B, C)
    return {
        **{"D": D, "L": L, "N": N, "groups": groups},
        **{"groups_per_B": groups_per_B, "groups_per_C": groups_per_C},
        **{"blocks": triton.cdiv(D // groups, channels), "chunks": triton.cdiv(L, chunk_size)},
        **{"CONSTANT_B": B.dim() == 2, "CONSTANT_C": C.dim() == 2, "CHUNK": chunk_size},
        **{"LANES": lanes, "CHANNELS": channels, "STATES": states, "MORE": more},
    }


def forward(
    *,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    out: Tensor,
    final_state: Tensor,
    checkpoints: Tensor | None = None,
) -> None:
    """Launch the forward; shapes and meaning as in `reference.selective_scan`.

    u, delta, z, out and per-step B, C in fp32, fp16 or bf16 and of any strides, without a copy; the rest in fp32
    (lengths and seq_idx in int32). Nothing synchronises, and the launch depends on shapes and strides only.
    """
    sizes = _shape_arguments(u, A, B, C, chunk_size)
    if chunk_size % STEPS != 0:
        raise ValueError(f"selective_scan: `chunk_size` must be a multiple of {STEPS}; got {chunk_size}.")
    programs = u.shape[0] * sizes["groups"] * sizes["blocks"]
    if programs == 0:
        return
    A, D, delta_bias, lengths, seq_idx, initial_state = dense(A, D, delta_bias, lengths, seq_idx, initial_state)
    with device_of(u):
        _selective_scan_forward[(programs,)](
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            lengths,
            seq_idx,
            initial_state,
            out,
            final_state,
            checkpoints,
            *u.stride(),
            *delta.stride(),
            *((0, 0, 0) if z is None else z.stride()),
            *out.stride(),
            *matrix_strides(B),
            *matrix_strides(C),
            **sizes,
            SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            STEPS=STEPS,
            **launch_options(NUM_WARPS, MAX_REGISTERS, amd=torch.version.hip is not None),
        )


def specialization(
    kernel: object, tile: dict[str, int], states: int, dtype: str, full: bool, last: str, constant: bool, quick: bool
) -> Specialization:
    """One launch of the forward or the backward.

    Args:
        tile: the constants of the tile.
        full: every option, instead of those of Mamba alone.
        last: which axis of u and B is contiguous, "l" or "d" and "n".
        constant: whether B and C are.
    """
    steps = ("u", "delta", "z", "out", "grad_out", "du", "ddelta", "dz")
    pointers = dict.fromkeys(steps, f"*{dtype}")
    pointers |= dict.fromkeys(("B", "C"), "*fp32" if constant else f"*{dtype}")
    pointers |= dict.fromkeys(("A", "skip", "delta_bias", "final_state", "checkpoints", "adjoint", "sums"), "*fp32")
    pointers |= dict.fromkeys(("dA", "dB", "dC", "dD", "ddelta_bias"), "*fp32")
    optional = {"initial_state": "*fp32", "lengths": "*i32", "seq_idx": "*i32"}
    constants = {"SOFTPLUS": True, "REVERSE": full, "CONSTANT_B": constant, "CONSTANT_C": constant, "CHUNK": 32}
    constants |= tile | ({} if full else dict.fromkeys(optional))
    constants |= {f"{name.removesuffix('_out')}_{last}": 1 for name in steps}
    constants |= {f"{matrix}_{'l' if last == 'l' else 'n'}": 1 for matrix in ("B", "C")}
    names = kernel.arg_names
    sizes = [name for name in names if name not in {**pointers, **optional, **constants}]
    known = {**pointers, **optional, **dict.fromkeys(sizes, "i32")}
    return Specialization(
        kernel=kernel,
        tile=f"{tile['CHANNELS']}x{states} {dtype}, {'steps' if last == 'l' else 'channels'} contiguous"
        f"{', all options' if full else ''}{', constant B and C' if constant else ''}",
        arguments={name: kind for name, kind in known.items() if name in names and name not in constants},
        constants={name: value for name, value in constants.items() if name in names},
        num_warps=NUM_WARPS,
        max_registers=MAX_REGISTERS,
        quick=quick,
    )


def specializations() -> Iterator[Specialization]:
    """State sizes 8 to 64 in fp32 and bf16, both layouts; with every option, and with those of Mamba alone."""
    for states, dtype, full, last in itertools.product((8, 16, 24, 32, 64), ("fp32", "bf16"), (True, False), "ld"):
        if states == 16 or (states == 24 and last == "l") or (dtype == "fp32" and full and last == "l"):
            first, more, lanes = split(states)
            tile = {"LANES": lanes, "CHANNELS": 32 // lanes * NUM_WARPS, "STATES": first, "MORE": more, "STEPS": STEPS}
            quick = states in (16, 24) and dtype == "fp32" and full and last == "l"
            yield specialization(_selective_scan_forward, tile, states, dtype, full, last, False, quick)
