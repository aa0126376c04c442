"""The Sinkhorn divergence between weighted point clouds, from the dual potentials of sinkhorn_hadamard."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .sinkhorn_hadamard import sinkhorn_hadamard

OP = "sinkhorn_divergence"


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    p: int = 2,
    blur: float = 0.05,
    reach: float | None = None,
    debias: bool = True,
    n_iters: int = 1000,
    tol: float | None = 1e-3,
    backend: str | None = None,
) -> Tensor:
    r"""Sinkhorn divergence S = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 between weighted point clouds.

    With C_ij = \|x_i - y_j\|^p / p, eps = blur^p and rho = reach^p, for weights that sum to one::

        OT(x, y) = min_P  <P, C> + eps KL(P | a b^T) + rho KL(P 1 | a) + rho KL(P^T 1 | b)
                 = max_{F, G}  sum_i a_i phi(F_i) + sum_j b_j phi(G_j) - eps (mass(P) - mass(a) / 2 - mass(b) / 2)

        phi(t) = rho (1 - exp(-t / rho)); without ``reach`` phi(t) = t, and the marginals of P are a and b

    The second line defines OT for weights of any sum. S is 0 between equal measures and at convergence nowhere
    negative; it leads from optimal transport (blur to 0) to a kernel distance (blur to infinity). Feydy et al. 2019,
    arXiv 1810.08278; unbalanced, Sejourne et al. 2019, arXiv 1910.12958. These are GeomLoss's conventions: its
    ``SamplesLoss("sinkhorn", p, blur, reach)(a, x, b, y)`` is ``sinkhorn_divergence(x, y, a=a, b=b, p=p, blur=blur,
    reach=reach)``, up to how far either has converged.

    Gradients flow to x, y, a and b. They are those of OT at its optimum (envelope theorem: <P, dC>, and the dual
    potentials for the weights), so that no iteration is stored or differentiated. Their error is that of the
    potentials; the error of the value, a dual objective, is of the order of its square. If balanced, a gradient to
    weights is determined up to a constant per problem, which does not matter to weights of fixed sum. If unbalanced,
    these gradients are the value's derivatives, and those of GeomLoss 0.3.1 are too small by the factor
    (rho + eps / 2) / (rho + eps).

    Args:
        x, y: points (B, N, D) and (B, M, D), or (N, D) and (M, D) for one problem; dtypes as in sinkhorn_hadamard.
        a, b: weights (B, N) and (B, M), or (N,) and (M,), not negative. Uniform over the valid rows by default. If
            balanced their sums must be equal: else there is no plan, and the value grows from iteration to iteration.
        x_lengths, y_lengths: valid rows of each problem, (B,) or (). Padding takes no part and has gradient 0. A
            problem without valid rows on either side has the value 0.
        p: 1 or 2, the power of the distance. With 1, coincident points take the subgradient 0.
        blur: the distance below which details are smoothed away.
        reach: None for balanced marginals, else the distance beyond which mass is rather destroyed and created.
        debias: False returns OT(x, y) alone.
        n_iters: iterations at most, for each of the three transport problems. The smaller the blur, the more are
            needed: for p = 2 on the order of (extent of the points / blur)^2.
        tol: error at which a problem stops by itself, as in sinkhorn_hadamard.
        backend: as in sinkhorn_hadamard.

    Returns:
        (B,), or () for one problem, in fp32; for fp64 inputs in fp64. Differentiating twice raises RuntimeError.

    Memory for the backward: the inputs and the potentials.

    Raises:
        ValueError, TypeError: p, blur or reach; everything else as sinkhorn_hadamard.
    """
    check_options(p, blur, reach)
    eps, rho = float(blur) ** p, None if reach is None else float(reach) ** p

    def entropic_cost(x, y, a, b, x_lengths, y_lengths) -> tuple[Tensor, Tensor]:
        """OT, and whether there was nothing to transport."""
        out = sinkhorn_hadamard(
            x,
            y,
            a=a,
            b=b,
            x_lengths=x_lengths,
            y_lengths=y_lengths,
            cost="euclidean" if p == 1 else "sqeuclidean",
            cost_scale=float(p),
            eps=eps,
            n_iters=n_iters,
            tol=tol,
            reach=reach,
            gradient="detached",
            backend=backend,
            return_hadamard=False,
        )
        a, phi_x, rate_x = _dual_terms(a, out.f, x_lengths, eps, rho)
        b, phi_y, rate_y = _dual_terms(b, out.g, y_lengths, eps, rho)
        mass = (b * rate_y).sum(-1)  # b_j phi'(G_j) are the plan's column sums: the last update was that of g
        value = (a * (phi_x + eps / 2)).sum(-1) + (b * (phi_y + eps / 2)).sum(-1) - eps * mass
        # At the optimum the row sums are a_i phi'(F_i) as well, and the value's derivatives are those of:
        linear = (a * (phi_x + eps / 2 - eps * rate_x)).sum(-1) + (b * (phi_y + eps / 2 - eps * rate_y)).sum(-1)
        linear = linear + out.cost
        return linear + (value - linear).detach(), out.n_iters == 0

    divergence, empty = entropic_cost(x, y, a, b, x_lengths, y_lengths)
    if debias:
        self_x, _ = entropic_cost(x, x, a, a, x_lengths, x_lengths)
        self_y, _ = entropic_cost(y, y, b, b, y_lengths, y_lengths)
        divergence = divergence - (self_x + self_y) / 2
    return divergence.masked_fill(empty, 0)


def check_options(p: int, blur: float, reach: float | None) -> None:
    checks.choice(OP, "p", p, (1, 2))
    checks.positive(OP, "blur", blur)
    if reach is not None:
        checks.positive(OP, "reach", reach)


def _dual_terms(
    weights: Tensor | None, potential: Tensor, lengths: Tensor | None, eps: float, rho: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, 0 at padding, and phi(F) and phi'(F) of F = f - eps log a, the potential relative to them."""
    count = potential.shape[-1] if lengths is None else lengths[..., None]
    weights = torch.ones_like(potential) / count if weights is None else weights.to(potential.dtype)
    if lengths is not None:
        weights = weights.masked_fill(torch.arange(potential.shape[-1], device=potential.device) >= count, 0)
    floored = weights.detach().clamp(min=torch.finfo(potential.dtype).tiny)  # as the op does
    relative = potential - eps * floored.log()
    if rho is None:
        return weights, relative, torch.ones_like(relative)
    return weights, -rho * torch.expm1(-relative / rho), torch.exp(-relative / rho)
