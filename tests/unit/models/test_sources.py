"""Sources: names, factories and weights, with everything hostile or broken refused in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgeflex.errors import InputError
from edgeflex.images import open_images
from edgeflex.models import load_module, zoo
from tests.builders import needed_data


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_an_unknown_zoo_name_gets_its_nearest() -> None:
    with pytest.raises(InputError, match="resnet20"):
        load_module("zoo:resnet21")


@pytest.mark.parametrize("name", zoo.names())
def test_zoo_networks_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, two, other = zoo.build(name, seed=3), zoo.build(name, seed=3), zoo.build(name, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    values = list(one.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(values, two.state_dict().values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(values, other.state_dict().values(), strict=True))


def test_weights_load_from_every_format_and_wrapping(tmp_path: Path) -> None:
    state = zoo.build("digits-cnn", seed=9).state_dict()
    prefixed = {f"module.{name}": value for name, value in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"state_dict": prefixed, "epoch": 3}, tmp_path / "c.th")
    for name in ("a.safetensors", "b.pt", "c.th"):
        loaded = load_module("zoo:digits-cnn", tmp_path / name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())


@pytest.mark.parametrize("style", ["zip", "raw", "protocol0"])
def test_weights_with_code_are_refused_and_nothing_runs(tmp_path: Path, style: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    if style == "zip":
        torch.save({"state_dict": {"a": Hostile(marker)}}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(marker), protocol=0 if style == "protocol0" else 4))
    with pytest.raises(InputError, match=r"refused.*run code.*system"):
        load_module("zoo:resnet20", path)
    assert not marker.exists()


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    save_file({"a": torch.ones(1000)}, tmp_path / "whole.safetensors")
    for whole in ("whole.pt", "whole.safetensors"):
        raw = (tmp_path / whole).read_bytes()
        for size in (0, 7, len(raw) // 2):
            path = tmp_path / f"cut{size}{Path(whole).suffix}"
            path.write_bytes(raw[:size])
            with pytest.raises(InputError, match="damaged"):
                load_module("zoo:resnet20", path)


def test_all_misfits_stand_in_one_error(tmp_path: Path) -> None:
    state = zoo.build("digits-cnn").state_dict()
    del state["trunk.0.conv.weight"]
    state["stray"] = torch.ones(1)
    state["head.weight"] = torch.ones(7, 64)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as error:
        load_module("zoo:digits-cnn", tmp_path / "w.safetensors")
    for part in ("missing: trunk.0.conv.weight", "unexpected: stray", "head.weight (7, 64) instead of (10, 64)"):
        assert part in str(error.value)


def test_weights_that_are_absent_or_no_state_dict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not exist"):
        load_module("zoo:resnet20", tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="not a state dict"):
        load_module("zoo:resnet20", tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(InputError, match="no tensor under epoch"):
        load_module("zoo:resnet20", tmp_path / "epoch.pt")


def test_a_factory_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from torch import nn
def tiny(num_classes=2):
    return nn.Linear(4, num_classes)
def text():
    return "x"
def fails():
    raise ValueError("no data")
"""
    (tmp_path / "own_model_of_test.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    made = load_module("own_model_of_test:tiny", classes=5)
    assert isinstance(made, nn.Linear)
    assert made.out_features == 5
    for factory, reason in (("text", "returned a str"), ("tinny", "tiny"), ("fails", "no data")):
        with pytest.raises(InputError, match=reason):
            load_module(f"own_model_of_test:{factory}")


@pytest.mark.parametrize("model", ["resnet20", "no.such.module:f", ":", "zoo:"])
def test_models_that_name_nothing_are_refused(model: str) -> None:
    with pytest.raises(InputError):
        load_module(model)


@pytest.mark.needs_data
@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet32-d509ac18.th", "resnet56-4bfd9763.th"])
def test_published_checkpoints_load_and_classify(file: str) -> None:
    name = file.split("-", maxsplit=1)[0]
    module = load_module(f"zoo:{name}", needed_data("resnet-cifar10", file))
    images = open_images(needed_data("cifar10-jpeg", "dev.zip"))
    chosen = np.arange(0, len(images), 25)
    with torch.no_grad():
        logits = module(torch.from_numpy(images.load(chosen, zoo.preprocessing(name))))
    assert float((logits.argmax(1).numpy() == images.labels[chosen]).mean()) > 0.75
