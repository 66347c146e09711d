"""A stand-in for TensorRT's Python module that knows the names of one version and no others.

``FakeTensorrt("11.0", cuda)`` is the module. A name that the version lacks raises AttributeError, as does setting one,
and what is used is written down in ``calls`` and ``touched``. "ONNX" files are JSON with the tensors of the graph,
or real ones. ``functions`` give what the engine of a graph computes; a real graph without a function is run as
it is. ``fail`` names what goes wrong.
"""

from __future__ import annotations

import functools
import json
import math
from enum import IntEnum
from hashlib import sha256
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from tests.fake_cuda import FakeCuda

_NAMES = json.loads((Path(__file__).parent / "data" / "tensorrt_names.json").read_text(encoding="utf-8"))
VERSIONS: tuple[str, ...] = tuple(_NAMES["versions"])
_MAGIC = b"ENGINE"
_ADDRESSES = 256  # what every address is a multiple of
# ONNX's numbers of types: TensorRT's name, and how the elements lie in memory
_TYPES: dict[int, tuple[str, Any]] = {
    1: ("FLOAT", np.float32),
    2: ("UINT8", np.uint8),
    3: ("INT8", np.int8),
    6: ("INT32", np.int32),
    7: ("INT64", np.int64),
    9: ("BOOL", np.bool_),
    10: ("HALF", np.float16),
    16: ("BF16", np.uint16),
}
_MEMORY = dict(_TYPES.values())
NO_DRIVER = "CUDA initialization failure with error: 35. Please check your CUDA installation"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def names_of(kind: str, version: str) -> set[str]:
    """Return the names that a class has in a version."""
    found = set()
    for name, (first, end) in ((name, (*span, "", "")[:2]) for name, span in _NAMES["classes"][kind].items()):
        if (not first or _numbers(first) <= _numbers(version)) and (not end or _numbers(version) < _numbers(end)):
            found.add(name)
    return found


def members_of(kind: str, version: str) -> dict[str, int]:
    """Return the members of an enumeration in a version, with their numbers there."""
    members = {}
    for name, numbers in _NAMES["enums"][kind].items():
        valid = [(_numbers(since), number) for since, number in numbers.items() if _numbers(since) <= _numbers(version)]
        if max(valid)[1] is not None:
            members[name] = max(valid)[1]
    return members


class Known:
    """An object of a class of TensorRT; names that begin with an underscore are the fake's own."""

    _kind = ""

    def __init__(self, trt: FakeTensorrt) -> None:
        self._trt = trt

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "_known")(name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            self._known(name)
            self._trt.calls.append((f"{self._kind}.{name}", value))
        object.__setattr__(self, name, value)

    def _known(self, name: str) -> None:
        self._trt.touched.add((self._kind, name))
        if name not in names_of(self._kind, self._trt.__version__):
            raise AttributeError(f"TensorRT {self._trt.__version__}: {self._kind} has no {name!r}")

    def _called(self, name: str, *arguments: object) -> None:
        self._trt.calls.append((f"{self._kind}.{name}", arguments))

    def _fails(self, what: str) -> bool:
        return what in self._trt.fail


class _Memory:
    """IHostMemory: what memoryview() takes."""

    def __new__(cls, data: bytes) -> Any:
        return np.frombuffer(data, dtype=np.int8)


class _TimingCache(Known):
    _kind = "ITimingCache"

    def __init__(self, trt: FakeTensorrt, data: bytes) -> None:
        super().__init__(trt)
        self._data = data

    def serialize(self) -> Any:
        return None if self._fails("cache serialize") else _Memory(self._data)


class _Profile(Known):
    _kind = "IOptimizationProfile"

    def __init__(self, trt: FakeTensorrt) -> None:
        super().__init__(trt)
        self._shapes: dict[str, tuple[list[int], list[int]]] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self._called("set_shape", name, tuple(least), tuple(best), tuple(most))
        if self._fails("shape"):
            raise RuntimeError("Shape provided for min is inconsistent with other shapes.")
        self._shapes[name] = (list(least), list(most))


class _Config(Known):
    _kind = "IBuilderConfig"
    builder_optimization_level = 3
    progress_monitor: Any = None

    def __init__(self, trt: FakeTensorrt) -> None:
        super().__init__(trt)
        self._flags = {"TF32"}
        self._cache: _TimingCache | None = None
        self._profiles: list[_Profile] = []

    def set_memory_pool_limit(self, pool: IntEnum, size: int) -> None:
        self._called("set_memory_pool_limit", pool.name, size)

    def set_flag(self, flag: IntEnum) -> None:
        self._called("set_flag", flag.name)
        self._flags.add(flag.name)

    def clear_flag(self, flag: IntEnum) -> None:
        self._called("clear_flag", flag.name)
        self._flags.discard(flag.name)

    def add_optimization_profile(self, profile: _Profile) -> int:
        self._profiles.append(profile)
        self._called("add_optimization_profile", profile._kind)
        return -1 if self._fails("profile") else len(self._profiles) - 1

    def create_timing_cache(self, data: bytes) -> _TimingCache | None:
        self._called("create_timing_cache", bytes(data))
        return None if data.startswith(b"damaged") else _TimingCache(self._trt, bytes(data))

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self._called("set_timing_cache", ignore_mismatch)
        foreign = cache._data.startswith(b"foreign") and not ignore_mismatch
        self._cache = None if foreign else cache
        return not foreign

    def get_timing_cache(self) -> _TimingCache | None:
        return self._cache


class _Network(Known):
    _kind = "INetworkDefinition"

    def __init__(self, trt: FakeTensorrt, flags: int) -> None:
        super().__init__(trt)
        self._typed = bool(flags & 1 << members_of("NetworkDefinitionCreationFlag", trt.__version__)["STRONGLY_TYPED"])
        self._onnx: Path | None = None
        self._refittable: list[str] = []

    def mark_weights_refittable(self, name: str) -> bool:
        self._called("mark_weights_refittable", name)
        known = self._onnx is not None and name in _constants(self._onnx)
        self._refittable += [name] if known else []
        return known and not self._fails("mark")


class _Fault(Known):
    _kind = "ParserError"

    def __init__(self, trt: FakeTensorrt, node: str, operator: str, text: str) -> None:
        super().__init__(trt)
        self._parts = (node, operator, text)

    def node_name(self) -> str:
        return self._parts[0]

    def node_operator(self) -> str:
        return self._parts[1]

    def desc(self) -> str:
        return self._parts[2]


class _Parser(Known):
    _kind = "OnnxParser"

    def __init__(self, trt: FakeTensorrt, network: _Network, logger: Any) -> None:
        super().__init__(trt)
        self._network = network
        self._faults: list[_Fault] = []

    @property
    def num_errors(self) -> int:
        return len(self._faults)

    def get_error(self, index: int) -> _Fault:
        return self._faults[index]

    def parse_from_file(self, path: str) -> bool:
        assert type(path) is str, "the binding takes a str"
        self._called("parse_from_file", Path(path).name)
        if self._fails("parse"):
            for node, operator, text in self._trt.faults:
                self._faults.append(_Fault(self._trt, node, operator, text))
            return False
        self._network._onnx = Path(path)
        return True


class _Builder(Known):
    _kind = "Builder"

    def __init__(self, trt: FakeTensorrt, logger: Any) -> None:
        super().__init__(trt)
        self._logger = logger

    def create_network(self, flags: int = 0) -> _Network | None:
        self._called("create_network", flags)
        return None if self._fails("network") else _Network(self._trt, flags)

    def create_builder_config(self) -> _Config | None:
        return None if self._fails("config") else _Config(self._trt)

    def create_optimization_profile(self) -> _Profile:
        return _Profile(self._trt)

    def build_serialized_network(self, network: _Network, config: _Config) -> Any:
        assert network._onnx is not None, "nothing was parsed"
        self._called("build_serialized_network", network._onnx.name, network._typed, sorted(config._flags))
        if not self._monitored(config) or self._fails("plan") or self._fails(f"plan {network._onnx.stem}"):
            self._logger.log(self._trt._severity.WARNING, "a warning beside it")
            self._logger.log(self._trt._severity.ERROR, "[builder] out of memory\n  while choosing kernels")
            return None
        if config._cache is not None:
            config._cache._data += network._onnx.stem.encode()
        refittable = network._refittable if "REFIT_INDIVIDUAL" in config._flags else []
        return _Memory(self._trt.plan(network._onnx, [one._shapes for one in config._profiles], refittable))

    def _monitored(self, config: _Config) -> bool:
        """Tell the monitor of two nested phases, as TensorRT does; False where it cancels."""
        monitor = config.progress_monitor
        if monitor is None:
            return True
        monitor.phase_start("Building Engine", None, 4)
        for step in range(4):
            monitor.phase_start("Selecting", "Building Engine", 2)
            heard = [monitor.step_complete("Selecting", inner) for inner in range(2)]
            monitor.phase_finish("Selecting")
            if not all(heard) or not monitor.step_complete("Building Engine", step):
                return False
        monitor.phase_finish("Building Engine")
        return True


class _Context(Known):
    _kind = "IExecutionContext"

    def __init__(self, engine: _Engine, *, own_memory: bool) -> None:
        super().__init__(engine._trt)
        self._engine = engine
        self._places: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profile = 0
        self._scratch: tuple[int, int] | None = (0, 0) if own_memory else None
        self._changes = 0  # what a graph that was recorded from this context does not outlive
        self._deferred = True  # the next run does what cannot be recorded

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._called("set_tensor_address", name, address)
        self._changes += 1
        assert type(address) is int, "the binding takes an int"
        assert address % _ADDRESSES == 0, f"{name} is not at a multiple of {_ADDRESSES}"
        self._places[name] = address
        return name in self._engine._tensors and not self._fails("address")

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._called("set_optimization_profile_async", profile_index)
        self._profile, self._shapes = profile_index, {}
        self._changes += 1
        return profile_index < len(self._engine._profiles) and not self._fails("switch")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert type(shape) is tuple, "the binding takes a tuple"
        self._changes += 1
        self._deferred = True
        least, most = self._engine._profiles[self._profile].get(name, ([], []))
        fits = len(least) == len(shape) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        self._shapes[name] = shape
        return fits and not self._fails("input shape")

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % _ADDRESSES == 0, f"scratch is not at a multiple of {_ADDRESSES}"
        assert size >= self._engine.device_memory_size_v2, "less scratch than the engine needs"
        self._scratch = (memory, size)

    def execute_async_v3(self, stream: int) -> bool:
        self._called("execute_async_v3", self._engine._stem)
        cuda, engine = self._trt.cuda, self._engine
        if self._fails("enqueue") or self._fails(f"enqueue {engine._stem}"):
            engine._runtime._logger.log(self._trt._severity.ERROR, "enqueue: no kernel image")
            return False
        captured = stream in cuda.captures
        if captured and (self._fails("capture") or self._fails(f"capture {engine._stem}") or self._deferred):
            cuda.invalid.add(stream)
            return True
        self._deferred = False
        assert set(self._places) == set(engine._tensors), "a tensor has no address"
        assert self._scratch is not None, "the context has no scratch"
        work = self._computing() if engine._stem in self._trt.functions else self._running()
        if not (self._fails("half a graph") and captured):
            cuda.submit(stream, self._unchanged(work) if captured else work)
        return True

    def _unchanged(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return work of a graph, which belongs to the context as it is now."""
        changes = self._changes

        def replay() -> None:
            assert self._changes == changes, f"{self._engine._stem}: the context was changed after it was recorded"
            work()

        return replay

    def _computing(self) -> Callable[[], None]:
        """Return work by one of the fake's functions, over float32 tensors of fixed shapes."""
        cuda, engine = self._trt.cuda, self._engine
        x = cuda.array(self._places["x"], engine._shape("x"))
        outputs = {
            name: cuda.array(address, engine._shape(name)) for name, address in self._places.items() if name != "x"
        }

        def work() -> None:
            for name, value in self._trt.functions[engine._stem](x.copy()).items():
                outputs[name][...] = value

        return work

    def _running(self) -> Callable[[], None]:
        """Return work by ONNX Runtime, with the shapes and places as they are now."""
        cuda, tensors, scratch = self._trt.cuda, self._engine._tensors, self._scratch
        places = dict(self._places)
        engine = self._engine
        inputs = {}
        for name, one in tensors.items():
            if one["input"]:
                shape = self._shapes[name] if -1 in one["shape"] else tuple(one["shape"])
                size = math.prod(shape) * np.dtype(_MEMORY[one["dtype"]]).itemsize
                inputs[name] = (cuda.bytes_at(places[name], size), shape, one["dtype"])

        def work() -> None:
            if scratch is not None and scratch[1]:
                cuda.bytes_at(*scratch).fill(0xEE)  # shared: nothing may count on what it held
            for name, value in self._trt.run(engine._path, inputs, engine._weights).items():
                cuda.bytes_at(places[name], value.nbytes)[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        return work


class _Engine(Known):
    _kind = "ICudaEngine"
    streamable_weights_size = 0
    device_memory_size_v2 = 1000
    weight_streaming_budget_v2 = 0

    def __init__(self, runtime: _Runtime, document: dict[str, Any]) -> None:
        super().__init__(runtime._trt)
        self._runtime, self._stem, self._tensors = runtime, document["stem"], document["tensors"]
        self._path, self._profiles = document["path"], document["profiles"]
        constants = _constants(Path(self._path)) if document["refittable"] else {}
        self._weights = {name: constants[name].copy() for name in document["refittable"]}
        object.__setattr__(self, "streamable_weights_size", self._trt.weights)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> Any:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt._enums["TensorIOMode"]["INPUT" if self._tensors[name]["input"] else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt._enums["DataType"][self._tensors[name].get("dtype", "FLOAT")]

    def get_tensor_location(self, name: str) -> Any:
        return self._trt._enums["TensorLocation"]["HOST" if self._fails(f"host {name}") else "DEVICE"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape(name)

    def create_execution_context(self, strategy: Any = None) -> _Context | None:
        self._called("create_execution_context", self._stem)
        if self._fails("context"):
            self._runtime._logger.log(self._trt._severity.ERROR, "Requested size was 12 bytes: out of memory")
            return None
        return _Context(self, own_memory=strategy is None or strategy.name != "USER_MANAGED")


class _Runtime(Known):
    _kind = "Runtime"

    def __init__(self, trt: FakeTensorrt, logger: Any) -> None:
        super().__init__(trt)
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        assert not self._fails("driver"), "a real TensorRT would have ended the process here"
        self._called("deserialize_cuda_engine", len(data))
        if self._fails("deserialize") or not data.startswith(_MAGIC):
            self._logger.log(self._trt._severity.ERROR, "The engine plan file is generated on an incompatible device")
            return None
        return _Engine(self, json.loads(data[len(_MAGIC) :]))


class _Weights(Known):
    """Weights, of the form that takes an address."""

    _kind = "Weights"

    def __init__(self, trt: FakeTensorrt, kind: IntEnum, address: int, count: int) -> None:
        super().__init__(trt)
        assert type(address) is type(count) is int, "the binding takes an int"
        self._parts = (kind.name, address, count)


class _Refitter(Known):
    """Weights on the device, read when the stream comes to it. What is handed over is kept for good, as by pybind."""

    _kind = "Refitter"
    weights_validation = True

    def __init__(self, trt: FakeTensorrt, engine: _Engine, logger: Any) -> None:
        super().__init__(trt)
        self._engine, self._logger, self._sources = engine, logger, dict[str, int]()

    def set_named_weights(self, name: str, weights: _Weights, location: IntEnum) -> bool:
        self._called("set_named_weights", name, location.name)
        assert location.name == "DEVICE"
        kind, address, count = weights._parts
        held = self._engine._weights.get(name)
        self._sources[name] = address
        return held is not None and kind == "FLOAT" and count == held.size and not self._fails("set weights")

    def get_missing_weights(self) -> list[str]:
        missing = [name for name in self._engine._weights if name not in self._sources]
        return [*missing, "another"] if self._fails("missing weights") else missing

    def refit_cuda_engine_async(self, stream: int) -> bool:
        self._called("refit_cuda_engine_async", self._engine._stem)
        if self._fails("refit"):
            self._logger.log(self._trt._severity.ERROR, "refit: out of memory")
            return False
        cuda = self._trt.cuda
        sources = {
            name: cuda.bytes_at(self._sources[name], held.nbytes) for name, held in self._engine._weights.items()
        }

        def work() -> None:
            for name, held in self._engine._weights.items():
                turned = held[::-1] if self._fails("other numbers") else held
                turned[...] = sources[name].view(np.float32).reshape(held.shape)

        cuda.submit(stream, work)
        return True


class FakeTensorrt:
    """The module of one version."""

    def __init__(
        self,
        version: str,
        cuda: FakeCuda,
        *,
        functions: Mapping[str, Callable[[np.ndarray], Mapping[str, np.ndarray]]] | None = None,
        fail: Collection[str] = (),
        faults: tuple[tuple[str, str, str], ...] = (
            ("conv", "Conv", "scale must be > 0"),
            ("", "", "no such operator"),
        ),
        weights: int = 0,
    ) -> None:
        self.__version__ = f"{version}.0"
        self.__spec__ = ModuleSpec("tensorrt", None)  # other packages ask whether there is a TensorRT
        self.cuda, self.functions, self.fail, self.faults = cuda, dict(functions or {}), set(fail), faults
        self.weights = weights
        self.calls: list[tuple[str, Any]] = []
        self.touched: set[tuple[str, str]] = set()
        self._enums: dict[str, Any] = {kind: IntEnum(kind, members_of(kind, version)) for kind in _NAMES["enums"]}
        self._severity = self._enums["Severity"]

    def __getattr__(self, name: str) -> Any:
        """Every public name that is not one of the fake's own."""
        if name.startswith("_"):
            raise AttributeError(name)
        self.touched.add(("module", name))
        if name not in names_of("module", self.__version__):
            raise AttributeError(f"TensorRT {self.__version__} has no {name!r}")
        if name in self._enums:
            return self._enums[name]
        return getattr(self, f"_{name.lower()}")

    def plan(self, onnx: Path, profiles: list[Any] | None = None, refittable: Sequence[str] = ()) -> bytes:
        """Return the engine of a graph."""
        data = onnx.read_bytes()
        tensors = json.loads(data)["tensors"] if data.startswith(b"{") else _tensors(onnx)
        document = {"stem": onnx.stem, "tensors": tensors, "profiles": profiles or [], "path": str(onnx.resolve())}
        document["refittable"] = list(refittable)
        return _MAGIC + json.dumps(document).encode()

    def run(
        self,
        path: str,
        inputs: Mapping[str, tuple[np.ndarray, tuple[int, ...], str]],
        weights: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Return what a graph computes of inputs given as bytes, shape and type, and of weights that were replaced."""
        given = {
            name: (data.copy().view(_MEMORY[kind]).reshape(shape), kind) for name, (data, shape, kind) in inputs.items()
        }
        given |= {name: (value, "FLOAT") for name, value in weights.items()}
        return _program(path, Path(path).stat().st_mtime_ns, tuple(weights))(given)

    def named(self, name: str) -> list[Any]:
        """Return the arguments of every call of a name, in order."""
        return [arguments for called, arguments in self.calls if called == name]

    @property
    def _ilogger(self) -> Any:
        severity = self._severity

        class ILogger:
            Severity = severity
            INTERNAL_ERROR, ERROR, WARNING = severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING
            INFO, VERBOSE = severity.INFO, severity.VERBOSE

            def __init__(self) -> None:
                self._made = True

        return ILogger

    @property
    def _iprogressmonitor(self) -> Any:
        class IProgressMonitor:
            def __init__(self) -> None:
                self._made = True

        return IProgressMonitor

    def _builder(self, logger: Any) -> _Builder:
        self._begin(logger)
        if self.fail & {"driver", "builder"}:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return _Builder(self, logger)

    def _runtime(self, logger: Any) -> _Runtime:
        self._begin(logger)
        return _Runtime(self, logger)

    def _onnxparser(self, network: _Network, logger: Any) -> _Parser:
        return _Parser(self, network, logger)

    def _refitter(self, engine: _Engine, logger: Any) -> _Refitter:
        if not engine._weights or "refitter" in self.fail:
            logger.log(self._severity.ERROR, "the engine is not refittable")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return _Refitter(self, engine, logger)

    def _weights(self, kind: IntEnum, address: int, count: int) -> _Weights:
        return _Weights(self, kind, address, count)

    def _begin(self, logger: Any) -> None:
        assert logger._made, "the base class was not initialised; the real binding would refuse it"
        if "driver" in self.fail:
            logger.log(self._severity.ERROR, NO_DRIVER)


@functools.lru_cache(maxsize=256)
def _program(
    path: str, _changed_ns: int, replaced: tuple[str, ...]
) -> Callable[[Mapping[str, tuple[np.ndarray, str]]], dict[str, np.ndarray]]:
    """Return a graph as a function.

    ONNX Runtime's kernels for processors know no fp16: it would leave out all rounding to it, unasked. Graphs with
    some are computed by ONNX's own reference.
    """
    import onnx

    model = onnx.load(path)
    for one in [held for held in model.graph.initializer if held.name in replaced]:
        model.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
        model.graph.initializer.remove(one)
    half = any(one.name == "to" and one.i == 10 for node in model.graph.node for one in node.attribute)
    return _by_reference(model) if half else _by_runtime(model.SerializeToString() if replaced else path)


def _by_reference(model: Any) -> Callable[..., dict[str, np.ndarray]]:
    import ml_dtypes
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    names = [one.name for one in model.graph.output]

    def run(given: Mapping[str, tuple[np.ndarray, str]]) -> dict[str, np.ndarray]:
        feeds = {
            name: value.view(ml_dtypes.bfloat16) if kind == "BF16" else value for name, (value, kind) in given.items()
        }
        return dict(zip(names, evaluator.run(names, feeds), strict=True))

    return run


def _by_runtime(path: str | bytes) -> Callable[..., dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    as_bits = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type

    def run(given: Mapping[str, tuple[np.ndarray, str]]) -> dict[str, np.ndarray]:
        feeds = {name: as_bits(value, 16) if kind == "BF16" else value for name, (value, kind) in given.items()}
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def _tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a real ONNX file, its weights left where they are."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {one.name for one in graph.initializer}
    values = [(value, True) for value in graph.input if value.name not in constants]
    values += [(value, False) for value in graph.output]
    return {
        value.name: {
            "shape": [-1 if axis.dim_param else axis.dim_value for axis in value.type.tensor_type.shape.dim],
            "input": is_input,
            "dtype": _TYPES[value.type.tensor_type.elem_type][0],
        }
        for value, is_input in values
    }


def _constants(path: Path) -> dict[str, np.ndarray]:
    """Return the constants of a real ONNX file."""
    import onnx

    return {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def write_graph(path: Path, tensors: dict[str, tuple[int, ...]]) -> str:
    """Write a pretended ONNX file, whose input is ``x``, and return its SHA-256."""
    document = {"tensors": {name: {"shape": shape, "input": name == "x"} for name, shape in tensors.items()}}
    path.write_text(json.dumps(document), encoding="utf-8")
    return sha256(path.read_bytes()).hexdigest()
