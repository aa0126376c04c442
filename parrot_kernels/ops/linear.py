"""Matrix products of frozen layers, on a CPU by whichever of torch's libraries is the faster there."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import is_plain

WORTH_IT = 1 << 22  # multiply-adds; below, a call of oneDNN costs more than it gains


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor of another maker: there MKL does without its AVX-512 kernels."""
    info = Path("/proc/cpuinfo")
    processor = info.read_text() if info.exists() else platform.processor()
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return torch.backends.mkl.is_available() and onednn and "GenuineIntel" not in processor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``: x W^T + b, (..., K) to (..., N).

    In fp32 on a CPU, where no gradient is wanted and the product is large, by oneDNN if torch would take MKL on a
    processor that is not Intel's: 1.6 times as fast there on 256 rows and more. Sums are taken in another order.
    """
    tensors = (x, weight, bias)
    if (
        not torch.compiler.is_compiling()  # first: else the size is a condition of the graph, which large inputs break
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.numel() * weight.shape[0] >= WORTH_IT
        and mkl_is_slow()
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled("cpu")
        and is_plain(tensors)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
