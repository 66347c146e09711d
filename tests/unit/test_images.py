"""Images: layout, identity, refusal of what is broken, and splits that follow the bytes."""

from __future__ import annotations

import base64
import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeflex.errors import InputError
from edgeflex.images import ImageFolder, open_images, split
from edgeflex.schema import Preprocessing
from tests.builders import needed_data

PLAIN = Preprocessing(height=4, width=6, channels=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def png(value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixel = (value, 255 - value, 7) if mode == "RGB" else value
    Image.new(mode, size, pixel).save(buffer, format="PNG")
    return buffer.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return path


def two_classes(count: int = 3) -> dict[str, bytes]:
    cats = {f"cat/{n}.png": png(n) for n in range(count)}
    return cats | {f"dog/{n}.PNG": png(100 + n) for n in range(count)}


def test_a_zip_and_a_folder_of_the_same_images_are_the_same(tmp_path: Path) -> None:
    folder = open_images(write_folder(tmp_path / "f", two_classes()))
    archive = open_images(write_zip(tmp_path / "f.zip", two_classes()))
    topped = open_images(write_zip(tmp_path / "t.zip", {f"top/{k}": v for k, v in two_classes().items()}))
    assert folder.classes == ("cat", "dog")
    assert folder.items == archive.items == topped.items
    assert folder.digest() == archive.digest() == topped.digest()
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_images_load_as_normalised_channels_first_floats(tmp_path: Path) -> None:
    images = open_images(write_folder(tmp_path, two_classes()))
    shift = Preprocessing(height=4, width=6, channels=3, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    x = images.load([1, 3], shift)
    assert x.shape == (2, 3, 4, 6)
    assert x.dtype == np.float32
    expected = [(1 / 255 - 0.5) / 0.5, 254 / 255 - 0.25, 7 / 255 / 2]
    np.testing.assert_allclose(x[0, :, 2, 2], expected, rtol=1e-6)


def test_sizes_and_colours_are_converted(tmp_path: Path) -> None:
    files = {"a/x.png": png(200, (9, 9), "L"), "b/y.png": png(10, (3, 2))}
    images = open_images(write_folder(tmp_path, files))
    grey = Preprocessing(height=5, width=5, channels=1, mean=(0.0,), std=(1.0,))
    assert images.load([0, 1], grey).shape == (2, 1, 5, 5)
    np.testing.assert_allclose(images.load([0], PLAIN), 200 / 255, rtol=1e-6)


def test_grey_of_16_bits_is_read_by_its_upper_8(tmp_path: Path) -> None:
    steps = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2731
    files = {}
    for name, pixels in (("deep/a.png", steps), ("flat/b.png", (steps >> 8).astype(np.uint8))):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        files[name] = buffer.getvalue()
    deep, flat = open_images(write_folder(tmp_path, files)).load([0, 1], PLAIN)
    assert np.array_equal(deep, flat)
    assert len(np.unique(deep)) == 24


def test_a_data_uri_holds_the_image_at_the_size_asked_for(tmp_path: Path) -> None:
    images = open_images(write_folder(tmp_path, two_classes()))
    kind, _, raw = images.png_data_uri(0, 16).partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(raw))).size == (16, 16)


@pytest.mark.parametrize("name", ["../evil/a.png", "/abs/a.png", "cat/../../a.png", "..\\evil\\a.png"])
def test_a_zip_entry_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "bad.zip", two_classes() | {name: png(5)})
    with pytest.raises(InputError, match="outside"):
        open_images(path)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_a_name_that_is_no_text_is_refused_with_its_place(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", two_classes())
    place = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9"))
    place.mkdir()
    (place / "1.png").write_bytes(png(3))
    with pytest.raises(InputError, match=r"the name 'caf\?/1\.png' is not UTF-8; rename it"):
        open_images(root)


def test_files_that_are_no_images_are_left_out(tmp_path: Path) -> None:
    extra = {"README.txt": b"hello", "cat/notes.json": b"{}", "__MACOSX/cat/._0.png": b"x", "dog/.hidden.png": b""}
    assert len(open_images(write_folder(tmp_path, two_classes() | extra))) == 6


def test_all_broken_files_are_named_in_one_error(tmp_path: Path) -> None:
    broken = {"cat/empty.png": b"", "dog/text.jpg": b"no image here"}
    with pytest.raises(InputError) as error:
        open_images(write_folder(tmp_path, two_classes() | broken))
    assert "cat/empty.png" in str(error.value)
    assert "dog/text.jpg" in str(error.value)


def test_at_most_ten_faults_are_listed(tmp_path: Path) -> None:
    broken = {f"cat/bad{n:02d}.png": b"" for n in range(15)}
    with pytest.raises(InputError) as error:
        open_images(write_folder(tmp_path, two_classes() | broken))
    assert str(error.value).count("bad") == 10
    assert "and 5 more" in str(error.value)


def test_corrupt_pixels_are_named_when_loaded(tmp_path: Path) -> None:
    files = two_classes() | {"cat/9.png": png(9)[:40], "dog/9.png": png(9)[:50]}
    images = open_images(write_folder(tmp_path, files))
    with pytest.raises(InputError) as error:
        images.load(range(len(images)), PLAIN)
    assert "cat/9.png" in str(error.value)
    assert "dog/9.png" in str(error.value)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no image"),
        ({"a/x.txt": b"x"}, "no image"),
        ({"a/1.png": png(1), "a/2.png": png(2)}, "one class"),
        ({"x.png": png(1), "a/2.png": png(2)}, "class/NAME"),
        ({"train/a/1.png": png(1), "dev/a/2.png": png(2)}, "one folder deeper than class/NAME, below 'dev', 'train'"),
        ({f"{number}.png": png(number) for number in range(30)}, "and 20 more"),
    ],
)
def test_folders_that_cannot_be_labelled_are_refused(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=reason):
        open_images(write_folder(tmp_path / "images", files))


def test_a_missing_path_a_truncated_zip_and_a_flipped_bit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not exist"):
        open_images(tmp_path / "none.zip")
    whole = write_zip(tmp_path / "whole.zip", two_classes()).read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        open_images(cut)
    flipped = bytearray(whole)
    flipped[60] ^= 0xFF
    bad = tmp_path / "bad.zip"
    bad.write_bytes(bytes(flipped))
    with pytest.raises(InputError, match=r"cat/0\.png"):
        open_images(bad)


def many(tmp_path: Path, count: int = 200) -> ImageFolder:
    files = {f"c{n % 2}/{n:04d}.png": png(n % 251, (1 + n % 7, 1 + n // 7)) for n in range(count)}
    return open_images(write_zip(tmp_path / "many.zip", files))


def test_a_split_follows_bytes_not_names(tmp_path: Path) -> None:
    images = many(tmp_path)
    renamed = {f"q{item.label}/{999 - n}.png": images.read(n) for n, item in enumerate(images.items)}
    other = open_images(write_zip(tmp_path / "other.zip", renamed))
    shares = {"fit": 0.6, "held": 0.4}
    ours, theirs = split(images, shares, 3), split(other, shares, 3)
    for name in shares:
        assert {images.items[i].digest for i in ours[name]} == {other.items[i].digest for i in theirs[name]}


def test_duplicates_land_in_the_same_part(tmp_path: Path) -> None:
    images = open_images(write_folder(tmp_path, {f"c{n % 2}/{n}.png": png(5) for n in range(20)}))
    assert sorted(len(part) for part in split(images, {"a": 0.5, "b": 0.5}, 0).values()) == [0, 20]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), weights=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4))
def test_parts_are_disjoint_and_cover_what_the_shares_promise(
    tmp_path_factory: pytest.TempPathFactory, seed: int, weights: list[float]
) -> None:
    images = many(tmp_path_factory.mktemp("split"), 60)
    shares = {str(n): w / sum(weights) for n, w in enumerate(weights)}
    parts = split(images, shares, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(60))


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": -0.1, "b": 0.5}, {"a": 0.7, "b": 0.4}])
def test_shares_that_make_no_sense_are_refused(tmp_path: Path, shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="shares"):
        split(many(tmp_path, 4), shares, 0)


@pytest.mark.needs_data
def test_twenty_thousand_images_open_in_seconds() -> None:
    path = needed_data("cifar10-jpeg", "train.zip")
    start = time.perf_counter()
    images = open_images(path)
    assert len(images) == 20_000
    assert len(images.classes) == 10
    assert time.perf_counter() - start < 10.0  # 0.5 s measured; the margin is for a busy machine
