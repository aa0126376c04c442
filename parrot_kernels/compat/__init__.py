"""Drop-in signatures of other packages: mamba-ssm, causal-conv1d, and the Mamba-1 models of transformers."""

from __future__ import annotations

from .installation import install, uninstall

__all__ = ["install", "uninstall"]
