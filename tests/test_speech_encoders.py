"""Speech models of transformers, against transformers' own feature extractors and models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parrot import encoders
from parrot.encoders import SpeechModel

FAMILIES = {
    "hubert": "Hubert",
    "wavlm": "WavLM",
    "wav2vec2": "Wav2Vec2",
    "unispeech-sat": "UniSpeechSat",
    "mms": "Wav2Vec2",
    "transformers": "Data2VecAudio",
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return (got.double() - want.double()).abs().max().item()


def small(architecture: str, head: str = "Model", **options):
    """A random model; the convolutions' widths and strides are the published ones' (width 512 to 16)."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **convolutions, **options})
    return getattr(transformers, f"{architecture}{head}")(config).eval()


def small_hubert(**options):
    return small("Hubert", **options)


def write_preprocessor(folder: Path, **settings) -> None:
    settings = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16_000, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("do_normalize", [True, False])
def test_hubert_is_transformers_own_pipeline(tmp_path, do_normalize):
    from transformers import HubertModel, Wav2Vec2FeatureExtractor

    small_hubert().save_pretrained(tmp_path)
    write_preprocessor(tmp_path, do_normalize=do_normalize)
    encoder = encoders.load(f"hubert:{tmp_path}")
    waveform = 3 * noise(20_000) + 0.5
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)(
        waveform.numpy(), sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        want = HubertModel.from_pretrained(tmp_path).eval()(inputs.input_values).last_hidden_state
    assert worst(encoder.timestamp_embeddings(waveform[None]), want) <= 1e-5
    assert worst(encoder.embed(waveform), want[0].mean(0)) <= 1e-5
    assert encoder.do_normalize is do_normalize
    assert (encoder.embedding_dim, encoder.sample_rate, encoder.min_samples) == (32, 16_000, 400)
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_hubert_normalisation_belongs_to_the_fingerprint(tmp_path):
    small_hubert().save_pretrained(tmp_path)
    prints = set()
    for do_normalize in (True, False):
        write_preprocessor(tmp_path, do_normalize=do_normalize)
        prints.add(SpeechModel.from_pretrained(tmp_path).fingerprint)
    assert len(prints) == 2


def test_hubert_embeds_each_row_of_a_batch_by_itself():
    encoder = encoders.load("hubert-demo")
    batch = noise(3, 5_000)
    for row, waveform in zip(encoder.embed(batch), batch, strict=True):
        assert worst(row, encoder.embed(waveform)) <= 1e-5


def test_hubert_frames():
    encoder = encoders.load("hubert-demo")
    for samples, frames in ((400, 1), (16_000, 49), (32_000, 99), (40_000, 124)):
        assert encoder.timestamp_embeddings(noise(1, samples)).shape == (1, frames, encoder.embedding_dim)


def test_it_says_what_a_checkpoint_lacks(tmp_path):
    from transformers import HubertConfig, Wav2Vec2Config

    with pytest.raises(ValueError, match=r"no complete checkpoint.*download=True"):
        encoders.load("hubert:nobody/no-such-model")
    small_hubert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no complete checkpoint .*preprocessor_config\.json"):
        encoders.load(f"hubert:{tmp_path}")
    write_preprocessor(tmp_path)

    def configure(**changes):
        HubertConfig(**{**small_hubert().config.to_dict(), **changes}).save_pretrained(tmp_path)

    configure(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 16 weights, such as 'encoder\.layers\.2\..*different models"):
        encoders.load(f"hubert:{tmp_path}")
    configure(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"holds 16 weights too many, such as 'encoder\.layers\.1\."):
        encoders.load(f"hubert:{tmp_path}")
    configure(intermediate_size=40)
    with pytest.raises(ValueError, match=r"6 weights of other sizes.*of shape \(48,\), wanted \(40,\)"):
        encoders.load(f"hubert:{tmp_path}")
    Wav2Vec2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold a model of type 'hubert'; its config\.json says 'wav2vec2'"):
        encoders.load(f"hubert:{tmp_path}")


def test_broken_weights(tmp_path):
    small_hubert().save_pretrained(tmp_path)
    write_preprocessor(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for content, message in (
        (whole[:-100], f"truncated: wanted {len(whole)} bytes, got {len(whole) - 100}"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"", "it is empty"),
    ):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            encoders.load(f"hubert:{tmp_path}")


def small_model_of_spectrograms(kind):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "AST":
        return transformers.ASTModel(transformers.ASTConfig(**sizes))
    audio = {
        "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
        "num_hidden_layers": 2, "spec_size": 64, "num_mel_bins": 16,
    }  # fmt: skip
    text = {**sizes, "vocab_size": 50}
    return transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=8))


@pytest.mark.parametrize(("kind", "name"), [("AST", "audio-spectrogram-transformer"), ("Clap", "clap")])
def test_models_of_other_inputs_are_refused(tmp_path, kind, name):
    small_model_of_spectrograms(kind).save_pretrained(tmp_path)
    write_preprocessor(tmp_path, feature_extractor_type=f"{kind}FeatureExtractor")
    with pytest.raises(ValueError, match=rf"must take waveforms.*got '{name}'"):
        encoders.load(f"transformers:{tmp_path}")


def test_whisper_is_transformers_own_encoder(tmp_path):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 100}
    config = WhisperConfig(**sizes, **heads, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = WhisperModel(config).eval()
    model.save_pretrained(tmp_path)
    extractor = WhisperFeatureExtractor(chunk_length=2)
    extractor.save_pretrained(tmp_path)
    encoder = encoders.load(f"transformers:{tmp_path}")
    waveforms = noise(2, 20_000)
    inputs = extractor(list(waveforms.numpy()), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        want = model.get_encoder()(inputs.input_features, output_hidden_states=True)
    frames, counts = encoder.frames(waveforms)
    assert worst(frames, want.last_hidden_state[:, :63]) <= 1e-5
    assert counts.tolist() == [63, 63]  # 125 of 200 feature frames, two to a frame of the encoder
    for got, state in zip(encoder.hidden_states(waveforms), want.hidden_states, strict=True):
        assert worst(got, state[:, :63]) <= 1e-5
    assert (encoder.frame_rate, encoder.sample_rate, encoder.n_layers, encoder.embedding_dim) == (50, 16_000, 2, 16)
    assert len(encoder.fingerprint) == 64
    with pytest.raises(ValueError, match=r"at most 32000 samples \(2 s\).*got 32001"):
        encoder.embed(noise(32_001))


def test_wav2vec2_bert_is_transformers_own_model(tmp_path):
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = Wav2Vec2BertModel(Wav2Vec2BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    extractor = SeamlessM4TFeatureExtractor()
    extractor.save_pretrained(tmp_path)
    encoder = encoders.load(f"transformers:{tmp_path}")
    waveform = noise(9_000)
    inputs = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        want = model(**inputs).last_hidden_state[0, : int(inputs["attention_mask"].sum())]
    assert worst(encoder.timestamp_embeddings(waveform), want) <= 1e-5
    assert encoder.frame_rate == 50
    assert len(encoder.fingerprint) == 64


def test_hubert_downloads_only_when_asked(monkeypatch):
    import transformers

    asked = []

    def refuse(checkpoint, local_files_only, trust_remote_code):
        assert not trust_remote_code
        asked.append((checkpoint, local_files_only))
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    for download in (False, True):
        with pytest.raises(ValueError, match="no complete checkpoint"):
            encoders.load("hubert:facebook/hubert-base-ls960", download=download)
    assert asked == [("facebook/hubert-base-ls960", True), ("facebook/hubert-base-ls960", False)]


def own_outputs(folder: Path, model, waveform: torch.Tensor):
    """transformers' own feature extractor and model, on one waveform."""
    from transformers import AutoFeatureExtractor

    inputs = AutoFeatureExtractor.from_pretrained(folder)(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        return model(inputs.input_values, output_hidden_states=True)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_transformers_own_model(tmp_path, family, norm):
    options = {} if family == "transformers" else {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    model = small(FAMILIES[family], **options)
    model.save_pretrained(tmp_path)
    write_preprocessor(tmp_path, do_normalize=norm == "layer")
    encoder = encoders.load(f"{family}:{tmp_path}")
    waveform = 3 * noise(15_000) + 0.5
    want = own_outputs(tmp_path, model, waveform)
    assert worst(encoder.timestamp_embeddings(waveform[None]), want.last_hidden_state) <= 1e-5
    states = encoder.hidden_states(waveform[None])
    assert len(states) == encoder.n_layers + 1 == 3
    for got, state in zip(states, [*want.hidden_states[:-1], want.last_hidden_state], strict=True):
        assert worst(got, state) <= 1e-5
    assert encoder.normalisation == ("waveform of zero mean and unit variance" if norm == "layer" else "none")
    assert encoder.frame_rate == 50
    assert encoder.name == f"{family}:{tmp_path.name}"


@pytest.mark.parametrize("architecture", ["Hubert", "WavLM", "Wav2Vec2", "UniSpeechSat"])
@pytest.mark.parametrize("layer", ["last", 1, "mean"])
def test_layer_norm_models_hide_padding(architecture, layer):
    model = small(architecture, feat_extract_norm="layer", do_stable_layer_norm=True)
    encoder = SpeechModel(model, do_normalize=True).eval().requires_grad_(False).use_layer(layer)
    batch, lengths = noise(3, 12_000), [5_000, 12_000, 8_123]
    for row, length in zip(batch, lengths, strict=True):
        row[length:] = float("nan")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    frames, counts = encoder.frames(batch, lengths)
    assert len(calls) == 1
    alone, counts_alone = encoder.frames(batch, lengths, padded=False)
    assert torch.equal(counts, counts_alone)
    assert worst(frames, alone) <= 2e-5
    assert len(calls) == 4


def test_group_norm_models_run_unpadded_unless_asked():
    encoder = SpeechModel(small_hubert(feat_extract_norm="group"), do_normalize=False).eval().requires_grad_(False)
    batch, lengths = noise(2, 12_000), [5_000, 12_000]
    frames, counts = encoder.frames(batch, lengths)
    assert torch.equal(frames[0, : counts[0]], encoder.timestamp_embeddings(batch[0, :5_000]))
    padded, padded_counts = encoder.frames(batch, lengths, padded=True)
    assert torch.equal(counts, padded_counts)
    assert worst(padded[0], frames[0]) > 1e-3  # the group norm has seen the padding
    assert (padded[0, counts[0] :] == 0).all()


def test_heads_of_pretraining_are_dropped(tmp_path):
    model = small("Wav2Vec2", "ForPreTraining", proj_codevector_dim=8, codevector_dim=8)
    model.save_pretrained(tmp_path)
    write_preprocessor(tmp_path)
    encoder = encoders.load(f"wav2vec2:{tmp_path}")
    waveform = noise(5_000)
    assert worst(encoder.embed(waveform), own_outputs(tmp_path, model.wav2vec2, waveform)[0][0].mean(0)) <= 1e-5
