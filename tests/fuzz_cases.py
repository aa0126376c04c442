"""The random cases of fuzz_ops.py: one class per op, which draws everything from one random.Random."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from sinkhorn_cases import oracle as sinkhorn_oracle
from torch import Tensor

import parrot_kernels
from parrot_kernels.reference.causal_conv1d import causal_conv1d as conv_oracle
from parrot_kernels.reference.causal_conv1d_update import causal_conv1d_update as conv_update_oracle
from parrot_kernels.reference.selective_scan import selective_scan as scan_oracle
from parrot_kernels.reference.selective_state_update import selective_state_update as state_update_oracle

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")

Tensors = dict[str, Tensor]


class Case:
    """What an op and its oracle are called with, and what is compared.

    Attributes:
        tensors: the floating inputs, contiguous and before they are expanded: the leaves.
        options: the other arguments.
        padding: by the name of an output or of a gradient, "d<input>": where it must be 0, whatever the inputs hold.
        wanted: the inputs that want gradients.
        cotangents: the outputs that have gradients, and these.
        inplace: the inputs that the op updates.
    """

    kind: str  # of tolerance
    inplace: tuple[str, ...] = ()
    gradients_count = True  # whether gradients are compared
    terms = 1  # of which autograd sums a gradient, in the input's dtype

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(40))
        self.threads = 2 if self.maybe(0.1) else 1
        self.workspace = rng.choice((1 << 30, 1 << 30, 0, 4096))
        self.dtype = rng.choice(FLOATS[:2] * 3 + FLOATS[2:])
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.tensors: Tensors = {}
        self.options: dict[str, Any] = {}
        self.padding: Tensors = {}
        self.cotangents: Tensors = {}
        self._views: dict[str, Callable[[Tensor], Tensor]] = {}
        self._sizes: dict[str, torch.Size] = {}
        self.draw()
        differentiable = [name for name in self.tensors if name not in self.inplace]
        wanted = rng.choice(("all", "all", "some", "none"))
        self.wanted = [name for name in differentiable if wanted == "all" or (wanted == "some" and self.maybe(0.5))]

    def draw(self) -> None:
        raise NotImplementedError

    def call(self, tensors: Tensors) -> Tensors:
        """Outputs of the op on the "cpu" backend; ``tensors`` are those of the op."""
        raise NotImplementedError

    def oracle(self, tensors: Tensors) -> Tensors:
        raise NotImplementedError

    def describe(self) -> str:
        shapes = {name: (tuple(self._sizes[name]), str(t.dtype)[6:]) for name, t in self.tensors.items()}
        options = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in self.options.items()}
        return f"{shapes} {options} threads={self.threads} workspace={self.workspace} wanted={self.wanted}"

    def maybe(self, probability: float) -> bool:
        return self.rng.random() < probability

    def size(self, *choices: int, zero: float = 0.02) -> int:
        return 0 if self.maybe(zero) else self.rng.choice(choices)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Between low and high, both included."""
        dtype = self.rng.choice((torch.int32, torch.int64))
        values = torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int64).to(dtype)
        return self.layout(values.dim(), 99)(values)

    def add(self, name: str, values: Tensor, dtype: torch.dtype | None = None, rounding: torch.dtype | None = None):
        """An input; of any dtype unless told, with values that ``rounding`` (by default to compute in) keeps."""
        dtype = dtype or self.rng.choice(FLOATS)
        values = values.to(rounding or self.compute).to(dtype).to(rounding or self.compute).to(dtype)
        self._sizes[name] = values.shape
        expanded = False
        # The gradient of an expanded input is a sum that autograd takes in the input's dtype.
        if f"d{name}" not in self.padding and dtype in FLOATS[:2]:
            for i, size in enumerate(values.shape):
                if size > 1 and self.maybe(0.05):
                    values, expanded = values.narrow(i, 0, 1), True
        self.tensors[name] = values.contiguous()
        self._views[name] = (lambda t: t) if expanded else self.layout(values.dim())

    def layout(self, dims: int, outside: float = NAN) -> Callable[[Tensor], Tensor]:
        """A differentiable function to the same values with other strides; what lies between is ``outside``."""
        kind = self.rng.choice(("contiguous", "contiguous", "permuted", "strided", "sliced"))
        order = self.rng.sample(range(dims), dims)
        back = [order.index(i) for i in range(dims)]

        def apply(t: Tensor) -> Tensor:
            filling = torch.full_like(t, outside)
            if kind == "permuted":
                return t.permute(order).contiguous().permute(back)
            if kind == "strided":
                return torch.stack([t, filling], -1)[..., 0]
            if kind == "sliced" and dims:
                return torch.cat([filling, t, filling], 0)[len(t) : 2 * len(t)]
            return t

        return apply

    def expand(self, tensors: Tensors) -> Tensors:
        return {name: t.expand(self._sizes[name]) for name, t in tensors.items()}

    def views(self, tensors: Tensors) -> Tensors:
        """With the strides that were drawn."""
        return {name: self._views[name](t) for name, t in self.expand(tensors).items()}

    def poisoned(self) -> Tensors:
        """The inputs with NaN where padding is."""
        masks = {name: self.padding.get(f"d{name}") for name in self.tensors}
        return {n: t if (mask := masks[n]) is None else t.masked_fill(mask, NAN) for n, t in self.tensors.items()}

    def cotangent(self, name: str, *shape: int) -> None:
        """Perhaps a gradient of an output, sometimes an expanded or strided one."""
        kind = self.rng.choice(("normal", "normal", "normal", "expanded", "strided", "none"))
        values = self.normal(*shape)
        if kind == "expanded" and values.numel():
            values = values.flatten()[0].expand(shape)
        elif kind == "strided":
            values = torch.stack([values, torch.full_like(values, NAN)], -1)[..., 0]
        if kind != "none":
            self.cotangents[name] = values

    def padded(self, name: str, mask: Tensor) -> None:
        self.padding[name] = mask


class Sinkhorn(Case):
    kind = "sinkhorn"
    fused = False  # equal shapes and no weights

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

    def spread(self, dim: int) -> float:
        return 30.0 if self.maybe(0.08) and self.dtype == torch.float64 else 1.0

    @staticmethod
    def sides(n: int, m: int) -> tuple[tuple[str, int], ...]:
        return ("x_to_y", m), ("y_to_x", n), ("x_hadamard", n), ("y_hadamard", m)


class SinkhornPlan(Sinkhorn):
    def call(self, tensors: Tensors) -> Tensors:
        options = {n: v for n, v in self.options.items() if n not in ("return_plan", "return_hadamard")}
        plan = parrot_kernels.sinkhorn_plan(**self.views(tensors), **options, backend="cpu")
        return {"plan": plan}

    def oracle(self, tensors: Tensors) -> Tensors:
        return {"plan": self.transport(tensors)["plan"]}


class SinkhornTransport(Sinkhorn):
    def call(self, tensors: Tensors) -> Tensors:
        options = {n: v for n, v in self.options.items() if n not in ("return_plan", "return_hadamard")}
        x_to_y, y_to_x = parrot_kernels.sinkhorn_transport(**self.views(tensors), **options, backend="cpu")
        return {"x_to_y": x_to_y, "y_to_x": y_to_x}

    def oracle(self, tensors: Tensors) -> Tensors:
        out = self.transport(tensors)
        return {name: out[name] for name in ("x_to_y", "y_to_x")}


class ParallelBranchFusion(Sinkhorn):
    fused = True

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


class Steps(Case):
    """What the scan and the convolution share: sequences of unequal lengths, packed or not."""

    def draw_steps(self, batch: int, length: int, names: dict[str, int]) -> None:
        """``names``: of what is per step, with their dimensions; gradients among them."""
        options = self.options
        options["reverse"] = self.maybe(0.4)
        options["return_final_state"] = self.maybe(0.5)
        if self.maybe(0.35):
            options["lengths"] = self.integers(0, length, batch)
            mask = torch.arange(length) >= options["lengths"][:, None]
            for name, dims in names.items():
                self.padded(name, mask.view(batch, *[1] * (dims - 2), length))
        if self.maybe(0.3):
            ids = self.integers(0, self.rng.choice((1, 3)), batch, length)
            options["seq_idx"] = ids.sort(-1).values if self.maybe(0.5) else ids

    def call_op(self, op: Callable[..., Any], tensors: Tensors) -> Tensors:
        found = op(**self.views(tensors), **self.options, backend="cpu")
        return dict(zip(("out", "final_state"), found, strict=True)) if isinstance(found, tuple) else {"out": found}

    def call_oracle(self, function: Callable[..., Any], tensors: Tensors) -> Tensors:
        options = dict(self.options)
        keep = options.pop("return_final_state")
        out, final_state = function(**self.expand(tensors), **options)
        return {"out": out, "final_state": final_state} if keep else {"out": out}


class SelectiveScan(Steps):
    kind = "scan"

    def draw(self) -> None:
        batch, length = self.size(1, 2, 3), self.size(1, 2, 3, 7, 8, 31, 32, 33, 64, 70)
        dim, states = self.size(1, 2, 3, 4, 8, 12, 17), self.size(1, 2, 3, 4, 8, 16, 17, zero=0.01)
        kinds = {}
        for name in ("B", "C"):
            groups = self.rng.choice([g for g in range(1, dim + 1) if dim % g == 0] or [1])
            kinds[name] = self.rng.choice(((dim, states), (batch, states, length), (batch, groups, states, length)))
        per_step = {"out": 3, "du": 3, "ddelta": 3, "dz": 3}
        self.draw_steps(batch, length, per_step | {f"d{n}": len(k) for n, k in kinds.items() if len(k) > 2})
        softplus = self.options["delta_softplus"] = self.maybe(0.6)
        delta = self.normal(batch, dim, length)
        self.add("u", self.normal(batch, dim, length), self.dtype, self.dtype)
        # Now and then past the threshold of softplus.
        self.add(
            "delta", (delta * self.rng.choice((1, 1, 12)) if softplus else 0.4 * delta.abs()), self.dtype, self.dtype
        )
        self.add("A", -self.uniform(dim, states) * self.rng.choice((0.1, 1, 1, 8)))
        for name, shape in kinds.items():
            dtypes = (None, None) if len(shape) == 2 else (self.dtype, self.dtype)
            self.add(name, self.normal(*shape), *dtypes)
        if self.maybe(0.5):
            self.add("D", self.normal(dim))
        if self.maybe(0.5):
            self.add("z", 2 * self.normal(batch, dim, length), self.dtype, self.dtype)
        if self.maybe(0.5):
            self.add("delta_bias", 0.3 * self.uniform(dim))
        if self.maybe(0.4):
            self.add("initial_state", self.normal(batch, dim, states))
        self.cotangent("out", batch, dim, length)
        self.cotangent("final_state", batch, dim, states)

    def call(self, tensors: Tensors) -> Tensors:
        return self.call_op(parrot_kernels.selective_scan, tensors)

    def oracle(self, tensors: Tensors) -> Tensors:
        return self.call_oracle(scan_oracle, tensors)


class CausalConv1d(Steps):
    kind = "conv"

    def draw(self) -> None:
        batch, dim = self.size(1, 2, 3), self.size(1, 2, 3, 8, 16, 17, 33)
        length, taps = self.size(1, 2, 3, 7, 8, 31, 64, 70, 130), self.rng.choice((1, 2, 3, 4, 4, 5, 9))
        self.draw_steps(batch, length, {"out": 3, "dx": 3})
        self.options["activation"] = self.rng.choice((None, "silu", "swish"))
        self.add("x", self.normal(batch, dim, length), self.dtype, self.dtype)
        self.add("weight", self.normal(dim, taps))
        if self.maybe(0.5):
            self.add("bias", self.normal(dim))
        if self.maybe(0.4):
            self.add("initial_state", self.normal(batch, dim, taps - 1), rounding=self.dtype)
        self.cotangent("out", batch, dim, length)
        self.cotangent("final_state", batch, dim, taps - 1)

    def call(self, tensors: Tensors) -> Tensors:
        return self.call_op(parrot_kernels.causal_conv1d, tensors)

    def oracle(self, tensors: Tensors) -> Tensors:
        return self.call_oracle(conv_oracle, tensors)


class Update(Case):
    """One step with a state in place, perhaps one entry of many for each row."""

    inplace = ("state",)

    def draw_indices(self, batch: int) -> int:
        """The number of entries."""
        if not self.maybe(0.4):
            return batch
        entries = batch + self.rng.choice((0, 1, 3))
        indices = torch.randperm(max(entries, 1), generator=self.generator)[:batch]
        indices = indices.masked_fill(self.uniform(batch) < 0.2, -1)
        self.options["state_indices"] = indices.to(self.rng.choice((torch.int32, torch.int64)))
        return entries

    def update(self, op: Callable[..., Tensor], tensors: Tensors) -> Tensors:
        state = self._views["state"](self.expand(tensors)["state"].detach().clone())
        inputs = self.views(tensors) | {"state": state}
        out = op(**inputs, **self.options, backend="cpu")
        return {"out": out, "state": state}

    def step(self, function: Callable[..., tuple[Tensor, Tensor]], tensors: Tensors, **options: Any) -> Tensors:
        """The oracle on the rows that have an entry."""
        inputs, indices = self.expand(tensors), self.options.get("state_indices")
        state = inputs.pop("state").detach()
        if indices is None:
            out, new_state = function(state=state, **inputs, **options)
            return {"out": out, "state": new_state.detach()}
        out, rows = function(state=state[indices.clamp(min=0).long()], **inputs, **options)
        new_state, valid = state.clone(), indices >= 0
        new_state[indices[valid].long()] = rows.detach()[valid]
        return {"out": out.masked_fill(~valid.view(-1, *[1] * (out.dim() - 1)), 0), "state": new_state}


class SelectiveStateUpdate(Update):
    kind = "scan"

    def draw(self) -> None:
        batch, dim, states = self.size(1, 2, 3, 5), self.size(1, 2, 4, 8, 12, 17), self.size(1, 2, 3, 8, 16, 17)
        entries = self.draw_indices(batch)
        self.add("state", self.normal(entries, dim, states))
        softplus = self.options["dt_softplus"] = self.maybe(0.6)
        dt = self.normal(batch, dim)
        self.add("x", self.normal(batch, dim), self.dtype, self.dtype)
        self.add("dt", (dt * self.rng.choice((1, 1, 12)) if softplus else 0.4 * dt.abs()), self.dtype, self.dtype)
        self.add("A", -self.uniform(dim, states) * self.rng.choice((0.1, 1, 8)))
        for name in ("B", "C"):
            groups = self.rng.choice([g for g in range(1, dim + 1) if dim % g == 0] or [1])
            shape = self.rng.choice(((batch, states), (batch, groups, states)))
            self.add(name, self.normal(*shape), self.dtype, self.dtype)
        for name in ("D", "dt_bias"):
            if self.maybe(0.5):
                self.add(name, self.uniform(dim))
        if self.maybe(0.5):
            self.add("z", self.normal(batch, dim), self.dtype, self.dtype)
        self.cotangent("out", batch, dim)

    def call(self, tensors: Tensors) -> Tensors:
        return self.update(parrot_kernels.selective_state_update, tensors)

    def oracle(self, tensors: Tensors) -> Tensors:
        return self.step(state_update_oracle, tensors, dt_softplus=self.options["dt_softplus"])


class CausalConv1dUpdate(Update):
    kind = "conv"

    def draw(self) -> None:
        batch, dim, taps = self.size(1, 2, 3, 5), self.size(1, 2, 3, 8, 17), self.rng.choice((1, 2, 3, 4, 4, 6))
        kept = max(1, taps - 1) + self.rng.choice((0, 0, 1, 4))
        entries = self.draw_indices(batch)
        steps = self.rng.choice(((), (), (1,), (2,), (3,), (9,), (0,)))
        self.options["activation"] = self.rng.choice((None, "silu", "swish"))
        if self.maybe(0.4):
            self.options["cache_seqlens"] = self.integers(0, 40, batch)
        self.add("x", self.normal(batch, dim, *steps), self.dtype, self.dtype)
        self.add("state", self.normal(entries, dim, kept))
        self.add("weight", self.normal(dim, taps))
        if self.maybe(0.5):
            self.add("bias", self.normal(dim))
        self.cotangent("out", batch, dim, *steps)

    def call(self, tensors: Tensors) -> Tensors:
        return self.update(parrot_kernels.causal_conv1d_update, tensors)

    def oracle(self, tensors: Tensors) -> Tensors:
        single = tensors["x"].dim() == 2

        def function(x: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
            out, state = conv_update_oracle(x.unsqueeze(-1) if single else x, **inputs)
            return (out.squeeze(-1) if single else out), state

        options = {"activation": self.options["activation"], "seen": self.options.get("cache_seqlens")}
        return self.step(function, tensors, **options)


CASES: dict[str, Callable[[Random], Case]] = {
    "sinkhorn_hadamard": Sinkhorn,
    "selective_scan": SelectiveScan,
    "causal_conv1d": CausalConv1d,
    "sinkhorn_plan": SinkhornPlan,
    "selective_state_update": SelectiveStateUpdate,
    "causal_conv1d_update": CausalConv1dUpdate,
    "sinkhorn_transport": SinkhornTransport,
    "sinkhorn_divergence": SinkhornDivergence,
    "parallel_branch_fusion": ParallelBranchFusion,
}
