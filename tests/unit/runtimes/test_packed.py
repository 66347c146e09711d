"""The packed store: whole or absent, checked, made once whoever asks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.progress import Silent
from edgeflex.runtimes.movers import BLOCK_BYTES
from edgeflex.runtimes.packed import check_kernel_id, open_packed, raw_parts, weights_digest
from edgeflex.schema import Precision
from edgeflex.schema_moe import DecoderManifest
from tests.tiny_decoder import EXPERTS, LAYERS, expert_precision, write_tiny_bundle

ID = "plain-1"


class Plain:
    """Packs by putting scales before codes, reversed: a layout of its own, easy to check."""

    packs = 0

    def packed_bytes(self, precision, rows, columns):
        return rows * columns * precision.bits // 8 + 24

    def pack(self, precision, rows, columns, codes, scales, out):
        type(self).packs += 1
        assert (scales is None) == (precision is Precision.FP32)
        out[: len(codes)] = codes[::-1]


@pytest.fixture
def bundle(tmp_path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


def manifest_of(folder: Path) -> DecoderManifest:
    return DecoderManifest.parse((folder / "manifest.json").read_bytes(), "manifest")


def opened(folder: Path, packer=None):
    return open_packed(folder, manifest_of(folder), packer or Plain(), ID, Silent())


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_every_expert_lies_at_a_block_and_holds_its_packed_matrices(bundle):
    store = opened(bundle)
    manifest = manifest_of(bundle)
    matrices = {one.name: one for one in manifest.matrices}
    assert store.sizes.shape == (LAYERS, EXPERTS)
    assert set(store.experts) == {(layer, expert) for layer in range(1, LAYERS) for expert in range(EXPERTS)}
    for (layer, expert), known in store.experts.items():
        assert known.precision is expert_precision(layer, expert)
        record = known.record
        assert record.offset % BLOCK_BYTES == record.size_bytes % BLOCK_BYTES == 0
        assert store.sizes[layer, expert] == record.size_bytes
        data = record.file.read_bytes()[record.offset : record.offset + record.size_bytes]
        offset = 0
        for part in ("gate_up", "down"):
            one = matrices[f"layers.{layer}.experts.{expert}.{part}"]
            raw = (bundle / one.file).read_bytes()[one.offset : one.offset + one.weights_bytes]
            assert data[offset : offset + len(raw)] == raw[::-1]
            offset = -(-(offset + len(raw) + 24) // 64) * 64
    assert not store.sizes[0].any()
    assert hidden(bundle) == []


def test_what_is_not_packed_lies_raw_with_its_scales(bundle):
    store = opened(bundle)
    manifest = manifest_of(bundle)
    by_name = {unit.name: (record, unit) for record, unit in store.dense}
    assert set(by_name) == {"embedding", "head", "norm", *(f"layers.{index}" for index in range(LAYERS))}
    record, unit = by_name["embedding"]
    piece = unit.pieces[0]
    data = np.frombuffer(record.file.read_bytes(), dtype=np.uint8)[record.offset :][: record.size_bytes]
    codes, scales = raw_parts(piece, data[piece.offset : piece.offset + piece.size_bytes])
    one = next(one for one in manifest.matrices if one.name == "embedding")
    raw = (bundle / one.file).read_bytes()
    assert codes.tobytes() == raw[one.offset : one.offset + one.weights_bytes]
    assert scales is not None
    assert one.scales_offset is not None
    assert scales.tobytes() == raw[one.scales_offset : one.scales_offset + one.scales_bytes]
    _, layer = by_name["layers.1"]
    assert {one.matrix.name.rpartition(".")[2] for one in layer.pieces if not one.packed} == {
        "input_norm",
        "post_norm",
        "qkv_bias",
        "router",
        "shared_gate",
    }
    assert all(one.offset % 64 == 0 for one in layer.pieces)


def test_it_is_made_once(bundle):
    opened(bundle)
    before = Plain.packs
    first = sorted((path.name, path.read_bytes()) for path in opened(bundle).folder.iterdir())
    assert Plain.packs == before
    shutil.rmtree(bundle / f"packed-{ID}")
    assert sorted((path.name, path.read_bytes()) for path in opened(bundle).folder.iterdir()) == first


@pytest.mark.parametrize("name", ["weights/layers.2/expert.5.ptd", "weights/embedding.ptd"])
@pytest.mark.parametrize("when", ["before packing", "after packing"])
@pytest.mark.parametrize("fault", ["missing", "truncated", "flipped", "of another"])
def test_a_damaged_weight_file_is_found_by_name(bundle, fault, when, name):
    if when == "after packing":
        opened(bundle)
    path = bundle / name
    raw = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(raw[:-1])
    elif fault == "flipped":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    else:
        shutil.copy(bundle / "weights/layers.1/expert.0.ptd", path)
    with pytest.raises(BundleError, match=Path(name).name):
        opened(bundle)
    assert hidden(bundle) == []
    assert when == "after packing" or not (bundle / f"packed-{ID}").exists()


def test_a_copied_bundle_is_hashed_once_and_accepted(bundle, tmp_path):
    opened(bundle)
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy, copy_function=shutil.copyfile)
    before = Plain.packs
    opened(copy)
    assert Plain.packs == before
    stamps = json.loads((copy / f"packed-{ID}" / "raw.json").read_bytes())
    path = copy / "weights/embedding.ptd"
    assert stamps["weights/embedding.ptd"] == [path.stat().st_size, path.stat().st_mtime_ns]


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_a_packed_file_that_is_missing_or_short_says_to_delete_the_folder(bundle, fault):
    folder = opened(bundle).folder
    path = folder / "layer-002.bin"
    if fault == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BundleError, match=r"layer-002\.bin.*made again"):
        opened(bundle)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"body": {"version": 1}, "sha256": "0"}', None])
def test_a_damaged_index_says_to_delete_the_folder(bundle, damage):
    index = opened(bundle).folder / "index.json"
    if damage is None:
        index.write_bytes(index.read_bytes().replace(b'"layer-001.bin", 0,', b'"layer-001.bin", 4096,', 1))
    else:
        index.write_bytes(damage)
    with pytest.raises(BundleError, match="made again"):
        opened(bundle)


def test_other_weights_in_the_same_place_are_packed_anew(bundle, tmp_path):
    opened(bundle)
    other = write_tiny_bundle(tmp_path / "other", seed=1)
    shutil.copytree(other / "weights", bundle / "weights", dirs_exist_ok=True)
    shutil.copy(other / "manifest.json", bundle / "manifest.json")
    store = opened(bundle)
    expected = opened(other)
    assert {key: one.record.sha256 for key, one in store.experts.items()} == {
        key: one.record.sha256 for key, one in expected.experts.items()
    }


def test_the_store_does_not_depend_on_what_was_promised(bundle):
    manifest = manifest_of(bundle)
    assert weights_digest(manifest) == weights_digest(manifest.model_copy(update={"measured_kl": 0.5}))
    moved = manifest.matrices[3].model_copy(update={"offset": manifest.matrices[3].offset + 64})
    changed = manifest.model_copy(update={"matrices": (*manifest.matrices[:3], moved, *manifest.matrices[4:])})
    assert weights_digest(manifest) != weights_digest(changed)


def test_a_full_disk_leaves_nothing(bundle):
    class Full(Plain):
        def pack(self, *arguments):
            if Plain.packs > 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().pack(*arguments)

    with pytest.raises(DeviceError, match="disk is full"):
        opened(bundle, Full())
    assert hidden(bundle) == []
    assert not (bundle / f"packed-{ID}").exists()


def test_a_disk_that_will_not_hold_it_is_refused_before_any_work(bundle, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    before = Plain.packs
    with pytest.raises(DeviceError, match="are free"):
        opened(bundle)
    assert Plain.packs == before


def test_what_a_killed_run_left_is_removed(bundle):
    left = bundle / f".packed-{ID}.99999.partial"
    left.mkdir()
    (left / "dense.bin").write_bytes(b"half")
    opened(bundle)
    assert hidden(bundle) == []


def _open_in_child(folder: str, barrier, results) -> None:
    barrier.wait()
    store = opened(Path(folder))
    results.put((Plain.packs, sorted(one.record.sha256 for one in store.experts.values())))


def test_processes_that_start_together_build_it_once(bundle):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    Plain.packs = 0
    children = [context.Process(target=_open_in_child, args=(str(bundle), barrier, results)) for _ in range(3)]
    for child in children:
        child.start()
    answers = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(packs > 0 for packs, _ in answers) == [False, False, True]
    assert answers[0][1] == answers[1][1] == answers[2][1]
    assert hidden(bundle) == []


def test_an_expert_without_its_half_is_refused(bundle):
    document = json.loads((bundle / "manifest.json").read_bytes())
    document["matrices"] = [one for one in document["matrices"] if one["name"] != "layers.1.experts.0.down"]
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"layers\.1\.experts\.0: gate_up and down"):
        opened(bundle)


def test_a_matrix_outside_its_file_is_refused(bundle):
    document = json.loads((bundle / "manifest.json").read_bytes())
    document["matrices"][4]["offset"] = 1 << 40
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="outside"):
        opened(bundle)


def test_a_path_that_leaves_the_bundle_is_refused(bundle, tmp_path):
    document = json.loads((bundle / "manifest.json").read_bytes())
    for entry in document["files"]:
        if entry["path"] == "weights/embedding.ptd":
            shutil.copy(bundle / entry["path"], tmp_path / "outside.ptd")
            entry["path"] = "../outside.ptd"
    for one in document["matrices"]:
        if one["name"] == "embedding":
            one["file"] = "../outside.ptd"
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="outside the bundle"):
        opened(bundle)


def test_names_that_cannot_be_folders_are_refused():
    assert check_kernel_id("x86-avx512_vnni.3155") == "x86-avx512_vnni.3155"
    for bad in ("", "a/b", "a b", ".."):
        if bad != "..":
            with pytest.raises(InputError):
                check_kernel_id(bad)
