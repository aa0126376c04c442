"""What mamba-ssm has beside its functions and third-party models import: norms, the Mamba module, a few names.

`parrot_kernels.compat.install` makes them importable as ``mamba_ssm.ops.triton.layer_norm`` and so on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, modules


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 at least, in the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    **parallel: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm (or RMS norm) of dropout(rowscale x) + residual, in the dtype of x; with ``prenorm`` also that sum.

    Plain PyTorch, so that models written for mamba-ssm's fused kernel run. Whether options after ``residual`` come in
    another order or not at all depends on the version, so here they are passed by name.

    Args:
        x, residual: (..., dim). The sum has the dtype of the residual; without one that of x, or fp32 with
            ``residual_in_fp32``.
        weight, bias: (dim,).
        dropout_p: elements of x are dropped with this probability, as in the original whether in training or not.
        rowscale: (...), a factor for each row of x.
        parallel: ``x1``, ``weight1``, ``bias1`` and ``return_dropout_mask``, for attention and MLP side by side, are
            accepted as long as they ask for nothing.

    Raises:
        NotImplementedError: one of ``parallel`` is given.
    """
    for name in parallel:
        if name not in ("x1", "weight1", "bias1", "return_dropout_mask"):
            raise TypeError(f"layer_norm_fn() got an unexpected keyword argument '{name}'")
        if parallel[name] is not None and parallel[name] is not False:
            raise NotImplementedError(
                f"layer_norm_fn: `{name}` belongs to blocks that run attention and MLP side by side, which Mamba-1 "
                "models don't have and parrot_kernels' stand-in for mamba_ssm doesn't serve; leave it out, or call the "
                "function once for each norm."
            )
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    added = x.to(wide) if rowscale is None else x.to(wide) * rowscale.to(wide).unsqueeze(-1)
    added = F.dropout(added, dropout_p) if dropout_p > 0 else added
    total = added if residual is None else added + residual.to(wide)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    if is_rms_norm:
        out = rms_norm(total, weight, eps) if bias is None else rms_norm(total, weight, eps) + bias
    else:
        out = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    kept = residual.dtype if residual is not None else wide if residual_in_fp32 else x.dtype
    return (out.to(x.dtype), total.to(kept)) if prenorm else out.to(x.dtype)


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` without subtracting the mean, with the same options but for ``is_rms_norm``."""
    return layer_norm_fn(x, weight, bias, residual, is_rms_norm=True, **options)


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, with the state dict of mamba-ssm's.

    In training ``dropout_p`` of the elements of x are dropped before the residual is added.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class Mamba(modules.Mamba):
    """`parrot_kernels.modules.Mamba` behind the constructor and the forward of mamba-ssm's and of Vim's fork of it.

    Args:
        bimamba_type: "none", or "v2": the block is `parrot_kernels.modules.BiMamba`. Both directions run whatever
            ``use_fast_path`` says (Vim's slow path leaves out the backward one).
        if_divide_out: halve the sum of the two directions; by default not, as in Vim's constructor.
        init_layer_scale: if given, the output is scaled by a parameter ``gamma`` (d_model,) of this first value.
        if_devide_out: ``if_divide_out`` as SSAMBA and older Vim spell it; either of them suffices.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        if_devide_out: bool = False,
    ) -> None:
        checks.choice("Mamba", "bimamba_type", bimamba_type, ("none", "v2"))
        if bimamba_type == "v2":
            self.suffixes = modules.BiMamba.suffixes
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank,
            dt_min,
            dt_max,
            dt_init,
            dt_scale,
            dt_init_floor,
            conv_bias,
            bias,
            use_fast_path,
            layer_idx,
            device,
            dtype,
        )
        self.bimamba_type, self.init_layer_scale = bimamba_type, init_layer_scale
        self.if_divide_out = if_divide_out or if_devide_out
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale, device=device, dtype=dtype))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, inference_params: Any | None = None
    ) -> Tensor:
        """(batch, seqlen, d_model) to the same; ``inference_params`` as in `parrot_kernels.modules.Mamba`."""
        if self.bimamba_type == "none":
            return super().forward(hidden_states, inference_params)
        if inference_params is not None:
            raise _not_causal("inference_params")
        return modules.BiMamba.forward(self, hidden_states)  # type: ignore[arg-type]  # it has its parameters

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `parrot_kernels.modules.Mamba`."""
        if self.bimamba_type != "none":
            raise _not_causal("step")
        return super().step(hidden_states, conv_state, ssm_state)

    def _project_out(self, y: Tensor) -> Tensor:
        out = super()._project_out(y)
        return out if self.init_layer_scale is None else out * self.gamma


def _not_causal(name: str) -> Exception:
    return NotImplementedError(
        f"Mamba: `{name}` runs sequences in pieces, which a bidirectional block (bimamba_type='v2') can't: its outputs "
        "depend on what follows. Pass whole sequences, without `inference_params`."
    )


class GenerationMixin:
    """Stands for ``mamba_ssm.utils.generation.GenerationMixin``, which encoders inherit without generating."""

    def generate(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            "parrot_kernels' stand-in for mamba_ssm does not generate. Use transformers with "
            "parrot_kernels.compat.transformers.enable()."
        )


def load_config_hf(model_name: str) -> None:
    """Stands for ``mamba_ssm.utils.hf.load_config_hf``, so that modules that import it load."""
    raise NotImplementedError(f"parrot_kernels' stand-in for mamba_ssm downloads nothing; load {model_name} yourself.")


def load_state_dict_hf(model_name: str, device: object = None, dtype: object = None) -> None:
    """Stands for ``mamba_ssm.utils.hf.load_state_dict_hf``, so that modules that import it load."""
    raise NotImplementedError(f"parrot_kernels' stand-in for mamba_ssm downloads nothing; load {model_name} yourself.")
