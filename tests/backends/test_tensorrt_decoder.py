"""A decoder's TensorRT bundle on a pretended device: what is TensorRT's own, and no fault unseen.

``tests/contracts/test_decoder_engines.py`` has what every engine keeps. The engines of the fake run the very graphs
that the exporter wrote; addresses, shapes, scratch and the order of work are checked by the fakes. ``tests/gpu`` has
the real thing.
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
from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder
from edgeflex.runtimes import cuda_driver
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_bench import bench_decoder, verify_decoder
from edgeflex.runtimes.decoder_measure import Task
from edgeflex.runtimes.decoder_measure import _do as measure
from edgeflex.runtimes.decoder_process import _ready as idle_bytes
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.schema_moe import Expected
from tests.engine_samples import DESKTOP, JETSON, NEW, PROMPT, Lab, forced_logits, give_board
from tests.fake_cuda import Device
from tests.fake_tensorrt import VERSIONS, names_of
from tests.random_decoder import mixed_plan
from tests.tiny_decoder import CONTEXT, EXPERTS, LAYERS, TOP_K

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
HALF_LOGITS = 1e-2  # of the largest: activations in fp16
KINDS = (JETSON, DESKTOP)


@pytest.fixture
def board(monkeypatch):
    """Return a function that builds a bundle's engines and gives this process a device that has them."""

    def give(folder: Path, board: str = JETSON.board, **more: Any) -> Any:
        return give_board(monkeypatch, folder, board, **more)

    return give


@pytest.fixture(scope="module")
def mixed(bundles) -> Path:
    """The bundle with experts of two precisions, multiplied in fp32, for a Jetson's engines."""
    folder: Path = bundles.mixed(JETSON)
    return folder


@pytest.fixture(scope="module")
def expected(bundles) -> list[int]:
    said: list[int] = bundles.said(JETSON)
    return said


@pytest.fixture
def own(mixed, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    folder: Path = tmp_path / "own"
    shutil.copytree(mixed, folder)
    return folder


def test_logits_in_half_precision_stay_near_the_references(board, bundles, tmp_path):
    folder, source = tmp_path / "half", bundles.source
    export_tensorrt_decoder(source, mixed_plan(source.graph), folder, half=True)
    board(folder)
    tokens = [*PROMPT, *range(20)]
    wanted = bundles.rounded().logits(torch.tensor([tokens]))[0].numpy()
    apart = np.abs(forced_logits(DecoderSession.from_bundle(folder), tokens) - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < apart < HALF_LOGITS


@pytest.mark.parametrize("version", VERSIONS)
def test_only_names_that_every_version_has_are_used(board, own, expected, version):
    trt = board(own, version=version)
    with DecoderSession.from_bundle(own, Settings(48 << 10)) as session:
        assert list(session.generate(PROMPT, 3)) == expected[:3]
    for kind, name in trt.touched:
        assert all(name in names_of(kind, one) for one in VERSIONS), f"{kind}.{name}"


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


@pytest.fixture(params=KINDS, ids=lambda kind: kind.board)
def engine(request, bundles, monkeypatch):
    """A loaded engine with an arena that holds everything, and the fake that it runs on."""
    lab = Lab(request.param, bundles, monkeypatch)
    with lab.loaded(lab.mixed()) as loaded:
        yield loaded, lab.boards[-1]
    assert lab.boards[-1].cuda.alive == []


def test_a_jetson_computes_from_the_readers_own_bytes_and_a_desktop_from_its_copy(engine):
    loaded, trt = engine
    before = loaded.run([1, 2])
    loaded.arena[:] = 0
    shared = trt.cuda.devices[0].attributes["integrated"] == 1
    assert np.array_equal(loaded.run([1, 2]), before) is not shared
    known = loaded.engine
    assert known.unseen_bytes == (sum(one.nbytes for one in trt.cuda.device_memory.values()) if shared else 0)
    assert known.memory_bytes > (0 if shared else loaded.arena.size)


def memory_of(trt: Any) -> int:
    cuda = trt.cuda
    return len(cuda.device_memory) + len(cuda.host_memory) + len(cuda.registered) + len(cuda.shared)


def test_dense_weights_lie_on_the_device_once(engine, mixed):
    loaded, _ = engine
    dense = [one for one in open_decoder_bundle(mixed).manifest.matrices if ".experts." not in one.name]
    whole = sum(one.weights_bytes + one.scales_bytes for one in dense if one.name != "embedding")
    assert whole <= loaded.engine._device.dense_bytes < whole + 2 * 256 * len(dense)  # and what alignment takes


def test_an_expert_enters_its_engine_by_the_address_of_its_slot(engine):
    loaded, trt = engine
    loaded.bring_all()
    loaded.run([1])
    shared = trt.cuda.devices[0].attributes["integrated"] == 1
    regions = {start: size for start, (_, size) in trt.cuda.shared.items()}
    if not shared:
        regions = {start: memory.nbytes for start, memory in trt.cuda.device_memory.items()}
    start = next(address for address, size in regions.items() if size == loaded.arena.size)
    used = {(one.layer, expert) for one in loaded.engine.take_events() for expert in one.experts.ravel().tolist()}
    given = [address for name, address in trt.named("IExecutionContext.set_tensor_address") if name == "gate_up"]
    assert {start + loaded.offsets[key] for key in used} <= set(given)


def test_a_token_brings_back_choices_and_logits_and_nothing_else(engine):
    loaded, trt = engine
    loaded.bring_all()
    loaded.run([1, 2, 3], every=False)
    loaded.run([4], 3)
    loaded.run([5], 4)  # recorded
    loaded.engine.times()
    trt.cuda.calls.clear()
    trt.calls.clear()
    loaded.run([6], 5)
    count = trt.cuda.calls.count
    routed = LAYERS - 1
    assert count("cuMemcpyHtoDAsync_v2") == 2  # the token's row and its position
    assert count("cuMemcpyDtoHAsync_v2") == 0  # choices and logits come by graphs
    assert count("cuGraphLaunch") == 2 * LAYERS + 1  # attention and its layer's end, and the head
    assert count("cuMemcpy2DAsync_v2") == 2 * LAYERS
    assert count("cuStreamSynchronize") == routed + 2
    assert count("cuMemAlloc_v2") == count("cuMemcpyDtoDAsync_v2") == 0
    runs = trt.named("IExecutionContext.execute_async_v3")
    assert len(runs) == routed * TOP_K  # nothing but experts
    given = [name for name, _ in trt.named("IExecutionContext.set_tensor_address")]
    assert not {"x", "y", "positions", "hidden", "residual"} & set(given)  # what stays in place is not named again


def test_an_expert_that_begins_where_tensorrt_takes_no_address_is_refused(engine):
    loaded, _ = engine
    precision, _ = loaded.place((1, 0))
    with pytest.raises(BundleError, match="multiples of 256"):
        loaded.engine.bind(1, 0, precision, 64)


def test_a_second_arena_gives_the_first_back(engine):
    loaded, trt = engine
    held = memory_of(trt)
    loaded.bring_all()
    smaller = loaded.engine.arena(8192)
    assert smaller.size == 8192
    assert memory_of(trt) == held
    assert loaded.engine.forward(np.array([1], np.int32), 0) is not None  # all were unbound


def test_a_closed_engine_holds_nothing_and_gives_no_arena(engine):
    loaded, trt = engine
    loaded.engine.close()
    assert trt.cuda.alive == []
    assert loaded.engine.memory_bytes == loaded.engine.unseen_bytes == 0
    with pytest.raises(InputError, match="closed"):
        loaded.engine.arena(4096)


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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.board)
def test_a_driver_that_fails_anywhere_is_named_and_nothing_stays(board, bundles, kind, caplog):
    mixed = bundles.mixed(kind)
    trt = board(mixed, kind.board)
    said = answer(mixed)
    calls = [name for name in dict.fromkeys(trt.cuda.calls) if not any(one in name for one in RELEASING)]
    counts = {name: trt.cuda.calls.count(name) for name in calls}
    assert {"cuMemcpy2DAsync_v2", "cuMemHostRegister_v2", "cuStreamSynchronize", "cuMemAlloc_v2"} <= set(counts)
    for name, count in counts.items():
        for which in sorted({1, (count + 1) // 2}):
            broken = board(mixed, kind.board, faults={name: (which, 700)})
            caplog.clear()
            try:
                found, told = answer(mixed), caplog.text
            except DeviceError as error:
                found, told = said, str(error)
            assert found == said
            if name != "cuMemHostRegister_v2":  # then the driver makes the pages
                assert f"{name} failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)" in told, "neither refused nor left out"
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

    def broken(self: Any, path: str, inputs: Any, weights: Any) -> Any:
        found = run(self, path, inputs, weights)
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
