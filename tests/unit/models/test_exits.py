"""Exits: what fitting promises, resuming, saving, and refusal of what does not fit."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.images import ImageFolder, open_images
from edgeflex.models import (
    DynamicModel,
    HeadSpec,
    Recipe,
    Tuning,
    assemble,
    fit_exits,
    graph_from_module,
    heads,
    load_module,
    open_model,
    save_model,
    zoo,
)
from edgeflex.models.training import TrainableHead, joint_loss, train

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgeflex.progress import Advance

STAGES = ("trunk.1", "trunk.3")
INPUT = zoo.preprocessing("digits-cnn")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageFolder, ImageFolder]:
    folder = tmp_path_factory.mktemp("digits")
    zoo.write_digits(folder)
    return open_images(folder / "train"), open_images(folder / "dev")


@pytest.fixture(scope="module")
def trunk(digits: tuple[ImageFolder, ImageFolder]) -> nn.Module:
    return zoo.train_digits(digits[0], epochs=4, seed=1)


@pytest.fixture(scope="module")
def fitted(digits: tuple[ImageFolder, ImageFolder], trunk: nn.Module) -> DynamicModel:
    return fit(trunk, digits[0])


def fit(module: nn.Module, images: ImageFolder, **changes: object) -> DynamicModel:
    given = {"source": "zoo:digits-cnn", "epochs": 15, "seed": 2} | changes
    stages, head = given.pop("stages", STAGES), given.pop("head", HeadSpec())
    return fit_exits(module, stages, head, images, INPUT, **given)  # type: ignore[arg-type]


def accuracies(model: DynamicModel, images: ImageFolder) -> list[float]:
    x = torch.from_numpy(images.load(range(len(images)), INPUT))
    return [float((part.argmax(1).numpy() == images.labels).mean()) for part in model.exit_logits(x)]


def same(a: DynamicModel, b: DynamicModel) -> bool:
    return a.graph.weights_digest == b.graph.weights_digest and a.graph == b.graph


class Interrupting:
    """Progress that raises KeyboardInterrupt after so many advances."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        yield self._advance

    def _advance(self, count: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        pass


def test_digits_are_written_once_and_for_ever(digits: tuple[ImageFolder, ImageFolder], tmp_path: Path) -> None:
    train_part, dev_part = digits
    assert len(train_part) + len(dev_part) == 1797
    seen = {item.digest for item in train_part.items} & {item.digest for item in dev_part.items}
    assert not seen
    zoo.write_digits(tmp_path)
    assert open_images(tmp_path / "dev").digest() == dev_part.digest()


def test_every_exit_beats_chance_by_far_on_images_never_seen(
    fitted: DynamicModel, digits: tuple[ImageFolder, ImageFolder]
) -> None:
    found = accuracies(fitted, digits[1])
    assert found[0] > 0.8
    assert found[-1] > 0.95


def test_the_graph_says_what_the_segments_are(fitted: DynamicModel) -> None:
    graph = fitted.graph
    assert graph.segment_count == len(fitted.segments) == len(graph.exits) == 3
    assert [point.stage for point in graph.exits] == [*STAGES, ""]
    assert [layer.name for layer in graph.layers if layer.head] == ["exit0.linear", "exit1.linear"]
    assert [layer.segment for layer in graph.layers] == sorted(layer.segment for layer in graph.layers)
    for layer in graph.layers:
        weight = fitted.segments[layer.segment].get_submodule(layer.name).weight
        assert isinstance(weight, torch.Tensor)
        assert weight.numel() == layer.shape.weight_count
    assert graph.input_shape == (1, 16, 16)


def test_segments_take_any_batch_and_end_as_promised(fitted: DynamicModel) -> None:
    for batch in (1, 5):
        value = torch.zeros(batch, 1, 16, 16)
        for segment in fitted.segments[:-1]:
            value, logits = segment(value)
            assert logits.shape == (batch, 10)
        assert fitted.segments[-1](value).shape == (batch, 10)


def test_the_report_is_about_the_held_out_tenth(fitted: DynamicModel) -> None:
    report = fitted.recipe.report
    assert report is not None
    assert 0.05 < report.held_out_images / (report.held_out_images + report.train_images) < 0.16
    assert sum(score.share for score in report.exits) == pytest.approx(1.0)
    assert all(0.2 < score.share < 0.5 for score in report.exits)
    assert [score.temperature for score in report.exits] == [point.temperature for point in fitted.graph.exits]


def test_temperatures_are_baked_into_the_weights(trunk: nn.Module, digits: tuple[ImageFolder, ImageFolder]) -> None:
    model = fit(trunk, digits[0], refit_final=False)
    x = torch.from_numpy(digits[1].load(range(8), INPUT))
    with torch.no_grad():
        expected = trunk(x) / model.graph.exits[-1].temperature
    assert torch.allclose(model.exit_logits(x)[-1], expected, atol=1e-4)
    assert model.graph.exits[-1].temperature != 1.0


def test_fitting_leaves_the_network_as_it_was_and_depends_on_the_seed_alone(
    trunk: nn.Module, digits: tuple[ImageFolder, ImageFolder], fitted: DynamicModel
) -> None:
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    torch.manual_seed(99)
    assert same(fit(trunk, digits[0]), fitted)
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert not same(fit(trunk, digits[0], seed=7), fitted)


def test_a_saved_model_opens_as_the_same_model(fitted: DynamicModel, tmp_path: Path) -> None:
    save_model(fitted, tmp_path / "m")
    opened = open_model(tmp_path / "m")
    assert same(opened, fitted)
    assert opened.recipe == fitted.recipe
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(fitted.exit_logits(x), opened.exit_logits(x), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match="not empty"):
        save_model(fitted, tmp_path / "m")
    save_model(fitted, tmp_path / "m", overwrite=True)


def test_a_damaged_model_folder_is_refused(fitted: DynamicModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    weights, description = folder / "weights.safetensors", folder / "model.json"

    def fresh() -> None:
        save_model(fitted, folder, overwrite=True)

    with pytest.raises(InputError, match="no folder"):
        open_model(tmp_path / "none")
    fresh()
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(InputError, match="other weights"):
        open_model(folder)
    weights.write_bytes(bytes(raw[: len(raw) // 2]))
    with pytest.raises(InputError, match="damaged"):
        open_model(folder)
    weights.unlink()
    with pytest.raises(InputError, match="does not exist"):
        open_model(folder)
    fresh()
    description.write_text(description.read_text()[:-20])
    with pytest.raises(InputError, match="not a valid"):
        open_model(folder)
    fresh()
    changed = json.loads(description.read_text()) | {"stages": ["trunk.0", "trunk.3"]}
    description.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="do not fit"):
        open_model(folder)


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_a_killed_fit_goes_on_and_ends_with_the_same_weights(
    trunk: nn.Module, digits: tuple[ImageFolder, ImageFolder], fitted: DynamicModel, tmp_path: Path, after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(trunk, digits[0], journal=tmp_path, progress=Interrupting(after))
    assert same(fit(trunk, digits[0], journal=tmp_path), fitted)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_journal_of_another_fit_is_not_used(
    trunk: nn.Module, digits: tuple[ImageFolder, ImageFolder], fitted: DynamicModel, tmp_path: Path
) -> None:
    fit(trunk, digits[0], journal=tmp_path, seed=5)
    assert same(fit(trunk, digits[0], journal=tmp_path), fitted)


def test_conv_heads_train_and_survive_saving(
    trunk: nn.Module, digits: tuple[ImageFolder, ImageFolder], tmp_path: Path
) -> None:
    model = fit(trunk, digits[0], head=HeadSpec(kind="conv", channels=16), epochs=5, flip=True)
    assert [layer.name for layer in model.graph.layers if layer.head][:2] == ["exit0.conv", "exit0.linear"]
    assert accuracies(model, digits[1])[0] > 0.8
    save_model(model, tmp_path / "m")
    assert same(open_model(tmp_path / "m"), model)


@pytest.mark.slow
def test_tuning_the_trunk_lifts_an_untrained_network_and_resumes_exactly(
    digits: tuple[ImageFolder, ImageFolder], tmp_path: Path
) -> None:
    fresh = zoo.build("digits-cnn", seed=4)
    tuning = Tuning(flip=False, crop_padding=1, precision="fp32", learning_rate=0.1, batch_size=32)
    few = {"tune_trunk_epochs": 4, "tuning": tuning, "stages": ("trunk.3",)}
    whole = fit(fresh, digits[0], **few)
    assert accuracies(whole, digits[1])[-1] > 0.8
    with pytest.raises(KeyboardInterrupt):
        fit(fresh, digits[0], journal=tmp_path, progress=Interrupting(75), **few)
    assert list(tmp_path.rglob("tuning.safetensors"))
    assert same(fit(fresh, digits[0], journal=tmp_path, **few), whole)


def test_a_network_for_other_classes_gets_a_new_last_layer(digits: tuple[ImageFolder, ImageFolder]) -> None:
    images = digits[0]
    kept = tuple(item for item in images.items if item.label < 4)
    four = dataclasses.replace(images, classes=images.classes[:4], items=kept)
    model = fit(load_module("zoo:digits-cnn"), four, epochs=3)
    assert model.exit_logits(torch.zeros(1, 1, 16, 16))[-1].shape == (1, 4)
    with pytest.raises(InputError, match="re-fitted"):
        fit(load_module("zoo:digits-cnn"), four, refit_final=False)


def test_what_cannot_be_fitted_is_refused(trunk: nn.Module, digits: tuple[ImageFolder, ImageFolder]) -> None:
    images = digits[0]
    with pytest.raises(InputError, match="no stage"):
        fit(trunk, images, stages=())
    with pytest.raises(InputError, match=r"trunk\.1"):
        fit(trunk, images, stages=("trunk.10",))
    with pytest.raises(InputError, match="images leave"):
        fit(trunk, dataclasses.replace(images, items=images.items[:50]))
    with pytest.raises(UnsupportedError, match="Linear"):
        fit(NoLinear().eval(), images, stages=("conv",))


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.last = nn.Conv2d(8, 10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(functional.relu(self.conv(x)))
        return logits.flatten(1)


@pytest.mark.parametrize("shape", [(12, 6, 8), (9, 12), (12,)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_folding_a_head_changes_nothing(shape: tuple[int, ...], kind: str) -> None:
    spec = HeadSpec.model_validate({"kind": kind})
    if kind == "conv" and len(shape) != 3:
        with pytest.raises(InputError, match="conv head"):
            heads.make_head(spec, shape, 3)
        return
    torch.manual_seed(0)
    head = TrainableHead(spec, shape, 3)
    for _ in range(3):
        head(torch.randn(16, *shape) * 2 + 1)  # moves the running statistics
    x = torch.randn(4, *shape)
    head.eval()
    with torch.no_grad():
        assert torch.allclose(head.folded()(x), head(x), atol=1e-5)


def test_tokens_are_averaged_like_a_mean_over_their_axis() -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(heads.pool(x), x.mean(1), atol=1e-6)


def test_attached_heads_equal_the_head_on_the_features() -> None:
    for name, stage in (("resnet20", "layer2.0"), ("vit-small", "blocks.2")):
        recipe = Recipe(
            source=f"zoo:{name}", stages=(stage,), head=HeadSpec(), input_shape=(3, 32, 32), classes=("a", "b", "c")
        )
        model = assemble(zoo.build(name), recipe)
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        features, logits = model.segments[0](x)
        linear = model.segments[0].get_submodule("exit0.linear")
        assert torch.allclose(logits, linear(heads.pool(features)), atol=1e-5)


def test_the_joint_loss_is_the_sum_done_by_hand() -> None:
    logits = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    target = torch.tensor([1])
    plain = joint_loss(logits, target, Tuning(distillation=0.0))
    early, final = np.log1p(np.exp(1.0)), np.log1p(np.exp(-2.0))
    assert float(plain) == pytest.approx(final + 0.5 * early, rel=1e-5)
    agreeing = joint_loss([logits[1], logits[1]], target, Tuning(distillation=1.0))
    assert float(agreeing) == pytest.approx(final, rel=1e-5)


def test_a_graph_can_be_inspected_before_there_are_heads() -> None:
    graph = graph_from_module(zoo.build("resnet20"), source="zoo:resnet20", input_shape=(3, 32, 32), stages=("layer1",))
    assert graph.segment_count == 2
    assert len(graph.exits) == 1
    assert sum(layer.shape.macs for layer in graph.layers) == pytest.approx(40.8e6, rel=0.02)


def test_training_depends_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(64, 1, 16, 16)).astype(np.float32), rng.integers(0, 10, 64)
    states = []
    for _ in range(2):
        module = zoo.build("digits-cnn", seed=1)
        train(module, images, labels, epochs=1, seed=3, augment=True)
        assert not module.training
        states.append(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
