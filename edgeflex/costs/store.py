"""The calibration folder: what was measured, each file written whole or not at all. No torch.

    calibration.json                 what was measured: digests, shares, seed
    choose.npy, certify.npy, test.npy  indices of the images of each part
    ranges.json                      least and greatest value of every tensor
    sensitivity/<layer>.<option>.npy probabilities [n, exits, classes] with that one layer quantised
    mixes/<digest>.*                 a whole model in chosen precisions: probabilities on choose and certify,
                                     seconds per segment, bytes

A part used to choose is never used to certify, and neither to judge.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence  # noqa: TC003 - pydantic resolves it
from dataclasses import dataclass
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from edgeflex.errors import InputError
from edgeflex.files import read_bytes, write_atomic
from edgeflex.schema import Conditions, Noun, Precision

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_FILES = (
    "calibration.json",
    "candidates.json",
    "device.json",
    "graph.json",
    "kernels.partial",
    "ranges.json",
    "seen.txt",
    "table.json",
)
TRIAL = "trial.npy"
# What NumPy raises on a damaged file: its header is Python's source, and its shape says how much memory is asked for.
_NO_ARRAY = (ValueError, OSError, EOFError, SyntaxError, TokenError, MemoryError)
SHARES = {"choose": 0.4, "certify": 0.4, "test": 0.2}
CANDIDATE_ROLE = "candidate"


class CalibrationMeta(Noun):
    """What a calibration folder belongs to; another model, data, seed, machine or version is another folder."""

    schema_version: int = 1
    weights_digest: str
    images_digest: str
    seed: int
    shares: dict[str, float]
    backend: str
    threads: int = 1
    machine: str = ""
    versions: Mapping[str, str] = {}


class MixRecord(Noun):
    """One measured mix: its precisions, and what its program costs on the device that measured it.

    ``yardstick_s`` is the time that one fixed piece of work took in between, ``settings`` how the runtime executed
    the program where it has a choice, ``conditions`` how fast the machine was around timing.
    """

    precisions: dict[str, Precision]
    segment_s: tuple[float, ...]
    yardstick_s: float | None = None
    program_bytes: int
    memory_bytes: int | None = None
    settings: str = ""
    role: str = CANDIDATE_ROLE
    conditions: Conditions | None = None


@dataclass(frozen=True)
class Mix:
    """A measured mix with its probabilities [n, exits, classes] on the choose and certify parts."""

    digest: str
    record: MixRecord
    choose: NDArray[np.float32]
    certify: NDArray[np.float32]


def mix_digest(precisions: Mapping[str, Precision]) -> str:
    """Return the identity of a mix: a digest of its layers that are not fp32."""
    chosen = {name: one.value for name, one in precisions.items() if one is not Precision.FP32}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def _map_array(path: Path) -> NDArray[Any]:
    """Return an array that stays on disk until it is looked at; outputs of many mixes need not fit in memory."""
    if not path.is_file():
        read_bytes(path, "calibration file")  # says what is wrong with the path
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except _NO_ARRAY as error:
        raise _damaged(path, error) from None


def _load_array(path: Path) -> NDArray[Any]:
    try:
        return np.lib.format.read_array(io.BytesIO(read_bytes(path, "calibration file")), allow_pickle=False)
    except _NO_ARRAY as error:
        raise _damaged(path, error) from None


def _load_record(path: Path) -> MixRecord:
    try:
        return MixRecord.model_validate_json(read_bytes(path, "measured mix"))
    except ValidationError as error:
        raise _damaged(path, f"{error.error_count()} faults") from None


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(f"calibration file {str(path)!r} is damaged: {reason}. Delete it and calibrate again.")


class Calibration:
    """A calibration folder, open for reading and for adding what is missing."""

    def __init__(self, folder: Path, meta: CalibrationMeta) -> None:
        self.folder = folder
        self.meta = meta

    @classmethod
    def create(cls, folder: Path, meta: CalibrationMeta) -> Calibration:
        """Open ``folder`` for ``meta``, new or begun earlier with the very same model, data and seed.

        Raises:
            InputError: The folder holds a calibration of something else.
        """
        path = folder / "calibration.json"
        if path.exists():
            found = cls.open(folder)
            fields = sorted(set(CalibrationMeta.model_fields) - {"schema_version"})
            different = [name for name in fields if getattr(found.meta, name) != getattr(meta, name)]
            if different:
                raise InputError(
                    f"{str(folder)!r} holds a calibration with another {', '.join(different)}. "
                    "Name another folder with -o or pass --overwrite."
                )
            return found
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"output folder {str(folder)!r} is not empty and no calibration. Name another with -o.")
        write_atomic(path, meta.canonical_json())
        return cls(folder, meta)

    @classmethod
    def open(cls, folder: Path) -> Calibration:
        """Open an existing calibration.

        Raises:
            InputError: ``folder`` is none.
        """
        raw = read_bytes(folder / "calibration.json", "calibration")
        try:
            return cls(folder, CalibrationMeta.model_validate_json(raw))
        except ValidationError as error:
            raise InputError(
                f"{str(folder)!r} is no calibration: {error.error_count()} faults. Calibrate again."
            ) from None

    def digest(self) -> str:
        """Return the identity of what was calibrated and every mix that was measured."""
        mixes = ",".join(path.stem for path in sorted((self.folder / "mixes").glob("*.json")))
        return hashlib.sha256((self.meta.canonical_json() + mixes).encode()).hexdigest()

    def write_split(self, split: Mapping[str, NDArray[np.int64]], labels: NDArray[np.int64], seed: int) -> None:
        """Keep which image serves what, with all labels [images], each part in an order drawn from ``seed``.

        Folders are sorted by class; the certificate needs an order that knows nothing of the images, and the
        first few hundred of a part must be a fair sample of it.
        """
        order = np.random.default_rng(seed)
        for part, indices in split.items():
            save_array(self.folder / f"{part}.npy", order.permutation(indices))
        save_array(self.folder / "labels.npy", labels)

    def part(self, name: str) -> NDArray[np.int64]:
        """Return the image indices of ``choose``, ``certify`` or ``test``."""
        return _load_array(self.folder / f"{name}.npy")

    def labels(self, part: str) -> NDArray[np.int64]:
        """Return the labels of a part."""
        return _load_array(self.folder / "labels.npy")[self.part(part)]

    def samples(self) -> NDArray[np.float32]:
        """Return the inputs whose outputs a bundle carries, [samples, C, H, W]."""
        return _load_array(self.folder / "samples.npy")

    def trial_images(self) -> NDArray[np.float32]:
        """Return the inputs that a choice of the runtime's settings is tried on, [images, C, H, W].

        A calibration that kept none has its samples.
        """
        return _load_array(self.folder / TRIAL) if self.has(TRIAL) else self.samples()

    def clear(self) -> None:
        """Delete what calibrating wrote, and nothing else that stands in the folder."""
        for name in ("mixes", "sensitivity"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in (
            *self.folder.glob("*.npy"),
            *self.folder.glob("asked-*.json"),
            *(self.folder / name for name in _FILES),
        ):
            path.unlink(missing_ok=True)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return the recorded activation ranges."""
        path = self.folder / "ranges.json"
        try:
            raw = json.loads(read_bytes(path, "activation ranges"))
            return {name: (float(low), float(high)) for name, (low, high) in raw.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from None

    def has(self, name: str) -> bool:
        """Say whether a file of the folder is there."""
        return (self.folder / name).exists()

    def write_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Keep the activation ranges."""
        write_atomic(self.folder / "ranges.json", json.dumps(ranges, sort_keys=True))

    def sensitivity_path(self, layer: str, precision: Precision) -> Path:
        """Return where the outputs with one layer quantised are kept."""
        return self.folder / "sensitivity" / f"{layer}.{precision.value}.npy"

    def sensitivity(self, layer: str, precision: Precision) -> NDArray[np.float32]:
        """Return the probabilities [n, exits, classes] with one layer quantised."""
        return _map_array(self.sensitivity_path(layer, precision)).astype(np.float32, copy=False)

    def baseline(self) -> NDArray[np.float32]:
        """Return the unquantised probabilities on the sensitivity images."""
        return _map_array(self.folder / "sensitivity" / "baseline.npy").astype(np.float32, copy=False)

    def sensitivity_labels(self) -> NDArray[np.int64]:
        """Return the labels of the sensitivity images, the first of the choose part."""
        return self.labels("choose")[: len(self.baseline())]

    def asked(self, count: int) -> list[dict[str, Precision]] | None:
        """Return the mixes that a frontier of ``count`` points asked for, or None if none was computed yet.

        Kept, because times measured anew would move the frontier and ask for other mixes.
        """
        path = self.folder / f"asked-{count}.json"
        if not path.exists():
            return None
        try:
            raw = json.loads(read_bytes(path, "list of mixes"))
            return [{str(layer): Precision(one) for layer, one in mix.items()} for mix in raw]
        except (ValueError, AttributeError) as error:
            raise _damaged(path, error) from None

    def write_asked(self, count: int, mixes: Sequence[Mapping[str, Precision]]) -> None:
        """Keep what a frontier of ``count`` points asked for."""
        raw = [{layer: one.value for layer, one in mix.items()} for mix in mixes]
        write_atomic(self.folder / f"asked-{count}.json", json.dumps(raw, sort_keys=True))

    def has_mix(self, precisions: Mapping[str, Precision]) -> bool:
        """Say whether this mix was measured."""
        return self.has(f"mixes/{mix_digest(precisions)}.json")

    def write_mix(self, record: MixRecord, choose: NDArray[np.float32], certify: NDArray[np.float32]) -> None:
        """Keep a measured mix; the record last, so that a killed run leaves no half."""
        name = mix_digest(record.precisions)
        save_array(self.folder / "mixes" / f"{name}.choose.npy", choose)
        save_array(self.folder / "mixes" / f"{name}.certify.npy", certify)
        write_atomic(self.folder / "mixes" / f"{name}.json", record.canonical_json())

    def records(self) -> dict[str, MixRecord]:
        """Return every measured mix by digest, without its probabilities."""
        return {path.stem: _load_record(path) for path in sorted((self.folder / "mixes").glob("*.json"))}

    def mix(self, name: str) -> Mix:
        """Return one measured mix by digest.

        Raises:
            InputError: It was never measured.
        """
        return Mix(
            name,
            _load_record(self.folder / "mixes" / f"{name}.json"),
            _map_array(self.folder / "mixes" / f"{name}.choose.npy"),
            _map_array(self.folder / "mixes" / f"{name}.certify.npy"),
        )

    def mixes(self) -> tuple[Mix, ...]:
        """Return every measured mix with its probabilities."""
        return tuple(self.mix(path.stem) for path in sorted((self.folder / "mixes").glob("*.json")))
