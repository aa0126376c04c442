"""Causal depthwise convolution: one program per tile of channels x steps, forward and backward in one launch each.

Everything runs over scan steps: step s lies at time s, or n - 1 - s in reverse, and the history in front of the
sequence at steps -(w-1) .. -1. So with x on that extended line

    pre_s = bias + sum_k w_k x_{s-(w-1)+k}          out_s = pre_s or silu(pre_s)
    dx_s = sum_j w_{w-1-j} dpre_{s+j}               dpre_s = dout_s silu'(pre_s),

and the gradient of the history is dx at its negative steps. The backward computes the w values of dpre that reach a
step again instead of keeping any; neighbouring taps come out of the cache, so that bytes are inputs plus outputs.
The sums for the weights and the bias over a tile are written out and added by a second kernel, in a fixed order.

Strides are deliberately not specialised on their alignment: rows of any length then compile to the same kernel, and
a warp reads neighbouring elements whichever axis is contiguous, shifted taps included.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reductions import sum_partials
from .specialization import Specialization, launch_options

NUM_WARPS = 4
TILE = 1024  # elements of a program
LONG, WIDE = 256, 16  # steps of a tile where time is contiguous, and where channels are
MAX_REGISTERS = 255  # all that a thread can have
UNROLLED = 4  # widths up to this are unrolled


@triton.jit
def extended(x, initial_state, s, d, valid_d, n, x_d, x_l, REVERSE: tl.constexpr, WIDTH: tl.constexpr):
    """(channels, steps) of one sequence with its history in front, in fp32; zero off both."""
    t = n - 1 - s if REVERSE else s
    mask = valid_d[:, None] & ((s >= 0) & (s < n))[None, :]
    tile = tl.load(x + (d * x_d)[:, None] + (t * x_l)[None, :], mask=mask, other=0.0).to(tl.float32)
    if initial_state is not None:
        mask = valid_d[:, None] & ((s < 0) & (s >= 1 - WIDTH))[None, :]
        past = initial_state + (d * (WIDTH - 1))[:, None] + (s + (WIDTH - 1))[None, :]
        tile += tl.load(past, mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit
def sequence(seq_idx, s, n, REVERSE: tl.constexpr):
    """The packed sequence of each step; the history belongs to the first step's."""
    s = tl.maximum(s, 0)
    return tl.load(seq_idx + (n - 1 - s if REVERSE else s), mask=s < n, other=0)


@triton.jit
def tap(
    k, x, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, REVERSE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """What weight k meets at steps s."""
    before = s + (k - (WIDTH - 1))
    value = extended(x, initial_state, before, d, valid_d, n, x_d, x_l, REVERSE, WIDTH)
    if seq_idx is not None:
        same = sequence(seq_idx, before, n, REVERSE) == sequence(seq_idx, s, n, REVERSE)
        value = tl.where(same[None, :], value, 0.0)
    return value


@triton.jit
def preactivation(
    x, weight, bias, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l,
    REVERSE: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([d.shape[0], s.shape[0]], tl.float32)
    if bias is not None:
        total += tl.load(bias + d, mask=valid_d, other=0.0)[:, None]
    for k in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
        w = tl.load(weight + d * WIDTH + k, mask=valid_d, other=0.0)
        total += w[:, None] * tap(k, x, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, REVERSE, WIDTH)
    return total


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def preactivation_gradient(
    grad_out, x, weight, bias, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, grad_d, grad_l,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Zero off the sequence."""
    if grad_out is None:
        return tl.zeros([d.shape[0], s.shape[0]], tl.float32)
    else:
        grad = extended(grad_out, None, s, d, valid_d, n, grad_d, grad_l, REVERSE, WIDTH)
        if SILU:
            pre = preactivation(
                x, weight, bias, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, REVERSE, WIDTH, UNROLL
            )
            gate = sigmoid(pre)
            grad *= gate * (1.0 + pre * (1.0 - gate))
        return grad


@triton.jit
def input_gradient(
    grad_out, grad_final_state, x, weight, bias, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, grad_d, grad_l,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradient at steps s >= 1 - WIDTH of the sequence with its history in front."""
    total = tl.zeros([d.shape[0], s.shape[0]], tl.float32)
    for j in range(WIDTH):  # unrolled, it would hold all their taps in registers
        after = s + j
        part = preactivation_gradient(
            grad_out, x, weight, bias, initial_state, seq_idx, after, d, valid_d, n, x_d, x_l, grad_d, grad_l,
            SILU, REVERSE, WIDTH, UNROLL,
        )  # fmt: skip
        if seq_idx is not None:
            same = sequence(seq_idx, after, n, REVERSE) == sequence(seq_idx, s, n, REVERSE)
            part = tl.where(same[None, :], part, 0.0)
        w = tl.load(weight + d * WIDTH + (WIDTH - 1 - j), mask=valid_d, other=0.0)
        total += w[:, None] * part
    if grad_final_state is not None:
        entry = s - n + (WIDTH - 1)
        mask = (entry >= 0) & (entry < WIDTH - 1)
        if seq_idx is not None:
            last = sequence(seq_idx, tl.zeros_like(s) + (n - 1), n, REVERSE)
            mask = mask & (sequence(seq_idx, s, n, REVERSE) == last)
        address = grad_final_state + (d * (WIDTH - 1))[:, None] + entry[None, :]
        total += tl.load(address, mask=valid_d[:, None] & mask[None, :], other=0.0).to(tl.float32)
    return total


@triton.jit
def place(lengths, D, L, blocks, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):
    """Batch entry, channels, block of steps, its steps and the valid steps of this program."""
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    rest = pid // blocks
    d_blocks = tl.cdiv(D, BLOCK_D)
    b = rest // d_blocks
    d = rest % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    s = block * BLOCK_L + tl.arange(0, BLOCK_L)
    n = L.to(tl.int64)
    if lengths is not None:
        n = tl.minimum(tl.load(lengths + b).to(tl.int64), n)
    return b, d, block, s, n


SIZES = ["D", "L", "blocks"]
STRIDES = [f"{tensor}_{axis}" for tensor in ("x", "out", "grad", "dx", "dinitial") for axis in ("b", "d", "l")]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _causal_conv1d_forward(
    x,  # (B, D, L)
    weight,  # (D, WIDTH)
    bias,  # (D,) or None
    lengths,  # (B,) or None
    seq_idx,  # (B, L) or None
    initial_state,  # (B, D, WIDTH - 1) or None
    out,  # (B, D, L)
    final_state,  # (B, D, WIDTH - 1)
    x_b,
    x_d,
    x_l,
    out_b,
    out_d,
    out_l,
    D,
    L,
    blocks,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b, d, block, s, n = place(lengths, D, L, blocks, BLOCK_D, BLOCK_L)
    valid_d = d < D
    x += b * x_b
    if seq_idx is not None:
        seq_idx += b * L
    if initial_state is not None:
        initial_state += b * D * (WIDTH - 1)
    result = preactivation(x, weight, bias, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, REVERSE, WIDTH, UNROLL)
    if SILU:
        result *= sigmoid(result)
    result = tl.where((s < n)[None, :], result, 0.0)
    t = tl.where(s < n, n - 1 - s, s) if REVERSE else s
    address = out + b * out_b + (d * out_d)[:, None] + (t * out_l)[None, :]
    tl.store(address, result, mask=valid_d[:, None] & (s < L)[None, :])

    if block == 0:
        entry = tl.arange(0, HISTORY)
        last_steps = n + entry - (WIDTH - 1)
        state = extended(x, initial_state, last_steps, d, valid_d, n, x_d, x_l, REVERSE, WIDTH)
        if seq_idx is not None:
            last = sequence(seq_idx, tl.zeros_like(last_steps) + (n - 1), n, REVERSE)
            same = sequence(seq_idx, last_steps, n, REVERSE) == last
            state = tl.where(same[None, :], state, 0.0)
        state_address = final_state + ((b * D + d) * (WIDTH - 1))[:, None] + entry[None, :]
        tl.store(state_address, state, mask=valid_d[:, None] & (entry < WIDTH - 1)[None, :])


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _causal_conv1d_backward(
    grad_out,  # (B, D, L) or None
    grad_final_state,  # (B, D, WIDTH - 1) or None
    x,  # (B, D, L)
    weight,  # (D, WIDTH)
    bias,  # (D,) or None
    lengths,  # (B,) or None
    seq_idx,  # (B, L) or None
    initial_state,  # (B, D, WIDTH - 1) or None
    dx,  # (B, D, L)
    dweight,  # (B, blocks, D, WIDTH), partial sums
    dbias,  # (B, blocks, D), partial sums, or None
    dinitial_state,  # (B, D, WIDTH - 1) or None
    grad_b,
    grad_d,
    grad_l,
    x_b,
    x_d,
    x_l,
    dx_b,
    dx_d,
    dx_l,
    dinitial_b,
    dinitial_d,
    dinitial_l,
    D,
    L,
    blocks,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    b, d, block, s, n = place(lengths, D, L, blocks, BLOCK_D, BLOCK_L)
    valid_d = d < D
    x += b * x_b
    if grad_out is not None:
        grad_out += b * grad_b
    if seq_idx is not None:
        seq_idx += b * L
    if initial_state is not None:
        initial_state += b * D * (WIDTH - 1)
    if grad_final_state is not None:
        grad_final_state += b * D * (WIDTH - 1)

    gradient = input_gradient(
        grad_out, grad_final_state, x, weight, bias, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, grad_d, grad_l,
        SILU, REVERSE, WIDTH, UNROLL,
    )  # fmt: skip
    gradient = tl.where((s < n)[None, :], gradient, 0.0)
    t = tl.where(s < n, n - 1 - s, s) if REVERSE else s
    address = dx + b * dx_b + (d * dx_d)[:, None] + (t * dx_l)[None, :]
    tl.store(address, gradient, mask=valid_d[:, None] & (s < L)[None, :])

    dpre = preactivation_gradient(
        grad_out, x, weight, bias, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, grad_d, grad_l,
        SILU, REVERSE, WIDTH, UNROLL,
    )  # fmt: skip
    row = (b * blocks + block) * D + d
    for k in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
        met = tap(k, x, initial_state, seq_idx, s, d, valid_d, n, x_d, x_l, REVERSE, WIDTH)
        tl.store(dweight + row * WIDTH + k, tl.sum(dpre * met, 1), mask=valid_d)
    if dbias is not None:
        tl.store(dbias + row, tl.sum(dpre, 1), mask=valid_d)

    if dinitial_state is not None:  # noqa: SIM102, known when compiling
        if block == 0:
            entry = tl.arange(0, HISTORY)
            steps = entry.to(tl.int64) - (WIDTH - 1)
            past = input_gradient(
                grad_out, grad_final_state, x, weight, bias, initial_state, seq_idx, steps, d, valid_d, n, x_d, x_l,
                grad_d, grad_l, SILU, REVERSE, WIDTH, UNROLL,
            )  # fmt: skip
            past_address = dinitial_state + b * dinitial_b + (d * dinitial_d)[:, None] + (entry * dinitial_l)[None, :]
            tl.store(past_address, past, mask=valid_d[:, None] & (entry < WIDTH - 1)[None, :])


def _tile(x: Tensor) -> tuple[int, int]:
    """(channels, steps) of a program: the longer side where memory is contiguous."""
    steps = WIDE if x.stride(1) == 1 and x.stride(2) != 1 else LONG
    return TILE // steps, steps


def _constants(width: int, silu: bool, reverse: bool, channels: int, steps: int) -> dict[str, int | bool]:
    return {
        "SILU": silu,
        "REVERSE": reverse,
        "WIDTH": width,
        "UNROLL": width if width <= UNROLLED else 1,
        "HISTORY": triton.next_power_of_2(max(1, width - 1)),
        "BLOCK_D": channels,
        "BLOCK_L": steps,
    }


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def forward(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    out: Tensor,
    final_state: Tensor,
) -> None:
    """Launch the forward; shapes and meaning as in `reference.causal_conv1d`.

    x, initial_state and the outputs in fp32, fp16 or bf16, weight and bias in fp32, lengths and seq_idx in int32;
    x and out of any strides without a copy. Nothing synchronises, and the launch depends on shapes and strides only.
    """
    (B, D, L), width = x.shape, weight.shape[1]
    channels, steps = _tile(x)
    blocks = max(1, triton.cdiv(L, steps))
    if B * D == 0:
        return
    with _device(x):
        _causal_conv1d_forward[(B * triton.cdiv(D, channels) * blocks,)](
            x,
            *_dense(weight, bias, lengths, seq_idx, initial_state),
            out,
            final_state,
            *x.stride(),
            *out.stride(),
            D,
            L,
            blocks,
            **_constants(width, silu, reverse, channels, steps),
            **launch_options(NUM_WARPS, MAX_REGISTERS, amd=torch.version.hip is not None),
        )


def backward(
    *,
    grad_out: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dinitial_state: Tensor | None,
) -> None:
    """Launch the backward; as `forward`, with the sums for dweight and dbias in a second stage."""
    (B, D, L), width = x.shape, weight.shape[1]
    channels, steps = _tile(x)
    blocks = max(1, triton.cdiv(L, steps))
    dweight_parts = x.new_empty(1, 1, B, blocks, D, width, dtype=torch.float32)
    dbias_parts = None if bias is None else x.new_empty(1, 1, B, blocks, 1, D, dtype=torch.float32)
    with _device(x):
        if B * D > 0:
            _causal_conv1d_backward[(B * triton.cdiv(D, channels) * blocks,)](
                grad_out,
                *_dense(grad_final_state),
                x,
                *_dense(weight, bias, lengths, seq_idx, initial_state),
                dx,
                dweight_parts,
                dbias_parts,
                dinitial_state,
                *((0, 0, 0) if grad_out is None else grad_out.stride()),
                *x.stride(),
                *dx.stride(),
                *((0, 0, 0) if dinitial_state is None else dinitial_state.stride()),
                D,
                L,
                blocks,
                **_constants(width, silu, reverse, channels, steps),
                **launch_options(NUM_WARPS, MAX_REGISTERS, amd=torch.version.hip is not None),
            )
        sum_partials(dweight_parts, dweight[None, None])
        if dbias is not None:
            sum_partials(dbias_parts, dbias[None, None, None])


def specializations() -> Iterator[Specialization]:
    """Widths 2, 3, 4 and a wider one, both layouts; with every option, and with those of Mamba's layers alone."""
    kernels = (_causal_conv1d_forward, _causal_conv1d_backward)
    layouts = {"steps": (TILE // LONG, LONG, "l"), "channels": (TILE // WIDE, WIDE, "d")}
    for kernel, dtype, full in itertools.product(kernels, ("fp32", "bf16"), (True, False)):
        for width, (layout, (channels, steps, contiguous)) in itertools.product((2, 3, 4, 7), layouts.items()):
            if width != 4 and (dtype == "bf16" or not full):
                continue
            tensors = dict.fromkeys(("x", "out", "final_state", "grad_out", "grad_final_state", "dx"), f"*{dtype}")
            tensors |= dict.fromkeys(("weight", "bias", "dweight", "dbias"), "*fp32")
            optional = {"initial_state": f"*{dtype}", "dinitial_state": f"*{dtype}"}
            optional |= dict.fromkeys(("lengths", "seq_idx"), "*i32")
            constants = _constants(width, True, full, channels, steps) | ({} if full else dict.fromkeys(optional))
            constants |= {f"{tensor}_{contiguous}": 1 for tensor in ("x", "out", "grad", "dx")}
            known = {**tensors, **optional, **dict.fromkeys((*SIZES, *STRIDES), "i32")}
            names = kernel.arg_names
            yield Specialization(
                kernel=kernel,
                tile=f"{channels}x{steps} {dtype} width {width}, {layout} contiguous{', all options' if full else ''}",
                arguments={name: kind for name, kind in known.items() if name in names and name not in constants},
                constants={name: value for name, value in constants.items() if name in names},
                num_warps=NUM_WARPS,
                max_registers=MAX_REGISTERS,
                quick=(dtype, width, layout) == ("fp32", 4, "steps") and full,
            )
