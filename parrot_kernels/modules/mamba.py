"""The Mamba-1 block as a module whose state dict is that of mamba-ssm's ``Mamba``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.causal_conv1d import causal_conv1d
from ..ops.causal_conv1d_update import causal_conv1d_update
from ..ops.linear import linear
from ..ops.selective_scan import selective_scan
from ..ops.selective_state_update import selective_state_update
from .linear import Linear


class MambaBlock(nn.Module):
    """What `Mamba` and `BiMamba` share: the parameters, the projections and one direction's mixing."""

    conv1d: nn.Conv1d
    suffixes: tuple[str, ...] = ("",)  # one per direction; parameters are called conv1d<suffix>, A<suffix>_log ...

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
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.choice(type(self).__name__, "dt_init", dt_init, ("random", "constant"))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_init, self.dt_scale = dt_init, dt_scale
        self.use_fast_path, self.layer_idx, self.backend = use_fast_path, layer_idx, backend

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        for suffix in self.suffixes:
            self._add_direction(suffix, conv_bias, **factory)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **factory)
        for suffix in self.suffixes:
            self._initialise_recurrence(suffix)

    def _add_direction(
        self, suffix: str, conv_bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, taps = self.d_inner, self.d_conv
        conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1, bias=conv_bias, **factory)
        x_proj = Linear(inner, self.dt_rank + 2 * self.d_state, bias=False, **factory)
        dt_proj = Linear(self.dt_rank, inner, bias=True, **factory)
        # The recurrence multiplies these hundreds of times over: they stay in full precision in a half-precision model.
        full: dict[str, Any] = {"device": device, "dtype": checks.compute_dtype(dtype or torch.get_default_dtype())}
        A_log = nn.Parameter(torch.empty(inner, self.d_state, **full))
        D = nn.Parameter(torch.empty(inner, **full))
        for parameter, mark in ((A_log, "_no_weight_decay"), (D, "_no_weight_decay"), (dt_proj.bias, "_no_reinit")):
            setattr(parameter, mark, True)  # read by mamba-ssm's and transformers' initialisers and by optimisers
        for name, part in zip(self._names(suffix), (conv1d, x_proj, dt_proj, A_log, D), strict=True):
            setattr(self, name, part)

    @staticmethod
    def _names(suffix: str) -> tuple[str, ...]:
        return f"conv1d{suffix}", f"x_proj{suffix}", f"dt_proj{suffix}", f"A{suffix}_log", f"D{suffix}"

    def _direction(self, suffix: str) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._names(suffix))

    @torch.no_grad()
    def _initialise_recurrence(self, suffix: str) -> None:
        """S4D-real A (-1 .. -N in each channel), D = 1, and delta log-uniform in [dt_min, dt_max]."""
        _, _, dt_proj, A_log, D = self._direction(suffix)
        A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(A_log))
        nn.init.ones_(D)
        std = self.dt_scale * self.dt_rank**-0.5
        if self.dt_init == "random":
            nn.init.uniform_(dt_proj.weight, -std, std)
        else:
            nn.init.constant_(dt_proj.weight, std)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        delta = torch.empty_like(dt_proj.bias).uniform_(low, high).exp().clamp(min=self.dt_init_floor)
        dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus

    def _project_in(self, argument: str, hidden: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, L, d_model) to the input x and the gate z of every direction, each (B, d_inner, L)."""
        sizes: dict[str, int] = {}
        checks.tensor(type(self).__name__, argument, hidden, shape=("B", "L", self.d_model), sizes=sizes)
        if lengths is not None:
            checks.tensor(
                type(self).__name__, "lengths", lengths, shape=("B",), like=hidden, dtypes=checks.INTEGERS, sizes=sizes
            )
            # The projections run over padding too: without this a NaN there would reach their weights' gradients.
            steps = torch.arange(hidden.shape[1], device=hidden.device)
            hidden = hidden.masked_fill((steps >= lengths[:, None])[..., None], 0)
        return self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)

    def _mix(
        self,
        x: Tensor,
        z: Tensor,
        suffix: str = "",
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Convolution and gated scan in one direction: (B, d_inner, L), and the final state of the scan."""
        conv1d, x_proj, dt_proj, A_log, D = self._direction(suffix)
        options["backend"] = self.backend
        x = causal_conv1d(x, conv1d.weight.squeeze(1), conv1d.bias, "silu", initial_state=conv_state, **options)
        dt, B, C = x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return selective_scan(
            x,
            linear(dt, dt_proj.weight).transpose(1, 2),
            -torch.exp(A_log.to(checks.compute_dtype(A_log.dtype))),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D,
            z,
            dt_proj.bias,
            delta_softplus=True,
            initial_state=ssm_state,
            return_final_state=True,
            **options,
        )

    def _project_out(self, y: Tensor) -> Tensor:
        return self.out_proj(y.transpose(1, 2))


class Mamba(MambaBlock):
    r"""Mamba-1 block (Gu & Dao 2023, arXiv 2312.00752, section 3.4).

    With :math:`[x, z] = W_{in} u_t`::

        x_t        <- silu(causal depthwise convolution of x)
        [d, B, C]   = W_x x_t
        delta_t     = softplus(W_dt d + b_dt)
        h_t         = exp(delta_t A) h_{t-1} + delta_t B_t x_t,     A = -exp(A_log)
        y_t         = W_out ((<C_t, h_t> + D x_t) * silu(z_t))

    Parameters, their names, shapes and initialisation are those of mamba-ssm 1.x and 2.x, so that checkpoints load
    unmodified. The recurrence is evaluated in fp32 (fp64 for fp64 parameters) whatever the dtype of the input.

    A sequence may be run in pieces, down to single tokens: with `allocate_inference_cache` and `step`, or with
    ``inference_params`` as mamba-ssm's models pass them. The outputs are those of the whole, to rounding.

    Args:
        d_model: width of the input and output.
        d_state: size N of the state of each channel.
        d_conv: width of the convolution.
        expand: the inner width is ``int(expand * d_model)``.
        dt_rank: rank of the projection to delta; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init_floor: at initialisation delta is log-uniform in [dt_min, dt_max], at least the floor.
        dt_init: "random" (uniform) or "constant" weights of the projection to delta, of size dt_scale / sqrt(dt_rank).
        conv_bias, bias: whether the convolution, and the input and output projections, have a bias.
        use_fast_path: accepted for mamba-ssm's sake; there is one path.
        layer_idx: the key of this layer's states in ``inference_params.key_value_memory_dict``.
        device, dtype: of the parameters.
        backend: passed to both ops; None lets each choose.
    """

    def forward(
        self,
        hidden: Tensor,
        inference_params: Any | None = None,
        *,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """Run the block over a batch of sequences.

        Args:
            hidden: (B, L, d_model), in the dtype of the projections.
            inference_params: mamba-ssm's record of a generation, an object with ``seqlen_offset`` and the dictionary
                ``key_value_memory_dict``. At offset 0 the sequence starts afresh, else it goes on from this layer's
                states in the dictionary; they are created when missing and updated in place, as in `step`. Not
                together with the options below.
            lengths: (B,) int; what lies at and past a sequence's length is not read. The output there is zero (the
                output projection's bias, if it has one), and the gradient is exactly zero.
            seq_idx: (B, L) int; sequences packed along L, the state starts afresh where the index changes.
            reverse: run from the last valid step to the first.

        Returns:
            (B, L, d_model).

        Raises:
            TypeError: ``lengths`` is not a tensor of integers.
            ValueError: ``hidden`` is not (B, L, d_model), ``lengths`` not (B,); ``inference_params`` with another
                option, without ``layer_idx``, or with states of another batch size.
        """
        if inference_params is not None:
            if lengths is not None or seq_idx is not None or reverse:
                raise checks.error(
                    "Mamba", "inference_params", "None with `lengths`, `seq_idx` or `reverse`", "both", "Drop one."
                )
            states = self._states_of(inference_params, hidden.shape[0])
            if inference_params.seqlen_offset == 0:
                for state in states:
                    state.zero_()
            return self.step(hidden, *states)[0]
        x, z = self._project_in("hidden", hidden, lengths)
        y, _ = self._mix(x, z, reverse=reverse, lengths=lengths, seq_idx=seq_idx)
        return self._project_out(y)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block over the next steps of sequences, usually one.

        Args:
            hidden_states: (B, L, d_model); mamba-ssm takes L = 1 only.
            conv_state: (B, d_inner, d_conv), the latest inputs of the convolution, the newest last.
            ssm_state: (B, d_inner, d_state).

        Returns:
            The output (B, L, d_model) and the two states, which were updated in place. Gradients reach
            ``hidden_states`` and the parameters, not what came before through the states.

        Raises:
            ValueError: a shape or a device.
        """
        x, z = self._project_in("hidden_states", hidden_states)
        for name, state, last in (("conv_state", conv_state, self.d_conv), ("ssm_state", ssm_state, self.d_state)):
            checks.tensor("Mamba.step", name, state, shape=(x.shape[0], self.d_inner, last), like=x)
        if x.shape[2] == 1:
            return self._mix_one(x.squeeze(2), z.squeeze(2), conv_state, ssm_state), conv_state, ssm_state
        # Copies: a backward may still read the states that are overwritten below.
        y, final_state = self._mix(x, z, conv_state=conv_state[..., 1:].clone(), ssm_state=ssm_state.clone())
        with torch.no_grad():
            conv_state.copy_(torch.cat([conv_state, x[..., -self.d_conv :]], -1)[..., -self.d_conv :])
            ssm_state.copy_(final_state)
        return self._project_out(y), conv_state, ssm_state

    def _mix_one(self, x: Tensor, z: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """The block after the input projection for one step, (B, d_inner) to (B, 1, d_model)."""
        conv1d, x_proj, dt_proj, A_log, D = self._direction("")
        x = causal_conv1d_update(x, conv_state, conv1d.weight.squeeze(1), conv1d.bias, "silu", backend=self.backend)
        dt, B, C = x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt, A = linear(dt, dt_proj.weight), -torch.exp(A_log.to(checks.compute_dtype(A_log.dtype)))
        y = selective_state_update(
            ssm_state, x, dt, A, B, C, D, z, dt_proj.bias, dt_softplus=True, backend=self.backend
        )
        return self._project_out(y.unsqueeze(2))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The states before the first step, for `step`: zeros.

        Args:
            batch_size: B.
            max_seqlen, options: accepted for mamba-ssm's sake; the states do not grow with the sequence.
            dtype: of both. By default the convolution's state has that of its weights and the scan's is in the
                compute dtype (mamba-ssm keeps it in that of the weights), so that half precision loses nothing.

        Returns:
            conv_state (B, d_inner, d_conv) and ssm_state (B, d_inner, d_state).
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        state_dtype = dtype or checks.compute_dtype(weight.dtype)
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=state_dtype)

    def _states_of(self, inference_params: Any, batch_size: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            fix = "Number the layers of a model that generates: Mamba(..., layer_idx=i)."
            raise checks.error("Mamba", "layer_idx", "an int with `inference_params`", None, fix)
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(batch_size)
        return states[self.layer_idx]
