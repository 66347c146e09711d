"""A decoder's TensorRT bundle on a pretended device: the reference's tokens, whatever is resident, and no fault unseen.

The engines of the fake run the very graphs that the exporter wrote; addresses, shapes, scratch and the order of work
are checked by the fakes. ``tests/gpu`` has the real thing.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.cli import main
from edgeflex.errors import BundleError, DeviceError, EdgeflexError, InputError, MissingDependencyError
from edgeflex.exporters.decoder_files import BundleWeights
from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder
from edgeflex.models.decoder_reference import Reference
from edgeflex.progress import Silent
from edgeflex.runtimes import cuda_driver
from edgeflex.runtimes.decoder import DecoderSession, Settings
from edgeflex.runtimes.decoder_bench import bench_decoder, verify_decoder
from edgeflex.runtimes.decoder_measure import Task
from edgeflex.runtimes.decoder_measure import _do as measure
from edgeflex.runtimes.decoder_process import _ready as idle_bytes
from edgeflex.runtimes.engines import open_engine
from edgeflex.runtimes.native import Missing
from edgeflex.runtimes.replay import replay
from edgeflex.runtimes.tensorrt_build import build
from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer, Expected, Routing
from tests.fake_cuda import Device, FakeCuda
from tests.fake_tensorrt import VERSIONS, names_of
from tests.random_decoder import RandomSource, exact_plan, mixed_plan
from tests.tiny_decoder import CONTEXT, EXPERTS, LAYERS, TOP_K, VOCABULARY, tiny_graph
from tests.toy_engines import NEWEST, install

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30]  # a chunk of 8 and one of 3
NEW = 20
ALL = 1 << 30
HALF_LOGITS = 1e-2  # of the largest: activations in fp16
DISCRETE = Device("RTX", (8, 9), 12 << 30, integrated=False)
KINDS = {"Jetson": Device(), "desktop": DISCRETE}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Any:
    return RandomSource(tiny_graph(), tmp_path_factory.mktemp("model"))


def made(source: Any, plan: Any, folder: Path, *, half: bool = False) -> Path:
    """Export, and build the engines that both kinds of devices then take from here."""
    export_tensorrt_decoder(source, plan, folder, half=half)
    return folder


def build_on(patch: pytest.MonkeyPatch, folder: Path, device: Device, version: str = NEWEST) -> None:
    trt = install(patch, version, cuda=FakeCuda(devices=(device,)))
    build(open_decoder_bundle(folder), library=trt.cuda)
    assert trt.cuda.alive == []


@pytest.fixture(scope="module")
def exact(source, tmp_path_factory) -> Path:
    """The bundle with everything in fp32."""
    return made(source, exact_plan(source.graph), tmp_path_factory.mktemp("exact") / "bundle")


@pytest.fixture(scope="module")
def mixed(source, tmp_path_factory) -> Path:
    """The bundle with experts of two precisions, multiplied in fp32."""
    return made(source, mixed_plan(source.graph), tmp_path_factory.mktemp("mixed") / "bundle")


@pytest.fixture(scope="module")
def rounded(source, mixed) -> Reference:
    """The reference with the mixed bundle's own numbers."""
    return Reference(source, BundleWeights(mixed, open_decoder_bundle(mixed).manifest.matrices, source))


@pytest.fixture(scope="module")
def expected(rounded) -> list[int]:
    return list(rounded.generate(PROMPT, NEW))


@pytest.fixture
def board(monkeypatch):
    """Return a function that builds a bundle's engines and gives this process a device that has them."""

    def give(folder: Path, kind: str = "Jetson", *, version: str = NEWEST, fail=(), faults=None) -> Any:
        build_on(monkeypatch, folder, KINDS[kind], version)
        cuda = FakeCuda(devices=(KINDS[kind],), fail=faults)
        trt = install(monkeypatch, version, cuda=cuda, fail=fail)
        monkeypatch.setattr(cuda_driver, "_load", lambda: cuda)
        return trt

    return give


@pytest.fixture
def own(mixed, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    folder: Path = tmp_path / "own"
    shutil.copytree(mixed, folder)
    return folder


def sizes_of(folder: Path) -> tuple[int, int]:
    """Return the bytes of the largest expert and of all."""
    files = [one for one in open_decoder_bundle(folder).manifest.files if one.path.startswith("experts/")]
    return max(one.size_bytes for one in files), sum(one.size_bytes for one in files)


def noting(rows: list[Any], forced: list[int] | None = None) -> Any:
    """Return a sampler that notes the logits and says ``forced``, or what is greedy."""

    def choose(row: Any) -> int:
        rows.append(row)
        return int(row.argmax()) if forced is None else forced[len(rows) % len(forced)]

    return choose


def tied_latent_graph() -> DecoderGraph:
    """DeepSeek-V2's attention, ungated shared experts, scaled routing, a tied head."""
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


# --- the reference's numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_says_what_the_reference_says(board, source, exact, kind):
    trt = board(exact, kind)
    said = list(Reference(source).generate(PROMPT, NEW))
    assert len(set(said)) > NEW // 3
    with DecoderSession.from_bundle(exact) as session:
        assert list(session.generate(PROMPT, NEW)) == said
    assert trt.cuda.alive == []


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights_say_what_the_reference_says_with_them(board, mixed, expected, kind):
    board(mixed, kind)
    with DecoderSession.from_bundle(mixed) as session:
        assert list(session.generate(PROMPT, NEW)) == expected


@pytest.mark.parametrize("half", [False, True])
def test_logits_are_the_references_to_rounding(board, source, rounded, mixed, tmp_path, half):
    folder = made(source, mixed_plan(source.graph), tmp_path / "half", half=True) if half else mixed
    board(folder)
    tokens = [*PROMPT, *range(20)]
    wanted = rounded.logits(torch.tensor([tokens]))[0].numpy()
    rows: list[Any] = []
    with DecoderSession.from_bundle(folder) as session:
        list(session.generate(tokens[:1], len(tokens), noting(rows, tokens)))
    apart = np.abs(np.stack(rows) - wanted).max() / np.abs(wanted).max()
    assert apart < (HALF_LOGITS if half else 2e-5)
    assert bool(apart > 1e-4) is half


def test_latent_attention_and_a_tied_head_say_what_the_reference_says(board, tmp_path):
    graph = tied_latent_graph()
    source: Any = RandomSource(graph, tmp_path / "model")
    folder = made(source, mixed_plan(graph, cache_bytes=48 << 10), tmp_path / "bundle")
    board(folder)
    manifest = open_decoder_bundle(folder).manifest
    said = Reference(source, BundleWeights(folder, manifest.matrices, source)).generate(PROMPT, NEW)
    for by in ("statistics", "router"):
        settings = Settings(prefetch_depth=1, prefetch_by=by)
        with DecoderSession.from_bundle(folder, settings) as session:
            assert list(session.generate(PROMPT, NEW)) == list(said)


@pytest.mark.parametrize("version", VERSIONS)
def test_only_names_that_every_version_has_are_used(board, mixed, expected, version):
    trt = board(mixed, version=version)
    with DecoderSession.from_bundle(mixed, Settings(48 << 10)) as session:
        assert list(session.generate(PROMPT, 3)) == expected[:3]
    for kind, name in trt.touched:
        assert all(name in names_of(kind, one) for one in VERSIONS), f"{kind}.{name}"


# --- exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["enu", "lru"])
def test_tokens_are_the_same_at_every_cache_size(board, mixed, expected, policy, kind):
    trt = board(mixed, kind)
    one, total = sizes_of(mixed)
    for cache_bytes in (one, TOP_K * one, 3 * one + 4096, total // 2, total - 4096, ALL):
        with DecoderSession.from_bundle(mixed, Settings(cache_bytes, policy)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
            cache = session.stats().cache
            assert cache.peak_bytes <= cache.capacity_bytes <= max(cache_bytes, one)
    assert trt.cuda.alive == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_of_any_logit_depends_on_what_is_resident(board, mixed, kind):
    board(mixed, kind)

    def rows(settings: Settings) -> list[Any]:
        found: list[Any] = []
        with DecoderSession.from_bundle(mixed, settings) as session:
            for _ in range(2):
                list(session.generate(PROMPT, NEW, noting(found)))
        return found

    wanted = rows(Settings(ALL))
    one, _ = sizes_of(mixed)
    for cache_bytes in (one, 3 * one):
        assert np.array_equal(rows(Settings(cache_bytes, "lru", prefetch_depth=1)), wanted)
    assert np.array_equal(wanted[:NEW], wanted[NEW:])  # nor on what the session did before


@pytest.mark.parametrize("by", ["statistics", "router"])
def test_prefetching_reads_early_and_changes_nothing(board, mixed, expected, by):
    board(mixed, "desktop")
    settings = Settings(cache_bytes=96 << 10, prefetch_depth=1, prefetch_worth=0.0, prefetch_by=by)
    with DecoderSession.from_bundle(mixed, settings) as session:
        assert list(session.generate(PROMPT, 40))[:NEW] == expected
        cache = session.stats().cache
    assert 0 < cache.prefetch_useful_bytes <= cache.prefetch_fetched_bytes < cache.read_bytes


def test_tokens_are_the_same_however_the_prompt_is_cut(board, mixed, expected):
    board(mixed)
    for chunk in (1, 3, 8):
        with DecoderSession.from_bundle(mixed, Settings(chunk_tokens=chunk)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected


def test_a_long_prompt_and_what_is_continued_are_as_one_prompt(board, mixed, rounded):
    board(mixed)
    long = [one % VOCABULARY for one in range(3, 3 + 5 * 45, 5)]  # beyond several powers of two
    said = list(rounded.generate(long, 5))
    with DecoderSession.from_bundle(mixed, Settings(48 << 10)) as session:
        assert list(session.generate(long, 5)) == said
        list(session.generate(long[:20], 1))
        first = list(session.generate(long[:20], 3))
        more = list(session.generate([5, 6], 6, continued=True))
        assert list(session.generate([*long[:20], *first, 5, 6], 6)) == more


def test_it_ends_at_the_end_of_the_context(board, mixed, expected):
    board(mixed)
    with DecoderSession.from_bundle(mixed) as session:
        said = list(session.generate(PROMPT, 10_000))
        assert session.stats().stopped_by == "context"
        assert len(PROMPT) + len(said) == CONTEXT + 1
        assert list(session.generate(PROMPT, NEW)) == expected


def test_the_simulator_counts_what_the_engine_did(board, mixed):
    board(mixed)
    one, _ = sizes_of(mixed)
    with DecoderSession.from_bundle(mixed, Settings(4 * one, "lru", record=True)) as session:
        list(session.generate(PROMPT, NEW))
        counted = session.stats().cache
        trace, sizes = session.trace(), session.store.sizes
    told = replay(trace, counted.capacity_bytes, "lru", sizes=sizes)
    assert (told.hits, told.misses) == (counted.decode_hits, counted.decode_misses)
    assert told.prefill_bytes + told.read_bytes == counted.read_bytes


def test_times_are_the_devices_own_and_add_up(board, mixed):
    board(mixed)
    with DecoderSession.from_bundle(mixed, Settings(48 << 10)) as session:
        list(session.generate(PROMPT, NEW))
        stats = session.stats()
    assert len(stats.times) == NEW - 1
    for one in stats.times:
        assert min(one.dense_s, one.expert_s) > 0.0
        assert one.dense_s + one.expert_s + one.wait_s <= one.total_s * 1.001


def test_another_thread_may_answer(board, mixed, expected):
    board(mixed)
    said: list[list[int]] = []
    with DecoderSession.from_bundle(mixed, Settings(48 << 10)) as session:
        thread = threading.Thread(target=lambda: said.append(list(session.generate(PROMPT, NEW))))
        thread.start()
        thread.join()
    assert said == [expected]


def test_the_same_bundle_runs_in_three_tiers(mixed, expected):
    with DecoderSession.from_bundle(mixed, Settings(96 << 10, device="cpu-torch")) as session:
        assert list(session.generate(PROMPT, NEW)) == expected


# --- the engine ----------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def engine(request, board, mixed):
    """A loaded engine with an arena that holds everything, and where each expert's bytes then lie."""
    trt = board(mixed, request.param)
    manifest = open_decoder_bundle(mixed).manifest
    opened = open_engine(mixed, manifest, context_tokens=32, chunk_tokens=8, threads=1, progress=Silent())
    kept = opened.load()
    arena = opened.engine.arena(int(opened.store.sizes.sum()))
    places, end = {}, 0
    for key, expert in opened.store.experts.items():
        size = expert.record.size_bytes
        arena[end : end + size] = np.fromfile(expert.record.file, np.uint8)
        places[key] = (expert.precision, end)
        end += size
    yield opened.engine, places, arena, trt
    opened.engine.close()
    assert trt.cuda.alive == []
    del kept


def test_a_pass_stops_at_what_is_missing_and_goes_on_when_it_is_there(engine):
    known, places, _, _ = engine
    for key, place in places.items():
        known.bind(*key, *place)
    assert known.forward(np.array(PROMPT[:5], np.int32), 0, every_logit=True) is None
    wanted = known.logits()
    events = known.take_events()
    assert wanted.shape == (5, VOCABULARY)
    assert [one.layer for one in events] == [1, 2, 3]
    for event in events:
        assert event.experts.shape == event.weights.shape == (5, TOP_K)
        assert event.experts.dtype == np.int32
        assert (np.diff(event.weights, axis=1) <= 0).all()
    for key in places:
        known.unbind(*key)
    waiting = known.forward(np.array(PROMPT[:5], np.int32), 0, every_logit=True)
    assert known.resume() == waiting
    stops = 0
    while waiting is not None:
        assert isinstance(waiting, Missing)
        assert waiting.experts == waiting.missing
        assert known.guess(waiting.layer) == waiting.experts  # its own rows are what its router saw
        for expert in reversed(waiting.experts):
            known.bind(waiting.layer, expert, *places[waiting.layer, expert])
            known.compute([expert])
            known.unbind(waiting.layer, expert)
        waiting = known.resume()
        stops += 1
    assert stops == 3
    assert np.array_equal(known.logits(), wanted)
    assert [one.layer for one in known.take_events()] == [1, 2, 3]


def test_a_slot_may_be_written_again_as_soon_as_its_expert_is_unbound(engine):
    known, places, arena, _ = engine
    for key, place in places.items():
        known.bind(*key, *place)
    known.forward(np.array(PROMPT[:5], np.int32), 0)
    wanted = known.logits()
    for key in places:
        known.unbind(*key)
    held = arena.copy()
    waiting = known.forward(np.array(PROMPT[:5], np.int32), 0)
    while waiting is not None:
        for expert in waiting.experts:
            precision, offset = places[waiting.layer, expert]
            known.bind(waiting.layer, expert, precision, offset)
            known.compute([expert])
            known.unbind(waiting.layer, expert)
            arena[offset : offset + 4096] = 0xFF  # what a reader would do now
        waiting = known.resume()
        arena[:] = held
    assert np.array_equal(known.logits(), wanted)


def test_a_jetson_computes_from_the_readers_own_bytes_and_a_desktop_from_its_copy(engine):
    known, places, arena, trt = engine
    for key, place in places.items():
        known.bind(*key, *place)
    known.forward(np.array([1, 2], np.int32), 0)
    before = known.logits()
    arena[:] = 0
    known.forward(np.array([1, 2], np.int32), 0)
    shared = trt.cuda.devices[0].attributes["integrated"] == 1
    assert np.array_equal(known.logits(), before) is not shared
    assert known.unseen_bytes == (sum(one.nbytes for one in trt.cuda.device_memory.values()) if shared else 0)
    assert known.memory_bytes > (0 if shared else arena.size)


def memory_of(trt: Any) -> int:
    cuda = trt.cuda
    return len(cuda.device_memory) + len(cuda.host_memory) + len(cuda.registered) + len(cuda.shared)


def test_dense_weights_lie_on_the_device_once(engine, mixed):
    known, _, _, _ = engine
    dense = [one for one in open_decoder_bundle(mixed).manifest.matrices if ".experts." not in one.name]
    whole = sum(one.weights_bytes + one.scales_bytes for one in dense if one.name != "embedding")
    assert whole <= known._device.dense_bytes < whole + 2 * 256 * len(dense)  # and what alignment takes


def test_an_expert_enters_its_engine_by_the_address_of_its_slot(engine):
    known, places, arena, trt = engine
    for key, place in places.items():
        known.bind(*key, *place)
    known.forward(np.array([1], np.int32), 0)
    shared = trt.cuda.devices[0].attributes["integrated"] == 1
    regions = {start: size for start, (_, size) in trt.cuda.shared.items()}
    if not shared:
        regions = {start: memory.nbytes for start, memory in trt.cuda.device_memory.items()}
    start = next(address for address, size in regions.items() if size == arena.size)
    used = {(one.layer, expert) for one in known.take_events() for expert in one.experts.ravel().tolist()}
    given = [address for name, address in trt.named("IExecutionContext.set_tensor_address") if name == "gate_up"]
    assert {start + places[key][1] for key in used} <= set(given)


def test_a_token_brings_back_choices_and_logits_and_nothing_else(engine):
    known, places, _, trt = engine
    for key, place in places.items():
        known.bind(*key, *place)
    known.forward(np.array([1, 2, 3], np.int32), 0)
    known.logits()
    known.forward(np.array([4], np.int32), 3)
    known.logits()
    known.times()
    trt.cuda.calls.clear()
    trt.calls.clear()
    known.forward(np.array([5], np.int32), 4)
    known.logits()
    count = trt.cuda.calls.count
    routed = LAYERS - 1
    assert count("cuMemcpyHtoDAsync_v2") == 2  # the token's row and its position
    assert count("cuMemcpyDtoHAsync_v2") == 2 * routed + 1
    assert count("cuMemcpy2DAsync_v2") == 2 * LAYERS
    assert count("cuStreamSynchronize") == routed + 2
    assert count("cuMemAlloc_v2") == count("cuMemcpyDtoDAsync_v2") == 0
    runs = trt.named("IExecutionContext.execute_async_v3")
    assert len(runs) == LAYERS + routed * TOP_K + LAYERS + LAYERS + 1  # attention, experts, dense parts, sums, head
    given = [name for name, _ in trt.named("IExecutionContext.set_tensor_address")]
    assert not {"x", "y", "positions", "hidden", "residual"} & set(given)  # what stays in place is not named again


def test_calls_that_make_no_sense_are_refused(engine):
    known, places, arena, _ = engine
    for tokens, position, said in (
        ([], 0, "0 tokens"),
        ([1] * 9, 0, "9 tokens at once"),
        ([VOCABULARY], 0, f"there are {VOCABULARY}"),
        ([1], 1, "leaves a gap"),
    ):
        with pytest.raises(InputError, match=said):
            known.forward(np.array(tokens, np.int32), position)
    for call in (known.resume, known.logits, lambda: known.compute([0]), lambda: known.guess(1)):
        with pytest.raises(InputError, match=r"begun|waits"):
            call()
    precision, _ = places[1, 0]
    for arguments in (
        (9, 0, precision, 0),
        (1, EXPERTS, precision, 0),
        (1, 0, precision, 32),
        (1, 0, precision, arena.size),
    ):
        with pytest.raises(InputError):
            known.bind(*arguments)
    with pytest.raises(BundleError, match="multiples of 256"):
        known.bind(1, 0, precision, 64)
    waiting = known.forward(np.array([1], np.int32), 0)
    assert waiting is not None
    with pytest.raises(InputError, match="not in the event or not bound"):
        known.compute(waiting.experts)
    with pytest.raises(InputError, match="waits for experts"):
        known.logits()


def test_a_second_arena_gives_the_first_back(engine):
    known, places, arena, trt = engine
    held = memory_of(trt)
    for key, place in places.items():
        known.bind(*key, *place)
    smaller = known.arena(8192)
    assert smaller.size == 8192
    assert memory_of(trt) == held
    assert known.forward(np.array([1], np.int32), 0) is not None  # all were unbound
    del arena


def test_a_closed_engine_says_so_and_closes_twice(engine):
    known, _, _, trt = engine
    known.close()
    known.close()
    assert trt.cuda.alive == []
    assert known.memory_bytes == known.unseen_bytes == 0
    for call in (lambda: known.forward(np.array([1], np.int32), 0), lambda: known.arena(4096)):
        with pytest.raises(InputError, match="closed"):
            call()


def test_what_the_driver_takes_of_a_jetsons_memory_is_counted(board, mixed):
    board(mixed)
    with DecoderSession.from_bundle(mixed) as session:
        list(session.generate(PROMPT, 3))
        assert session.stats().peak_memory_bytes >= session.unseen_bytes > 100_000
    assert session.unseen_bytes == 0


# --- faults --------------------------------------------------------------------------------------------


def answer(folder: Path) -> list[int]:
    with DecoderSession.from_bundle(folder, Settings(48 << 10, prefetch_depth=1)) as session:
        return list(session.generate(PROMPT, 3))


RELEASING = ("Free", "Destroy", "Release", "Unregister", "GetErrorName")


@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_that_fails_anywhere_is_named_and_nothing_stays(board, mixed, kind):
    trt = board(mixed, kind)
    answer(mixed)
    calls = [name for name in dict.fromkeys(trt.cuda.calls) if not any(one in name for one in RELEASING)]
    counts = {name: trt.cuda.calls.count(name) for name in calls}
    assert {"cuMemcpy2DAsync_v2", "cuMemHostRegister_v2", "cuStreamSynchronize", "cuMemAlloc_v2"} <= set(counts)
    for name, count in counts.items():
        for which in sorted({1, (count + 1) // 2}):
            broken = board(mixed, kind, faults={name: (which, 700)})
            if name == "cuMemHostRegister_v2":  # then the driver makes the pages
                assert answer(mixed)
            else:
                with pytest.raises(DeviceError, match=rf"{name} failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
                    answer(mixed)
            assert broken.cuda.alive == [], (name, which)


FAILURES = {
    "driver": "does not start: CUDA initialization failure",
    "deserialize": "refuses the engine: The engine plan file is generated on an incompatible device",
    "context": "could not make an execution context: Requested size was 12 bytes: out of memory",
    "switch": "refuses profile 1",
    "address": "refuses a place for",
    "input shape": "refuses the shape",
    "enqueue": "could not run: enqueue: no kernel image",
}


@pytest.mark.parametrize("fail", FAILURES)
def test_every_failure_says_what_tensorrt_said_and_frees_everything(board, mixed, fail):
    trt = board(mixed, fail={fail})
    with pytest.raises(DeviceError, match=FAILURES[fail]):
        answer(mixed)
    assert trt.cuda.alive == []


def test_after_a_failure_the_same_session_answers_again(board, mixed, expected):
    trt = board(mixed)
    with DecoderSession.from_bundle(mixed, Settings(48 << 10)) as session:
        trt.fail.add("enqueue expert-64.int4-group32")
        with pytest.raises(DeviceError, match="could not run"):
            list(session.generate(PROMPT, NEW))
        trt.fail.clear()
        assert list(session.generate(PROMPT, NEW)) == expected


def test_engines_that_were_not_built_or_belong_elsewhere_are_asked_for(board, own, monkeypatch):
    trt = board(own)
    for device, said in (
        (Device("Orin Nano"), "GPU was Orin, is Orin Nano"),
        (Device(capability=(8, 9)), r"compute capability was 8\.7, is 8\.9"),
    ):
        monkeypatch.setattr(trt.cuda, "devices", (device,))
        with pytest.raises(DeviceError, match=rf"{said}.*edgeflex build"):
            answer(own)
    monkeypatch.setattr(trt.cuda, "devices", (Device(),))
    (own / "engines" / "index.json").unlink()
    with pytest.raises(DeviceError, match=f"no engines were built yet. Build them here: edgeflex build {own}"):
        answer(own)
    assert trt.cuda.alive == []


@pytest.mark.parametrize("name", ["attention-0", "expert-64.int4-group32", "head"])
def test_a_damaged_engine_is_never_handed_to_tensorrt(board, own, name):
    trt = board(own)
    (own / "engines" / f"{name}.engine").write_bytes(b"ENGINE of another")
    with pytest.raises(BundleError, match="differs from the SHA-256 that its index gives"):
        answer(own)
    assert trt.cuda.alive == []


@pytest.mark.parametrize("fault", ["another graph's", "an input on the host"])
def test_an_engine_that_is_not_what_its_recipe_says_is_refused(board, own, fault):
    trt = board(own, fail={"host positions"} if fault == "an input on the host" else ())
    index = json.loads((own / "engines" / "index.json").read_text())
    if fault == "another graph's":
        other = next(one for one in index["engines"] if one["segment"] == "dense-0")
        head = next(one for one in index["engines"] if one["segment"] == "head")
        shutil.copy(own / other["file"], own / head["file"])
        head["sha256"] = other["sha256"]
        (own / "engines" / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        BundleError, match=r"engine of (head|attention-0) and its recipe differ in .*edgeflex build .* --force"
    ):
        answer(own)
    assert trt.cuda.alive == []


@pytest.mark.parametrize("file", ["weights/layer-1.bin", "weights/head.bin", "weights/embedding.bin"])
@pytest.mark.parametrize("fault", ["flipped", "missing"])
def test_a_damaged_weight_file_is_found_before_anything_runs(board, own, file, fault):
    trt = board(own)
    session = DecoderSession.from_bundle(own)
    raw = bytearray((own / file).read_bytes())
    raw[len(raw) // 2] ^= 16
    (own / file).unlink()
    if fault == "flipped":
        (own / file).write_bytes(raw)
    with pytest.raises(BundleError, match=Path(file).name):
        session.__enter__()
    assert trt.cuda.alive == []


def test_a_damaged_expert_is_found_at_its_first_use(board, own):
    trt = board(own)
    for expert in range(EXPERTS):
        path = own / f"experts/layer-2/expert-{expert}.bin"
        raw = bytearray(path.read_bytes())
        raw[0] ^= 1
        path.write_bytes(raw)
    with pytest.raises(BundleError, match=r"layers\.2\.experts\.\d"):
        answer(own)
    assert trt.cuda.alive == []


def test_more_tokens_than_the_engines_were_built_for_are_refused(board, mixed):
    trt = board(mixed)
    with pytest.raises(InputError, match=rf"{CONTEXT + 1} tokens of context; its engines were built for {CONTEXT}"):
        DecoderSession.from_bundle(mixed, Settings(context_tokens=CONTEXT + 1)).__enter__()
    with pytest.raises(InputError, match="9 tokens of a prompt's chunk; its engines were built for 8"):
        DecoderSession.from_bundle(mixed, Settings(chunk_tokens=9)).__enter__()
    assert trt.cuda.alive == []


@pytest.mark.parametrize("role", ["sum", "gather", "attention"])
def test_a_manifest_without_a_stage_is_a_damaged_bundle(board, mixed, role):
    board(mixed)
    manifest = open_decoder_bundle(mixed).manifest
    fewer = tuple(one for one in manifest.programs if one.role != role)
    with pytest.raises(BundleError, match="names no stage"):
        DecoderSession(mixed, manifest.model_copy(update={"programs": fewer})).__enter__()


def test_a_bundle_whose_weights_are_of_other_sizes_is_refused(board, mixed):
    trt = board(mixed)
    manifest = open_decoder_bundle(mixed).manifest
    changed = tuple(
        one.model_copy(update={"rows": one.rows // 2}) if one.name == "layers.1.qkv" else one
        for one in manifest.matrices
    )
    with pytest.raises(BundleError, match=r"its engine wants .* bytes as 'qkv'"):
        DecoderSession(mixed, manifest.model_copy(update={"matrices": changed})).__enter__()
    assert trt.cuda.alive == []


def test_numbers_that_are_not_finite_are_a_failure_not_an_answer(board, own, monkeypatch):
    trt = board(own)
    run = type(trt).run

    def broken(self: Any, path: str, inputs: Any) -> Any:
        found = run(self, path, inputs)
        return {name: value * np.nan for name, value in found.items()} if path.endswith("head.onnx") else found

    monkeypatch.setattr(type(trt), "run", broken)
    with pytest.raises(DeviceError, match="not finite"):
        answer(own)
    assert trt.cuda.alive == []


# --- processes and commands ----------------------------------------------------------------------------


def command(monkeypatch: Any, capsys: Any, *line: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["edgeflex", *map(str, line)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main()
    return int(leaving.value.code or 0), capsys.readouterr().err


@pytest.fixture
def without(monkeypatch):
    """A machine without TensorRT and without a driver."""
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(cuda_driver, "_load", lambda: None)


LINES = (
    ("run", "--prompt", "hello"),
    ("run", "--prompt", "hello", "--cache", "64KiB"),
)


@pytest.mark.parametrize("line", LINES)
def test_without_tensorrt_a_command_says_what_to_install(mixed, without, monkeypatch, capsys, line):
    code, said = command(monkeypatch, capsys, line[0], mixed, *line[1:], "-o", "/dev/null")
    assert code == MissingDependencyError.exit_code
    assert "TensorRT is not installed" in said


def test_bench_and_verify_say_it_too(own, without):
    document = json.loads((own / "manifest.json").read_text())
    one = Expected(prompt=tuple(PROMPT), tokens=(1, 2))
    (own / "manifest.json").write_text(json.dumps({**document, "expected": [one.model_dump()]}))
    for work in (lambda: verify_decoder(own), lambda: bench_decoder(own, [PROMPT], max_tokens=2, repeats=1)):
        with pytest.raises(EdgeflexError, match=r"TensorRT"):
            work()


def test_with_tensorrt_and_no_driver_a_command_says_so(mixed, board, monkeypatch, capsys):
    board(mixed)
    monkeypatch.setattr(cuda_driver, "_load", lambda: None)
    code, said = command(monkeypatch, capsys, "run", mixed, "--prompt", "hello", "-o", "/dev/null")
    assert code == DeviceError.exit_code
    assert "no NVIDIA driver" in said


def test_a_measuring_process_reports_what_the_session_did(board, own, expected):
    board(own)
    document = json.loads((own / "manifest.json").read_text())
    document["files"] = [one for one in document["files"] if one["role"] != "tokenizer"]  # the random decoder's is none
    (own / "manifest.json").write_text(json.dumps(document))
    tasks = [Task(prompt=tuple(PROMPT), max_tokens=NEW, forced=tuple(expected))]
    request = {
        "folder": str(own),
        "settings": asdict(Settings(cache_bytes=96 << 10)),
        "tasks": [task.model_dump() for task in tasks],
        "device": "a Jetson",
        "check_store": True,
    }
    reply = measure(request)
    gc.enable()  # a measuring process goes without
    assert reply.greedy == (tuple(expected),)
    assert reply.damaged == ()
    assert reply.records == (LAYERS - 1) * EXPERTS + 1
    assert min(reply.runs[0].held_bytes) > 1 << 20
    assert reply.runs[0].cache.peak_bytes <= 96 << 10


def test_what_an_idle_runtime_holds_is_asked_with_tensorrt_ready(board, mixed, monkeypatch):
    trt = board(mixed)
    graph = open_decoder_bundle(mixed).manifest.graph
    request = {"backend": "tensorrt", "graph": graph.model_dump(mode="json"), "tokenizer": None}
    assert idle_bytes(request) > 1 << 20
    assert ("module", "Runtime") in trt.touched
    monkeypatch.setattr(cuda_driver, "_load", lambda: None)
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        idle_bytes(request)


def test_importing_the_runtime_loads_nothing_heavy():
    code = """
import sys
import edgeflex.runtimes.tensorrt_decoder
heavy = {"torch", "onnx", "onnxruntime", "scipy", "matplotlib", "tensorrt", "executorch"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
