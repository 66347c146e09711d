"""One missing expert of an event computed by device and processor together: slices, tokens, bytes and faults.

The processor stands in for the device, so that all but streams is what runs on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import DeviceError, InputError
from edgeflex.exporters.decoder import export_decoder
from edgeflex.exporters.decoder_files import BundleWeights
from edgeflex.exporters.onnx_decoder import export_onnx_decoder
from edgeflex.models.decoder_reference import Reference
from edgeflex.runtimes.ahead_time import event_time
from edgeflex.runtimes.cuda_curves import measure_part_s
from edgeflex.runtimes.cuda_decoder import DeviceEngine
from edgeflex.runtimes.cuda_host import NativeExperts, TorchExperts
from edgeflex.runtimes.cuda_memory import device_bytes
from edgeflex.runtimes.cuda_slices import arrange, first_slices, rest_of, sliced
from edgeflex.runtimes.cuda_streams import HostStreams
from edgeflex.runtimes.cuda_weights import Kind, Shape, open_experts, restored, run_expert
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.division import Divider, copied_share, slices_of
from edgeflex.runtimes.schedule import Active, Scheduler
from edgeflex.runtimes.timeline import cost_of
from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import StoredMatrix, dequantize, quantize_matrix
from tests.device_streams import CountingStreams
from tests.random_decoder import RandomSource, exact_plan, mixed_plan
from tests.tiny_decoder import EXPERTS, LAYERS, tiny_graph

if TYPE_CHECKING:
    from pathlib import Path

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
INNER = 1536  # twelve slices
PROMPT = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30]  # a chunk of 8 and one of 3
NEW = 24
ALL = 1 << 30


pytestmark = pytest.mark.usefixtures("one_thread")  # of tests/conftest.py


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Any:
    graph = tiny_graph()
    layers = [one if one.routing is None else one.model_copy(update={"expert_dim": INNER}) for one in graph.layers]
    return RandomSource(graph.model_copy(update={"layers": tuple(layers)}), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exact(source, tmp_path_factory) -> Path:
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
    return Reference(source, BundleWeights(bundle, open_decoder_bundle(bundle).manifest.matrices, source))


@pytest.fixture(scope="module")
def expected(rounded) -> list[int]:
    return list(rounded.generate(PROMPT, NEW))


# --- slices ----------------------------------------------------------------------------------------------


@cache
def stored_expert(precision: Precision, hidden: int, inner: int) -> tuple[np.ndarray, Kind, list[StoredMatrix]]:
    """Return a record as files have it, with gaps and a head, its kind, and its matrices."""
    draw = np.random.default_rng(inner)
    matrices = [
        quantize_matrix((draw.normal(size=size) / 8).astype(np.float32), precision)
        for size in ((2 * inner, hidden), (hidden, inner))
    ]
    places: list[int] = []
    data = b"front" * 40
    for one in matrices:
        for piece in (one.codes, one.scales):
            data += bytes(-len(data) % 128)
            places.append(len(data) if piece is not None else 0)
            data += b"" if piece is None else piece.tobytes()
    data += bytes(-len(data) % 4096)
    shapes = [
        Shape(precision, one.rows, one.columns, codes, scales)
        for one, (codes, scales) in zip(matrices, (places[:2], places[2:]), strict=True)
    ]
    return np.frombuffer(bytearray(data), np.uint8), Kind(shapes[0], shapes[1], len(data)), matrices


def arranged(precision: Precision, hidden: int, inner: int) -> tuple[np.ndarray, Kind, np.ndarray, Kind]:
    record, kind, _ = stored_expert(precision, hidden, inner)
    made, wanted = record.copy(), sliced(kind)
    arrange(made, kind, wanted)
    return made, wanted, record, kind


@pytest.mark.parametrize("precision", [FP32, INT8, INT4])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 384), (96, 512), (32, 1408)])
def test_a_record_in_slices_holds_the_very_numbers(precision, hidden, inner):
    made, wanted, _, _ = arranged(precision, hidden, inner)
    assert wanted.down.slices == slices_of(inner) > 1
    matrices = stored_expert(precision, hidden, inner)[2]
    several = torch.from_numpy(np.stack([made, made]))
    for shape, matrix in zip((wanted.gate_up, wanted.down), matrices, strict=True):
        found = restored(torch.from_numpy(made), shape, torch.float32)
        assert found.scales is None
        assert np.array_equal(found.values.numpy(), dequantize(matrix))
        for dtype in (torch.float32, torch.bfloat16):
            whole = restored(several, shape, dtype)
            assert whole.values.shape == (2, shape.rows, shape.columns)
            last = whole.one(1)
            one = last.values.float() if last.scales is None else last.values.float() * last.scales[:, None]
            assert np.allclose(one.numpy(), dequantize(matrix), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("precision", [FP32, INT8, INT4])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 384), (32, 1408)])
def test_processor_and_device_compute_an_expert_in_slices_as_one_whole(precision, hidden, inner):
    made, wanted, record, kind = arranged(precision, hidden, inner)
    given_rows = np.random.default_rng(1).normal(size=(5, hidden)).astype(np.float32)
    native = NativeExperts(1)
    both = NativeExperts(2)
    try:
        whole = native(kind, record, given_rows)
        assert np.array_equal(native(wanted, made, given_rows), whole)  # the order of sums is the same
        assert np.array_equal(both(wanted, made, given_rows), whole)
        assert np.array_equal(native(wanted, made, given_rows[:1]), whole[:1])
        other = run_expert(torch.from_numpy(made), wanted, torch.from_numpy(given_rows), torch.float32).numpy()
        assert np.abs(other - whole).max() < 1e-5 * np.abs(whole).max()
    finally:
        native.close()
        both.close()


@tries(deadline=None, max_examples=40)
@given(
    st.sampled_from([FP32, INT8, INT4]),
    st.sampled_from([(64, 384), (96, 512), (32, 1408)]),
    st.integers(1, 15),
    st.integers(1, 5),
)
def test_the_parts_of_every_share_add_up_to_the_whole(precision, shape, number, rows):
    made, wanted, record, kind = arranged(precision, *shape)
    share = 1 + number % (wanted.down.slices - 1)
    first, rest = first_slices(wanted, share), rest_of(wanted, share)
    given_rows = np.random.default_rng(rows).normal(size=(rows, shape[0])).astype(np.float32)
    copied = torch.from_numpy(made[: first.size_bytes].copy())
    assert first.size_bytes <= copied_share(share / wanted.down.slices) * kind.size_bytes
    whole = TorchExperts()(kind, record, given_rows)
    on_device = run_expert(copied, first, torch.from_numpy(given_rows), torch.float32).numpy()
    native = NativeExperts(1)
    try:
        for on_host in (native(rest, made, given_rows), TorchExperts()(rest, made, given_rows)):
            assert np.abs(on_device + on_host - whole).max() < 1e-5 * np.abs(whole).max()
            assert np.abs(on_device - whole).max() > 1e-3 * np.abs(whole).max()  # it is a part
    finally:
        native.close()


def test_experts_that_have_no_equal_slices_stay_whole():
    assert [slices_of(inner) for inner in (32, 48, 64, 384, 512, 704, 736, 768, 1408, 2880, 14336)] == [
        *(1, 1, 1, 3, 4, 2, 1, 6, 11, 15, 16)
    ]
    for precision, inner in ((FP32, 48), (INT8, 48), (INT8, 256), (INT4, 32)):
        record, kind, _ = stored_expert(precision, 64, inner)
        assert sliced(kind) is kind  # where scales of down would be no small part of a share, too
        made = record.copy()
        arrange(made, kind, kind)
        assert np.array_equal(made, record)


def test_a_kernel_reads_no_byte_that_is_not_given():
    made, wanted, _, _ = arranged(INT4, 64, 384)
    native = NativeExperts(1)
    row = np.zeros((1, 64), np.float32)
    used = wanted.gate_up.offset + wanted.gate_up.pitch * wanted.gate_up.slices
    try:
        native(wanted, made[:used], row)
        with pytest.raises(InputError, match="bytes of"):
            native(wanted, made[: used - 4], row)
        odd = wanted._replace(down=wanted.down._replace(slices=5))
        with pytest.raises(InputError, match="shapes do not fit"):
            native(odd, made, row)
    finally:
        native.close()


def test_what_a_part_costs_is_measured():
    made, wanted, _, _ = arranged(INT8, 64, 384)
    del made
    host, curves = TorchExperts(), Curves(gpu=Curve(((1, 0.0),)), cpu=Curve(((1, 0.0),)), link_bytes_per_s=1e9)
    found = measure_part_s(HostStreams(), host, {(0, 0): wanted}, torch.float32, curves)
    assert 0.0 < found < 1.0
    dear = replace(curves, gpu=Curve(((1, 1e3),)), cpu=Curve(((1, 1e3),)))
    assert measure_part_s(HostStreams(), host, {(0, 0): wanted}, torch.float32, dear) == 0.0


# --- schedules -------------------------------------------------------------------------------------------


@tries(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["gpu", "ram"])), min_size=1, max_size=8),
    st.sampled_from([2, 8, 11, 12, 16]),
    st.floats(1e7, 1e10),
    st.floats(0, 1e-4),
)
def test_dividing_never_makes_an_event_later_on_the_curves(shapes, slices, link, part_s):
    curves = replace(curves_for(80_000), link_bytes_per_s=link, cpu_beside_link=1.2, link_beside_cpu=1.1)
    active = [Active((0, number), rows, 80_000, place) for number, (rows, place) in enumerate(shapes)]
    costs = {one.key: cost_of(one, curves) for one in active}
    whole = Scheduler(curves).schedule(active)
    plan, division = Divider(curves, part_s, lambda _: slices).divide(whole, active, costs)
    assert plan.span_s <= whole.span_s
    if division is not None:
        assert division.share == division.slices / slices
        assert 0 < division.slices < slices
        assert division.cost.link == pytest.approx(curves.link_s(int(copied_share(division.share) * 80_000)))
        assert event_time(plan, {**costs, division.key: division.cost}, curves).span_s < whole.span_s


# --- runs ------------------------------------------------------------------------------------------------


def curves_for(size_bytes: int) -> Curves:
    """Return curves on which a copy is as dear as a product on the processor."""
    return Curves(
        gpu=Curve(((1, 1e-6),)), cpu=Curve(((1, 1e-3),)), link_bytes_per_s=1e3 * size_bytes, link_latency_s=1e-4
    )


def fixed_bytes(folder: Path) -> int:
    """Return what the decoder takes of the device beside experts."""
    manifest = open_decoder_bundle(folder).manifest
    _, kinds = open_experts(folder, manifest)
    plan = manifest.plan
    sizes = {"context_tokens": plan.context_tokens, "chunk_tokens": plan.prefill_chunk_tokens}
    return device_bytes(manifest, kinds, torch.float32, library_bytes=0, **sizes).total


def sizes_of(folder: Path) -> tuple[int, int]:
    """Return the bytes of the largest expert, and of all."""
    store, _ = open_experts(folder, open_decoder_bundle(folder).manifest)
    return int(store.sizes.max()), int(store.sizes.sum())


def settings(folder: Path, vram: int, *, ram: int = ALL, part_s: float | None = 0.0, **more: Any) -> Settings:
    parts = {"curves": curves_for(sizes_of(folder)[0]), "part_s": part_s, **more.pop("parts", {})}
    return Settings(
        cache_bytes=ram, device="cpu-torch", vram_bytes=fixed_bytes(folder) + vram, device_parts=parts, **more
    )


@pytest.mark.parametrize("policy", ["reuse", "enu", "static"])
def test_tokens_are_the_same_with_experts_divided(bundle, expected, policy):
    one, total = sizes_of(bundle)
    order = [(layer, expert) for expert in range(EXPERTS) for layer in range(1, LAYERS)]
    listed: dict[str, Any] = {"static": order} if policy == "static" else {}
    for vram in (2 * one + 4096, 5 * one, total - one) if policy == "reuse" else (4 * one,):
        with DecoderSession.from_bundle(bundle, settings(bundle, vram, policy=policy, **listed)) as session:
            for _ in range(2):
                assert list(session.generate(PROMPT, NEW)) == expected
            done = session.device_stats()
        assert done.divided > 0
        assert done.divided_bytes > 0 or vram > 5 * one  # nearly all there: only the prompt lacked something
        assert done.staged_bytes == one


def test_in_fp32_it_says_what_the_processor_says_with_everything_in_memory(source, exact, tmp_path):
    export_decoder(source, exact_plan(source.graph), tmp_path / "other", stock=False)
    with DecoderSession.from_bundle(tmp_path / "other", Settings(cache_bytes=ALL)) as session:
        said = list(session.generate(PROMPT, NEW))
    assert len(set(said)) > NEW // 3
    for folder in (exact, tmp_path / "other"):
        with DecoderSession.from_bundle(folder, settings(folder, 4 * sizes_of(folder)[0])) as session:
            assert list(session.generate(PROMPT, NEW)) == said
            assert session.device_stats().divided > 0


def test_logits_with_experts_divided_are_the_references_to_rounding(bundle, rounded):
    tokens = [*PROMPT, *range(20)]
    wanted = rounded.logits(torch.tensor([tokens]))[0].numpy()
    rows: list[Any] = []

    def forced(row: Any) -> int:
        rows.append(row)
        chosen: int = tokens[len(rows) % len(tokens)]
        return chosen

    for precision, limit in (("fp32", 2e-5), ("bf16", 0.1)):
        rows.clear()
        chosen = settings(bundle, 4 * sizes_of(bundle)[0], device_precision=precision)
        with DecoderSession.from_bundle(bundle, chosen) as session:
            list(session.generate(tokens[:1], len(tokens), forced))
            assert session.device_stats().divided > 0
        assert np.median(np.abs(np.stack(rows) - wanted)) < limit * np.abs(wanted).max()
        assert (np.stack(rows).argmax(axis=1) == wanted.argmax(axis=1)).mean() > (0.99 if precision == "fp32" else 0.8)


def test_nothing_is_divided_where_the_planner_counts_nothing_as_divided(bundle, expected):
    one, total = sizes_of(bundle)
    for vram, more in (
        (4 * one, {"device_rule": "upload"}),
        (4 * one, {"device_rule": "cpu"}),
        (4 * one, {"part_s": None}),
        (4 * one, {"part_s": 1.0}),  # dearer than what it saves
        (4 * one, {"ram": total - 4096}),  # RAM does not hold every expert
        (2 * one, {}),
        (total, {}),
    ):
        with DecoderSession.from_bundle(bundle, settings(bundle, vram, **more)) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
            done = session.device_stats()
        assert done.divided == done.divided_bytes == 0
        assert done.staged_bytes == 0
        assert done.vram_bytes == vram // 4096 * 4096


def test_predictions_of_divided_events_are_kept_beside_what_was_measured(bundle):
    with DecoderSession.from_bundle(bundle, settings(bundle, 4 * sizes_of(bundle)[0])) as session:
        list(session.generate(PROMPT, NEW))
        done = session.device_stats()
    assert done.divided > 0
    seen = [one for one in done.watched.sample if one.decoding]
    assert seen
    assert all(max(one.predicted_busy_s) <= one.predicted_s * (1 + 1e-6) + 1e-9 for one in seen)
    assert done.errors["cpu"].samples > 0 < done.errors["link"].samples


def test_the_device_holds_no_more_than_was_planned(bundle, expected):
    one, _ = sizes_of(bundle)
    for vram in (2 * one + 4096, 4 * one):
        streams = CountingStreams()
        chosen = settings(bundle, vram, parts={"streams": streams})
        with DecoderSession.from_bundle(bundle, chosen) as session:
            assert list(session.generate(PROMPT, NEW)) == expected
            done = session.device_stats()
        assert done.divided > 0
        assert streams.most_bytes <= fixed_bytes(bundle) + vram
        assert done.fixed_bytes + done.vram_bytes <= (done.requested_bytes or 0)
        assert done.fixed_bytes == fixed_bytes(bundle) + done.staged_bytes
        assert streams.held_bytes == 0


def test_an_allocation_refused_anywhere_leaves_nothing_behind(bundle):
    vram, probe = 4 * sizes_of(bundle)[0], CountingStreams()
    with DecoderSession.from_bundle(bundle, settings(bundle, vram, parts={"streams": probe})):
        pass
    taken = next(probe.taken)
    for refused in range(taken - 3, taken):
        streams = CountingStreams(refused)
        chosen = settings(bundle, vram, parts={"streams": streams})
        with pytest.raises(DeviceError, match="out of memory"), DecoderSession.from_bundle(bundle, chosen):
            pass
        assert streams.held_bytes == 0
        assert streams.closed


@pytest.mark.parametrize("failing", [0, 2, 9])
def test_a_failed_copy_of_a_share_is_told_and_the_session_lives_on(bundle, expected, failing):
    whole = np.unique(open_experts(bundle, open_decoder_bundle(bundle).manifest)[0].sizes)
    streams = CountingStreams(failing=failing, uncounted=whole.tolist())
    chosen = settings(bundle, 4 * sizes_of(bundle)[0], parts={"streams": streams})
    with DecoderSession.from_bundle(bundle, chosen) as session:
        said: list[int] = []
        with pytest.raises(DeviceError, match="illegal memory access") as caught:
            said.extend(session.generate(PROMPT, NEW))
        assert "more lines" not in str(caught.value)
        assert said == expected[: len(said)]
        assert list(session.generate(PROMPT, NEW)) == expected


# --- the engine by itself --------------------------------------------------------------------------------


@pytest.fixture
def engine(bundle):
    manifest = open_decoder_bundle(bundle).manifest
    store, stored = open_experts(bundle, manifest)
    kinds = {key: sliced(kind) for key, kind in stored.items()}
    made = DeviceEngine(
        bundle, manifest, kinds, HostStreams(), TorchExperts(), dtype=torch.float32, context_tokens=64, chunk_tokens=8
    )
    made.load()
    arena = made.arena(int(store.sizes.sum()))
    made.memory.device_arena(int(store.sizes.sum()), int(store.sizes.max()))
    end = 0
    for key, expert in store.experts.items():
        data = np.fromfile(expert.record.file, np.uint8)
        arena[end : end + data.size] = data
        arrange(arena[end : end + kinds[key].size_bytes], stored[key], kinds[key])
        made.bind(*key, expert.precision, end)
        end += int(store.sizes[key])
    yield made, kinds
    made.close()


def test_both_parts_come_in_any_order_for_any_share_and_rows(engine):
    made, kinds = engine

    def logits(serve: Any, tokens: list[int]) -> Any:
        waiting = made.forward(np.array(tokens, np.int32), 0)
        while waiting is not None:
            serve(waiting)
            waiting = made.resume()
        return made.logits()

    def on_host(waiting: Any) -> None:
        made.compute_on_host(waiting.experts)

    def divided(slices: int, device_first: bool) -> Any:
        def serve(waiting: Any) -> None:
            for expert in waiting.experts:
                key = (waiting.layer, expert)
                size_bytes = first_slices(kinds[key], slices).size_bytes
                made.memory.upload_share(*key, size_bytes, made.streams.fence())
                parts = [made.compute_share, made.compute_rest_on_host]
                for compute in parts if device_first else reversed(parts):
                    compute(expert, slices)

        return serve

    for tokens in (PROMPT[:8], PROMPT[:1]):
        wanted = logits(on_host, tokens)
        for slices in (1, 6, 11):
            for device_first in (True, False):
                found = logits(divided(slices, device_first), tokens)
                assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_calls_that_make_no_sense_are_refused(engine):
    made, kinds = engine
    fence = made.streams.fence()
    waiting = made.forward(np.array([1], np.int32), 0)
    layer, expert = waiting.layer, waiting.experts[0]
    absent = next(one for one in range(8) if one not in waiting.experts)
    for call in (made.compute_share, made.compute_rest_on_host):
        with pytest.raises(InputError, match="not in the event or not where"):
            call(absent, 3)
    with pytest.raises(InputError, match="no share of expert"):
        made.compute_share(expert, 3)
    for size_bytes in (0, kinds[layer, expert].size_bytes + 4096):
        with pytest.raises(InputError, match="do not fit"):
            made.memory.upload_share(layer, expert, size_bytes, fence)
    made.memory.upload_share(layer, expert, 4096, fence)
    made.memory.share(layer, expert)
    with pytest.raises(InputError, match="no share of expert"):
        made.memory.share(layer, expert)
    made.memory.forget()
    with pytest.raises(InputError, match="not in the host"):
        made.memory.upload_share(layer, expert, 4096, fence)
