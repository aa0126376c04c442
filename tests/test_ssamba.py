"""SSAMBA against a plain implementation in loops, and its front end against transformers' Kaldi filterbank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from parrot.encoders import SSAMBA
from parrot.encoders.fbank import KaldiFbank, kaldi_filterbank


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return (got.double() - want.double()).abs().max().item()


def random_weights(width: int = 16, depth: int = 4, bias: bool = True, tokens: int = 512) -> dict[str, torch.Tensor]:
    """A state dict in the official layout, written from its description; no default hides a mistake."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, std: float = 0.3, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(*shape, generator=generator)

    inner, rank, state = 2 * width, math.ceil(width / 16), 16
    weights = {
        "v.cls_token": normal(1, 1, width),
        "v.pos_embed": normal(1, 1 + tokens, width),
        "v.patch_embed.proj.weight": normal(width, 1, 16, 16, std=1 / 16),
        "v.patch_embed.proj.bias": normal(width),
        "v.head.weight": normal(1000, width),
        "v.head.bias": normal(1000),
        "mask_embed": normal(1, 1, width),
        "p_input_fdim": torch.tensor(128),
        "p_input_tdim": torch.tensor(1024),
        "cpredlayer.0.weight": normal(width, width),
        "gpredlayer.2.bias": normal(256),
    }
    for name in ("v.norm_f", *(f"v.layers.{i}.norm" for i in range(depth))):
        weights[f"{name}.weight"] = normal(width, mean=1.0)
        if bias:
            weights[f"{name}.bias"] = normal(width)
    for i in range(depth):
        mixer = f"v.layers.{i}.mixer"
        weights[f"{mixer}.in_proj.weight"] = normal(2 * inner, width)
        weights[f"{mixer}.out_proj.weight"] = normal(width, inner)
        for suffix in ("", "_b"):
            weights[f"{mixer}.A{suffix}_log"] = normal(inner, state, std=0.5)
            weights[f"{mixer}.D{suffix}"] = normal(inner)
            weights[f"{mixer}.conv1d{suffix}.weight"] = normal(inner, 1, 4)
            weights[f"{mixer}.conv1d{suffix}.bias"] = normal(inner)
            weights[f"{mixer}.x_proj{suffix}.weight"] = normal(rank + 2 * state, inner, std=0.2)
            weights[f"{mixer}.dt_proj{suffix}.weight"] = normal(inner, rank)
            weights[f"{mixer}.dt_proj{suffix}.bias"] = normal(inner, mean=-2.0)
    return {f"module.{key}": value for key, value in weights.items()}


# --- A plain implementation: loops over time and channels' sums, in double precision


def plain_norm(x: torch.Tensor, weights: dict, name: str) -> torch.Tensor:
    bias = weights.get(f"{name}.bias")
    if bias is None:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"] + bias


def plain_direction(x: torch.Tensor, z: torch.Tensor, w: dict, mixer: str, suffix: str) -> torch.Tensor:
    """Convolution, scan and gate over (L, inner), forward in time."""
    taps, shift = w[f"{mixer}.conv1d{suffix}.weight"][:, 0], w[f"{mixer}.conv1d{suffix}.bias"]
    rank, state = w[f"{mixer}.dt_proj{suffix}.weight"].shape[1], w[f"{mixer}.A{suffix}_log"].shape[1]
    A, h, outputs = -w[f"{mixer}.A{suffix}_log"].exp(), x.new_zeros(x.shape[1], state), []
    for t in range(len(x)):
        u = shift.clone()
        for j in range(4):
            if t - 3 + j >= 0:
                u += taps[:, j] * x[t - 3 + j]
        u = u * u.sigmoid()
        projected = w[f"{mixer}.x_proj{suffix}.weight"] @ u
        d, B, C = projected[:rank], projected[rank : rank + state], projected[rank + state :]
        pre = w[f"{mixer}.dt_proj{suffix}.weight"] @ d + w[f"{mixer}.dt_proj{suffix}.bias"]
        delta = torch.log1p(pre.exp())
        h = (delta[:, None] * A).exp() * h + (delta * u)[:, None] * B
        y = h @ C + w[f"{mixer}.D{suffix}"] * u
        outputs.append(y * z[t] * z[t].sigmoid())
    return torch.stack(outputs)


def plain_mixer(u: torch.Tensor, w: dict, mixer: str) -> torch.Tensor:
    x, z = (u @ w[f"{mixer}.in_proj.weight"].T).chunk(2, dim=1)
    forward = plain_direction(x, z, w, mixer, "")
    backward = plain_direction(x.flip(0), z.flip(0), w, mixer, "_b").flip(0)
    return (forward + backward) / 2 @ w[f"{mixer}.out_proj.weight"].T


def plain_positions(table: torch.Tensor, time: int) -> torch.Tensor:
    """Centre cut, or linear interpolation with half-pixel centres, of the (8, 64) table along time."""
    grid = table[0, 1:].unflatten(0, (8, 64))
    if time < 64:
        columns = [grid[:, 32 - time // 2 + t] for t in range(time)]
    else:
        columns = []
        for t in range(time):
            place = min(max((t + 0.5) * 64 / time - 0.5, 0.0), 63.0)
            low = min(int(place), 62)
            columns.append(grid[:, low] + (place - low) * (grid[:, low + 1] - grid[:, low]))
    return torch.stack(columns, dim=1)


def plain_tokens(fbank: torch.Tensor, weights: dict) -> torch.Tensor:
    """The normalised tokens (8, T_p, D) of one normalised map of whole patches, as the release computes them."""
    w = {key.removeprefix("module."): value.double() for key, value in weights.items()}
    time, depth = len(fbank) // 16, sum(key.endswith("mixer.in_proj.weight") for key in w)
    kernel = w["v.patch_embed.proj.weight"][:, 0]  # (D, frequency, time)
    positions = plain_positions(w["v.pos_embed"], time)
    sequence = [w["v.cls_token"][0, 0] + w["v.pos_embed"][0, 0]]
    for f in range(8):
        for t in range(time):
            patch = fbank[16 * t : 16 * t + 16, 16 * f : 16 * f + 16].T.double()
            sequence.append((kernel * patch).sum((1, 2)) + w["v.patch_embed.proj.bias"] + positions[f, t])
    hidden, residual = torch.stack(sequence), None

    def layer(i: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else residual + hidden
        return plain_mixer(plain_norm(residual, w, f"v.layers.{i}.norm"), w, f"v.layers.{i}.mixer"), residual

    for i in range(0, depth, 2):
        hidden_f, residual_f = layer(i, hidden, residual)
        hidden_b, residual_b = layer(i + 1, hidden.flip(0), None if residual is None else residual.flip(0))
        hidden, residual = hidden_f + hidden_b.flip(0), residual_f + residual_b.flip(0)
    out = plain_norm(plain_norm(residual + hidden, w, "v.norm_f"), w, "v.norm_f")
    return out[1:].unflatten(0, (8, time))


@pytest.mark.parametrize("bias", [True, False], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("frames", [16, 80, 176])
def test_ssamba_is_the_plain_implementation(frames, bias):
    weights = random_weights(bias=bias)
    encoder = SSAMBA.from_state_dict(weights)
    assert encoder.rms_norm is not bias
    fbank = 5 * noise(2, frames, 128)
    for got, one in zip(encoder(fbank), fbank, strict=True):
        assert worst(got, plain_tokens(one, weights).mean(0)) <= 1e-4
    assert worst(encoder.double()(fbank.double())[0], plain_tokens(fbank[0], weights).mean(0)) <= 1e-10


def test_embedding_is_the_mean_over_tokens():
    weights = random_weights(width=24, depth=2)
    encoder = SSAMBA.from_state_dict(weights)
    waveform = noise(9_000)  # 54 frames: padded to 64
    fbank = (KaldiFbank()(waveform) + 4.2677393) / (2 * 4.5689974)
    assert fbank.shape == (54, 128)
    want = plain_tokens(torch.cat([fbank, torch.zeros(10, 128)]), weights)
    assert worst(encoder.embed(waveform), want.mean((0, 1))) <= 1e-4
    assert worst(encoder.timestamp_embeddings(waveform[None])[0], want.mean(0)) <= 1e-4
    assert encoder.frame_rate == 6.25
    assert encoder.hidden_states(waveform)[-1].shape == (4, 24)
    assert len(encoder.hidden_states(waveform)) == encoder.n_layers + 1 == 2


@pytest.mark.parametrize("time", [1, 5, 63, 64, 65, 130])
def test_positions_of_other_lengths(time):
    encoder = SSAMBA.from_state_dict(random_weights())
    table = encoder.positions((8, time))
    assert worst(table[0, 1:].unflatten(0, (8, time)), plain_positions(encoder.v.pos_embed, time)) <= 1e-5
    assert torch.equal(table[:, 0], encoder.v.pos_embed[:, 0])
    assert time != 64 or torch.equal(table, encoder.v.pos_embed)


def test_overlapping_patches():
    encoder = SSAMBA.from_state_dict(random_weights(), stride=10)
    assert encoder.frame_rate == 10
    seen = []
    positions = encoder.positions
    encoder.positions = lambda grid: seen.append(grid) or positions(grid)
    encoder(noise(1, 1024, 128))
    assert seen == [(12, 101)]
    assert encoder.timestamp_embeddings(noise(1, 9_000)).shape == (1, 5, 16)  # 54 frames: padded to 56


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (2_800, 1), (2_960, 2), (3_185, 2), (170_000, 67)])
def test_frames_of_a_clip(samples, frames):
    encoder = SSAMBA.from_state_dict(random_weights(depth=2))
    assert encoder.timestamp_embeddings(noise(2, samples)).shape == (2, frames, 16)


def test_batches_with_lengths():
    encoder = SSAMBA.from_state_dict(random_weights(depth=2))
    batch, lengths = noise(3, 20_000), [20_000, 7_000, 12_345]
    for row, length in zip(batch, lengths, strict=True):
        row[length:] = math.nan
    frames, counts = encoder.frames(batch, lengths)
    assert counts.tolist() == [8, 3, 5]
    for clip, length, row, count in zip(batch, lengths, frames, counts, strict=True):
        assert worst(row[:count], encoder.timestamp_embeddings(clip[:length])) <= 1e-5
        assert (row[count:] == 0).all()


@pytest.mark.parametrize(("width", "total"), [(192, 7_288_298), (384, 26_224_106), (768, 99_042_794)])
def test_published_sizes(width, total):
    encoder = SSAMBA(width, device="meta")
    head = 1000 * (width + 1)
    pretraining = width + 2 + 2 * (width * width + width) + 2 * (256 * width + 256)
    assert sum(weight.numel() for weight in encoder.state_dict().values()) + head + pretraining == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {}, "missing v.pos_embed"),
        (lambda w: {**w, "module.v.norm_f.bias": torch.zeros(3)}, r"norm_f\.bias of shape \(3,\), wanted \(16,\)"),
        (
            lambda w: {**w, "module.v.norm_f.bias": torch.zeros(16, dtype=torch.int8)},
            r"bias of torch\.int8, wanted real",
        ),
        (lambda w: {**w, "module.extra": torch.zeros(3)}, r"width 16, depth 4.*unexpected extra"),
        (lambda w: {k: v for k, v in w.items() if "layers.3" not in k}, "`depth` must be even"),
        (lambda w: {k: v for k, v in w.items() if k != "module.v.layers.2.norm.bias"}, r"missing v\.layers\.2\.norm"),
        (lambda w: {**w, "module.v.pos_embed": torch.zeros(1, 500, 16)}, "499 positions"),
    ],
)
def test_it_says_what_a_state_dict_lacks(change, message):
    with pytest.raises(ValueError, match=message):
        SSAMBA.from_state_dict(change(random_weights()))


# --- Front end


def test_fbank_is_kaldis():
    """transformers computes it in NumPy, and tests that against Kaldi's own."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(257, 128, 20.0, 8000.0, 16_000, None, "kaldi", triangularize_in_mel_space=True)
    assert worst(kaldi_filterbank(128, 512, 16_000), torch.from_numpy(filters)) <= 1e-6
    waveform = noise(20_000) + 0.2
    want = spectrogram(
        (waveform - waveform.mean()).numpy().astype(np.float64),
        window_function(400, "hann", periodic=False),
        400,
        160,
        512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=filters,
        mel_floor=1.192092955078125e-07,
        log_mel="log",
    )
    fbank = KaldiFbank()
    # transformers rounds the spectrum to single precision, which the logarithm shows in the weakest bands.
    for got in (fbank(waveform), fbank.double()(waveform.double())):
        assert worst(got, torch.from_numpy(want.T)) <= 1e-3
        assert (got - torch.from_numpy(want.T)).abs().mean() <= 2e-6
    assert F.mse_loss(KaldiFbank()(torch.full((1, 400), 0.5)), torch.full((1, 1, 128), math.log(2**-23))) < 1e-6
