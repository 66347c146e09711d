"""A decoder's session: the same tokens whatever is resident, the simulator's own counts, and no fault unseen."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.runtimes.decoder import DecoderSession, stream_text
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.movers import Mover
from edgeflex.runtimes.policies import POLICIES
from edgeflex.runtimes.replay import replay
from edgeflex.runtimes.sampling import Sampler
from edgeflex.runtimes.slots import Slots
from edgeflex.runtimes.trace import read_trace, write_trace
from tests.tiny_decoder import CONTEXT, EXPERTS, LAYERS, TOP_K, VOCABULARY, tiny_graph, write_tiny_bundle

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30]  # a chunk of 8 and one of 3
NEW = 30
ALL = 1 << 30
ORDER = [(layer, expert) for expert in range(EXPERTS) for layer in range(1, LAYERS)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = write_tiny_bundle(tmp_path_factory.mktemp("decoder") / "bundle")
    with DecoderSession.from_bundle(folder):
        pass  # packed once, for all tests of this file
    return folder


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return shutil.copytree(bundle, tmp_path / "own")


@pytest.fixture(scope="module")
def expected(bundle) -> list[int]:
    with DecoderSession.from_bundle(bundle, Settings(cache_bytes=ALL)) as session:
        return list(session.generate(PROMPT, NEW))


def largest(folder: Path) -> int:
    with DecoderSession.from_bundle(folder) as session:
        return int(session.store.sizes.max())


def sizes_of_cache(folder: Path) -> list[int]:
    """Return caches from one expert over one event to everything."""
    one = largest(folder)
    with DecoderSession.from_bundle(folder) as session:
        total = int(session.store.sizes.sum())
    return [one, TOP_K * one, 3 * one + 4096, 5 * one, total // 3, total // 2, total - 4096, total, ALL]


# --- exactness -----------------------------------------------------------------------------------------


def test_the_reference_answer_is_worth_comparing(expected):
    assert len(expected) == NEW
    assert len(set(expected)) > NEW // 3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_the_same_at_every_cache_size(bundle, expected, policy, depth, threads):
    every = threads == 1 and policy in {"enu", "lru"}
    for cache_bytes in sizes_of_cache(bundle) if every else sizes_of_cache(bundle)[1:6:2]:
        settings = Settings(cache_bytes, policy, threads, depth, static=ORDER)
        with DecoderSession.from_bundle(bundle, settings) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
            cache = session.stats().cache
            assert cache.peak_bytes <= cache.capacity_bytes <= max(cache_bytes, largest(bundle))


def test_experts_are_moved_when_the_arena_is_fragmented_and_tokens_stay_the_same(bundle, expected, monkeypatch):
    moves: list[object] = []
    place = Slots.place

    def counted(slots, key, size_bytes):
        found = place(slots, key, size_bytes)
        moves.extend(found[1])
        return found

    monkeypatch.setattr(Slots, "place", counted)
    for cache_bytes in sizes_of_cache(bundle)[2:6]:
        with DecoderSession.from_bundle(bundle, Settings(cache_bytes, prefetch_depth=1)) as session:
            assert len(np.unique(session.store.sizes)) == 3  # none, small, large
            assert list(session.generate(PROMPT, NEW)) == expected
    assert moves


def test_tokens_are_the_same_however_the_prompt_is_cut(bundle, expected):
    for chunk in (1, 3, 11, 64):
        with DecoderSession.from_bundle(bundle, Settings(chunk_tokens=chunk)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected


def test_drawn_tokens_depend_on_the_seed_alone(bundle):
    def drawn(cache_bytes: int, seed: int) -> list[int]:
        with DecoderSession.from_bundle(bundle, Settings(cache_bytes)) as session:
            return list(session.generate(PROMPT, 20, Sampler(temperature=1.5, top_k=20, seed=seed)))

    assert drawn(ALL, 1) == drawn(40 << 10, 1) != drawn(ALL, 2)


def test_a_warm_session_answers_as_a_cold_one(bundle, expected):
    with DecoderSession.from_bundle(bundle) as session:
        first = list(session.generate(PROMPT, NEW))
        list(session.generate([1, 2, 3], 5))
        assert list(session.generate(PROMPT, NEW)) == first == expected


def test_what_is_continued_is_as_if_it_had_been_the_prompt(bundle, expected):
    with DecoderSession.from_bundle(bundle) as session:
        said = list(session.generate(PROMPT, 9))
        assert said == expected[:9]
        assert session.position == len(PROMPT) + 8  # the last token is not read yet
        more = list(session.generate([5, 6], 12, continued=True))
        assert session.stats().prompt_tokens == 2
    with DecoderSession.from_bundle(bundle) as session:
        assert list(session.generate([*PROMPT, *said, 5, 6], 12)) == more


def test_two_sessions_on_one_bundle_do_not_disturb_each_other(bundle, expected):
    with (
        DecoderSession.from_bundle(bundle, Settings(40 << 10)) as one,
        DecoderSession.from_bundle(bundle, Settings(72 << 10, policy="lru")) as two,
    ):
        pairs = list(zip(one.generate(PROMPT, NEW), two.generate(PROMPT, NEW), strict=True))
    assert pairs == [(token, token) for token in expected]


# --- simulator = engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulator_counts_what_the_engine_did(bundle, policy, tmp_path):
    for cache_bytes in sizes_of_cache(bundle)[:7:2]:
        settings = Settings(cache_bytes, policy, static=ORDER, record=True)
        with DecoderSession.from_bundle(bundle, settings) as session:
            list(session.generate(PROMPT, NEW))
            runs = [session.stats()]
            list(session.generate([4, 5, 6], 10, continued=True))
            runs.append(session.stats())
            first, second = (run.cache for run in runs)
            trace, sizes = session.trace(), session.store.sizes
        write_trace(tmp_path / "trace.csv", trace)
        for known in (trace, read_trace(tmp_path / "trace.csv")):
            told = replay(known, first.capacity_bytes, policy, sizes=sizes, static=ORDER)
            assert told.hits == first.decode_hits + second.decode_hits
            assert told.misses == first.decode_misses + second.decode_misses
            assert told.read_bytes == first.decode_read_bytes + second.decode_read_bytes
            assert told.prefill_hits + told.hits == first.hits + second.hits
            assert told.prefill_misses + told.misses == first.misses + second.misses
            assert told.prefill_bytes + told.read_bytes == first.read_bytes + second.read_bytes
            assert told.evictions == first.evictions + second.evictions
            assert told.peak_bytes == second.peak_bytes
            assert told.occupancy.events == sum(run.decode_events for run in runs) > 0
            assert (np.array(told.occupancy.resident) == sum(np.array(run.expert_residency) for run in runs)).all()


def test_counters_bytes_and_times_add_up(bundle):
    read: list[int] = []

    class Counting(Mover):
        def submit(self, record, offset, *, check):
            read.append(record.size_bytes)
            return super().submit(record, offset, check=check)

    folder = bundle
    session = DecoderSession(folder, DecoderSession.from_bundle(folder).manifest, Settings(48 << 10), mover=Counting)
    with session:
        tokens = list(session.generate(PROMPT, NEW))
        stats = session.stats()
    cache = stats.cache
    assert stats.tokens == tuple(tokens)
    assert len(stats.times) == NEW - 1
    assert (len(read), sum(read)) == (cache.misses, cache.read_bytes)
    assert cache.hits == sum(cache.layer_hits)
    assert cache.misses == sum(cache.layer_misses) > 0
    assert cache.decode_hits + cache.decode_misses == (NEW - 1) * TOP_K * (LAYERS - 1)
    assert np.sum(stats.expert_uses) == (len(PROMPT) + NEW - 1) * TOP_K * (LAYERS - 1)
    assert stats.expert_uses[0] == (0,) * EXPERTS
    for one in stats.times:
        assert 0.0 < one.dense_s + one.expert_s + one.wait_s <= one.total_s * 1.001
    assert stats.first_token_s > 0.0
    assert stats.load_s > 0.0


def test_all_resident_reads_every_expert_once(bundle):
    with DecoderSession.from_bundle(bundle, Settings(ALL)) as session:
        list(session.generate(PROMPT, NEW))
        list(session.generate([1, 2, 3, 4], NEW))
        before = session.stats().cache
        list(session.generate(PROMPT, NEW))
        after = session.stats().cache
    assert before.evictions == after.evictions == after.misses == after.read_bytes == 0


# --- prefetch ------------------------------------------------------------------------------------------


def test_prefetch_that_does_not_pay_stops_and_says_so(bundle, expected):
    settings = Settings(cache_bytes=48 << 10, prefetch_depth=2, prefetch_worth=1.0)
    with DecoderSession.from_bundle(bundle, settings) as session:
        for _ in range(3):
            assert list(session.generate(PROMPT, NEW)) == expected
        cache = session.stats().cache
        assert cache.prefetch_stopped
        assert cache.prefetch_fetched_bytes == 0


@pytest.mark.parametrize("by", ["statistics", "router"])
def test_prefetch_counts_what_it_read_and_what_of_it_was_used(bundle, expected, by):
    settings = Settings(cache_bytes=96 << 10, prefetch_depth=1, prefetch_worth=0.0, prefetch_by=by)
    with DecoderSession.from_bundle(bundle, settings) as session:
        assert list(session.generate(PROMPT, 50))[:NEW] == expected
        cache = session.stats().cache
    assert 0 < cache.prefetch_useful_bytes <= cache.prefetch_fetched_bytes < cache.read_bytes
    assert not cache.prefetch_stopped


# --- where generation ends -----------------------------------------------------------------------------


def test_layers_that_do_not_exist_are_not_prefetched_and_take_no_memory(bundle, expected):
    tracemalloc.start()
    try:
        with DecoderSession.from_bundle(bundle, Settings(40 << 10, prefetch_depth=30_000)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_it_ends_at_length_at_a_stop_and_at_the_end_of_the_context(bundle, expected):
    with DecoderSession.from_bundle(bundle) as session:
        assert list(session.generate(PROMPT, 4)) == expected[:4]
        assert session.stats().stopped_by == "length"
        wanted = expected[5]
        first = expected.index(wanted)
        assert list(session.generate(PROMPT, NEW, stops=lambda token: token == wanted)) == expected[: first + 1]
        assert session.stats().stopped_by == "stop"
        said = list(session.generate(PROMPT, 10_000))
        assert session.stats().stopped_by == "context"
        assert len(PROMPT) + len(said) == CONTEXT + 1
        assert list(session.generate(PROMPT, NEW)) == expected


def test_an_end_token_ends_it(own, expected):
    manifest = DecoderSession.from_bundle(own).manifest
    ending = manifest.model_copy(update={"graph": manifest.graph.model_copy(update={"end_tokens": (expected[3],)})})
    with DecoderSession(own, ending) as session:
        assert list(session.generate(PROMPT, NEW)) == expected[: expected.index(expected[3]) + 1]
        assert session.stats().stopped_by == "end"


def test_leaving_early_is_an_interruption_and_harms_nothing(bundle, expected):
    with DecoderSession.from_bundle(bundle) as session:
        said = session.generate(PROMPT, NEW)
        assert [next(said), next(said)] == expected[:2]
        said.close()
        assert session.stats().stopped_by == "interrupt"
        assert session.stats().tokens == tuple(expected[:2])
        assert list(session.generate(PROMPT, NEW)) == expected


def test_two_generations_at_once_on_one_session_are_refused(bundle):
    with DecoderSession.from_bundle(bundle) as session:
        old = session.generate(PROMPT, NEW)
        next(old)
        next(session.generate(PROMPT, NEW))
        with pytest.raises(DeviceError, match="another generation"):
            next(old)


def test_a_generation_that_another_overtook_says_nothing(bundle, expected):
    with DecoderSession.from_bundle(bundle) as session:
        old = session.generate([1, 2, 3], 1)  # not begun yet: it would be read behind the other's prompt
        assert list(session.generate(PROMPT, NEW)) == expected
        with pytest.raises(DeviceError, match="another generation"):
            next(old)
        assert session.stats().tokens == tuple(expected)


def test_a_session_that_opens_again_knows_nothing_of_before(bundle, expected):
    session = DecoderSession.from_bundle(bundle)
    with session:
        old = session.generate(PROMPT, NEW)
        next(old)
    with session:
        assert session.position == 0
        with pytest.raises(DeviceError, match="nothing was generated"):
            session.stats()
        with pytest.raises(DeviceError, match="closed"):
            next(old)
        assert list(session.generate(PROMPT, NEW, continued=True)) == expected


@pytest.mark.parametrize("second", ["generate", "close", "stats"])
def test_threads_that_share_a_session_wait_for_each_other(bundle, expected, second):
    inside, go_on = threading.Event(), threading.Event()
    heard: list[Any] = []

    def sampler(logits):
        inside.set()
        go_on.wait(20)
        return int(logits.argmax())

    def answer() -> None:
        heard.append(next(said))
        other.join(20)
        if second == "stats":
            heard.append(next(said))
            return
        with pytest.raises(DeviceError, match="another generation"):
            next(said)

    with DecoderSession.from_bundle(bundle, Settings(40 << 10)) as session:
        said = session.generate(PROMPT, NEW, sampler)
        acts = {
            "generate": lambda: heard.append(list(session.generate(PROMPT, NEW))),
            "close": session.close,
            "stats": lambda: heard.append(len(session.stats().tokens)),
        }
        first, other = threading.Thread(target=answer), threading.Thread(target=acts[second])
        first.start()
        assert inside.wait(20)
        other.start()
        other.join(0.2)
        assert other.is_alive()
        assert heard == []
        go_on.set()
        other.join(20)
        first.join(20)
    wanted: dict[str, list[Any]] = {
        "generate": [expected[0], expected],
        "close": expected[:1],
        "stats": [expected[0], 1, expected[1]],
    }
    assert sorted(heard, key=str) == sorted(wanted[second], key=str)


@pytest.fixture
def listening():
    """Hear interrupts; a test run in the background of a shell ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_control_c_between_tokens_keeps_what_was_said(bundle, expected):
    calls = count()

    def sampler(logits):
        if next(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return int(logits.argmax())

    with DecoderSession.from_bundle(bundle) as session:
        assert list(session.generate(PROMPT, NEW, sampler)) == expected[:6]
        stats = session.stats()
        assert (stats.stopped_by, stats.tokens) == ("interrupt", tuple(expected[:6]))
        assert list(session.generate(PROMPT, NEW)) == expected


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("at", [3, 30, 60])
def test_control_c_while_experts_are_read_keeps_what_was_said(bundle, expected, at):
    calls = count()

    def interrupting(descriptor, buffers, offset):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return os.preadv(descriptor, buffers, offset)

    with opened(bundle, Settings(40 << 10), read_into=interrupting) as session:
        said = list(session.generate(PROMPT, NEW))
        assert said == expected[: len(said)] != expected
        assert session.stats().stopped_by == "interrupt"
        assert list(session.generate(PROMPT, NEW)) == expected
        assert session.stats().stopped_by == "length"


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("at", [0, 12])
def test_control_c_while_a_prompt_is_read_leaves_the_conversation_as_it_was(bundle, at):
    more = [5, 6, *PROMPT]  # two chunks
    reads = count()

    def interrupting(descriptor, buffers, offset):
        if armed and next(reads) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return os.preadv(descriptor, buffers, offset)

    armed = False
    with opened(bundle, Settings(40 << 10), read_into=interrupting) as session:
        list(session.generate(PROMPT, 9))
        whole = list(session.generate(more, 12, continued=True))
        list(session.generate(PROMPT, 9))
        armed = True
        assert list(session.generate(more, 12, continued=True)) == []
        assert session.stats().stopped_by == "interrupt"
        assert session.position == len(PROMPT) + 8
        session.generate([1, 2], 3, continued=True).close()  # nor does one that was never begun
        assert list(session.generate(more, 12, continued=True)) == whole


# --- faults --------------------------------------------------------------------------------------------


def opened(folder: Path, settings: Settings | None = None, **mover: Any) -> DecoderSession:
    manifest = DecoderSession.from_bundle(folder).manifest
    return DecoderSession(folder, manifest, settings, mover=partial(Mover, **mover))


def test_a_read_error_in_the_background_is_told_and_the_session_lives_on(bundle, expected):
    calls = count()

    def failing(descriptor, buffers, offset):
        if next(calls) == 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    with opened(bundle, Settings(40 << 10), read_into=failing) as session:
        with pytest.raises(DeviceError, match=r"layer-00\d\.bin: reading layers\.\d\.experts\.\d failed"):
            list(session.generate(PROMPT, NEW))
        assert list(session.generate(PROMPT, NEW)) == expected


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "of another", "missing"])
def test_a_packed_expert_that_is_damaged_while_running_is_never_used(own, fault, depth):
    settings = Settings(40 << 10, prefetch_depth=depth)
    with DecoderSession.from_bundle(own, settings) as session:
        path = session.store.folder / "layer-002.bin"
        raw = bytearray(path.read_bytes())
        if fault == "flipped":
            for record in (one.record for key, one in session.store.experts.items() if key[0] == 2):
                raw[record.offset + 100] ^= 1
            path.write_bytes(raw)
        elif fault == "truncated":
            os.truncate(path, 4096)
        elif fault == "of another":
            shutil.copy(session.store.folder / "layer-003.bin", path)
        else:
            path.unlink()
        with pytest.raises(BundleError, match=r"layer-002\.bin"):
            list(session.generate(PROMPT, NEW))


@pytest.mark.parametrize("depth", [0, 1])
def test_experts_that_change_after_they_were_checked_are_never_used(own, expected, depth):
    with DecoderSession.from_bundle(own, Settings(40 << 10, prefetch_depth=depth)) as session:
        assert list(session.generate(PROMPT, NEW)) == expected
        files = {expert.record.file: expert.record.file.read_bytes() for expert in session.store.experts.values()}
        for path, raw in files.items():
            path.write_bytes(bytes(byte ^ (place % 97 == 5) for place, byte in enumerate(raw)))
        with pytest.raises(BundleError, match="SHA-256 differs"):
            list(session.generate(PROMPT, NEW))
        for path, raw in files.items():
            path.write_bytes(raw)
        assert list(session.generate(PROMPT, NEW)) == expected


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing"])
def test_damaged_dense_weights_are_found_at_load(own, fault):
    with DecoderSession.from_bundle(own) as session:
        path = session.store.folder / "dense.bin"
    if fault == "flipped":
        raw = bytearray(path.read_bytes())
        raw[5000] ^= 1
        path.write_bytes(raw)
    elif fault == "truncated":
        os.truncate(path, 4096)
    else:
        path.unlink()
    with pytest.raises(BundleError, match=r"dense\.bin"), DecoderSession.from_bundle(own):
        pass


@pytest.mark.parametrize("fault", ["flipped", "truncated", "of another", "missing"])
def test_a_damaged_expert_of_the_bundle_is_found_at_load(own, fault):
    path = own / "weights/layers.3/expert.4.ptd"
    raw = bytearray(path.read_bytes())
    if fault == "flipped":
        raw[-1] ^= 128
        path.write_bytes(raw)
    elif fault == "truncated":
        path.write_bytes(raw[:-64])
    elif fault == "of another":
        shutil.copy(own / "weights/layers.3/expert.5.ptd", path)
    else:
        path.unlink()
    with pytest.raises(BundleError, match=r"expert\.4\.ptd"), DecoderSession.from_bundle(own):
        pass


def test_prompts_that_cannot_be_answered_are_refused_before_anything_runs(bundle):
    with DecoderSession.from_bundle(bundle, Settings(record=True)) as session:
        for prompt, said in (
            ([], "empty"),
            ([1] * (CONTEXT + 1), f"context holds {CONTEXT}"),
            ([VOCABULARY], f"token {VOCABULARY} does not exist"),
            ([-1], "token -1"),
        ):
            with pytest.raises(InputError, match=said):
                session.generate(prompt, 5)
        with pytest.raises(InputError, match="2 faults"):
            session.generate([], 0)
        with pytest.raises(InputError, match="no event"):
            session.trace()
        with pytest.raises(DeviceError, match="nothing was generated"):
            session.stats()
        assert len(list(session.generate([1] * CONTEXT, 5))) == 1
        assert session.stats().stopped_by == "context"


def test_a_continued_prompt_that_runs_over_the_context_is_refused(bundle):
    with DecoderSession.from_bundle(bundle) as session:
        list(session.generate(PROMPT, NEW))
        with pytest.raises(InputError, match="context holds"):
            session.generate([1] * 40, 5, continued=True)


def test_a_cache_below_one_expert_is_refused(bundle):
    for cache_bytes in (0, 4096, largest(bundle) - 1):
        with (
            pytest.raises(InputError, match="does not hold the largest expert"),
            DecoderSession.from_bundle(bundle, Settings(cache_bytes)),
        ):
            pass


def test_impossible_settings_stand_in_one_error(bundle):
    with pytest.raises(InputError, match="4 faults"):
        DecoderSession.from_bundle(bundle, Settings(threads=0, prefetch_depth=-1, context_tokens=1, chunk_tokens=0))
    # before anything is packed: that takes minutes with a large decoder
    with pytest.raises(InputError, match=r"(?s)2 faults.*policy 'best' is unknown"):
        DecoderSession.from_bundle(bundle, Settings(policy="best", threads=0))
    with pytest.raises(InputError, match="no order of worth"):
        DecoderSession.from_bundle(bundle, Settings(policy="static"))
    with pytest.raises(InputError, match=r"policy 'reuse' is unknown"):  # which foretells for a device
        DecoderSession.from_bundle(bundle, Settings(policy="reuse"))


def test_a_closed_session_says_so(bundle):
    session = DecoderSession.from_bundle(bundle)
    for call in (lambda: session.generate(PROMPT, 1), session.stats, session.trace, lambda: session.store):
        with pytest.raises(DeviceError, match="closed"):
            call()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema_version": 1}', None])
def test_a_manifest_that_is_none_is_a_damaged_bundle(own, damage):
    if damage is None:
        (own / "manifest.json").unlink()
    else:
        (own / "manifest.json").write_bytes(damage)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        DecoderSession.from_bundle(own)
    with pytest.raises(InputError, match="not a folder"):
        DecoderSession.from_bundle(own / "absent")


def test_text_without_a_tokenizer_is_refused(bundle):
    with DecoderSession.from_bundle(bundle) as session, pytest.raises(BundleError, match="no tokenizer"):
        list(stream_text(session, "hello", 3))


def test_text_is_streamed_and_ends_before_a_stop_string_over_tokens(bundle, expected):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    prompt = tokenizer.decode(PROMPT)
    assert tokenizer.encode(prompt).ids == PROMPT
    whole = tokenizer.decode(expected)
    with DecoderSession.from_bundle(bundle) as session:
        assert "".join(stream_text(session, prompt, NEW, tokenizer=tokenizer)) == whole
        assert session.stats().tokens == tuple(expected)
        stop = whole[9:12]
        pieces = list(stream_text(session, prompt, NEW, stops=[stop], tokenizer=tokenizer))
        assert "".join(pieces) == whole[: whole.index(stop)]
        assert session.stats().stopped_by == "stop"
        assert len(session.stats().tokens) == whole.index(stop) + len(stop)
        with pytest.raises(InputError, match="empty"):
            list(stream_text(session, "", NEW, tokenizer=tokenizer))


# --- the process ---------------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_running_a_decoder_loads_neither_torch_nor_executorch(bundle, expected):
    code = """
import sys
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
with DecoderSession.from_bundle(sys.argv[1], Settings(cache_bytes=40 << 10)) as session:
    print(list(session.generate([int(one) for one in sys.argv[2].split(",")], int(sys.argv[3]))))
    session.stats()
heavy = {"torch", "torchao", "executorch", "scipy", "matplotlib", "transformers"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    assert python(code, str(bundle), ",".join(map(str, PROMPT)), str(NEW)) == str(expected)


def test_64_open_files_are_enough_for_a_hundred_layers(tmp_path):
    folder = write_tiny_bundle(tmp_path / "deep", graph=tiny_graph(layers=100, experts=3, dense_first=False))
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
with DecoderSession.from_bundle(sys.argv[1], Settings(cache_bytes=200 << 10)) as session:
    print(len(list(session.generate([1, 2, 3], 4))))
"""
    assert python(code, str(folder)) == "4"
