"""Code written for mamba-ssm and causal-conv1d, unchanged, where neither is installed."""

from __future__ import annotations

import torch

from parrot_kernels import compat

print("served here:", ", ".join(compat.install(override=True)))

from causal_conv1d import causal_conv1d_fn  # noqa: E402
from mamba_ssm import Mamba  # noqa: E402
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: E402

torch.manual_seed(0)
block = Mamba(d_model=64, d_state=16, d_conv=4, expand=2)
sequence = torch.randn(2, 40, 64, requires_grad=True)
out = block(sequence)
out.square().sum().backward()
print(f"Mamba: {tuple(out.shape)}, gradient {sequence.grad.norm():.3f}")

states = block.allocate_inference_cache(batch_size=2, max_seqlen=40)
steps = [block.step(sequence[:, t : t + 1], *states)[0] for t in range(40)]
print(f"token by token the outputs differ by {(torch.cat(steps, 1) - out).abs().max():.1e}")

x = torch.randn(2, 32, 100, dtype=torch.bfloat16)
convolved = causal_conv1d_fn(x, torch.randn(32, 4), torch.randn(32), activation="silu")
scanned, last_state = selective_scan_fn(
    convolved, torch.rand_like(x), -torch.rand(32, 8), x[:, :8], x[:, 8:16], delta_softplus=True, return_last_state=True
)
print(f"{scanned.dtype} output, {last_state.dtype} state {tuple(last_state.shape)}")
