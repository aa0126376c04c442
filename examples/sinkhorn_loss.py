"""The Sinkhorn divergence as a loss: move a cloud of points onto a ring."""

from __future__ import annotations

import math

import torch

from parrot_kernels import SinkhornDivergence

torch.manual_seed(0)
angles = 2 * math.pi * torch.rand(200)
ring = torch.stack([angles.cos(), angles.sin()], -1) + 0.02 * torch.randn(200, 2)
points = (0.3 * torch.randn(150, 2)).requires_grad_()

criterion = SinkhornDivergence(p=2, blur=0.05, n_iters=100)
for step in range(31):
    loss = criterion(points, ring)
    (gradient,) = torch.autograd.grad(loss, points)
    with torch.no_grad():
        points -= 0.5 * len(points) * gradient  # the gradient carries the weight 1 / 150 of a point
    if step % 10 == 0:
        radius = points.detach().norm(dim=-1)
        print(f"step {step}: divergence {loss:.5f}, radius {radius.mean():.2f} +- {radius.std():.2f}")
