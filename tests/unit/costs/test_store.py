"""The calibration folder: resumed by content, refused when it is another's, and clear about damage."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeflex.costs.store import TRIAL, Calibration, CalibrationMeta, MixRecord, mix_digest, save_array
from edgeflex.errors import InputError
from tests.small_graphs import DYNAMIC, FP32, STATIC, probabilities

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgeflex.schema import Precision

META = CalibrationMeta(
    weights_digest="a" * 64,
    images_digest="b" * 64,
    seed=0,
    shares={"choose": 0.4, "certify": 0.4, "test": 0.2},
    backend="executorch",
)
MIX = {"one": STATIC, "two": FP32}


def record(precisions: dict[str, Precision] | None = None) -> MixRecord:
    return MixRecord(precisions=precisions or MIX, segment_s=(1e-3, 2e-3), program_bytes=1000, memory_bytes=2000)


def filled(folder: Path) -> Calibration:
    """Return a calibration of ten images with one mix."""
    opened = Calibration.create(folder, META)
    split = {"choose": np.arange(4), "certify": np.arange(4, 8), "test": np.arange(8, 10)}
    opened.write_split(split, np.arange(10) % 3, 0)
    opened.write_ranges({"0:x": (-1.0, 2.0)})
    _, given = probabilities(8, 0)
    opened.write_mix(record(), given[:4], given[4:])
    return opened


def test_what_was_written_is_read_back_after_opening_again(tmp_path: Path):
    folder = tmp_path / "calibration"
    before = filled(folder)
    after = Calibration.create(folder, META)
    assert after.digest() == before.digest()
    assert after.ranges() == {"0:x": (-1.0, 2.0)}
    assert sorted(after.part("choose")) == [0, 1, 2, 3]
    assert after.labels("certify").tolist() == (after.part("certify") % 3).tolist()
    (mix,) = after.mixes()
    assert mix.record == record()
    _, given = probabilities(8, 0)
    assert np.array_equal(mix.choose, given[:4])
    assert np.array_equal(mix.certify, given[4:])
    assert after.has_mix(MIX)
    assert after.has_mix({"one": STATIC})
    assert not after.has_mix({"one": DYNAMIC})


def test_settings_are_tried_on_what_was_kept_for_that_and_else_on_the_samples(tmp_path: Path):
    folder = filled(tmp_path / "calibration")
    save_array(folder.folder / "samples.npy", np.zeros((2, 3), dtype=np.float32))
    assert folder.trial_images().shape == (2, 3)
    save_array(folder.folder / TRIAL, np.ones((64, 3), dtype=np.float32))
    assert folder.trial_images().shape == (64, 3)
    assert folder.samples().shape == (2, 3)
    folder.clear()
    assert not folder.has(TRIAL)


def test_the_parts_are_shuffled_by_the_seed_alone(tmp_path: Path):
    split = {"choose": np.arange(100), "certify": np.arange(100, 200)}
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        opened = Calibration.create(tmp_path / name, META)
        opened.write_split(split, np.zeros(200, dtype=np.int64), seed)
        orders.append(opened.part("choose").tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(100)) != orders[0]


def test_layers_in_fp32_do_not_change_a_mix_and_neither_does_order():
    assert mix_digest({}) == mix_digest({"a": FP32, "b": FP32})
    assert mix_digest({"a": STATIC, "b": DYNAMIC}) == mix_digest({"b": DYNAMIC, "a": STATIC, "c": FP32})
    assert mix_digest({"a": STATIC}) != mix_digest({"a": DYNAMIC}) != mix_digest({"b": STATIC})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights_digest": "c" * 64}, "weights_digest"),
        ({"images_digest": "c" * 64, "seed": 9}, "images_digest, seed"),
        ({"shares": {"choose": 0.5, "certify": 0.5}}, "shares"),
        ({"backend": "tensorrt"}, "backend"),
    ],
)
def test_the_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, change: dict[str, object], named: str):
    filled(tmp_path / "calibration")
    before = sorted(path.name for path in (tmp_path / "calibration").rglob("*"))
    with pytest.raises(InputError, match=f"another {named}"):
        Calibration.create(tmp_path / "calibration", META.model_copy(update=change))
    assert sorted(path.name for path in (tmp_path / "calibration").rglob("*")) == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty and no calibration"):
        Calibration.create(tmp_path, META)


def test_a_folder_that_is_no_calibration_cannot_be_opened(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        Calibration.open(tmp_path / "nowhere")
    (tmp_path / "calibration.json").write_text('{"seed": "many"}')
    with pytest.raises(InputError, match="is no calibration"):
        Calibration.open(tmp_path)


def test_a_mix_whose_record_was_not_written_does_not_exist(tmp_path: Path):
    opened = filled(tmp_path / "calibration")
    # a killed run leaves arrays without the record
    (tmp_path / "calibration" / "mixes" / f"{mix_digest(MIX)}.json").unlink()
    assert not opened.has_mix(MIX)
    assert opened.mixes() == ()
    with pytest.raises(InputError, match="measured mix"):
        opened.mix(mix_digest(MIX))


def test_the_digest_tells_which_mixes_were_measured(tmp_path: Path):
    opened = filled(tmp_path / "calibration")
    before = opened.digest()
    _, given = probabilities(8, 1)
    opened.write_mix(record({"one": DYNAMIC}), given[:4], given[4:])
    assert opened.digest() != before


READ: list[tuple[str, Callable[[Calibration], object]]] = [
    ("choose.npy", lambda one: one.part("choose")),
    ("labels.npy", lambda one: one.labels("choose")),
    ("ranges.json", lambda one: one.ranges()),
    (f"mixes/{mix_digest(MIX)}.json", lambda one: one.mixes()),
    (f"mixes/{mix_digest(MIX)}.json", lambda one: one.records()),
    (f"mixes/{mix_digest(MIX)}.certify.npy", lambda one: one.mix(mix_digest(MIX))),
]


@pytest.mark.parametrize(("name", "read"), READ)
@pytest.mark.parametrize("damage", ["empty", "cut", "other", "zip", "pickle"])
def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, name: str, read: Callable[[Calibration], object], damage: str
):
    opened = filled(tmp_path)
    path = tmp_path / name
    raw = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": raw[: len(raw) - 3],
            "other": b"[1, 2, 3]",
            "zip": b"PK\x03\x04" + raw,
            "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin.",
        }[damage]
    )
    with pytest.raises(InputError, match=r"damaged.*calibrate again") as raised:
        read(opened)
    assert name in str(raised.value)


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path):
    opened = filled(tmp_path)
    np.save(tmp_path / "choose.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="damaged"):
        opened.part("choose")


def test_no_byte_of_a_damaged_array_is_a_crash(tmp_path: Path):
    opened = filled(tmp_path)
    path = tmp_path / "choose.npy"
    raw = path.read_bytes()
    told = []
    for place, flip in product(range(128), (0x01, 0x09, 0x5A)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :])
        try:
            opened.part("choose")
        except InputError as error:
            told.append(str(error))
    assert len(told) > 100
    assert all("damaged" in one for one in told)
