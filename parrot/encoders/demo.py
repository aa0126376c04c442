"""Small encoders with random weights, so that everything runs on a machine that holds no checkpoint.

They have the published layers at a small size and no training: what they know of speech is their structure alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from .speech import SpeechModel
from .ssam import SSAM

Model = TypeVar("Model", bound=nn.Module)
Demo = TypeVar("Demo", SSAM, SpeechModel)


def ssam_demo() -> SSAM:
    """SSAM of width 32 and depth 2, otherwise as published: embeddings of 160 values."""
    model = _random(lambda: SSAM(width=32, depth=2, name="ssam-demo"), seed=0)
    for block in model.blocks:
        # Step sizes spread over the channels across the range in which Mamba's initialisation draws them.
        delta = torch.logspace(-3, -1, block.mixer.d_inner)
        block.mixer.dt_proj.bias.data.copy_(delta + torch.log(-torch.expm1(-delta)))
    return _finished(model)


def hubert_demo() -> SpeechModel:
    """HuBERT of width 96 and depth 2 on 64-channel convolutions of the published geometry."""
    from transformers import HubertConfig, HubertModel

    config = HubertConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        conv_dim=[64] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=True,
        mask_time_prob=0.0,
    )
    model = _random(lambda: HubertModel(config), seed=0)
    for layer in model.feature_extractor.conv_layers[1:]:
        # Weights constant over the taps: a random filter that averages keeps the slow course of loudness and pitch.
        weight = layer.conv.weight.data
        weight.copy_(weight[..., :1].expand_as(weight))
    return _finished(SpeechModel(model, do_normalize=True, name="hubert-demo"))


def _finished(encoder: Demo) -> Demo:
    encoder.threads = 1
    return encoder.eval().requires_grad_(False)


def _random(build: Callable[[], Model], seed: int) -> Model:
    """Build a model whose weights are a function of ``seed`` alone; global generators are left as they were.

    Matrices are normal with variance 1 / fan-in, biases 0, scales 1; Mamba's A and D keep their values.
    """
    with torch.random.fork_rng(devices=[]):  # what the constructors draw is overwritten
        model = build()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith((".A_log", ".D")):
            continue
        if weight.dim() > 1:
            weight.data.normal_(std=weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.data.fill_(float(name.endswith("weight")))
    return model
