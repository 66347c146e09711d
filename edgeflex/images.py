"""Labelled images from an ImageFolder directory or zip: ``class/NAME.(jpg|jpeg|png|bmp)``.

An image's identity is the SHA-256 of its file's bytes, wherever it stands and whatever it is called:
splits and the list of images already used for choosing are kept by that digest.
"""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgeflex.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from edgeflex.schema import Preprocessing

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM")
_MOST_FAULTS = 10
# A decoded image larger than this is a mistake or an attack, not a sample for an edge classifier.
_MOST_PIXELS = 64 << 20


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image: path inside the folder, index of its class, first 16 hex digits of its SHA-256."""

    path: str
    label: int
    digest: str


class _Store(Protocol):
    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


class _Directory:
    """Files below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """Return the relative paths of all files."""
        return [path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        return (self._root / name).read_bytes()


class _Zip:
    """Entries of a zip, opened for each reading so that the value can be shared and copied."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: zipfile.ZipFile | None = None

    def _open(self) -> zipfile.ZipFile:
        if self._file is None:
            self._file = zipfile.ZipFile(self._path)
        return self._file

    def names(self) -> list[str]:
        """Return the names of all entries that are files."""
        return [info.filename for info in self._open().infolist() if not info.is_dir()]

    def read(self, name: str) -> bytes:
        """Return an entry's bytes; its CRC is checked."""
        return self._open().read(name)


@dataclass(frozen=True)
class ImageFolder:
    """Images with labels, in the order of their paths.

    Attributes:
        source: The directory or zip.
        classes: Class names, sorted; a label is an index into them.
        items: The images.
    """

    source: Path
    classes: tuple[str, ...]
    items: tuple[ImageItem, ...]
    _store: _Store
    _prefix: str

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels of all images, [n]."""
        return np.array([item.label for item in self.items], dtype=np.int64)

    def digest(self) -> str:
        """Return the SHA-256 over classes, labels and image digests, in the order of the items.

        What is kept by index (splits, cached features) holds for this very order only.
        """
        lines = [f"{self.classes[item.label]} {item.digest}" for item in self.items]
        return hashlib.sha256("\n".join([*self.classes, *lines]).encode()).hexdigest()

    def read(self, index: int) -> bytes:
        """Return the file's bytes of image ``index``.

        Raises:
            InputError: The file has gone or can no longer be read.
        """
        name = self.items[index].path
        try:
            return self._store.read(self._prefix + name)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"image {name!r} of {self.source} cannot be read: {error}.") from None

    def load(self, indices: Iterable[int], preprocessing: Preprocessing) -> NDArray[np.float32]:
        """Return images as network inputs, float32 [n, C, H, W].

        Grey and colour are converted, other sizes resized (bilinear), values scaled to [0, 1], then
        ``(value - mean) / std`` per channel.

        Raises:
            InputError: Images are corrupt; up to ten are named.
        """
        chosen = [int(index) for index in indices]
        shape = (len(chosen), preprocessing.height, preprocessing.width, preprocessing.channels)
        pixels = np.zeros(shape, dtype=np.uint8)
        faults: list[str] = []
        for row, index in enumerate(chosen):
            fault = self._read_into(pixels[row], index, preprocessing)
            faults += [fault] if fault else []
            if len(faults) == _MOST_FAULTS:
                break
        if faults:
            raise InputError.collect(f"{self.source} holds corrupt images", faults)
        mean = np.asarray(preprocessing.mean, dtype=np.float32)
        std = np.asarray(preprocessing.std, dtype=np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(255.0) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def png_data_uri(self, index: int, size: int) -> str:
        """Return image ``index`` as ``data:image/png;base64,…``, ``size`` pixels square.

        Raises:
            InputError: The image is corrupt.
        """
        from PIL.Image import Resampling

        image = self._decode(index).convert("RGB").resize((size, size), Resampling.NEAREST)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _read_into(self, row: NDArray[np.uint8], index: int, preprocessing: Preprocessing) -> str:
        """Fill ``row`` with an image; return what is wrong with the image, or nothing."""
        try:
            row[:] = self._pixels(index, preprocessing)
        except InputError as error:
            return str(error)
        return ""

    def _pixels(self, index: int, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        from PIL.Image import Resampling

        image = self._decode(index).convert("L" if preprocessing.channels == 1 else "RGB")
        size = (preprocessing.width, preprocessing.height)
        if image.size != size:
            image = image.resize(size, Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8).reshape(size[1], size[0], preprocessing.channels)

    def _decode(self, index: int) -> Image:
        from PIL import Image

        raw, name = self.read(index), self.items[index].path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = Image.open(io.BytesIO(raw), formats=("JPEG", "PNG", "BMP"))
                if image.width * image.height > _MOST_PIXELS:
                    raise InputError(f"image {name!r} is {image.width} × {image.height}; 64 megapixels is the limit.")
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"image {name!r} cannot be decoded: {error}. Replace or remove it.") from None
        return _of_eight_bits(image)


def _of_eight_bits(image: Image) -> Image:
    """Return grey of 16 bits by its upper 8, as colour of 16 bits is read; converted, all but black would be white."""
    from PIL.Image import fromarray

    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def open_images(path: Path) -> ImageFolder:
    """Return the images of a directory or zip laid out as ``class/NAME.jpg``.

    One common top folder around the classes is stepped over. Files that are no images are left out;
    zip entries with absolute names or ``..`` are refused.

    Raises:
        InputError: No such file, not a zip, no images, one class only, files that are empty or no image
            inside, entries that reach outside; up to ten faults are named at once.
    """
    store = _open_store(path)
    try:
        names = sorted(store.names())
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"images {str(path)!r} cannot be read: {error}. Give a directory or a zip.") from None
    faults = [f"entry {name!r} reaches outside the archive" for name in names if _escapes(name)]
    images = [name for name in names if _is_image(name) and not _escapes(name)]
    faults += [f"the name {_shown(name)!r} is not UTF-8; rename it" for name in images if _shown(name) != name]
    prefix = _common_top(images)
    faults += _layout_faults([name[len(prefix) :] for name in images])
    _refuse(path, faults)
    classes = tuple(sorted({name[len(prefix) :].split("/")[0] for name in images}))
    items = tuple(_items(store, images, prefix, classes, faults))
    _refuse(path, faults)
    _refuse(path, _class_faults(classes, items))
    return ImageFolder(path, classes, items, store, prefix)


def split(images: ImageFolder, shares: Mapping[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the indices of each part; an image's part follows from its bytes and ``seed`` alone.

    So the same image lands in the same part in any folder, and duplicates land together. Shares are
    probabilities: the parts' sizes are near them, not equal. What the shares leave over is in no part.

    Raises:
        InputError: A share is not positive, or they sum to more than 1.
    """
    total = sum(shares.values())
    if not shares or min(shares.values()) <= 0.0 or total > 1.0 + 1e-9:
        raise InputError(f"shares {dict(shares)} must each be above 0 and sum to at most 1, not {total:g}.")
    bounds = np.cumsum(list(shares.values()))
    places = np.array([_place(item.digest, seed) for item in images.items], dtype=np.float64)
    part = np.searchsorted(bounds, places, side="right")
    return {name: np.flatnonzero(part == number).astype(np.int64) for number, name in enumerate(shares)}


def _place(digest: str, seed: int) -> float:
    """Return a uniform number in [0, 1) that depends on image and seed only."""
    raw = hashlib.sha256(f"{seed}:{digest}".encode()).digest()
    return int.from_bytes(raw[:7], "big") / 2.0**56


def _open_store(path: Path) -> _Store:
    if path.is_dir():
        return _Directory(path)
    if not path.exists():
        raise InputError(f"images {str(path)!r} do not exist. Give a directory or a zip of class/NAME.jpg.")
    return _Zip(path)


def _escapes(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]


def _shown(name: str) -> str:
    """Return a name as it can be written: what the system gave as bytes of no text stands as question marks."""
    return name.encode("utf-8", errors="replace").decode()


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts.parts)
    return parts.suffix.lower() in _SUFFIXES and not hidden


def _common_top(names: Sequence[str]) -> str:
    """Return ``top/`` when every image lies one folder deeper than class/NAME, below one folder."""
    if not names or any(name.count("/") != 2 for name in names):
        return ""
    tops = {name.split("/")[0] for name in names}
    return f"{tops.pop()}/" if len(tops) == 1 else ""


def _layout_faults(names: Sequence[str]) -> list[str]:
    if not names:
        return ["no image found; class/NAME.jpg, .jpeg, .png or .bmp is expected"]
    wrong = [name for name in names if name.count("/") != 1]
    if len(wrong) == len(names) and all(name.count("/") == 2 for name in names):
        tops = ", ".join(repr(_shown(top)) for top in sorted({name.split("/")[0] for name in names})[:_MOST_FAULTS])
        return [f"its images lie one folder deeper than class/NAME, below {tops}; give one of these folders"]
    return [f"{name!r} does not lie as class/NAME" for name in wrong]


def _class_faults(classes: Sequence[str], items: Sequence[ImageItem]) -> list[str]:
    if len(classes) > 1:
        return []
    return [f"all {len(items)} images are of one class, {classes[0]!r}; at least two are needed"]


def _items(
    store: _Store, names: Sequence[str], prefix: str, classes: Sequence[str], faults: list[str]
) -> Iterator[ImageItem]:
    number = {name: index for index, name in enumerate(classes)}
    for full in names:
        name = full[len(prefix) :]
        try:
            raw = store.read(full)
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            faults.append(f"{name!r} cannot be read: {error}")
            continue
        if raw.startswith(_SIGNATURES):
            digest = hashlib.sha256(raw).hexdigest()[:16]
            yield ImageItem(name, number[name.split("/")[0]], digest)
        else:
            faults.append(f"{name!r} is {'empty' if not raw else 'no JPEG, PNG or BMP inside'}")


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        more = len(faults) - _MOST_FAULTS
        listed = [*faults[:_MOST_FAULTS], f"and {more} more"] if more > 0 else list(faults)
        raise InputError.collect(f"images {str(path)!r} cannot be used", listed)
