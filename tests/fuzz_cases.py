"""The random cases of fuzz_ops.py: one class per op, which draws everything from one random.Random."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from fuzz_case import Case, Tensors
from fuzz_transport import ParallelBranchFusion, Sinkhorn, SinkhornDivergence, SinkhornPlan, SinkhornTransport
from torch import Tensor

import parrot_kernels
from parrot_kernels.reference.causal_conv1d import causal_conv1d as conv_oracle
from parrot_kernels.reference.causal_conv1d_update import causal_conv1d_update as conv_update_oracle
from parrot_kernels.reference.selective_scan import selective_scan as scan_oracle
from parrot_kernels.reference.selective_state_update import selective_state_update as state_update_oracle


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
