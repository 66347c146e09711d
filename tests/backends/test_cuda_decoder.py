"""A decoder on a device: tiers and schedules, no byte above the plan, and no fault unseen.

The processor stands in for the device, so that all but streams is what runs on a GPU.
``tests/contracts/test_decoder_engines.py`` has what every engine keeps.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import BundleError, DeviceError, InputError, MissingDependencyError
from edgeflex.progress import Silent
from edgeflex.runtimes import cuda_driver
from edgeflex.runtimes.cuda_experts import LANDING_EXPERTS, RULES
from edgeflex.runtimes.cuda_host import NativeExperts, TorchExperts, open_host
from edgeflex.runtimes.cuda_streams import HostMemory, HostStreams
from edgeflex.runtimes.cuda_weights import Shape, feed_forward, open_experts, restored, run_expert
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_bench import verify_decoder
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.movers import Mover
from edgeflex.runtimes.native import RawExperts, RawMatrix
from edgeflex.runtimes.tiers import tier_replay
from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import dequantize, quantize_matrix
from tests.device_streams import CountingStreams
from tests.engine_samples import (
    ALL,
    CUDA,
    EVEN,
    NATIVE,
    NEW,
    ORDER,
    PROMPT,
    Lab,
    expert_sizes,
    fixed_bytes,
    forced_logits,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(bundles) -> Path:
    """The bundle with experts of two precisions, and so of two sizes."""
    folder: Path = bundles.mixed(CUDA)
    return folder


@pytest.fixture(scope="module")
def expected(bundles) -> list[int]:
    said: list[int] = bundles.said(CUDA)
    return said


@pytest.fixture
def own(bundle, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    folder: Path = tmp_path / "own"
    shutil.copytree(bundle, folder)
    return folder


def settings(folder: Path, tiers: tuple[int, int], *, parts: Any = None, **more: Any) -> Settings:
    given = {"curves": EVEN} if parts is None else {"curves": EVEN, **parts}
    return Settings(
        cache_bytes=tiers[1],
        device="cpu-torch",
        vram_bytes=fixed_bytes(folder) + tiers[0],
        device_parts=given,
        **more,
    )


def tiers_of(folder: Path) -> list[tuple[int, int]]:
    """Return (device, processor) bytes for experts: copies kept, experts exchanged, no RAM tier; small to all."""
    one, total = expert_sizes(folder)
    return [
        (one, 0),
        (one, total),
        (2 * one, 4 * one),
        (3 * one + 4096, 3 * one),  # not enough for copies: the tiers hold different experts
        (total // 2, one),
        (total // 2, total // 2),
        (total - 4096, 0),
        (total, total),
        (ALL, ALL),
    ]


# --- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32])
def test_restored_numbers_are_the_definitions_to_the_last_bit(precision):
    draw = np.random.default_rng(0)
    stored = [quantize_matrix(draw.normal(size=(24, 64)).astype(np.float32), precision) for _ in range(3)]
    codes = [np.frombuffer(one.codes.tobytes(), np.uint8) for one in stored]
    scales = [np.frombuffer(b"" if one.scales is None else one.scales.tobytes(), np.uint8) for one in stored]
    data = torch.from_numpy(np.stack([np.concatenate(pair) for pair in zip(codes, scales, strict=True)]))
    shape = Shape(precision, 24, 64, 0, codes[0].size)
    found = restored(data, shape, torch.float32)
    assert found.scales is None
    assert np.array_equal(found.values.numpy(), np.stack([dequantize(one) for one in stored]))
    rows = torch.from_numpy(draw.normal(size=(3, 64)).astype(np.float32))
    wanted = np.stack([dequantize(one) @ row for one, row in zip(stored, rows.numpy(), strict=True)])
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        out = restored(data, shape, dtype).each(rows).numpy()
        assert np.abs(out - wanted).max() < limit * np.abs(wanted).max()


def test_experts_of_a_prompt_in_one_kernel_are_those_one_by_one():
    draw = np.random.default_rng(1)
    stored = [quantize_matrix(draw.normal(size=(32, 64)).astype(np.float32), Precision.INT8_DYNAMIC) for _ in range(3)]
    raw = [np.frombuffer(one.codes.tobytes() + np.asarray(one.scales).tobytes(), np.uint8) for one in stored]
    weight = restored(
        torch.from_numpy(np.stack(raw)), Shape(Precision.INT8_DYNAMIC, 32, 64, 0, 32 * 64), torch.bfloat16
    )
    rows = torch.from_numpy(draw.normal(size=(10, 64)).astype(np.float32))
    ends, owners = torch.tensor([2, 3, 10], dtype=torch.int32), torch.tensor([0, 0, 1, *[2] * 7])
    together = weight.grouped(rows, ends, owners)
    apart = torch.cat([weight.one(index)(rows[owners == index]) for index in range(3)])
    assert torch.allclose(together, apart, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))


def test_the_processor_computes_what_the_device_does(bundle):
    store, kinds = open_experts(bundle, open_decoder_bundle(bundle).manifest)
    draw = np.random.default_rng(2)
    host = open_host(1, Silent())
    assert isinstance(host, NativeExperts)
    try:
        for key in ((1, 0), (1, 1), (1, 2)):
            record = np.fromfile(store.experts[key].record.file, np.uint8)
            for rows in (1, 2, 7):
                given = draw.normal(size=(rows, 64)).astype(np.float32)
                wanted = run_expert(
                    torch.from_numpy(record), kinds[key], torch.from_numpy(given), torch.float32
                ).numpy()
                for computes in (host, TorchExperts()):
                    found = computes(kinds[key], record, given)
                    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    finally:
        host.close()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 32), (96, 160), (320, 64)])
def test_native_kernels_give_the_definitions_numbers_for_any_rows_and_threads(precision, hidden, inner):
    draw = np.random.default_rng(hidden)
    stored = [
        quantize_matrix((draw.normal(size=size) / 8).astype(np.float32), precision)
        for size in ((2 * inner, hidden), (hidden, inner))
    ]
    first, second = (
        RawMatrix(
            precision,
            one.rows,
            one.columns,
            one.codes.reshape(-1).view(np.uint8),
            np.empty(0, np.uint8) if one.scales is None else one.scales.reshape(-1).view(np.uint8),
        )
        for one in stored
    )
    gate_up, down = (dequantize(one).astype(np.float64) for one in stored)
    alone, both = RawExperts(1), RawExperts(2)
    for rows in (1, 3, 4, 9):
        given = draw.normal(size=(rows, hidden)).astype(np.float32)
        gate, up = np.split(given @ gate_up.T, 2, axis=1)
        wanted = (gate / (1 + np.exp(-gate)) * up) @ down.T
        found = alone(first, second, given)
        assert np.abs(found - wanted).max() < 3e-6 * np.abs(wanted).max()
        assert np.array_equal(both(first, second, given), found)
        assert np.array_equal(np.concatenate([alone(first, second, row[None]) for row in given]), found)
    with pytest.raises(InputError, match="shapes do not fit"):
        alone(first, second, np.zeros((1, hidden + 1), np.float32))
    with pytest.raises(InputError, match="bytes of"):
        alone(first._replace(codes=first.codes[:-4]), second, np.zeros((1, hidden), np.float32))
    for one in (alone, both):
        one.close()
        one.close()
    with pytest.raises(InputError, match="closed"):
        alone(first, second, np.zeros((1, hidden), np.float32))


def test_without_native_kernels_pytorch_computes_and_says_so(monkeypatch):
    def refuse(threads: int) -> Any:
        raise MissingDependencyError("ExecuTorch is not installed. Install it: pip install executorch")

    monkeypatch.setattr("edgeflex.runtimes.cuda_host.NativeExperts", refuse)
    heard = Hearing()
    assert isinstance(open_host(1, heard), TorchExperts)
    assert "through PyTorch" in heard.notes[0]


# --- tokens --------------------------------------------------------------------------------------------


def test_fp32_says_what_the_reference_says_in_all_tiers_by_all_rules(bundles):
    for folder, rules in ((bundles.exact(CUDA), RULES), (bundles.exact(NATIVE), ("auto",))):
        for rule in rules:
            for tiers in tiers_of(folder)[::2]:
                with DecoderSession.from_bundle(folder, settings(folder, tiers, device_rule=rule)) as session:
                    assert list(session.generate(PROMPT, NEW)) == bundles.exactly_said()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", ["reuse", "enu", "lru"])
def test_tokens_are_the_same_in_all_sizes_of_tiers(bundle, expected, rule, policy):
    for tiers in tiers_of(bundle) if policy == "reuse" else tiers_of(bundle)[2:5]:
        chosen = settings(bundle, tiers, policy=policy, device_rule=rule)
        with DecoderSession.from_bundle(bundle, chosen) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
            assert list(session.generate(PROMPT, NEW)) == expected
            cache = session.stats().cache
            assert cache.peak_bytes <= cache.capacity_bytes <= max(tiers[0], expert_sizes(bundle)[0])


def test_a_bundle_for_executorch_is_read_as_it_lies(bundles, expected, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles.mixed(NATIVE), folder, ignore=shutil.ignore_patterns("packed-*"))
    for tiers in tiers_of(folder)[:4]:
        with DecoderSession.from_bundle(folder, settings(folder, tiers)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
    assert not list(folder.glob("packed-*"))


def test_logits_in_bf16_stay_near_the_references(bundle, bundles):
    # a random router has near ties, and where one falls the other way a token's logits are another expert's
    tokens = [*PROMPT, *range(20)]
    wanted = bundles.rounded().logits(torch.tensor([tokens]))[0].numpy()
    chosen = settings(bundle, tiers_of(bundle)[2], device_precision="bf16")
    found = forced_logits(DecoderSession.from_bundle(bundle, chosen), tokens)
    assert np.median(np.abs(found - wanted)) < 0.02 * np.abs(wanted).max()
    assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.8


# --- tiers ---------------------------------------------------------------------------------------------


def test_the_simulator_counts_what_the_device_did(bundle):
    for tiers in tiers_of(bundle):
        chosen = settings(bundle, tiers, device_rule="upload", policy="enu", record=True)
        with DecoderSession.from_bundle(bundle, chosen) as session:
            list(session.generate(PROMPT, NEW))
            list(session.generate([4, 5, 6], 10, continued=True))
            done, trace, sizes = session.device_stats(), session.trace(), session.store.sizes
        told = tier_replay(trace, done.vram_bytes, done.ram_bytes, "enu", exclusive=done.exclusive, sizes=sizes)
        assert (told.decoding, told.prompts) == (done.decoding, done.prompts)


def test_the_quickest_mix_uses_both_ways_and_the_rules_only_theirs(bundle):
    tiers, done = tiers_of(bundle)[2], {}
    for rule in RULES:
        chosen = settings(bundle, tiers, device_rule=rule, policy="static", static=ORDER)
        with DecoderSession.from_bundle(bundle, chosen) as session:
            list(session.generate(PROMPT, NEW))
            done[rule] = session.device_stats()
    assert done["auto"].host_experts > 0 < done["auto"].decoding.uploads
    assert done["upload"].host_experts == 0
    for rule in ("cpu", "static"):
        assert done[rule].decoding.uploads == done[rule].prompts.uploads == 0 < done[rule].host_experts
    assert done["static"].decoding.gpu_hits > 0, "a fixed placement is filled before the first event"


def test_copies_are_made_ahead_of_events_and_fill_the_device(bundle, expected):
    one, total = expert_sizes(bundle)
    dear = replace(EVEN, link_bytes_per_s=1e9, link_latency_s=2e-3)  # dearer than the processor: no event uploads
    for held in (2 * one, total // 2, total):
        chosen = settings(bundle, (held, total), parts={"curves": dear})
        with DecoderSession.from_bundle(bundle, chosen) as session:
            for _ in range(2):
                assert list(session.generate(PROMPT, NEW)) == expected
            done = session.device_stats()
        assert done.copied_ahead > 0
        assert done.decoding.gpu_hits > 0


def test_static_order_fills_tiers_that_hold_different_experts(bundle, expected):
    for tiers in tiers_of(bundle)[3:6]:
        chosen = settings(bundle, tiers, device_rule="static", policy="static", static=ORDER)
        with DecoderSession.from_bundle(bundle, chosen) as session:
            assert list(session.generate(PROMPT, NEW)) == expected


def test_predictions_are_kept_beside_what_was_measured(bundle):
    with DecoderSession.from_bundle(bundle, settings(bundle, tiers_of(bundle)[2], parts={"curves": None})) as session:
        list(session.generate(PROMPT, NEW))
        done = session.device_stats()
    assert done.predicted_s > 0
    assert sum(done.errors[one].samples for one in ("gpu", "cpu", "link")) > 0


def test_the_device_holds_no_more_than_was_planned(bundle, expected):
    for tiers in tiers_of(bundle)[:7]:
        streams = CountingStreams()
        chosen = settings(bundle, tiers, parts={"streams": streams})
        with DecoderSession.from_bundle(bundle, chosen) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
            assert streams.most_bytes <= fixed_bytes(bundle) + tiers[0]
            done = session.device_stats()
            assert done.vram_bytes <= tiers[0]
            assert done.peak_bytes == streams.most_bytes
            assert done.fixed_bytes + done.vram_bytes <= (done.requested_bytes or 0)
        assert streams.held_bytes == 0


# --- faults --------------------------------------------------------------------------------------------


def test_an_allocation_refused_anywhere_leaves_nothing_behind(bundle):
    probe = CountingStreams()
    with DecoderSession.from_bundle(bundle, settings(bundle, tiers_of(bundle)[2], parts={"streams": probe})):
        pass
    for refused in range(next(probe.taken)):
        streams = CountingStreams(refused)
        chosen = settings(bundle, tiers_of(bundle)[2], parts={"streams": streams})
        with pytest.raises(DeviceError, match="out of memory"), DecoderSession.from_bundle(bundle, chosen):
            pass
        assert streams.held_bytes == 0
        assert streams.closed


@pytest.mark.parametrize("failing", [0, 3, 11])
def test_a_failed_copy_is_told_and_the_session_lives_on(bundle, expected, failing):
    streams = CountingStreams(failing=failing)
    chosen = settings(bundle, (2 * expert_sizes(bundle)[0], ALL), parts={"streams": streams}, device_rule="upload")
    with DecoderSession.from_bundle(bundle, chosen) as session:
        said: list[int] = []
        with pytest.raises(DeviceError, match="illegal memory access") as caught:
            said.extend(session.generate(PROMPT, NEW))
        assert "more lines" not in str(caught.value)
        assert said == expected[: len(said)]
        with pytest.raises(DeviceError, match="broken off"):
            session.device_stats()
        assert list(session.generate(PROMPT, NEW)) == expected


def said_into(said: list[int]) -> Any:
    """Return a greedy sampler that notes what it says."""

    def choose(row: Any) -> int:
        said.append(int(row.argmax()))
        return said[-1]

    return choose


def test_a_lost_device_says_so_each_time_and_never_a_wrong_token(bundle, expected):
    for lost in (0, 5, 40):
        streams = CountingStreams(lost=lost)
        chosen = settings(bundle, tiers_of(bundle)[0], parts={"streams": streams})
        with DecoderSession.from_bundle(bundle, chosen) as session:
            for _ in range(2):
                said: list[int] = []
                with pytest.raises(DeviceError, match="launch failure"):
                    list(session.generate(PROMPT, NEW, said_into(said)))
                assert said == expected[: len(said)]


class Unpinned(HostStreams):
    """A device whose driver pins nothing."""

    def host(self, size_bytes: int) -> HostMemory:
        return super().host(size_bytes)._replace(problem="cudaHostRegister gave error 2")


class Hearing:
    """Keeps what progress is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def task(self, title: str, total: int) -> Any:
        return Silent().task(title, total)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_memory_that_is_not_pinned_is_told_and_works(bundle, expected):
    heard = Hearing()
    chosen = settings(bundle, tiers_of(bundle)[2], parts={"streams": Unpinned()})
    with DecoderSession.from_bundle(bundle, chosen, progress=heard) as session:
        assert list(session.generate(PROMPT, NEW)) == expected
        assert not session.device_stats().pinned
    assert len(heard.notes) == 1
    assert "not pinned (cudaHostRegister gave error 2)" in heard.notes[0]


@pytest.mark.parametrize("tiers", [0, 2, 3])
def test_a_read_error_is_told_and_the_session_lives_on(bundle, expected, tiers):
    calls = count()

    def failing(descriptor, buffers, offset):
        if next(calls) == 9:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    manifest = open_decoder_bundle(bundle).manifest
    chosen, mover = settings(bundle, tiers_of(bundle)[tiers]), partial(Mover, read_into=failing)
    with DecoderSession(bundle, manifest, chosen, mover=mover) as session:
        with pytest.raises(DeviceError, match=r"reading layers\.\d\.experts\.\d failed"):
            list(session.generate(PROMPT, NEW))
        assert list(session.generate(PROMPT, NEW)) == expected


def test_damaged_dense_parts_are_found_at_load(own):
    manifest = open_decoder_bundle(own).manifest
    chosen = settings(own, tiers_of(own)[2])
    for file in {one.file for one in manifest.matrices if ".experts." not in one.name}:
        raw = (own / file).read_bytes()
        (own / file).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(BundleError, match=Path(file).name), DecoderSession(own, manifest, chosen):
            pass
        (own / file).write_bytes(raw)


def test_what_cannot_be_is_refused(bundle):
    one, _ = expert_sizes(bundle)
    for changes, kind, said in (
        ({"device": "gpu"}, InputError, "'gpu' is unknown"),
        ({"device_rule": "guess"}, InputError, "rule 'guess'"),
        ({"device_precision": "fp8"}, InputError, "'fp8'"),
        ({"vram_bytes": 0}, InputError, "0 bytes of the device"),
        ({"vram_bytes": fixed_bytes(bundle) + one - 4096}, DeviceError, "the largest takes"),
        ({"policy": "best"}, InputError, "'best'"),
    ):
        chosen = Settings(**{**vars(settings(bundle, tiers_of(bundle)[2])), **changes})
        with pytest.raises(kind, match=said), DecoderSession.from_bundle(bundle, chosen):
            pass


def test_numbers_of_a_device_are_asked_of_one_only(bundle):
    with DecoderSession.from_bundle(bundle) as session, pytest.raises(DeviceError, match="on the processor"):
        session.device_stats()


def test_without_a_gpu_cuda_is_refused_in_one_line(bundle):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with (
        pytest.raises(DeviceError, match="reaches no CUDA device"),
        DecoderSession.from_bundle(bundle, Settings(device="cuda")),
    ):
        pass


def test_verify_refuses_an_impossible_place_before_it_reads_a_file(bundle, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr("edgeflex.bundle_moe.sha256_file", read.append)
    monkeypatch.setattr(cuda_driver, "_load", lambda: None)
    for chosen, kind, said in (
        (Settings(vram_bytes=1 << 30), InputError, "--device cuda"),
        (Settings(threads=0), InputError, "0 threads"),
        (Settings(device="cuda"), DeviceError, "no CUDA device to answer on: no NVIDIA driver"),
    ):
        with pytest.raises(kind, match=said):
            verify_decoder(bundle, settings=chosen)
    assert read == []


# --- the engine by itself ------------------------------------------------------------------------------


@pytest.fixture
def loaded(bundles, monkeypatch):
    lab = Lab(CUDA, bundles, monkeypatch)
    with lab.loaded(lab.mixed()) as made:
        yield made


def test_an_event_is_computed_in_any_order_and_place(loaded):
    made = loaded.engine

    def logits(order) -> Any:
        waiting = made.forward(np.array(PROMPT[:8], np.int32), 0)
        while waiting is not None:
            order(waiting)
            waiting = made.resume()
        made.memory.forget()
        loaded.bind_all()
        return made.logits()

    def all_there(waiting) -> None:
        for expert in waiting.experts:
            loaded.bring((waiting.layer, expert))

    def half_on_host(waiting) -> None:
        made.compute_on_host(waiting.experts[::2])
        for expert in waiting.experts[1::2]:
            loaded.bring((waiting.layer, expert))

    wanted = logits(all_there)
    assert np.abs(logits(half_on_host) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.array_equal(logits(all_there), wanted)


def test_experts_are_refused_where_they_do_not_lie(loaded):
    made, fence = loaded.engine, loaded.engine.streams.fence()
    precision, offset = loaded.place((1, 0))
    for wrong in ((precision, offset + 64), (Precision.FP32, offset)):
        with pytest.raises(InputError):
            made.bind(1, 0, *wrong)
    made.unbind(1, 0)
    for call in (
        lambda: made.memory.upload(1, 0, 0, fence),
        lambda: made.memory.slide(1, 0, 0),
        lambda: made.memory.fetch(1, 0),
        lambda: made.memory.host_record(1, 0),
    ):
        with pytest.raises(InputError, match=r"not (in|on) the"):
            call()
    for key in loaded.keys:
        made.unbind(*key)
    waiting = made.forward(np.array([1], np.int32), 0)
    for call in (made.compute, made.compute_on_host):
        with pytest.raises(InputError, match="not in the event or not where"):
            call(waiting.experts)


def test_reads_land_two_by_two_where_no_ram_tier_is():
    assert LANDING_EXPERTS >= 4


def test_silu_times_the_upper_half():
    given = torch.tensor([[0.0, 2.0, 3.0, 5.0]])
    wanted = [0.0, 2.0 / (1.0 + np.exp(-2.0)) * 5.0]
    assert feed_forward(given)[0].tolist() == pytest.approx(wanted)
