"""Backward of the selective scan: a program per block of channels walks the chunks of the time axis backwards.

The forward keeps the state at the start of every chunk of steps. In a chunk a program takes the states in slices of
a few: it runs through the chunk to find the state at the start of each of its tiles, then goes back over these tiles.
In a tile all states are computed once more, then the adjoint states (formulas: `reference/selective_scan.py`). So an
exponential is computed not quite twice, and nothing of size batch x channels x steps x states exists.

Slices keep the registers of a thread independent of the number of states, and 24 states cost three slices, not four.
What goes from chunk to chunk for each state (the adjoint, dA) and what is summed over slices for each step of a chunk
lies in global memory, small enough for the caches.

What is summed over channels (dB, dC) or over the batch (dA, dD, the bias, constant B and C) is summed inside a program,
written out, and added by a second kernel, in a fixed order. No bit depends on the padding or on the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reductions import sum_partials
from .selective_scan import (
    LOG2E,
    SOFTPLUS_THRESHOLD,
    decays,
    dense,
    device_of,
    forward,
    groups_of,
    in_place,
    load_matrix,
    load_restarts,
    load_steps,
    matrix_strides,
    pick,
    run,
    sigmoid,
    specialization,
    step_size,
    store_steps,
    sum_states,
    time_of,
)
from .specialization import Specialization, launch_options

STEPS = 4  # of a tile
STATES, LANES = 8, 4  # of a slice, and the threads that share them
NUM_WARPS = 4
CHANNELS = 32 // LANES * NUM_WARPS
MAX_REGISTERS = 255


@triton.jit
def gradients(dt, dtu, dy, A2, B_t, C_t, restarts, nothing, h, carry, step, STEPS: tl.constexpr):
    """A tile's states, those before each step decayed, their adjoints, and the adjoint before the tile, decayed."""
    a = decays(dt, A2, restarts, nothing)
    added = dtu * B_t + nothing
    kept = tl.zeros_like(a)
    for k in tl.static_range(STEPS):
        h = pick(a, k, step) * h
        kept = tl.where(step == k, h, kept)
        h += pick(added, k, step)
    direct = dy * C_t + nothing
    adjoint = tl.zeros_like(a)
    for i in tl.static_range(STEPS):
        g = pick(direct, STEPS - 1 - i, step) + carry
        adjoint = tl.where(step == STEPS - 1 - i, g, adjoint)
        carry = pick(a, STEPS - 1 - i, step) * g
    return kept + added, kept, adjoint, carry


@triton.jit
def add(address, value, earlier):
    """Add to what is at an address, or store there unless there is something from earlier."""
    tl.store(address, tl.load(address, mask=earlier, other=0.0) + value)


@triton.jit
def add_matrix(total, parts, terms, s, n, L, N, state, REVERSE: tl.constexpr, CONSTANT: tl.constexpr):
    """Add up the gradient of a constant matrix, or store that of a tile, summed over the channels."""
    if CONSTANT:
        total += tl.sum(terms, 0, keep_dims=True)
    else:
        sums = tl.where(s < n, tl.sum(terms, 2, keep_dims=True), 0.0)
        tl.store(parts + time_of(s, n, REVERSE) * N + state, sums, mask=(state < N) & (s < L))
    return total


@triton.jit
def clear_padding(parts, n, L, N, step, slice_state, STEPS: tl.constexpr, STATES: tl.constexpr):
    """Zeros into a program's part of dB or dC where no tile of a valid step reaches."""
    for first in range(tl.cdiv(n, STEPS) * STEPS, L, STEPS):
        s = (first + step).to(tl.int64)
        for first_state in range(0, N, STATES):
            state = first_state + slice_state
            tl.store(parts + s * N + state, tl.zeros_like(s * state).to(tl.float32), mask=(state < N) & (s < L))


SIZES = ["D", "L", "N", "groups", "groups_per_B", "groups_per_C", "blocks", "chunks"]
STRIDES = [f"{x}_{axis}" for x in ("grad", "u", "delta", "z", "du", "ddelta", "dz") for axis in "bdl"]
STRIDES += [f"{matrix}_{axis}" for matrix in "BC" for axis in "bgdnl"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _selective_scan_backward(
    grad_out,  # (batch, D, L) or None
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
    checkpoints,  # (batch, chunks, D, N)
    adjoint,  # (batch, D, N): that of the final state becomes that of the initial one
    sums,  # (programs, 3, CHUNK, CHANNELS): y, d(dt u) and d(dt), summed over the slices of states so far
    du,  # (batch, D, L)
    ddelta,  # (batch, D, L)
    dA,  # (batch, D, N), zeros
    dB,  # (batch, D, N), zeros, if B is constant, else (batch, groups of B, blocks that share B, L, N)
    dC,  # as dB
    dD,  # (batch, D) or None
    dz,  # (batch, D, L) or None
    ddelta_bias,  # (batch, D) or None
    grad_b,
    grad_d,
    grad_l,
    u_b,
    u_d,
    u_l,
    delta_b,
    delta_d,
    delta_l,
    z_b,
    z_d,
    z_l,
    du_b,
    du_d,
    du_l,
    ddelta_b,
    ddelta_d,
    ddelta_l,
    dz_b,
    dz_d,
    dz_l,
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
    groups,
    groups_per_B,
    groups_per_C,
    blocks,
    chunks,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    group = pid // blocks % groups
    b = pid // blocks // groups
    size = D // groups
    channel = tl.arange(0, CHANNELS)[None, None, :, None]
    local = block * CHANNELS + channel
    valid_d = local < size
    d = group * size + local
    row = b * D + d
    step = tl.arange(0, STEPS)[:, None, None, None]
    sum_step = tl.arange(0, 2 * STEPS)[:, None, None, None]
    tile = tl.arange(0, CHUNK // STEPS)[:, None, None, None]
    lane = tl.arange(0, LANES)[None, None, None, :]
    slice_state = tl.arange(0, STATES // LANES)[None, :, None, None] * LANES + lane
    n = L
    if lengths is not None:
        n = tl.minimum(tl.load(lengths + b), L)

    u += b * u_b
    delta += b * delta_b
    du += b * du_b
    ddelta += b * ddelta_b
    if grad_out is not None:
        grad_out += b * grad_b
    if z is not None:
        z += b * z_b
        dz += b * dz_b
    if seq_idx is not None:
        seq_idx += b * L
    B += b * B_b + group // groups_per_B * B_g
    C += b * C_b + group // groups_per_C * C_g
    matrix_part = (b * groups * blocks + group * blocks + block) * L * N
    if not CONSTANT_B:  # blocks of neighbouring groups that share B are neighbours
        dB += matrix_part
    if not CONSTANT_C:
        dC += matrix_part
    sums_y = sums + pid * 3 * CHUNK * CHANNELS + channel
    sums_input = sums_y + CHUNK * CHANNELS
    sums_dt = sums_input + CHUNK * CHANNELS
    bias = tl.zeros([1, 1, CHANNELS, 1], tl.float32)
    if delta_bias is not None:
        bias = tl.load(delta_bias + d, mask=valid_d, other=0.0)
    D_d = tl.zeros([1, 1, CHANNELS, 1], tl.float32)
    if skip is not None:
        D_d = tl.load(skip + d, mask=valid_d, other=0.0)
    sum_D = tl.zeros([1, 1, CHANNELS, 1], tl.float32)
    sum_bias = tl.zeros([1, 1, CHANNELS, 1], tl.float32)

    used = tl.cdiv(n, CHUNK)
    for i in range(0, used):
        chunk = used - 1 - i
        tiles = tl.cdiv(tl.minimum(n - chunk * CHUNK, CHUNK), STEPS)

        for first_state in range(0, N, STATES):
            state = first_state + slice_state
            mask = valid_d & (state < N)
            A2 = tl.load(A + d * N + state, mask=mask, other=0.0) * LOG2E
            h = tl.load(checkpoints + ((b * chunks + chunk) * D + d) * N + state, mask=mask, other=0.0)

            # The states before each tile of the chunk.
            starts = tl.where(tile == 0, h, 0.0)
            for j in range(1, tiles):
                s = chunk * CHUNK + (j - 1) * STEPS + step
                raw = load_steps(delta, s, n, d, valid_d, delta_d, delta_l, REVERSE)
                u_t = load_steps(u, s, n, d, valid_d, u_d, u_l, REVERSE)
                B_t = load_matrix(B, s, n, d, valid_d, state, B_d, B_n, B_l, N, CONSTANT_B, REVERSE)
                restarts = None
                if seq_idx is not None:
                    restarts = load_restarts(seq_idx, s, n, REVERSE)
                nothing = in_place(A + d * N + state, state, N + j)  # j, so that it is not hoisted
                dt = step_size(raw + bias, s, n, SOFTPLUS)
                _, h = run(decays(dt, A2, restarts, nothing), dt * u_t * B_t + nothing, h, step, STEPS)
                starts = tl.where(tile == j, h, starts)

            carry = tl.load(adjoint + row * N + state, mask=mask, other=0.0)
            sum_A = tl.load(dA + row * N + state, mask=mask, other=0.0)
            sum_B = tl.load(dB + row * N + state, mask=mask, other=0.0) if CONSTANT_B else 0.0
            sum_C = tl.load(dC + row * N + state, mask=mask, other=0.0) if CONSTANT_C else 0.0
            for k in range(0, tiles):
                j = tiles - 1 - k
                s = chunk * CHUNK + j * STEPS + step
                raw = load_steps(delta, s, n, d, valid_d, delta_d, delta_l, REVERSE)
                u_t = load_steps(u, s, n, d, valid_d, u_d, u_l, REVERSE)
                dy = tl.zeros([STEPS, 1, CHANNELS, 1], tl.float32)
                if grad_out is not None:
                    dy = load_steps(grad_out, s, n, d, valid_d, grad_d, grad_l, REVERSE)
                if z is not None:
                    gate = load_steps(z, s, n, d, valid_d, z_d, z_l, REVERSE)
                    dy *= gate * sigmoid(gate)
                B_t = load_matrix(B, s, n, d, valid_d, state, B_d, B_n, B_l, N, CONSTANT_B, REVERSE)
                C_t = load_matrix(C, s, n, d, valid_d, state, C_d, C_n, C_l, N, CONSTANT_C, REVERSE)
                restarts = None
                if seq_idx is not None:
                    restarts = load_restarts(seq_idx, s, n, REVERSE)
                nothing = in_place(A + d * N + state, state, N)
                dt = step_size(raw + bias, s, n, SOFTPLUS)
                dtu = dt * u_t
                h = pick(starts, j, tile)
                states, kept, g, carry = gradients(dt, dtu, dy, A2, B_t, C_t, restarts, nothing, h, carry, step, STEPS)
                place = (j * STEPS + step) * CHANNELS
                if z is not None:
                    add(sums_y + place, sum_states(states * C_t), first_state > 0)
                add(sums_input + place, sum_states(g * B_t), first_state > 0)
                decayed = g * kept
                add(sums_dt + place, sum_states(decayed * A2) / LOG2E, first_state > 0)
                sum_A += tl.sum(decayed * dt, 0, keep_dims=True)
                sum_B = add_matrix(sum_B, dB, g * dtu, s, n, L, N, state, REVERSE, CONSTANT_B)
                sum_C = add_matrix(sum_C, dC, states * dy, s, n, L, N, state, REVERSE, CONSTANT_C)
            tl.store(adjoint + row * N + state, carry, mask=mask)
            tl.store(dA + row * N + state, sum_A, mask=mask)
            if CONSTANT_B:
                tl.store(dB + row * N + state, sum_B, mask=mask)
            if CONSTANT_C:
                tl.store(dC + row * N + state, sum_C, mask=mask)
            tl.debug_barrier()  # other threads may read what was stored

        for first in range(0, CHUNK, 2 * STEPS):
            place = first + sum_step
            s = chunk * CHUNK + place
            raw = load_steps(delta, s, n, d, valid_d, delta_d, delta_l, REVERSE) + bias
            u_t = load_steps(u, s, n, d, valid_d, u_d, u_l, REVERSE)
            dinput = tl.load(sums_input + place * CHANNELS, mask=s < n, other=0.0)
            ddt = tl.load(sums_dt + place * CHANNELS, mask=s < n, other=0.0) + dinput * u_t
            dy = tl.zeros([2 * STEPS, 1, CHANNELS, 1], tl.float32)
            if grad_out is not None:
                dy = load_steps(grad_out, s, n, d, valid_d, grad_d, grad_l, REVERSE)
            if z is not None:
                gate = load_steps(z, s, n, d, valid_d, z_d, z_l, REVERSE)
                y = tl.load(sums_y + place * CHANNELS, mask=s < n, other=0.0) + D_d * u_t
                opened = sigmoid(gate)
                dgate = dy * y * opened * (1.0 + gate * (1.0 - opened))
                store_steps(dz, dgate, s, n, L, d, valid_d, dz_d, dz_l, REVERSE)
                dy *= gate * opened
            dt = step_size(raw, s, n, SOFTPLUS)
            store_steps(du, dinput * dt + D_d * dy, s, n, L, d, valid_d, du_d, du_l, REVERSE)
            if SOFTPLUS:
                ddt *= tl.where(raw > SOFTPLUS_THRESHOLD, 1.0, sigmoid(raw))
            store_steps(ddelta, ddt, s, n, L, d, valid_d, ddelta_d, ddelta_l, REVERSE)
            if ddelta_bias is not None:
                sum_bias += tl.sum(tl.where(s < n, ddt, 0.0), 0, keep_dims=True)
            if dD is not None:
                sum_D += tl.sum(dy * u_t, 0, keep_dims=True)
        tl.debug_barrier()  # before the next chunk overwrites the sums

    if dD is not None:
        tl.store(dD + row, sum_D, mask=valid_d)
    if ddelta_bias is not None:
        tl.store(ddelta_bias + row, sum_bias, mask=valid_d)
    for first in range(used * CHUNK, L, 2 * STEPS):
        s = first + sum_step
        zero = tl.zeros([2 * STEPS, 1, CHANNELS, 1], tl.float32)
        store_steps(du, zero, s, n, L, d, valid_d, du_d, du_l, REVERSE)
        store_steps(ddelta, zero, s, n, L, d, valid_d, ddelta_d, ddelta_l, REVERSE)
        if z is not None:
            store_steps(dz, zero, s, n, L, d, valid_d, dz_d, dz_l, REVERSE)
    if not CONSTANT_B:
        clear_padding(dB, n, L, N, step, slice_state, STEPS, STATES)
    if not CONSTANT_C:
        clear_padding(dC, n, L, N, step, slice_state, STEPS, STATES)


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else x.stride()


def _matrix_parts(u: Tensor, matrix: Tensor, states: int, groups: int, blocks: int) -> Tensor:
    """Partial sums of the gradient of B or C, in the shape of `sum_partials`."""
    batch, _, length = u.shape
    if matrix.dim() == 2:
        return u.new_zeros(1, 1, batch, 1, *matrix.shape, dtype=torch.float32)
    own = matrix.shape[1] if matrix.dim() == 4 else 1
    return u.new_empty(batch, own, 1, groups // own * blocks, length, states, dtype=torch.float32)


def _sum_matrix(parts: Tensor, total: Tensor) -> None:
    if total.dim() == 2:
        sum_partials(parts, total[None, None])
    else:
        sum_partials(parts, (total if total.dim() == 4 else total.unsqueeze(1)).mT)


def _recomputed_checkpoints(A: Tensor, u: Tensor, chunk_size: int, **inputs: object) -> Tensor:
    (batch, dim, length), states = u.shape, A.shape[1]
    checkpoints = A.new_empty(batch, triton.cdiv(length, chunk_size), dim, states)
    out, final_state = torch.empty_like(u), A.new_empty(batch, dim, states)
    inputs |= {"z": None, "out": out, "final_state": final_state, "checkpoints": checkpoints}
    forward(A=A, u=u, chunk_size=chunk_size, **inputs)
    return checkpoints


def backward(
    *,
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
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
    checkpoints: Tensor | None,
    du: Tensor,
    ddelta: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    dz: Tensor | None,
    ddelta_bias: Tensor | None,
    dinitial_state: Tensor | None,
) -> None:
    """Launch the backward; shapes and meaning as in `reference.selective_scan`, dtypes and strides as `forward`.

    Without ``checkpoints``, which are those of the forward, it runs once more. ``chunk_size`` is a power of two.
    Memory while it runs, in fp32: for each per-step B or C, states / 32 of the size of u; 96 and a few times the
    states for a channel of a sequence.
    """
    if chunk_size % (2 * STEPS) != 0:
        raise ValueError(f"selective_scan: `chunk_size` must be a multiple of {2 * STEPS}; got {chunk_size}.")
    (batch, dim, length), states = u.shape, A.shape[1]
    A, D, delta_bias, lengths, seq_idx = dense(A, D, delta_bias, lengths, seq_idx)
    if checkpoints is None:
        names = {"delta": delta, "B": B, "C": C, "D": D, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
        names |= {"reverse": reverse, "lengths": lengths, "seq_idx": seq_idx, "initial_state": initial_state}
        checkpoints = _recomputed_checkpoints(A, u, chunk_size, **names)
    groups, groups_per_B, groups_per_C = groups_of(B, C)
    blocks = triton.cdiv(dim // groups, CHANNELS)
    programs = batch * groups * blocks

    def parts(*shape: int) -> Tensor:
        return u.new_zeros(1, 1, batch, 1, *shape, dtype=torch.float32)

    dA_parts = parts(dim, states)
    dB_parts, dC_parts = (_matrix_parts(u, matrix, states, groups, blocks) for matrix in (B, C))
    dD_parts, dbias_parts = (None if t is None else parts(1, dim) for t in (dD, ddelta_bias))
    sums = u.new_empty(programs, 3, chunk_size, CHANNELS, dtype=torch.float32)
    adjoint = A.new_zeros(batch, dim, states)
    if grad_final_state is not None:
        adjoint.copy_(grad_final_state)
    with device_of(u):
        if programs > 0:
            _selective_scan_backward[(programs,)](
                grad_out,
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
                checkpoints.contiguous(),
                adjoint,
                sums,
                du,
                ddelta,
                dA_parts,
                dB_parts,
                dC_parts,
                dD_parts,
                dz,
                dbias_parts,
                *_strides(grad_out),
                *u.stride(),
                *delta.stride(),
                *_strides(z),
                *du.stride(),
                *ddelta.stride(),
                *_strides(dz),
                *matrix_strides(B),
                *matrix_strides(C),
                dim,
                length,
                states,
                groups,
                groups_per_B,
                groups_per_C,
                blocks,
                checkpoints.shape[1],
                SOFTPLUS=delta_softplus,
                REVERSE=reverse,
                CONSTANT_B=B.dim() == 2,
                CONSTANT_C=C.dim() == 2,
                CHUNK=chunk_size,
                STEPS=STEPS,
                LANES=LANES,
                CHANNELS=CHANNELS,
                STATES=STATES,
                **launch_options(NUM_WARPS, MAX_REGISTERS, amd=torch.version.hip is not None),
            )
        sum_partials(dA_parts, dA[None, None])
        _sum_matrix(dB_parts, dB)
        _sum_matrix(dC_parts, dC)
        if dD is not None:
            sum_partials(dD_parts, dD[None, None, None])
        if ddelta_bias is not None:
            sum_partials(dbias_parts, ddelta_bias[None, None, None])
        if dinitial_state is not None:
            dinitial_state.copy_(adjoint)


def specializations() -> Iterator[Specialization]:
    """One slice serves every number of states: each dtype, both layouts, and constant B and C."""
    tile = {"LANES": LANES, "CHANNELS": CHANNELS, "STATES": STATES, "STEPS": STEPS}
    for dtype, full, last in itertools.product(("fp32", "fp16", "bf16"), (True, False), "ld"):
        quick = dtype == "fp32" and full and last == "l"
        for constant in (False, True) if full and last == "l" else (False,):
            yield specialization(_selective_scan_backward, tile, STATES, dtype, full, last, constant, quick)
