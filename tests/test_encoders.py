"""The encoders: SSAM against what the official code computes, and what all encoders share."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parrot import encoders
from parrot.encoders import SSAM
from parrot.encoders.log_mel import LogMel, mel_filterbank
from parrot.encoders.ssam import sincos_position_embedding

CLIPS = ("short", "exact", "long")  # 0.73 s, 1.99 s (a whole chunk) and 3.41 s


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """What the official code computes in fp32 for a small random encoder; see the keys."""
    return load_file(Path(__file__).parent / "data" / "ssam_golden.safetensors")


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, torch.Tensor]:
    return {key.removeprefix("model."): value for key, value in golden.items() if key.startswith("model.")}


@pytest.fixture(scope="module")
def ssam(weights) -> SSAM:
    return SSAM.from_state_dict(weights)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return (got.double() - want.double()).abs().max().item()


# --- SSAM


@pytest.mark.parametrize("clip", CLIPS)
def test_ssam_is_the_official_encoder(ssam, golden, clip):
    waveform = golden[f"{clip}.waveform"]
    assert worst(ssam.scene_embedding(waveform[None])[0], golden[f"{clip}.scene_embedding"]) <= 1e-5
    assert worst(ssam.timestamp_embeddings(waveform[None])[0], golden[f"{clip}.timestamp_embeddings"]) <= 1e-5
    # In the valleys of a spectrum the FFT of one machine and another differ by 1e-5 of the logarithm's range of 5.
    assert worst(ssam.log_mel(waveform[None])[0], golden[f"{clip}.log_mel"]) <= 5e-5


def test_ssam_in_double_precision_agrees_with_the_official_one(weights, golden):
    ssam = SSAM.from_state_dict(weights).double()
    embedding = ssam.scene_embedding(golden["long.waveform"])
    assert embedding.dtype == torch.float64
    assert worst(embedding, golden["long.scene_embedding"]) <= 1e-5


def test_ssam_under_autocast(ssam, golden):
    with torch.autocast("cpu", torch.bfloat16):
        assert worst(ssam.embed(golden["long.waveform"]), golden["long.scene_embedding"]) <= 2e-2


def test_ssam_takes_one_waveform_or_a_batch(ssam, golden):
    waveform = golden["short.waveform"]
    batch = torch.stack([waveform, waveform.flip(0), 0.5 * waveform])
    assert ssam.embed(waveform).shape == (160,)
    together = ssam.embed(batch)
    for row, single in zip(together, batch, strict=True):
        assert worst(row, ssam.embed(single)) <= 1e-6


@pytest.mark.parametrize(
    ("samples", "frames", "chunks", "rows"),
    [
        (201, 2, 1, 1),
        (3_200, 21, 1, 6),
        (11_520, 73, 1, 19),
        (16_000, 101, 1, 26),
        (31_840, 200, 2, 50),
        (32_000, 201, 2, 51),
        (40_000, 251, 2, 63),
        (64_000, 401, 3, 101),
    ],
)
@pytest.mark.parametrize("layout", ["published", "corrected"])
def test_ssam_rows_of_a_clip(weights, samples, frames, chunks, rows, layout, monkeypatch):
    ssam = SSAM.from_state_dict(weights, layout=layout)
    seen = []
    forward = ssam.forward
    monkeypatch.setattr(ssam, "forward", lambda chunk: seen.append(chunk.shape) or forward(chunk))
    waveform = noise(1, samples)
    assert ssam.log_mel(waveform).shape == (1, frames, 80)
    assert ssam.timestamp_embeddings(waveform).shape == (1, rows, 160)
    assert seen == [(chunks, 200, 80)]  # all chunks in one batch


def test_ssam_layouts(weights):
    """Row j, column block k is token k T + j as published, and patch (time j, band k) once corrected."""
    waveform = noise(1, 40_000)
    published, corrected = (SSAM.from_state_dict(weights, layout=name) for name in ("published", "corrected"))
    log_mel = published.log_mel(waveform)[0]
    padded = torch.cat([log_mel, torch.zeros(400 - len(log_mel), 80)])
    tokens = [published(chunk[None])[0] for chunk in padded.split(200)]
    for name, ssam, at in (
        ("published", published, lambda j, k: k * 50 + j),
        ("corrected", corrected, lambda j, k: j * 5 + k),
    ):
        want = torch.stack([torch.cat([chunk[at(j, k)] for k in range(5)]) for chunk in tokens for j in range(50)])
        assert worst(ssam.timestamp_embeddings(waveform)[0], want[:63]) <= 1e-6, name


def test_ssam_infers_every_size():
    for sizes in (
        {"width": 24, "depth": 1, "d_state": 8, "d_conv": 3, "expand": 2, "dt_rank": 5},
        {"width": 32, "depth": 3, "patch_size": (8, 20), "input_size": (96, 80)},
        {"width": 28, "depth": 2, "expand": 1.75, "patch_size": (2, 80), "input_size": (50, 80)},
        {"width": 16, "depth": 11, "d_state": 1, "d_conv": 1, "input_size": (8, 80)},
    ):
        original = SSAM(**sizes)
        copy = SSAM.from_state_dict(original.state_dict())
        assert copy.input_size == original.input_size
        assert copy.configuration() == original.configuration()
        assert copy.embedding_dim == original.embedding_dim
        waveform = noise(2, 20_000)
        assert torch.equal(copy.embed(waveform), original.embed(waveform))
    original = SSAM(16, 1, input_size=(40, 64))
    assert SSAM.from_state_dict(original.state_dict(), n_mels=64).input_size == (40, 64)


@pytest.mark.parametrize(
    ("width", "parameters", "dim"), [(192, 4_759_104, 960), (384, 17_812_608, 1920), (768, 68_802_816, 3840)]
)
def test_ssam_published_sizes(width, parameters, dim):
    ssam = SSAM(width, device="meta")
    assert ssam.embedding_dim == dim
    assert sum(weight.numel() for weight in ssam.state_dict().values()) == parameters


def test_ssam_state_dict_is_the_official_one(ssam, weights):
    kept = {key for key in weights if key != "mask_token" and not key.startswith("pred.")}
    assert set(ssam.state_dict()) == kept
    assert worst(sincos_position_embedding(32, (50, 5)), weights["pos_embed"]) <= 1e-6
    assert not any(weight.requires_grad for weight in ssam.parameters())


def test_ssam_copies_the_weights(weights):
    mine = {key: value.clone() for key, value in weights.items()}
    ssam = SSAM.from_state_dict(mine)
    before = ssam.fingerprint
    for value in mine.values():
        value.zero_()
    assert ssam.fingerprint == before


def without(weights: dict, *keys: str) -> dict:
    return {key: value for key, value in weights.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {}, "missing pos_embed; missing patch_embed.proj.weight"),
        (lambda w: {"model": w, "epoch": 99}, "model is no tensor.*keep it under 'model'"),
        (lambda w: without(w, "blocks.1.norm.bias", "cls_token"), "missing cls_token; missing blocks.1.norm.bias"),
        (lambda w: {**w, "head.weight": w["cls_token"]}, r"width 32, depth 2.*unexpected head\.weight"),
        (lambda w: {**w, "blocks.3.norm.bias": w["encoder_norm.bias"]}, "missing blocks.2.norm.weight"),
        (lambda w: {**w, "cls_token": w["cls_token"][..., :8]}, r"cls_token of shape \(1, 1, 8\), wanted \(1, 1, 32\)"),
        (lambda w: {**w, "pos_embed": w["pos_embed"][:, :250]}, "249 patches and a cls token does not cover 80 mel"),
        (lambda w: {**w, "cls_token": w["cls_token"].long()}, r"cls_token of torch\.int64, wanted real floating point"),
        (lambda w: {**w, "blocks.0.mixer.A_log": torch.ones(96)}, r"A_log of shape \(96,\), wanted 2 dimensions"),
        (lambda w: {**w, "blocks.1.mixer.A_log": torch.ones(96, 16)}, r"A_log of shape \(96, 16\), wanted \(96, 24\)"),
    ],
)
def test_ssam_says_what_a_state_dict_lacks(weights, change, message):
    with pytest.raises(ValueError, match=message):
        SSAM.from_state_dict(change(weights))


def test_ssam_lists_a_few_of_many_problems(weights):
    with pytest.raises(ValueError, match="and 7 more") as caught:
        SSAM.from_state_dict({**weights, **{f"extra.{i}": torch.zeros(1) for i in range(15)}})
    assert str(caught.value).count("unexpected") == 8


def test_ssam_rejects_impossible_options():
    with pytest.raises(ValueError, match="`layout` must be one of"):
        SSAM(16, 1, layout="official")
    with pytest.raises(ValueError, match="`width` must be a multiple of 4"):
        SSAM(18, 1)
    with pytest.raises(ValueError, match="`input_size` must be a multiple of `patch_size`"):
        SSAM(16, 1, input_size=(201, 80))
    with pytest.raises(ValueError, match=r"`log_mel` must be \(B, 200, 80\); got \(1, 199, 80\)"):
        SSAM(16, 1)(torch.zeros(1, 199, 80))


def test_ssam_files(weights, ssam, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pth")
    torch.save({"model": weights, "epoch": 99, "optimizer": {"lr": 1e-3}}, tmp_path / "checkpoint-99.pth")
    for name in ("a.safetensors", "b.pth", "checkpoint-99.pth"):
        loaded = encoders.load(f"ssam:{tmp_path / name}")
        assert loaded.fingerprint == ssam.fingerprint
        assert loaded.name == f"ssam:{Path(name).stem}"
    assert SSAM.from_file(tmp_path / "b.pth", layout="corrected").fingerprint != ssam.fingerprint


# --- Front end


def test_mel_filterbank_is_that_of_its_formula():
    mel = [2595 * math.log10(1 + f / 700) for f in (50, 8000)]
    h = [700 * (10 ** ((mel[0] + i * (mel[1] - mel[0]) / 81) / 2595) - 1) for i in range(82)]
    want = torch.tensor(
        [
            [max(0.0, min((f - h[i]) / (h[i + 1] - h[i]), (h[i + 2] - f) / (h[i + 2] - h[i + 1]))) for i in range(80)]
            for f in torch.linspace(0, 8000, 201, dtype=torch.float64).tolist()
        ]
    )
    assert worst(mel_filterbank(80, 50.0, 8000.0, 201, 16_000), want) <= 2e-5


def test_log_mel_is_normalised_over_the_whole_clip():
    maps = LogMel()(noise(3, 12_345))
    assert maps.shape == (3, 1 + 12_345 // 160, 80)
    for log_mel in maps:
        assert abs(log_mel.mean().item()) < 1e-5
        assert abs(log_mel.std().item() - 1) < 1e-5


# --- What all share


def test_transformers_is_imported_only_for_its_models():
    code = "import sys, parrot.encoders as e; e.load('ssam-demo'); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("spec", ["ssam-demo", "hubert-demo"])
def test_demo_encoders_are_the_same_whatever_the_global_generators_hold(spec):
    torch.manual_seed(1)
    first = encoders.load(spec)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = encoders.load(spec)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint == second.fingerprint
    waveform = noise(1, 30_000)
    assert torch.equal(first.embed(waveform), second.embed(waveform))
    assert first.embed(waveform).shape == (1, first.embedding_dim)
    assert first.name == spec
    assert not first.training
    assert not any(weight.requires_grad for weight in first.parameters())


def test_demo_encoders_tell_voices_apart():
    """Random weights, but not blind: two pitches are further apart than two noisy takes of one pitch."""
    time = torch.arange(32_000) / 16_000

    def voice(pitch: float, take: int) -> torch.Tensor:
        harmonics = sum(torch.sin(2 * math.pi * pitch * h * time) / h for h in range(1, 20))
        return 0.1 * harmonics * (1 + 0.5 * torch.sin(2 * math.pi * 4 * time)) + 0.02 * noise(32_000, seed=take)

    for spec in ("ssam-demo", "hubert-demo"):
        encoder = encoders.load(spec)
        low, low_again, high = (encoder.embed(voice(*v)) for v in ((110.0, 1), (110.0, 2), (220.0, 1)))
        assert (low - high).norm() > 4 * (low - low_again).norm(), spec


def test_fingerprint_follows_weights_and_configuration(weights):
    prints = {
        SSAM.from_state_dict(weights).fingerprint,
        SSAM.from_state_dict(weights, layout="corrected").fingerprint,
        SSAM.from_state_dict({**weights, "cls_token": weights["cls_token"] + 1e-7}).fingerprint,
        SSAM.from_state_dict({**weights, "encoder_norm.bias": weights["encoder_norm.bias"].neg()}).fingerprint,
    }
    assert len(prints) == 4
    renamed = SSAM.from_state_dict(weights, name="another")
    assert renamed.fingerprint in prints
    assert all(len(p) == 64 and int(p, 16) >= 0 for p in prints)


@pytest.mark.parametrize("spec", ["ssam-demo", "hubert-demo"])
def test_bad_waveforms(spec):
    encoder = encoders.load(spec)
    good = noise(2, 4_000)
    for bad, kind, message in (
        (good.numpy(), TypeError, "floating-point torch.Tensor; got ndarray"),
        ((good * 1000).to(torch.int16), TypeError, "floating-point torch.Tensor; got torch.int16"),
        (good[:, None], ValueError, r"\(batch, samples\) or \(samples,\); got \(2, 1, 4000\)"),
        (good[:, : encoder.min_samples - 1], ValueError, f"at least {encoder.min_samples} samples"),
        (good[:, :0], ValueError, "got 0"),
        (good * torch.tensor([[1.0], [math.nan]]), ValueError, "finite; got NaN or infinity"),
        (good * torch.tensor([[1.0], [math.inf]]), ValueError, "finite; got NaN or infinity"),
        (good * torch.tensor([[1.0], [0.0]]), ValueError, "audible; got digital silence"),
    ):
        with pytest.raises(kind, match=message):
            encoder.embed(bad)
    assert encoder.embed(good[:, : encoder.min_samples]).isfinite().all()


def test_registry():
    specs = encoders.available()
    assert "ssam-demo" in specs
    assert "hubert-demo" in specs
    assert {"ssamba:FILE", "wavlm:FOLDER-OR-ID", "mms:FOLDER-OR-ID", "transformers:FOLDER-OR-ID"} <= set(specs)
    for spec in ("wavlm", "ssam:", "hubert:", "ssam-demo:x", ""):
        with pytest.raises(ValueError, match="`spec` must be one of ssam-demo, hubert-demo, ssam:FILE"):
            encoders.load(spec)


# --- Frames and layers


@pytest.mark.parametrize("spec", ["ssam-demo", "hubert-demo"])
def test_frames_of_clips_of_different_lengths(spec):
    encoder = encoders.load(spec)
    batch, lengths = noise(3, 30_000), torch.tensor([9_000, 30_000, 21_000])
    for row, length in zip(batch, lengths, strict=True):
        row[length:] = math.nan
    frames, counts = encoder.frames(batch, lengths)
    assert frames.shape == (3, int(counts.max()), encoder.embedding_dim)
    assert counts.dtype == torch.int64
    for clip, length, row, count in zip(batch, lengths, frames, counts, strict=True):
        assert worst(row[:count], encoder.timestamp_embeddings(clip[:length])) <= 1e-5
        assert (row[count:] == 0).all()
        assert abs(count - encoder.frame_rate * length / encoder.sample_rate) < 1.2
    pooled = encoder.embed(batch, lengths)
    for clip, length, row in zip(batch, lengths, pooled, strict=True):
        assert worst(row, encoder.embed(clip[:length])) <= 1e-5
    whole, counts = encoder.frames(batch[:, :9_000])
    assert torch.equal(whole, encoder.timestamp_embeddings(batch[:, :9_000]))
    assert counts.tolist() == [whole.shape[1]] * 3


def test_frames_refuse_what_are_no_lengths():
    encoder, batch = encoders.load("ssam-demo"), noise(2, 4_000)
    for lengths in ([4_000], [4_000, 4_001], [-1, 4_000], [4_000.0, 1_000.0]):
        with pytest.raises(ValueError, match="`lengths` must be 2 integers from 0 to 4000"):
            encoder.frames(batch, lengths)
    with pytest.raises(ValueError, match="at least 201 samples"):
        encoder.frames(batch, [4_000, 0])
    with pytest.raises(ValueError, match=r"`waveforms` must be a tensor \(batch, samples\)"):
        encoder.frames(batch[0])


@pytest.mark.parametrize("spec", ["ssam-demo", "hubert-demo"])
def test_layers(spec):
    encoder, waveform = encoders.load(spec), noise(2, 20_000)
    states = encoder.hidden_states(waveform)
    assert len(states) == encoder.n_layers + 1 == 3
    assert torch.equal(states[-1], encoder.timestamp_embeddings(waveform))
    prints = {encoder.fingerprint}
    for layer, want in ((0, states[0]), (1, states[1]), (2, states[2]), (-2, states[1]), ("mean", sum(states) / 3)):
        chosen = encoders.load(spec, layer=layer)
        assert worst(chosen.embed(waveform), want.mean(1)) <= 1e-5 * want.abs().max().item()
        assert torch.equal(encoders.load(f"{spec}#{layer}").embed(waveform), chosen.embed(waveform))
        prints.add(chosen.fingerprint)
    assert len(prints) == 5  # -2 is 1
    for layer in (3, -4, "first", 1.0, True):
        with pytest.raises(ValueError, match="`layer` must be one of last, mean, weighted, or an int from -3 to 2"):
            encoder.use_layer(layer)
    with pytest.raises(ValueError, match="given twice"):
        encoders.load(f"{spec}#1", layer=2)


@pytest.mark.parametrize("spec", ["ssam-demo", "hubert-demo"])
def test_learned_layer_weights(spec):
    encoder, waveform = encoders.load(spec, layer="weighted"), noise(1, 8_000)
    assert [name for name, weight in encoder.named_parameters() if weight.requires_grad] == ["layer_weights"]
    even = encoder.fingerprint
    encoder.layer_weights.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    assert encoder.fingerprint != even
    states = [state.detach() for state in encoder.hidden_states(waveform)]
    shares = torch.tensor([0.5, -1.0, 2.0]).softmax(0)
    want = sum(share * state for share, state in zip(shares, states, strict=True))
    frames = encoder.timestamp_embeddings(waveform)
    assert worst(frames.detach(), want) <= 1e-5 * want.abs().max().item()
    frames.square().mean().backward()
    assert (encoder.layer_weights.grad != 0).all()
    assert encoder.use_layer("last").layer_weights is None


@pytest.mark.parametrize(("spec", "rate"), [("ssam-demo", 25.0), ("hubert-demo", 50.0)])
def test_encoders_state_what_they_are(spec, rate):
    encoder = encoders.load(spec)
    assert (encoder.sample_rate, encoder.frame_rate, encoder.n_layers) == (16_000, rate, 2)
    assert "zero mean and unit" in encoder.normalisation
