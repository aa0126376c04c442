"""One step of the selective scan: one program per block of channels of a row, which reads and writes states once.

A tile holds `TILE` states, channels x states, and longer states than it can hold are walked through. Sums are taken
over all states of a channel in one program, in an order that its number alone decides.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .selective_scan import sigmoid, softplus
from .specialization import Specialization, launch_options

TILE = 512  # elements: few, so that a single token reaches many multiprocessors
MOST_STATES = 128  # of a tile
NUM_WARPS = 4
MAX_REGISTERS = 255  # else the assembler stops at 64, with a spill

SIZES = ["D_SIZE", "B_channels", "C_channels"]
STRIDES = [f"{name}_{axis}" for name, axes in {"state": "edn", "x": "bd", "dt": "bd", "A": "dn", "B": "bgn", "C": "bgn",
                                               "z": "bd", "out": "bd"}.items() for axis in axes]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STRIDES)
def _selective_state_update(
    state,  # (entries, D, N), read and written
    x,  # (b, D)
    dt,  # (b, D)
    A,  # (D, N)
    B,  # (b, groups, N)
    C,  # (b, groups, N)
    D,  # (D,) or None
    z,  # (b, D) or None
    dt_bias,  # (D,) or None
    indices,  # (b,) or None
    out,  # (b, D)
    state_e,
    state_d,
    state_n,
    x_b,
    x_d,
    dt_b,
    dt_d,
    A_d,
    A_n,
    B_b,
    B_g,
    B_n,
    C_b,
    C_g,
    C_n,
    z_b,
    z_d,
    out_b,
    out_d,
    D_SIZE,
    B_channels,  # of a group of B
    C_channels,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D_SIZE, BLOCK_D)
    b = pid // blocks
    d = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    entry = b
    valid = d < D_SIZE
    live = valid
    if indices is not None:
        entry = tl.load(indices + b).to(tl.int64)
        live = d < tl.where(entry < 0, 0, D_SIZE)

    u = tl.load(x + b * x_b + d * x_d, mask=live, other=0.0).to(tl.float32)
    step = tl.load(dt + b * dt_b + d * dt_d, mask=live, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + d, mask=live, other=0.0)
    if SOFTPLUS:
        step = softplus(step)

    y = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.static_range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
        mask = live[:, None] & (n < N)
        place = state + entry * state_e + (d * state_d)[:, None] + n * state_n
        rate = tl.load(A + (d * A_d)[:, None] + n * A_n, mask=mask, other=0.0)
        enter = tl.load(B + b * B_b + (d // B_channels * B_g)[:, None] + n * B_n, mask=mask, other=0.0).to(tl.float32)
        leave = tl.load(C + b * C_b + (d // C_channels * C_g)[:, None] + n * C_n, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        h = tl.exp(step[:, None] * rate) * h + (step * u)[:, None] * enter
        tl.store(place, h, mask=mask)
        y += tl.sum(h * leave, 1)

    if D is not None:
        y += tl.load(D + d, mask=live, other=0.0) * u
    if z is not None:
        gate = tl.load(z + b * z_b + d * z_d, mask=live, other=0.0).to(tl.float32)
        y *= gate * sigmoid(gate)
    tl.store(out + b * out_b + d * out_d, tl.where(live, y, 0.0), mask=valid)


def _constants(states: int, softplus: bool) -> dict[str, int | bool]:
    block = min(MOST_STATES, triton.next_power_of_2(max(1, states)))
    return {"SOFTPLUS": softplus, "N": states, "BLOCK_D": TILE // block, "BLOCK_N": block}


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.contiguous()


def update(
    *,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
    out: Tensor,
) -> None:
    """Launch the step; shapes and meaning as in `reference.selective_state_update`.

    x, dt, B, C, z and out in fp32, fp16 or bf16, the state in that, fp32 or fp64, the others in fp32, indices in int32.
    Any strides without a copy, but of vectors. Nothing synchronises, and the launch depends on shapes and strides only.
    """
    (rows, channels), states = x.shape, A.shape[1]
    if rows * channels == 0:
        return
    B, C = (matrix.unsqueeze(1) if matrix.dim() == 2 else matrix for matrix in (B, C))
    constants = _constants(states, dt_softplus)
    grid = (rows * triton.cdiv(channels, int(constants["BLOCK_D"])),)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _selective_state_update[grid](
            state,
            x,
            dt,
            A,
            B,
            C,
            _dense(D),
            z,
            _dense(dt_bias),
            _dense(indices),
            out,
            *state.stride(),
            *x.stride(),
            *dt.stride(),
            *A.stride(),
            *B.stride(),
            *C.stride(),
            *((0, 0) if z is None else z.stride()),
            *out.stride(),
            channels,
            channels // B.shape[1],
            channels // C.shape[1],
            **constants,
            **launch_options(NUM_WARPS, MAX_REGISTERS, amd=torch.version.hip is not None),
        )


def specializations() -> Iterator[Specialization]:
    """Common numbers of states and one that takes two tiles; with every option, and with those of Mamba's layers."""
    dtypes = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"))
    for (dtype, kept), states, full in itertools.product(dtypes, (16, 24, 256), (True, False)):
        tensors = {"state": f"*{kept}", **dict.fromkeys(("x", "dt", "B", "C", "z", "out"), f"*{dtype}")}
        tensors |= dict.fromkeys(("A", "D", "dt_bias"), "*fp32") | {"indices": "*i32"}
        constants = _constants(states, True) | ({} if full else {"indices": None})
        constants |= {f"{name}_n": 1 for name in ("state", "A", "B", "C")}
        constants |= {f"{name}_d": 1 for name in ("x", "dt", "z", "out")}
        known = tensors | dict.fromkeys((*SIZES, *STRIDES), "i32")
        tile = f"{constants['BLOCK_D']}x{constants['BLOCK_N']}"
        names = _selective_state_update.arg_names
        yield Specialization(
            kernel=_selective_state_update,
            tile=f"{tile} {dtype} state {states} {kept}{', all options' if full else ''}",
            arguments={name: known[name] for name in names if name in known and name not in constants},
            constants={name: value for name, value in constants.items() if name in names},
            num_warps=NUM_WARPS,
            max_registers=MAX_REGISTERS,
            quick=(dtype, states, full) == ("fp32", 16, True),
        )
