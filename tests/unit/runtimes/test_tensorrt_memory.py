"""A decoder's memory on a pretended device: what goes up is what lies in the files, and keys are where they belong."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import BundleError, DeviceError
from edgeflex.runtimes.cuda_driver import CudaContext
from edgeflex.runtimes.tensorrt_memory import DeviceClock, DeviceKeyValues, ExpertArena, Staging, upload_dense
from edgeflex.schema import FileEntry, Precision
from edgeflex.schema_moe import DecoderManifest, MatrixRecord
from tests.fake_cuda import FakeCuda
from tests.tiny_decoder import tiny_graph, tiny_plan

GRAPH = tiny_graph(layers=1)
HEADS, DIM = GRAPH.attention.kv_heads, GRAPH.attention.head_dim
CONTEXT = 40


# --- dense weights -------------------------------------------------------------------------------------


def manifest_of(folder, files: dict[str, bytes], records: tuple[MatrixRecord, ...]) -> DecoderManifest:
    entries = []
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
        entries.append(FileEntry(path=name, role=name, size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))
    return DecoderManifest(
        backend="tensorrt", versions={}, graph=GRAPH, plan=tiny_plan(GRAPH), matrices=records, files=tuple(entries)
    )


def record(name: str, file: str, offset: int, rows: int, columns: int, scales: int | None = None) -> MatrixRecord:
    precision = Precision.FP32 if scales is None else Precision.INT8_DYNAMIC
    return MatrixRecord(
        name=name, precision=precision, rows=rows, columns=columns, file=file, offset=offset, scales_offset=scales
    )


@pytest.fixture
def large(tmp_path):
    """Files of several steps, with matrices across the borders between steps."""
    draw = np.random.default_rng(0)
    big, small = draw.bytes(9 << 20), draw.bytes(4096)
    records = (
        record("embedding", "small.bin", 0, 4, 16),
        record("head", "small.bin", 0, 4, 16),  # tied
        record("norm", "small.bin", 256, 1, 16),
        record("layers.0.qkv", "big.bin", 64, 3000, 1500, 4_500_096),  # beyond 4 MiB
        record("layers.0.o", "big.bin", 5 << 20, 1000, 1000),  # 4 MB of fp32, beyond 8 MiB
        record("layers.0.experts.0.down", "big.bin", 0, 4, 16),  # not the dense part's
    )
    return (
        {"big.bin": big, "small.bin": small},
        records,
        manifest_of(tmp_path, {"big.bin": big, "small.bin": small}, records),
    )


def test_every_piece_goes_up_as_it_lies_in_its_file(large, tmp_path):
    files, records, manifest = large
    cuda = FakeCuda()
    context = CudaContext(cuda)
    found = upload_dense(context, context.new_stream(), tmp_path, manifest)
    assert set(found) == {"head", "norm", "layers.0.qkv", "layers.0.qkv_scales", "layers.0.o"}
    for one in records:
        for name, offset, size in (
            (one.name, one.offset, one.weights_bytes),
            (f"{one.name}_scales", one.scales_offset, one.scales_bytes),
        ):
            if name in found:
                assert found[name].address % 256 == 0
                assert found[name].size_bytes == size
                assert cuda.bytes_at(*found[name]).tobytes() == files[one.file][offset : offset + size]
    assert cuda.host_memory == {}  # the way up is given back
    context.close()
    assert cuda.alive == []


@pytest.mark.parametrize("fault", ["changed", "short", "missing", "not listed"])
def test_a_file_that_is_not_the_manifests_is_refused(large, tmp_path, fault):
    files, _, manifest = large
    raw = bytearray(files["big.bin"])
    if fault == "changed":
        raw[-1] ^= 1
    (tmp_path / "big.bin").write_bytes(raw[: -4096 if fault == "short" else len(raw)])
    if fault == "missing":
        (tmp_path / "big.bin").unlink()
    if fault == "not listed":
        manifest = manifest.model_copy(update={"files": manifest.files[1:]})
    cuda = FakeCuda()
    context = CudaContext(cuda)
    with pytest.raises(BundleError, match=r"big\.bin"):
        upload_dense(context, context.new_stream(), tmp_path, manifest)
    context.close()
    assert cuda.alive == []


# --- keys and values -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=12))
def test_attention_finds_what_was_written_before_its_position(steps):
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream = context.new_stream()
    cache = DeviceKeyValues(context, stream, GRAPH, CONTEXT)
    fresh = [context.allocate(HEADS * 9 * DIM * 4) for _ in range(2)]
    held = np.zeros((2, HEADS, CONTEXT, DIM), dtype=np.float32)
    filled, draw = 0, np.random.default_rng(len(steps))
    for share, tokens in steps:
        position = int(share * filled)  # also back to an earlier one
        count = min(tokens, CONTEXT - position)
        rows = cache.past(0, position)
        assert position <= rows <= CONTEXT
        context.synchronize(stream)
        for address, known in zip(cache.places(0), held, strict=True):
            found = cuda.array(address, (HEADS, rows, DIM))
            assert np.array_equal(found[:, :position], known[:, :position])
            assert np.isfinite(found).all()
        if count:
            for address, known in zip(fresh, held, strict=True):
                new = draw.standard_normal((HEADS, count, DIM), dtype=np.float32)
                cuda.array(address, new.shape)[:] = new
                known[:, position : position + count] = new
            cache.write(0, position, count, (fresh[0], fresh[1]))
            context.synchronize(stream)
        filled = max(position + count, 0)
    context.close()
    assert cuda.alive == []


def test_rows_of_keys_depend_on_the_position_alone():
    context = CudaContext(FakeCuda())
    cache = DeviceKeyValues(context, context.new_stream(), GRAPH, CONTEXT)
    upwards = [cache.past(0, position) for position in range(CONTEXT)]
    assert [cache.past(0, position) for position in reversed(range(CONTEXT))] == upwards[::-1]
    assert upwards == sorted(upwards)
    assert set(upwards) == {16, 32, CONTEXT}
    context.close()


# --- experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrated", [True, False])
def test_the_device_finds_an_expert_where_it_is_told(integrated):
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream = context.new_stream()
    arena = ExpertArena(context, stream, integrated=integrated)
    pages = arena.take(16_384)
    assert pages.ctypes.data % 4096 == 0
    pages[4096:8192] = 7
    address = arena.place((0, 1), 4096, 4000)
    arena.use((0, 1))
    context.synchronize(stream)
    assert (cuda.bytes_at(address, 4000) == 7).all()
    pages[4096:8192] = 9
    assert (cuda.bytes_at(address, 4000) == (9 if integrated else 7)).all()
    assert context.allocated_bytes == (0 if integrated else 16_384)
    context.close()
    assert cuda.alive == []


def test_a_device_without_room_for_experts_says_what_to_give():
    cuda = FakeCuda(fail={"cuMemAlloc_v2": (1, 2)})
    context = CudaContext(cuda)
    arena = ExpertArena(context, context.new_stream(), integrated=False)
    with pytest.raises(DeviceError, match=r"no 8\.00 KiB for experts: .*OUT_OF_MEMORY.* Or give a smaller cache"):
        arena.take(8192)
    context.close()
    assert cuda.alive == []


def test_a_copy_that_nothing_waited_for_has_ended_once_its_expert_is_released():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    arena = ExpertArena(context, context.new_stream(), integrated=False)
    pages = arena.take(8192)
    pages[:4096] = 7
    address = arena.place((0, 1), 0, 4096)
    arena.release((0, 1))
    pages[:4096] = 9
    assert (cuda.bytes_at(address, 4096) == 7).all()
    events = cuda.calls.count("cuEventCreate")
    for _ in range(3):  # events are used again
        arena.place((0, 1), 0, 4096)
        arena.release((0, 1))
    assert cuda.calls.count("cuEventCreate") == events
    context.close()


def test_releasing_waits_for_computing_that_was_queued_and_for_nothing_else():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream = context.new_stream()
    arena = ExpertArena(context, stream, integrated=True)
    arena.take(8192)
    done: list[int] = []
    arena.place((0, 1), 0, 4096)
    arena.use((0, 1))
    cuda.submit(stream, lambda: done.append(1))
    arena.release((0, 2))
    assert done == []
    arena.release((0, 1))
    assert done == [1]
    context.close()


# --- seconds and staging -------------------------------------------------------------------------------


def test_seconds_are_counted_for_the_place_that_was_named():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream = context.new_stream()
    clock = DeviceClock(context, stream, places=3)
    for place in (0, 1, 1, None, 0, None):
        clock.switch(place)
        cuda.submit(stream, lambda: time.sleep(0.004))
    context.synchronize(stream)
    clock.collect()
    dense, experts, other = clock.take()
    assert 0.008 <= dense < 0.5
    assert 0.008 <= experts < 0.5
    assert other == 0.0
    assert clock.take() == [0.0, 0.0, 0.0]
    created = cuda.calls.count("cuEventCreate")
    clock.switch(1)
    clock.switch(None)
    assert cuda.calls.count("cuEventCreate") == created  # events are used again
    context.close()


def test_what_is_staged_by_one_name_leaves_the_others_alone():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream, place = context.new_stream(), context.allocate(64)
    staging = Staging(context, {"a": (5, np.float32), "b": (3, np.int32)})
    staging.arrays["b"][:] = (1, 2, 3)
    staging.up(context, stream, "a", np.arange(4, dtype=np.float32).reshape(2, 2), place)
    staging.down(context, stream, "b", 2, place)
    context.synchronize(stream)
    assert staging.arrays["b"].view(np.float32)[:2].tolist() == [0.0, 1.0]
    assert staging.arrays["b"][2] == 3
    context.close()
