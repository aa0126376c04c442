"""Trained models as folders: ``model.safetensors``, ``config.json`` and a model card, as the Hugging Face Hub has them.

Only tensors and JSON are read, so that nothing in a folder from elsewhere is executed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch
from torch import nn

from parrot.files import write_atomically

try:
    from huggingface_hub import ModelHubMixin
except ImportError:  # of the extra `train`: without it models are built and used, but neither saved nor loaded

    class ModelHubMixin:  # type: ignore[no-redef]
        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()


if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1  # of config.json; raised when older versions could not read what is written
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
KEYS = {"format", "written_by", "architecture", "arguments", "description", "weights_sha256"}


class Shareable(
    ModelHubMixin,
    library_name="parrot-kernels",
    pipeline_tag="audio-classification",
    tags=["speech-emotion-recognition", "optimal-transport"],
    paper_url="https://arxiv.org/abs/2506.01138",
):
    """What saves and loads a model; a base class beside ``nn.Module``.

    ``push_to_hub(repo_id)`` is that of huggingface_hub's ``ModelHubMixin``. It and ``from_pretrained(download=True)``
    are all that touches the network.

    Attributes:
        description: what a user of a trained model must know beside its weights, JSON-able. Training writes
            "system", "labels" (the names of the classes, in their order), "encoders" (spec, name, embedding_dim,
            fingerprint, sample_rate, normalisation of each), "corpus", "synthetic", "batch_size" and "key" (a hash of
            all that determined the weights).
        card: the model card, Markdown with the Hub's header; None where there is none yet.
    """

    description: dict[str, Any]
    card: str | None = None
    classes: ClassVar[dict[str, type[Shareable]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Shareable.classes[cls.__name__] = cls

    def arguments(self) -> dict[str, Any]:
        """The arguments that build this model, as JSON-able values."""
        raise NotImplementedError

    @classmethod
    def build(cls, arguments: dict[str, Any]) -> Self:
        """The model, untrained, that :meth:`arguments` describes."""
        from parrot.model import ParrotConfig

        config = dict(arguments["config"])
        return cls(**{**arguments, "config": ParrotConfig(**{**config, "filters": tuple(config["filters"])})})

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **options: Any
    ) -> str | None:
        """Write the model into a folder; each file appears whole or not at all.

        Args:
            save_directory: the folder, made if need be. A card that is there is kept unless the model has its own.
            repo_id: with ``push_to_hub``, the repository; the folder's name by default.
            push_to_hub: upload the model as well.
            options: of ``push_to_hub``.

        Returns:
            The address of the commit with ``push_to_hub``, else None.
        """
        from safetensors.torch import save

        from parrot.card import plain_card

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = save({name: value.detach().cpu().contiguous() for name, value in self._module.state_dict().items()})
        config = {
            "format": FORMAT,
            "written_by": _version(),
            "architecture": type(self).__name__,
            "arguments": self.arguments(),
            "description": getattr(self, "description", {}),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        # Before anything is written, since these may fail
        document = (json.dumps(config, indent=2) + "\n").encode()
        card = self.card or (None if (folder / CARD).exists() else plain_card(config))
        write_atomically(folder / WEIGHTS, weights)
        write_atomically(folder / CONFIG, document)
        if card is not None:
            write_atomically(folder / CARD, card.encode())
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]  (no network unless asked)
        cls,
        folder_or_id: str | Path,
        *,
        download: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """The model in a folder that :meth:`save_pretrained` wrote, on the CPU, in evaluation mode.

        Args:
            folder_or_id: the folder, or the id of a Hub repository that is in the cache of this machine.
            download: fetch the repository; without it nothing touches the network.
            revision, cache_dir, token: of the repository, as in huggingface_hub.

        Raises:
            ValueError: there is no such folder; a file is missing, truncated or damaged; the folder is of a newer
                version; or weights and configuration do not belong together.
        """
        import parrot.model  # noqa: F401 (its classes make themselves known)

        folder = _folder(folder_or_id, download, revision=revision, cache_dir=cache_dir, token=token)
        config = read_config(folder)
        kind = Shareable.classes.get(str(config["architecture"]))
        if kind is None or not issubclass(kind, cls):
            _fail(
                folder,
                f"it holds a model of class {config['architecture']!r}, wanted {cls.__name__}. "
                "parrot.from_pretrained loads every class.",
            )
        weights = _read_weights(folder, config["weights_sha256"])
        model = _built(folder, kind, config["arguments"], weights)
        model._module.load_state_dict(weights)
        labels, outputs = config["description"].get("labels"), config["arguments"].get("n_classes")
        if labels is not None and not isinstance(labels, list):
            _fail(folder, f"{CONFIG} must hold a list as `labels`.")
        if labels is not None and len(labels) != outputs:
            _fail(folder, f"{CONFIG} names {len(labels)} labels, the model has {outputs} classes.")
        model.description = config["description"]
        card = folder / CARD
        model.card = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
        model._module.eval()
        return model

    @property
    def _module(self) -> nn.Module:
        return cast(nn.Module, self)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked content of ``config.json``.

    Raises:
        ValueError: it is missing, damaged, of a newer version, or not of a model of ours.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _fail(folder, f"{CONFIG} is missing. Name the folder that `save_pretrained` wrote, of a run its folder model.")
    except (ValueError, OSError, RecursionError) as error:
        _fail(folder, f"{CONFIG} is damaged: {error}.")
    if not isinstance(config, dict) or "written_by" not in config or not isinstance(config.get("format"), int):
        _fail(folder, f"{CONFIG} is not that of a parrot-kernels model.")
    if config["format"] > FORMAT:
        _fail(
            folder,
            f"it was written by {config['written_by']}, format {config['format']}; {_version()} reads formats up to "
            f"{FORMAT}. Upgrade parrot-kernels.",
        )
    if missing := sorted(KEYS - config.keys()):
        _fail(folder, f"{CONFIG} lacks {', '.join(missing)}.")
    if unknown := sorted(config.keys() - KEYS):
        _fail(folder, f"{CONFIG} has unknown entries: {', '.join(unknown)}.")
    if not isinstance(config["arguments"], dict) or not isinstance(config["description"], dict):
        _fail(folder, f"{CONFIG} must hold objects as `arguments` and `description`.")
    return config


def _folder(folder_or_id: str | Path, download: bool, **options: Any) -> Path:
    """The local folder of a model."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_id)
    if folder.exists() or isinstance(folder_or_id, Path) or not HUB_ID.fullmatch(name):
        raise ValueError(f"from_pretrained: {name} is no folder. Name the one that `parrot train` wrote: .../model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = [CONFIG, WEIGHTS, CARD]
    try:
        return Path(snapshot_download(name, local_files_only=not download, allow_patterns=wanted, **options))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"from_pretrained: there is no folder {name}, and no repository of this id in the Hub's cache. Pass "
            f"download=True (--download) to fetch it.{f' It failed: {error}' if download else ''}"
        ) from None


def _read_weights(folder: Path, sha256: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    from parrot.encoders.checkpoint import check_file

    path = folder / WEIGHTS
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        hint = f" {others[0]} is not read: a pickle can hold code." if others else ""
        _fail(folder, f"{WEIGHTS} is missing.{hint}")
    check_file(path, "from_pretrained")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        _fail(folder, f"{WEIGHTS} is not the file that {CONFIG} describes. Save or fetch both again.")
    try:
        return load(data)
    except SafetensorError as error:
        _fail(folder, f"{WEIGHTS} is damaged: {error}.")


def _built(folder: Path, kind: type[Shareable], arguments: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """The untrained model, known to fit the weights before memory is taken for it."""
    from parrot.encoders.checkpoint import first, mismatches

    try:
        with torch.device("meta"):
            expected = kind.build(arguments)._module.state_dict()
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        _fail(folder, f"{CONFIG} describes no {kind.__name__}: {error}")
    if problems := mismatches(weights, expected):
        _fail(folder, f"its weights are not those of the model {CONFIG} describes: {first(problems)}.")
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        return kind.build(arguments)


def _version() -> str:
    try:
        return f"parrot-kernels {importlib.metadata.version('parrot-kernels')}"
    except importlib.metadata.PackageNotFoundError:
        return "parrot-kernels"


def _fail(folder: Path, why: str) -> NoReturn:
    raise ValueError(f"from_pretrained: {folder} can't be loaded: {why}")
