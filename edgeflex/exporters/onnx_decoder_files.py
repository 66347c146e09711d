"""The files of a decoder's bundle for ONNX: raw weights, and stages that name them as external data.

Every number lies on disk once, in the raw form of ``MatrixRecord``: an expert in a file of its own, which the host
reads and hands to its template; the embedding in one that the host looks rows up in; everything else in the data
file of the stage that multiplies with it. A tied head's data file is the embedding's too. Pieces start at multiples
of 64 and files are padded to 4096, so that they can be read past the page cache.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import onnx

from edgeflex.bundle_moe import seal_file
from edgeflex.errors import DeviceError, UnsupportedError
from edgeflex.exporters.decoder_files import unit_of
from edgeflex.exporters.onnx_decoder_graphs import Place, enter_weight, seal_weights, weight_places
from edgeflex.exporters.onnx_decoder_stages import (
    attention_shapes,
    attention_template,
    feed_forward_template,
    head_template,
    only,
)
from edgeflex.files import sha256_file, write_atomic
from edgeflex.schema import FileEntry, Precision
from edgeflex.schema_moe import MatrixRecord, StockProgram
from edgeflex.transforms.decoder_weights import StoredMatrix, quantize_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema_moe import DecoderGraph, DecoderLayer

EMBEDDING_FILE = "weights/embedding.bin"
HEAD_STEM = "stages/head"
_ALIGNMENT = 64
_FILE_ALIGNMENT = 4096
_MOST_THREADS = 4


@dataclass(frozen=True)
class Stage:
    """One graph to be, and the weights in it.

    Attributes:
        role: As in ``StockProgram``.
        layer: None for the head.
        stem: Path without suffix.
        template: Gives its graph, with a weight's local name as its input.
        weights: Full names by local names, in the order in which they are stored.
    """

    role: Literal["attention", "dense", "head"]
    layer: int | None
    stem: str
    template: Callable[[], onnx.ModelProto]
    weights: Mapping[str, str]


def stages(graph: DecoderGraph) -> Iterator[Stage]:
    """Yield every stage with weights of its own: layer by layer, then the head."""
    for layer in graph.layers:
        yield from _layer_stages(graph, layer)
    shared = only(graph, graph.layers[0])
    yield Stage("head", None, HEAD_STEM, lambda: head_template(shared), {"head": "head", "norm": "norm"})


def _layer_stages(graph: DecoderGraph, layer: DecoderLayer) -> Iterator[Stage]:
    start, stem = f"layers.{layer.index}.", f"stages/layer-{layer.index}"
    one = only(graph, layer)
    names = {name: start + name for name in attention_shapes(one)}
    yield Stage("attention", layer.index, f"{stem}.attention", lambda: attention_template(one), names)
    width = layer.dense_dim if layer.routing is None else layer.shared_dim
    if not width:
        return
    inner = "mlp." if layer.routing is None else "shared."
    names = {name: start + inner + name for name in ("gate_up", "down")}
    if layer.shared_gate:
        names["shared_gate"] = f"{start}shared_gate"

    def template() -> onnx.ModelProto:
        return feed_forward_template(graph.hidden_dim, width, gated=layer.shared_gate)

    yield Stage("dense", layer.index, f"{stem}.dense", template, names)


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


class OnnxFiles:
    """Writes weights and stages into a folder.

    Args:
        folder: The bundle to be.
        source: The decoder.
        precisions: Of every unit.
    """

    def __init__(self, folder: Path, source: DecoderSource, precisions: Mapping[str, Precision]) -> None:
        self._folder = folder
        self._source = source
        self._precisions = precisions
        self._entries: list[FileEntry] = []
        self._records: list[MatrixRecord] = []
        self._programs: list[StockProgram] = []

    def write(self, told: Progress) -> WrittenFiles:
        """Write everything; memory holds one matrix, or a few experts."""
        graph = self._source.graph
        ours = tuple(stages(graph))
        for place in ("stages", "weights"):
            (self._folder / place).mkdir()
        with told.task("stages", len(ours)) as advance:
            for stage in ours:
                self._write_stage(stage)
                advance(1)
        if graph.tied_embedding:
            (self._folder / "weights").rmdir()
            head = next(record for record in self._records if record.name == "head")
            self._records.append(head.model_copy(update={"name": "embedding"}))
        else:
            self._write_weights(EMBEDDING_FILE, {"embedding": "embedding"})
        self._write_experts(told)
        self._write_templates()
        return WrittenFiles(tuple(self._entries), tuple(self._records), tuple(self._programs))

    def _write_stage(self, stage: Stage) -> None:
        data = f"{stage.stem}.data"
        records = self._write_weights(data, stage.weights)
        model = onnx.ModelProto()
        model.CopyFrom(stage.template())
        places: dict[str, Place] = {}
        for local, full in stage.weights.items():
            record = records[full]
            places |= weight_places(local, record)
            if unit_of(full):
                enter_weight(model, local, record.precision, record.rows, record.columns, constant=True)
        seal_weights(model, places, data.rpartition("/")[2])
        path = f"{stage.stem}.onnx"
        self._save(model, path)
        unit = unit_of(next(name for name in stage.weights.values() if unit_of(name)))
        self._programs.append(
            StockProgram(
                role=stage.role, layer=stage.layer, precision=self._precisions[unit or ""], path=path, data=(data,)
            )
        )

    def _write_weights(self, path: str, names: Mapping[str, str]) -> dict[str, MatrixRecord]:
        """Write tensors (full names by local names) into a file, and return their places by full name."""
        entry, records = _write_file(self._folder, path, ((full, self._stored(full)) for full in names.values()))
        self._entries.append(entry)
        self._records.extend(records)
        return {record.name: record for record in records}

    def _write_experts(self, told: Progress) -> None:
        """Write the experts by a few threads, most of whose work is NumPy and hashing."""
        layers = [layer for layer in self._source.graph.layers if layer.routing is not None]
        experts = [(one.index, expert) for one in layers for expert in range(one.routing.experts if one.routing else 0)]
        for layer in layers:
            # not by the threads: one that Ctrl-C left behind would bring back the folder after it was removed
            (self._folder / expert_path(layer.index, 0)).parent.mkdir(parents=True)
        workers = min(_MOST_THREADS, os.cpu_count() or 1)
        with told.task("experts", len(experts)) as advance, ThreadPoolExecutor(workers) as pool:
            try:
                for entry, records in pool.map(self._write_expert, experts):
                    self._entries.append(entry)
                    self._records.extend(records)
                    advance(1)
            except BaseException:
                # else leaving the pool would first write every expert that waits there, for minutes after Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _write_expert(self, place: tuple[int, int]) -> tuple[FileEntry, tuple[MatrixRecord, ...]]:
        names = self._source.expert_tensors(*place)
        return _write_file(self._folder, expert_path(*place), ((name, self._stored(name)) for name in names))

    def _write_templates(self) -> None:
        """Write one graph for each inner width and precision of experts."""
        for layer in self._source.graph.layers:
            start = f"layers.{layer.index}.experts."
            kinds = {one for unit, one in self._precisions.items() if unit.startswith(start)}
            for precision in sorted(kinds, key=lambda one: one.value):
                path = template_path(layer.expert_dim, precision)
                if all(program.path != path for program in self._programs):
                    self._save(expert_model(self._source.graph.hidden_dim, layer.expert_dim, precision), path)
                    self._programs.append(StockProgram(role="expert", layer=None, precision=precision, path=path))

    def _save(self, model: onnx.ModelProto, path: str) -> None:
        write_atomic(self._folder / path, model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(self._folder / path))
        except onnx.checker.ValidationError as error:
            raise UnsupportedError(
                f"{path} is no valid ONNX: {str(error).strip().splitlines()[0]}. Export for executorch instead."
            ) from error
        self._entries.append(seal_file(self._folder, path))

    def _stored(self, name: str) -> StoredMatrix:
        unit = unit_of(name)
        values = self._source.tensor(name)
        precision = self._precisions[unit] if unit else Precision.FP32
        return quantize_matrix(values.reshape(-1, values.shape[-1]), precision)


def expert_model(hidden_dim: int, width: int, precision: Precision) -> onnx.ModelProto:
    """Return the graph of any expert of this width and precision; its weights are inputs in their raw form."""
    model = onnx.ModelProto()
    model.CopyFrom(feed_forward_template(hidden_dim, width, gated=False))
    enter_weight(model, "gate_up", precision, 2 * width, hidden_dim, constant=False)
    enter_weight(model, "down", precision, hidden_dim, width, constant=False)
    return model


def _write_file(
    folder: Path, path: str, tensors: Iterable[tuple[str, StoredMatrix]]
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
            put(bytes(-file.tell() % _ALIGNMENT))
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
