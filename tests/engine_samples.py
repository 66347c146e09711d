"""Every decoder engine over bundles of one small decoder: what the contract suite and the engines' own tests run.

Bundles are exported when first asked for and kept for the whole run; a test that damages one takes a copy. TensorRT is
the fake, CUDA the processor in a GPU's place.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.exporters.decoder import export_decoder
from edgeflex.exporters.decoder_files import BundleWeights
from edgeflex.exporters.onnx_decoder import export_onnx_decoder
from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder
from edgeflex.models.decoder_reference import Reference
from edgeflex.progress import Silent
from edgeflex.runtimes import cuda_driver
from edgeflex.runtimes.cuda_decoder import DeviceEngine
from edgeflex.runtimes.cuda_host import TorchExperts
from edgeflex.runtimes.cuda_memory import device_bytes
from edgeflex.runtimes.cuda_streams import HostStreams
from edgeflex.runtimes.cuda_weights import open_experts
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.engines import open_engine
from edgeflex.runtimes.movers import Mover
from edgeflex.runtimes.tensorrt_build import build
from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer, Routing
from tests.fake_cuda import Device, FakeCuda
from tests.random_decoder import RandomSource, exact_plan, mixed_plan
from tests.tiny_decoder import EXPERTS, LAYERS, tiny_graph
from tests.toy_engines import NEWEST, install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import pytest

    from edgeflex.runtimes.engines import DecoderEngine
    from edgeflex.runtimes.packed import PackedStore
    from edgeflex.schema_moe import DecoderPlan

    Key = tuple[int, int]

PROMPT = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30]  # a chunk of 8 and one of 3
NEW = 24
ALL = 1 << 30
ORDER = [(layer, expert) for expert in range(EXPERTS) for layer in range(1, LAYERS)]
# Copies as dear as a product on the processor: schedules then mix both.
EVEN = Curves(gpu=Curve(((1, 1e-6),)), cpu=Curve(((1, 1e-3),)), link_bytes_per_s=12e6, link_latency_s=1e-4)
# What the fake driver shows: one memory for processor and GPU, or two.
BOARDS = {"Jetson": Device(), "desktop": Device("RTX", (8, 9), 12 << 30, integrated=False)}
EXPORTS: dict[str, Callable[..., Any]] = {
    "executorch": partial(export_decoder, stock=False),
    "onnx": export_onnx_decoder,
    "tensorrt": partial(export_tensorrt_decoder, half=False),
}


@dataclass(frozen=True)
class EngineKind:
    """One way to run a decoder.

    Attributes:
        name: Of the kind.
        backend: Of its bundles.
        board: The fake driver's device; empty without TensorRT.
        device: As ``Settings`` have it.
        rounds: Its kernels round activations beside rounded weights: only in fp32 its numbers are the reference's.
    """

    name: str
    backend: str
    board: str = ""
    device: str | None = None
    rounds: bool = False


NATIVE = EngineKind("native", "executorch", rounds=True)
ONNX = EngineKind("onnx", "onnx")
JETSON = EngineKind("tensorrt on a Jetson", "tensorrt", board="Jetson")
DESKTOP = EngineKind("tensorrt on a desktop", "tensorrt", board="desktop")
CUDA = EngineKind("cuda", "onnx", device="cpu-torch")
KINDS = (NATIVE, ONNX, JETSON, DESKTOP, CUDA)


def tied_latent_graph() -> DecoderGraph:
    """Return a decoder with DeepSeek-V2's attention, ungated shared experts, scaled routing, a tied head."""
    attention = Attention(
        kind="latent",
        heads=4,
        kv_heads=4,
        head_dim=24,
        value_dim=16,
        rotary_dim=8,
        latent_dim=32,
        inverse_frequencies=tuple(10000.0 ** (-i / 4) for i in range(4)),
        rotary_scale=1.1,
        softmax_scale=0.2,
    )
    routing = Routing(experts=EXPERTS, top_k=3, normalised=False, scale=1.5)
    layers = [DecoderLayer(index=index, routing=routing, expert_dim=64, shared_dim=32) for index in range(2)]
    changes = {"attention": attention, "layers": tuple(layers), "tied_embedding": True}
    return tiny_graph().model_copy(update=changes)


# --- bundles ---------------------------------------------------------------------------------------------


class Bundles:
    """Bundles of random decoders and what the reference says with their numbers, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Any, Any] = {}
        self.source: Any = RandomSource(tiny_graph(), folder / "model")
        self.latent_source: Any = RandomSource(tied_latent_graph(), folder / "latent-model")

    def exact(self, kind: EngineKind) -> Path:
        """Return the decoder with everything in fp32."""
        return self._bundle(kind, "exact", self.source, exact_plan(self.source.graph))

    def mixed(self, kind: EngineKind) -> Path:
        """Return the decoder with experts of two precisions, and so of two sizes."""
        return self._bundle(kind, "mixed", self.source, mixed_plan(self.source.graph))

    def judged(self, kind: EngineKind) -> Path:
        """Return the bundle in which the kind says what the reference says: with rounded weights, where it can."""
        return self.exact(kind) if kind.rounds else self.mixed(kind)

    def latent(self, kind: EngineKind) -> Path:
        """Return the same of the other decoder, with a small cache."""
        graph = self.latent_source.graph
        plan = exact_plan(graph) if kind.rounds else mixed_plan(graph, cache_bytes=48 << 10)
        return self._bundle(kind, "latent", self.latent_source, plan)

    def _bundle(self, kind: EngineKind, name: str, source: Any, plan: DecoderPlan) -> Path:
        def export() -> Path:
            folder = self._folder / f"{name}-{kind.backend}"
            EXPORTS[kind.backend](source, plan, folder)
            return folder

        folder: Path = self.once((name, kind.backend), export)
        if not kind.board:
            return folder
        # engines are a device's own: each board keeps its own copy, so that they are built once
        copied: Path = self.once(
            (name, kind.board), lambda: shutil.copytree(folder, self._folder / f"{name}-{kind.board}")
        )
        return copied

    def reference(self, kind: EngineKind) -> Reference:
        """Return the reference with the numbers of ``judged``."""
        return self.exact_reference() if kind.rounds else self.rounded()

    def exact_reference(self) -> Reference:
        """Return the reference with the source's own numbers."""
        found: Reference = self.once("exact", lambda: Reference(self.source, keep_bytes=ALL))
        return found

    def rounded(self) -> Reference:
        """Return the reference with the rounded numbers, as the bundle for ONNX Runtime has them."""
        found: Reference = self.once("rounded", lambda: _rounded(self.source, self.mixed(ONNX)))
        return found

    def said(self, kind: EngineKind, prompt: Sequence[int] = PROMPT, count: int = NEW) -> list[int]:
        """Return what the reference of ``judged`` answers."""
        key = ("said", kind.rounds, tuple(prompt), count)
        found: list[int] = self.once(key, lambda: list(self.reference(kind).generate(prompt, count)))
        return found

    def exactly_said(self) -> list[int]:
        """Return what the reference answers in fp32."""
        return self.said(NATIVE)

    def latently_said(self, kind: EngineKind) -> list[int]:
        """Return what the reference of ``latent`` answers."""

        def say() -> list[int]:
            exact = Reference(self.latent_source)
            reference = exact if kind.rounds else _rounded(self.latent_source, self.latent(ONNX))
            return list(reference.generate(PROMPT, NEW))

        found: list[int] = self.once(("latently", kind.rounds), say)
        return found

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave when it was first asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _rounded(source: Any, folder: Path) -> Reference:
    return Reference(source, BundleWeights(folder, open_decoder_bundle(folder).manifest.matrices, source))


def expert_sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of the largest expert and of all, as their files have them, in whole blocks."""
    store, _ = open_experts(folder, open_decoder_bundle(folder).manifest)
    return int(store.sizes.max()), int(store.sizes.sum())


def fixed_bytes(folder: Path, dtype: torch.dtype = torch.float32) -> int:
    """Return what a decoder takes of a device beside experts."""
    manifest = open_decoder_bundle(folder).manifest
    _, kinds = open_experts(folder, manifest)
    plan = manifest.plan
    sizes = {"context_tokens": plan.context_tokens, "chunk_tokens": plan.prefill_chunk_tokens}
    return device_bytes(manifest, kinds, dtype, library_bytes=0, **sizes).total


# --- engines ---------------------------------------------------------------------------------------------


def build_on(patch: pytest.MonkeyPatch, folder: Path, board: str, version: str = NEWEST) -> None:
    """Build a bundle's engines for a board, as far as they are not there."""
    trt = install(patch, version, cuda=FakeCuda(devices=(BOARDS[board],)))
    build(open_decoder_bundle(folder), library=trt.cuda)
    assert trt.cuda.alive == []


def give_board(
    patch: pytest.MonkeyPatch, folder: Path, board: str, *, version: str = NEWEST, fail: Any = (), faults: Any = None
) -> Any:
    """Build a bundle's engines, give this process a device that has them, and return the fake TensorRT."""
    build_on(patch, folder, board, version)
    cuda = FakeCuda(devices=(BOARDS[board],), fail=faults)
    trt = install(patch, version, cuda=cuda, fail=fail)
    patch.setattr(cuda_driver, "_load", lambda: cuda)
    return trt


class Loaded:
    """An engine with its weights and an arena that holds all experts, whose bytes lie there."""

    def __init__(self, engine: DecoderEngine, store: PackedStore) -> None:
        self.engine: Any = engine
        self.store = store
        self.keys = tuple(store.experts)
        self.arena = engine.arena(int(store.sizes.sum()))
        self.offsets: dict[Key, int] = {}
        end = 0
        for key in self.keys:
            self.offsets[key] = end
            end += int(store.sizes[key])
            self.fill(key)

    def place(self, key: Key) -> tuple[Any, int]:
        """Return an expert's precision and offset, as ``bind`` takes them."""
        return self.store.experts[key].precision, self.offsets[key]

    def fill(self, key: Key) -> None:
        """Put an expert's own bytes into its place."""
        record = self.store.experts[key].record
        found = np.fromfile(record.file, np.uint8, record.size_bytes, offset=record.offset)
        self.arena[self.offsets[key] : self.offsets[key] + found.size] = found

    def spoil(self, key: Key) -> None:
        """Put bytes into its place whose scales are no numbers."""
        self.arena[self.offsets[key] : self.offsets[key] + int(self.store.sizes[key])] = 0xFF

    def bring(self, key: Key) -> None:
        """Let the engine find an expert."""
        self.engine.bind(*key, *self.place(key))

    def drop(self, key: Key) -> None:
        """Let it find the expert no longer."""
        self.engine.unbind(*key)

    def bring_all(self) -> None:
        """Let it find all experts."""
        for key in self.keys:
            self.bring(key)

    def drop_all(self) -> None:
        """Let it find none."""
        for key in self.keys:
            self.drop(key)

    def run(self, tokens: Sequence[int], position: int = 0, *, every: bool = True) -> np.ndarray:
        """Run tokens, bringing what is missing, and return their logits."""
        missing = self.engine.forward(np.asarray(tokens, np.int32), position, every_logit=every)
        while missing is not None:
            for expert in missing.missing:
                self.bring((missing.layer, expert))
            missing = self.engine.resume()
        found: np.ndarray = self.engine.logits()
        return found

    def chunked(self, tokens: Sequence[int], chunk: int) -> np.ndarray:
        """Return the logits of tokens that are run in chunks."""
        starts = range(0, len(tokens), chunk)
        return np.concatenate([self.run(tokens[start : start + chunk], start) for start in starts])


class LoadedDevice(Loaded):
    """The same on a device: an expert is found once it was copied there."""

    def __init__(self, engine: DeviceEngine, store: PackedStore) -> None:
        super().__init__(engine, store)
        engine.memory.device_arena(self.arena.size)
        self.bind_all()

    def bind_all(self) -> None:
        """Let copies find all experts in the host's arena."""
        for key in self.keys:
            self.engine.bind(*key, *self.place(key))

    def bring(self, key: Key) -> None:
        """Copy an expert to the device."""
        self.engine.memory.upload(*key, self.offsets[key], self.engine.streams.fence())

    def drop(self, key: Key) -> None:
        """Give its place on the device up."""
        self.engine.memory.drop(*key)


class Lab:
    """Engines and sessions of one kind.

    Args:
        kind: The kind.
        bundles: Where bundles come from.
        patch: Gives the process a board.
    """

    def __init__(self, kind: EngineKind, bundles: Bundles, patch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        self.bundles = bundles
        self.boards: list[Any] = []
        self._patch = patch

    def exact(self) -> Path:
        """Return the bundle with everything in fp32, ready to run."""
        return self.ready(self.bundles.exact(self.kind))

    def mixed(self) -> Path:
        """Return the bundle with experts of two precisions."""
        return self.ready(self.bundles.mixed(self.kind))

    def judged(self) -> Path:
        """Return the bundle that gives the reference's tokens."""
        return self.ready(self.bundles.judged(self.kind))

    def latent(self) -> Path:
        """Return the same of the other decoder."""
        return self.ready(self.bundles.latent(self.kind))

    def own(self, folder: Path) -> Path:
        """Return a copy of the judged bundle that a test may damage."""
        return self.ready(shutil.copytree(self.bundles.judged(self.kind), folder))

    @property
    def expected(self) -> list[int]:
        """What the reference of ``judged`` answers to the prompt."""
        return self.bundles.said(self.kind)

    def ready(self, folder: Path) -> Path:
        """Give the process what runs this bundle."""
        if self.kind.board:
            self.boards.append(give_board(self._patch, folder, self.kind.board))
        return folder

    def settings(self, folder: Path, experts_bytes: int | None = None, **more: Any) -> Settings:
        """Return settings with room for so many bytes of experts where they are computed; None takes the plan's."""
        if self.kind.device is None:
            return Settings(experts_bytes, **more)
        known: dict[str, Any] = {"device_parts": {"curves": EVEN}, "cache_bytes": ALL, "device": self.kind.device}
        if experts_bytes is not None:
            known["vram_bytes"] = fixed_bytes(folder) + experts_bytes
        return Settings(**{**known, **more})

    def session(self, folder: Path, experts_bytes: int | None = None, *, mover: Any = Mover, **more: Any) -> Any:
        """Return a session over a bundle."""
        settings = self.settings(folder, experts_bytes, **more)
        return DecoderSession(folder, open_decoder_bundle(folder).manifest, settings, mover=mover)

    def sizes(self, folder: Path) -> tuple[int, int]:
        """Return the bytes of the largest expert and of all, as the kind holds them."""
        if self.kind is not NATIVE:
            return expert_sizes(folder)

        def packed() -> tuple[int, int]:
            with DecoderSession.from_bundle(folder) as session:
                return int(session.store.sizes.max()), int(session.store.sizes.sum())

        found: tuple[int, int] = self.bundles.once(("sizes", folder), packed)
        return found

    @contextmanager
    def loaded(self, folder: Path, *, context_tokens: int = 32, chunk_tokens: int = 8) -> Iterator[Loaded]:
        """Give an engine without a session; no expert is where it would find it."""
        manifest = open_decoder_bundle(folder).manifest
        sizes: Any = {"context_tokens": context_tokens, "chunk_tokens": chunk_tokens}
        if self.kind.device is not None:
            store, kinds = open_experts(folder, manifest)
            made = DeviceEngine(folder, manifest, kinds, HostStreams(), TorchExperts(), dtype=torch.float32, **sizes)
            made.load()
            try:
                yield LoadedDevice(made, store)
            finally:
                made.close()
            return
        opened = open_engine(folder, manifest, threads=1, progress=Silent(), **sizes)
        kept = opened.load()
        try:
            yield Loaded(opened.engine, opened.store)
        finally:
            opened.engine.close()
            del kept


# --- what tests ask of them ------------------------------------------------------------------------------


def noting(rows: list[Any], forced: list[int] | None = None) -> Any:
    """Return a sampler that notes the logits and says ``forced``, or what is greedy."""

    def choose(row: Any) -> int:
        rows.append(row)
        return int(row.argmax()) if forced is None else forced[len(rows) % len(forced)]

    return choose


def forced_logits(session: DecoderSession, tokens: list[int]) -> np.ndarray:
    """Return the logits after each of ``tokens``, one pass a token."""
    rows: list[Any] = []
    with session:
        list(session.generate(tokens[:1], len(tokens), noting(rows, tokens)))
    return np.stack(rows)
