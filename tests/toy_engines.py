"""A bundle for TensorRT whose graphs only the fake TensorRT reads; its engines compute what the toy's modules do."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import torch

from edgeflex.bundle import EXPECTED, SEEN, Bundle, seal, write_manifest
from edgeflex.schema import (
    Budget,
    BundleManifest,
    Footprint,
    MemoryBreakdown,
    Plan,
    Precision,
    Proof,
    Scenario,
    Tier,
)
from edgeflex.schema_trt import RECIPE, BuildOptions, BuildRecipe, Profile, SegmentRecipe, ShapeRange, TensorSpec
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import FakeTensorrt, write_graph
from tests.toy_bundle import CLASSES, SHAPES, toy_graph, toy_graphs, toy_programs, toy_segments

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import pytest

NEWEST = "11.4"


def toy_functions(*, confidence: bool = False) -> dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """Return what the engines compute, by graph."""

    def function(module: torch.nn.Module) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        def run(x: np.ndarray) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                outputs = module(torch.from_numpy(x))
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            names = ("activations", "probabilities")[-len(tensors) :]
            found = {name: one.numpy() for name, one in zip(names, tensors, strict=True)}
            return found | ({"confidence": found["probabilities"].max(keepdims=True)[0]} if confidence else {})

        return run

    return {f"segment{k}": function(module) for k, module in enumerate(toy_segments())}


def write_engine_bundle(
    folder: Path,
    *,
    confidence: bool = False,
    backend: str = "tensorrt",
    tensors: dict[int, dict[str, tuple[int, ...]]] | None = None,
    profiles: bool = False,
    device_bytes: int | None = None,
    **recipe: Any,
) -> Bundle:
    """Write a bundle of three segments; ``tensors`` replaces those of a graph, ``recipe`` fields of the recipe."""
    folder.mkdir(parents=True)
    segments = []
    for k, shape in enumerate(SHAPES):
        held: dict[str, tuple[int, ...]] = {"x": shape, "probabilities": (1, len(CLASSES))}
        held |= {"activations": SHAPES[k + 1]} if k < 2 else {}
        held |= {"confidence": (1,)} if confidence else {}
        digest = write_graph(folder / f"segment{k}.onnx", (tensors or {}).get(k, held))
        segments.append(_segment(k, digest, profiles=profiles))
    fields: dict[str, Any] = {"least_version": (10, 3), "versions": ((10, 3), (11, 4)), "cuda_graph": True}
    document = BuildRecipe(segments=tuple(segments), **(fields | recipe))
    (folder / "build.json").write_text(json.dumps(document.model_dump(mode="json")), encoding="utf-8")
    return _sealed(folder, [f"segment{k}.onnx" for k in range(3)], backend, device_bytes)


def write_exported_bundle(folder: Path) -> Bundle:
    """Write a bundle of the toy's real ONNX graphs with the recipe that the exporter writes for them."""
    from edgeflex.exporters.tensorrt import EngineSource, write_recipe

    folder.mkdir(parents=True)
    files = toy_graphs()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sources = [EngineSource(f"segment{k}", f"segment{k}.onnx", f"segment{k}.data") for k in range(3)]
    write_recipe(folder, sources)
    return _sealed(folder, [*files, "build.sh"], "tensorrt", None)


def _sealed(folder: Path, files: list[str], backend: str, device_bytes: int | None) -> Bundle:
    (folder / "expected.safetensors").write_bytes(b"")
    (folder / "seen.txt").write_text("", encoding="ascii")
    roles = {f"program:{name.removesuffix('.onnx')}": name for name in files if name != "build.sh"}
    paths = {**roles, RECIPE: "build.json", EXPECTED: "expected.safetensors", SEEN: "seen.txt"}
    manifest = BundleManifest(
        backend=backend,
        versions={"edgeflex": "0"},
        graph=toy_graph(),
        plan=_plan(backend, device_bytes),
        segments=toy_programs(),
        files=seal(folder, paths),
        tolerance=1e-4,
        layer_precisions={layer.name: Precision.FP32 for layer in toy_graph().layers},
    )
    return write_manifest(folder, manifest)


def _plan(backend: str, device_bytes: int | None) -> Plan:
    return Plan(
        name="toy",
        backend=backend,
        budget=Budget(memory_bytes={} if device_bytes is None else {Tier.DEVICE: device_bytes}),
        scenario=Scenario(name="toy", reach=(1.0, 0.6, 0.3), loss=0.0),
        thresholds=(0.9, 0.9, None),
        choices=(),
        exit_shares=(0.4, 0.3, 0.3),
        predicted=Footprint(
            loss=0.0, latency_s={"mean": 1e-3}, block_latency_s=(1e-5, 2e-5, 3e-5), memory_bytes={}, disk_bytes=1000
        ),
        latency_interval_s={},
        memory=MemoryBreakdown(weights_bytes=1, activation_bytes=1, overhead_bytes=1),
        proof=Proof(
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
    )


def _segment(k: int, digest: str, *, profiles: bool) -> SegmentRecipe:
    shape: tuple[int | str, ...] = ("B", *SHAPES[k][1:]) if profiles else SHAPES[k]
    most = (4, *SHAPES[k][1:])
    bounds = {"x": ShapeRange(least=SHAPES[k], best=SHAPES[k], most=most)}
    return SegmentRecipe(
        name=f"segment{k}",
        onnx=f"segment{k}.onnx",
        onnx_sha256=digest,
        engine=f"engines/segment{k}.engine",
        inputs=(TensorSpec(name="x", dtype="float32", shape=shape),),
        outputs=(TensorSpec(name="probabilities", dtype="float32", shape=(1, len(CLASSES))),),
        profiles=(Profile(name="batch", shapes=bounds),) if profiles else (),
    )


def streaming() -> BuildOptions:
    """Return options with weight streaming."""
    return BuildOptions(weight_streaming=True)


def install(
    monkeypatch: pytest.MonkeyPatch, version: str = NEWEST, *, cuda: FakeCuda | None = None, **fields: Any
) -> FakeTensorrt:
    """Make ``import tensorrt`` give a fake of ``version`` and return it; its ``cuda`` is the driver to hand in."""
    trt = FakeTensorrt(version, cuda or FakeCuda(), **({"functions": toy_functions()} | fields))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt
