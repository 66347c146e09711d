"""What every engine of decoders keeps, by itself and under a session.

A backend that passes runs decoders. TensorRT is the fake, and the processor stands in for a CUDA device: ``tests/gpu``
has the real things.
"""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.registry import EXPORTERS
from edgeflex.runtimes.movers import Mover
from edgeflex.runtimes.native import Missing
from edgeflex.runtimes.replay import replay
from tests.engine_samples import (
    ALL,
    CUDA,
    DESKTOP,
    JETSON,
    KINDS,
    NATIVE,
    NEW,
    ONNX,
    ORDER,
    PROMPT,
    Lab,
    forced_logits,
    noting,
)
from tests.tiny_decoder import CONTEXT, EXPERTS, LAYERS, TOP_K, VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

ROUTED = range(1, LAYERS)
LONG = [*PROMPT, *range(20)]
STAGES = (ONNX, JETSON, DESKTOP)  # experts in one arena, weights as they lie in the bundle
RAW = (*STAGES, CUDA)
ONCE = (NATIVE, ONNX, JETSON, CUDA)  # a desktop's engine differs from a Jetson's in where experts lie, and no more


def of(*kinds: Any) -> Any:
    """Ask these kinds alone."""
    return pytest.mark.parametrize("lab", kinds, ids=lambda kind: kind.name, indirect=True)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def lab(request, bundles, monkeypatch):
    made = Lab(request.param, bundles, monkeypatch)
    yield made
    assert [trt.cuda.alive for trt in made.boards] == [[]] * len(made.boards), "something stayed on the device"


@pytest.fixture
def loaded(lab):
    with lab.loaded(lab.mixed()) as made:
        yield made


def test_every_target_that_decoders_are_exported_for_is_asked():
    assert {kind.backend for kind in KINDS} == {row.name for row in EXPORTERS.rows}


# --- the reference's numbers -----------------------------------------------------------------------------


def test_greedy_tokens_are_the_references_in_fp32(lab, bundles):
    said = bundles.exactly_said()
    assert len(set(said)) > NEW // 3
    with lab.session(lab.exact()) as session:
        assert list(session.generate(PROMPT, NEW)) == said


@of(*RAW)
def test_rounded_weights_say_what_the_reference_says_with_them(lab):
    with lab.session(lab.mixed()) as session:
        assert list(session.generate(PROMPT, NEW)) == lab.expected


@of(*ONCE)
def test_latent_attention_and_a_tied_head_say_what_the_reference_says(lab, bundles):
    folder, said = lab.latent(), bundles.latently_said(lab.kind)
    room = 3 * lab.sizes(folder)[0]
    ways: list[dict[str, Any]] = [{"prefetch_depth": 1, "prefetch_by": by} for by in ("statistics", "router")]
    for more in [{}, {"device_rule": "upload"}] if lab.kind is CUDA else ways:
        with lab.session(folder, room, **more) as session:
            assert list(session.generate(PROMPT, NEW)) == said


@of(*ONCE)
def test_logits_are_the_references_to_rounding_chunk_by_chunk_and_token_by_token(lab, bundles):
    held = [(lab.exact(), bundles.exact_reference())]
    if not lab.kind.rounds:  # activations too; tests/backends/test_native_engine.py says how far that is off
        held.append((lab.mixed(), bundles.rounded()))
    for folder, reference in held:
        wanted = reference.logits(torch.tensor([LONG]))[0].numpy()
        with lab.loaded(folder) as loaded:
            for chunk in (8, 3, 1):
                found = loaded.chunked(LONG, chunk)
                assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max(), (folder, chunk)


@of(*RAW)
def test_logits_of_a_session_are_the_references_to_rounding(lab, bundles):
    wanted = bundles.rounded().logits(torch.tensor([LONG]))[0].numpy()
    found = forced_logits(lab.session(lab.mixed()), LONG)
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


@of(*ONCE)
@pytest.mark.parametrize("chunk", [8, 3, 1])
def test_what_is_routed_is_what_the_reference_routes(lab, bundles, chunk):
    routed = bundles.exact_reference().forward(torch.tensor([LONG])).routed
    with lab.loaded(lab.exact()) as loaded:
        loaded.chunked(LONG, chunk)
        events = loaded.engine.take_events()
    assert [one.layer for one in events] == list(ROUTED) * -(-len(LONG) // chunk)
    for layer in ROUTED:
        ours = [one for one in events if one.layer == layer]
        assert np.array_equal(np.concatenate([one.experts for one in ours]), routed[layer].experts.numpy())
        weights = np.concatenate([one.weights for one in ours])
        np.testing.assert_allclose(weights, routed[layer].weights.numpy(), rtol=1e-4)


@of(ONNX, JETSON, CUDA)
def test_the_trace_of_a_session_is_the_native_engines(lab, bundles, monkeypatch):
    traces = []
    for one in (lab, Lab(NATIVE, bundles, monkeypatch)):
        with one.session(one.exact(), record=True) as session:
            list(session.generate(PROMPT, NEW))
            traces.append(session.trace())
    ours, theirs = traces
    for column in ("turn", "phase", "step", "layer", "slot", "expert"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column
    np.testing.assert_allclose(ours.weight, theirs.weight, rtol=1e-4)


# --- the engine by itself --------------------------------------------------------------------------------


def test_a_pass_stops_at_what_is_missing_and_goes_on_when_it_is_there(loaded):
    engine = loaded.engine
    loaded.bring_all()
    assert engine.forward(np.array(PROMPT[:5], np.int32), 0, every_logit=True) is None
    wanted = engine.logits()
    events = engine.take_events()
    assert wanted.shape == (5, VOCABULARY)
    assert [one.layer for one in events] == list(ROUTED)
    for event in events:
        assert event.experts.shape == event.weights.shape == (5, TOP_K)
        assert event.experts.dtype == np.int32
        assert (np.diff(event.weights, axis=1) <= 0).all()
        np.testing.assert_allclose(event.weights.sum(axis=1), 1.0, rtol=1e-5)
    loaded.drop_all()
    waiting = engine.forward(np.array(PROMPT[:5], np.int32), 0, every_logit=True)
    assert engine.resume() == waiting
    stops = 0
    while waiting is not None:
        assert isinstance(waiting, Missing)
        assert waiting.experts == waiting.missing == tuple(np.unique(events[stops].experts).tolist())
        assert engine.guess(waiting.layer) == waiting.experts  # its own rows are what its router saw
        for expert in reversed(waiting.experts):
            loaded.bring((waiting.layer, expert))
            engine.compute([expert])
            loaded.drop((waiting.layer, expert))
        waiting = engine.resume()
        stops += 1
    assert stops == len(ROUTED)
    assert np.array_equal(engine.logits(), wanted)
    again = engine.take_events()
    assert [one.layer for one in again] == list(ROUTED)
    for one, two in zip(events, again, strict=True):
        assert np.array_equal(one.experts, two.experts)


@of(NATIVE, *STAGES)
def test_a_place_may_be_written_again_as_soon_as_its_expert_has_left(loaded):
    engine = loaded.engine
    wanted = loaded.run(PROMPT[:5])
    loaded.drop_all()
    waiting = engine.forward(np.array(PROMPT[:5], np.int32), 0, every_logit=True)
    while waiting is not None:
        for expert in waiting.experts:
            key = (waiting.layer, expert)
            loaded.bring(key)
            engine.compute([expert])
            loaded.drop(key)
            loaded.spoil(key)  # what a reader would do now
        waiting = engine.resume()
    assert np.array_equal(engine.logits(), wanted)


def test_events_are_handed_over_once_in_order_and_one_that_waits_stands_last(loaded):
    engine = loaded.engine
    for key in loaded.keys:
        if key[0] == 1:
            loaded.bring(key)
    waiting = engine.forward(np.array(PROMPT[:4], np.int32), 0)
    assert waiting.layer == 2
    assert waiting.experts == waiting.missing
    first, second = engine.take_events()
    assert (first.layer, second.layer) == (1, 2)
    assert waiting.experts == tuple(np.unique(second.experts).tolist())
    assert engine.take_events() == []
    loaded.bring((2, waiting.experts[0]))
    rest = waiting.experts[1:]
    assert engine.resume() == Missing(2, waiting.experts, rest)
    for expert in rest:
        loaded.bring((2, expert))
    after = engine.resume()
    assert (after.layer, after.experts) == (3, after.missing)
    assert [event.layer for event in engine.take_events()] == [3]
    assert set(engine.guess(1)) <= set(range(EXPERTS))


def test_a_pass_that_waits_may_be_given_up(loaded):
    engine = loaded.engine
    wanted = loaded.run(PROMPT[:3])
    loaded.drop_all()
    engine.take_events()
    assert engine.forward(np.array(PROMPT[:3], np.int32), 0) is not None
    with pytest.raises(InputError, match=r"no logits"):
        engine.logits()
    with pytest.raises(InputError, match="gap"):
        engine.forward(np.array(PROMPT[:3], np.int32), 3)
    assert np.array_equal(loaded.run(PROMPT[:3]), wanted)


def test_going_back_and_writing_over_a_passage_forgets_it(loaded):
    first, middle, last = LONG[:8], [50, 51, 52], [53, 54]
    loaded.run(first)
    loaded.run(middle, 4)
    found = loaded.run(last, 7)
    wanted = loaded.run([*first[:4], *middle])
    assert np.abs(wanted - loaded.run(first)[:7]).max() > 1e-3 * np.abs(wanted).max()
    loaded.run([*first[:4], *middle])
    wanted = loaded.run(last, 7)
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_a_sequence_longer_than_the_cache_is_refused_and_harms_nothing(loaded):
    wanted = loaded.chunked([*LONG, 1], 8)  # as many as it holds
    with pytest.raises(InputError, match="context"):
        loaded.run([1], len(LONG) + 1)
    with pytest.raises(InputError, match="context"):
        loaded.run([1, 2, 3], len(LONG) - 1)
    assert np.array_equal(loaded.run([*LONG, 1][24:], 24), wanted[24:])


def test_calls_that_make_no_sense_are_refused(loaded):
    engine = loaded.engine
    for tokens, position, said in (
        ([], 0, r"0 tokens|a chunk of 0"),
        ([1] * 9, 0, r"9 tokens at once|between 1 and 8"),
        ([VOCABULARY], 0, f"there are {VOCABULARY}|outside the vocabulary"),
        ([-1], 0, r"tokens -1|outside the vocabulary"),
        ([1], 1, "gap"),
        ([1], -1, r"gap|negative"),
    ):
        with pytest.raises(InputError, match=said):
            engine.forward(np.array(tokens, np.int32), position)
    for call in (engine.resume, engine.logits, lambda: engine.compute([0]), lambda: engine.guess(1)):
        with pytest.raises(InputError, match=r"begun|waits|nothing to|no logits|no pass"):
            call()
    precision, _ = loaded.place((1, 0))
    wrong = ((9, 0, 0), (1, EXPERTS, 0), (1, 0, 32), (1, 0, -64), (1, 0, loaded.arena.size))
    for layer, expert, offset in wrong:
        with pytest.raises(InputError):
            engine.bind(layer, expert, precision, offset)
    with pytest.raises(InputError):
        engine.unbind(9, 0)
    waiting = engine.forward(np.array([1], np.int32), 0)
    assert len(waiting.experts) == len(engine.guess(2)) == TOP_K
    with pytest.raises(InputError, match=r"not bound|not where they are computed"):
        engine.compute(waiting.experts)
    others = sorted(set(range(EXPERTS)) - set(waiting.experts))
    loaded.bring((1, others[0]))
    with pytest.raises(InputError, match=r"not in the (present )?event"):
        engine.compute(others[:1])
    with pytest.raises(InputError, match="no logits"):
        engine.logits()
    for layer in (0, LAYERS):
        with pytest.raises(InputError, match="no experts"):
            engine.guess(layer)


def test_faulty_experts_lead_to_an_error_and_a_later_pass_is_right(loaded):
    wanted = loaded.run(PROMPT[:8])
    loaded.drop_all()
    faulty = [key for key in loaded.keys if key[0] == 2]
    for key in faulty:
        loaded.spoil(key)
    with pytest.raises(DeviceError, match="not finite"):
        loaded.run(PROMPT[:8])
    loaded.engine.take_events()
    loaded.drop_all()
    for key in faulty:
        loaded.fill(key)
    assert np.array_equal(loaded.run(PROMPT[:8]), wanted)


def test_times_cover_a_pass_and_start_again(lab, loaded):
    engine = loaded.engine
    loaded.bring_all()
    engine.times()
    loaded.run(PROMPT[:4])
    taken = engine.times()
    assert min(taken if lab.kind is NATIVE else taken[:2]) > 0.0  # others count all of their work in two places
    assert engine.times() == (0.0, 0.0, 0.0)


def test_a_closed_engine_says_so_and_closes_twice(loaded):
    engine = loaded.engine
    assert engine.memory_bytes > 0
    loaded.run([1])
    engine.close()
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.forward(np.array([1], np.int32), 0)


# --- under a session -------------------------------------------------------------------------------------


def sizes_of_cache(lab: Lab, folder: Path) -> list[int]:
    """Return room from one expert over one event to everything; fewer where each run takes long."""
    one, total = lab.sizes(folder)
    found = [one, TOP_K * one, 3 * one + 4096, total // 2, total - 4096, ALL]
    return found if lab.kind.board else [*found, total // 3, total]


@pytest.mark.parametrize("policy", ["enu", "lru"])
@of(*STAGES)  # test_cuda_decoder.py and test_decoder_session.py ask the others, in all that they may do with experts
def test_tokens_are_the_same_at_every_cache_size(lab, policy):
    folder = lab.judged()
    one, _ = lab.sizes(folder)
    for experts_bytes in sizes_of_cache(lab, folder):
        with lab.session(folder, experts_bytes, policy=policy) as session:
            assert list(session.generate(PROMPT, NEW)) == lab.expected
            cache = session.stats().cache
            assert cache.peak_bytes <= cache.capacity_bytes <= max(experts_bytes, one)


@of(ONNX, CUDA)  # test_decoder_session.py asks the native engine; with TensorRT the device computes
def test_threads_change_no_token(lab):
    folder = lab.judged()
    for experts_bytes in sizes_of_cache(lab, folder)[::2]:
        for policy in ("enu", "lru"):
            with lab.session(folder, experts_bytes, policy=policy, threads=2) as session:
                assert list(session.generate(PROMPT, NEW)) == lab.expected


@of(NATIVE, *STAGES)  # PyTorch rounds products of several experts at once otherwise than of one
def test_no_bit_of_any_logit_depends_on_what_is_resident(lab):
    folder = lab.mixed()

    def rows(experts_bytes: int, **more: Any) -> list[Any]:
        found: list[Any] = []
        with lab.session(folder, experts_bytes, **more) as session:
            for _ in range(2):
                list(session.generate(PROMPT, NEW, noting(found)))
        return found

    wanted = rows(ALL)
    for experts_bytes in sizes_of_cache(lab, folder)[: 4 : 2 if lab.kind.board else 1]:
        assert np.array_equal(rows(experts_bytes, policy="lru", prefetch_depth=1), wanted)
    assert np.array_equal(wanted[:NEW], wanted[NEW:])  # nor on what the session did before


@pytest.mark.parametrize("by", ["statistics", "router"])
@of(ONNX, DESKTOP)
def test_prefetching_reads_early_and_changes_nothing(lab, by):
    early = {"prefetch_depth": 1, "prefetch_worth": 0.0, "prefetch_by": by}
    with lab.session(lab.mixed(), 96 << 10, **early) as session:
        assert list(session.generate(PROMPT, 40))[:NEW] == lab.expected
        cache = session.stats().cache
    assert 0 < cache.prefetch_useful_bytes <= cache.prefetch_fetched_bytes < cache.read_bytes


@of(*ONCE)
def test_tokens_are_the_same_however_the_prompt_is_cut(lab):
    folder = lab.judged()
    for chunk in (1, 3, 8) if lab.kind.board else (1, 3, 11, 64):  # engines are built for chunks of 8
        with lab.session(folder, chunk_tokens=chunk) as session:
            assert list(session.generate(PROMPT, NEW)) == lab.expected


@of(*ONCE)
def test_a_long_prompt_and_what_is_continued_are_as_one_prompt(lab, bundles):
    long = [one % VOCABULARY for one in range(3, 3 + 5 * 45, 5)]  # beyond several powers of two
    said = bundles.said(lab.kind, long, 5)
    folder = lab.judged()
    with lab.session(folder, 3 * lab.sizes(folder)[0]) as session:
        assert list(session.generate(long, 5)) == said
        list(session.generate(long[:20], 1))
        first = list(session.generate(long[:20], 3))
        more = list(session.generate([5, 6], 6, continued=True))
        assert list(session.generate([*long[:20], *first, 5, 6], 6)) == more


@of(*ONCE)
def test_it_ends_at_the_end_of_the_context(lab):
    with lab.session(lab.judged()) as session:
        said = list(session.generate(PROMPT, 10_000))
        assert session.stats().stopped_by == "context"
        assert len(PROMPT) + len(said) == CONTEXT + 1
        assert list(session.generate(PROMPT, NEW)) == lab.expected


@pytest.mark.parametrize(
    ("lab", "policy"),
    [(ONNX, "enu"), (ONNX, "lru"), (ONNX, "static"), (JETSON, "lru")],
    ids=lambda one: getattr(one, "name", one),
    indirect=["lab"],
)
def test_the_simulator_counts_what_the_engine_did(lab, policy):
    folder = lab.mixed()
    sizes = sizes_of_cache(lab, folder)
    for experts_bytes in [sizes[place] for place in ((0, 2, 3) if lab.kind is ONNX else (2,))]:
        with lab.session(folder, experts_bytes, policy=policy, static=ORDER, record=True) as session:
            list(session.generate(PROMPT, NEW))
            first = session.stats().cache
            list(session.generate([4, 5, 6], 10, continued=True))
            second = session.stats().cache
            trace, held = session.trace(), session.store.sizes
        told = replay(trace, first.capacity_bytes, policy, sizes=held, static=ORDER)
        assert told.hits == first.decode_hits + second.decode_hits
        assert told.misses == first.decode_misses + second.decode_misses
        assert told.prefill_hits + told.hits == first.hits + second.hits
        assert told.prefill_misses + told.misses == first.misses + second.misses
        assert told.prefill_bytes + told.read_bytes == first.read_bytes + second.read_bytes
        assert told.evictions == first.evictions + second.evictions


@of(*ONCE)
def test_times_and_counters_add_up(lab):
    folder = lab.mixed()
    with lab.session(folder, 3 * lab.sizes(folder)[0]) as session:
        tokens = list(session.generate(PROMPT, NEW))
        stats = session.stats()
    assert stats.tokens == tuple(tokens)
    assert len(stats.times) == NEW - 1
    assert stats.cache.decode_hits + stats.cache.decode_misses == (NEW - 1) * TOP_K * (LAYERS - 1)
    assert np.sum(stats.expert_uses) == (len(PROMPT) + NEW - 1) * TOP_K * (LAYERS - 1)
    for one in stats.times:
        assert min(one.dense_s, one.expert_s) > 0.0
        assert one.dense_s + one.expert_s + one.wait_s <= one.total_s * 1.001


# --- faults ----------------------------------------------------------------------------------------------


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


FAULTS = ("flipped", "truncated", "of another", "missing")


@pytest.mark.parametrize(
    ("lab", "fault"),
    [*((kind, fault) for kind in (ONNX, CUDA) for fault in FAULTS), (JETSON, "flipped"), (DESKTOP, "missing")],
    ids=lambda one: getattr(one, "name", one),
    indirect=["lab"],
)
def test_a_damaged_expert_is_found_at_its_first_use_and_the_session_lives_on(lab, tmp_path, fault):
    own = lab.own(tmp_path / "own")
    shutil.copytree(own, tmp_path / "sound")
    for depth in (0, 1) if lab.kind is ONNX else (None,):
        with lab.session(own, 3 * lab.sizes(own)[0], prefetch_depth=depth) as session:
            known = session.store.experts
            others = {known[3, expert].record.size_bytes: known[3, expert].record.file for expert in range(EXPERTS)}
            for expert in range(EXPERTS):
                damage(known[2, expert].record.file, fault, others[known[2, expert].record.size_bytes])
            with pytest.raises(BundleError, match=r"layers\.2\.experts\.\d") as caught:
                list(session.generate(PROMPT, NEW))
            assert "packed weights" not in str(caught.value)
            assert "export" in str(caught.value)
            for expert in range(EXPERTS):
                file = known[2, expert].record.file
                shutil.copy(tmp_path / "sound" / file.relative_to(own), file)
            assert list(session.generate(PROMPT, NEW)) == lab.expected


@of(ONNX, JETSON)
def test_a_read_error_is_told_and_the_session_lives_on(lab):
    calls = count()

    def failing(descriptor, buffers, offset):
        if next(calls) == 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    with lab.session(lab.mixed(), 48 << 10, mover=partial(Mover, read_into=failing)) as session:
        with pytest.raises(DeviceError, match=r"reading layers\.\d\.experts\.\d failed"):
            list(session.generate(PROMPT, NEW))
        assert list(session.generate(PROMPT, NEW)) == lab.expected


@of(ONNX, JETSON)
def test_a_cache_below_one_expert_is_refused(lab):
    folder = lab.mixed()
    for cache_bytes in (0, 4096, lab.sizes(folder)[0] - 1):
        with (
            pytest.raises(InputError, match="does not hold the largest expert"),
            lab.session(folder, cache_bytes),
        ):
            pass


@of(*ONCE)
def test_a_session_closes_twice_and_opens_again(lab):
    session = lab.session(lab.judged())
    for _ in range(2):
        with session:
            assert list(session.generate(PROMPT, NEW)) == lab.expected
        session.close()
        with pytest.raises(DeviceError, match="closed"):
            session.generate(PROMPT, 1)
