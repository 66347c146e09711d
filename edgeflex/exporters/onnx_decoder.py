"""A planned decoder becomes a bundle for ONNX Runtime: stages as ONNX, raw experts, a manifest.

    manifest.json                       every matrix and small tensor with its file and offset, every file with its hash
    weights/embedding.bin               rows that the host looks up (none where the head is tied)
    experts/layer-I/expert-E.bin        one expert: gate_up codes, scales, down codes, scales
    stages/layer-I.attention.onnx       with its numbers in layer-I.attention.data; likewise layer-I.dense and head
    stages/expert-WIDTH.PRECISION.onnx  the graph of all experts of this kind; their weights are its inputs

The numbers are those of the ExecuTorch bundle, weights rounded and activations in fp32, and are read back from these
files for what is measured. The folder appears under its name only when all of it stands, was read back, and every
stage was run against the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from edgeflex.bundle_moe import write_decoder_manifest
from edgeflex.errors import UnsupportedError
from edgeflex.exporters.decoder import compare_with_plan, copied_files, package_versions, planned_precisions
from edgeflex.exporters.decoder_files import BundleWeights
from edgeflex.exporters.onnx_decoder_check import check_stages
from edgeflex.exporters.onnx_decoder_files import OnnxFiles, stages
from edgeflex.exporters.onnx_decoder_graphs import sealed_place, stored_precision, weight_places
from edgeflex.files import staged_folder
from edgeflex.progress import Silent
from edgeflex.schema_moe import DecoderManifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from edgeflex.exporters.decoder import Measuring
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderPlan, MatrixRecord, StockProgram

_PACKAGES = ("edgeflex", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")


def export_onnx_decoder(
    source: DecoderSource,
    plan: DecoderPlan,
    out: Path,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    measured: Measuring | None = None,
) -> DecoderManifest:
    """Write the bundle of ``source`` as ``plan`` decided into ``out`` and return its manifest.

    Args:
        source: The decoder.
        plan: Precision of every unit, cache and context.
        out: The bundle's folder; it appears only when everything in it was checked.
        progress: Told about stages, experts and checks.
        overwrite: Replace what ``out`` holds.
        measured: Called with the numbers of the written bundle by name; returns fields of the manifest by name,
            such as ``measured_kl``.

    Raises:
        InputError: The plan is another decoder's, declined, or does not fit its units; or ``out`` cannot be written.
        UnsupportedError: A precision does not run for a matrix, ONNX cannot express a stage, or a stage does not
            hold the plan or compute what the reference does.
        MissingDependencyError: ONNX Runtime, which runs the stages for the check, is absent.
        DeviceError: The disk is full, or gives back other bytes than were written.
    """
    told = progress or Silent()
    precisions = planned_precisions(source, plan)
    with staged_folder(out, overwrite=overwrite) as folder:
        written = OnnxFiles(folder, source, precisions).write(told)
        compare_with_plan(written.records, precisions)
        compare_stages(folder, source, written.records, written.programs)
        weights = BundleWeights(folder, written.records, source)
        check_stages(source, weights, written.programs, told)
        found = dict(measured(weights)) if measured is not None else {}
        manifest = DecoderManifest(
            backend="onnx",
            versions=package_versions(_PACKAGES),
            graph=source.graph,
            plan=plan,
            matrices=written.records,
            files=(*written.entries, *copied_files(source, folder, told)),
            programs=written.programs,
            **found,
        )
        return write_decoder_manifest(folder, manifest).manifest


def compare_stages(
    folder: Path, source: DecoderSource, records: Sequence[MatrixRecord], programs: Sequence[StockProgram]
) -> None:
    """Read the written graphs back: every weight in its place and precision.

    Raises:
        UnsupportedError: A graph holds something else than the records say; all differences are listed.
    """
    known = {record.name: record for record in records}
    faults: list[str] = []
    for stage in stages(source.graph):
        held = _read_graph(folder / f"{stage.stem}.onnx")
        for local, full in stage.weights.items():
            faults += (f"{stage.stem}.onnx: {one}" for one in _weight_faults(held, local, known[full]))
    for program in programs:
        if program.role == "expert" and program.precision is not None:
            held = _read_graph(folder / program.path)
            faults += (
                f"{program.path}: {one}" for one in _precision_faults(held, ("gate_up", "down"), program.precision)
            )
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UnsupportedError(f"the written stages do not hold the plan:{listed}\nExport again.")


def _read_graph(path: Path) -> onnx.ModelProto:
    return onnx.load(str(path), load_external_data=False)


def _precision_faults(model: onnx.ModelProto, names: Iterable[str], precision: Precision) -> Iterator[str]:
    for name in names:
        held = stored_precision(model, name)
        if held is not precision:
            yield f"{name} is held as {held.value if held else 'nothing known'}, the plan says {precision.value}"


def _weight_faults(model: onnx.ModelProto, name: str, record: MatrixRecord) -> Iterator[str]:
    wanted = weight_places(name, record)
    yield from _precision_faults(model, (one for one in wanted if not one.endswith("_scales")), record.precision)
    for piece, place in wanted.items():
        if sealed_place(model, piece) != (record.file.rpartition("/")[2], place):
            yield f"{piece} is not what lies at {place.offset} of {record.file}"
