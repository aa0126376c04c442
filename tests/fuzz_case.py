"""What every random case of fuzz_ops.py has: how inputs, their strides and their padding are drawn."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

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

    def cancelling(self, name: str) -> float:
        """How many times larger than a gradient the terms may be that cancel in it."""
        return 1.0

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
