"""How experts get their weights on this device: as an engine's inputs, or put into an engine before each run.

``build`` of a decoder measures both where there are both, on one expert that has to come to the device first, and the
index of engines keeps the figures and the faster way. Both ways bring the expert to the same slot, so that the choice
holds for experts that are there already too.

Only fp32 experts have a rival. Codes of 4 and 8 bits enter as UINT8, which TensorRT has at an engine's border alone,
and nothing it publishes says that INT4 and INT8 constants can be replaced in an engine, in all versions from 10.3 on.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgeflex.errors import DeviceError, EdgeflexError
from edgeflex.files import read_bytes
from edgeflex.runtimes.cuda_driver import CudaContext
from edgeflex.runtimes.raw_store import expert_pairs
from edgeflex.runtimes.tensorrt_build import open_machine, read_recipe
from edgeflex.runtimes.tensorrt_memory import FLOAT_BYTES, ExpertArena, Staging
from edgeflex.runtimes.tensorrt_stages import Engines
from edgeflex.schema import Precision
from edgeflex.schema_trt import INDEX_FILE, EngineIndex, ExpertWay

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any, Literal

    from numpy.typing import NDArray

    from edgeflex.bundle_moe import DecoderBundle
    from edgeflex.runtimes.raw_store import Pair
    from edgeflex.runtimes.tensorrt_build import Machine
    from edgeflex.schema_moe import StockProgram
    from edgeflex.schema_trt import BuildRecipe, SegmentRecipe

_WARM_UPS, _RUNS = 3, 15
_MOST_ERROR = 1e-4  # of the largest number: fp32 in another order
_KEY = (0, 0)  # the one expert that is measured


def measuring(
    bundle: DecoderBundle, *, library: Any = None, clock: Callable[[], float] = time.perf_counter
) -> Callable[[Path, EngineIndex], EngineIndex]:
    """Return what ``tensorrt_build.build`` is handed as ``measure``, to choose how experts get their weights.

    Args:
        bundle: The decoder that is built.
        library: What to ask instead of the driver's own library.
        clock: Seconds, rising.
    """

    def measured(folder: Path, index: EngineIndex) -> EngineIndex:
        ways = measured_ways(bundle, folder, index, library=library, clock=clock)
        return index.model_copy(update={"experts": ways})

    return measured


def measured_ways(
    bundle: DecoderBundle,
    folder: Path,
    index: EngineIndex,
    *,
    library: Any = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[ExpertWay, ...]:
    """Return for each segment of experts the faster way, with the figures, or why there is only one.

    Where something fails on the way, or the two differ in their answers, weights stay inputs, and the reason says so.

    Args:
        bundle: The decoder.
        folder: Where its engines are.
        index: What was built.
        library: What to ask instead of the driver's own library.
        clock: Seconds, rising.

    Raises:
        DeviceError: There is no usable driver or device.
        BundleError: The bundle is damaged.
    """
    recipe = read_recipe(bundle)
    trial = _Trial(bundle, folder, recipe, index, open_machine(library), library, clock)
    known = {one.segment: one for one in index.experts}
    segments = {one.onnx: one for one in recipe.segments}
    rivals = {one.rival_of for one in recipe.refits}
    found = []
    for program in bundle.manifest.programs:
        segment = segments.get(program.path)
        if program.role != "expert" or segment is None:
            continue
        if segment.name in rivals and segment.name not in known:
            found.append(trial.way(segment))
        else:
            found.append(known.get(segment.name) or _only_inputs(segment, program))
    return tuple(found)


def kept_ways(folder: Path) -> tuple[ExpertWay, ...]:
    """Return what was chosen for the engines in a folder; nothing where none were built.

    Raises:
        InputError: Their index is damaged.
    """
    path = folder / INDEX_FILE
    return EngineIndex.parse(read_bytes(path, "the index of engines"), str(path)).experts if path.is_file() else ()


def _only_inputs(segment: SegmentRecipe, program: StockProgram) -> ExpertWay:
    kind = "these" if program.precision is None else program.precision.value
    if program.precision is Precision.FP32:
        reason = "the bundle holds no graph of them to refit: it was exported by an earlier version"
    else:
        reason = f"{kind} weights cannot be refitted: TensorRT takes them as UINT8 inputs alone"
    return ExpertWay(segment=segment.name, way="inputs", reason=reason)


class _Answer(NamedTuple):
    """What one way took, and the row that it gave."""

    seconds: float
    row: NDArray[np.float32]


@dataclass(frozen=True)
class _Trial:
    """What stays the same from segment to segment and from way to way."""

    bundle: DecoderBundle
    folder: Path
    recipe: BuildRecipe
    index: EngineIndex
    machine: Machine
    library: Any
    clock: Callable[[], float]

    def way(self, segment: SegmentRecipe) -> ExpertWay:
        """Return the faster way for a segment that has a rival."""
        try:
            inputs, refit = self._alone(segment, "inputs"), self._alone(segment, "refit")
        except EdgeflexError as error:
            return ExpertWay(segment=segment.name, way="inputs", reason=f"refit was not measured: {error}")
        measured = ExpertWay(
            segment=segment.name,
            way="refit" if refit.seconds < inputs.seconds else "inputs",
            inputs_s=inputs.seconds,
            refit_s=refit.seconds,
            reason="the faster one for an expert that is not on the device, one token, median of several runs",
        )
        apart = float(np.abs(inputs.row - refit.row).max())
        if apart <= _MOST_ERROR * float(np.abs(inputs.row).max()):
            return measured
        reason = f"after a refit the engine gives other numbers, up to {apart:.3g} apart"
        return measured.model_copy(update={"way": "inputs", "reason": reason})

    def _alone(self, segment: SegmentRecipe, way: Literal["inputs", "refit"]) -> _Answer:
        """Return what one way takes, with nothing else on the device."""
        cuda = CudaContext(self.library)
        try:
            return self._measured(cuda, segment, way)
        except EdgeflexError as error:
            problem = str(error)  # the error itself keeps engines, which must go before the context
        finally:
            cuda.close()
        raise DeviceError(problem)

    def _measured(self, cuda: CudaContext, segment: SegmentRecipe, way: Literal["inputs", "refit"]) -> _Answer:
        stream = cuda.new_stream()
        recipe = self.recipe.model_copy(update={"segments": (segment,)})
        index = self.index.model_copy(update={"experts": (ExpertWay(segment=segment.name, way=way),)})
        stage = Engines(cuda, stream, self.machine, self.folder, recipe, index).stage(segment.onnx)
        pair = self._expert(segment)
        entry = next(one for one in self.bundle.manifest.files if one.path == pair.down.file)
        arena = ExpertArena(cuda, stream, integrated=self.machine.device.integrated)
        pages = arena.take(entry.size_bytes)
        pages[:] = np.frombuffer(read_bytes(self.bundle.path / entry.path, "an expert"), dtype=np.uint8)
        hidden = pair.down.rows
        staging = Staging(cuda, {"row": (hidden, np.float32)})
        row_bytes = hidden * FLOAT_BYTES
        places = {"y": cuda.allocate(row_bytes), "out": cuda.allocate(row_bytes)}
        staging.up(cuda, stream, "row", np.linspace(-1.0, 1.0, hidden, dtype=np.float32), places["y"])
        starts = {name: one.offset for name, one in zip(("gate_up", "down"), pair, strict=True)}
        samples = []
        for _ in range(_WARM_UPS + _RUNS):
            cuda.synchronize(stream)
            begun = self.clock()
            address = arena.place(_KEY, 0, entry.size_bytes)
            arena.use(_KEY)
            stage({**places, **{name: address + start for name, start in starts.items()}}, {"y": (1, hidden)})
            cuda.synchronize(stream)
            samples.append(self.clock() - begun)
            arena.release(_KEY)
        staging.down(cuda, stream, "row", hidden, places["out"])
        cuda.synchronize(stream)
        row = np.array(staging.arrays["row"], dtype=np.float32)
        return _Answer(statistics.median(samples[_WARM_UPS:]), row)

    def _expert(self, segment: SegmentRecipe) -> Pair:
        """Return the last fp32 expert of a segment's size: the engine to refit was built with the first one."""
        wanted = {spec.name: tuple(spec.shape) for spec in segment.inputs}
        pairs = expert_pairs(self.bundle.manifest)
        fitting = [
            key
            for key, pair in pairs.items()
            if pair.down.precision is Precision.FP32 and wanted.get("down") == (pair.down.rows, pair.down.columns)
        ]
        return pairs[max(fitting)]
