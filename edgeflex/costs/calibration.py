"""What the model does on real images: the only slow stage, resumable, kept in the folder of ``store``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from edgeflex.costs.store import CANDIDATE_ROLE, Calibration, MixRecord, mix_digest, save_array
from edgeflex.errors import InputError
from edgeflex.schema import Precision
from edgeflex.transforms import PreparedModel, record_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch.fx import GraphModule

    from edgeflex.images import ImageFolder
    from edgeflex.models import DynamicModel
    from edgeflex.progress import Progress
    from edgeflex.schema import Conditions

_BATCH = 64
_RANGE_IMAGES = 256
_SENSITIVITY_IMAGES = 512
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Evaluation:
    """What running a prepared model for real gave.

    Attributes:
        outputs: Probabilities [n, exits, classes].
        segment_s: Seconds of each segment.
        yardstick_s: Seconds of one fixed piece of work, timed in between.
        program_bytes: Size of the program.
        memory_bytes: What it added to the process.
        settings: How the runtime executed it, where it has a choice.
        conditions: How fast the machine was around timing, where that was measured.
    """

    outputs: NDArray[np.float32]
    segment_s: tuple[float, ...]
    yardstick_s: float
    program_bytes: int
    memory_bytes: int | None
    settings: str = ""
    conditions: Conditions | None = None


class PrepareSegment(Protocol):
    """Gives one segment the numbers of a backend; see ``edgeflex.exporters.Exporter.prepare_segment``."""

    def __call__(
        self,
        segment: GraphModule,
        index: int,
        precisions: Mapping[str, Precision],
        ranges: Mapping[str, tuple[float, float]],
        /,
    ) -> torch.nn.Module:
        """Return a copy of the segment in the given precisions, still ending in logits."""


class Prepare(Protocol):
    """Gives a model the numbers of a backend; see ``edgeflex.exporters.Exporter.prepare``."""

    def __call__(
        self, model: DynamicModel, precisions: Mapping[str, Precision], ranges: Mapping[str, tuple[float, float]], /
    ) -> PreparedModel:
        """Return the segments as modules with the numbers that would be exported."""


class Evaluate(Protocol):
    """Runs a prepared model for real on the images with the given indices."""

    def __call__(self, prepared: PreparedModel, indices: NDArray[np.int64]) -> Evaluation:
        """Return what it gave."""


def _batches(images: ImageFolder, indices: NDArray[np.int64], model: DynamicModel) -> Iterator[torch.Tensor]:
    preprocessing = model.graph.preprocessing
    if preprocessing is None:
        raise InputError("the model has no preprocessing; images cannot be loaded. Fit its exits again.")
    for start in range(0, len(indices), _BATCH):
        yield torch.from_numpy(images.load(indices[start : start + _BATCH], preprocessing))


def measure_ranges(
    calibration: Calibration, model: DynamicModel, images: ImageFolder
) -> dict[str, tuple[float, float]]:
    """Return the activation ranges, recording them on the first images of the choose part if need be."""
    if not calibration.has("ranges.json"):
        indices = calibration.part("choose")[:_RANGE_IMAGES]
        calibration.write_ranges(record_ranges(model, _batches(images, indices, model)))
    return calibration.ranges()


class _Prefix:
    """Unquantised inputs of every segment and outputs of every exit, so that only what changes is rerun."""

    def __init__(self, model: DynamicModel, batches: Iterator[torch.Tensor]) -> None:
        self.inputs: list[list[torch.Tensor]] = [[] for _ in model.segments]
        exits: list[list[torch.Tensor]] = []
        used_bytes = 0
        with torch.no_grad():
            for batch in batches:
                x, row = batch, []
                for index, segment in enumerate(model.segments):
                    self.inputs[index].append(x)
                    used_bytes += x.numel() * 4
                    value = segment(x)
                    logits = value
                    if isinstance(value, tuple):
                        x, logits = value
                    row.append(torch.softmax(logits, dim=-1))
                exits.append(row)
                if used_bytes > _CACHE_BYTES:
                    break
        self.exits = exits

    def probabilities(self) -> torch.Tensor:
        """Return [n, exits, classes]."""
        return torch.cat([torch.stack(row, dim=1) for row in self.exits])

    def with_segment(self, model: DynamicModel, changed: int, segment: torch.nn.Module) -> torch.Tensor:
        """Return [n, exits, classes] with one segment replaced."""
        rows = []
        with torch.no_grad():
            for number, exits in enumerate(self.exits):
                x, row = self.inputs[changed][number], list(exits[:changed])
                for index in range(changed, len(model.segments)):
                    value = (segment if index == changed else model.segments[index])(x)
                    logits = value
                    if isinstance(value, tuple):
                        x, logits = value
                    row.append(torch.softmax(logits, dim=-1))
                rows.append(torch.stack(row, dim=1))
        return torch.cat(rows)


def measure_sensitivity(
    calibration: Calibration,
    model: DynamicModel,
    images: ImageFolder,
    options: Mapping[str, Sequence[Precision]],
    prepare_segment: PrepareSegment,
    progress: Progress,
) -> None:
    """Measure the outputs at every exit with one layer quantised, for each layer and option not yet there."""
    todo = [
        (layer, precision)
        for layer in model.graph.layers
        for precision in options[layer.name]
        if precision is not Precision.FP32 and not calibration.sensitivity_path(layer.name, precision).exists()
    ]
    if not todo and calibration.has("sensitivity/baseline.npy"):
        return
    ranges = calibration.ranges()
    indices = calibration.part("choose")[:_SENSITIVITY_IMAGES]
    prefix = _Prefix(model, _batches(images, indices, model))
    baseline = prefix.probabilities().numpy()
    if len(baseline) < len(indices):
        progress.note(
            f"layer sensitivity is measured on {len(baseline)} images instead of {len(indices)}: the activations of "
            f"more do not fit in {_CACHE_BYTES >> 30} GiB"
        )
    save_array(calibration.folder / "sensitivity" / "baseline.npy", baseline)
    with progress.task("Measuring layer sensitivity", len(todo)) as advance:
        for layer, precision in todo:
            segment = prepare_segment(model.segments[layer.segment], layer.segment, {layer.name: precision}, ranges)
            outputs = prefix.with_segment(model, layer.segment, segment)
            save_array(calibration.sensitivity_path(layer.name, precision), outputs.numpy())
            advance(1)


def measure_mix(
    calibration: Calibration,
    model: DynamicModel,
    precisions: Mapping[str, Precision],
    prepare: Prepare,
    evaluate: Evaluate,
    role: str = CANDIDATE_ROLE,
) -> MixRecord:
    """Return the record of a mix, running it for real if it was not measured before."""
    name = mix_digest(precisions)
    if not calibration.has_mix(precisions):
        prepared = prepare(model, precisions, calibration.ranges())
        choose, certify = calibration.part("choose"), calibration.part("certify")
        found = evaluate(prepared, np.concatenate([choose, certify]))
        record = MixRecord(
            precisions=dict(prepared.precisions),
            segment_s=found.segment_s,
            yardstick_s=found.yardstick_s,
            program_bytes=found.program_bytes,
            memory_bytes=found.memory_bytes,
            settings=found.settings,
            role=role,
            conditions=found.conditions,
        )
        calibration.write_mix(record, found.outputs[: len(choose)], found.outputs[len(choose) :])
    return calibration.records()[name]
