"""Checks one installed copy of parrot-kernels: every op and module, outputs and gradients, against the reference.

Run by tests/install_matrix.py inside of each environment: ``python -I tests/install_smoke.py cpu`` (the backend that
must serve: cpu or torch). ``... without-torch EXTENSION`` calls the compiled kernels on NumPy arrays instead, in an
interpreter that has no torch: what they are built with and what runs them is independent of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


def with_torch(expected: str) -> list[str]:
    """The names of what was checked; raises at the first difference."""
    import torch

    import parrot_kernels as pk
    from parrot_kernels import backends

    checked = []

    def same(name: str, call: Callable[..., object], *shapes: tuple[int, ...]) -> None:
        """Outputs and gradients of ``call`` by the chosen backend and by the reference, in float64."""
        torch.manual_seed(0)
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        results = []
        for backend in (None, "torch"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = call(*leaves, backend=backend)
            out.square().sum().backward()
            results.append([out.detach(), *(t.grad for t in leaves)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        checked.append(name)

    for op in backends.IMPLEMENTED:
        got = backends.select(op, "cpu", torch.float32)
        if got != expected:
            raise SystemExit(f"{op}: the {got} backend serves, {expected} was expected")

    points = (2, 5, 3), (2, 4, 3)
    same("sinkhorn_hadamard", lambda x, y, backend: pk.sinkhorn_hadamard(x, y, backend=backend).x_hadamard, *points)
    same("sinkhorn_plan", pk.sinkhorn_plan, *points)
    same("sinkhorn_transport", lambda x, y, backend: pk.sinkhorn_transport(x, y, backend=backend)[0], *points)
    same("sinkhorn_divergence", pk.sinkhorn_divergence, *points)
    same("parallel_branch_fusion", pk.parallel_branch_fusion, (2, 5, 3), (2, 5, 3))

    def scan(u, delta, A, B, C, backend):
        return pk.selective_scan(u, delta, -A.exp(), B, C, delta_softplus=True, backend=backend)

    same("selective_scan", scan, (2, 4, 7), (2, 4, 7), (4, 3), (2, 3, 7), (2, 3, 7))
    same("causal_conv1d", pk.causal_conv1d, (2, 4, 7), (4, 3))

    def step(state: torch.Tensor, inputs: torch.Tensor, backend: str | None) -> list[torch.Tensor]:
        x, A, B = torch.linspace(-1, 1, 8).reshape(2, 4), -torch.ones(4, 3), torch.ones(2, 3)
        out = pk.selective_state_update(state, x, x.abs(), A, B, B, backend=backend)
        return [out, state, pk.causal_conv1d_update(x, inputs, torch.ones(4, 3), backend=backend), inputs]

    results = [step(torch.ones(2, 4, 3), torch.ones(2, 4, 2), backend) for backend in (None, "torch")]
    torch.testing.assert_close(*results)
    checked += ["selective_state_update", "causal_conv1d_update"]

    sequence, vectors = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    for module in (pk.Mamba(16), pk.BiMamba(16)):
        module(sequence).sum().backward()
    pk.SinkhornHadamard()(sequence, vectors)
    pk.SinkhornDivergence()(sequence, vectors)
    pk.ParallelBranchFusion()(sequence, vectors)
    checked.append("modules")

    from parrot import Parrot

    Parrot(dims=(32, 16), n_classes=6)(torch.randn(8, 32), torch.randn(8, 16)).sum().backward()
    checked.append("Parrot")
    return checked + _with_transformers()


def _with_transformers() -> list[str]:
    """Logits and gradients of transformers' Mamba on our kernels and on its own slow path, where it is installed."""
    import importlib.util

    import torch

    if importlib.util.find_spec("transformers") is None:
        return []
    import transformers

    import parrot_kernels.compat.transformers as fast

    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8)
    model, tokens = transformers.MambaForCausalLM(config), torch.randint(50, (2, 13))
    results = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            fast.enable()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad.clone() for p in model.parameters())])
    fast.disable()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    return [f"transformers {transformers.__version__}"]


class Array:
    """A NumPy array as the extension wants it: with torch's names for address and strides."""

    def __init__(self, values) -> None:
        self.values, self.dtype, self.shape = values, values.dtype.type, values.shape

    def data_ptr(self) -> int:
        return self.values.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.values.itemsize for step in self.values.strides)


def without_torch(path: str) -> list[str]:
    """Run compiled kernels on NumPy arrays and compare them with formulas written out here."""
    import importlib.util

    import numpy as np

    if importlib.util.find_spec("torch") is not None:
        raise SystemExit("torch is installed here")
    spec = importlib.util.spec_from_file_location("parrot_kernels._C", path)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    for code, dtype in ((0, np.float32), (1, np.float64), (4, np.int32), (6, np.bool_)):
        extension.register_dtype(dtype, code)

    random = np.random.default_rng(0)
    x, weight = random.standard_normal((2, 4, 7)), random.standard_normal((4, 3))
    out, state = np.empty_like(x), np.empty((2, 4, 2))
    absent = dict.fromkeys(("bias", "lengths", "seq_idx", "initial_state"))
    arrays = {"x": x, "weight": weight, "out": out, "final_state": state}
    arguments = {name: Array(values) for name, values in arrays.items()}
    extension.causal_conv1d_forward(**arguments, **absent, silu=False, reverse=False, num_threads=2)
    padded = np.pad(x, ((0, 0), (0, 0), (2, 0)))
    np.testing.assert_allclose(out, sum(weight[:, k, None] * padded[..., k : k + 7] for k in range(3)), rtol=1e-12)

    x, y, eps, n_iters = random.standard_normal((1, 6, 3)), random.standard_normal((1, 5, 3)), 0.5, 20
    shapes = {"x_to_y": (1, 5, 3), "y_to_x": (1, 6, 3), "f": (1, 6), "g": (1, 5), "plan": (1, 6, 5)}
    shapes |= dict.fromkeys(("transport_cost", "error", "scale"), (1,))
    arrays = {name: np.empty(shape) for name, shape in shapes.items()}
    arrays |= {
        "x": x,
        "y": y,
        "eps": np.array([eps]),
        "iterations": np.empty(1, np.int32),
        "converged": np.empty(1, bool),
    }
    absent = ("a", "b", "x_lengths", "y_lengths", "cost_matrix", "x_hadamard", "y_hadamard", "f_history", "g_history")
    extension.sinkhorn_hadamard_forward(
        **{name: Array(values) for name, values in arrays.items()},
        **dict.fromkeys((*absent, "tol", "rho_x", "rho_y")),
        cost="sqeuclidean", cost_scale=1.0, n_iters=n_iters, num_threads=2,
    )  # fmt: skip
    kernel = np.exp(-((x[0][:, None] - y[0]) ** 2).sum(-1) / eps)
    v = np.ones(5)
    for _ in range(n_iters):
        u = (1 / 6) / (kernel @ v)
        v = (1 / 5) / (kernel.T @ u)
    np.testing.assert_allclose(arrays["plan"][0], u[:, None] * kernel * v, rtol=1e-9)
    return ["causal_conv1d", "sinkhorn_hadamard", "without torch"]


if __name__ == "__main__":
    print(
        "checked:", ", ".join(without_torch(sys.argv[2]) if sys.argv[1] == "without-torch" else with_torch(sys.argv[1]))
    )
