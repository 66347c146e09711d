"""A planned decoder becomes a bundle for TensorRT: a graph for each structure, raw weights, and the recipe of engines.

    manifest.json                       every matrix and small tensor with its file and offset, every file with its hash
    weights/embedding.bin               rows that the host looks up
    weights/layer-I.bin                 everything of a layer but its experts
    weights/head.bin                    final norm, and the head unless it is tied
    experts/layer-I/expert-E.bin        one expert: gate_up codes, scales, down codes, scales
    stages/attention-K.onnx             graphs without weights; layers of one structure and precision share one
    stages/dense-K.onnx, stages/expert-WIDTH.PRECISION.onnx, stages/head.onnx
    stages/gather.onnx, stages/sum-K.onnx
    expert-WIDTH.fp32.refit.onnx        the same experts with the first one's file as constants, to be refitted
    build.json, build.sh                what to build on the device

Every weight is an input of an engine, in the bytes of its file (``tensorrt_decoder_graphs``): engines are few and
small, numbers lie on disk once, and an expert enters an engine by the address that its bytes are at. The folder appears
under its name only when all of it stands, was read back, is what TensorRT's importer takes, and every stage was run
against the reference with the weights of every layer.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import onnx

from edgeflex.bundle_moe import seal_file, write_decoder_manifest
from edgeflex.errors import UnsupportedError
from edgeflex.exporters.decoder import compare_with_plan, copied_files, package_versions, planned_precisions
from edgeflex.exporters.decoder_files import BundleWeights
from edgeflex.exporters.decoder_raw import EMBEDDING_FILE, RawFiles, WrittenFiles, template_path
from edgeflex.exporters.onnx_decoder_check import check_stages, plain_session
from edgeflex.exporters.onnx_decoder_files import Stage, stages
from edgeflex.exporters.onnx_decoder_stages import feed_forward_template
from edgeflex.exporters.tensorrt import EngineSource, write_recipe
from edgeflex.exporters.tensorrt_decoder_graphs import Weight, border_faults, engine_stage, require_half, widened
from edgeflex.exporters.tensorrt_decoder_refit import check_refit, refit_stage
from edgeflex.exporters.tensorrt_decoder_rows import (
    GATHER_STAGE,
    ROWS,
    TOKENS,
    check_rows,
    gather_stage,
    sum_stage,
)
from edgeflex.files import staged_folder
from edgeflex.progress import Silent
from edgeflex.schema import Precision
from edgeflex.schema_moe import DecoderManifest, StockProgram
from edgeflex.schema_trt import BUILD_SCRIPT, BUILD_SCRIPT_FILE, RECIPE, RECIPE_FILE, AxisRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeflex.exporters.decoder import Measuring
    from edgeflex.models.decoders import DecoderSource
    from edgeflex.progress import Progress
    from edgeflex.schema import FileEntry
    from edgeflex.schema_moe import DecoderGraph, DecoderPlan, MatrixRecord
    from edgeflex.transforms.decoder_weights import StoredMatrix

CACHED = "cached"  # the dynamic axis of the cache's rows
_ADDRESS_ALIGNMENT = 256  # of what an engine is given (IExecutionContext::setTensorAddress)
_HEAD_FILE, _HEAD_STAGE = "weights/head.bin", "stages/head.onnx"
_PACKAGES = ("edgeflex", "numpy", "onnx", "onnxruntime", "onnxscript", "torch")
_ONE = AxisRange(least=1, best=1, most=1)


def export_tensorrt_decoder(
    source: DecoderSource,
    plan: DecoderPlan,
    out: Path,
    progress: Progress | None = None,
    *,
    half: bool = True,
    overwrite: bool = False,
    measured: Measuring | None = None,
) -> DecoderManifest:
    """Write the bundle of ``source`` as ``plan`` decided into ``out`` and return its manifest.

    Args:
        source: The decoder.
        plan: Precision of every unit, cache and context.
        out: The bundle's folder; it appears only when everything in it was checked.
        progress: Told about stages, experts and checks.
        half: Quantised matrices multiply in fp16; else everything is fp32, as slow as it is exact.
        overwrite: Replace what ``out`` holds.
        measured: Called with the numbers of the written bundle by name; returns fields of the manifest by name,
            such as ``measured_kl``.

    Raises:
        InputError: The plan is another decoder's, declined, or does not fit its units; or ``out`` cannot be written.
        UnsupportedError: A precision does not run for a matrix, ONNX cannot express a stage, no supported TensorRT
            takes the stages, or one does not hold the plan or compute what the reference does.
        MissingDependencyError: ONNX Runtime, which runs the stages for the check, is absent.
        DeviceError: The disk is full, or gives back other bytes than were written.
    """
    told = progress or Silent()
    _require_aligned(source.graph)
    precisions = planned_precisions(source, plan)
    with staged_folder(out, overwrite=overwrite) as folder:
        files = TensorrtFiles(folder, source, precisions, half=half)
        written = files.write(told)
        compare_with_plan(written.records, precisions)
        compare_borders(folder, source.graph, precisions, written.programs)
        rows = row_stages(source.graph, written.programs)
        write_recipe(folder, (*engine_sources(written.programs, plan, rows), *rival_sources(files.rivals, plan)))
        weights = BundleWeights(folder, written.records, source)
        numbers = StageNumbers(source.graph, weights)
        check_stages(source, weights, written.programs, told, given=numbers, opened=widened_session)
        for path, top_k in rows.items():
            check_rows(folder, path, top_k)
        for path, (_, pair) in files.rivals.items():
            check_refit(folder, path, *(weights(one.name) for one in pair))
        found = dict(measured(weights)) if measured is not None else {}
        manifest = DecoderManifest(
            backend="tensorrt",
            versions=package_versions(_PACKAGES),
            graph=source.graph,
            plan=plan,
            matrices=written.records,
            files=(*written.entries, *_recipe_files(folder), *copied_files(source, folder, told)),
            programs=written.programs,
            **found,
        )
        return write_decoder_manifest(folder, manifest).manifest


def _require_aligned(graph: DecoderGraph) -> None:
    row_bytes = graph.hidden_dim * 4
    if row_bytes % _ADDRESS_ALIGNMENT:
        raise UnsupportedError(
            f"{graph.name}: rows of {graph.hidden_dim} numbers take {row_bytes} bytes, and TensorRT takes addresses "
            f"that are multiples of {_ADDRESS_ALIGNMENT}. Export for executorch or onnx instead."
        )


def row_stages(graph: DecoderGraph, programs: Sequence[StockProgram]) -> dict[str, int]:
    """Return the most experts of a token by the path of each stage without weights."""
    top_ks = {layer.index: layer.routing.top_k if layer.routing else 0 for layer in graph.layers}
    found = {one.path: top_ks[one.layer] for one in programs if one.role == "sum" and one.layer is not None}
    return found | {one.path: max(top_ks.values()) for one in programs if one.role == "gather"}


def engine_sources(
    programs: Sequence[StockProgram], plan: DecoderPlan, top_ks: Mapping[str, int]
) -> tuple[EngineSource, ...]:
    """Return each graph once, with the shapes that its engine is to be tuned for: one token, and a prompt's chunk."""
    found = {}
    for path, top_k in {program.path: top_ks.get(program.path, 0) for program in programs}.items():
        name = path.rpartition("/")[2].removesuffix(".onnx")
        found[path] = EngineSource(name, path, profiles={} if path == _HEAD_STAGE else _profiles(path, plan, top_k))
    return tuple(found.values())


def rival_sources(
    rivals: Mapping[str, tuple[str, Sequence[MatrixRecord]]], plan: DecoderPlan
) -> tuple[EngineSource, ...]:
    """Return the graphs whose constants are refitted, with the shapes of those that they are tried against.

    Args:
        rivals: By path: the graph's that it is tried against, and the matrices that are its constants.
        plan: Says how many tokens there are.
    """
    return tuple(
        EngineSource(
            name=path.removesuffix(".onnx"),
            onnx=path,
            data=pair[0].file,
            profiles=_profiles(template, plan, 0),
            rival_of=template.rpartition("/")[2].removesuffix(".onnx"),
        )
        for path, (template, pair) in rivals.items()
    )


def _profiles(path: str, plan: DecoderPlan, top_k: int) -> dict[str, dict[str, AxisRange]]:
    """Return the ranges of each dynamic axis for a step of decoding and for a chunk of a prompt."""
    chunk, context = plan.prefill_chunk_tokens, plan.context_tokens
    cached = {CACHED: AxisRange(least=1, best=context, most=context)}
    decode = {TOKENS: _ONE, ROWS: AxisRange(least=top_k or 1, best=top_k or 1, most=top_k or 1), **cached}
    rows = max(1, chunk * top_k)
    least = 1 if path == GATHER_STAGE else max(1, top_k)
    prefill = {TOKENS: AxisRange(least=1, best=chunk, most=chunk), **cached}
    prefill[ROWS] = AxisRange(least=least, best=rows, most=rows)
    return {"prefill": prefill} if path == GATHER_STAGE else {"decode": decode, "prefill": prefill}


def _recipe_files(folder: Path) -> Iterator[FileEntry]:
    yield seal_file(folder, RECIPE_FILE, RECIPE)
    yield seal_file(folder, BUILD_SCRIPT_FILE, BUILD_SCRIPT)


class TensorrtFiles(RawFiles):
    """Writes weights and stages into a folder; see ``RawFiles``.

    Args:
        folder: The bundle to be.
        source: The decoder.
        precisions: Of every unit.
        half: Quantised matrices multiply in fp16.
    """

    def __init__(self, folder: Path, source: DecoderSource, precisions: Mapping[str, Precision], *, half: bool) -> None:
        super().__init__(folder, source, precisions, expert_alignment=_ADDRESS_ALIGNMENT)
        self._half = half
        self.rivals: dict[str, tuple[str, Sequence[MatrixRecord]]] = {}
        self._known: dict[bytes, str] = {}  # paths by graph
        self._counts: Counter[str] = Counter()

    def write(self, told: Progress) -> WrittenFiles:
        """Write everything; memory holds one matrix, or a few experts."""
        graph = self.source.graph
        for place in ("stages", "weights"):
            (self.folder / place).mkdir()
        ours = tuple(stages(graph))
        with told.task("stages", len(ours)) as advance:
            for stage in ours:
                self._write_stage(stage)
                advance(1)
        for width, precision in self.expert_kinds():
            path = template_path(width, precision)
            weights = expert_weights(graph.hidden_dim, width, precision)
            template = feed_forward_template(graph.hidden_dim, width, gated=False)
            self.save(engine_stage(template, weights, half=self._half), path)
            self.programs.append(StockProgram(role="expert", layer=None, precision=precision, path=path))
        self._write_row_stages()
        self._write_dense()
        self.write_experts(told)
        self._write_rivals()
        return self.written()

    def stored(self, name: str) -> StoredMatrix:
        """Return a tensor in the precision of its unit, if engines can multiply with it."""
        found = super().stored(name)
        if self._half:
            require_half(name, found)
        return found

    def _write_stage(self, stage: Stage) -> None:
        """Write a stage's graph unless an equal one is there."""
        weights = stage_weights(self.source.graph, stage, self.precisions)
        self._save_once(engine_stage(stage.template(), weights, half=self._half), stage.role, stage.layer)

    def _write_row_stages(self) -> None:
        """Write the stages that need no weights."""
        graph = self.source.graph
        for layer in graph.layers:
            top_k = layer.routing.top_k if layer.routing else 0
            dense = bool(layer.shared_dim) or layer.routing is None
            self._save_once(sum_stage(graph.hidden_dim, top_k, dense=dense), "sum", layer.index)
        if any(layer.routing for layer in graph.layers):
            self.save(gather_stage(graph.hidden_dim), GATHER_STAGE)
            self.programs.append(StockProgram(role="gather", layer=None, precision=None, path=GATHER_STAGE))

    def _write_rivals(self) -> None:
        """Write a second graph of experts in fp32, for each of their sizes, with the first one's file as constants.

        It lies above the folder of that file, since ONNX lets data be beside or below a graph alone.
        """
        experts = [one for one in self.records if ".experts." in one.name and one.precision is Precision.FP32]
        for width, precision in self.expert_kinds():
            if precision is not Precision.FP32:
                continue
            down = next(one for one in experts if one.name.endswith(".down") and one.columns == width)
            gate_up = next(one for one in experts if one.name == f"{down.name.removesuffix('down')}gate_up")
            path = f"expert-{width}.{precision.value}.refit.onnx"
            self.save(refit_stage(self.source.graph.hidden_dim, width, (gate_up, down)), path)
            self.rivals[path] = (template_path(width, precision), (gate_up, down))

    def _save_once(
        self, model: onnx.ModelProto, role: Literal["attention", "dense", "head", "sum"], layer: int | None
    ) -> None:
        """Write a graph unless an equal one is there."""
        content = model.SerializeToString(deterministic=True)
        if content not in self._known:
            count = self._counts[role]
            self._counts[role] += 1
            self._known[content] = _HEAD_STAGE if role == "head" else f"stages/{role}-{count}.onnx"
            self.save(model, self._known[content])
        self.programs.append(StockProgram(role=role, layer=layer, precision=None, path=self._known[content]))

    def _write_dense(self) -> None:
        """Write every weight outside the experts."""
        graph = self.source.graph
        self.write_weights(EMBEDDING_FILE, ("embedding",))
        layers: dict[int, list[str]] = {layer.index: [] for layer in graph.layers}
        for stage in stages(graph):
            if stage.layer is not None:
                layers[stage.layer] += stage.weights.values()
        for index, names in layers.items():
            self.write_weights(f"weights/layer-{index}.bin", names)
        if graph.tied_embedding:
            self.write_weights(_HEAD_FILE, ("norm",))
            self.copy_record("embedding", to="head")
        else:
            self.write_weights(_HEAD_FILE, ("norm", "head"))


def stage_weights(graph: DecoderGraph, stage: Stage, precisions: Mapping[str, Precision]) -> tuple[Weight, ...]:
    """Return what enters a stage, in the order of its inputs."""
    matrices, smalls = graph.matrix_shapes(), graph.small_shapes()
    unit = "head" if stage.layer is None else f"layers.{stage.layer}"
    return tuple(
        Weight(local, precisions[unit], matrices[full])
        if full in matrices
        else Weight(local, Precision.FP32, smalls[full])
        for local, full in stage.weights.items()
    )


def expert_weights(hidden_dim: int, width: int, precision: Precision) -> tuple[Weight, Weight]:
    """Return what enters a template of experts."""
    return Weight("gate_up", precision, (2 * width, hidden_dim)), Weight("down", precision, (hidden_dim, width))


def widened_session(path: Path) -> Any:
    """Return an ONNX Runtime session of a graph in which fp16 is read as fp32, and which takes parts of matrices.

    Its kernels for processors compute fp16 in fp32, and leave out the rounding on some processors and not on others,
    whatever the graph says. Without fp16 the answers are those of the reference, closely, on all of them.

    Raises:
        MissingDependencyError: ONNX Runtime is absent.
        UnsupportedError: It cannot load the graph.
    """
    return plain_session(path, widened(onnx.load(str(path))).SerializeToString())


class StageNumbers:
    """The weights of a stage as arrays of their stored form, by the names of its inputs."""

    def __init__(self, graph: DecoderGraph, weights: BundleWeights) -> None:
        self._names: Mapping[tuple[str, int | None], Mapping[str, str]] = {
            (one.role, one.layer): one.weights for one in stages(graph)
        }
        self._weights = weights

    def __call__(self, program: StockProgram) -> Mapping[str, NDArray[Any]]:
        """Return what a layer's stage, or the head, is given beside its values."""
        found: dict[str, NDArray[Any]] = {}
        for local, full in self._names[program.role, program.layer].items():
            stored = self._weights.stored(full)
            found[local] = stored.codes
            if stored.scales is not None:
                found[f"{local}_scales"] = stored.scales
        return found


def compare_borders(
    folder: Path, graph: DecoderGraph, precisions: Mapping[str, Precision], programs: Sequence[StockProgram]
) -> None:
    """Read the written graphs back: each takes every weight in the form that the plan's precision has on disk.

    Raises:
        UnsupportedError: A graph takes something else, or holds a weight itself; all differences are listed.
    """
    by_place: Mapping[tuple[str, int | None], Stage] = {(one.role, one.layer): one for one in stages(graph)}
    widths = {template_path(one.expert_dim, kind): one.expert_dim for one in graph.layers for kind in Precision}
    faults: dict[str, None] = {}
    for program in programs:
        weights: tuple[Weight, ...] = ()
        if program.role == "expert":
            precision = program.precision or Precision.FP32
            weights = expert_weights(graph.hidden_dim, widths[program.path], precision)
        elif program.role in {"attention", "dense", "head"}:
            stage = by_place[program.role, program.layer]
            weights = stage_weights(graph, stage, precisions)
        model = onnx.load(str(folder / program.path), load_external_data=False)
        faults |= dict.fromkeys(f"{program.path}: {fault}" for fault in border_faults(model, weights))
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UnsupportedError(f"the written stages do not hold the plan:{listed}\nExport again.")
