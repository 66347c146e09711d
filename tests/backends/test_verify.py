from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeflex.bundle import EXPECTED, Bundle, seal, write_manifest
from edgeflex.errors import BundleError, InputError
from edgeflex.images import open_images
from edgeflex.runtimes import exits_for
from edgeflex.runtimes.verify import verify
from edgeflex.schema import Choice, VerifyResult
from tests.toy_bundle import (
    CLASSES,
    file_digest,
    reference_probabilities,
    toy_certificate,
    toy_graph,
    toy_plan,
    write_images,
    write_toy_bundle,
)

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.images import ImageFolder
    from edgeflex.schema import Check

PER_CLASS = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    folder = tmp_path_factory.mktemp("images") / "set"
    write_images(folder, PER_CLASS)
    return open_images(folder)


def checks_of(result: VerifyResult) -> dict[str, Check]:
    return {check.name: check for check in result.checks}


def load_all(images: ImageFolder) -> np.ndarray:
    preprocessing = toy_graph().preprocessing
    assert preprocessing is not None
    return images.load(range(len(images.items)), preprocessing)


def with_manifest(bundle: Bundle, **fields: object) -> Bundle:
    return Bundle(bundle.path, bundle.manifest.model_copy(update=fields))


def test_every_figure_is_that_of_the_reference_counted_by_hand(images: ImageFolder, tmp_path: Path) -> None:
    plan = toy_plan(thresholds=(0.8, 0.8, None), certificate=toy_certificate(0.5))
    bundle = write_toy_bundle(tmp_path / "bundle", plan=plan)
    p = reference_probabilities(load_all(images))
    labels = images.labels
    right = p.argmax(2) == labels[:, None]
    exits = exits_for(p, plan.thresholds)
    answered = [bool(right[i, e]) for i, e in enumerate(exits)]
    first_right = [next((k for k in range(3) if row[k]), 2) for row in right]
    cumulative = (1e-5, 3e-5, 6e-5)

    result = verify(bundle, images)

    assert result.images == 3 * PER_CLASS
    assert result.accuracy == pytest.approx(np.mean(answered))
    assert result.reference_accuracy == 0.5
    assert result.drop == pytest.approx(0.5 - np.mean(answered))
    assert [quality.accuracy for quality in result.exits] == pytest.approx(right.mean(0).tolist())
    assert [quality.share for quality in result.exits] == pytest.approx([float((exits == k).mean()) for k in range(3)])
    assert result.oracle_accuracy == pytest.approx(right.any(1).mean())
    assert result.oracle_latency_s == pytest.approx(np.mean([cumulative[k] for k in first_right]))
    assert [point.latency_s for point in result.static_points] == pytest.approx(cumulative)
    assert [point.drop for point in result.static_points] == pytest.approx((0.5 - right.mean(0)).tolist())
    assert VerifyResult.parse(result.canonical_json(), "verify.json") == result


def test_images_that_chose_something_are_skipped_and_counted(images: ImageFolder, tmp_path: Path) -> None:
    seen = [item.digest for item in images.items[:7]]
    result = verify(write_toy_bundle(tmp_path / "bundle", seen=seen), images)
    assert (result.images, result.skipped_seen) == (3 * PER_CLASS - 7, 7)
    assert not {example.input for example in result.examples} & {item.path for item in images.items[:7]}


def test_the_digest_of_an_image_is_that_of_its_bytes(images: ImageFolder) -> None:
    item = images.items[0]
    assert item.digest == file_digest(images.source / item.path)


def test_nothing_left_to_look_at_is_bad_input(images: ImageFolder, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", seen=[item.digest for item in images.items])
    with pytest.raises(InputError, match="all 60 images were used to fit, choose or certify"):
        verify(bundle, images)
    with pytest.raises(InputError, match="all 2 images"):
        verify(bundle, images, indices=[0, 1])


def test_fewer_images_are_spread_over_all_classes(images: ImageFolder, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    assert verify(bundle, images, max_images=6).images == 6
    assert verify(bundle, images, indices=[3, 30, 55], max_images=6).images == 3
    with pytest.raises(InputError, match="at most 0 images"):
        verify(bundle, images, max_images=0)


def test_parity_tells_the_largest_difference_and_breaks_beyond_the_tolerance(
    images: ImageFolder, tmp_path: Path
) -> None:
    for error, ok in ((0.0, True), (5e-3, False)):
        bundle = write_toy_bundle(tmp_path / f"{error}", expected_error=error, tolerance=1e-4)
        check = checks_of(verify(bundle, images, max_images=3))["parity with the reference"]
        assert check.ok is ok
        assert check.measured == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize(("reference", "ok"), [(0.4, True), (1.0, False)])
def test_a_drop_is_broken_only_beyond_the_sample_error(
    images: ImageFolder, tmp_path: Path, reference: float, ok: bool
) -> None:
    accuracy = verify(write_toy_bundle(tmp_path / "probe"), images).accuracy
    assert accuracy < 0.75  # the toy is not trained
    plan = toy_plan(certificate=toy_certificate(0.01), reference_accuracy=reference)
    check = checks_of(verify(write_toy_bundle(tmp_path / "bundle", plan=plan), images))["accuracy drop"]
    assert check.low is not None
    assert check.high is not None
    assert check.low < check.measured < check.high
    assert check.ok is ok
    assert "the reference accuracy is the plan's" in check.note


def test_a_reference_network_makes_the_drop_a_paired_one(images: ImageFolder, tmp_path: Path) -> None:
    plan = toy_plan(thresholds=(None, None, None), certificate=toy_certificate(0.01), reference_accuracy=0.99)
    bundle = write_toy_bundle(tmp_path / "bundle", plan=plan)
    result = verify(bundle, images, reference=lambda x: reference_probabilities(x)[:, 2])
    check = checks_of(result)["accuracy drop"]
    assert result.drop == 0.0
    assert check.ok
    assert "both networks ran on the same images" in check.note


def test_without_any_reference_accuracy_no_drop_is_told(images: ImageFolder, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", plan=toy_plan(reference_accuracy=None))
    with pytest.raises(InputError, match="no reference accuracy"):
        verify(bundle, images, max_images=2)


def test_a_layer_in_another_precision_than_planned_is_named(images: ImageFolder, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    assert checks_of(verify(bundle, images, max_images=2))["layers in their planned precision"].ok
    choices = (Choice(subject="segment0.conv", option="int8-static"), *bundle.manifest.plan.choices[1:])
    other = with_manifest(bundle, plan=bundle.manifest.plan.model_copy(update={"choices": choices}))
    check = checks_of(verify(other, images, max_images=2))["layers in their planned precision"]
    assert not check.ok
    assert (check.promised, check.measured) == (6, 5)
    assert check.note == "segment0.conv: planned int8-static, holds fp32"


def test_classes_are_matched_by_name_and_an_unknown_one_is_refused(images: ImageFolder, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    straight = verify(bundle, images)
    turned_names = toy_graph().model_copy(update={"classes": CLASSES[::-1]})
    turned = verify(with_manifest(bundle, graph=turned_names), images)
    assert turned.exits[2].accuracy != straight.exits[2].accuracy
    foreign = toy_graph().model_copy(update={"classes": ("blue", "green", "violet")})
    with pytest.raises(InputError, match="the network knows no class 'red'"):
        verify(with_manifest(bundle, graph=foreign), images)


def test_examples_show_early_late_and_wrong_ones(images: ImageFolder, tmp_path: Path) -> None:
    plan = toy_plan(thresholds=(0.8, 0.8, None))
    result = verify(write_toy_bundle(tmp_path / "bundle", plan=plan), images)
    assert 0 < len(result.examples) <= 12
    assert all(example.image.startswith("data:image/png;base64,") for example in result.examples)
    assert all(example.confidence >= 0.8 for example in result.examples if example.exit < 2)
    assert any(example.label != example.prediction for example in result.examples)
    assert len({example.input for example in result.examples}) == len(result.examples)


def test_a_manifest_that_contradicts_itself_is_refused(images: ImageFolder, tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", plan=toy_plan(thresholds=(0.5, None)))
    with pytest.raises(BundleError, match="3 segments, 3 exits, 2 thresholds"):
        verify(bundle, images)


@pytest.mark.parametrize("tensors", [{"inputs": np.zeros((1, 3, 16, 16), np.float32)}, None])
def test_expected_outputs_that_cannot_be_read_are_a_damaged_bundle(
    images: ImageFolder, tmp_path: Path, tensors: dict[str, np.ndarray] | None
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    if tensors is None:
        bundle.file(EXPECTED).write_bytes(b"\xff" * 64)
    else:
        save_file(tensors, bundle.file(EXPECTED))
    entries = seal(bundle.path, {entry.role: entry.path for entry in bundle.manifest.files})
    sealed = write_manifest(bundle.path, bundle.manifest.model_copy(update={"files": entries}))
    with pytest.raises(BundleError, match="expected outputs cannot be read"):
        verify(sealed, images)
