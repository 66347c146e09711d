"""Which engine computes a decoder's bundle, and which store its experts come from: the bundle's backend says.

``executorch``: native code over ExecuTorch's kernels, weights packed once for this processor. ``onnx``: ONNX
Runtime over the bundle's stages, weights as they lie in the bundle. ``tensorrt``: engines that were built of the
stages on this device, likewise.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edgeflex.errors import DeviceError, InputError, MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.progress import Progress
    from edgeflex.runtimes.cuda_watch import Watched
    from edgeflex.runtimes.curves import Curves, ErrorStatistics, Resource
    from edgeflex.runtimes.native import Chosen, Missing, Times
    from edgeflex.runtimes.packed import PackedStore
    from edgeflex.runtimes.residency import Residency
    from edgeflex.runtimes.tiers import TierCounts
    from edgeflex.schema import Precision
    from edgeflex.schema_gpu import GpuPlacement
    from edgeflex.schema_moe import DecoderManifest


DEVICE_POLICY = "reuse"
_DEVICE_MODULE = "edgeflex.runtimes.cuda_session"  # by name: what runs decoders on a processor loads no PyTorch


class DecoderEngine(Protocol):
    """What computes a decoder, layer by layer, and stops where an expert is missing.

    Not for several threads at once, except that the arena may be written meanwhile. What it computes depends
    neither on which experts are bound nor on when. ``runtimes.native.Engine`` documents each method's errors.
    """

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated for keys, values and activations; neither the arena nor weights."""

    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return page-aligned memory for experts; an earlier arena is given up, its experts unbound."""

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say that an expert's bytes, as its store gives them, lie at ``offset`` of the arena."""

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies."""

    def forward(self, tokens: NDArray[np.int32], position: int, *, every_logit: bool = False) -> Missing | None:
        """Run tokens at ``position``, until done (None) or an expert is missing; a waiting pass is given up."""

    def compute(self, experts: Sequence[int]) -> None:
        """Compute these experts of the waiting event now; they may be unbound afterwards."""

    def resume(self) -> Missing | None:
        """Compute the waiting event's bound experts and go on; the same event again if some are still missing."""

    def take_events(self) -> list[Chosen]:
        """Return what was routed since the last call, in order; a waiting event stands last, once."""

    def guess(self, layer: int) -> tuple[int, ...]:
        """Return the experts that ``layer`` would choose for the tokens as they are now, ascending."""

    def logits(self) -> NDArray[np.float32]:
        """Return a copy of the logits ``[vocabulary]`` of the last token, or of all if all were asked for."""

    def times(self) -> Times:
        """Return the seconds of computing since the last call."""

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""


class Opened(NamedTuple):
    """An engine without weights.

    Attributes:
        engine: Computes.
        store: Where its experts are read from.
        load: Gives the engine all weights that stay in memory, and returns memory that must outlive the engine.
        unseen_bytes: Returns how many bytes of the machine's memory the engine holds that the system does not count
            as this process's own.
    """

    engine: DecoderEngine
    store: PackedStore
    load: Callable[[], NDArray[np.uint8]]
    unseen_bytes: Callable[[], int] = int


@dataclass(frozen=True)
class DeviceRequest:
    """What a session wants of a device with memory of its own.

    Args:
        device: ``cuda``, or ``cpu-torch`` for the processor in its place.
        vram_bytes: Limit on all that is taken of its memory; None takes most of what is free.
        ram_bytes: Limit on the experts in the processor's memory.
        policy: Of both tiers; ``reuse`` foretells uses for the device, and copies experts ahead. Empty takes the
            plan's, or ``reuse``.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        threads: Of the processor, for experts that stay with it.
        rule: What becomes of experts that the device lacks: ``auto``, ``upload``, ``cpu`` or ``static``.
        precision: Of the device's products, ``fp32`` or ``bf16``; None takes the device's usual one.
        seed: Of the policy ``random``.
        static: (layer, expert) pairs, the most valuable first.
        record: Keep every event.
        arena_bytes: Of experts on the device, where ``vram_bytes`` names no limit of another kind.
        exclusive: Whether the RAM tier keeps no copy of what the device has, even where it could.
    """

    device: str
    vram_bytes: int | None
    ram_bytes: int
    policy: str
    context_tokens: int
    chunk_tokens: int
    threads: int
    rule: str = "auto"
    precision: str | None = None
    seed: int = 0
    static: Iterable[tuple[int, int]] | None = None
    record: bool = False
    arena_bytes: int | None = None
    exclusive: bool = False


@dataclass(frozen=True)
class DeviceStats:
    """What a device did with experts since the session was opened.

    Attributes:
        device: Its name.
        vram_bytes: Of the experts' arena on the device.
        ram_bytes: Of the RAM tier.
        exclusive: Whether RAM keeps no copy of what the device has.
        pinned: Whether copies start from pinned memory.
        decoding: Lookups and bytes of decoding.
        prompts: Of prompts.
        host_experts: Experts that the processor computed.
        copied_ahead: Experts copied before any event asked for them.
        host_s: Its seconds for them.
        upload_s: The link's seconds.
        predicted_s: Sum of the spans that the scheduler predicted for its events.
        errors: Of the predictions, by resource.
        curves: In force now.
        watched: What was seen of some passes closely.
        rule: What becomes of experts that the device lacks.
        ahead_bytes: Of the experts copied ahead.
        divided: Experts of which the device computed a part and the processor the rest.
        divided_bytes: Copied for that while decoding, not counted among uploads.
        staged_bytes: Of the device, where those copies arrive; 0 where nothing is divided.
        fixed_bytes: Of the device beside the experts' arena: weights, keys and values, room to work in, and
            ``staged_bytes``.
        requested_bytes: Limit that was given on all that is taken of the device; None where there was none.
        peak_bytes: The most that was held at once; None where nobody counts.
    """

    device: str
    vram_bytes: int
    ram_bytes: int
    exclusive: bool
    pinned: bool
    decoding: TierCounts
    prompts: TierCounts
    host_experts: int
    copied_ahead: int
    host_s: float
    upload_s: float
    predicted_s: float
    errors: Mapping[Resource, ErrorStatistics]
    curves: Curves
    watched: Watched
    rule: str = "auto"
    ahead_bytes: int = 0
    divided: int = 0
    divided_bytes: int = 0
    staged_bytes: int = 0
    fixed_bytes: int = 0
    requested_bytes: int | None = None
    peak_bytes: int | None = None


class OpenedDevice(NamedTuple):
    """An engine on a device, with its dense weights loaded.

    Attributes:
        engine: Computes.
        store: Where its experts are read from.
        experts: Serves its events.
        stats: Says what it did.
    """

    engine: DecoderEngine
    store: PackedStore
    experts: Residency
    stats: Callable[[], DeviceStats]


class _Open(Protocol):
    def __call__(
        self,
        folder: Path,
        manifest: DecoderManifest,
        *,
        context_tokens: int,
        chunk_tokens: int,
        threads: int,
        progress: Progress,
    ) -> Opened: ...


def as_planned(request: DeviceRequest, placement: GpuPlacement | None) -> DeviceRequest:
    """Return a request with the plan's placement, as far as the run names nothing of its own.

    Args:
        request: As the run has it.
        placement: Of the plan; None: it was not made for a GPU.
    """
    if placement is not None and request.vram_bytes is None:
        request = replace(request, arena_bytes=placement.vram_cache_bytes, exclusive=placement.exclusive)
    if request.policy:
        return request
    if placement is None or request.rule != "auto":
        return replace(request, policy=DEVICE_POLICY)
    listed = placement.order if request.static is None and placement.policy == "static" else request.static
    return replace(request, policy=placement.policy, rule=placement.rule, static=listed)


def check_pass(
    tokens: NDArray[np.int32],
    position: int,
    *,
    vocabulary: int,
    chunk_tokens: int,
    context_tokens: int,
    filled: int,
) -> None:
    """Refuse a forward pass that an engine cannot do; all faults stand in one error.

    Args:
        tokens: Of the pass.
        position: Of the first one.
        vocabulary: How many tokens there are.
        chunk_tokens: Most tokens of one pass.
        context_tokens: Positions that keys and values have room for.
        filled: Positions that hold some.

    Raises:
        InputError: Too many tokens or none, an unknown one, or a position that leaves a gap or the context.
    """
    faults = []
    if not 0 < tokens.size <= chunk_tokens:
        faults.append(f"{tokens.size} tokens at once; 1 to {chunk_tokens} are possible")
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        faults.append(f"tokens {tokens.min()} to {tokens.max()}; there are {vocabulary}")
    if not 0 <= position <= filled:
        faults.append(f"position {position} leaves a gap: the cache holds {filled} tokens")
    if position + tokens.size > context_tokens:
        faults.append(f"tokens up to position {position + tokens.size}; the context holds {context_tokens}")
    if faults:
        raise InputError.collect("the forward pass", faults)


def not_finite(layer: int) -> DeviceError:
    """Return the error of a layer whose numbers are not finite."""
    return DeviceError(
        f"the weights give numbers that are not finite (layer {layer}). Check the bundle with `edgeflex verify`."
    )


def require_engine(folder: Path, manifest: DecoderManifest) -> None:
    """Refuse a bundle for whose backend there is no engine.

    Raises:
        UnsupportedError: There is none.
    """
    if manifest.backend not in _OPENERS:
        raise UnsupportedError(
            f"{folder}: exported for {manifest.backend!r}; decoders run here from bundles for "
            f"{' and '.join(map(repr, _OPENERS))}. Export it again with `edgeflex export --target onnx`."
        )


def open_engine(
    folder: Path,
    manifest: DecoderManifest,
    *,
    context_tokens: int,
    chunk_tokens: int,
    threads: int,
    progress: Progress,
) -> Opened:
    """Return the engine and the store of a bundle.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        threads: Threads that compute.
        progress: Told about packing, where weights are packed.

    Raises:
        UnsupportedError: No engine runs this backend.
        MissingDependencyError: The backend's package is absent.
        BundleError: A file is missing or damaged.
        DeviceError: No memory, or the disk is full.
    """
    require_engine(folder, manifest)
    return _OPENERS[manifest.backend](
        folder,
        manifest,
        context_tokens=context_tokens,
        chunk_tokens=chunk_tokens,
        threads=threads,
        progress=progress,
    )


def open_device(
    folder: Path, manifest: DecoderManifest, request: DeviceRequest, progress: Progress, **parts: object
) -> OpenedDevice:
    """Return a bundle's engine on a device; PyTorch is loaded now and not before.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        request: What is asked for.
        progress: Told what is not as it should be.
        parts: See ``runtimes.cuda_session.open_device``.

    Raises:
        UnsupportedError: No engine runs this backend.
        MissingDependencyError: PyTorch is absent.
        InputError: The device, its rule or its precision is unknown.
        BundleError: A file is missing or damaged.
        DeviceError: There is no such device, or it refused.
    """
    require_engine(folder, manifest)
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise MissingDependencyError(
            f"decoders on a device need PyTorch, which does not load here: {error}. Install it: pip install torch"
        ) from None
    opened: OpenedDevice = importlib.import_module(_DEVICE_MODULE).open_device(
        folder, manifest, as_planned(request, manifest.plan.gpu), progress, **parts
    )
    return opened


def _native(
    folder: Path,
    manifest: DecoderManifest,
    *,
    context_tokens: int,
    chunk_tokens: int,
    threads: int,
    progress: Progress,
) -> Opened:
    from edgeflex.runtimes.dense import load_dense
    from edgeflex.runtimes.native import Engine, kernel_id
    from edgeflex.runtimes.packed import open_packed

    engine = Engine(manifest.graph, context_tokens=context_tokens, chunk_tokens=chunk_tokens, threads=threads)
    try:
        store = open_packed(folder, manifest, engine, kernel_id(), progress)
    except BaseException:
        engine.close()
        raise
    return Opened(engine, store, lambda: load_dense(engine, store))


def _onnx(
    folder: Path,
    manifest: DecoderManifest,
    *,
    context_tokens: int,
    chunk_tokens: int,
    threads: int,
    progress: Progress,
) -> Opened:
    from edgeflex.runtimes.onnx_decoder import OnnxEngine
    from edgeflex.runtimes.raw_store import open_raw

    del progress  # nothing is packed
    engine = OnnxEngine(folder, manifest, context_tokens=context_tokens, chunk_tokens=chunk_tokens, threads=threads)
    store = open_raw(folder, manifest)
    return Opened(engine, store, lambda: engine.load(store))


def _tensorrt(
    folder: Path,
    manifest: DecoderManifest,
    *,
    context_tokens: int,
    chunk_tokens: int,
    threads: int,
    progress: Progress,
) -> Opened:
    from edgeflex.runtimes.raw_store import open_raw
    from edgeflex.runtimes.tensorrt_decoder import TensorrtEngine

    del threads, progress  # the device computes, and nothing is packed
    engine = TensorrtEngine(folder, manifest, context_tokens=context_tokens, chunk_tokens=chunk_tokens)
    store = open_raw(folder, manifest)
    return Opened(engine, store, lambda: engine.load(store), lambda: engine.unseen_bytes)


_OPENERS: dict[str, _Open] = {"executorch": _native, "onnx": _onnx, "tensorrt": _tensorrt}
