"""Sinkhorn with transported features: cases, peers and floors.

Every provider computes, for squared Euclidean costs divided by their maximum, eps = 0.05 and 50 iterations, the
barycentric projections x_to_y and y_to_x; mode ``both`` adds the gradients to x and y of a fixed linear function
of them, through the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import machine, timing

EPS, ITERATIONS = 0.05, 50
TOLERANCE = 2e-3  # of the largest magnitude, against float64: a gate against wrong answers, not a test of rounding


@dataclass(frozen=True)
class Case:
    B: int
    N: int
    M: int
    D: int
    iterations: int = ITERATIONS

    def __str__(self) -> str:
        shape = f"{self.B}x{self.N}x{self.M}x{self.D}"
        return shape if self.iterations == ITERATIONS else f"{shape}, {self.iterations} iterations"

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.B, self.N, self.D, generator=generator)
        y = torch.randn(self.B, self.M, self.D, generator=generator) + 0.3
        dx, dy = torch.randn(x.shape, generator=generator), torch.randn(y.shape, generator=generator)
        return tuple(t.to(device, dtype) for t in (x, y, dx, dy))

    def floor(self, both: bool) -> dict[str, float]:
        """What a loop of scalings on a kernel matrix needs: nothing padded, one pass an iteration.

        Forward: the multiply-adds of the cost and of two projections, and two an entry and iteration. Backward: seven
        products as these (the cost again, the plan's gradient and the projections' by two, the cost's by two), and six
        an entry and iteration. The matrix is read once an iteration, one way and back.
        """
        entries, K = self.B * self.N * self.M, self.iterations
        return {
            "exponentials": entries * (4 if both else 1),
            "multiply_adds": entries * ((10 * self.D + 8 * K) if both else (3 * self.D + 2 * K)),
            "bytes": 4 * (16 if both else 4) * self.B * (self.N + self.M) * self.D,
            "matrix_bytes": 4 * entries * K * (2 if both else 1),
        }


CASES = [Case(1, 32, 32, 120), Case(1, 128, 128, 120), Case(32, 100, 100, 120), Case(8, 500, 500, 120),
         Case(1, 4096, 4096, 64)]  # fmt: skip
TINY = Case(2, 7, 5, 120)  # converges, so that peers which update in the other order agree

# (x, y, iterations) -> (x_to_y, y_to_x)
Projections = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def scaled_cost(x: Tensor, y: Tensor) -> Tensor:
    cost = (x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :] - 2 * x @ y.mT).clamp_min(0)
    return cost / cost.detach().amax((1, 2), keepdim=True)


def project(plan: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.shape[1] * (plan.mT @ x), x.shape[1] * (plan @ y)


def log_domain_step(cost: Tensor, g: Tensor, log_a: float, log_b: float) -> tuple[Tensor, Tensor]:
    f = EPS * (log_a - torch.logsumexp((g[:, None, :] - cost) / EPS, 2))
    return f, EPS * (log_b - torch.logsumexp((f[:, :, None] - cost) / EPS, 1))


def log_domain(step: Callable) -> Projections:
    def run(x: Tensor, y: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        cost, g = scaled_cost(x, y), x.new_zeros(y.shape[:2])
        for _ in range(iterations):
            f, g = step(cost, g, -math.log(x.shape[1]), -math.log(y.shape[1]))
        return project(((f[:, :, None] + g[:, None, :] - cost) / EPS).exp(), x, y)

    return run


def scaling_loop(x: Tensor, y: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Plain scaling, not stabilised: what is fast in torch, and fails where exp(-C / eps) underflows."""
    kernel = (-scaled_cost(x, y) / EPS).exp()
    v = x.new_ones(y.shape[0], y.shape[1], 1)
    for _ in range(iterations):
        u = 1 / x.shape[1] / (kernel @ v)
        v = 1 / y.shape[1] / (kernel.mT @ u)
    return project(u * kernel * v.mT, x, y)


def ours(backend: str | None) -> Projections:
    from parrot_kernels import sinkhorn_transport  # the op without the Hadamard products, which no peer computes

    def run(x: Tensor, y: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        return sinkhorn_transport(x, y, cost="sqeuclidean", eps=EPS, n_iters=iterations, backend=backend)

    return run


def pot_log() -> Projections:
    import ot

    def run(x: Tensor, y: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        plans = []
        for cost in scaled_cost(x, y):
            a, b = (cost.new_full((n,), 1 / n) for n in cost.shape)
            plans.append(ot.bregman.sinkhorn_log(a, b, cost, EPS, numItermax=iterations, stopThr=0, warn=False))
        return project(torch.stack(plans), x, y)

    return run


def pot_batch() -> Projections:
    from ot.batch import solve_batch

    def run(x: Tensor, y: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        solution = solve_batch(
            scaled_cost(x, y), EPS, max_iter=iterations, tol=0, method="log_sinkhorn", grad="autodiff"
        )
        return project(solution.plan, x, y)

    return run


def ott_jax(case: Case, both: bool) -> Callable:
    """OTT-JAX, jitted and batched with vmap; its iteration is unrolled, as its implicit system is singular here."""
    import jax
    import jax.numpy as jnp
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    x, y, dx, dy = (jnp.asarray(t.numpy()) for t in case.inputs("cpu"))

    def one(x, y):
        scale = jax.lax.stop_gradient(pointcloud.PointCloud(x, y).cost_matrix.max())  # "max_cost" has a gradient
        geometry = pointcloud.PointCloud(x, y, epsilon=EPS * scale)
        exactly = {"threshold": -1.0, "max_iterations": case.iterations, "min_iterations": case.iterations}
        solver = sinkhorn.Sinkhorn(**exactly, implicit_diff=None)
        plan = solver(linear_problem.LinearProblem(geometry)).matrix
        return y.shape[0] * plan.T @ x, x.shape[0] * plan @ y

    def loss(x, y):
        x_to_y, y_to_x = jax.vmap(one)(x, y)
        return (x_to_y * dy).sum() + (y_to_x * dx).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1)) if both else jax.vmap(one))
    return lambda: tuple(torch.from_dlpack(t) for t in jax.block_until_ready(compiled(x, y)))


def providers(device: str, peers: bool) -> dict[str, Callable[[], Projections]]:
    """Name -> a factory that raises where the peer is not installed."""
    found: dict[str, Callable[[], Projections]] = {}
    for backend in machine.our_backends("sinkhorn_hadamard", device):
        found[f"parrot_kernels[{backend}]"] = lambda backend=backend: ours(backend)
    if peers:
        found["torch eager"] = lambda: log_domain(log_domain_step)
        found["torch.compile of one iteration"] = lambda: log_domain(torch.compile(log_domain_step, dynamic=False))
        found["plain scaling loop in torch"] = lambda: scaling_loop
        found["POT sinkhorn_log"] = pot_log
        found["POT solve_batch"] = pot_batch
    return found


def work(projections: Projections, case: Case, device: str, both: bool) -> Callable[[], tuple[Tensor, ...]]:
    x, y, dx, dy = case.inputs(device)
    if not both:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return projections(x, y, case.iterations)

        return forward
    x.requires_grad_(), y.requires_grad_()

    return timing.ForwardAndBackward(lambda: tuple(projections(x, y, case.iterations)), (x, y), (dy, dx))


def floor_seconds(case: Case, both: bool) -> float:
    """The longest of: exponentials and multiply-adds, traffic of the kernel matrix where no cache holds it."""
    floor = case.floor(both)
    compute = floor["exponentials"] / machine.exponentials_per_second()
    compute += floor["multiply_adds"] / machine.multiply_adds_per_second()
    streamed = 4 * case.N * case.M > machine.LARGE_CACHE
    return max(compute, (floor["bytes"] + streamed * floor["matrix_bytes"]) / machine.bytes_per_second())


def works(case: Case, device: str, both: bool, peers: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Name -> what to time; a factory's ImportError is left to the runner."""
    made = {}
    for name, factory in providers(device, peers).items():
        made[name] = lambda factory=factory: work(factory(), case, device, both)
    if peers and device == "cpu":
        made["OTT-JAX"] = lambda: ott_jax(case, both)
    return made


def expected(case: Case, both: bool) -> tuple[Tensor, ...]:
    """Float64 answers of the plain log-domain loop; matrices of all steps at once would not fit in memory."""
    x, y, dx, dy = case.inputs("cpu", torch.float64)
    x.requires_grad_(both), y.requires_grad_(both)
    answers = log_domain(partial(checkpoint, log_domain_step, use_reentrant=False))(x, y, case.iterations)
    return torch.autograd.grad(answers, (x, y), (dy, dx)) if both else answers
