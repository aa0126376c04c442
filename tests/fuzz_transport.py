"""The random cases of the transport ops, against the reference of sinkhorn_hadamard."""

from __future__ import annotations

from typing import Any

import torch
from fuzz_case import Case, Tensors
from sinkhorn_cases import oracle as sinkhorn_oracle
from torch import Tensor

import parrot_kernels


class Sinkhorn(Case):
    kind = "sinkhorn"
    fused = False  # equal shapes and no weights
    tells_iterations = True

    def draw(self) -> None:
        sizes = (1, 2, 3, 7, 16, 17, 33, 40)
        batch, n, dim = self.size(1, 2, 3, 5), self.size(*sizes), self.rng.choice((1, 2, 3, 8, 17, 40))
        m = n if self.fused else self.size(*sizes)
        self.single = batch == 1 and self.maybe(0.5)
        self.shape = batch, n, m, dim
        lead = () if self.single else (batch,)
        if not self.fused:
            self.draw_lengths(lead, n, m)
        x, y = self.normal(*lead, n, dim), self.normal(*lead, m, dim)
        if self.maybe(0.15) and n and m:
            y[..., :1, :] = x[..., :1, :]  # coincident points
        spread = self.spread(dim)
        x, y = spread * x, spread * y
        if self.maybe(0.05):
            x[..., :1, :] = 0  # without a direction
        self.add("x", x, self.dtype, self.dtype)
        self.add("y", y, self.dtype, self.dtype)
        self.draw_options(lead, n, m)
        for name, size in self.sides(n, m):
            self.cotangent(name, *lead, size, dim)
        for name, size in (("f", (n,)), ("g", (m,)), ("plan", (n, m)), ("cost", ())):
            self.cotangent(name, *lead, *size)

    def draw_lengths(self, lead: tuple[int, ...], n: int, m: int) -> None:
        masks = {}
        for side, size in (("x", n), ("y", m)):
            masks[side] = torch.zeros(*lead, size, dtype=torch.bool)
            if self.maybe(0.3):
                lengths = self.integers(0, size, *lead)
                self.options[f"{side}_lengths"] = lengths
                masks[side] = torch.arange(size) >= lengths[..., None]
        if not self.options:
            return
        empty = masks["x"].all(-1, keepdim=True) | masks["y"].all(-1, keepdim=True)
        rows, cols = masks["x"], masks["y"]
        for side, other, mask, weights in (("x", "y", rows, "a"), ("y", "x", cols, "b")):
            dead = mask | empty
            self.padded(f"d{side}", mask[..., None])
            self.padded(f"d{weights}", mask)
            for name in (f"{other}_to_{side}", f"{side}_hadamard"):
                self.padded(name, dead[..., None])
            self.padded("f" if side == "x" else "g", dead)
        for name in ("plan", "dcost"):
            self.padded(name, rows[..., None] | cols[..., None, :])

    def draw_options(self, lead: tuple[int, ...], n: int, m: int) -> None:
        rng, options = self.rng, self.options
        if not self.fused and self.maybe(0.25):
            self.add("cost", self.uniform(*lead, n, m))
        else:
            options["cost"] = rng.choice(("euclidean", "sqeuclidean", "cosine"))
        options["cost_scale"] = rng.choice(("max", "max", 0.7, 5.0))
        eps = rng.choice((0.02, 0.05, 0.1, 0.3, 1.0, 8.0))
        if self.maybe(0.4):
            each = lead if self.maybe(0.7) else ()
            self.add("eps", eps * (1 + self.uniform(*each)))
        else:
            options["eps"] = eps
        if not self.fused:
            for name, side, size in (("a", "x", n), ("b", "y", m)):
                if self.maybe(0.35):
                    self.draw_weights(name, options.get(f"{side}_lengths"), *lead, size)
        options["n_iters"] = rng.choice((1, 2, 3, 7, 12, 20))
        options["tol"] = rng.choice((None, None, 0.0, 0.0937, 0.00917))  # no error is a round number
        if options["tol"] == 0 and not self.tells_iterations:
            options["tol"] = None  # when an error is exactly 0 is a matter of rounding, and nobody would know of it
        options["gradient"] = rng.choice(("unrolled", "unrolled", "implicit", "detached"))
        reach = (None, None, None, 0.3, 2.0, (None, 0.5), (0.7, None), (0.4, 1.5))
        options["reach"] = rng.choice(reach)
        if not self.fused:
            options["return_plan"] = self.maybe(0.6)
            options["return_hadamard"] = self.maybe(0.7)

    def draw_weights(self, name: str, lengths: Tensor | None, *shape: int) -> None:
        weights = 0.1 + self.uniform(*shape)
        if self.maybe(0.3):
            # Not all: a side without any mass has no plan.
            weights = weights.masked_fill((self.uniform(*shape) < 0.25) & (torch.arange(shape[-1]) > 0), 0)
        if lengths is not None:
            weights = weights.masked_fill(torch.arange(shape[-1]) >= lengths[..., None], 0)
        if self.maybe(0.8):
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=0.1)
        self.add(name, weights)

    def call(self, tensors: Tensors) -> Tensors:
        out = parrot_kernels.sinkhorn_hadamard(**self.views(tensors), **self.options, backend="cpu")
        return {name: t for name, t in out._asdict().items() if t is not None}

    def oracle(self, tensors: Tensors) -> Tensors:
        out = self.transport(tensors)
        absent = {"scale"}
        if not self.options["return_plan"]:
            absent.add("plan")
        if not self.options["return_hadamard"]:
            absent |= {"x_hadamard", "y_hadamard"}
        return {name: t for name, t in out.items() if name not in absent}

    def transport(self, tensors: Tensors) -> Tensors:
        """All outputs of the reference, with the floor that weights have in the compute dtype."""
        batch, n, m, dim = self.shape
        lead = () if self.single else (batch,)
        if batch * n * m == 0:
            shapes = {name: (*lead, size, dim) for name, size in self.sides(n, m)}
            shapes |= {"f": (*lead, n), "g": (*lead, m), "plan": (*lead, n, m), "cost": lead, "error": lead}
            out = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
            none = torch.zeros(lead, dtype=torch.int32)
            return out | {"n_iters": none, "converged": none == 0}
        arguments: dict[str, Any] = {**self.expand(tensors), **self.options}
        for name in ("return_plan", "return_hadamard"):
            arguments.pop(name, None)
        floor = torch.finfo(self.compute).tiny
        for name in ("a", "b"):
            if name in arguments:
                arguments[name] = arguments[name].clamp(min=floor)
        eps = arguments.pop("eps")
        if self.single:
            arguments = {name: t.unsqueeze(0) if isinstance(t, Tensor) else t for name, t in arguments.items()}
        eps = eps if isinstance(eps, Tensor) else torch.tensor(eps, dtype=tensors["x"].dtype)
        out = sinkhorn_oracle(**arguments, eps=eps.expand(batch))
        # "implicit" is a derivative at convergence only; elsewhere its system may be as good as singular.
        implicit = self.options["gradient"] == "implicit"
        self.gradients_count = not implicit or bool((out["error"] <= 1e-3).all())
        return {name: t.squeeze(0) for name, t in out.items()} if self.single else out

    def cancelling(self, name: str) -> float:
        # A cost of 100 eps is rounded to 6e-6 of eps in float32, most of the tolerance, and so are potentials.
        eps = self.tensors["eps"].min().item() if "eps" in self.tensors else self.options["eps"]
        scale = self.options["cost_scale"]
        rounding = 1.0 if scale == "max" else max(1.0, self.largest_cost() / (100 * eps * scale))
        if name == "deps":
            return rounding * max(1.0, 1 / eps)
        if name not in ("dx", "dy", "dcost"):
            return rounding
        # What comes through the cost is 1 / eps times as large. All of it cancels where a plan is as good as hard, or
        # where costs have no derivative, but in the oracle's autograd to rounding only: directions of one feature.
        if rounding > 1:
            return rounding * max(1.0, 1 / (eps * scale))
        directions = self.shape[-1] == 1 and self.options.get("cost") == "cosine" and scale == "max"
        return max(1.0, 10 / eps) if directions else 1.0

    def largest_cost(self) -> float:
        if 0 in self.shape:
            return 0.0
        whole = self.expand({name: t.double() for name, t in self.tensors.items()})
        if "cost" in whole:
            return whole["cost"].max().item()
        distance = torch.cdist(whole["x"], whole["y"]).max().item()
        return {"euclidean": distance, "sqeuclidean": distance**2, "cosine": 2.0}[self.options["cost"]]

    def spread(self, dim: int) -> float:
        return 30.0 if self.maybe(0.08) and self.dtype == torch.float64 else 1.0

    @staticmethod
    def sides(n: int, m: int) -> tuple[tuple[str, int], ...]:
        return ("x_to_y", m), ("y_to_x", n), ("x_hadamard", n), ("y_hadamard", m)


class SinkhornPlan(Sinkhorn):
    tells_iterations = False

    def call(self, tensors: Tensors) -> Tensors:
        options = {n: v for n, v in self.options.items() if n not in ("return_plan", "return_hadamard")}
        plan = parrot_kernels.sinkhorn_plan(**self.views(tensors), **options, backend="cpu")
        return {"plan": plan}

    def oracle(self, tensors: Tensors) -> Tensors:
        return {"plan": self.transport(tensors)["plan"]}


class SinkhornTransport(Sinkhorn):
    tells_iterations = False

    def call(self, tensors: Tensors) -> Tensors:
        options = {n: v for n, v in self.options.items() if n not in ("return_plan", "return_hadamard")}
        x_to_y, y_to_x = parrot_kernels.sinkhorn_transport(**self.views(tensors), **options, backend="cpu")
        return {"x_to_y": x_to_y, "y_to_x": y_to_x}

    def oracle(self, tensors: Tensors) -> Tensors:
        out = self.transport(tensors)
        return {name: out[name] for name in ("x_to_y", "y_to_x")}


class ParallelBranchFusion(Sinkhorn):
    fused = True
    tells_iterations = False

    def draw(self) -> None:
        super().draw()
        parts = ("hadamard", "x_to_y", "y", "y_to_x", "x")
        self.options["parts"] = parts if self.maybe(0.5) else self.rng.sample(parts, self.rng.randint(1, 5))
        batch, n, _, dim = self.shape
        lead = () if self.single else (batch,)
        self.cotangents.clear()
        self.cotangent("row", *lead, n, len(self.options["parts"]) * dim)

    def call(self, tensors: Tensors) -> Tensors:
        return {"row": parrot_kernels.parallel_branch_fusion(**self.views(tensors), **self.options, backend="cpu")}

    def oracle(self, tensors: Tensors) -> Tensors:
        parts = self.options.pop("parts")
        out = self.transport(tensors)
        self.options["parts"] = parts
        whole = self.expand(tensors)
        out |= {"x": whole["x"], "y": whole["y"], "hadamard": whole["x"] * whole["y"]}
        return {"row": torch.cat([out[part] for part in parts], -1)}


class SinkhornDivergence(Sinkhorn):
    """Against the same formulas over the reference, whose derivation has tests of its own."""

    terms = 4

    def cancelling(self, name: str) -> float:
        return 1.0  # the plan takes no part in its gradient

    def spread(self, dim: int) -> float:
        return dim**-0.5  # else the cost, which nothing scales here, is a large multiple of eps

    def draw_options(self, lead: tuple[int, ...], n: int, m: int) -> None:
        rng, options = self.rng, self.options
        for name, side, size in (("a", "x", n), ("b", "y", m)):
            if self.maybe(0.35):
                self.draw_weights(name, options.get(f"{side}_lengths"), *lead, size)
        options |= {"p": rng.choice((1, 2)), "blur": rng.choice((0.2, 0.5, 1.0, 3.0)), "debias": self.maybe(0.7)}
        options |= {"n_iters": rng.choice((1, 3, 20)), "reach": rng.choice((None, None, 0.5, 3.0))}
        options["tol"] = rng.choice((None, 0.0, 1e-2)) if self.dtype == torch.float64 else None
        self.cotangent("value", *lead)

    def call(self, tensors: Tensors) -> Tensors:
        return {"value": parrot_kernels.sinkhorn_divergence(**self.views(tensors), **self.options, backend="cpu")}

    def oracle(self, tensors: Tensors) -> Tensors:
        inputs = self.expand(tensors)
        return {"value": parrot_kernels.sinkhorn_divergence(**inputs, **self.options, backend="torch")}
