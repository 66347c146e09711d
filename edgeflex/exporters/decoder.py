"""A planned decoder becomes a bundle: weight files that stock ExecuTorch loads, template programs, a manifest.

Weights are read, rounded and written file by file, an expert or the dense part of a layer each, so that memory
never holds more than a few of them. The folder appears under its name only when all of it stands, was read back,
and the programs in it were run against the reference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeflex.bundle_moe import CONFIG, TOKENIZER, seal_file, write_decoder_manifest
from edgeflex.errors import InputError, UnsupportedError
from edgeflex.exporters.decoder_files import BundleWeights, WeightFiles, unit_of
from edgeflex.files import staged_folder
from edgeflex.progress import Silent
from edgeflex.schema import Precision
from edgeflex.schema_moe import DecoderManifest, Expected, StockProgram
from edgeflex.transforms.decoder_weights import require_runnable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from edgeflex.exporters.flat_tensor import DataKey
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema import FileEntry
    from edgeflex.schema_moe import DecoderPlan, MatrixRecord

Weights = Callable[[str], NDArray[np.float32]]
Expecting = Callable[[Weights], tuple[Expected, ...]]
Measuring = Callable[[Weights], "Mapping[str, Any]"]

_PACKAGES = ("edgeflex", "executorch", "numpy", "torch", "torchao")
_COPIED = {"config.json": CONFIG, "generation_config.json": "", "tokenizer_config.json": ""}


def export_decoder(
    source: DecoderSource,
    plan: DecoderPlan,
    out: Path,
    progress: Progress | None = None,
    *,
    stock: bool = True,
    overwrite: bool = False,
    expected: Expecting | None = None,
    measured: Measuring | None = None,
) -> DecoderManifest:
    """Write the bundle of ``source`` as ``plan`` decided into ``out`` and return its manifest.

    Args:
        source: The decoder.
        plan: Precision of every unit, cache and context.
        out: The bundle's folder; it appears only when everything in it was checked.
        progress: Told about programs and weight files.
        stock: Also write programs for a stock ExecuTorch and run them against the reference.
        overwrite: Replace what ``out`` holds.
        expected: Called with the numbers of the written bundle by name; its answers go into the manifest.
        measured: Called likewise; returns fields of the manifest by name, such as ``measured_kl``.

    Raises:
        InputError: The plan is another decoder's, declined, or does not fit its units; or ``out`` cannot be written.
        UnsupportedError: A precision does not run for a matrix, ExecuTorch cannot lower a program, or a program
            does not compute what the reference does.
        DeviceError: The disk is full, or gives back other bytes than were written.
    """
    told = progress or Silent()
    precisions = planned_precisions(source, plan)
    with staged_folder(out, overwrite=overwrite) as folder:
        programs = _write_programs(source, plan, precisions, folder, told) if stock else _Programs()
        entries, records = WeightFiles(folder, source, precisions, programs.asked).write(told)
        compare_with_plan(records, precisions)
        weights = BundleWeights(folder, records, source)
        if stock:
            _check_programs(source, weights, programs.stock, plan, told)
        found = dict(measured(weights)) if measured is not None else {}
        if expected is not None:
            found["expected"] = expected(weights)
        manifest = DecoderManifest(
            versions=package_versions(_PACKAGES),
            graph=source.graph,
            plan=plan,
            matrices=records,
            files=(*entries, *programs.entries, *copied_files(source, folder, told)),
            programs=tuple(programs.stock),
            **found,
        )
        return write_decoder_manifest(folder, manifest).manifest


def planned_precisions(source: DecoderSource, plan: DecoderPlan) -> dict[str, Precision]:
    """Return the precision of every unit of ``source``; a tied head has that of the embedding.

    Raises:
        InputError: The plan is of another decoder, declined, or its choices do not cover the units; all faults
            stand in one error.
        UnsupportedError: A precision does not run for one of the unit's matrices.
    """
    graph = source.graph
    if plan.graph_digest != graph.digest():
        raise InputError(f"the plan was made for another decoder than {graph.name!r}. Calibrate and plan this one.")
    if plan.verdict == "decline":
        raise InputError(f"the plan's verdict is decline ({'; '.join(plan.reasons)}). Plan with a larger budget.")
    matrices = {name: unit for name in source.names if (unit := unit_of(name))}
    chosen = {choice.subject: choice.option for choice in plan.choices}
    if graph.tied_embedding and "embedding" in chosen:
        chosen.setdefault("head", chosen["embedding"])
    known = {precision.value: precision for precision in Precision}
    units = list(dict.fromkeys(matrices.values()))
    faults = [f"{unit} has no precision" for unit in units if unit not in chosen]
    faults += [f"{unit} is no unit of this decoder" for unit in chosen if unit not in matrices.values()]
    faults += [f"{unit} has the unknown precision {name!r}" for unit, name in chosen.items() if name not in known]
    if graph.tied_embedding and chosen.get("head") != chosen.get("embedding"):
        faults.append("the head is tied to the embedding and must have its precision")
    if faults:
        raise InputError.collect("the plan does not fit the decoder", faults)
    for name, unit in matrices.items():
        require_runnable(known[chosen[unit]], source.shape(name)[-1], name)
    return {unit: known[chosen[unit]] for unit in units}


@dataclass
class _Programs:
    """Stock programs, and for each kind of file under which names they ask for its pieces."""

    stock: list[StockProgram] = field(default_factory=list)
    entries: list[FileEntry] = field(default_factory=list)
    asked: dict[str, dict[str, tuple[DataKey, ...]]] = field(default_factory=dict)

    def ask(self, kind: str, keys: Mapping[str, tuple[DataKey, ...]]) -> None:
        """Note that a program asks for pieces of files of this kind."""
        held = self.asked.setdefault(kind, {})
        for piece, names in keys.items():
            held[piece] = (*held.get(piece, ()), *names)


def _write_programs(
    source: DecoderSource, plan: DecoderPlan, precisions: Mapping[str, Precision], folder: Path, told: Progress
) -> _Programs:
    """Lower every template once, and note which program every file is for."""
    from edgeflex.exporters.decoder_programs import Template, template_uses

    uses = tuple(template_uses(source, plan, precisions))
    stems = {use.stem: use for use in uses}
    made: dict[str, Template] = {}
    found = _Programs()
    place = folder / "programs"
    place.mkdir()
    with told.task("stock programs", len(stems)) as advance:
        for stem, use in stems.items():
            made[stem] = use.build(place)
            (place / f"{stem}.pte").write_bytes(made[stem].program)
            found.entries.append(seal_file(folder, f"programs/{stem}.pte"))
            advance(1)
    for use in uses:
        keys = made[use.stem].keys
        found.ask(use.kind, {_renamed(piece, use.renamed): names for piece, names in keys.items()})
        found.stock.append(
            StockProgram(
                role=use.role, layer=use.layer, precision=use.precision, path=f"programs/{use.stem}.pte", data=use.data
            )
        )
    return found


def _renamed(piece: str, renamed: Mapping[str, str]) -> str:
    """Return a piece's name in the file, where it is another than in the program."""
    first, dot, rest = piece.partition(".")
    return renamed.get(first, first) + dot + rest


def _check_programs(
    source: DecoderSource, weights: BundleWeights, programs: Iterable[StockProgram], plan: DecoderPlan, told: Progress
) -> None:
    from edgeflex.exporters.decoder_check import check_programs
    from edgeflex.exporters.decoder_programs import lengths_of

    with told.task("stock programs against the reference", 1) as advance:
        check_programs(source, weights, tuple(programs), lengths_of(plan))
        advance(1)


def compare_with_plan(records: Iterable[MatrixRecord], precisions: Mapping[str, Precision]) -> None:
    """Refuse a bundle that holds a matrix in another precision than the plan's.

    Raises:
        UnsupportedError: It does; all differences are listed.
    """
    faults = []
    for record in records:
        unit = unit_of(record.name)
        wanted = precisions[unit] if unit else Precision.FP32
        if record.precision is not wanted:
            faults.append(f"{record.name} is stored as {record.precision.value}, the plan says {wanted.value}")
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UnsupportedError(f"the written bundle does not hold the plan:{listed}\nExport again.")


def copied_files(source: DecoderSource, folder: Path, told: Progress) -> Iterator[FileEntry]:
    """Copy the tokenizer and the configuration; without a tokenizer a bundle takes token numbers only."""
    try:
        tokenizer = source.tokenizer_file
    except InputError as error:
        told.note(f"{error} The bundle takes token numbers only.")
    else:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        yield seal_file(folder, "tokenizer.json", TOKENIZER)
    for name, role in _COPIED.items():
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
            yield seal_file(folder, name, role or name)


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of ``packages`` that are installed."""
    return {package: known for package in packages if (known := _version(package))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
