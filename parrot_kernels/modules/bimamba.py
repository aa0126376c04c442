"""The bidirectional Mamba-1 block as a module whose state dict is that of Vim's version 2."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from .mamba import MambaBlock


class BiMamba(MambaBlock):
    r"""Bidirectional Mamba-1 block of Vim (Zhu et al. 2024, arXiv 2401.09417, algorithm 1), "v2" in its code.

    With :math:`[x, z] = W_{in} u` and, in each direction, convolution, projections, A and D of its own
    (see `Mamba`)::

        out_t = W_out (forward(x, z)_t + backward(x, z)_t) / 2

    where backward runs, from the last valid step to the first, in kernels that read the sequence in place: nothing
    is flipped. Parameters have the names and shapes of Vim's and SSAMBA's checkpoints, those of the backward
    direction being A_b_log, D_b, conv1d_b, x_proj_b and dt_proj_b. Both directions are initialised as `Mamba` (Vim
    leaves dt_proj_b at the default of a linear layer). Unlike `Mamba` it takes whole sequences only: what comes later
    changes every output, so there is no `step` and no cache.

    Args:
        arguments, options: of `Mamba`.
        if_divide_out: halve the sum of the two directions.
        if_devide_out: SSAMBA's and older Vim's spelling of it; counts where given.
    """

    suffixes = ("", "_b")

    def __init__(
        self, *arguments: Any, if_divide_out: bool = True, if_devide_out: bool | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.if_divide_out = if_divide_out if if_devide_out is None else if_devide_out

    def forward(self, hidden: Tensor, *, lengths: Tensor | None = None, seq_idx: Tensor | None = None) -> Tensor:
        """Run the block over a batch of sequences.

        Args:
            hidden: (B, L, d_model), in the dtype of the projections.
            lengths: (B,) int; what lies at and past a sequence's length is not read. The output there is zero (the
                output projection's bias, if it has one), and the gradient is exactly zero.
            seq_idx: (B, L) int; sequences packed along L, both states start afresh where the index changes.

        Returns:
            (B, L, d_model).

        Raises:
            TypeError: ``lengths`` is not a tensor of integers.
            ValueError: ``hidden`` is not (B, L, d_model), ``lengths`` not (B,).
        """
        x, z = self._project_in("hidden", hidden, lengths)
        forward, _ = self._mix(x, z, "", lengths=lengths, seq_idx=seq_idx)
        backward, _ = self._mix(x, z, "_b", reverse=True, lengths=lengths, seq_idx=seq_idx)
        y = forward + backward
        return self._project_out(y / 2 if self.if_divide_out else y)

    def step(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raises NotImplementedError, as does `allocate_inference_cache`."""
        raise NotImplementedError(
            "BiMamba: a bidirectional block can't run step by step, since its outputs depend on what follows. Call it "
            "on the whole sequence, or use Mamba, which is causal."
        )

    allocate_inference_cache = step
