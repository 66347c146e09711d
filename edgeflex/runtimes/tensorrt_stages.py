"""Engines of a decoder's stages: inputs and outputs by name, a context for each range of shapes, one scratch for all.

The stages of a decoder run one after another on one stream, so that they share the memory in which an engine keeps
what lives within a call; it is as large as the neediest of them wants it. No engine holds weights: they are inputs,
but for experts on a device on which putting them into an engine was measured to be faster.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.files import read_bytes
from edgeflex.runtimes.tensorrt_build import created, messages_of, said
from edgeflex.schema_trt import RefitRecipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from edgeflex.runtimes.cuda_driver import CudaContext
    from edgeflex.runtimes.tensorrt_build import Machine
    from edgeflex.schema_trt import BuildRecipe, BuiltEngine, EngineIndex, Profile, SegmentRecipe, TensorSpec

    Shape = tuple[int, ...]

ADDRESS_ALIGNMENT = 256  # NvInferRuntime.h, IExecutionContext::setTensorAddress
# What TensorRT calls a type, and its bytes.
_DTYPES = {
    "float32": ("FLOAT", 4),
    "float16": ("HALF", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("INT64", 8),
    "int32": ("INT32", 4),
    "int8": ("INT8", 1),
    "uint8": ("UINT8", 1),
    "float8_e4m3fn": ("FP8", 1),
    "bool": ("BOOL", 1),
}
_REEXPORT = "Export the bundle again."


def load_engine(runtime: Any, folder: Path, entry: BuiltEngine, machine: Machine) -> Any:
    """Return one engine, of a file that is the one that was built.

    Args:
        runtime: TensorRT's, which must live as long as the engine.
        folder: What the entry's file is relative to.
        entry: Of the index.
        machine: What runs it.

    Raises:
        DeviceError: There is no such file, or TensorRT refuses it.
        BundleError: It is another one than was built.
    """
    path = folder / entry.file
    remedy = f"Build it again: edgeflex build {folder}"
    try:
        data = read_bytes(path, "the engine")
    except InputError as error:
        raise DeviceError(f"{error} {remedy}") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError(f"{path}: the engine differs from the SHA-256 that its index gives. {remedy}")
    messages = messages_of(machine.trt)
    messages.errors.clear()
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise DeviceError(f"{path}: TensorRT {machine.trt.__version__} refuses the engine: {said(messages)}. {remedy}")
    return engine


@dataclass
class _Context:
    """An execution context with what was last set in it, as setting costs more than comparing."""

    trt: Any
    shapes: tuple[Shape, ...] = ()
    places: dict[str, int] = field(default_factory=dict)


class EngineStage:
    """One engine, ready to run.

    Args:
        recipe: Of the engine.
        contexts: One for each profile of the recipe, in its order, or one where it has none.
        stream: Where work is queued.
        messages: TensorRT's logger.
        another: Returns one more context for the profile of that number.
    """

    def __init__(
        self,
        recipe: SegmentRecipe,
        contexts: Iterable[Any],
        stream: int,
        messages: Any,
        another: Callable[[int], Any] | None = None,
    ) -> None:
        self.name = recipe.name
        self._recipe = recipe
        self._another = another
        self.inputs: dict[str, TensorSpec] = {spec.name: spec for spec in recipe.inputs}
        self.outputs: dict[str, TensorSpec] = {spec.name: spec for spec in recipe.outputs}
        self._profiles = recipe.profiles
        self._dynamic = tuple(spec.name for spec in recipe.inputs if spec.dynamic)
        self._contexts = [_Context(one) for one in contexts]
        self._fitting: dict[tuple[Shape, ...], _Context] = {}
        self._stream = stream
        self._messages = messages
        self._input_bytes = {spec.name: _static_bytes(spec) for spec in recipe.inputs}

    def own(self, shapes: Mapping[str, Shape]) -> EngineStage:
        """Return the same stage with a context that nobody else changes, for the range that holds these shapes.

        Args:
            shapes: Of the inputs that have an open axis; of others they are not looked at.

        Raises:
            DeviceError: No range holds them, or TensorRT makes no context.
        """
        if self._another is None:
            raise DeviceError(f"{self.name}: no more contexts can be made of this engine. Build again.")
        number = self._profile(tuple(shapes[name] for name in self._dynamic))
        alone = self._recipe.model_copy(update={"profiles": self._profiles[number : number + 1]})
        return EngineStage(alone, (self._another(number),), self._stream, self._messages)

    def require_bytes(self, name: str, size_bytes: int, what: str) -> None:
        """Refuse an input that is not exactly as large as what is handed to it.

        Args:
            name: Of the input.
            size_bytes: What is handed.
            what: Its name, for the message.

        Raises:
            BundleError: There is no such input, its shape is open, or it is of another size.
        """
        wanted = self._input_bytes.get(name, 0)
        if wanted != size_bytes:
            raise BundleError(
                f"{self.name}: its engine wants {wanted} bytes as {name!r}, and {what} has {size_bytes}. {_REEXPORT}"
            )

    def __call__(self, places: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
        """Queue a run.

        Args:
            places: Device address of every input and output.
            shapes: Of the inputs that have an open axis; of others they are not looked at.

        Raises:
            DeviceError: TensorRT refuses a place or a shape, or fails.
        """
        wanted = tuple(shapes[name] for name in self._dynamic)
        context = self._fitting.get(wanted)
        if context is None:
            context = self._fitting[wanted] = self._contexts[self._profile(wanted)]
        if context.shapes != wanted:
            context.shapes = ()  # until all are set, none of the earlier may be taken for set
            for name, shape in zip(self._dynamic, wanted, strict=True):
                if not context.trt.set_input_shape(name, shape):
                    raise self._failed(f"refuses the shape {shape} of {name!r}")
            context.shapes = wanted
        for name, address in places.items():
            if context.places.get(name) != address:
                if not context.trt.set_tensor_address(name, address):
                    raise self._failed(f"refuses a place for {name!r}")
                context.places[name] = address
        if not context.trt.execute_async_v3(self._stream):
            raise self._failed("could not run")

    def most(self, name: str, axis: int) -> int:
        """Return how large an input's axis may be in any profile.

        Raises:
            BundleError: There is no such input.
        """
        spec = self.inputs.get(name)
        if spec is None or axis >= len(spec.shape):
            raise BundleError(f"the engine of {self.name} has no input {name!r} with {axis + 1} axes. {_REEXPORT}")
        if not spec.dynamic:
            return int(spec.shape[axis])
        return max(profile.shapes[name].most[axis] for profile in self._profiles)

    def _profile(self, wanted: tuple[Shape, ...]) -> int:
        """Return the first profile that holds these shapes."""
        if not self._profiles:
            return 0
        for index, profile in enumerate(self._profiles):
            if all(_within(profile, name, shape) for name, shape in zip(self._dynamic, wanted, strict=True)):
                return index
        said_shapes = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self._dynamic, wanted, strict=True))
        raise DeviceError(
            f"{self.name}: no range of shapes that the engine was built for holds {said_shapes}. Give fewer tokens of "
            "context or of a prompt's chunk, or export again with more."
        )

    def _failed(self, what: str) -> DeviceError:
        return DeviceError(
            f"{self.name}: TensorRT {what}: {said(self._messages)}. Check free memory on the device, then build again."
        )


class RefitStage(EngineStage):
    """An engine whose constants are an expert's weights, put there on the stream before each run.

    Weights are asked for as inputs would be, by name and address, and copied to one place on the device, from which
    TensorRT takes them: a place is named to it once, since its binding keeps all that it is ever handed. The engine
    holds one expert, so that each run of another pays for the way in; on one stream no run can see half of it.

    Args:
        recipe: Of the engine.
        contexts: One for each profile of the recipe, in its order.
        stream: Where work is queued.
        cuda: The device's context.
        engine: TensorRT's own, built so that its weights can be replaced.
        trt: TensorRT.

    Raises:
        DeviceError: TensorRT does not let these weights be replaced, or there is too little memory.
    """

    def __init__(
        self,
        recipe: RefitRecipe,
        contexts: Iterable[Any],
        stream: int,
        *,
        cuda: CudaContext,
        engine: Any,
        trt: Any,
    ) -> None:
        messages = messages_of(trt)
        super().__init__(recipe, contexts, stream, messages)
        self._cuda = cuda
        sizes = {spec.name: _static_bytes(spec) for spec in recipe.weights}
        self._weights = {name: (cuda.allocate(size), size) for name, size in sizes.items()}
        self._input_bytes |= sizes
        messages.errors.clear()
        try:
            self._refitter = trt.Refitter(engine, messages)
        except TypeError:  # the binding's word for "the factory gave nothing"
            self._refitter = None
        if self._refitter is None:
            raise self._failed("lets no weights be replaced")
        self._refitter.weights_validation = False  # asks for conversions, of which there are none
        for name, (address, size) in self._weights.items():
            values = trt.Weights(trt.DataType.FLOAT, address, size // 4)
            if not self._refitter.set_named_weights(name, values, trt.TensorLocation.DEVICE):
                raise self._failed(f"does not let {name!r} be replaced")
        missing = self._refitter.get_missing_weights()
        if missing:
            raise self._failed(f"wants {', '.join(missing)} to be replaced too")

    @property
    def weights_bytes(self) -> int:
        """Bytes of an expert's weights, of which the engine has its own copy."""
        return sum(size for _, size in self._weights.values())

    def __call__(self, places: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
        """Queue the way of an expert's weights into the engine, and a run.

        Args:
            places: Device address of every input and output, and of every weight.
            shapes: Of the inputs that have an open axis; of others they are not looked at.

        Raises:
            DeviceError: TensorRT refuses weights, a place or a shape, or fails.
        """
        for name, (address, size) in self._weights.items():
            self._cuda.copy(address, places[name], size, self._stream)
        if not self._refitter.refit_cuda_engine_async(self._stream):
            raise self._failed("could not take an expert's weights")
        super().__call__({name: one for name, one in places.items() if name not in self._weights}, shapes)


def _static_bytes(spec: TensorSpec) -> int:
    """Return the bytes of a tensor without open axes, and 0 for others."""
    if spec.dynamic:
        return 0
    return math.prod(int(axis) for axis in spec.shape) * _DTYPES[spec.dtype][1]


def _within(profile: Profile, name: str, shape: Shape) -> bool:
    bounds = profile.shapes[name]
    return all(low <= size <= high for low, size, high in zip(bounds.least, shape, bounds.most, strict=True))


class Engines:
    """All engines of a recipe, loaded, with one scratch.

    Args:
        cuda: The device's context.
        stream: Where all of them run.
        machine: TensorRT and the device.
        folder: Where the engines lie.
        recipe: What they were built from.
        index: What was built.

    Raises:
        DeviceError: An engine is missing, TensorRT refuses one, or there is too little memory.
        BundleError: An engine is damaged, or takes other tensors than the recipe says.
    """

    def __init__(
        self,
        cuda: CudaContext,
        stream: int,
        machine: Machine,
        folder: Path,
        recipe: BuildRecipe,
        index: EngineIndex,
    ) -> None:
        self._messages = messages_of(machine.trt)
        self._runtime = created(machine.trt, "Runtime")
        held = {one.segment: one for one in index.engines}
        chosen = {one.segment for one in index.experts if one.way == "refit"}
        refits = {one.rival_of: one for one in recipe.refits if one.rival_of in chosen}
        wanted: list[SegmentRecipe] = [refits.get(one.name, one) for one in recipe.segments]
        engines = {one.name: load_engine(self._runtime, folder, held[one.name], machine) for one in wanted}
        for one in wanted:
            _check_tensors(engines[one.name], one, machine.trt, folder)
        needs = max(int(engine.device_memory_size_v2) for engine in engines.values())
        self.scratch_bytes = max(needs, ADDRESS_ALIGNMENT)
        self._scratch = cuda.allocate(self.scratch_bytes)
        # contexts point into engines, engines into the runtime: all are kept here
        self._engines = engines
        self._stages = {
            one.onnx: self._stage(cuda, used, stream, machine.trt)
            for one, used in zip(recipe.segments, wanted, strict=True)
        }

    @property
    def weights_bytes(self) -> int:
        """Bytes on the device of weights that engines have copies of."""
        return sum(one.weights_bytes for one in self._stages.values() if isinstance(one, RefitStage))

    def stage(self, onnx: str) -> EngineStage:
        """Return the stage that was built from a graph, or its rival where that is how experts get their weights here.

        Raises:
            BundleError: The recipe has none.
        """
        found = self._stages.get(onnx)
        if found is None:
            raise BundleError(f"the recipe builds no engine of {onnx!r}. {_REEXPORT}")
        return found

    def _stage(self, cuda: CudaContext, recipe: SegmentRecipe, stream: int, trt: Any) -> EngineStage:
        scratch, engine = (self._scratch, self.scratch_bytes), self._engines[recipe.name]
        another = partial(_context, engine, recipe.name, stream, scratch, trt)
        contexts = [another(number) for number in range(max(1, len(recipe.profiles)))]
        if isinstance(recipe, RefitRecipe):
            return RefitStage(recipe, contexts, stream, cuda=cuda, engine=engine, trt=trt)
        return EngineStage(recipe, contexts, stream, self._messages, another)


def _context(engine: Any, name: str, stream: int, scratch: tuple[int, int], trt: Any, profile: int) -> Any:
    """Return a new context of an engine, with the scratch (address, bytes) that all share."""
    messages = messages_of(trt)
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is None:
        raise DeviceError(
            f"{name}: TensorRT could not make an execution context: {said(messages)}. "
            "Close other programs that use the device, or plan for a smaller memory budget."
        )
    if profile and not context.set_optimization_profile_async(profile, stream):
        raise DeviceError(f"{name}: TensorRT refuses profile {profile}: {said(messages)}. Build again.")
    context.set_device_memory(*scratch)
    return context


def _check_tensors(engine: Any, recipe: SegmentRecipe, trt: Any, folder: Path) -> None:
    """Refuse an engine that takes or gives something else than its recipe says."""
    wanted = {spec.name: (True, spec) for spec in recipe.inputs} | {spec.name: (False, spec) for spec in recipe.outputs}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    faults = sorted(set(names) ^ set(wanted))
    for name in names:
        if name in wanted and not _alike(engine, name, *wanted[name], trt):
            faults.append(name)
    if faults:
        raise BundleError(
            f"{folder}: the engine of {recipe.name} and its recipe differ in {', '.join(faults[:5])}. "
            f"Build it again: edgeflex build {folder} --force"
        )


def _alike(engine: Any, name: str, is_input: bool, spec: TensorSpec, trt: Any) -> bool:
    if (engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT) != is_input:
        return False
    if engine.get_tensor_dtype(name) != getattr(trt.DataType, _DTYPES[spec.dtype][0]):
        return False
    if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:  # what shapes depend on would be the host's
        return False
    found = tuple(int(size) for size in engine.get_tensor_shape(name))
    return len(found) == len(spec.shape) and all(
        isinstance(said_size, str) or size == said_size for size, said_size in zip(found, spec.shape, strict=True)
    )
