from __future__ import annotations

import gc
import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from edgeflex.bundle import PROGRAM_PART
from edgeflex.errors import BundleError, DeviceError, InputError, MissingDependencyError, UnsupportedError
from edgeflex.registry import RUNTIMES, get
from edgeflex.runtimes import open_session
from edgeflex.runtimes.cuda_driver import driver_problem
from edgeflex.runtimes.measure import measure_memory
from edgeflex.runtimes.recorder import memory_now
from edgeflex.runtimes.segments import all_exits
from edgeflex.schema import SegmentProgram
from tests.toy_bundle import reference_probabilities, toy_graphs, toy_inputs, toy_programs, write_toy_bundle

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
ml_dtypes = pytest.importorskip("ml_dtypes")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeflex.runtimes.onnx_types import FP8_TYPES, INT4_TYPES, INT8_TYPES, element_types  # noqa: E402
from edgeflex.runtimes.onnxruntime import (  # noqa: E402
    SETTINGS,
    OnnxruntimeSession,
    agrees,
    choose_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edgeflex.bundle import Bundle

NEVER = (None, None, None)
DEPTH, CLASSES = 256, 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("onnxruntime") / "bundle", backend="onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the toy's files alone, to be damaged."""
    for name, content in toy_graphs().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def toy_session(folder: Path, **options) -> OnnxruntimeSession:
    return OnnxruntimeSession.from_folder(folder, toy_programs(), **options)


# --- graphs of one segment ---------------------------------------------------------------------------


def one_segment(width: int = DEPTH) -> tuple[SegmentProgram, ...]:
    return (SegmentProgram(method="segment0", input_shape=(1, width), output_shape=None, exit="exit0"),)


def write_graph(folder: Path, nodes: Iterable[Any], constants: dict[str, np.ndarray], opset: int = 21) -> Path:
    """Write ``segment0.onnx``: x [1, DEPTH] through ``nodes``, whose last value is ``logits``, to probabilities."""
    depth = next(iter(constants.values())).shape[0]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1)],
        "segment",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, depth])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "segment0.onnx")
    return folder


@cache
def weights() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(DEPTH, CLASSES), scale=0.2).astype(np.float32)


def rows(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DEPTH)).astype(np.float32)


def write_int4(folder: Path) -> Path:
    blocks = weights().reshape(DEPTH // 64, 64, CLASSES)
    scales = (np.abs(blocks).max(axis=1) / 7).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[:, None]), -8, 7).reshape(DEPTH, CLASSES)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=64),
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
    ]
    return write_graph(folder, nodes, {"codes": codes.astype(ml_dtypes.int4), "scales": scales})


def write_eight_bits(folder: Path, dtype: type, largest: float, range_: float = 4.0) -> Path:
    """Write a product whose weights and activations are rounded to ``dtype``, one scale each."""
    scale = np.float32(np.abs(weights()).max() / largest)
    scaled = weights() / scale
    codes: np.ndarray = (np.rint(scaled) if dtype is np.int8 else scaled).astype(dtype)
    constants = {
        "codes": codes,
        "w_scale": np.array(scale),
        "x_scale": np.array(range_ / largest, dtype=np.float32),
        "zero": np.zeros((), dtype=dtype),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["codes", "w_scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["xd", "w"], ["logits"]),
    ]
    return write_graph(folder, nodes, constants, opset=20)


def write_fp8(folder: Path) -> Path:
    return write_eight_bits(folder, ml_dtypes.float8_e4m3fn, 448.0)


def write_int8(folder: Path) -> Path:
    return write_eight_bits(folder, np.int8, 127.0)


def write_float(folder: Path, array: np.ndarray | None = None) -> Path:
    return write_graph(
        folder, [helper.make_node("MatMul", ["x", "w"], ["logits"])], {"w": weights() if array is None else array}
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    raised: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def answers(folder: Path, x: np.ndarray, settings: str = "") -> np.ndarray:
    with OnnxruntimeSession.from_folder(folder, one_segment(), settings=settings) as session:
        return all_exits(session, [x])


# --- loading -----------------------------------------------------------------------------------------


def test_nothing_is_loaded_before_the_session_is_entered(bundle: Bundle) -> None:
    session = open_session(bundle)
    assert isinstance(session, OnnxruntimeSession)
    assert session.load_s == 0.0
    with session:
        assert session.load_s > 0.0


def test_a_bundle_for_tensorrt_runs_plainly(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", backend="tensorrt", settings="of-another-runtime")
    inputs = toy_inputs(2)
    with open_session(bundle, "onnxruntime") as session:
        got = all_exits(session, [inputs])
    assert np.abs(got - reference_probabilities(inputs)).max() < 1e-5


def test_a_bundle_for_another_backend_is_refused(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", backend="onnx")
    other = bundle.manifest.model_copy(update={"backend": "executorch"})
    with pytest.raises(UnsupportedError, match="runtime 'onnxruntime' cannot run"):
        OnnxruntimeSession.from_bundle(type(bundle)(bundle.path, other))


def test_a_bundle_is_executed_as_its_manifest_says(tmp_path: Path) -> None:
    fast = write_toy_bundle(tmp_path / "fast", backend="onnx", settings="fast")
    with open_session(fast) as session:
        assert isinstance(session, OnnxruntimeSession)
        assert session._settings == "fast"
        got = all_exits(session, [toy_inputs(2)])
    assert np.abs(got - reference_probabilities(toy_inputs(2))).max() < 1e-4
    unknown = write_toy_bundle(tmp_path / "unknown", backend="onnx", settings="brisk")
    with pytest.raises(BundleError, match="settings 'brisk' are none of ONNX Runtime's"):
        open_session(unknown)


def test_unknown_settings_threads_and_providers_are_bad_input(folder: Path) -> None:
    with pytest.raises(InputError, match="no settings 'brisk'; it has exact, fast, fast-int8"):
        toy_session(folder, settings="brisk")
    for threads in (0, -1):
        with pytest.raises(InputError, match="at least 1"):
            toy_session(folder, threads=threads)
    with pytest.raises(InputError, match="2 programs for 3 segments"):
        OnnxruntimeSession([folder, folder], toy_programs())
    with pytest.raises(InputError, match="provider 'tpu' is unknown"), toy_session(folder, provider="tpu"):
        pass


@pytest.mark.skipif(driver_problem() is None, reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none_and_auto_takes_the_processor(folder: Path) -> None:
    with pytest.raises(DeviceError, match="provider 'cuda' was asked for: "), toy_session(folder, provider="cuda"):
        pass
    with toy_session(folder, provider="auto") as session:
        assert session.infer(toy_inputs(1), NEVER).exit == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("segment1.onnx", b""),
        ("segment1.onnx", b"\xffnot a graph" * 20),
        ("segment1.onnx", None),
        ("segment1.data", None),
        ("segment1.data", b"too short"),
    ],
    ids=["empty", "foreign", "absent", "weights absent", "weights cut off"],
)
@pytest.mark.parametrize("settings", ["", "fast"])
def test_a_damaged_or_absent_file_is_a_damaged_bundle(
    folder: Path, name: str, content: bytes | None, settings: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=r"segment1.*Export the bundle again"), toy_session(folder, settings=settings):
        pass


def test_half_a_graph_is_a_damaged_bundle(folder: Path) -> None:
    graph = folder / "segment2.onnx"
    for length in range(10, graph.stat().st_size, 200):
        graph.write_bytes(toy_graphs()["segment2.onnx"][:length])
        for settings in ("", "fast"):
            with pytest.raises(BundleError, match="segment2"), toy_session(folder, settings=settings):
                pass


def test_weights_outside_the_folder_are_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    write_float(inner)
    model = onnx.load(inner / "segment0.onnx")
    onnx.save(model, inner / "segment0.onnx", save_as_external_data=True, location="secret.data", size_threshold=0)
    (inner / "secret.data").rename(tmp_path / "secret.data")
    moved = onnx.load(inner / "segment0.onnx", load_external_data=False)
    for entry in moved.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret.data"
    (inner / "segment0.onnx").write_bytes(moved.SerializeToString())
    with pytest.raises(BundleError, match="segment0"):
        answers(inner, rows(1))


def test_a_file_that_is_not_the_one_of_the_manifest_is_refused(folder: Path) -> None:
    taken = toy_graphs()["segment0.onnx"]
    (folder / "segment1.onnx").write_bytes(taken)
    with pytest.raises(
        BundleError, match=r"segment1.onnx: the graph has x float \[1, 3, 16, 16\].*manifest says x float"
    ):
        toy_session(folder).__enter__()
    wrong = [
        one.model_copy(update={"output_shape": (1, 9, 9, 9)}) if k == 0 else one for k, one in enumerate(toy_programs())
    ]
    (folder / "segment1.onnx").write_bytes(toy_graphs()["segment1.onnx"])
    with pytest.raises(BundleError, match=r"activations float \[1, 9, 9, 9\]"):
        OnnxruntimeSession.from_folder(folder, wrong).__enter__()


def test_segments_that_do_not_fit_each_other_are_refused(folder: Path) -> None:
    programs = [toy_programs()[0], toy_programs()[2]]
    (folder / "segment1.onnx").write_bytes(toy_graphs()["segment2.onnx"])
    with pytest.raises(BundleError, match="hands over another shape"):
        OnnxruntimeSession.from_folder(folder, programs).__enter__()


def test_roles_of_the_manifest_say_where_the_graphs_lie(bundle: Bundle) -> None:
    files = tuple(
        entry.model_copy(update={"role": "other"}) if entry.role == f"{PROGRAM_PART}segment1" else entry
        for entry in bundle.manifest.files
    )
    without = bundle.manifest.model_copy(update={"files": files})
    with pytest.raises(BundleError, match="names no 'program:segment1' file"):
        open_session(type(bundle)(bundle.path, without))


def test_without_the_package_the_registry_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "edgeflex.runtimes.onnxruntime")
    with pytest.raises(MissingDependencyError, match=r"'onnxruntime', which is not installed\. Run: pip install"):
        get(RUNTIMES, "onnxruntime")


def test_loading_and_failing_write_nothing_to_the_terminal(bundle: Bundle, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from edgeflex.bundle import open_bundle
from edgeflex.errors import BundleError
from edgeflex.runtimes import open_session
from edgeflex.runtimes.cuda_driver import driver_problem
from edgeflex.runtimes.onnxruntime import OnnxruntimeSession
bundle = open_bundle(Path(sys.argv[1]))
with open_session(bundle) as session:
    session.infer(np.zeros((1, 3, 16, 16), np.float32), (None, None, None))
try:
    OnnxruntimeSession([Path(sys.argv[2])] * 3, bundle.manifest.segments).__enter__()
except BundleError:
    sys.exit(0)
sys.exit("not refused")
"""
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\xff" * 100)
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path), str(damaged)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- running -----------------------------------------------------------------------------------------


def test_activations_that_were_handed_out_are_not_overwritten(bundle: Bundle) -> None:
    inputs = toy_inputs(2)
    with open_session(bundle) as session:
        first, _ = session.segment(0, inputs[:1])
        assert first is not None
        kept = first.copy()
        session.infer(inputs[1:], NEVER)
        second, _ = session.segment(0, inputs[1:])
        assert second is not None
        assert np.array_equal(first, kept)
        assert not np.array_equal(first, second)


def test_a_segment_run_by_itself_leaves_no_trace_in_the_next_inference(bundle: Bundle) -> None:
    inputs = toy_inputs(2)
    with open_session(bundle) as session:
        alone = session.infer(inputs[:1], NEVER).probabilities
        activations, _ = session.segment(0, inputs[1:])
        assert activations is not None
        session.segment(1, np.float32(3.0) * activations)
        assert np.array_equal(session.infer(inputs[:1], NEVER).probabilities, alone)


def test_two_sessions_do_not_disturb_each_other_whatever_their_threads(bundle: Bundle) -> None:
    inputs = toy_inputs(2)
    with open_session(bundle, threads=1) as one, open_session(bundle, threads=2) as two:
        alone = one.infer(inputs[:1], NEVER).probabilities
        two.infer(inputs[1:], NEVER)
        assert np.array_equal(one.infer(inputs[:1], NEVER).probabilities, alone)


def test_one_thread_starts_no_other(bundle: Bundle) -> None:
    process = psutil.Process()
    before = process.num_threads()
    with open_session(bundle, threads=1) as session:
        session.infer(toy_inputs(1), NEVER)
        assert process.num_threads() == before
    with open_session(bundle, threads=2) as session:
        assert process.num_threads() == before + session.segment_count  # one worker beside the caller, a segment
    assert process.num_threads() == before


def test_a_failure_of_the_runtime_names_the_segment(bundle: Bundle) -> None:
    with open_session(bundle) as session:
        assert isinstance(session, OnnxruntimeSession)
        loaded = session._loaded[1]
        session._loaded[1] = loaded._replace(binding=session._loaded[0].binding)
        with pytest.raises(DeviceError, match="segment 1 failed in ONNX Runtime"):
            session.infer(toy_inputs(1), NEVER)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", ["exact", "fast"])
def test_one_value_that_is_no_number_is_a_failure_not_an_answer(folder: Path, value: float, settings: str) -> None:
    x = toy_inputs(1)
    x[0, 1, 5, 7] = value
    with toy_session(folder, settings=settings) as session, pytest.raises(DeviceError, match="which is no probability"):
        session.infer(x, NEVER)


def test_memory_is_given_back_on_close(tmp_path: Path) -> None:
    width = 1 << 18
    array = np.random.default_rng(0).normal(size=(width, CLASSES)).astype(np.float32)  # 16 MiB
    write_float(tmp_path, array)
    session = OnnxruntimeSession.from_folder(tmp_path, one_segment(width))
    x = np.ones((1, width), dtype=np.float32)
    with session:  # pays what a process pays once
        session.infer(x, (None,))
    gc.collect()
    before = memory_now()
    with session:
        session.infer(x, (None,))
        assert memory_now().above(before) > array.nbytes // 2
    gc.collect()
    assert memory_now().above(before) < array.nbytes // 16


def test_memory_measured_twice_agrees_and_is_that_of_an_arena_a_segment(bundle: Bundle) -> None:
    first, second = measure_memory(bundle), measure_memory(bundle)
    assert 3 << 20 < first.model_bytes < 4 << 20
    assert second.model_bytes == pytest.approx(first.model_bytes, rel=0.02)


# --- settings ----------------------------------------------------------------------------------------


def test_the_formats_of_a_graph_are_read_from_its_file(tmp_path: Path) -> None:
    def held(folder: Path) -> frozenset[int]:
        return element_types((folder / "segment0.onnx").read_bytes())

    assert held(write_int4(tmp_path / "int4")) & INT4_TYPES == {TensorProto.INT4}
    assert held(write_fp8(tmp_path / "fp8")) & FP8_TYPES == {TensorProto.FLOAT8E4M3FN}
    assert held(write_float(tmp_path / "float")) == {TensorProto.FLOAT}
    for damaged in (b"\x3a", b"\x3a\x7f", b"\x07", b"\xff" * 12):
        with pytest.raises(ValueError, match=r"cut off|unknown kind"):
            element_types(damaged)


def test_plain_execution_computes_four_bit_weights_exactly_and_fast_nearly(tmp_path: Path) -> None:
    write_int4(tmp_path)
    x = rows(8)
    blocks = weights().reshape(DEPTH // 64, 64, CLASSES)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 7
    rounded = (np.clip(np.rint(blocks / scales), -8, 7) * scales).reshape(DEPTH, CLASSES)
    plain = answers(tmp_path, x)
    assert np.abs(plain[:, 0] - softmax(x @ rounded)).max() < 1e-5
    assert np.abs(answers(tmp_path, x, "fast") - plain).max() < 1e-5
    with_int8 = np.abs(answers(tmp_path, x, "fast-int8") - plain).max()
    assert 1e-4 < with_int8 < 0.05


def test_eight_bit_floats_run_plainly_and_refuse_to_be_rewritten(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    x = rows(4)

    def round_fp8(values: np.ndarray, scale: np.floating) -> np.ndarray:
        rounded = np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return np.asarray(rounded.astype(np.float32) * scale)

    rounded = round_fp8(weights(), np.float32(np.abs(weights()).max() / 448))
    expected = softmax(round_fp8(x, np.float32(4.0 / 448)) @ rounded)
    assert np.abs(answers(tmp_path, x)[:, 0] - expected).max() < 1e-5
    for settings in ("fast", "fast-int8"):
        with pytest.raises(UnsupportedError, match="8-bit floats"):
            answers(tmp_path, x, settings)
    assert choose_settings(tmp_path, one_segment(), x, rounds=1) == "exact"


def test_eight_bit_integers_give_what_a_sum_by_hand_gives_in_all_settings(tmp_path: Path) -> None:
    write_int8(tmp_path)
    x = rows(8)
    scale = np.abs(weights()).max() / np.float32(127)
    step = np.float32(4.0 / 127)
    rounded = np.clip(np.rint(x / step), -128, 127) * step
    expected = softmax(rounded @ (np.rint(weights() / scale) * scale))
    for settings in ("", "fast", "fast-int8"):
        assert np.abs(answers(tmp_path, x, settings)[:, 0] - expected).max() < 1e-5
    assert element_types((tmp_path / "segment0.onnx").read_bytes()) & INT8_TYPES == {TensorProto.INT8}


def scripted_clock(order: list[str], takes: dict[str, float]) -> Callable[[], float]:
    """Return a clock by which inference number k takes what ``order[k % len]`` takes."""
    now, calls = 0.0, 0

    def clock() -> float:
        nonlocal now, calls
        if calls % 2:
            now += takes[order[(calls // 2) % len(order)]]
        calls += 1
        return now

    return clock


@pytest.mark.parametrize(
    ("takes", "chosen"),
    [
        ({"exact": 1.0, "fast": 0.5}, "fast"),
        ({"exact": 1.0, "fast": 1.5}, "exact"),
        ({"exact": 1.0, "fast": 0.97}, "exact"),
        ({"exact": 1.0, "fast": 0.94}, "fast"),
    ],
    ids=["quicker", "slower", "within five per cent", "just beyond five per cent"],
)
def test_the_quickest_settings_are_chosen_and_a_tie_goes_to_the_plain_ones(
    folder: Path, takes: dict[str, float], chosen: str
) -> None:
    clock = scripted_clock(["exact", "fast", "fast", "exact"], takes)
    assert choose_settings(folder, toy_programs(), toy_inputs(4), rounds=4, clock=clock) == chosen


def test_settings_that_move_an_answer_too_far_are_not_chosen_however_quick(tmp_path: Path) -> None:
    write_int4(tmp_path)
    x = np.float32(3.0) * rows(16)  # so steep that int8 activations move probabilities by more than is allowed
    plain = answers(tmp_path, x)
    assert np.abs(answers(tmp_path, x, "fast-int8") - plain).max() > SETTINGS["fast-int8"].tolerance
    clock = scripted_clock(["exact", "fast", "fast", "exact"], {"exact": 1.0, "fast": 0.5})
    assert choose_settings(tmp_path, one_segment(), x, rounds=2, clock=clock) == "fast"


def test_agreement_is_a_matter_of_distance_and_of_the_class() -> None:
    expected = np.array([[[0.50, 0.49, 0.01]]], dtype=np.float32)
    other = np.array([[[0.494, 0.496, 0.01]]], dtype=np.float32)
    fast, bold = SETTINGS["fast"], SETTINGS["fast-int8"]

    def moved(by: float) -> np.ndarray:
        return expected + np.float32(by)

    assert agrees(moved(5e-4), expected, fast, rounded=False)
    assert not agrees(moved(2e-3), expected, fast, rounded=False)
    assert agrees(moved(2e-3), expected, fast, rounded=True)
    assert agrees(moved(2e-3), expected, bold, rounded=False)
    for setting in (fast, bold):
        for rounded in (False, True):
            assert not agrees(other, expected, setting, rounded=rounded)
            assert not agrees(np.full_like(expected, np.nan), expected, setting, rounded=rounded)


def test_a_few_values_may_tip_where_activations_are_rounded_but_not_many() -> None:
    expected = np.tile(np.array([0.6, 0.4], dtype=np.float32), (50, 2, 1))
    few, many, far = expected.copy(), expected.copy(), expected.copy()
    few[:4, 0] = (0.7, 0.3)
    many[:, 0] = (0.63, 0.37)
    far[0, 0] = (0.8, 0.2)
    fast = SETTINGS["fast"]
    assert agrees(few, expected, fast, rounded=True)
    assert not agrees(few, expected, fast, rounded=False)
    assert not agrees(many, expected, fast, rounded=True)
    assert not agrees(far, expected, fast, rounded=True)


def test_choosing_needs_an_image(folder: Path) -> None:
    with pytest.raises(InputError, match="0 images and 40 rounds"):
        choose_settings(folder, toy_programs(), toy_inputs(0))


def test_what_settings_move_is_the_most_over_all_images_and_exits(tmp_path: Path) -> None:
    from edgeflex.flow.ship import moved_by_settings

    folder = write_int4(tmp_path)
    images = np.random.default_rng(5).normal(size=(64, DEPTH)).astype(np.float32)
    moved = [moved_by_settings("onnx", folder, one_segment(), images[:count], "fast-int8") for count in (2, 64)]
    plain, quick = (
        np.concatenate([answers(folder, image[None], name)[None] for image in images]) for name in ("", "fast-int8")
    )
    assert moved == pytest.approx([float(np.abs(plain - quick)[:count].max()) for count in (2, 64)])
    few, all_of_them = moved
    assert few is not None
    assert all_of_them is not None
    assert few < all_of_them, "two images show less than all"
    assert moved_by_settings("onnx", folder, one_segment(), images, "") is None
