"""Mamba-1 models of transformers on our kernels, for inference, training and cached generation, on any device.

::

    from parrot_kernels.compat import transformers as fast
    fast.enable()                      # or: with fast.enabled(): ...

transformers has had two designs. Since 5.16 its modelling files call module-level functions (``mamba_selective_scan``
and others), which are replaced. Before, a mixer's ``forward`` chose between ``slow_forward`` and
``cuda_kernels_forward``, written for mamba-ssm's functions; those are provided and ``forward`` takes the second on any
device. Models made before and after `enable` are served alike.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear import linear
from . import causal_conv1d, mamba_ssm

MIXERS = {"mamba": "MambaMixer", "falcon_mamba": "FalconMambaMixer", "jamba": "JambaMambaMixer"}

PIECE = 128  # steps that inference runs at a time: fewer, and the projections slow down

_ABSENT = object()
_replaced: list[tuple[Any, str, Any]] = []  # (owner, attribute, value before)
_blocks = 0  # of `enabled` that are open
_lock = threading.RLock()  # nobody meets half of what is replaced


def enable() -> None:
    """Make Mamba, FalconMamba and Jamba models use parrot_kernels. Does nothing when they already do."""
    with _lock:
        if not _replaced:
            _enable()


def _enable() -> None:
    # All are imported before any is touched: one that is missing leaves the others as they are.
    modules = [importlib.import_module(f"transformers.models.{model}.modeling_{model}") for model in MIXERS]
    for modeling, mixer_name in zip(modules, MIXERS.values(), strict=True):
        if hasattr(modeling, "mamba_selective_scan"):
            functions: dict[str, Any] = _FUNCTIONS
            forward = _inference_in_pieces
        else:
            functions = _KERNELS | {
                "is_fast_path_available": True,
                "lazy_load_kernel": _lazy_load_kernel(modeling),
                "_lazy_load_causal_conv1d": lambda: (_convolution_step, _convolution),
            }
            forward = _kernel_forward
        mixer = getattr(modeling, mixer_name)
        _replace(mixer, "forward", forward(mixer))
        for name, function in functions.items():
            _replace(modeling, name, function)


def disable() -> None:
    """Undo `enable`."""
    with _lock:
        while _replaced:
            owner, name, value = _replaced.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` inside a ``with`` block; afterwards all is as it was before it.

    Blocks may overlap, as they do in threads: the last to end disables.
    """
    global _blocks
    with _lock:
        outlasted = not _blocks and bool(_replaced)  # by `enable`
        if not outlasted:
            enable()
            _blocks += 1
    try:
        yield
    finally:
        if not outlasted:
            with _lock:
                _blocks -= 1
                if not _blocks:
                    disable()


def _replace(owner: Any, name: str, value: Any) -> None:
    # transformers 5.0 - 5.15 sets the kernels' names to None when it first makes a mixer: that is their value before
    before = vars(owner).get(name, None if name in _KERNELS else _ABSENT)
    _replaced.append((owner, name, before))
    setattr(owner, name, value)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    return _activated(causal_conv1d.causal_conv1d_fn, activation, x, weight, bias)


def _convolution_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    return _activated(causal_conv1d.causal_conv1d_update, activation, x, conv_state, weight, bias)


def _activated(convolve: Callable[..., Any], activation: str | None, *arguments: Any) -> Tensor:
    if activation in (None, "silu", "swish"):
        return convolve(*arguments, activation=activation)
    from transformers.activations import ACT2FN

    return ACT2FN[activation](convolve(*arguments))


def _scan(*arguments: Any, use_mambapy: bool = False, use_associative_scan: bool = False, **options: Any) -> Any:
    del use_mambapy, use_associative_scan  # which of its own slow paths transformers would take
    return mamba_ssm.selective_scan_fn(*arguments, **options)


def _no_fused_block(*arguments: Any, **options: Any) -> None:
    """None tells the mixer to compose the block from the other functions, which also respects the padding mask."""


def _inference_in_pieces(mixer_class: type[nn.Module]) -> Callable[..., Tensor]:
    """The mixer's forward; on a CPU, without gradients and without a cache, by `_inference`."""
    original = mixer_class.forward

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        elsewhere = hidden_states.device.type != "cpu" or hasattr(self.dt_proj, "_hf_hook")  # of accelerate
        altered = hasattr(self.config, "_is_quantized") or self.activation not in ("silu", "swish")
        if torch.is_grad_enabled() or cache_params is not None or options or elsewhere or altered:
            return original(self, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **options)
        return _inference(self, hidden_states, attention_mask)

    return forward


def _inference(mixer: Any, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """What the mixer computes, `PIECE` steps at a time: ten times the size of its input is then that of a piece."""
    norms = [getattr(mixer, f"{name}_layernorm", nn.Identity()) for name in ("dt", "b", "c")]
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    conv1d, dt_proj = mixer.conv1d, mixer.dt_proj
    filters, A, D = conv1d.weight.squeeze(1), -torch.exp(mixer.A_log.float()), mixer.D.float()
    delta_bias = None if dt_proj.bias is None else dt_proj.bias.float()

    def run(steps: slice, inputs: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        valid = None if mask is None else mask[:, steps, None]
        x, z = _project(mixer.in_proj, _masked(hidden_states[:, steps], valid)).transpose(1, 2).chunk(2, dim=1)
        u, inputs = causal_conv1d.causal_conv1d_fn(x, filters, conv1d.bias, None, inputs, True, activation="silu")
        u = _masked(u.transpose(1, 2), valid)
        dt, B, C = (norm(t) for norm, t in zip(norms, _project(mixer.x_proj, u).split(sizes, dim=-1), strict=True))
        y, state = mamba_ssm.selective_scan_fn(
            u.transpose(1, 2),
            linear(dt, dt_proj.weight).transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            D,
            z,
            delta_bias,
            delta_softplus=True,
            return_last_state=True,
            prev_state=state,
        )
        return _project(mixer.out_proj, y.transpose(1, 2).to(hidden_states.dtype)), inputs, state

    length = hidden_states.shape[1]
    first, inputs, state = run(slice(0, PIECE), None, None)
    if length <= PIECE:
        return first
    out = first.new_empty(first.shape[0], length, first.shape[2])
    out[:, :PIECE] = first
    for start in range(PIECE, length, PIECE):
        steps = slice(start, start + PIECE)
        out[:, steps], inputs, state = run(steps, inputs, state)
    return out


def _project(layer: nn.Module, x: Tensor) -> Tensor:
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else (x * valid).to(x.dtype)


_FUNCTIONS = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "mamba_inner_fn": _no_fused_block,
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": mamba_ssm.selective_state_update,
}
_KERNELS = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "falcon_mamba_inner_fn": mamba_ssm.mamba_inner_fn,
    "mamba_inner_fn": mamba_ssm.mamba_inner_fn,
    "selective_scan_fn": mamba_ssm.selective_scan_fn,
    "selective_state_update": mamba_ssm.selective_state_update,
}


def _lazy_load_kernel(modeling: ModuleType) -> Callable[..., Any]:
    """transformers 5.0 - 5.15 look the kernels up again whenever a mixer is made."""
    original: Any = getattr(modeling, "lazy_load_kernel", None)
    step = SimpleNamespace(selective_state_update=mamba_ssm.selective_state_update)
    kernels = SimpleNamespace(**_KERNELS, ops=SimpleNamespace(triton=SimpleNamespace(selective_state_update=step)))

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        ours = name in ("causal-conv1d", "mamba-ssm", "falcon_mamba-ssm")
        return kernels if ours else original(name, *arguments, **options)

    return load


class _Composed:
    """A mixer that says it is not training: its kernel path then skips the fused block, which ignores the mask."""

    training = False

    def __init__(self, mixer: nn.Module) -> None:
        self._mixer = mixer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mixer, name)


def _kernel_forward(mixer_class: Any) -> Callable[..., Tensor]:
    original, kernel_path = mixer_class.forward, mixer_class.cuda_kernels_forward
    accepted = inspect.signature(kernel_path).parameters

    @functools.wraps(original)
    def forward(self: Any, *arguments: Any, **options: Any) -> Tensor:
        if self.activation not in ("silu", "swish"):  # the kernels gate with silu, whatever the configuration says
            return self.slow_forward(*arguments, **options)
        options = {name: value for name, value in options.items() if name in accepted}
        return kernel_path(_Composed(self), *arguments, **options)

    return forward
