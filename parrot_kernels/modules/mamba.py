"""The Mamba-1 block as a module whose state dict is that of mamba-ssm's ``Mamba``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..ops.causal_conv1d import causal_conv1d
from ..ops.selective_scan import selective_scan


class Mamba(nn.Module):
    r"""Mamba-1 block (Gu & Dao 2023, arXiv 2312.00752, section 3.4).

    With :math:`[x, z] = W_{in} u_t`::

        x_t        <- silu(causal depthwise convolution of x)
        [d, B, C]   = W_x x_t
        delta_t     = softplus(W_dt d + b_dt)
        h_t         = exp(delta_t A) h_{t-1} + delta_t B_t x_t,     A = -exp(A_log)
        y_t         = W_out ((<C_t, h_t> + D x_t) * silu(z_t))

    Parameters, their names, shapes and initialisation are those of mamba-ssm 1.x and 2.x, so that checkpoints load
    unmodified. The recurrence is evaluated in fp32 (fp64 for fp64 parameters) whatever the dtype of the input.

    Args:
        d_model: width of the input and output.
        d_state: size N of the state of each channel.
        d_conv: width of the convolution.
        expand: the inner width is ``int(expand * d_model)``.
        dt_rank: rank of the projection to delta; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: at initialisation delta is log-uniform in [dt_min, dt_max], at least the floor.
        dt_init: "random" (uniform) or "constant" weights of the projection to delta, of size dt_scale / sqrt(dt_rank).
        conv_bias, bias: whether the convolution, and the input and output projections, have a bias.
        backend: passed to both ops; None lets each choose.
        device, dtype: of the parameters.
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
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice("Mamba", "dt_init", dt_init, ("random", "constant"))
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self.backend = backend

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        # The recurrence multiplies these hundreds of times over: they stay in full precision in a half-precision model.
        full = {"device": device, "dtype": checks.compute_dtype(dtype or torch.get_default_dtype())}
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **full))
        self.D = nn.Parameter(torch.empty(self.d_inner, **full))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.A_log._no_weight_decay = True
        self.D._no_weight_decay = True
        self.dt_proj.bias._no_reinit = True  # read by mamba-ssm's and transformers' initialisers
        self._initialise_recurrence()

    @torch.no_grad()
    def _initialise_recurrence(self) -> None:
        """S4D-real A (-1 .. -N in each channel), D = 1, and delta log-uniform in [dt_min, dt_max]."""
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        std = self.dt_scale * self.dt_rank**-0.5
        if self.dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -std, std)
        else:
            nn.init.constant_(self.dt_proj.weight, std)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        delta = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp().clamp(min=self.dt_init_floor)
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus

    def forward(
        self,
        hidden: Tensor,
        *,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """Run the block over a batch of sequences.

        Args:
            hidden: (B, L, d_model), in the dtype of the projections.
            lengths: (B,) int; what lies at and past a sequence's length is not read. The output there is zero (the
                output projection's bias, if it has one), and the gradient is exactly zero.
            seq_idx: (B, L) int; sequences packed along L, the state starts afresh where the index changes.
            reverse: run from the last valid step to the first.

        Returns:
            (B, L, d_model).

        Raises:
            ValueError: ``hidden`` is not (B, L, d_model).
        """
        checks.tensor("Mamba", "hidden", hidden, shape=("B", "L", self.d_model))
        if lengths is not None:
            # The projections run over padding too: without this a NaN there would reach their weights' gradients.
            steps = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden.masked_fill((steps >= lengths[:, None])[..., None], 0)
        varying = {"reverse": reverse, "lengths": lengths, "seq_idx": seq_idx, "backend": self.backend}

        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x = causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", **varying)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            x,
            F.linear(dt, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log.to(checks.compute_dtype(self.A_log.dtype))),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            **varying,
        )
        return self.out_proj(y.transpose(1, 2))
