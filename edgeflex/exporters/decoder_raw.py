"""Raw weight files of a decoder's bundle: pieces of ``MatrixRecord``'s form one after another, each number once.

Pieces start at multiples of 64, or of more where what reads an expert wants so, and files are padded to 4096, so that
they can be read past the page cache. An expert has a file of its own, which the host reads as one block. A file's hash
is taken from what the disk gives back.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx

from edgeflex.bundle_moe import seal_file
from edgeflex.errors import DeviceError, UnsupportedError
from edgeflex.exporters.decoder_files import unit_of
from edgeflex.files import sha256_file, write_atomic
from edgeflex.schema import FileEntry, Precision
from edgeflex.schema_moe import MatrixRecord, StockProgram
from edgeflex.transforms.decoder_weights import StoredMatrix, quantize_matrix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress

EMBEDDING_FILE = "weights/embedding.bin"
_ALIGNMENT = 64
_FILE_ALIGNMENT = 4096
_MOST_THREADS = 4


def expert_path(layer: int, expert: int) -> str:
    """Return where an expert lies."""
    return f"experts/layer-{layer}/expert-{expert}.bin"


def template_path(width: int, precision: Precision) -> str:
    """Return the template of experts with this inner width and precision."""
    return f"stages/expert-{width}.{precision.value}.onnx"


@dataclass(frozen=True)
class WrittenFiles:
    """What was written: files with their hashes, the place of every matrix, and the stages."""

    entries: tuple[FileEntry, ...]
    records: tuple[MatrixRecord, ...]
    programs: tuple[StockProgram, ...]


class RawFiles:
    """Writes weights and graphs into a folder, and keeps what was written where.

    Args:
        folder: The bundle to be.
        source: The decoder.
        precisions: Of every unit.
        expert_alignment: Bytes, of which the start of each piece of an expert is a multiple.
    """

    def __init__(
        self,
        folder: Path,
        source: DecoderSource,
        precisions: Mapping[str, Precision],
        *,
        expert_alignment: int = _ALIGNMENT,
    ) -> None:
        self._expert_alignment = expert_alignment
        self.folder = folder
        self.source = source
        self.precisions = precisions
        self.entries: list[FileEntry] = []
        self.records: list[MatrixRecord] = []
        self.programs: list[StockProgram] = []

    def written(self) -> WrittenFiles:
        """Return all that was written until now."""
        return WrittenFiles(tuple(self.entries), tuple(self.records), tuple(self.programs))

    def write_weights(self, path: str, names: Iterable[str]) -> dict[str, MatrixRecord]:
        """Write tensors, by their full names, into a file, and return their places by full name.

        Raises:
            DeviceError: The disk gives back something else than was written.
        """
        entry, records = _write_file(self.folder, path, ((name, self.stored(name)) for name in names))
        self.entries.append(entry)
        self.records.extend(records)
        return {record.name: record for record in records}

    def copy_record(self, name: str, to: str) -> None:
        """Name a matrix that is written already a second time, as a tied head and embedding are one."""
        found = next(record for record in self.records if record.name == name)
        self.records.append(found.model_copy(update={"name": to}))

    def write_experts(self, told: Progress) -> None:
        """Write the experts by a few threads, most of whose work is NumPy and hashing."""
        layers = [layer for layer in self.source.graph.layers if layer.routing is not None]
        experts = [(one.index, expert) for one in layers for expert in range(one.routing.experts if one.routing else 0)]
        for layer in layers:
            # not by the threads: one that Ctrl-C left behind would bring back the folder after it was removed
            (self.folder / expert_path(layer.index, 0)).parent.mkdir(parents=True)
        workers = min(_MOST_THREADS, os.cpu_count() or 1)
        with told.task("experts", len(experts)) as advance, ThreadPoolExecutor(workers) as pool:
            try:
                for entry, records in pool.map(self._write_expert, experts):
                    self.entries.append(entry)
                    self.records.extend(records)
                    advance(1)
            except BaseException:
                # else leaving the pool would first write every expert that waits there, for minutes after Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def expert_kinds(self) -> Iterator[tuple[int, Precision]]:
        """Yield every inner width and precision that experts have, once."""
        seen = set()
        for layer in self.source.graph.layers:
            start = f"layers.{layer.index}.experts."
            kinds = {one for unit, one in self.precisions.items() if unit.startswith(start)}
            for precision in sorted(kinds, key=lambda one: one.value):
                if (layer.expert_dim, precision) not in seen:
                    seen.add((layer.expert_dim, precision))
                    yield layer.expert_dim, precision

    def save(self, model: onnx.ModelProto, path: str) -> None:
        """Write a graph, have ONNX check it, and keep its hash.

        Raises:
            UnsupportedError: ONNX finds fault with it.
        """
        write_atomic(self.folder / path, model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(self.folder / path))
        except onnx.checker.ValidationError as error:
            raise UnsupportedError(
                f"{path} is no valid ONNX: {str(error).strip().splitlines()[0]}. Export for executorch instead."
            ) from error
        self.entries.append(seal_file(self.folder, path))

    def _write_expert(self, place: tuple[int, int]) -> tuple[FileEntry, tuple[MatrixRecord, ...]]:
        names = self.source.expert_tensors(*place)
        tensors = ((name, self.stored(name)) for name in names)
        return _write_file(self.folder, expert_path(*place), tensors, self._expert_alignment)

    def stored(self, name: str) -> StoredMatrix:
        """Return a tensor in the precision of its unit; called by several threads."""
        unit = unit_of(name)
        values = self.source.tensor(name)
        precision = self.precisions[unit] if unit else Precision.FP32
        return quantize_matrix(values.reshape(-1, values.shape[-1]), precision)


def _write_file(
    folder: Path, path: str, tensors: Iterable[tuple[str, StoredMatrix]], alignment: int = _ALIGNMENT
) -> tuple[FileEntry, tuple[MatrixRecord, ...]]:
    """Write tensors one after another, and return the file's entry and their places.

    Raises:
        DeviceError: The disk gives back something else than was written.
    """
    records, written = [], hashlib.sha256()
    with (folder / path).open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            written.update(data)

        def piece(values: NDArray[Any]) -> int:
            put(bytes(-file.tell() % alignment))
            offset = file.tell()
            put(values.data.cast("B"))
            return offset

        for name, stored in tensors:
            offset = piece(stored.codes)
            scales = None if stored.scales is None else piece(stored.scales)
            records.append(_record(name, stored, path, offset, scales))
        put(bytes(-file.tell() % _FILE_ALIGNMENT))
        size_bytes = file.tell()
    digest = sha256_file(folder / path)
    if digest != written.hexdigest():
        raise DeviceError(f"{path}: the disk gives back other bytes than were written. Check the disk.")
    return FileEntry(path=path, role=path, size_bytes=size_bytes, sha256=digest), tuple(records)


def _record(name: str, stored: StoredMatrix, path: str, offset: int, scales_offset: int | None) -> MatrixRecord:
    return MatrixRecord(
        name=name,
        precision=stored.precision,
        rows=stored.rows,
        columns=stored.columns,
        file=path,
        offset=offset,
        scales_offset=scales_offset,
    )
