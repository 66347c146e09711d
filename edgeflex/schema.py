"""The nouns: every value that crosses rooms, frozen, with its unit in its name.

``_bytes`` are ``int``, ``_s`` are ``float`` seconds. No I/O lives here and no arithmetic beyond derived
properties. Canonical JSON (sorted keys, no clock) makes equal values equal bytes, so that a value's
identity is its SHA-256 and the stages can be chained: graph → table → plan → manifest → stats.
"""

# No ``from __future__ import annotations`` tricks with TYPE_CHECKING here: pydantic resolves these types.

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from typing_extensions import Self

from edgeflex.errors import InputError

SCHEMA_VERSION = 1


class Noun(BaseModel):
    """A frozen value; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical_json(self) -> str:
        """Return the one JSON text of this value: sorted keys, no spaces, no clock."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


class Grown(Noun):
    """A noun to which later versions added the fields in ``LATER``: they are written where they are not None.

    So the bytes and digests of what does not have them stay what they were.
    """

    LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {key: value for key, value in written.items() if value is not None or key not in self.LATER}


_FAULTS = {"missing": "is missing", "extra_forbidden": "is no field of it"}
_MOST_FAULTS = 6  # named; a file of another kind has dozens


class Document(Noun):
    """A noun that is written to a file of its own."""

    schema_version: Literal[1] = 1

    @classmethod
    def parse(cls, text: str | bytes, source: str) -> Self:
        """Read a document, naming ``source`` and every wrong field at once.

        Raises:
            InputError: ``text`` is not JSON or does not fit this document.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            faults = [
                f"{'.'.join(str(part) for part in fault['loc']) or 'file'}: {_FAULTS.get(fault['type'], fault['msg'])}"
                for fault in error.errors(include_url=False, include_input=False)
            ]
            what = f"{source} is not a valid {cls.__name__}"
            if len(faults) <= _MOST_FAULTS:
                raise InputError.collect(what, faults) from None
            listed = "".join(f"\n  - {fault}" for fault in faults[:_MOST_FAULTS])
            more = f"\n  - and {len(faults) - _MOST_FAULTS} more: it seems to be a file of another kind"
            raise InputError(f"{what}: {len(faults)} faults{listed}{more}") from None


class Tier(str, Enum):
    """Where bytes can live."""

    DEVICE = "device"
    HOST = "host"
    FLASH = "flash"

    @property
    def budget_name(self) -> str:
        """What people call a limit of bytes here, after the options that set it: ``memory``, ``vram`` or ``flash``."""
        return {Tier.HOST: "memory", Tier.DEVICE: "vram"}.get(self, self.value)


class LayerKind(str, Enum):
    """Layers whose weights the planner chooses a precision for."""

    LINEAR = "linear"
    CONV2D = "conv2d"


class Format(str, Enum):
    """How activations travel at a layer's border; crossing formats costs a conversion."""

    FLOAT = "float"
    Q8 = "q8"


class Precision(str, Enum):
    """One way to store and compute a layer, named as users say it."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8_STATIC = "int8-static"
    INT8_DYNAMIC = "int8-dynamic"
    INT4_CHANNEL = "int4-channel"
    INT4_GROUP32 = "int4-group32"
    # weights alone in 4 bits, activations and arithmetic in floats
    INT4_BLOCK64 = "int4-block64"
    INT4_BLOCK128 = "int4-block128"
    # E4M3 weights and activations
    FP8 = "fp8"

    @property
    def bits(self) -> int:
        """Bits of one stored weight, scales aside."""
        return {"fp32": 32, "fp16": 16, "fp8": 8}.get(self.value, 8 if "int8" in self.value else 4)

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale along the input, or None for one scale a channel or tensor."""
        return {"int4-group32": 32, "int4-block64": 64, "int4-block128": 128}.get(self.value)

    @property
    def activation_format(self) -> Format:
        """The activation format at the layer's border."""
        return Format.Q8 if self is Precision.INT8_STATIC else Format.FLOAT


# --- device ------------------------------------------------------------------------------------------


class Conditions(Grown):
    """The state of the machine around a measurement; None where it does not tell.

    ``arithmetic_s`` are the seconds of a fixed piece of vector arithmetic in cache, ``memory_bytes_per_s`` the rate at
    which memory is read, both on one thread: how fast the machine was, which no load and no clock tells. ``machine`` is
    the processor that they are of.
    """

    LATER = ("arithmetic_s", "memory_bytes_per_s", "machine")

    load_average: float | None = None
    clock_hz: float | None = None
    temperature_c: float | None = None
    energy_j: float | None = None
    arithmetic_s: float | None = Field(default=None, gt=0)
    memory_bytes_per_s: float | None = Field(default=None, gt=0)
    machine: str | None = None


class Figure(Noun):
    """One number about a device, with where it comes from.

    ``spread`` is the interquartile range over the median of the samples; None for a data sheet.
    """

    value: float
    origin: Literal["measured", "datasheet"]
    source: str = Field(min_length=1)
    spread: float | None = None


class TierSpec(Noun):
    """One place for bytes. ``read_bytes_per_s`` is with all threads."""

    tier: Tier
    capacity_bytes: Figure | None = None
    read_bytes_per_s: Figure | None = None
    read_one_thread_bytes_per_s: Figure | None = None


class StorageRead(Noun):
    """Measured flash bandwidth for one access pattern, page cache bypassed if ``direct``."""

    pattern: Literal["sequential", "random"]
    block_bytes: int
    queue_depth: int
    direct: bool
    bytes_per_s: Figure


class Link(Noun):
    """A way between tiers."""

    source: Tier
    target: Tier
    pinned: bool = False
    bytes_per_s: Figure
    latency_s: Figure | None = None


class LayerShape(Noun):
    """What decides a layer's time besides its precision.

    A linear layer has ``rows`` tokens and kernel 1; a convolution has an input of ``height`` × ``width``.
    """

    kind: LayerKind
    in_channels: int
    out_channels: int
    rows: int = 1
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    height: int = 1
    width: int = 1

    @property
    def out_positions(self) -> int:
        """Output positions: rows of a linear layer, pixels of a convolution."""
        if self.kind is LayerKind.LINEAR:
            return self.rows
        out_height = (self.height + 2 * self.padding - self.kernel) // self.stride + 1
        out_width = (self.width + 2 * self.padding - self.kernel) // self.stride + 1
        return self.rows * out_height * out_width

    @property
    def weight_count(self) -> int:
        """Weights without bias."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return self.weight_count * self.out_positions


class Kernel(Noun):
    """Measured time of one layer through the backend, ``threads`` threads."""

    shape: LayerShape
    precision: Precision
    threads: int
    seconds: Figure


class ComputeRate(Noun):
    """A data-sheet rate: operations (2 per multiply-accumulate) per second of one engine."""

    engine: Literal["cpu", "gpu", "npu"]
    precision: str
    ops_per_s: Figure
    sparse: bool = False


class Overlap(Noun):
    """How many times longer work takes beside other work, at least 1; None where it was not measured.

    Work is a copy from host memory to the GPU's (``link``), products of the GPU, and the processor reading memory.
    """

    link_beside_gpu: Figure | None = None
    gpu_beside_link: Figure | None = None
    link_beside_cpu: Figure | None = None
    cpu_beside_link: Figure | None = None


class DeviceProfile(Grown, Document):
    """A device: what it holds, how fast it reads, and what kernels cost on it."""

    LATER = ("overlap",)

    name: str
    title: str
    origin: Literal["measured", "datasheet"]
    backend: str | None = None
    cpu_model: str | None = None
    cores: int | None = None
    isa: tuple[str, ...] = ()
    unified_memory: bool | None = None
    tiers: tuple[TierSpec, ...] = ()
    links: tuple[Link, ...] = ()
    storage: tuple[StorageRead, ...] = ()
    compute: tuple[ComputeRate, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    call_s: Figure | None = None
    delegate_s: Figure | None = None
    conditions: Mapping[str, str | float] = {}
    notes: tuple[str, ...] = ()
    overlap: Overlap | None = None


class Capabilities(Noun):
    """What a backend really runs; the planner offers nothing else."""

    backend: str
    precisions: Mapping[LayerKind, tuple[Precision, ...]]
    group_multiple: int = 32
    early_exit: bool = True
    expert_tiers: tuple[Tier, ...] = ()


# --- model -------------------------------------------------------------------------------------------


class Layer(Noun):
    """A layer with weights, in execution order. ``segment`` counts from 0."""

    name: str
    shape: LayerShape
    segment: int
    bias: bool
    head: bool = False
    tie: str | None = None


class FormatEdge(Noun):
    """Activations of ``elements`` values go from one layer to another inside a segment.

    An empty ``source`` is the segment's input, an empty ``target`` its output; both are float.
    """

    source: str
    target: str
    segment: int
    elements: int


class ExitPoint(Noun):
    """A place where inference may stop: the end of a segment."""

    name: str
    segment: int
    stage: str
    temperature: float = 1.0


class ExpertGroup(Noun):
    """Experts of one layer of a mixture-of-experts decoder."""

    name: str
    segment: int
    top_k: int
    expert_bytes: tuple[int, ...]


class Preprocessing(Noun):
    """How an image becomes the network's input: resize, scale to [0, 1], normalise."""

    height: int
    width: int
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ModelGraph(Document):
    """A dynamic model as the planner sees it."""

    name: str
    weights_digest: str
    input_shape: tuple[int, ...]
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()
    segment_count: int
    layers: tuple[Layer, ...]
    edges: tuple[FormatEdge, ...] = ()
    exits: tuple[ExitPoint, ...]
    expert_groups: tuple[ExpertGroup, ...] = ()


# --- cost table --------------------------------------------------------------------------------------


class Option(Noun):
    """One way to realise a decision.

    ``loss`` holds one value for all scenarios, or one per scenario.
    """

    name: str
    loss: tuple[float, ...]
    latency_s: float
    memory_bytes: Mapping[Tier, int]
    disk_bytes: int = 0
    miss_latency_s: float = 0.0
    format: Format = Format.FLOAT


class Decision(Noun):
    """Exactly one option is taken. Decisions with the same ``tie`` take options of the same name."""

    subject: str
    block: int
    options: tuple[Option, ...]
    tie: str | None = None
    group: str | None = None


class Boundary(Noun):
    """A cost in ``block`` that is paid when two decisions end up in different formats.

    An empty ``source`` or ``target`` stands for the fixed format ``float`` outside the block.
    """

    source: str
    target: str
    block: int
    latency_s: float


class Rule(Noun):
    """At least and at most so many of ``subjects`` take an option named ``option``."""

    subjects: tuple[str, ...]
    option: str
    at_least: int = 0
    at_most: int | None = None


class Scenario(Noun):
    """What fixes the traffic: thresholds, hence the probability of reaching each block.

    ``reach`` starts at 1 and never rises. A threshold of None never leaves there; the last block always
    ends. ``miss_rate`` is per group of decisions.
    """

    name: str
    reach: tuple[float, ...]
    loss: float
    thresholds: tuple[float | None, ...] = ()
    cache_bytes: Mapping[Tier, int] = {}
    miss_rate: Mapping[str, float] = {}


class CostTable(Grown, Document):
    """Scenarios × decisions × options: all that the solver sees.

    ``conditions`` are those in which its times were measured; None where they come from elsewhere than a run here.
    """

    LATER = ("conditions",)

    name: str
    scenarios: tuple[Scenario, ...] = Field(min_length=1)
    decisions: tuple[Decision, ...]
    boundaries: tuple[Boundary, ...] = ()
    rules: tuple[Rule, ...] = ()
    fixed_latency_s: tuple[float, ...]
    fixed_memory_bytes: Mapping[Tier, int] = {}
    fixed_disk_bytes: int = 0
    latency_relative_error: float = 0.0
    graph_digest: str = ""
    device_digest: str = ""
    calibration_digest: str = ""
    backend: str = ""
    conditions: Conditions | None = None


# --- plan --------------------------------------------------------------------------------------------

Statistic = Literal["mean", "p50", "p95", "p99", "worst"]
Objective = Literal["latency", "memory", "drop"]


class LatencyLimit(Noun):
    """A latency limit with the statistic it is about."""

    limit_s: float = Field(gt=0)
    statistic: Statistic = "mean"


class Budget(Noun):
    """What the user allows, and what is to be least. ``max_drop`` is a fraction of accuracy."""

    memory_bytes: Mapping[Tier, int] = {}
    latency: tuple[LatencyLimit, ...] = ()
    disk_bytes: int | None = None
    max_drop: float | None = None
    confidence: float = Field(default=0.95, gt=0, lt=1)
    minimize: Objective = "latency"
    statistic: Statistic = "mean"


class Choice(Noun):
    """The option taken for one decision."""

    subject: str
    option: str


class Interval(Noun):
    """A prediction with its range."""

    value: float
    low: float
    high: float


class Footprint(Noun):
    """What one combination costs, predicted or measured. Latencies are by statistic."""

    loss: float
    latency_s: Mapping[Statistic, float]
    block_latency_s: tuple[float, ...]
    memory_bytes: Mapping[Tier, int]
    disk_bytes: int


class Proof(Noun):
    """How good the decision is, for the table.

    ``objective`` and ``bound`` are in the unit of what was minimised; ``gap`` is
    (objective − bound) / max(|objective|, tiny). ``optimal`` is said only when the gap is at most the
    tolerance that the solver ran with.
    """

    solver: str
    status: Literal["optimal", "feasible"]
    minimize: Objective
    objective: float
    bound: float
    gap: float
    tolerance: float
    wall_s: float
    scenarios: int
    scenarios_solved: int


class Solution(Noun):
    """What the solver returns: a scenario, a choice per decision, and the proof."""

    scenario: int
    choices: tuple[Choice, ...]
    proof: Proof


class Certificate(Noun):
    """A finite-sample promise about accuracy on images that chose nothing.

    ``drop`` is the mean on the ``samples`` certification images, ``drop_limit`` what is promised with
    ``confidence``.
    """

    test: str
    drop_limit: float
    confidence: float
    samples: int
    candidates: int
    certified_index: int
    drop: float
    drop_upper_bound: float


class Candidate(Noun):
    """A mix of precisions that was run for real, with the exit policies found on its own outputs.

    ``scenarios`` carry the drop measured on the images kept for choosing. ``segment_s`` and
    ``memory_bytes`` are what its own program took on the device planned for; empty where it did not run there.
    """

    mix: str
    choices: tuple[Choice, ...]
    scenarios: tuple[Scenario, ...]
    segment_s: tuple[float, ...] = ()
    memory_bytes: int | None = None
    accuracy: float


class Candidates(Document):
    """All measured mixes of one calibration, and the accuracy that drops are counted from."""

    reference_accuracy: float
    candidates: tuple[Candidate, ...]
    table_digest: str


class MemoryBreakdown(Noun):
    """Peak bytes that the model adds to the process that runs it, and the runtime's own beside."""

    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int
    runtime_bytes: int = 0

    @property
    def model_bytes(self) -> int:
        """What the memory budget is about."""
        return self.weights_bytes + self.activation_bytes + self.overhead_bytes


class Plan(Grown, Document):
    """The decision: thresholds, a precision per layer, what it will cost, and the proof.

    ``memory_of`` says what a GPU's plan means by memory, whatever the tier's name: ``gpu``, a memory of its own, or
    ``shared`` with the processor. None is the memory of the process, or a device that says neither. ``conditions`` are
    those in which the times that it rests on were measured; None where these come from elsewhere than this device.
    """

    LATER = ("memory_of", "conditions")

    name: str
    backend: str
    budget: Budget
    scenario: Scenario
    thresholds: tuple[float | None, ...]
    choices: tuple[Choice, ...]
    exit_shares: tuple[float, ...]
    predicted: Footprint
    latency_interval_s: Mapping[Statistic, Interval]
    memory: MemoryBreakdown
    accuracy: float | None = None
    reference_accuracy: float | None = None
    predicted_drop: float | None = None
    proof: Proof
    certificate: Certificate | None = None
    graph_digest: str = ""
    table_digest: str = ""
    device_digest: str = ""
    calibration_digest: str = ""
    threads: int = 1
    notes: tuple[str, ...] = ()
    memory_of: Literal["gpu", "shared"] | None = None
    conditions: Conditions | None = None

    @property
    def memory_name(self) -> str:
        """What the memory of the plan is called: the processor's has no name of its own."""
        return {"gpu": "GPU memory", "shared": "memory shared by CPU and GPU"}.get(self.memory_of or "", "memory")


class CurvePoint(Noun):
    """One point of the Pareto curve, or a baseline beside it."""

    label: str
    latency_s: float
    memory_bytes: int
    drop: float
    chosen: bool = False


class Curve(Document):
    """Non-dominated plans over a sweep of one budget."""

    points: tuple[CurvePoint, ...]
    baselines: tuple[CurvePoint, ...] = ()


# --- bundle ------------------------------------------------------------------------------------------


class FileEntry(Noun):
    """A file of a bundle; ``path`` is relative and stays inside."""

    path: str
    role: str
    size_bytes: int
    sha256: str


class SegmentProgram(Noun):
    """One condition-free program. All but the last return (activations, probabilities).

    Where both sides of a cut compute in int8, activations cross it as int8.
    """

    method: str
    input_shape: tuple[int, ...]
    input_dtype: Literal["float32", "int8"] = "float32"
    output_shape: tuple[int, ...] | None
    exit: str


class BundleManifest(Grown, Document):
    """What is in the parcel, and what was promised about it.

    ``layer_losses`` is the accuracy that each layer's precision costs by the table's additive estimate.
    ``settings`` names how the runtime executes the program where it has a choice, and ``settings_difference`` is
    how far that moved any probability of ``settings_images`` images from the plain execution.
    """

    LATER = ("settings_images",)

    backend: str
    versions: Mapping[str, str]
    graph: ModelGraph
    plan: Plan
    segments: tuple[SegmentProgram, ...]
    files: tuple[FileEntry, ...]
    tolerance: float
    layer_precisions: Mapping[str, Precision]
    layer_losses: Mapping[str, float] = {}
    curve: Curve | None = None
    settings: str = ""
    settings_difference: float | None = None
    settings_images: int | None = None


# --- run ---------------------------------------------------------------------------------------------


class RequestStats(Noun):
    """One input: where it left, what it answered, how long it took."""

    input: str
    exit: int
    prediction: int
    confidence: float
    latency_s: float
    label: int | None = None


class CacheStats(Noun):
    """Expert cache counters."""

    hits: int
    misses: int
    evictions: int
    prefetch_hits: int
    moved_bytes: Mapping[str, int]
    stall_s: float


class RunStats(Document):
    """Raw samples of one run; percentiles belong to the report."""

    manifest_digest: str
    runtime: str
    device: str
    threads: int
    requests: tuple[RequestStats, ...]
    load_s: float
    peak_memory_bytes: int
    runtime_memory_bytes: int
    before: Conditions
    after: Conditions
    cache: CacheStats | None = None


class Check(Noun):
    """One promise against its measurement. ``unit`` is bytes, s, share or count.

    Without ``was_measured``, ``measured`` means nothing and ``ok`` is false.
    """

    name: str
    unit: Literal["bytes", "s", "share", "count"]
    limit: float | None
    promised: float
    measured: float
    low: float | None = None
    high: float | None = None
    ok: bool
    note: str = ""
    was_measured: bool = True


class BenchResult(Document):
    """Promise against measurement, repeated.

    ``peak_memory_bytes`` is the process's; ``device_memory_bytes`` is what the bundle took of a GPU's memory, None
    where none is used or nobody says. With ``unified_memory`` both lie in one memory.
    """

    manifest_digest: str
    device: str
    threads: int
    images: int
    repeats: int
    checks: tuple[Check, ...]
    latency_s: Mapping[str, float]
    exit_latency_s: tuple[float, ...]
    exit_shares: tuple[float, ...]
    samples_s: tuple[float, ...]
    peak_memory_bytes: int
    runtime_memory_bytes: int
    before: Conditions
    after: Conditions
    device_memory_bytes: int | None = None
    unified_memory: bool | None = None


class ExitQuality(Noun):
    """How one exit does on all images: accuracy, calibration error, and ranking of its own faults."""

    name: str
    accuracy: float
    ece: float
    auroc: float | None
    share: float
    accuracy_of_leavers: float | None


class Example(Noun):
    """An image for the report, as a PNG data URI, with where it left."""

    input: str
    image: str
    label: str
    prediction: str
    exit: int
    confidence: float


class VerifyResult(Document):
    """Accuracy, parity and size against the manifest, on images that chose nothing."""

    manifest_digest: str
    images: int
    skipped_seen: int
    checks: tuple[Check, ...]
    accuracy: float
    reference_accuracy: float
    drop: float
    exits: tuple[ExitQuality, ...]
    oracle_accuracy: float
    oracle_latency_s: float
    static_points: tuple[CurvePoint, ...] = ()
    examples: tuple[Example, ...] = ()


class Report(Document):
    """Everything that the page shows."""

    title: str
    manifest: BundleManifest
    bench: BenchResult | None
    verify: VerifyResult | None
    verdicts: tuple[Check, ...]
