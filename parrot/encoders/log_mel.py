"""The log-mel front end of SSAM in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def mel_filterbank(n_mels: int, f_min: float, f_max: float, n_bins: int, sample_rate: int) -> Tensor:
    """Triangular filters on the HTK mel scale, without area normalisation: (n_bins, n_mels), fp32.

    With h_0 .. h_{n_mels+1} equally spaced in mel between f_min and f_max, band i weighs the frequency f by
    max(0, min((f - h_i) / (h_{i+1} - h_i), (h_{i+2} - f) / (h_{i+2} - h_{i+1}))).
    """
    # In fp32 throughout: the filters the published models were trained on differ from exact ones by up to 1e-5.
    low, high = (2595 * math.log10(1 + f / 700) for f in (f_min, f_max))
    h = 700 * (10 ** (torch.linspace(low, high, n_mels + 2) / 2595) - 1)
    distance = h - torch.linspace(0, sample_rate / 2, n_bins)[:, None]
    spacing = h.diff()
    return torch.minimum(-distance[:, :-2] / spacing[:-1], distance[:, 2:] / spacing[1:]).clamp(min=0)


class LogMel(nn.Module):
    """Normalised log-mel spectrogram: (..., samples) to (..., 1 + samples // hop, n_mels).

    Power spectrum of a centred STFT (periodic Hann window, reflect padding), mel bands, natural logarithm of
    (mel + machine epsilon of fp32), then (x - mean) / (std + 1e-8) with one mean and one unbiased standard
    deviation per waveform, over all bands and frames.
    """

    LOG_OFFSET = torch.finfo(torch.float32).eps

    def __init__(
        self,
        sample_rate: int = 16_000,
        n_fft: int = 400,
        hop: int = 160,
        n_mels: int = 80,
        f_min: float = 50.0,
        f_max: float = 8_000.0,
    ) -> None:
        super().__init__()
        self.n_fft, self.hop, self.n_mels = n_fft, hop, n_mels
        # Constants, not weights: they stay out of the state dict and off the meta device.
        with torch.device("cpu"):
            self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
            filterbank = mel_filterbank(n_mels, f_min, f_max, n_fft // 2 + 1, sample_rate)
            self.register_buffer("filterbank", filterbank, persistent=False)

    @property
    def min_samples(self) -> int:
        """Reflect padding needs more samples than it adds at each end."""
        return self.n_fft // 2 + 1

    def forward(self, waveforms: Tensor) -> Tensor:
        spectrum = torch.stft(waveforms, self.n_fft, self.hop, window=self.window, return_complex=True)
        mel = spectrum.abs().square().transpose(-1, -2) @ self.filterbank
        log_mel = torch.log(mel + self.LOG_OFFSET)
        std, mean = torch.std_mean(log_mel, dim=(-2, -1), keepdim=True)
        return (log_mel - mean) / (std + 1e-8)
