"""The processes that `accelerate launch` or `torchrun` started, on one machine or several, and what they exchange.

One process that was started plainly is a group of one: it exchanges nothing, and accelerate is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from parrot.workers import launched

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Processes that work together. Each must call the same methods in the same order.

    Attributes:
        rank: number of this process, from 0, which is the main one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank; it must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def of_main(self, value: T) -> T:
        """The main process's value."""
        if self.size == 1:
            return value
        values = [value if self.main else None]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model`` so that ``backward`` averages the gradients over the group: accelerate's data parallelism."""
        if self.size == 1:
            return model
        from accelerate import Accelerator

        on_cpu = next(model.parameters()).device.type == "cpu"
        return Accelerator(cpu=on_cpu, mixed_precision="no").prepare_model(model)

    def share_rows(self, module: nn.Module) -> Callable[[], None]:
        """Let ``module``, which works row by row, compute a part of the rows in each process, in training mode.

        It is given the same (b, ...) input everywhere and gives the same (b, ...) output, gathered from all. What
        follows then computes the same everywhere, losses too, and so the gradient that reaches the output is that of
        the whole batch already; each process takes it for its own rows, ``size`` times, and the parameters' gradients
        are right when they have been averaged over the group, as :meth:`parallel` does.

        Returns:
            What undoes it.
        """
        rows = 0

        def slice_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            nonlocal rows
            rows = len(inputs[0])
            return (inputs[0][self._own(rows)],) if module.training else None

        def gather_output(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            return _Gather.apply(output, rows, self._own(rows), self.size) if module.training else None

        if self.size == 1:
            return lambda: None
        hooks = module.register_forward_pre_hook(slice_input), module.register_forward_hook(gather_output)

        def unshare() -> None:
            for hook in hooks:
                hook.remove()

        return unshare

    def _own(self, rows: int) -> slice:
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)


class _Gather(torch.autograd.Function):
    """The rows of all processes; backward, those of this one, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: int, place: slice, size: int) -> Tensor:
        ctx.place, ctx.size = place, size
        whole = own.new_zeros(rows, *own.shape[1:])
        whole[place] = own
        torch.distributed.all_reduce(whole)  # adds zeros: exact
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.size * gradient[ctx.place], None, None, None


def leave() -> None:
    """Leave the group, if this process joined one; call it before the process ends, also after an error.

    A process that ends with its group's threads still running may be aborted by them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join(device: str = "auto") -> Group:
    """The group of processes this one was started in; call it once, before anything is put on a device.

    What joined must :func:`leave`.

    Args:
        device: "cpu" communicates by gloo; otherwise by NCCL where there is CUDA, one device per process.

    Raises:
        ImportError: a launcher started several processes, and accelerate is not installed.
    """
    if not launched():
        return Group()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError(
            "several processes were launched, and accelerate, which joins them, is not installed: "
            "pip install 'parrot-kernels[distributed]'"
        ) from error
    # A process waits for the slowest one, which may have many more hours of audio.
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
    return Group(state.process_index, state.num_processes)
