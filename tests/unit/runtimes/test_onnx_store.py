"""Raw weights as a store, rows of raw matrices, and keys and values in memory that grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import BundleError, InputError
from edgeflex.runtimes.onnx_stages import KeyValues
from edgeflex.runtimes.raw_store import RawRows, expert_pairs, open_raw
from edgeflex.schema import FileEntry, Precision
from edgeflex.schema_moe import DecoderManifest, MatrixRecord
from edgeflex.transforms.decoder_weights import dequantize, quantize_matrix
from tests.tiny_decoder import tiny_graph, tiny_plan

if TYPE_CHECKING:
    from pathlib import Path

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32


def matrix(name: str, precision: Precision = INT8, offset: int = 0, **changes: object) -> MatrixRecord:
    known = MatrixRecord(name=name, precision=precision, rows=64, columns=64, file=f"{name}.bin", offset=offset)
    known = known.model_copy(update={"scales_offset": None if precision is FP32 else offset + known.weights_bytes})
    return known.model_copy(update=changes)


def expert(name: str, file: str, precision: Precision = INT8) -> list[MatrixRecord]:
    return [
        matrix(f"{name}.gate_up", precision, 0, file=file),
        matrix(f"{name}.down", precision, 16384, file=file),
    ]


def manifest_of(matrices: list[MatrixRecord], **sizes: int) -> DecoderManifest:
    graph = tiny_graph()
    files = {one.file: 32768 for one in matrices} | {name.replace("__", "."): size for name, size in sizes.items()}
    return DecoderManifest(
        backend="onnx",
        versions={},
        graph=graph,
        plan=tiny_plan(graph),
        matrices=tuple(matrices),
        files=tuple(
            FileEntry(path=path, role="weights", size_bytes=size, sha256="0" * 64) for path, size in files.items()
        ),
    )


# --- rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [FP32, INT8, INT4])
def test_rows_are_the_numbers_that_the_exporter_rounded_to(precision):
    stored = quantize_matrix(np.random.default_rng(1).standard_normal((40, 96), dtype=np.float32), precision)
    record = MatrixRecord(name="embedding", precision=precision, rows=40, columns=96, file="e.bin", offset=0)
    codes = np.frombuffer(stored.codes.tobytes(), np.uint8)
    scales = None if stored.scales is None else np.frombuffer(stored.scales.tobytes(), np.uint8)
    rows = RawRows(record, codes, scales)
    wanted = np.array([39, 0, 7, 7], dtype=np.int32)
    assert np.array_equal(rows(wanted), dequantize(stored)[wanted])
    assert rows(wanted).dtype == np.float32


def test_a_precision_without_raw_form_is_refused():
    with pytest.raises(InputError, match="no raw form"):
        RawRows(matrix("embedding", INT8), np.zeros(64 * 64, np.uint8), None)


# --- the store -----------------------------------------------------------------------------------------


def test_each_expert_is_its_whole_file_with_the_manifests_hash(tmp_path: Path):
    experts = [*expert("layers.2.experts.5", "b.bin", INT4), *expert("layers.1.experts.0", "a.bin")]
    store = open_raw(tmp_path, manifest_of([*experts, matrix("embedding")]))
    assert list(store.experts) == [(1, 0), (2, 5)]
    record, precision = store.experts[2, 5]
    assert (record.file, record.offset, record.size_bytes, record.sha256) == (tmp_path / "b.bin", 0, 32768, "0" * 64)
    assert precision is INT4
    assert "packed" not in record.remedy
    assert store.sizes.shape == (4, 6)
    assert (store.sizes[1, 0], store.sizes[2, 5], store.sizes.sum()) == (32768, 32768, 65536)
    [(dense, unit)] = store.dense
    assert (dense.name, unit.pieces[0].packed, store.dense_bytes) == ("embedding", False, 32768)


@pytest.mark.parametrize(
    ("matrices", "sizes", "said"),
    [
        (expert("layers.1.experts.0", "a.bin")[:1], {}, "gate_up and down in one file and precision"),
        ([*expert("layers.1.experts.0", "a.bin"), *expert("layers.1.experts.1", "a.bin")], {}, "several experts"),
        (expert("layers.1.experts.0", "a.bin"), {"a__bin": 32767}, "no multiple of 4096"),
        ([matrix("layers.1.experts.0.gate_up", offset=32), matrix("layers.1.experts.0.down")], {}, "gate_up and down"),
        ([matrix("embedding", scales_offset=8192)], {}, "scales are at 8192 instead of 4096"),
        ([matrix("embedding", offset=32)], {}, "multiple of 64"),
    ],
)
def test_what_the_readers_could_not_find_is_refused(tmp_path: Path, matrices, sizes, said):
    extra = [] if matrices[0].name == "embedding" else [matrix("embedding")]
    with pytest.raises(BundleError, match=said):
        open_raw(tmp_path, manifest_of([*matrices, *extra], **sizes))


def test_no_embedding_is_refused_and_pairs_come_ascending(tmp_path: Path):
    experts = [*expert("layers.3.experts.1", "b.bin"), *expert("layers.3.experts.0", "a.bin")]
    manifest = manifest_of(experts)
    with pytest.raises(BundleError, match="0 embeddings"):
        open_raw(tmp_path, manifest)
    assert list(expert_pairs(manifest)) == [(3, 0), (3, 1)]


# --- keys and values -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    context=st.integers(2, 90),
    heads=st.integers(1, 3),
    steps=st.lists(st.tuples(st.integers(0, 89), st.integers(1, 20)), max_size=12),
)
def test_the_past_is_what_was_written_whatever_was_gone_back_to(context, heads, steps):
    draw = np.random.default_rng(0)
    cache = KeyValues(heads, 4, 3, context)
    keys, values = np.zeros((heads, context, 4), np.float32), np.zeros((heads, context, 3), np.float32)
    filled = 0
    for back, count in steps:
        position = min(back, filled)
        end = min(position + count, context)
        if end == position:
            continue
        past_keys, past_values = cache.past(position)
        assert past_keys.flags.c_contiguous
        assert past_keys.shape[1] == past_values.shape[1] >= max(position, 1)
        assert past_keys.shape[1] < max(17, 2 * position)
        assert np.array_equal(past_keys[:, :position], keys[:, :position])
        assert np.array_equal(past_values[:, :position], values[:, :position])
        assert np.isfinite(past_keys).all()
        new_keys = draw.standard_normal((heads, end - position, 4), dtype=np.float32)
        new_values = draw.standard_normal((heads, end - position, 3), dtype=np.float32)
        cache.write(position, new_keys, new_values)
        keys[:, position:end], values[:, position:end] = new_keys, new_values
        filled = end
    assert cache.size_bytes == heads * context * 7 * 4
