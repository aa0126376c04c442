"""The Kaldi filterbank front end of SSAMBA in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def kaldi_filterbank(n_mels: int, n_fft: int, sample_rate: int, f_min: float = 20.0) -> Tensor:
    """Triangular filters, straight on the mel scale 1127 ln(1 + f / 700): (n_fft // 2 + 1, n_mels), fp32.

    With m_0 .. m_{n_mels+1} equally spaced between mel(f_min) and mel(sample_rate / 2), band i weighs the mel value m
    by max(0, min((m - m_i) / (m_{i+1} - m_i), (m_{i+2} - m) / (m_{i+2} - m_{i+1}))). The Nyquist bin has no weight.
    """
    low, high = (1127 * math.log1p(f / 700) for f in (f_min, sample_rate / 2))
    edges = torch.linspace(low, high, n_mels + 2, dtype=torch.float64)
    bins = 1127 * torch.log1p(torch.arange(n_fft // 2, dtype=torch.float64) * sample_rate / n_fft / 700)[:, None]
    step = (high - low) / (n_mels + 1)
    weights = torch.minimum(bins - edges[:-2], edges[2:] - bins).div(step).clamp(min=0)
    return nn.functional.pad(weights, (0, 0, 0, 1)).float()


class KaldiFbank(nn.Module):
    """Log-mel filterbank energies as Kaldi has them: (..., samples) to (..., 1 + (samples - 400) // 160, n_mels).

    The mean of the waveform is taken off; frames of 25 ms every 10 ms, none beyond the ends; in each the mean is taken
    off again, then pre-emphasis x_t - 0.97 x_{t-1} (x_0 - 0.97 x_0 at its start), a symmetric Hann window, the power
    spectrum at 512 points, mel bands and the natural logarithm, floored at the machine epsilon of fp32. No dither.
    """

    FLOOR = torch.finfo(torch.float32).eps
    PREEMPHASIS = 0.97

    def __init__(self, sample_rate: int = 16_000, n_mels: int = 128) -> None:
        super().__init__()
        self.length, self.hop = sample_rate // 40, sample_rate // 100
        self.n_fft = 1 << (self.length - 1).bit_length()
        # Constants, not weights: they stay out of the state dict and off the meta device.
        with torch.device("cpu"):
            self.register_buffer("window", torch.hann_window(self.length, periodic=False), persistent=False)
            self.register_buffer("filterbank", kaldi_filterbank(n_mels, self.n_fft, sample_rate), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        frames = (waveforms - waveforms.mean(-1, keepdim=True)).unfold(-1, self.length, self.hop)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - self.PREEMPHASIS * before) * self.window
        power = torch.fft.rfft(frames, self.n_fft).abs().square()
        return (power @ self.filterbank).clamp(min=self.FLOOR).log()
