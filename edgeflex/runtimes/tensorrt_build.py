"""TensorRT on the device: found safely, and engines built from a bundle's ONNX graphs.

One code path serves TensorRT 10.3 to 11.4. It names only what all of them have, makes flags from the names at hand
(their numbers moved in 11.0), and always builds strongly typed networks, so that every layer computes in the precision
that the graph gives it. TensorFloat-32 is off: what a plan calls fp32 was measured and certified as fp32.

An engine fits one TensorRT, one GPU and one driver; the index beside the engines says which.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import logging
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast

from edgeflex.bundle_moe import DecoderBundle
from edgeflex.errors import BundleError, DeviceError, InputError, MissingDependencyError, UnsupportedError
from edgeflex.files import read_bytes, sha256_file, write_atomic
from edgeflex.progress import Progress, Silent
from edgeflex.runtimes.cuda_driver import CudaContext, CudaDevice, driver_facts, driver_problem
from edgeflex.runtimes.tensorrt_progress import STEPS, progress_monitor
from edgeflex.schema_trt import (
    ENGINE_FOLDER,
    INDEX_FILE,
    RECIPE,
    BuildOptions,
    BuildRecipe,
    BuiltEngine,
    EngineIndex,
    ExpertWay,
    PortabilityKey,
    RefitRecipe,
    version_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgeflex.bundle import Bundle
    from edgeflex.progress import Advance
    from edgeflex.schema_trt import SegmentRecipe

logger = logging.getLogger(__name__)

_PARTIAL_FILE = f"{ENGINE_FOLDER}/index.partial.json"
_INSTALL = "On Jetson: sudo apt-get install tensorrt python3-libnvinfer. On a desktop: pip install 'edgeflex[tensorrt]'"
_CUDA_MAJORS = range(11, 20)
_MOST_MESSAGES = 6
_REBUILD = "Build them here: edgeflex build"
# A network's plan is of its target; a decoder's is for all of them.
_REMEDIES = {False: "Calibrate, plan and export", True: "Export its plan"}


@dataclass(frozen=True)
class Machine:
    """A TensorRT that may be called, and the device that it will use.

    Attributes:
        trt: The module.
        device: The first CUDA device.
        cuda: What the driver serves, major and minor.
    """

    trt: Any
    device: CudaDevice
    cuda: tuple[int, int]

    def key(self, recipe: BuildRecipe, options: BuildOptions) -> PortabilityKey:
        """Return what engines of ``recipe``, built here with ``options``, belong to."""
        return PortabilityKey(
            tensorrt=str(self.trt.__version__),
            gpu=self.device.name,
            compute_capability=self.device.compute_capability,
            driver=version_text(self.cuda),
            hashes=recipe.hashes(),
            options=options,
        )


# --- finding TensorRT --------------------------------------------------------------------------------


def load_tensorrt(library: Any = None) -> Any:
    """Return the module ``tensorrt``, once the driver has answered.

    Args:
        library: What to ask instead of the driver's own library.

    Raises:
        MissingDependencyError: The package or its libraries are absent.
        DeviceError: There is no driver, no device, or the driver is too old for this TensorRT.
    """
    if "tensorrt" not in sys.modules and importlib.util.find_spec("tensorrt") is None:
        raise MissingDependencyError(f"TensorRT is not installed. {_INSTALL}")
    problem = driver_problem(library)
    if problem:
        raise DeviceError(f"TensorRT needs a GPU: {problem}")
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"TensorRT's Python package is here, but it cannot be loaded: {error}. {_INSTALL}"
        ) from None
    _refuse_old_driver(driver_facts(library).version, needed_cuda())
    return trt


def version_of(trt: Any) -> tuple[int, ...]:
    """Return the version of a TensorRT module as numbers, such as (10, 3, 0)."""
    parts = str(trt.__version__).split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def needed_cuda() -> int | None:
    """Return the CUDA major version that pip's TensorRT is made for; None where no package's name tells."""
    for major in _CUDA_MAJORS:
        for name in (f"tensorrt-cu{major}", f"tensorrt-cu{major}-libs", f"tensorrt-cu{major}-bindings"):
            with suppress(PackageNotFoundError):
                version(name)
                return major
    return None


def open_machine(library: Any = None) -> Machine:
    """Return TensorRT with the first device.

    Raises:
        MissingDependencyError: TensorRT is absent.
        DeviceError: There is no usable driver or device.
    """
    trt = load_tensorrt(library)
    facts = driver_facts(library)
    return Machine(trt=trt, device=facts.devices[0], cuda=facts.version)


def _refuse_old_driver(served: tuple[int, int], needed: int | None) -> None:
    # within one major version, an older driver runs newer libraries
    if needed is not None and served[0] < needed:
        raise DeviceError(
            f"this TensorRT is made for CUDA {needed}, the NVIDIA driver serves up to CUDA {version_text(served)}. "
            f"Update the driver, or install TensorRT for its CUDA: pip install tensorrt-cu{served[0]}"
        )


# --- what TensorRT says ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def messages_of(trt: Any) -> Any:
    """Return the logger that is handed to everything of ``trt``; its ``errors`` explain what failed.

    There is one for the process, and it is never dropped: TensorRT keeps a pointer to the first that it was given.
    """

    class Messages(trt.ILogger):
        """Keeps errors, passes warnings on, and never lets an exception into TensorRT."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.interruption: BaseException | None = None

        def log(self, severity: Any, msg: str) -> None:
            try:
                if int(severity) <= int(trt.ILogger.ERROR):
                    self.errors.append(" ".join(msg.split()))
                logger.log(_level(trt, severity), "TensorRT: %s", msg)
            except BaseException as error:  # noqa: BLE001 - the caller is C++, and Ctrl-C may arrive just here
                self.interruption = error

    return Messages()


def _level(trt: Any, severity: Any) -> int:
    return logging.INFO if int(severity) <= int(trt.ILogger.WARNING) else logging.DEBUG


def said(messages: Any) -> str:
    """Return the errors that were kept, as the end of a sentence, and forget them."""
    errors = list(dict.fromkeys(messages.errors))[:_MOST_MESSAGES]
    messages.errors.clear()
    return "; ".join(errors).rstrip(".") or "it gave no reason"


def created(trt: Any, name: str) -> Any:
    """Return a new ``trt.Builder`` or ``trt.Runtime`` that works.

    Where CUDA does not start, ``Runtime`` gives an object all the same, whose first use ends the process; the error
    in its log is the only warning.

    Raises:
        DeviceError: It cannot be made, or something was wrong while it was.
    """
    messages = messages_of(trt)
    messages.errors.clear()
    try:
        made = getattr(trt, name)(messages)
    except TypeError:  # the binding's word for "the factory gave nothing"
        made = None
    if made is None or messages.errors:
        raise DeviceError(
            f"TensorRT {trt.__version__} does not start: {said(messages)}. Check the NVIDIA driver (`edgeflex doctor`)."
        )
    return made


# --- recipes and indices -----------------------------------------------------------------------------


def read_recipe(bundle: Bundle | DecoderBundle) -> BuildRecipe:
    """Return the recipe of a bundle, of a network's or of a decoder's.

    Raises:
        UnsupportedError: The bundle was exported for another backend.
        BundleError: It holds no recipe, or one that is not of its files.
    """
    backend, decoder = bundle.manifest.backend, isinstance(bundle, DecoderBundle)
    if backend != "tensorrt":
        raise UnsupportedError(
            f"{bundle.path}: exported for {backend!r}, which has no TensorRT engines. "
            f"{_REMEDIES[decoder]} with --target tensorrt."
        )
    path = bundle.role(RECIPE) if isinstance(bundle, DecoderBundle) else bundle.file(RECIPE)
    try:
        recipe = BuildRecipe.parse(read_bytes(path, "the build recipe"), str(path))
    except InputError as error:
        raise BundleError(f"{error}. Export the bundle again.") from None
    held = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    foreign = [name for name, digest in recipe.hashes().items() if held.get(name) != digest]
    if foreign:
        raise BundleError(
            f"{path}: written for other files than the manifest names: {', '.join(foreign)}. Export the bundle again."
        )
    return recipe


def engines_for(folder: Path, recipe: BuildRecipe, machine: Machine) -> EngineIndex:
    """Return the index of the engines in ``folder``, which were built from ``recipe`` for this machine.

    Raises:
        DeviceError: There are none, or they belong to another TensorRT, device, driver or program.
        BundleError: The index is damaged.
    """
    index = _read_index(folder / INDEX_FILE)
    if index is None:
        raise DeviceError(f"{folder}: no engines were built yet. {_REBUILD} {folder}")
    # how much scratch memory the builder had is a matter of the build alone
    options = recipe.options.model_copy(update={"workspace_bytes": index.key.options.workspace_bytes})
    differences = index.key.differences(machine.key(recipe, options))
    if differences:
        raise DeviceError(f"{folder}: its engines do not belong here: {'; '.join(differences)}. {_REBUILD} {folder}")
    refitted = {one.segment for one in index.experts if one.way == "refit"}
    wanted = {one.name for one in recipe.segments} | {one.name for one in recipe.refits if one.rival_of in refitted}
    missing = wanted - {one.segment for one in index.engines}
    if missing:
        raise DeviceError(f"{folder}: no engine of {', '.join(sorted(missing))}. {_REBUILD} {folder}")
    return index


def _read_index(path: Path) -> EngineIndex | None:
    if not path.is_file():
        return None
    try:
        return EngineIndex.parse(read_bytes(path, "the index of engines"), str(path))
    except InputError as error:
        raise BundleError(f"{error}. {_REBUILD} --force") from None


# --- building ----------------------------------------------------------------------------------------


def build(
    bundle: Bundle | DecoderBundle,
    *,
    out: Path | None = None,
    workspace_bytes: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    library: Any = None,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Path, EngineIndex], EngineIndex] | None = None,
) -> EngineIndex:
    """Build the engines of a bundle on this device.

    Each engine is kept as soon as it is built, so that a killed build goes on where it stopped; the index is written
    last. A rival that cannot be built is left out, and the index says why.

    Args:
        bundle: A checked bundle, a network's or a decoder's, exported for tensorrt.
        out: The folder that gets the engines; the bundle's own by default, where the runtime looks for them.
        workspace_bytes: Most scratch memory for a layer; the recipe's by default.
        progress: Told what TensorRT's own monitor says.
        force: Build again what is there already.
        library: What to ask instead of the driver's own library.
        clock: Seconds, rising.
        measure: Given the folder and the index once all engines stand there, returns the index with what it measured
            on them; where it fails, the engines stay.

    Raises:
        UnsupportedError: The bundle is for another backend, or this TensorRT or device cannot build it.
        BundleError: A graph is not the one that the manifest names.
        MissingDependencyError: TensorRT is absent.
        DeviceError: There is no usable driver or device, the builder failed, or the disk is full.
    """
    recipe = read_recipe(bundle)
    _check_sources(bundle.path, recipe)
    machine = open_machine(library)
    _require_fit(recipe, machine)
    update = {} if workspace_bytes is None else {"workspace_bytes": workspace_bytes}
    options = recipe.options.model_copy(update=update)
    folder = bundle.path if out is None else out
    job = _Job(machine, bundle.path, folder, options, progress or Silent(), clock)
    index = EngineIndex(key=machine.key(recipe, options), engines=())
    kept = {} if force else _kept(folder, index.key)
    _forget_index(folder, complete=all(one.name in kept for one in (*recipe.segments, *recipe.refits)))
    context = CudaContext(library)
    try:
        for segment in recipe.segments:
            built = kept.get(segment.name) or _built(job, segment)
            index = index.model_copy(update={"engines": (*index.engines, built)})
            write_atomic(folder / _PARTIAL_FILE, index.canonical_json())
        for rival in recipe.refits:
            index = _tried(job, rival, kept, index)
    finally:
        context.close()
    write_atomic(folder / INDEX_FILE, index.canonical_json())
    with suppress(OSError):
        (folder / _PARTIAL_FILE).unlink(missing_ok=True)
    if measure is not None:
        index = measure(folder, index)
        write_atomic(folder / INDEX_FILE, index.canonical_json())
    return index


def _tried(job: _Job, rival: RefitRecipe, kept: Mapping[str, BuiltEngine], index: EngineIndex) -> EngineIndex:
    """Return the index with a rival's engine, or with the reason why there is none."""
    try:
        built = kept.get(rival.name) or _built(job, rival)
    except (DeviceError, UnsupportedError) as error:
        logger.warning("%s is left out: %s", rival.name, error)
        left_out = ExpertWay(segment=rival.rival_of, way="inputs", reason=f"no engine to refit could be built: {error}")
        return index.model_copy(update={"experts": (*index.experts, left_out)})
    return index.model_copy(update={"engines": (*index.engines, built)})


@dataclass(frozen=True)
class _Job:
    """What stays the same from engine to engine."""

    machine: Machine
    source: Path
    folder: Path
    options: BuildOptions
    progress: Progress
    clock: Callable[[], float]

    @property
    def trt(self) -> Any:
        return self.machine.trt

    def place(self, relative: str) -> Path:
        """Return where a file of the engines' own folder goes; nothing else is ever written."""
        home = (self.folder / ENGINE_FOLDER).resolve()
        path = self.folder / relative
        if not path.resolve().is_relative_to(home) or path.resolve() == home:
            raise BundleError(
                f"{relative!r}: the recipe would write outside {ENGINE_FOLDER!r}. Export the bundle again."
            )
        return path


def _check_sources(folder: Path, recipe: BuildRecipe) -> None:
    changed = [name for name, digest in recipe.hashes().items() if _digest(folder / name) != digest]
    if changed:
        raise BundleError(f"{folder}: {', '.join(changed)} changed since the export. Copy or export the bundle again.")


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError:
        return ""


def _require_fit(recipe: BuildRecipe, machine: Machine) -> None:
    """Refuse before hours are spent what this TensorRT cannot parse or this device cannot run."""
    found = version_of(machine.trt)[:2]
    if found < recipe.least_version:
        raise UnsupportedError(
            f"this program needs TensorRT {version_text(recipe.least_version)} or newer; this is "
            f"{machine.trt.__version__}. Update TensorRT, or plan again without what needs it."
        )
    have = machine.device.compute_capability
    if have < recipe.least_capability:
        reasons = "; ".join(one.reason for one in recipe.needs if one.compute_capability > have)
        raise UnsupportedError(
            f"{machine.device.name} has compute capability {version_text(have)}; this program needs "
            f"{version_text(recipe.least_capability)}{f' ({reasons})' if reasons else ''}. Plan again for this device."
        )


def _kept(folder: Path, key: PortabilityKey) -> dict[str, BuiltEngine]:
    """Return the engines of an earlier build, by segment, that are whole and belong to ``key``."""
    found: dict[str, BuiltEngine] = {}
    for name in (INDEX_FILE, _PARTIAL_FILE):
        with suppress(BundleError):  # a damaged index keeps nothing
            index = _read_index(folder / name)
            if index is not None and not index.key.differences(key):
                found |= {one.segment: one for one in index.engines if _digest(folder / one.file) == one.sha256}
    return found


def _forget_index(folder: Path, *, complete: bool) -> None:
    """Remove an index that new engines are about to make wrong."""
    if not complete:
        with suppress(FileNotFoundError):
            (folder / INDEX_FILE).unlink()


def _built(job: _Job, segment: SegmentRecipe) -> BuiltEngine:
    """Build one engine, write it and the timing cache, and return its entry."""
    start = job.clock()
    path = job.place(segment.engine)
    with job.progress.task(f"Building {segment.name}", STEPS) as advance:
        plan = _plan(job, segment, advance)
    seconds = job.clock() - start
    # a view, not bytes: a second copy of a large engine may be more than a small board has
    data = memoryview(plan)
    write_atomic(path, cast("bytes", data))
    return BuiltEngine(
        segment=segment.name,
        file=segment.engine,
        size_bytes=data.nbytes,
        sha256=hashlib.sha256(data).hexdigest(),
        build_s=seconds,
    )


def _plan(job: _Job, segment: SegmentRecipe, advance: Advance) -> Any:
    """Return the serialised engine as TensorRT's own host memory."""
    trt = job.trt
    messages = messages_of(trt)
    builder = created(trt, "Builder")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = _given(builder.create_network(flags), "network", messages)
    _parse(job, segment, network)
    config = _given(builder.create_builder_config(), "builder configuration", messages)
    _configure(job, config)
    if isinstance(segment, RefitRecipe):
        _make_refittable(trt, segment, network, config)
    _add_profiles(builder, config, segment, messages)
    monitor = progress_monitor(trt, advance)
    config.progress_monitor = monitor
    cache = _set_timing_cache(job, config)
    plan = builder.build_serialized_network(network, config)
    for interruption in (monitor.interruption, messages.interruption):
        if interruption is not None:
            messages.interruption = None
            raise interruption
    if plan is None:
        raise DeviceError(
            f"TensorRT could not build {segment.name}: {said(messages)}. If memory ran out, close other programs, "
            "add swap or pass a smaller --workspace."
        )
    if cache is not None:
        _write_timing_cache(job, config)
    return plan


def _given(value: Any, what: str, messages: Any) -> Any:
    if value is None:
        raise DeviceError(f"TensorRT gave no {what}: {said(messages)}. Check free memory, then try again.")
    return value


def _parse(job: _Job, segment: SegmentRecipe, network: Any) -> None:
    """Read the graph; from its file, since external weights are found beside it only so."""
    trt, path = job.trt, job.source / segment.onnx
    parser = trt.OnnxParser(network, messages_of(trt))
    if parser.parse_from_file(str(path)):
        return
    faults = [_fault(parser.get_error(index)) for index in range(parser.num_errors)]
    because = "; ".join(faults[:_MOST_MESSAGES]) or said(messages_of(trt))
    raise UnsupportedError(
        f"{segment.onnx}: TensorRT {trt.__version__} refuses the graph: {because}. "
        "Plan again with other precisions for the layers named, or use another TensorRT."
    )


def _fault(error: Any) -> str:
    node = error.node_name()
    return f"node {node!r} ({error.node_operator()}): {error.desc()}" if node else str(error.desc())


def _configure(job: _Job, config: Any) -> None:
    trt, options = job.trt, job.options
    config.builder_optimization_level = options.optimization_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.weight_streaming:  # allowed because the network is strongly typed
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)


def _make_refittable(trt: Any, segment: RefitRecipe, network: Any, config: Any) -> None:
    """Let the weights that are named be replaced in the engine, and no others, which may be fused as ever."""
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    unknown = [one.name for one in segment.weights if not network.mark_weights_refittable(one.name)]
    if unknown:
        raise UnsupportedError(
            f"{segment.onnx}: TensorRT {trt.__version__} does not let {', '.join(unknown)} be replaced: "
            f"{said(messages_of(trt))}. Experts stay inputs of their engine."
        )


def _add_profiles(builder: Any, config: Any, segment: SegmentRecipe, messages: Any) -> None:
    for profile in segment.profiles:
        shapes = _given(builder.create_optimization_profile(), "optimization profile", messages)
        try:
            for name, bounds in profile.shapes.items():
                shapes.set_shape(name, bounds.least, bounds.best, bounds.most)
            added = config.add_optimization_profile(shapes) >= 0
        except RuntimeError:
            added = False
        if not added:
            raise UnsupportedError(
                f"{segment.name}: TensorRT refuses profile {profile.name!r}: {said(messages)}. Export the bundle again."
            )


# --- the timing cache --------------------------------------------------------------------------------


def _set_timing_cache(job: _Job, config: Any) -> Any:
    """Give the builder the timings of earlier builds, which make equal layers cheap; a cache of elsewhere is left."""
    path = job.place(job.options.timing_cache)
    for data in (path.read_bytes(), b"") if path.is_file() else (b"",):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        logger.info("%s: no timing cache of this TensorRT and device; a new one is begun", path)
    return None


def _write_timing_cache(job: _Job, config: Any) -> None:
    cache = config.get_timing_cache()
    data = None if cache is None else cache.serialize()
    if data is not None:
        write_atomic(job.place(job.options.timing_cache), bytes(memoryview(data)))
