"""Models as folders: what is saved comes back, and nothing else is let in."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch

import parrot
from parrot.model import VARIANTS, Parrot, SingleEncoderClassifier, build
from parrot.sharing import CARD, CONFIG, WEIGHTS, Shareable

huggingface_hub = pytest.importorskip("huggingface_hub")
DIMS, LABELS = (12, 9), ["angry", "calm", "sad"]


def make(name="parrot", description=True):
    torch.manual_seed(0)
    model = build(name, DIMS, len(LABELS)).eval()
    if name == "parrot-reference":
        model.set_reference(*features(model.config.reference_size))
    if description:
        model.description = {"labels": LABELS, "system": name}
    return model


def features(rows=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, dim, generator=generator) for dim in DIMS]


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **entries):
    """Change config.json."""
    config = json.loads((folder / CONFIG).read_text())
    for key, value in entries.items():
        config.pop(key) if value is None else config.update({key: value})
    (folder / CONFIG).write_text(json.dumps(config))


def fails(folder, match, cls=Parrot):
    with pytest.raises(ValueError, match=match) as caught:
        cls.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["parrot", "concat", "ot", "fcn-0", "cnn-1", "parrot-reference", "parrot-unbalanced"])
def test_what_is_saved_comes_back(name, tmp_path):
    model = make(name).train()
    model.save_pretrained(tmp_path / "new" / "model")
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == sorted([CARD, CONFIG, WEIGHTS])
    generator = torch.get_rng_state()
    again = parrot.from_pretrained(tmp_path / "new" / "model")
    assert torch.equal(torch.get_rng_state(), generator)
    assert type(again) is type(model)
    assert not again.training
    assert again.arguments() == model.arguments()
    assert again.description == model.description
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(*features()), model.eval()(*features()))


def test_every_option_of_the_configuration_is_kept(tmp_path):
    for name, config in VARIANTS.items():
        model = build(name, DIMS, 3)
        model.save_pretrained(tmp_path / name)
        assert parrot.from_pretrained(tmp_path / name).config == config


def test_a_class_loads_its_own_models_only(tmp_path):
    make("fcn-1").save_pretrained(tmp_path)
    assert SingleEncoderClassifier.from_pretrained(tmp_path).encoder == 1
    fails(tmp_path, "holds a model of class 'SingleEncoderClassifier', wanted Parrot")


def test_saving_again_keeps_a_card_and_replaces_a_model(folder):
    (folder / CARD).write_text("mine")
    other = make("concat", description=False)
    other.save_pretrained(folder)
    assert (folder / CARD).read_text() == "mine"
    again = Parrot.from_pretrained(folder)
    assert again.config.fusion == "concat"
    assert again.card == "mine"
    again.card = "new"
    again.save_pretrained(folder)
    assert (folder / CARD).read_text() == "new"


def test_files_other_than_ours(folder, tmp_path):
    fails(tmp_path, "config.json is missing. Name the folder that `save_pretrained` wrote, of a run its folder model")
    fails(folder / CONFIG, "is no folder")
    fails(tmp_path / "nothing", "is no folder")
    (folder / CONFIG).write_text("{")
    fails(folder, "config.json is damaged")
    (folder / CONFIG).write_text('{"model_type": "bert"}')
    fails(folder, "not that of a parrot-kernels model")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"format": 99, "written_by": "parrot-kernels 7.0"}, "written by parrot-kernels 7.0, format 99;.*Upgrade"),
        ({"weights_sha256": None}, "config.json lacks weights_sha256"),
        ({"colour": "red"}, "unknown entries: colour"),
        ({"arguments": [1]}, "must hold objects"),
        ({"architecture": "Falcon"}, "class 'Falcon', wanted Parrot"),
        ({"arguments": {"dims": [12, 9], "n_classes": 3}}, "describes no Parrot"),
        ({"description": {"labels": ["angry"]}}, "names 1 labels, the model has 3 classes"),
        ({"weights_sha256": "0" * 64}, "is not the file that config.json describes"),
    ],
)
def test_configurations_that_are_refused(folder, entries, match):
    edit(folder, **entries)
    fails(folder, match)


def test_an_option_of_the_model_that_this_version_lacks(folder):
    arguments = make().arguments()
    edit(folder, arguments={**arguments, "config": {**arguments["config"], "temperature": 2}})
    fails(folder, "describes no Parrot: .*temperature")


def test_sizes_are_compared_before_memory_is_taken(folder):
    arguments = make().arguments()
    edit(folder, arguments={**arguments, "dims": [12, 4_000_000_000]})
    fails(folder, r"weights are not those of the model.*streams\.1\.1\.weight of shape")


def resave(folder, weights):
    """Other weights, with a hash that fits."""
    import hashlib

    from safetensors.torch import save

    data = save(weights)
    (folder / WEIGHTS).write_bytes(data)
    edit(folder, weights_sha256=hashlib.sha256(data).hexdigest())


def test_missing_and_extra_tensors(folder):
    weights = dict(make().state_dict())
    resave(folder, {**weights, "extra": torch.zeros(2)})
    fails(folder, "unexpected extra")
    weights.pop("classifier.0.bias")
    resave(folder, weights)
    fails(folder, "missing classifier.0.bias")


def test_truncated_weights(folder):
    data = (folder / WEIGHTS).read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 4, 0):
        (folder / WEIGHTS).write_bytes(data[:size])
        fails_at = "truncated" if size else "empty"
        with pytest.raises(ValueError, match=fails_at):
            Parrot.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        Parrot.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    fails(folder, "model.safetensors is missing")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_never_run(folder, tmp_path):
    data = pickle.dumps(Hostile(str(tmp_path / "ran")))
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="no safetensors file"):
        Parrot.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(data)
    fails(folder, "model.safetensors is missing. pytorch_model.bin is not read: a pickle can hold code")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_saved_model_as_it_was(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make("concat").save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_interruption_between_the_files_is_noticed(folder, monkeypatch):
    from parrot import sharing

    def stop_at_the_second(path, data):
        if path.name == CONFIG:
            raise KeyboardInterrupt
        path.write_bytes(data)

    torch.manual_seed(5)
    monkeypatch.setattr(sharing, "write_atomically", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        build("parrot", DIMS, 3).save_pretrained(folder)
    fails(folder, "is not the file that config.json describes")


def test_the_network_is_not_touched_unless_asked(tmp_path, monkeypatch):
    calls = []

    def snapshot(name, *, local_files_only, **options):
        calls.append((name, local_files_only, options["revision"]))
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match=r"no repository of this id in the Hub's cache. Pass download=True"):
        parrot.from_pretrained("someone/emotions")
    make().save_pretrained(tmp_path)
    model = parrot.from_pretrained("someone/emotions", download=True, revision="v2")
    assert model.description["labels"] == LABELS
    assert calls == [("someone/emotions", True, None), ("someone/emotions", False, "v2")]


def test_push_to_hub_uploads_the_folder_as_it_is_saved(monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **_):
            uploaded.update({p.name: p.read_bytes() for p in folder_path.iterdir()})
            model = Parrot.from_pretrained(folder_path)
            assert model.card == "# Emotions"
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = make()
    model.card = "# Emotions"
    assert isinstance(model, huggingface_hub.ModelHubMixin)
    assert model.push_to_hub("someone/emotions").endswith("commit/1")
    assert sorted(uploaded) == sorted([CARD, CONFIG, WEIGHTS])


def test_models_are_built_without_the_hub_library():
    program = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import torch; from parrot import Parrot\n"
        "print(Parrot((12, 9), 3)(torch.ones(2, 12), torch.ones(2, 9)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([2, 3])", done.stderr


@pytest.mark.parametrize(
    ("name", "wanted"), [("fcn-0", "(batch, width) tensors"), ("parrot-frames", "(batch, frames, width) tensors, or")]
)
def test_a_card_says_what_the_model_takes(name, wanted, tmp_path):
    make(name).save_pretrained(tmp_path)
    assert f"logits = model(*features)  # one per encoder: {wanted}" in (tmp_path / CARD).read_text()


def test_a_plain_card_has_a_header_the_hub_reads(folder):
    text = (folder / CARD).read_text()
    header = huggingface_hub.ModelCard(text).data
    assert header.library_name == "parrot-kernels"
    assert header.pipeline_tag == "audio-classification"
    assert "Labels: angry, calm, sad." in text
    assert "does not say what the model was trained on" in text
    assert Shareable.from_pretrained(folder).card == text
