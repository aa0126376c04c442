"""SSAM (Audio-Mamba): a self-supervised encoder of log-mel patches with uni-directional Mamba blocks.

Yadav & Tan 2024, arXiv 2406.02178. Layers, key names and embedding follow the official release, so that its
checkpoints load unmodified and give the published embeddings.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parrot_kernels.modules import Mamba

from .base import Encoder
from .checkpoint import first, mismatches, read_state_dict
from .log_mel import LogMel

LAYOUTS = ("published", "corrected")
NORM_EPS = 1e-6
# Parts of the official state dict that serve pretraining only.
PRETRAINING_KEYS = re.compile(r"mask_token|pred\.\d+\.(weight|bias)")


def sincos_position_embedding(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D position table (1, 1 + T F, width) of a (T, F) grid, frequency fastest, first row (cls) zero.

    The first half of the channels encodes the frequency index p, the second the time index, each as
    [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (width / 4)).
    """
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    time, frequency = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = [torch.outer(p.reshape(-1), omega) for p in (frequency, time)]
    table = torch.cat([part for angle in halves for part in (angle.sin(), angle.cos())], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float()[None]


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a (time, mel) map, each projected to a token; time-major, frequency fastest."""

    def __init__(self, width: int, patch_size: tuple[int, int], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch_size, stride=patch_size, device=device)

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.proj(log_mel[:, None]).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """LayerNorm and a Mamba mixer; the residual sum is the encoder's."""

    def __init__(self, width: int, device: torch.device | str | None = None, **mamba: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, device=device)
        self.mixer = Mamba(width, device=device, **mamba)

    def forward(self, residual: Tensor) -> Tensor:
        return self.mixer(self.norm(residual))


class SSAM(Encoder):
    r"""The SSAM encoder. The state dict has the official keys, without those of pretraining.

    A normalised log-mel map of T frames (100 per second) is padded with zeros to whole chunks of ``input_size[0]``
    frames, always by at least one frame; each chunk is encoded by itself, as patch tokens with a fixed position
    table after a cls token::

        r_0 = tokens,   h_i = Mamba_i(LN_i(r_i)),   r_{i+1} = r_i + h_i,   out = LN(r_depth) without the cls token

    A grid of (T_p, F_p) tokens of width D becomes T_p rows of width F_p D per chunk; the rows of all chunks are
    joined and the floor(T_p pad / input_size[0]) last ones dropped. The scene embedding is the mean of the rest.

    In half precision run it under ``torch.autocast``: weights, residual sums and the front end then stay in fp32.

    Args:
        width: embedding width D (192, 384, 768 for the published tiny, small, base); a multiple of 4.
        depth: number of blocks.
        d_state, d_conv, expand, dt_rank: of the Mamba mixers.
        patch_size: (time, mel) of a patch.
        input_size: (frames, mel bands) of a chunk, multiples of the patch.
        layout: how tokens become rows. "published": the official release reads the time-major tokens as
            frequency-major, so column block k of row j is token k T_p + j: the blocks are the F_p temporal
            sections of a chunk, and dropping the last rows does not drop the padded frames. Published embeddings
            have it, so it is the default. "corrected": row j holds the F_p tokens of time patch j, and exactly
            the padded patches are dropped. Same width, different vectors; what compares rows in time wants this one.
        name: what reports call it.
        device: of the parameters.
    """

    sample_rate = 16_000
    normalisation = "log-mel map of zero mean and unit deviation per clip"

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        *,
        d_state: int = 24,
        d_conv: int = 4,
        expand: float = 3,
        dt_rank: int | str = "auto",
        patch_size: tuple[int, int] = (4, 16),
        input_size: tuple[int, int] = (200, 80),
        layout: str = "published",
        name: str = "ssam",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"SSAM: `layout` must be one of {LAYOUTS}; got {layout!r}.")
        if width % 4:
            raise ValueError(f"SSAM: `width` must be a multiple of 4 (2-D sine and cosine positions); got {width}.")
        if any(size % patch for size, patch in zip(input_size, patch_size, strict=True)):
            raise ValueError(f"SSAM: `input_size` must be a multiple of `patch_size`; got {input_size}, {patch_size}.")
        self.name, self.layout, self.input_size = name, layout, tuple(input_size)
        self.grid = (input_size[0] // patch_size[0], input_size[1] // patch_size[1])
        self.embedding_dim = self.grid[1] * width
        self.n_layers = depth

        self.log_mel_front_end = LogMel(self.sample_rate, n_mels=input_size[1])
        self.min_samples = self.log_mel_front_end.min_samples
        self.frame_rate = self.sample_rate / (self.log_mel_front_end.hop * patch_size[0])
        self.patch_embed = PatchEmbed(width, patch_size, device)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width, device=device).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos_position_embedding(width, self.grid).to(device or "cpu"))
        mamba = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.blocks = nn.ModuleList(Block(width, device, **mamba) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS, device=device)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], *, layout: str = "published", n_mels: int = 80, name: str = "ssam"
    ) -> SSAM:
        """Build the encoder whose sizes and weights (copied, as fp32) are those of an official state dict.

        Widths, depth, state size, expansion, rank, convolution and patch come from the shapes of the tensors; the
        chunk's length from the position table, given the number of mel bands. Keys of pretraining (``mask_token``,
        ``pred.*``) are dropped. The encoder is frozen.

        Raises:
            ValueError: keys are missing, unknown, or of shapes that do not fit together; all are listed.
        """
        weights = {key: value for key, value in state_dict.items() if not PRETRAINING_KEYS.fullmatch(key)}
        if strange := [f"{key} is no tensor" for key, value in weights.items() if not isinstance(value, Tensor)]:
            raise _not_ssam(first(strange))
        sizes = _infer_sizes(weights, n_mels)
        model = cls(**sizes, layout=layout, name=name, device="meta")
        problems = mismatches(weights, model.state_dict())
        if problems:
            raise _not_ssam(f"for the sizes found ({_described(sizes)}): " + first(problems))
        model.load_state_dict(
            {key: value.detach().to(torch.float32, copy=True) for key, value in weights.items()}, assign=True
        )
        return model.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> SSAM:
        """Load an official ``.pth`` (only its tensors are read, nothing in it is executed) or a ``.safetensors``.

        Args:
            options: of :meth:`from_state_dict`.

        Raises:
            ValueError: no such file, truncated or no checkpoint at all, or not an SSAM state dict.
        """
        path = Path(path)
        weights = read_state_dict(path, "ssam")
        try:
            return cls.from_state_dict(weights, **{"name": f"ssam:{path.stem}", **options})
        except ValueError as error:
            raise ValueError(f"ssam: {path} does not fit: {error}") from error

    def configuration(self) -> dict[str, Any]:
        return {"layout": self.layout, "input_size": self.input_size, "patch_size": self.patch_embed.proj.kernel_size}

    def log_mel(self, waveforms: Tensor) -> Tensor:
        """Normalised log-mel map (..., frames, mel bands) of (..., samples); checks as :meth:`embed`."""
        return self.log_mel_front_end(self._checked(waveforms))

    def forward(self, log_mel: Tensor) -> Tensor:
        """Encode chunks (B, *input_size) into patch tokens (B, T_p F_p, width), time-major."""
        if tuple(log_mel.shape[1:]) != self.input_size:
            wanted = ", ".join(map(str, self.input_size))
            raise ValueError(f"SSAM: `log_mel` must be (B, {wanted}); got {tuple(log_mel.shape)}.")
        (tokens,) = deque(self._layers(log_mel), maxlen=1)
        return tokens

    def _layers(self, log_mel: Tensor) -> Iterator[Tensor]:
        """The patch tokens before each block (the residual sums), then those after the last one, normalised."""
        tokens = self.patch_embed(log_mel) + self.pos_embed[:, 1:]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        residual = torch.cat([cls_token, tokens], dim=1)
        for block in self.blocks:
            yield residual[:, 1:]
            residual = residual + block(residual)
        yield self.encoder_norm(residual)[:, 1:]

    def _states(self, waveforms: Tensor, every: bool) -> list[Tensor]:
        """One row per time patch (0.04 s): (B, ceil(frames / patch), embedding_dim), see the class for the layout.

        All chunks of all waveforms are encoded as one batch; nothing is carried from one to the next.
        """
        log_mel = self.log_mel_front_end(waveforms)
        frames = log_mel.shape[1]
        (chunk, _), (steps, bands) = self.input_size, self.grid
        pad = chunk - frames % chunk  # a whole chunk when frames is a multiple: as in the official release
        chunks = F.pad(log_mel, (0, 0, 0, pad)).unflatten(1, (-1, chunk))
        chunks = chunks.flatten(0, 1)
        layers = self._layers(chunks) if every else [self(chunks)]

        def rows(tokens: Tensor) -> Tensor:
            if self.layout == "published":
                rows = tokens.unflatten(1, (bands, steps)).transpose(1, 2).flatten(2)
            else:
                rows = tokens.unflatten(1, (steps, bands)).flatten(2)
            rows = rows.reshape(len(waveforms), -1, self.embedding_dim)
            return rows[:, : rows.shape[1] - steps * pad // chunk]

        return [rows(tokens) for tokens in layers]

    def scene_embedding(self, waveforms: Tensor) -> Tensor:
        """The published utterance embedding: :meth:`embed` under the name it has in the HEAR interface."""
        return self.embed(waveforms)


def _infer_sizes(weights: Mapping[str, Tensor], n_mels: int) -> dict[str, Any]:
    """Constructor arguments read off the tensors' shapes."""
    mixer = "blocks.0.mixer."
    ranks = {
        "pos_embed": 3,
        "patch_embed.proj.weight": 4,
        mixer + "A_log": 2,
        mixer + "conv1d.weight": 3,
        mixer + "dt_proj.weight": 2,
    }
    if absent := [key for key in ranks if key not in weights]:
        raise _not_ssam("the sizes can't be inferred: " + first([f"missing {key}" for key in absent]))
    shapes = {key: tuple(weights[key].shape) for key in ranks}
    bent = [key for key, rank in ranks.items() if len(shapes[key]) != rank or 0 in shapes[key]]
    if bent:
        wanted = [f"{key} of shape {shapes[key]}, wanted {ranks[key]} dimensions, none 0" for key in bent]
        raise _not_ssam("the sizes can't be inferred: " + first(wanted))

    width, _, *patch = shapes["patch_embed.proj.weight"]
    tokens = shapes["pos_embed"][1] - 1
    bands = n_mels // patch[1]
    if n_mels % patch[1] or tokens < 1 or tokens % bands:
        raise _not_ssam(
            f"pos_embed of {tokens} patches and a cls token does not cover {n_mels} mel bands with patches of "
            f"{patch[0]} frames x {patch[1]} bands (pass another `n_mels` for another front end)"
        )
    inner, state = shapes[mixer + "A_log"]
    expand = Fraction(inner, width)
    depth = len({match[1] for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))})
    return {
        "width": width,
        "depth": depth,
        "d_state": state,
        "d_conv": shapes[mixer + "conv1d.weight"][2],
        "expand": expand.numerator if expand.denominator == 1 else expand,
        "dt_rank": shapes[mixer + "dt_proj.weight"][1],
        "patch_size": tuple(patch),
        "input_size": (tokens // bands * patch[0], n_mels),
    }


def _described(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def _not_ssam(why: str) -> ValueError:
    return ValueError(
        f"SSAM.from_state_dict: `state_dict` must hold the official SSAM keys and shapes; {why}. "
        "Pass the dictionary of tensors itself (the official files keep it under 'model')."
    )
