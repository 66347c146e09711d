"""ONNX graphs that TensorRT takes, with the recipe to build engines on the device: an engine never leaves its GPU.

The graphs are those of ``exporters.onnx`` with half-precision kernels. Each is held against the importer's rules of
every supported TensorRT; the recipe names the versions that take all of them. ``build.json`` is what ``edgeflex build``
reads on the board, ``build.sh`` does the same with ``trtexec`` where there is no Python.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from onnx import TensorProto
from pydantic import ValidationError

from edgeflex.bundle import PROGRAM_PART
from edgeflex.errors import InputError, UnsupportedError
from edgeflex.exporters.onnx import HALF
from edgeflex.exporters.onnx_lint import lint_versions, listed
from edgeflex.exporters.onnx_view import View, open_view, type_name
from edgeflex.exporters.tensorrt_script import build_script
from edgeflex.files import sha256_file, write_atomic
from edgeflex.schema_trt import (
    BUILD_SCRIPT,
    BUILD_SCRIPT_FILE,
    ENGINE_FOLDER,
    RECIPE,
    RECIPE_FILE,
    SUPPORTED_VERSIONS,
    AxisRange,
    BuildOptions,
    BuildRecipe,
    Need,
    Profile,
    RefitRecipe,
    SegmentRecipe,
    ShapeRange,
    TensorSpec,
    Version,
    version_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import onnx
    from torch import nn
    from torch.fx import GraphModule

    from edgeflex.exporters import Written
    from edgeflex.models import DynamicModel
    from edgeflex.schema import ModelGraph, Precision
    from edgeflex.transforms import PreparedModel

BACKEND = "tensorrt"
_DATA = ".data"
_DTYPES = {"float": "float32", "float8e4m3fn": "float8_e4m3fn"}
# What a number format asks of the GPU (NVIDIA's support matrices); the rest runs wherever TensorRT 10 does.
_NEEDS: Mapping[int, Need] = {
    TensorProto.FLOAT8E4M3FN: Need(compute_capability=(8, 9), reason="FP8 layers; Orin, which has 8.7, lacks them"),
    TensorProto.FLOAT4E2M1: Need(compute_capability=(10, 0), reason="FP4 layers"),
    TensorProto.BFLOAT16: Need(compute_capability=(8, 0), reason="BF16 numbers"),
    TensorProto.INT4: Need(compute_capability=(8, 0), reason="INT4 weights"),
}


@dataclass(frozen=True)
class EngineSource:
    """One graph that becomes one engine.

    Attributes:
        name: Of the engine.
        onnx: Path of the graph, relative to the folder.
        data: Path of its external data, or None.
        profiles: For each range of shapes that the engine is to be tuned for, how large the named axes may be, such
            as ``{"decode": {"T": AxisRange(least=1, best=1, most=1), "P": ...}}``; empty where shapes are fixed.
        rival_of: The engine that this one is to be tried against, its constants refitted; empty for one that is needed.
    """

    name: str
    onnx: str
    data: str | None = None
    profiles: Mapping[str, Mapping[str, AxisRange]] = field(default_factory=dict)
    rival_of: str = ""


def write_recipe(
    folder: Path,
    sources: Sequence[EngineSource],
    *,
    options: BuildOptions | None = None,
    versions: Sequence[Version] = SUPPORTED_VERSIONS,
) -> BuildRecipe:
    """Hold the graphs in ``folder`` against TensorRT's rules; write ``build.json`` and ``build.sh`` beside them.

    Args:
        folder: Where the graphs lie.
        sources: The graphs, in the order in which engines are built.
        options: How the builder is set.
        versions: The TensorRT versions in question.

    Returns:
        The recipe; its versions are those that take every graph.

    Raises:
        UnsupportedError: No version takes all graphs, or a dynamic axis has no range; all faults are listed.
        InputError: A graph is missing or no ONNX model, or two engines have one name.
    """
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise InputError(f"engines {', '.join(twice)} are named twice; each needs a name of its own.")
    taken = _accepted(folder, sources, versions)
    views = {source.name: open_view(folder / source.onnx) for source in sources}
    try:
        made = [(source, _segment(folder, source, views[source.name])) for source in sources]
        segments = tuple(segment for source, segment in made if not source.rival_of)
        recipe = BuildRecipe(
            segments=segments,
            refits=tuple(_refit(source, one, views[source.name]) for source, one in made if source.rival_of),
            least_version=taken[0],
            versions=taken,
            needs=_needs(views.values()),
            options=options or BuildOptions(),
            cuda_graph=not any(segment.profiles for segment in segments),
        )
    except ValidationError as error:
        faults = "; ".join(str(fault["msg"]) for fault in error.errors(include_url=False, include_input=False))
        raise UnsupportedError(f"no recipe can be written for these graphs: {faults}. Rename or bound them.") from None
    document = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, indent=1)
    write_atomic(folder / RECIPE_FILE, document + "\n")
    write_atomic(folder / BUILD_SCRIPT_FILE, build_script(recipe))
    (folder / BUILD_SCRIPT_FILE).chmod(0o755)
    return recipe


def _accepted(folder: Path, sources: Sequence[EngineSource], versions: Sequence[Version]) -> tuple[Version, ...]:
    """Return the versions that take every graph, oldest first."""
    found = {source.onnx: lint_versions(folder / source.onnx, versions) for source in sources}
    taken = tuple(sorted(one for one in versions if not any(by_version[one] for by_version in found.values())))
    if not taken:
        known = f"{version_text(min(versions))} to {version_text(max(versions))}"
        raise UnsupportedError(f"no TensorRT from {known} takes what was written:{listed(found)}")
    return taken


def _segment(folder: Path, source: EngineSource, view: View) -> SegmentRecipe:
    graph = view.model.graph
    inputs = tuple(_spec(value) for value in graph.input if value.name not in view.constants)
    return SegmentRecipe(
        name=source.name,
        onnx=source.onnx,
        onnx_sha256=sha256_file(folder / source.onnx),
        data=source.data,
        data_sha256=None if source.data is None else sha256_file(folder / source.data),
        engine=f"{ENGINE_FOLDER}/{source.name}.engine",
        inputs=inputs,
        outputs=tuple(_spec(value) for value in graph.output),
        profiles=tuple(_profile(source, name, ranges, inputs) for name, ranges in source.profiles.items()),
    )


def _refit(source: EngineSource, segment: SegmentRecipe, view: View) -> RefitRecipe:
    """Return a rival's recipe: its constants in external data are what is refitted."""
    weights = [
        TensorSpec.model_validate({"name": one.name, "dtype": "float32", "shape": tuple(one.dims)})
        for one in view.model.graph.initializer
        if one.data_location == TensorProto.EXTERNAL
    ]
    return RefitRecipe(**dict(segment), rival_of=source.rival_of, weights=tuple(weights))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    kind = type_name(tensor.elem_type)
    axes = tuple(axis.dim_param or int(axis.dim_value) for axis in tensor.shape.dim)
    return TensorSpec.model_validate({"name": value.name, "dtype": _DTYPES.get(kind, kind), "shape": axes})


def _profile(source: EngineSource, name: str, ranges: Mapping[str, AxisRange], inputs: Sequence[TensorSpec]) -> Profile:
    dynamic = [spec for spec in inputs if spec.dynamic]
    bare = sorted({axis for spec in dynamic for axis in spec.shape if isinstance(axis, str)} - set(ranges))
    if bare:
        raise UnsupportedError(f"{source.onnx}: profile {name!r} does not bound the axes {', '.join(bare)}. Add them.")
    return Profile(name=name, shapes={spec.name: _bounds(spec, ranges) for spec in dynamic})


def _bounds(spec: TensorSpec, ranges: Mapping[str, AxisRange]) -> ShapeRange:
    axes = [AxisRange(least=a, best=a, most=a) if isinstance(a, int) else ranges[a] for a in spec.shape]
    return ShapeRange(
        least=tuple(axis.least for axis in axes),
        best=tuple(axis.best for axis in axes),
        most=tuple(axis.most for axis in axes),
    )


def _needs(views: Iterable[View]) -> tuple[Need, ...]:
    kinds = {kind for view in views for kind in view.types.values()}
    return tuple(need for kind, need in _NEEDS.items() if kind in kinds)


def engine_sources(written: Written) -> tuple[EngineSource, ...]:
    """Return the graphs of a written program, segment by segment, with their external data."""
    roles = [role for role in written.files if role.startswith(PROGRAM_PART) and not role.endswith(_DATA)]
    return tuple(
        EngineSource(
            name=role.removeprefix(PROGRAM_PART), onnx=written.files[role], data=written.files.get(f"{role}{_DATA}")
        )
        for role in roles
    )


class TensorrtExporter:
    """See ``edgeflex.exporters.Exporter``."""

    def prepare(
        self, model: DynamicModel, precisions: Mapping[str, Precision], ranges: Mapping[str, tuple[float, float]]
    ) -> PreparedModel:
        """Return the segments with the numbers that TensorRT's kernels are given."""
        return HALF.prepare(model, precisions, ranges)

    def prepare_segment(
        self,
        segment: GraphModule,
        index: int,
        precisions: Mapping[str, Precision],
        ranges: Mapping[str, tuple[float, float]],
    ) -> nn.Module:
        """Return one segment with those numbers."""
        return HALF.prepare_segment(segment, index, precisions, ranges)

    def write(self, prepared: PreparedModel, graph: ModelGraph, folder: Path) -> Written:
        """Write the graphs, hold them against TensorRT's rules, and add recipe and script.

        The size is that of the graphs and their weights: the recipe is no part of the program that runs.

        Raises:
            UnsupportedError: As the protocol says, or no supported TensorRT takes the graphs.
        """
        written = HALF.write(prepared, graph, folder)
        write_recipe(folder, engine_sources(written))
        files = {**written.files, RECIPE: RECIPE_FILE, BUILD_SCRIPT: BUILD_SCRIPT_FILE}
        return replace(written, files=files)

    def pad(self, written: Written, folder: Path, size_bytes: int) -> None:
        """Pad the program, and write the recipe again, whose hashes have changed."""
        HALF.pad(written, folder, size_bytes)
        write_recipe(folder, engine_sources(written))


TENSORRT = TensorrtExporter()
