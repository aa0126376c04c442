"""The module inside of a model: fuse two streams of different lengths by transport, and train on a toy task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parrot_kernels import Mamba, SinkhornHadamard


class Fusion(nn.Module):
    """Does the second stream contain, in another order, what the first one does?"""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.encode = Mamba(d_model=dim, d_state=8)
        self.transport = SinkhornHadamard(cost="euclidean", eps=0.1, n_iters=20)
        self.classify = nn.Linear(2 * dim, 2)

    def forward(self, x: Tensor, y: Tensor, x_lengths: Tensor) -> Tensor:
        fused = self.transport(x, y, x_lengths=x_lengths)  # padding takes no part
        gap = (x - fused.y_to_x).abs() * (torch.arange(x.shape[1]) < x_lengths[:, None])[..., None]
        encoded = self.encode(gap, lengths=x_lengths)
        return self.classify(torch.cat([gap.sum(1), encoded.sum(1)], -1) / x_lengths[:, None])


torch.manual_seed(0)
model = Fusion()
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(60):
    x, labels, x_lengths = torch.randn(16, 12, 16), torch.randint(2, (16,)), torch.randint(6, 13, (16,))
    y = torch.where(labels[:, None, None] == 1, x.flip(1), torch.randn_like(x))
    logits = model(x, y, x_lengths)
    loss = nn.functional.cross_entropy(logits, labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step % 20 == 0 or step == 59:
        print(f"step {step}: loss {loss:.3f}, accuracy {(logits.argmax(-1) == labels).float().mean():.2f}")
