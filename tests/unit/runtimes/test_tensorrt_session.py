"""Engines that run: the reference's answers through the whole data path, and what every failure says and frees."""

from __future__ import annotations

import json
import logging
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeflex.errors import BundleError, DeviceError, InputError, UnsupportedError
from edgeflex.registry import RUNTIMES, get
from edgeflex.runtimes import exits_for, open_session
from edgeflex.runtimes.segments import all_exits
from edgeflex.runtimes.tensorrt import TensorrtSession
from edgeflex.runtimes.tensorrt_build import build
from tests.fake_cuda import Device, FakeCuda
from tests.fake_tensorrt import VERSIONS, names_of
from tests.toy_bundle import SHAPES, reference_probabilities, toy_inputs
from tests.toy_engines import NEWEST, install, streaming, toy_functions, write_engine_bundle, write_exported_bundle

NEVER = (None, None, None)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Build a bundle with one fake and return a function that opens it with another."""

    def make(version: str = NEWEST, *, cuda: FakeCuda | None = None, fail=(), trt_fields=None, **fields):
        name = f"bundle{len(list(tmp_path.iterdir()))}"
        bundle = write_engine_bundle(tmp_path / name, **fields)
        builder = install(monkeypatch, version)
        build(bundle, library=builder.cuda)
        trt = install(monkeypatch, version, cuda=cuda, fail=fail, **(trt_fields or {}))
        return TensorrtSession(bundle, library=trt.cuda), trt

    return make


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_gives_the_references_answers_at_every_exit(made, version: str):
    session, trt = made(version)
    inputs = toy_inputs(8)
    with session:
        got = all_exits(session, [inputs])
        assert session.segment_count == 3
        assert session.load_s > 0
    assert np.array_equal(got, reference_probabilities(inputs))
    assert trt.cuda.alive == []
    for kind, name in trt.touched:
        assert all(name in names_of(kind, one) for one in VERSIONS), f"{kind}.{name}"


@pytest.mark.slow
def test_what_the_exporter_writes_is_what_is_built_and_run(tmp_path, monkeypatch):
    bundle = write_exported_bundle(tmp_path / "bundle")
    trt = install(monkeypatch, "10.3")
    build(bundle, library=trt.cuda)
    inputs = toy_inputs(4)
    with TensorrtSession(bundle, library=trt.cuda) as session:
        assert np.array_equal(all_exits(session, [inputs]), reference_probabilities(inputs))
        assert "cuGraphLaunch" in trt.cuda.calls


@pytest.mark.parametrize("fail", [(), ("capture",)], ids=["CUDA graphs", "plain"])
@pytest.mark.parametrize("confidence", [False, True], ids=["row", "confidence alone"])
def test_leaving_early_gives_the_answer_of_the_exit_that_the_rule_names(made, fail, confidence: bool):
    fields = {"functions": toy_functions(confidence=confidence)}
    session, trt = made(confidence=confidence, fail=fail, trt_fields=fields)
    draw = np.random.default_rng(0)
    inputs = toy_inputs(30)
    with session:
        everything = all_exits(session, [inputs])
        for index in range(30):
            thresholds = tuple(None if value < 0.3 else float(value) for value in draw.uniform(0.2, 1.0, 3))
            outcome = session.infer(inputs[index : index + 1], thresholds)
            expected = exits_for(everything[index : index + 1], thresholds)[0]
            assert outcome.exit == expected
            assert outcome.probabilities.tolist() == everything[index, expected].tolist()
            assert outcome.confidence == float(outcome.probabilities.max())
    assert np.array_equal(everything, reference_probabilities(inputs))
    assert trt.cuda.alive == []


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), order=st.permutations(range(4)))
def test_an_answer_does_not_depend_on_what_came_before(made, seed: int, order):
    session, _ = made()
    inputs = toy_inputs(4, seed)
    reference = reference_probabilities(inputs)
    with session:
        for index in order:
            assert np.array_equal(session.infer(inputs[index : index + 1], NEVER).probabilities, reference[index, 2])


def test_activations_stay_on_the_device_at_the_next_segments_input(made):
    session, trt = made()
    with session:
        addresses: dict[str, list[int]] = {}
        for name, address in trt.named("IExecutionContext.set_tensor_address"):
            addresses.setdefault(name, []).append(address)
        assert addresses["activations"] == addresses["x"][1:]
        assert len(set(addresses["x"] + addresses["probabilities"])) == 6
        trt.cuda.calls.clear()
        session.infer(toy_inputs(1), NEVER)
        assert trt.cuda.calls == ["cuGraphLaunch", "cuStreamSynchronize"] * 3


def test_leaving_at_the_first_exit_runs_nothing_more(made):
    session, trt = made()
    with session:
        trt.cuda.calls.clear()
        assert session.infer(toy_inputs(1), (0.0, None, None)).exit == 0
        assert trt.cuda.calls == ["cuGraphLaunch", "cuStreamSynchronize"]


def test_where_the_engine_gives_its_confidence_only_that_comes_back_until_the_end(made):
    session, trt = made(confidence=True, trt_fields={"functions": toy_functions(confidence=True)})
    with session:
        trt.cuda.calls.clear()
        session.infer(toy_inputs(1), NEVER)
        assert trt.cuda.calls[-2:] == ["cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"]
        assert trt.cuda.calls.count("cuMemcpyDtoHAsync_v2") == 1  # the row of the last exit; confidences in the graphs


def test_answers_are_copies_and_inputs_may_be_strided_or_read_only(made):
    session, _ = made()
    inputs = toy_inputs(2)
    frozen = inputs[:1].copy()
    frozen.flags.writeable = False
    with session:
        kept = session.infer(inputs[:1], NEVER).probabilities
        activations, row = session.segment(0, inputs[:1])
        assert activations is not None
        before = (kept.copy(), activations.copy(), row.copy())
        session.infer(inputs[1:], NEVER)
        session.segment(0, inputs[1:])
        for found, copy in zip((kept, activations, row), before, strict=True):
            assert np.array_equal(found, copy)
        for x in (np.asfortranarray(inputs[:1]), frozen):
            assert np.array_equal(session.infer(x, NEVER).probabilities, kept)
    assert np.array_equal(kept, before[0])  # not a view of memory that is gone


def test_a_session_can_be_closed_twice_and_entered_again(made):
    session, trt = made()
    with pytest.raises(DeviceError, match="the session is closed"):
        session.infer(toy_inputs(1), NEVER)
    with session:
        first = session.infer(toy_inputs(1), NEVER)
    session.close()
    session.close()
    with pytest.raises(DeviceError, match="the session is closed"):
        session.segment(0, toy_inputs(1))
    with session:
        assert session.infer(toy_inputs(1), NEVER).probabilities.tolist() == first.probabilities.tolist()
    assert trt.cuda.alive == []


def test_wrong_input_thresholds_and_segments_are_bad_input(made):
    session, _ = made()
    with session:
        for x in (toy_inputs(1)[:, :1], toy_inputs(1).astype(np.float64)):
            with pytest.raises(InputError, match="Prepare it with"):
                session.infer(x, NEVER)
        with pytest.raises(InputError, match="2 thresholds for 3 segments"):
            session.infer(toy_inputs(1), (0.5, None))
        for index in (-1, 3):
            with pytest.raises(InputError, match=f"segment {index}: there are segments 0 to 2"):
                session.segment(index, toy_inputs(1))
        assert session.infer(toy_inputs(1), NEVER).exit == 2


def test_input_that_is_not_a_number_is_a_failure_not_an_answer(made):
    session, _ = made()
    with session, pytest.raises(DeviceError, match="which is no probability"):
        session.infer(np.full(SHAPES[0], np.nan, dtype=np.float32), NEVER)


def test_another_thread_may_ask(made):
    session, _ = made()
    answers = []
    with session:
        thread = threading.Thread(target=lambda: answers.append(session.infer(toy_inputs(1), NEVER)))
        thread.start()
        thread.join()
    assert answers[0].exit == 2


# --- CUDA graphs -------------------------------------------------------------------------------------


def test_segments_are_recorded_where_the_recipe_says_that_shapes_are_fixed(made):
    for fixed in (True, False):
        session, trt = made(cuda_graph=fixed)
        with session:
            session.infer(toy_inputs(1), NEVER)
            assert ("cuGraphLaunch" in trt.cuda.calls) is fixed


@pytest.mark.parametrize(
    ("fail", "cuda", "reason"),
    [
        (("capture",), FakeCuda(), "CAPTURE_INVALIDATED"),
        (("half a graph",), FakeCuda(), "its replay gave another answer"),
        ((), FakeCuda(fail={"cuStreamBeginCapture_v2": (2, 900)}), "CAPTURE_UNSUPPORTED"),
        ((), FakeCuda(fail={"cuGraphInstantiateWithFlags": (1, 2)}), "OUT_OF_MEMORY"),
        ((), FakeCuda(fail={"cuGraphLaunch": (1, 700)}), "ILLEGAL_ADDRESS"),
    ],
    ids=["invalid", "incomplete", "refused", "no memory", "no launch"],
)
def test_a_graph_that_fails_or_lies_is_left_out_and_said(made, caplog, fail, cuda, reason: str):
    session, trt = made(fail=fail, cuda=cuda)
    inputs = toy_inputs(3)
    with caplog.at_level(logging.WARNING), session:
        assert np.array_equal(all_exits(session, [inputs]), reference_probabilities(inputs))
    assert reason in caplog.text
    assert "runs without a CUDA graph" in caplog.text
    assert trt.cuda.alive == []


# --- refusals ----------------------------------------------------------------------------------------


def test_bundles_of_other_backends_and_bare_folders_are_refused(tmp_path):
    bundle = write_engine_bundle(tmp_path / "bundle", backend="onnx")
    with pytest.raises(UnsupportedError, match="exported for 'onnx', which runtime 'tensorrt' cannot run"):
        open_session(bundle, "tensorrt")
    with pytest.raises(UnsupportedError, match="no engines"):
        get(RUNTIMES, "tensorrt").from_folder(tmp_path, bundle.manifest.segments)
    with pytest.raises(InputError, match="0 threads"):
        TensorrtSession.from_bundle(write_engine_bundle(tmp_path / "right"), threads=0)


def test_engines_that_were_not_built_are_asked_for(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    trt = install(monkeypatch)
    with pytest.raises(DeviceError, match=f"no engines were built yet. Build them here: edgeflex build {bundle.path}"):
        TensorrtSession(bundle, library=trt.cuda).__enter__()


@pytest.mark.parametrize(
    ("version", "cuda", "reason"),
    [
        ("11.0", FakeCuda(), r"TensorRT was 10\.16\.0, is 11\.0\.0"),
        ("10.16", FakeCuda(devices=(Device("Orin Nano"),)), "GPU was Orin, is Orin Nano"),
        ("10.16", FakeCuda(devices=(Device(capability=(8, 9)),)), r"compute capability was 8\.7, is 8\.9"),
        ("10.16", FakeCuda(version=13000), r"the driver's CUDA was 12\.6, is 13\.0"),
    ],
)
def test_engines_of_another_machine_are_refused_before_they_are_loaded(tmp_path, monkeypatch, version, cuda, reason):
    bundle = write_engine_bundle(tmp_path / "bundle")
    build(bundle, library=install(monkeypatch, "10.16").cuda)
    trt = install(monkeypatch, version, cuda=cuda)
    with pytest.raises(DeviceError, match=reason):
        TensorrtSession(bundle, library=cuda).__enter__()
    assert trt.calls == []
    assert cuda.alive == []


def test_the_builders_workspace_does_not_matter_to_what_runs(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    trt = install(monkeypatch)
    build(bundle, library=trt.cuda, workspace_bytes=5 << 20)
    with TensorrtSession(bundle, library=trt.cuda) as session:
        assert session.infer(toy_inputs(1), NEVER).exit == 2


@pytest.mark.parametrize("content", [b"ENGINE of another", None])
def test_a_damaged_or_missing_engine_is_never_handed_to_tensorrt(made, content):
    session, trt = made()
    engine = session._bundle.path / "engines" / "segment2.engine"
    engine.unlink()
    if content is not None:
        engine.write_bytes(content)
    with pytest.raises(BundleError if content else DeviceError, match="Build it again: edgeflex build"):
        session.__enter__()
    assert len(trt.named("Runtime.deserialize_cuda_engine")) == 2
    assert trt.cuda.alive == []


@pytest.mark.parametrize("text", ["{", '{"schema_version": 1}'])
def test_a_damaged_index_says_so(made, text: str):
    session, _ = made()
    (session._bundle.path / "engines" / "index.json").write_text(text)
    with pytest.raises(BundleError, match="not a valid EngineIndex"):
        session.__enter__()


def test_an_index_that_lacks_an_engine_asks_for_it(made):
    session, _ = made()
    path = session._bundle.path / "engines" / "index.json"
    document = json.loads(path.read_text())
    del document["engines"][1]
    path.write_text(json.dumps(document))
    with pytest.raises(DeviceError, match="no engine of segment1"):
        session.__enter__()


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": SHAPES[1], "probabilities": (1, 3)},
        {"x": SHAPES[1], "activations": (1, 9), "probabilities": (1, 3)},
        {"x": SHAPES[1], "activations": SHAPES[2], "probabilities": (3,)},
        {"x": SHAPES[1], "activations": SHAPES[2], "probabilities": (1, -1)},
        {"x": SHAPES[1], "activations": SHAPES[2], "probabilities": (1, 3), "more": (1,)},
        {"x": SHAPES[1], "activations": SHAPES[2], "probabilities": (1, 3), "confidence": (2,)},
        {"x": SHAPES[1], "activations": SHAPES[2]},
    ],
    ids=["no activations", "other activations", "flat row", "open row", "one more", "two confidences", "no row"],
)
def test_an_engine_with_other_tensors_than_the_manifest_is_not_of_this_bundle(made, tensors):
    session, trt = made(tensors={1: tensors})
    with pytest.raises(BundleError, match="the engine of 'segment1' has the tensors"):
        session.__enter__()
    assert trt.cuda.alive == []


FAILURES = {
    "driver": "does not start: CUDA initialization failure with error: 35",
    "deserialize": "refuses the engine: The engine plan file is generated on an incompatible device",
    "context": "could not make an execution context: Requested size was 12 bytes: out of memory",
    "address": "refuses a place for 'probabilities'",
    "enqueue": "could not run segment0: enqueue: no kernel image",
}


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_every_failure_says_what_tensorrt_said_and_frees_everything(made, fail: str, version: str):
    session, trt = made(version, fail={fail})
    with pytest.raises(DeviceError, match=FAILURES[fail]):
        session.__enter__()
    assert trt.cuda.alive == []
    with pytest.raises(DeviceError, match="the session is closed"):
        session.infer(toy_inputs(1), NEVER)


CALLS = {
    "cuMemAlloc_v2": 6,
    "cuMemHostAlloc": 4,
    "cuStreamCreate": 1,
    "cuStreamSynchronize": 2,
    "cuMemcpyHtoDAsync_v2": 1,
    "cuMemcpyDtoHAsync_v2": 3,
    "cuMemGetInfo_v2": 1,
    "cuDevicePrimaryCtxRetain": 1,
    "cuCtxSetCurrent": 1,
}


@pytest.mark.parametrize(("name", "which"), [(name, k + 1) for name, count in CALLS.items() for k in range(count)])
def test_a_driver_that_fails_anywhere_while_loading_is_named_and_nothing_stays(made, name: str, which: int):
    session, trt = made(cuda=FakeCuda(fail={name: (which, 2)}), cuda_graph=False)
    with pytest.raises(DeviceError, match=rf"{name} failed: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        session.__enter__()
    assert trt.cuda.alive == []


def test_a_failure_while_running_is_a_device_error_and_closing_still_works(made):
    session, trt = made()
    with session:
        trt.cuda.fail["cuStreamSynchronize"] = (trt.cuda.calls.count("cuStreamSynchronize") + 2, 700)
        with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            session.infer(toy_inputs(1), NEVER)
    assert trt.cuda.alive == []


# --- weight streaming --------------------------------------------------------------------------------


def _budgets(trt):
    return trt.named("ICudaEngine.weight_streaming_budget_v2")


def test_weights_that_fit_stay_on_the_device(made):
    session, trt = made(options=streaming(), trt_fields={"weights": 1 << 30})
    with session:
        assert session.infer(toy_inputs(1), NEVER).exit == 2
    assert _budgets(trt) == []


def test_weights_that_do_not_fit_get_a_budget_before_any_context_exists(made):
    session, trt = made(options=streaming(), trt_fields={"weights": 4 << 30})
    with session:
        assert session.infer(toy_inputs(1), NEVER).exit == 2
    budgets = _budgets(trt)
    assert len(budgets) == 3
    assert 0.85 * (6 << 30) < sum(budgets) < 0.9 * (6 << 30)
    names = [name for name, _ in trt.calls]
    assert names.index("IExecutionContext.set_tensor_address") > max(
        index for index, name in enumerate(names) if name == "ICudaEngine.weight_streaming_budget_v2"
    )


def test_the_plans_device_memory_is_a_limit_to_resident_weights(made):
    session, trt = made(options=streaming(), device_bytes=303_000, trt_fields={"weights": 200_000})
    with session:
        pass
    assert _budgets(trt) == [100_000] * 3


def test_without_streaming_no_budget_is_set(made):
    session, trt = made(trt_fields={"weights": 4 << 40})
    with session:
        pass
    assert _budgets(trt) == []
