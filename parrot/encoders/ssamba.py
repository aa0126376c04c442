"""SSAMBA: a self-supervised encoder of filterbank patches with bidirectional Mamba blocks.

Shams, Dindar, Jiang & Mesgarani 2024, arXiv 2405.11831. Layers and key names follow the official release, so that its
checkpoints load unmodified.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_kernels.modules import BiMamba

from .base import Encoder
from .checkpoint import first, mismatches, read_state_dict
from .fbank import KaldiFbank

NORM_EPS = 1e-5
# Of the filterbank energies of the data it was pretrained on, and what they are divided by there.
MEAN, SCALE = -4.2677393, 2 * 4.5689974
# Parts of the official state dict that serve pretraining or classification only.
UNUSED_KEYS = re.compile(r"v\.head\.\w+|mask_embed|p_input_[ft]dim|[cg]predlayer\.\d+\.\w+")


class Layer(nn.Module):
    """A norm and a bidirectional mixer; the residual sum is the encoder's."""

    def __init__(self, norm: nn.Module, mixer: BiMamba) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(self, residual: Tensor) -> Tensor:
        return self.mixer(self.norm(residual))


class SSAMBA(Encoder):
    r"""The SSAMBA encoder. The state dict has the official keys, without those of pretraining and the head.

    The filterbank map (100 frames per second, 128 bands) is normalised with the constants of pretraining and padded
    with zeros, that is their mean, to whole patches of 16 x 16. Patches are tokens in frequency-major order after a
    cls token, with learned positions; layers come in pairs, whose second one sees the sequence reversed::

        r_{i+1} = 2 r_i + layer_{2i}(r_i) + flip(layer_{2i+1}(flip(r_i))),   out = norm(norm(r_{depth/2}))

    The cls token is dropped, and the tokens of a time step are averaged over its frequencies, so that the mean over
    frames is the mean over all tokens, the release's ``ft_avgtok``. A hidden state is what a pair of layers leaves:
    ``n_layers`` is half the depth.

    The position table covers 1024 frames (10.24 s). For shorter clips its centre in time is taken, for longer ones it
    is interpolated bilinearly. The release pads clips to the length it was pretrained on; here a clip has the length
    it has.

    Args:
        width: embedding width D (192, 384, 768 for the published tiny, small, base).
        depth: number of layers, even.
        d_state, d_conv, expand, dt_rank: of the Mamba mixers.
        grid: (frequency, time) patches of the position table.
        stride: between patches; 16 in pretraining, 10 in the release's fine-tuning.
        rms_norm: RMSNorm instead of LayerNorm.
        name: what reports call it.
        device: of the parameters.
    """

    sample_rate = 16_000
    normalisation = f"Kaldi filterbank map x, as (x - {MEAN}) / {SCALE}"
    patch = 16

    def __init__(
        self,
        width: int = 768,
        depth: int = 24,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        grid: tuple[int, int] = (8, 64),
        stride: int = 16,
        rms_norm: bool = False,
        name: str = "ssamba",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if depth < 2 or depth % 2:
            raise ValueError(f"SSAMBA: `depth` must be even, layers come in pairs; got {depth}.")
        if not 1 <= stride <= self.patch:
            raise ValueError(f"SSAMBA: `stride` must be from 1 to {self.patch}; got {stride}.")
        self.name, self.grid, self.stride, self.rms_norm = name, tuple(grid), stride, rms_norm
        self.embedding_dim, self.n_layers = width, depth // 2
        self.front_end = KaldiFbank(self.sample_rate, n_mels=self.patch * grid[0])
        self.min_samples = self.front_end.length
        self.frame_rate = self.sample_rate / (self.front_end.hop * stride)

        def norm() -> nn.Module:
            return (nn.RMSNorm if rms_norm else nn.LayerNorm)(width, eps=NORM_EPS, device=device)

        mamba = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank, "device": device}
        self.v = nn.Module()  # the official name of Vision Mamba's part
        self.v.patch_embed = nn.Module()
        self.v.patch_embed.proj = nn.Conv2d(1, width, self.patch, stride=stride, device=device)
        self.v.cls_token = nn.Parameter(torch.empty(1, 1, width, device=device).normal_(std=0.02))
        self.v.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], width, device=device).normal_(std=0.02))
        self.v.layers = nn.ModuleList(Layer(norm(), BiMamba(width, **mamba)) for _ in range(depth))
        self.v.norm_f = norm()

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], *, stride: int = 16, name: str = "ssamba") -> SSAMBA:
        """Build the encoder whose sizes and weights (copied, as fp32) are those of an official state dict.

        Widths, depth, state size and the kind of norm (LayerNorm has a bias, RMSNorm has none) come from the tensors;
        a prefix ``module.`` and the keys of pretraining are dropped. The encoder is frozen.

        Raises:
            ValueError: keys are missing, unknown, or of shapes that do not fit together; all are listed.
        """
        weights = {key.removeprefix("module."): value for key, value in state_dict.items()}
        weights = {key: value for key, value in weights.items() if not UNUSED_KEYS.fullmatch(key)}
        sizes = _infer_sizes(weights)
        model = cls(**sizes, stride=stride, name=name, device="meta")
        if problems := mismatches(weights, model.state_dict()):
            described = ", ".join(f"{key} {value}" for key, value in sizes.items())
            raise _not_ssamba(f"for the sizes found ({described}): {first(problems)}")
        model.load_state_dict(
            {key: value.detach().to(torch.float32, copy=True) for key, value in weights.items()}, assign=True
        )
        return model.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> SSAMBA:
        """Load an official ``.pth`` (only its tensors are read, nothing in it is executed) or a ``.safetensors``.

        Args:
            options: of :meth:`from_state_dict`.

        Raises:
            ValueError: no such file, truncated or no checkpoint at all, or not an SSAMBA state dict.
        """
        path = Path(path)
        weights = read_state_dict(path, "ssamba")
        try:
            return cls.from_state_dict(weights, **{"name": f"ssamba:{path.stem}", **options})
        except ValueError as error:
            raise ValueError(f"ssamba: {path} does not fit: {error}") from error

    def configuration(self) -> dict[str, Any]:
        return {"stride": self.stride, "rms_norm": self.rms_norm, "grid": self.grid}

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table (1, 1 + F_p T_p, width) for a grid of (F_p, T_p) patches, the cls token's first."""
        table = self.v.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        time, wanted = self.grid[1], grid[1]
        if wanted < time:
            start = time // 2 - wanted // 2
            table = table[..., start : start + wanted]
        if table.shape[2:] != grid:
            table = F.interpolate(table, size=grid, mode="bilinear")
        return torch.cat([self.v.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, fbank: Tensor) -> Tensor:
        """Encode normalised maps (B, frames, bands) of 16 frames or more into frames (B, T_p, width)."""
        (frames,) = deque(self._layers(fbank), maxlen=1)
        return frames

    def _layers(self, fbank: Tensor) -> Iterator[Tensor]:
        """The frames before each pair of layers, then those after the last one, normalised."""
        patches = self.v.patch_embed.proj(fbank.transpose(1, 2)[:, None])
        grid = tuple(patches.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2)
        residual = torch.cat([self.v.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions(grid)

        def frames(tokens: Tensor) -> Tensor:
            return tokens[:, 1:].unflatten(1, grid).mean(1)

        for forward, backward in zip(self.v.layers[::2], self.v.layers[1::2], strict=True):
            yield frames(residual)
            residual = 2 * residual + (forward(residual) + backward(residual.flip(1)).flip(1))
        yield frames(self.v.norm_f(self.v.norm_f(residual)))

    def _states(self, waveforms: Tensor, every: bool) -> list[Tensor]:
        """One row per time patch: (B, frames, width); the map is padded with zeros to whole patches."""
        fbank = (self.front_end(waveforms) - MEAN) / SCALE
        beyond = max(fbank.shape[1] - self.patch, 0)
        whole = self.patch + -(-beyond // self.stride) * self.stride
        fbank = F.pad(fbank, (0, 0, 0, whole - fbank.shape[1]))
        return list(self._layers(fbank)) if every else [self(fbank)]


def _infer_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments read off the tensors' shapes."""
    mixer = "v.layers.0.mixer."
    ranks = {"v.pos_embed": 3, "v.patch_embed.proj.weight": 4}
    ranks |= {mixer + "A_log": 2, mixer + "conv1d.weight": 3, mixer + "dt_proj.weight": 2}
    problems = [f"missing {key}" for key in ranks if key not in weights]
    problems += [f"{key} is no tensor" for key, value in weights.items() if not isinstance(value, Tensor)]
    if problems:
        raise _not_ssamba("the sizes can't be inferred: " + first(problems))
    shapes = {key: tuple(weights[key].shape) for key in ranks}
    if bent := [key for key, rank in ranks.items() if len(shapes[key]) != rank or 0 in shapes[key]]:
        wanted = [f"{key} of shape {shapes[key]}, wanted {ranks[key]} dimensions, none 0" for key in bent]
        raise _not_ssamba("the sizes can't be inferred: " + first(wanted))
    width = shapes["v.patch_embed.proj.weight"][0]
    inner, state = shapes[mixer + "A_log"]
    tokens, bands = shapes["v.pos_embed"][1] - 1, 8  # 128 mel bands
    if inner % width or tokens < bands or tokens % bands:
        raise _not_ssamba(f"an inner width of {inner} for {width}, or {tokens} positions, is none of SSAMBA's")
    return {
        "width": width,
        "depth": len({match[1] for key in weights if (match := re.match(r"v\.layers\.(\d+)\.", key))}),
        "d_state": state,
        "d_conv": shapes[mixer + "conv1d.weight"][2],
        "expand": inner // width,
        "dt_rank": shapes[mixer + "dt_proj.weight"][1],
        "grid": (bands, tokens // bands),
        "rms_norm": not any(re.fullmatch(r"v\.(layers\.\d+\.norm|norm_f)\.bias", key) for key in weights),
    }


def _not_ssamba(why: str) -> ValueError:
    return ValueError(
        f"SSAMBA.from_state_dict: `state_dict` must hold the official SSAMBA keys and shapes; {why}. "
        "Pass the dictionary of tensors itself; SSAM's checkpoints are another encoder's (ssam:FILE)."
    )
