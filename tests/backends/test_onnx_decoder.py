"""A decoder's ONNX bundle with the expert cache: the reference's tokens, whatever is resident, and no fault unseen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.exporters.decoder import export_decoder
from edgeflex.exporters.decoder_files import BundleWeights
from edgeflex.exporters.onnx_decoder import export_onnx_decoder
from edgeflex.models.decoder_reference import Reference
from edgeflex.progress import Silent
from edgeflex.runtimes.decoder import DecoderSession, Settings
from edgeflex.runtimes.decoder_bench import bench_decoder, verify_decoder
from edgeflex.runtimes.engines import open_engine
from edgeflex.runtimes.movers import Mover
from edgeflex.runtimes.native import Missing
from edgeflex.runtimes.replay import replay
from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer, Expected, Routing
from tests.random_decoder import RandomSource, exact_plan, mixed_plan
from tests.tiny_decoder import CONTEXT, EXPERTS, LAYERS, TOP_K, VOCABULARY, tiny_graph

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30]  # a chunk of 8 and one of 3
NEW = 24
ALL = 1 << 30
ORDER = [(layer, expert) for expert in range(EXPERTS) for layer in range(1, LAYERS)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Any:
    return RandomSource(tiny_graph(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exact(source, tmp_path_factory) -> Path:
    """The bundle with everything in fp32."""
    folder: Path = tmp_path_factory.mktemp("exact") / "bundle"
    export_onnx_decoder(source, exact_plan(source.graph), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(source, tmp_path_factory) -> Path:
    """The bundle with experts of two precisions, and so of two sizes."""
    folder: Path = tmp_path_factory.mktemp("mixed") / "bundle"
    export_onnx_decoder(source, mixed_plan(source.graph), folder)
    return folder


@pytest.fixture(scope="module")
def rounded(source, bundle) -> Reference:
    """The reference with the mixed bundle's own numbers."""
    return Reference(source, BundleWeights(bundle, open_decoder_bundle(bundle).manifest.matrices, source))


@pytest.fixture
def own(bundle, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    folder: Path = tmp_path / "own"
    shutil.copytree(bundle, folder)
    return folder


@pytest.fixture(scope="module")
def expected(bundle) -> list[int]:
    with DecoderSession.from_bundle(bundle, Settings(cache_bytes=ALL)) as session:
        return list(session.generate(PROMPT, NEW))


def largest(folder: Path) -> int:
    with DecoderSession.from_bundle(folder) as session:
        return int(session.store.sizes.max())


def sizes_of_cache(folder: Path) -> list[int]:
    """Return caches from one expert over one event to everything."""
    with DecoderSession.from_bundle(folder) as session:
        one, total = int(session.store.sizes.max()), int(session.store.sizes.sum())
    return [one, TOP_K * one, 3 * one + 4096, total // 3, total // 2, total - 4096, total, ALL]


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


def noting(rows: list[Any], forced: list[int] | None = None) -> Any:
    """Return a sampler that notes the logits and says ``forced``, or what is greedy."""

    def choose(row: Any) -> int:
        rows.append(row)
        return int(row.argmax()) if forced is None else forced[len(rows) % len(forced)]

    return choose


# --- the reference's numbers ---------------------------------------------------------------------------


def test_fp32_says_what_the_reference_and_the_executorch_bundle_of_the_same_weights_say(source, exact, tmp_path):
    export_decoder(source, exact_plan(source.graph), tmp_path / "other", stock=False)
    said = list(Reference(source).generate(PROMPT, NEW))
    assert len(set(said)) > NEW // 3
    for folder in (exact, tmp_path / "other"):
        with DecoderSession.from_bundle(folder) as session:
            assert list(session.generate(PROMPT, NEW)) == said


def test_rounded_weights_say_what_the_reference_says_with_them(rounded, expected):
    assert expected == list(rounded.generate(PROMPT, NEW))


def test_latent_attention_and_a_tied_head_say_what_the_reference_says(tmp_path):
    graph = tied_latent_graph()
    source: Any = RandomSource(graph, tmp_path / "model")
    manifest = export_onnx_decoder(source, mixed_plan(graph, cache_bytes=48 << 10), tmp_path / "bundle")
    said = Reference(source, BundleWeights(tmp_path / "bundle", manifest.matrices, source)).generate(PROMPT, NEW)
    for by in ("statistics", "router"):
        settings = Settings(prefetch_depth=1, prefetch_by=by)
        with DecoderSession.from_bundle(tmp_path / "bundle", settings) as session:
            assert list(session.generate(PROMPT, NEW)) == list(said)


@pytest.mark.parametrize("kind", ["exact", "bundle"])
def test_logits_are_the_references_to_rounding(source, rounded, kind, request):
    folder = request.getfixturevalue(kind)
    reference = Reference(source) if kind == "exact" else rounded
    tokens = [*PROMPT, *range(20)]
    wanted = reference.logits(torch.tensor([tokens]))[0].numpy()
    rows: list[Any] = []
    with DecoderSession.from_bundle(folder) as session:
        list(session.generate(tokens[:1], len(tokens), noting(rows, tokens)))
    found = np.stack(rows)
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


# --- exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("policy", ["enu", "lru"])
def test_tokens_are_the_same_at_every_cache_size(bundle, expected, policy, threads):
    for cache_bytes in sizes_of_cache(bundle):
        with DecoderSession.from_bundle(bundle, Settings(cache_bytes, policy, threads)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
            cache = session.stats().cache
            assert cache.peak_bytes <= cache.capacity_bytes <= max(cache_bytes, largest(bundle))


def test_no_bit_of_any_logit_depends_on_what_is_resident(bundle):
    def rows(settings: Settings) -> list[Any]:
        found: list[Any] = []
        with DecoderSession.from_bundle(bundle, settings) as session:
            for _ in range(2):
                list(session.generate(PROMPT, NEW, noting(found)))
        return found

    wanted = rows(Settings(ALL))
    for cache_bytes in sizes_of_cache(bundle)[:4]:
        assert np.array_equal(rows(Settings(cache_bytes, "lru", prefetch_depth=1)), wanted)
    assert np.array_equal(wanted[:NEW], wanted[NEW:])  # nor on what the session did before


@pytest.mark.parametrize("by", ["statistics", "router"])
def test_prefetching_reads_early_and_changes_nothing(bundle, expected, by):
    settings = Settings(cache_bytes=96 << 10, prefetch_depth=1, prefetch_worth=0.0, prefetch_by=by)
    with DecoderSession.from_bundle(bundle, settings) as session:
        assert list(session.generate(PROMPT, 40))[:NEW] == expected
        cache = session.stats().cache
    assert 0 < cache.prefetch_useful_bytes <= cache.prefetch_fetched_bytes < cache.read_bytes


def test_tokens_are_the_same_however_the_prompt_is_cut(bundle, expected):
    for chunk in (1, 3, 11, 64):
        with DecoderSession.from_bundle(bundle, Settings(chunk_tokens=chunk)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected


def test_a_long_prompt_and_what_is_continued_are_as_one_prompt(bundle, rounded):
    long = [one % VOCABULARY for one in range(3, 3 + 5 * 45, 5)]
    said = list(rounded.generate(long, 5))
    with DecoderSession.from_bundle(bundle, Settings(48 << 10)) as session:
        assert list(session.generate(long, 5)) == said
        list(session.generate(long[:20], 1))
        first = list(session.generate(long[:20], 3))
        more = list(session.generate([5, 6], 6, continued=True))
        assert list(session.generate([*long[:20], *first, 5, 6], 6)) == more


def test_it_ends_at_the_end_of_the_context(bundle, expected):
    with DecoderSession.from_bundle(bundle) as session:
        said = list(session.generate(PROMPT, 10_000))
        assert session.stats().stopped_by == "context"
        assert len(PROMPT) + len(said) == CONTEXT + 1
        assert list(session.generate(PROMPT, NEW)) == expected


# --- simulator = engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["enu", "lru", "static"])
def test_the_simulator_counts_what_the_engine_did(bundle, policy):
    for cache_bytes in sizes_of_cache(bundle)[:6:2]:
        settings = Settings(cache_bytes, policy, static=ORDER, record=True)
        with DecoderSession.from_bundle(bundle, settings) as session:
            list(session.generate(PROMPT, NEW))
            first = session.stats().cache
            list(session.generate([4, 5, 6], 10, continued=True))
            second = session.stats().cache
            trace, sizes = session.trace(), session.store.sizes
        told = replay(trace, first.capacity_bytes, policy, sizes=sizes, static=ORDER)
        assert told.hits == first.decode_hits + second.decode_hits
        assert told.misses == first.decode_misses + second.decode_misses
        assert told.prefill_hits + told.hits == first.hits + second.hits
        assert told.prefill_misses + told.misses == first.misses + second.misses
        assert told.prefill_bytes + told.read_bytes == first.read_bytes + second.read_bytes
        assert told.evictions == first.evictions + second.evictions


def test_routing_is_the_native_engines(source, exact, tmp_path):
    export_decoder(source, exact_plan(source.graph), tmp_path / "other", stock=False)
    traces = []
    for folder in (exact, tmp_path / "other"):
        with DecoderSession.from_bundle(folder, Settings(record=True)) as session:
            list(session.generate(PROMPT, NEW))
            traces.append(session.trace())
    ours, theirs = traces
    for column in ("turn", "phase", "step", "layer", "slot", "expert"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-4)


def test_times_and_counters_add_up(bundle):
    with DecoderSession.from_bundle(bundle, Settings(48 << 10)) as session:
        list(session.generate(PROMPT, NEW))
        stats = session.stats()
    assert len(stats.times) == NEW - 1
    assert stats.cache.decode_hits + stats.cache.decode_misses == (NEW - 1) * TOP_K * (LAYERS - 1)
    for one in stats.times:
        assert min(one.dense_s, one.expert_s) > 0.0
        assert one.dense_s + one.expert_s + one.wait_s <= one.total_s * 1.001


# --- the engine ----------------------------------------------------------------------------------------


@pytest.fixture
def engine(bundle):
    """A loaded engine with an arena that holds everything, and where each expert's bytes then lie."""
    manifest = open_decoder_bundle(bundle).manifest
    opened = open_engine(bundle, manifest, context_tokens=32, chunk_tokens=8, threads=1, progress=Silent())
    kept = opened.load()
    arena = opened.engine.arena(int(opened.store.sizes.sum()))
    places, end = {}, 0
    for key, expert in opened.store.experts.items():
        size = expert.record.size_bytes
        arena[end : end + size] = np.fromfile(expert.record.file, np.uint8)
        places[key] = (expert.precision, end)
        end += size
    yield opened.engine, places, arena
    opened.engine.close()
    del kept


def test_a_pass_stops_at_what_is_missing_and_goes_on_when_it_is_there(engine):
    known, places, _ = engine
    for key, place in places.items():
        known.bind(*key, *place)
    assert known.forward(np.array(PROMPT[:5], np.int32), 0, every_logit=True) is None
    wanted = known.logits()
    events = known.take_events()
    assert wanted.shape == (5, VOCABULARY)
    assert [one.layer for one in events] == [1, 2, 3]
    for event in events:
        assert event.experts.shape == event.weights.shape == (5, TOP_K)
        assert (np.diff(event.weights, axis=1) <= 0).all()
        np.testing.assert_allclose(event.weights.sum(axis=1), 1.0, rtol=1e-5)
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


def test_experts_are_computed_from_the_arenas_own_bytes(engine):
    known, places, arena = engine
    for key, place in places.items():
        known.bind(*key, *place)
    known.forward(np.array([1, 2], np.int32), 0)
    before = known.logits()
    held = arena.copy()
    arena[:] = 0  # after binding: what is computed next must see it
    known.forward(np.array([1, 2], np.int32), 0)
    assert not np.array_equal(known.logits(), before)
    arena[:] = held
    known.forward(np.array([1, 2], np.int32), 0)
    assert np.array_equal(known.logits(), before)


def test_calls_that_make_no_sense_are_refused(engine):
    known, places, arena = engine
    for tokens, position, said in (
        ([], 0, "0 tokens"),
        ([1] * 9, 0, "9 tokens at once"),
        ([VOCABULARY], 0, f"there are {VOCABULARY}"),
        ([-1], 0, "tokens -1"),
        ([1], 1, "leaves a gap"),
        ([1], -1, "gap"),
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
        (1, 0, precision, -64),
        (1, 0, precision, arena.size),
    ):
        with pytest.raises(InputError):
            known.bind(*arguments)
    waiting = known.forward(np.array([1], np.int32), 0)
    assert waiting is not None
    with pytest.raises(InputError, match="not in the event or not bound"):
        known.compute(waiting.experts)
    with pytest.raises(InputError, match="waits for experts"):
        known.logits()
    with pytest.raises(InputError, match="no experts to guess"):
        known.guess(0)


def test_a_closed_engine_says_so_and_closes_twice(engine):
    known, _, _ = engine
    assert known.memory_bytes > 0
    known.close()
    known.close()
    with pytest.raises(InputError, match="closed"):
        known.forward(np.array([1], np.int32), 0)


# --- faults --------------------------------------------------------------------------------------------


def damage(path: Path, fault: str, other: Path) -> None:
    if fault == "flipped":
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 128
        path.write_bytes(raw)
    elif fault == "truncated":
        os.truncate(path, 4096)
    elif fault == "of another":
        shutil.copy(other, path)
    else:
        path.unlink()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "of another", "missing"])
def test_a_damaged_expert_is_found_at_its_first_use(own, fault, depth):
    with DecoderSession.from_bundle(own, Settings(48 << 10, prefetch_depth=depth)) as session:
        known = session.store.experts
        others = {known[3, expert].record.size_bytes: known[3, expert].record.file for expert in range(EXPERTS)}
        for expert in range(EXPERTS):
            damage(known[2, expert].record.file, fault, others[known[2, expert].record.size_bytes])
        with pytest.raises(BundleError, match=r"layers\.2\.experts\.\d") as caught:
            list(session.generate(PROMPT, NEW))
    assert "packed weights" not in str(caught.value)
    assert "export" in str(caught.value)


@pytest.mark.parametrize("kind", ["attention", "dense", "expert", "head", "data", "embedding"])
def test_damaged_stages_and_embeddings_are_found_at_load(own, kind):
    manifest = open_decoder_bundle(own).manifest
    if kind == "embedding":
        path = next(one.file for one in manifest.matrices if one.name == "embedding")
    elif kind == "data":
        path = next(one.data[0] for one in manifest.programs if one.data)
    else:
        path = next(one.path for one in manifest.programs if one.role == kind)
    raw = bytearray((own / path).read_bytes())
    raw[len(raw) // 2] ^= 1
    (own / path).write_bytes(raw)
    with pytest.raises(BundleError, match=Path(path).name), DecoderSession.from_bundle(own):
        pass


def test_a_read_error_is_told_and_the_session_lives_on(bundle, expected):
    calls = count()

    def failing(descriptor, buffers, offset):
        if next(calls) == 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    manifest = open_decoder_bundle(bundle).manifest
    mover = partial(Mover, read_into=failing)
    with DecoderSession(bundle, manifest, Settings(48 << 10), mover=mover) as session:
        with pytest.raises(DeviceError, match=r"reading layers\.\d\.experts\.\d failed"):
            list(session.generate(PROMPT, NEW))
        assert list(session.generate(PROMPT, NEW)) == expected


def test_a_cache_below_one_expert_is_refused(bundle):
    for cache_bytes in (0, 4096, largest(bundle) - 1):
        with (
            pytest.raises(InputError, match="does not hold the largest expert"),
            DecoderSession.from_bundle(bundle, Settings(cache_bytes)),
        ):
            pass


def test_a_session_closes_twice_and_opens_again(bundle, expected):
    session = DecoderSession.from_bundle(bundle)
    for _ in range(2):
        with session:
            assert list(session.generate(PROMPT, NEW)) == expected
        session.close()
        with pytest.raises(DeviceError, match="closed"):
            session.generate(PROMPT, 1)


def test_a_manifest_without_a_stage_is_a_damaged_bundle(own):
    manifest = open_decoder_bundle(own).manifest
    fewer = manifest.model_copy(update={"programs": manifest.programs[1:]})
    with pytest.raises(BundleError, match="no stage"), DecoderSession(own, fewer) as session:
        list(session.generate(PROMPT, 3))


def test_graphs_for_onnx_runtime_are_none_for_tensorrt(own):
    document = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**document, "backend": "tensorrt"}))
    with pytest.raises(BundleError, match="names no stage for the sum of layer 0"):
        DecoderSession.from_bundle(own).__enter__()


# --- processes -----------------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_running_it_loads_neither_torch_nor_executorch_nor_onnx(bundle, expected):
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from edgeflex.runtimes.decoder import DecoderSession, Settings
with DecoderSession.from_bundle(sys.argv[1], Settings(cache_bytes=48 << 10)) as session:
    print(list(session.generate([int(one) for one in sys.argv[2].split(",")], int(sys.argv[3]))))
    session.stats()
heavy = {"torch", "torchao", "executorch", "onnx", "scipy", "matplotlib", "transformers"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    assert python(code, str(bundle), ",".join(map(str, PROMPT)), str(NEW)) == str(expected)


def test_bench_and_verify_judge_it_like_any_bundle(own, rounded, expected):
    said = Expected(prompt=tuple(PROMPT), tokens=rounded.generate(PROMPT, NEW))
    document = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**document, "expected": [said.model_dump()]}))
    (own / "tokenizer.json").unlink()
    files = [one for one in document["files"] if one["path"] != "tokenizer.json"]
    document = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**document, "files": files}))
    checks = {check.name: check for check in verify_decoder(own)}
    assert checks["sound files"].ok
    assert checks["packed store"].ok
    assert checks["greedy agreement"].measured == 1.0
    assert checks["expert cache"].ok
    bench = bench_decoder(own, [PROMPT], max_tokens=NEW, repeats=1)
    assert list(bench.runs[0].tokens) == expected
    assert all(check.was_measured or check.promised == 0 for check in bench.checks if "first" not in check.name)
