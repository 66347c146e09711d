"""The nouns of engines: the recipe that travels with an export, and the index of what a device built from it.

The part that runs on the board reads these, so this module needs pydantic alone. Paths are relative to the bundle's
folder and are made of letters, digits, ``.``, ``_``, ``-`` and ``/``, so that a shell script may name them too.
"""

# No ``from __future__ import annotations`` tricks with TYPE_CHECKING here: pydantic resolves these types.

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from edgeflex.schema import Document, Noun

# major, minor
Version = tuple[int, int]
# What an export is held against: JetPack 6 has 10.3, JetPack 7 10.13 and 10.16, desktops up to 11.4.
SUPPORTED_VERSIONS: tuple[Version, ...] = (
    (10, 3),
    (10, 7),
    (10, 8),
    (10, 13),
    (10, 14),
    (10, 15),
    (10, 16),
    (11, 0),
    (11, 4),
)

# Role and file in a bundle
RECIPE, RECIPE_FILE = "recipe", "build.json"
BUILD_SCRIPT, BUILD_SCRIPT_FILE = "build_script", "build.sh"
# What a build adds to the bundle's folder
ENGINE_FOLDER = "engines"
INDEX_FILE = f"{ENGINE_FOLDER}/index.json"
TIMING_CACHE_FILE = f"{ENGINE_FOLDER}/timing.cache"

# TensorRT 10 and 11 run on compute capability 7.5 and above; a number format may ask for more.
LEAST_CAPABILITY: Version = (7, 5)

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = r"^[0-9a-f]{64}$"


def _plain_path(text: str) -> str:
    if not _PATH.fullmatch(text) or ".." in text:
        raise ValueError(f"{text!r} is not a plain relative path")
    return text


def _plain_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} has other characters than letters, digits, '.', '_' and '-'")
    return text


PlainPath = Annotated[str, AfterValidator(_plain_path)]
PlainName = Annotated[str, AfterValidator(_plain_name)]
Sha256 = Annotated[str, Field(pattern=_SHA256)]
Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "float8_e4m3fn", "bool"]


def version_text(version: Version) -> str:
    """Return a version as people write it.

    >>> version_text((10, 3))
    '10.3'
    """
    return f"{version[0]}.{version[1]}"


class TensorSpec(Noun):
    """An input or output of an engine. An axis is a size, or the name of one that a profile bounds."""

    name: PlainName
    dtype: Dtype
    shape: tuple[int | PlainName, ...]

    @property
    def dynamic(self) -> bool:
        """Whether a profile has to say how large some axis may be."""
        return any(isinstance(axis, str) for axis in self.shape)


class AxisRange(Noun):
    """How large a named axis may be, and the size that kernels are chosen for."""

    least: int = Field(ge=1)
    best: int = Field(ge=1)
    most: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.least <= self.best <= self.most:
            raise ValueError(f"least {self.least}, best {self.best} and most {self.most} must not fall")
        return self


class ShapeRange(Noun):
    """The smallest, the usual and the largest shape of one input; of equal rank, no axis falling."""

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not len(self.least) == len(self.best) == len(self.most):
            raise ValueError(f"shapes {self.least}, {self.best} and {self.most} differ in rank")
        if not all(low <= mid <= high for low, mid, high in zip(self.least, self.best, self.most, strict=True)):
            raise ValueError(f"shapes {self.least}, {self.best} and {self.most} must not fall on any axis")
        return self


class Profile(Noun):
    """One range of shapes that an engine is tuned for, such as ``prefill`` and ``decode``; dynamic inputs only."""

    name: PlainName
    shapes: Mapping[PlainName, ShapeRange]


class SegmentRecipe(Noun):
    """One engine to build: what from, and what it takes and returns.

    ``engine`` is where the engine goes. ``profiles`` is empty where every shape is fixed.
    """

    name: PlainName
    onnx: PlainPath
    onnx_sha256: Sha256
    data: PlainPath | None = None
    data_sha256: Sha256 | None = None
    engine: PlainPath
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...] = ()

    @model_validator(mode="after")
    def _profiles_cover(self) -> Self:
        if (self.data is None) != (self.data_sha256 is None):
            raise ValueError(f"{self.name}: data and data_sha256 come together")
        dynamic = {spec.name: spec for spec in self.inputs if spec.dynamic}
        if bool(dynamic) != bool(self.profiles):
            raise ValueError(f"{self.name}: profiles are for dynamic inputs; dynamic are {sorted(dynamic) or 'none'}")
        for profile in self.profiles:
            if set(profile.shapes) != set(dynamic):
                raise ValueError(f"{self.name}: profile {profile.name} must bound exactly {sorted(dynamic)}")
            for name, spec in dynamic.items():
                _check_range(self.name, profile.name, spec, profile.shapes[name])
        return self


class RefitRecipe(SegmentRecipe):
    """A second engine of the experts of another segment: their weights are constants that are put in before each run.

    ``weights`` are those constants by the names of the other engine's inputs; ``data`` is the expert that the engine
    is built with.
    """

    rival_of: PlainName
    weights: tuple[TensorSpec, ...]


def _check_range(segment: str, profile: str, spec: TensorSpec, bounds: ShapeRange) -> None:
    fixed = [index for index, axis in enumerate(spec.shape) if isinstance(axis, int)]
    for shape in (bounds.least, bounds.best, bounds.most):
        if len(shape) != len(spec.shape) or any(shape[index] != spec.shape[index] for index in fixed):
            raise ValueError(f"{segment}: profile {profile} gives {shape} to {spec.name}, whose shape is {spec.shape}")


class BuildOptions(Noun):
    """How TensorRT's builder is set; part of what an engine depends on."""

    strongly_typed: Literal[True] = True
    optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_bytes: int = Field(default=1 << 30, ge=1 << 20)
    timing_cache: PlainPath = TIMING_CACHE_FILE
    weight_streaming: bool = False


class Need(Noun):
    """What the program asks of a GPU, and why."""

    compute_capability: Version
    reason: str


class BuildRecipe(Document):
    """How to make engines of an exported program on the device.

    ``versions`` are the TensorRT versions, of those that are checked, whose importer takes every graph;
    ``least_version`` is the first of them. ``cuda_graph`` says that all shapes are fixed, so that a run may be
    recorded once and replayed. ``refits`` are engines to be tried against ``segments``; nothing needs them.
    """

    segments: tuple[SegmentRecipe, ...] = Field(min_length=1)
    refits: tuple[RefitRecipe, ...] = ()
    least_version: Version
    versions: tuple[Version, ...]
    needs: tuple[Need, ...] = ()
    options: BuildOptions = BuildOptions()
    cuda_graph: bool = False

    @property
    def least_capability(self) -> Version:
        """The least compute capability that has all number formats of the program."""
        return max((need.compute_capability for need in self.needs), default=LEAST_CAPABILITY)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file that engines are built from, by path."""
        built = (*self.segments, *self.refits)
        found = {segment.onnx: segment.onnx_sha256 for segment in built}
        for segment in built:
            if segment.data is not None and segment.data_sha256 is not None:
                found[segment.data] = segment.data_sha256
        return found


class PortabilityKey(Noun):
    """What an engine belongs to; on anything else it is built again.

    ``tensorrt`` is the library's version (``10.3.0``), ``driver`` the CUDA version that the driver speaks
    (``12.6``), empty where it was not told. ``hashes`` are those of the files it was built from.
    """

    tensorrt: str
    gpu: str
    compute_capability: Version
    driver: str = ""
    hashes: Mapping[str, Sha256]
    options: BuildOptions

    def differences(self, other: Self) -> tuple[str, ...]:
        """Return in words where ``other``, the key of this device and program now, differs from this one.

        Builds of one TensorRT release differ in the fourth number alone, and share engines; a driver that was not
        told differs from none.
        """
        pairs = [
            ("TensorRT", _release(self.tensorrt), _release(other.tensorrt)),
            ("GPU", self.gpu, other.gpu),
            ("compute capability", version_text(self.compute_capability), version_text(other.compute_capability)),
        ]
        if self.driver and other.driver:
            pairs.append(("the driver's CUDA", self.driver, other.driver))
        found = [f"{what} was {mine}, is {theirs}" for what, mine, theirs in pairs if mine != theirs]
        paths = sorted({*self.hashes, *other.hashes})
        found.extend(f"{path} has changed" for path in paths if self.hashes.get(path) != other.hashes.get(path))
        if self.options != other.options:
            found.append("the builder's options have changed")
        return tuple(found)


def _release(version: str) -> str:
    return ".".join(version.split(".")[:3])


class BuiltEngine(Noun):
    """One engine as it was built; ``file`` is relative to the bundle's folder."""

    segment: PlainName
    file: PlainPath
    size_bytes: int
    sha256: Sha256
    build_s: float


class ExpertWay(Noun):
    """How the experts of one segment get their weights on this device, and the figures that decided it.

    ``inputs``: by the address of the expert's slot. ``refit``: put into a second engine before each run. The seconds
    are those of an expert that was not there: its way to the device, if it needs one, and one token's computing, with
    the refit in its case; None where it was not measured, as ``reason`` says.
    """

    segment: PlainName
    way: Literal["inputs", "refit"]
    inputs_s: float | None = None
    refit_s: float | None = None
    reason: str = ""


class EngineIndex(Document):
    """What a device built from a recipe, with the key that says where it may run, and how experts get their weights.

    Segments of experts that ``experts`` does not name take them as inputs.
    """

    key: PortabilityKey
    engines: tuple[BuiltEngine, ...]
    experts: tuple[ExpertWay, ...] = ()
