"""Errors that say which argument is wrong, what was wanted, what was got and how to fix it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def error(
    op: str, argument: str, wanted: str, got: object, fix: str = "", kind: type[Exception] = ValueError
) -> Exception:
    """Build (not raise) the exception for a bad argument, so that call sites read ``raise checks.error(...)``."""
    return kind(f"{op}: `{argument}` must be {wanted}; got {got}." + (f" {fix}" if fix else ""))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states and potentials are kept: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """``tensor`` in this dtype; itself where it has it already, or is None."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def to_int32(tensor: MaybeTensor) -> MaybeTensor:
    """Lengths and indices in int32, as kernels read them; what does not fit becomes the nearest value that does.

    So what was out of range stays out of range; a plain conversion would wrap around.
    """
    if tensor is None or tensor.dtype == torch.int32:
        return tensor
    limits = torch.iinfo(torch.int32)
    return tensor.clamp(limits.min, limits.max).to(torch.int32)


def tensor(
    op: str,
    argument: str,
    value: object,
    *,
    shape: Sequence[int | str] | None = None,
    like: Tensor | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    sizes: dict[str, int] | None = None,
) -> None:
    """Check a tensor argument.

    Args:
        shape: the wanted shape; a string names a dimension, whose size is looked up in ``sizes`` and stored
            there when first met. Negative or missing information is never guessed.
        like: a tensor whose device this one must share.
        dtypes: the accepted dtypes.
        sizes: the named dimensions seen so far (mutated).
    """
    if not isinstance(value, Tensor):
        raise error(op, argument, "a torch.Tensor", type(value).__name__, kind=TypeError)
    if dtypes is not None and value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise error(
            op, argument, f"of dtype {names}", got, f"Convert it, for example with .to({dtypes[0]}).", TypeError
        )
    if like is not None and value.device != like.device:
        raise error(
            op, argument, f"on {like.device}, as the first input", value.device, f'Move it with .to("{like.device}").'
        )
    if shape is not None and not _fits(value, shape, {} if sizes is None else sizes):
        names = ", ".join(str(s) for s in shape)
        known = {s: sizes[s] for s in shape if isinstance(s, str) and s in sizes} if sizes else {}
        where = " with " + ", ".join(f"{k} = {v}" for k, v in known.items()) if known else ""
        raise error(op, argument, f"of shape ({names}){where}", tuple(value.shape))


def _fits(value: Tensor, shape: Sequence[int | str], sizes: dict[str, int]) -> bool:
    """Whether ``value`` has this shape; if so, stores the dimensions met for the first time in ``sizes``."""
    if len(value.shape) != len(shape):
        return False
    found: dict[str, int] = {}
    for wanted, got in zip(shape, value.shape, strict=True):
        size: int | str | None = wanted
        if isinstance(wanted, str) and (size := sizes.get(wanted)) is None:
            size = found.setdefault(wanted, got)
        if size != got:
            return False
    sizes.update(found)
    return True


def choice(op: str, argument: str, value: object, options: Sequence[object]) -> None:
    """Check that ``value`` is one of ``options``."""
    if value not in options:
        raise error(op, argument, "one of " + ", ".join(repr(o) for o in options), repr(value))


def positive(op: str, argument: str, value: object, wanted: str = "a positive number") -> None:
    """Check that ``value`` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error(op, argument, wanted, repr(value), kind=TypeError)
    if not 0 < value < math.inf:
        raise error(op, argument, wanted, value)


def fits_int32(op: str, argument: str, value: Tensor) -> None:
    """Check that int64 values keep apart in int32; on a CUDA device they are not read."""
    if value.dtype != torch.int64 or value.device.type != "cpu" or value.numel() == 0:
        return
    limits, (low, high) = torch.iinfo(torch.int32), (int(value.min()), int(value.max()))
    if low < limits.min or high > limits.max:
        raise error(op, argument, "within int32", f"values from {low} to {high}", "Number the sequences from 0.")


def lengths_in_range(op: str, argument: str, lengths: Tensor | None, limit: int) -> None:
    """Check the values of a lengths tensor; on a CUDA device they are not read (that would synchronise)."""
    if lengths is None or lengths.device.type != "cpu" or lengths.numel() == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > limit:
        raise error(op, argument, f"between 0 and {limit}", f"values from {low} to {high}")


def indices_in_range(op: str, argument: str, indices: Tensor | None, entries: int) -> None:
    """Check that no index is past the last entry; on a CUDA device they are not read."""
    if indices is None or indices.device.type != "cpu" or indices.numel() == 0:
        return
    if (high := int(indices.max())) >= entries:
        raise error(op, argument, f"below the {entries} entries of the state", high)
