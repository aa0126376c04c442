"""Puts our stand-ins under the import names of mamba-ssm and causal-conv1d, and takes them away again."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import causal_conv1d, mamba_layers, mamba_ssm

_SCAN = (
    "selective_scan_fn",
    "selective_scan_ref",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "mamba_inner_fn_no_out_proj",
    "bimamba_inner_fn",
)
_NORMS = ("RMSNorm", "layer_norm_fn", "rms_norm_fn")
_CONVOLUTION = ("causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref")
_STATES = ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref")

# package -> (where the names live, the version whose signatures they have, module -> names)
_PACKAGES: dict[str, tuple[tuple[ModuleType, ...], str, dict[str, tuple[str, ...]]]] = {
    "mamba_ssm": (
        (mamba_ssm, mamba_layers),
        "2.2.4",
        {
            "mamba_ssm": ("selective_scan_fn", "mamba_inner_fn", "Mamba"),
            "mamba_ssm.modules": (),
            "mamba_ssm.modules.mamba_simple": ("Mamba",),
            "mamba_ssm.ops": (),
            "mamba_ssm.ops.selective_scan_interface": _SCAN,
            "mamba_ssm.ops.triton": (),
            "mamba_ssm.ops.triton.layer_norm": _NORMS,
            "mamba_ssm.ops.triton.layernorm": _NORMS,  # its name in 1.x
            "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update", "selective_state_update_ref"),
            "mamba_ssm.utils": (),
            "mamba_ssm.utils.generation": ("GenerationMixin",),
            "mamba_ssm.utils.hf": ("load_config_hf", "load_state_dict_hf"),
        },
    ),
    "causal_conv1d": (
        (causal_conv1d,),
        "1.5.0",
        {
            "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"),
            "causal_conv1d.causal_conv1d_interface": _CONVOLUTION,
            "causal_conv1d.causal_conv1d_varlen": _STATES,
        },
    ),
}

_displaced: dict[str, dict[str, ModuleType]] = {}  # package -> the modules that stood in sys.modules before


def install(*packages: str, override: bool = False) -> tuple[str, ...]:
    """Make ``import mamba_ssm`` and ``import causal_conv1d`` find parrot_kernels.

    For third-party code that imports those packages where they can't be installed. What was imported from an
    original before stays what it was.

    Args:
        packages: "mamba_ssm", "causal_conv1d"; both by default.
        override: take the place of an installed original too. Without it an original is left alone.

    Returns:
        The packages that parrot_kernels serves from now on.
    """
    served = []
    for package in packages or tuple(_PACKAGES):
        if package not in _PACKAGES:
            raise ValueError(f"install: `packages` must be among {', '.join(_PACKAGES)}; got {package!r}.")
        if package not in _displaced:
            if not override and _original_exists(package):
                continue
            _displaced[package] = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == package}
            for name in _displaced[package]:
                del sys.modules[name]
            _create(package)
        served.append(package)
    return tuple(served)


def uninstall() -> None:
    """Undo `install`: the names are gone, or those of the originals again."""
    for package, originals in _displaced.items():
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(originals)
    _displaced.clear()


def _original_exists(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _create(package: str) -> None:
    sources, version, contents = _PACKAGES[package]
    origin = sources[0].__name__
    members_of_all = {name: value for source in sources for name, value in vars(source).items()}
    for name, members in contents.items():
        module = ModuleType(name, f"Served by {origin}.")
        is_package = any(other.startswith(f"{name}.") for other in contents)
        module.__spec__ = ModuleSpec(name, loader=None, origin=origin, is_package=is_package)
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        for member in members:
            setattr(module, member, members_of_all[member])
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    vars(sys.modules[package])["__version__"] = f"{version}+parrot.kernels"
