"""New steps of the causal convolution after a kept history: one program per block of channels of a row.

A program is one warp, and it computes the outputs before it overwrites what they were computed from; between reading
and writing stands a barrier, since what a thread writes another may have read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .causal_conv1d import UNROLLED, sigmoid
from .specialization import Specialization, launch_options

TILE = 256  # elements, channels x steps or inputs kept
MOST_STEPS = 16  # of a tile
NUM_WARPS = 1

SIZES = ["D", "L", "KEPT"]
STRIDES = [f"{name}_{axis}" for name, axes in {"x": "bdl", "state": "edi", "out": "bdl"}.items() for axis in axes]


@triton.jit
def place(s, seen, KEPT):
    """Where the state holds step s, counted from the first new one: at the end, or in a ring by the steps seen."""
    if seen is None:
        return KEPT + s
    else:
        at = (seen + s) % KEPT
        return tl.where(at < 0, at + KEPT, at)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _causal_conv1d_update(
    x,  # (b, D, L)
    state,  # (entries, D, KEPT), read and written
    weight,  # (D, WIDTH)
    bias,  # (D,) or None
    seen,  # (b,) or None
    indices,  # (b,) or None
    out,  # (b, D, L)
    x_b,
    x_d,
    x_l,
    state_e,
    state_d,
    state_i,
    out_b,
    out_d,
    out_l,
    D,
    L,
    KEPT,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    b = pid // blocks
    d = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    entry = b
    valid = (d < D)[:, None]
    live = valid
    if indices is not None:
        entry = tl.load(indices + b).to(tl.int64)
        live = (d < tl.where(entry < 0, 0, D))[:, None]
    kept = KEPT.to(tl.int64)
    if seen is not None:
        seen = tl.load(seen + b).to(tl.int64)
    new = x + b * x_b + (d * x_d)[:, None]
    old = state + entry * state_e + (d * state_d)[:, None]
    to = out + b * out_b + (d * out_d)[:, None]

    for first in range(0, L, BLOCK_L):
        s = first + tl.arange(0, BLOCK_L).to(tl.int64)[None, :]
        y = tl.zeros([BLOCK_D, BLOCK_L], tl.float32)
        if bias is not None:
            y += tl.load(bias + d, mask=d < D, other=0.0)[:, None]
        for k in tl.range(0, WIDTH, loop_unroll_factor=UNROLL):
            met = s + (k - (WIDTH - 1))
            value = tl.load(new + met * x_l, mask=live & (met >= 0) & (met < L), other=0.0).to(tl.float32)
            past = old + place(met, seen, kept) * state_i
            value += tl.load(past, mask=live & (met < 0), other=0.0).to(tl.float32)
            y += tl.load(weight + d * WIDTH + k, mask=d < D, other=0.0)[:, None] * value
        if SILU:
            y *= sigmoid(y)
        tl.store(to + s * out_l, tl.where(live, y, 0.0), mask=valid & (s < L))

    tl.debug_barrier()
    dtype = state.dtype.element_ty
    if seen is None:
        for first in range(0, KEPT, BLOCK_L):
            i = first + tl.arange(0, BLOCK_L).to(tl.int64)[None, :]
            met = i + L - kept  # the step that comes to lie at i
            stays = tl.load(old + (i + L) * state_i, mask=live & (met < 0), other=0.0)
            comes = tl.load(new + met * x_l, mask=live & (met >= 0) & (i < kept), other=0.0).to(tl.float32)
            tl.debug_barrier()  # of what lies further on, nothing has been overwritten yet
            tl.store(old + i * state_i, tl.where(met < 0, stays, comes.to(dtype)), mask=live & (i < kept))
    else:
        oldest = tl.maximum(L - kept, 0)  # of those that are not overwritten at once
        for first in range(0, L, BLOCK_L):
            s = first + tl.arange(0, BLOCK_L).to(tl.int64)[None, :]
            mask = live & (s >= oldest) & (s < L)
            comes = tl.load(new + s * x_l, mask=mask, other=0.0).to(tl.float32)
            tl.store(old + place(s, seen, kept) * state_i, comes.to(dtype), mask=mask)


def _constants(width: int, silu: bool, steps: int) -> dict[str, int | bool]:
    block = min(MOST_STEPS, triton.next_power_of_2(max(1, steps)))
    return {
        "SILU": silu,
        "WIDTH": width,
        "UNROLL": width if width <= UNROLLED else 1,
        "BLOCK_D": TILE // block,
        "BLOCK_L": block,
    }


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.contiguous()


def update(
    *,
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seen: Tensor | None,
    indices: Tensor | None,
    out: Tensor,
) -> None:
    """Launch the steps; shapes and meaning as in `reference.causal_conv1d_update`.

    x and out in fp32, fp16 or bf16, the state in that, fp32 or fp64, weight and bias in fp32, seen and indices in
    int32; x, the state and out of any strides without a copy. Nothing synchronises, and the launch depends on shapes
    and strides only.
    """
    (rows, channels, steps), kept = x.shape, state.shape[2]
    if rows * channels * steps == 0:
        return
    constants = _constants(weight.shape[1], silu, max(steps, 1 if seen is not None else kept))
    grid = (rows * triton.cdiv(channels, int(constants["BLOCK_D"])),)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _causal_conv1d_update[grid](
            x,
            state,
            *map(_dense, (weight, bias, seen, indices)),
            out,
            *x.stride(),
            *state.stride(),
            *out.stride(),
            channels,
            steps,
            kept,
            **constants,
            **launch_options(NUM_WARPS, None, amd=torch.version.hip is not None),
        )


def specializations() -> Iterator[Specialization]:
    """Widths 2, 3, 4 and a wider one, one step and several; with every option, and with those of Mamba's layers."""
    dtypes = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"))
    for (dtype, kept), width, steps, full in itertools.product(dtypes, (2, 3, 4, 7), (1, 4, 16), (True, False)):
        if width != 4 and (dtype != "fp32" or not full):
            continue
        tensors = {"x": f"*{dtype}", "state": f"*{kept}", "weight": "*fp32", "bias": "*fp32", "out": f"*{dtype}"}
        tensors |= dict.fromkeys(("seen", "indices"), "*i32")
        constants = _constants(width, True, steps) | ({} if full else {"seen": None, "indices": None})
        constants |= {"state_i": 1}
        known = tensors | dict.fromkeys((*SIZES, *STRIDES), "i32")
        names = _causal_conv1d_update.arg_names
        yield Specialization(
            kernel=_causal_conv1d_update,
            tile=f"{constants['BLOCK_D']}x{constants['BLOCK_L']} {dtype} state {kept} width {width}"
            f"{', all options' if full else ''}",
            arguments={name: known[name] for name in names if name in known and name not in constants},
            constants={name: value for name, value in constants.items() if name in names},
            num_warps=NUM_WARPS,
            quick=(dtype, width, steps, full) == ("fp32", 4, 4, True),
        )
