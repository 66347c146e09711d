"""A real bundle of three small convolutional segments, exported to ExecuTorch or ONNX once per test process."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgeflex.bundle import EXPECTED, PROGRAM, PROGRAM_PART, SEEN, Bundle, seal, seen_text, write_manifest
from edgeflex.profiles.machine import machine
from edgeflex.runtimes.reference import ReferenceSession
from edgeflex.runtimes.segments import all_exits
from edgeflex.schema import (
    Budget,
    BundleManifest,
    Certificate,
    Choice,
    DeviceProfile,
    ExitPoint,
    Figure,
    Footprint,
    Interval,
    Layer,
    LayerKind,
    LayerShape,
    MemoryBreakdown,
    ModelGraph,
    Plan,
    Precision,
    Preprocessing,
    Proof,
    Scenario,
    SegmentProgram,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

CLASSES = ("blue", "green", "red")
SHAPES: tuple[tuple[int, ...], ...] = ((1, 3, 16, 16), (1, 8, 8, 8), (1, 16, 4, 4))
WIDTHS = (8, 16, 32)


class Segment(nn.Module):
    """Convolution, ReLU, pooled linear head, softmax."""

    def __init__(self, channels: int, width: int, *, last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, stride=2)
        self.head = nn.Linear(width, len(CLASSES))
        self.last = last

    def forward(self, x):
        y = torch.relu(self.conv(x))
        p = torch.softmax(25.0 * self.head(y.mean((2, 3))), -1)
        return p if self.last else (y, p)


@cache
def toy_segments() -> tuple[nn.Module, ...]:
    """Return the torch modules, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        modules = [
            Segment(shape[1], width, last=k == 2) for k, (shape, width) in enumerate(zip(SHAPES, WIDTHS, strict=True))
        ]
    return tuple(module.eval().requires_grad_(False) for module in modules)


def lower(modules: dict[str, tuple[nn.Module, torch.Tensor]]) -> bytes:
    """Return a program with a method per module."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = {name: torch.export.export(module, (x,)) for name, (module, x) in modules.items()}
        partitioners: Any = {name: [XnnpackPartitioner()] for name in exported}
        return bytes(to_edge_transform_and_lower(exported, partitioner=partitioners).to_executorch().buffer)


@cache
def toy_program() -> bytes:
    """Return the ``.pte`` of the toy segments."""
    examples = [torch.zeros(shape) for shape in SHAPES]
    return lower({f"segment{k}": (module, examples[k]) for k, module in enumerate(toy_segments())})


@cache
def toy_graphs() -> dict[str, bytes]:
    """Return the ONNX files of the toy segments by name, weights in a ``.data`` beside each graph."""
    import onnx_ir

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, module in enumerate(toy_segments()):
            names = ["probabilities"] if k == 2 else ["activations", "probabilities"]
            program: Any = torch.onnx.export(
                module,
                (torch.zeros(SHAPES[k]),),
                dynamo=True,
                opset_version=20,
                input_names=["x"],
                output_names=names,
                verbose=False,
            )
            onnx_ir.save(program.model, f"{place}/segment{k}.onnx", external_data=f"segment{k}.data")
        return {file.name: file.read_bytes() for file in sorted(Path(place).iterdir())}


def toy_files(backend: str) -> dict[str, bytes]:
    """Return the files of the toy's program by name."""
    return {"program.pte": toy_program()} if backend == "executorch" else toy_graphs()


def toy_programs() -> tuple[SegmentProgram, ...]:
    """Return what each segment takes and returns."""
    return tuple(
        SegmentProgram(
            method=f"segment{k}",
            input_shape=SHAPES[k],
            output_shape=None if k == 2 else SHAPES[k + 1],
            exit=f"exit{k}",
        )
        for k in range(3)
    )


def toy_inputs(count: int, seed: int = 0) -> np.ndarray:
    """Return float32 [count, 3, 16, 16]."""
    return np.random.default_rng(seed).normal(size=(count, *SHAPES[0][1:])).astype(np.float32)


def reference_probabilities(inputs: np.ndarray) -> np.ndarray:
    """Return what the torch modules say, [n, exits, classes]."""
    with ReferenceSession(toy_segments()) as session:
        return all_exits(session, [inputs])


def toy_plan(**fields: Any) -> Plan:
    """Return a plan for the toy; promises are loose unless given."""
    disk_bytes = sum(map(len, toy_files(fields.get("backend", "executorch")).values()))
    latency: Any = {"mean": 1e-3, "worst": 1e-3}
    base: dict[str, Any] = {
        "name": "toy",
        "backend": "executorch",
        "budget": Budget(),
        "scenario": Scenario(name="toy", reach=(1.0, 0.6, 0.3), loss=0.0),
        "thresholds": (0.9, 0.9, None),
        "choices": tuple(Choice(subject=layer.name, option="fp32") for layer in _layers()),
        "exit_shares": (0.4, 0.3, 0.3),
        "predicted": Footprint(
            loss=0.0,
            latency_s=latency,
            block_latency_s=(1e-5, 2e-5, 3e-5),
            memory_bytes={Tier.HOST: 100_000},
            disk_bytes=disk_bytes,
        ),
        "latency_interval_s": {"mean": Interval(value=1e-3, low=0.0, high=1.0)},
        "memory": MemoryBreakdown(weights_bytes=50_000, activation_bytes=25_000, overhead_bytes=25_000),
        "reference_accuracy": 0.5,
        "proof": Proof(
            solver="none",
            status="feasible",
            minimize="latency",
            objective=1.0,
            bound=1.0,
            gap=0.0,
            tolerance=0.0,
            wall_s=0.0,
            scenarios=1,
            scenarios_solved=1,
        ),
    }
    return Plan(**{**base, **fields})


def toy_certificate(drop_limit: float) -> Certificate:
    """Return a certificate with this limit."""
    return Certificate(
        test="betting",
        drop_limit=drop_limit,
        confidence=0.95,
        samples=100,
        candidates=1,
        certified_index=0,
        drop=0.0,
        drop_upper_bound=drop_limit,
    )


def _layers() -> tuple[Layer, ...]:
    layers = []
    for k, (shape, width) in enumerate(zip(SHAPES, WIDTHS, strict=True)):
        conv = LayerShape(
            kind=LayerKind.CONV2D,
            in_channels=shape[1],
            out_channels=width,
            kernel=3,
            stride=2,
            padding=1,
            height=shape[2],
            width=shape[3],
        )
        head = LayerShape(kind=LayerKind.LINEAR, in_channels=width, out_channels=len(CLASSES))
        layers.append(Layer(name=f"segment{k}.conv", shape=conv, segment=k, bias=True))
        layers.append(Layer(name=f"segment{k}.head", shape=head, segment=k, bias=True, head=True))
    return tuple(layers)


def toy_graph() -> ModelGraph:
    """Return the toy as the planner sees it."""
    return ModelGraph(
        name="toy",
        weights_digest="0" * 64,
        input_shape=SHAPES[0],
        preprocessing=Preprocessing(height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        classes=CLASSES,
        segment_count=3,
        layers=_layers(),
        exits=tuple(ExitPoint(name=f"exit{k}", segment=k, stage=f"stage{k}") for k in range(3)),
    )


def write_toy_bundle(
    folder: Path,
    *,
    plan: Plan | None = None,
    seen: Iterable[str] = (),
    tolerance: float = 1e-4,
    expected_error: float = 0.0,
    program: bytes | None = None,
    backend: str = "executorch",
    settings: str = "",
) -> Bundle:
    """Write a bundle and return it; ``expected_error`` is added to one expected probability."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = toy_files(backend) if program is None else {"program.pte": program}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    inputs = toy_inputs(2, seed=1)
    probabilities = reference_probabilities(inputs)
    probabilities[1, 1, 2] += expected_error
    save_file({"inputs": inputs, "probabilities": probabilities}, folder / "expected.safetensors")
    (folder / "seen.txt").write_text(seen_text(seen))
    roles = {PROGRAM_PART + name.removesuffix(".onnx"): name for name in files}
    if backend == "executorch":
        roles = {PROGRAM: "program.pte"}
    manifest = BundleManifest(
        backend=backend,
        versions={"edgeflex": "0"},
        graph=toy_graph(),
        plan=plan or toy_plan(backend=backend),
        segments=toy_programs(),
        files=seal(folder, {**roles, EXPECTED: "expected.safetensors", SEEN: "seen.txt"}),
        tolerance=tolerance,
        settings=settings,
        layer_precisions={layer.name: Precision.FP32 for layer in _layers()},
    )
    return write_manifest(folder, manifest)


def write_images(folder: Path, per_class: int, seed: int = 0) -> None:
    """Write an image folder: noisy 16 × 16 pictures, one folder per class."""
    from PIL import Image

    noise = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = noise.integers(0, 256, size=(16, 16, 3))
            pixels[:, :, 2 - number] = np.minimum(255, pixels[:, :, 2 - number] + 90)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")


def file_digest(path: Path) -> str:
    """Return the digest of an image as its folder tells it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def this_machine() -> DeviceProfile:
    """Return a profile of this machine that knows no kernel yet; calibration measures those of the model."""
    facts = machine()
    return DeviceProfile(
        name="here",
        title="This machine",
        origin="measured",
        cpu_model=facts.cpu_model,
        isa=facts.isa,
        call_s=Figure(value=5e-6, origin="measured", source="a test"),
    )
