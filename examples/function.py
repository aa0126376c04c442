"""One call of the function: match two sets of features, and check its gradient by moving along it."""

from __future__ import annotations

import torch

from parrot_kernels import sinkhorn_hadamard

torch.manual_seed(0)
audio = torch.randn(4, 50, 16)  # 4 clips of 50 frames
text = audio[:, torch.randperm(50)[:30]] + 0.05 * torch.randn(4, 30, 16)  # 30 tokens each, noisy copies of frames
out = sinkhorn_hadamard(audio, text, eps=0.02, n_iters=200, tol=1e-3, reach=(0.1, None), return_plan=True)

print(f"plan {tuple(out.plan.shape)}, {out.n_iters.tolist()} iterations, converged: {out.converged.tolist()}")
sums = out.plan.sum(1)
print(f"every token receives its 1/30: {torch.allclose(sums, torch.full_like(sums, 1 / 30))}")
best = out.plan.argmax(1)  # for each token the frame that it came from
recovered = torch.gather(audio, 1, best[..., None].expand(-1, -1, 16))
print(f"a token and its best frame differ by {(recovered - text).abs().mean():.3f} on average, noise is 0.05")

text.requires_grad_()
for _ in range(3):
    cost = sinkhorn_hadamard(audio, text, cost="sqeuclidean", cost_scale=1.0, eps=0.5).cost
    (gradient,) = torch.autograd.grad(cost.sum(), text)
    print(f"transport cost {cost.mean():.4f}")
    text = (text - 5 * gradient).detach().requires_grad_()
