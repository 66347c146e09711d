"""The real thing: engines built and run on this machine's GPU. Skipped with the reason where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from edgeflex.errors import EdgeflexError
from edgeflex.runtimes import exits_for, open_session
from edgeflex.runtimes.cuda_driver import CudaContext, driver_facts, driver_problem, host_view
from edgeflex.runtimes.segments import all_exits
from edgeflex.runtimes.tensorrt import TensorrtSession
from edgeflex.runtimes.tensorrt_build import build, load_tensorrt
from tests.toy_bundle import reference_probabilities, toy_inputs
from tests.toy_engines import write_exported_bundle

pytestmark = pytest.mark.needs_gpu


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    try:
        load_tensorrt()
    except EdgeflexError as error:
        pytest.skip(str(error))
    made = write_exported_bundle(tmp_path_factory.mktemp("tensorrt") / "bundle")
    build(made)
    return made


def test_engines_answer_as_the_reference_does(bundle):
    inputs = toy_inputs(16)
    with open_session(bundle) as session:
        got = all_exits(session, [inputs])
    assert np.abs(got - reference_probabilities(inputs)).max() < 1e-3


def test_leaving_early_follows_the_rule(bundle):
    inputs, thresholds = toy_inputs(16, seed=3), (0.7, 0.6, None)
    with open_session(bundle) as session:
        everything = all_exits(session, [inputs])
        found = [session.infer(inputs[k : k + 1], thresholds) for k in range(16)]
    assert [one.exit for one in found] == exits_for(everything, thresholds).tolist()
    for k, one in enumerate(found):
        assert np.abs(one.probabilities - everything[k, one.exit]).max() < 1e-5


def test_every_segment_is_one_cuda_graph(bundle):
    with TensorrtSession.from_bundle(bundle) as session:
        assert all(stage.graph for stage in session._stages)


def test_a_second_build_keeps_what_is_there(bundle):
    before = {path.name: path.stat().st_mtime_ns for path in (bundle.path / "engines").glob("*.engine")}
    build(bundle)
    assert {path.name: path.stat().st_mtime_ns for path in (bundle.path / "engines").glob("*.engine")} == before


def test_sessions_give_their_memory_back(bundle):
    context = CudaContext()
    try:
        with open_session(bundle) as session:
            session.infer(toy_inputs(1), (None, None, None))
        free_bytes = context.free_bytes()
        for _ in range(5):
            with open_session(bundle) as session:
                session.infer(toy_inputs(1), (None, None, None))
        assert free_bytes - context.free_bytes() < 16 << 20
    finally:
        context.close()


def test_the_driver_alone_moves_data_and_replays_a_graph():
    assert driver_problem() is None
    assert driver_facts().devices[0].memory_bytes > 1 << 28
    context = CudaContext()
    try:
        stream, device = context.new_stream(), context.allocate(4000)
        up, down = context.allocate_pinned(4000), context.allocate_pinned(4000)

        def both_ways() -> None:
            context.upload(device, up, 4000, stream)
            context.download(down, device, 4000, stream)

        graph = context.capture(stream, both_ways)
        for value in (1.0, 2.0):
            host_view(up, (1000,)).fill(value)
            context.launch(graph, stream)
            context.synchronize(stream)
            assert host_view(down, (1000,)).tolist() == [value] * 1000
        with pytest.raises(EdgeflexError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            context.allocate(1 << 46)
    finally:
        context.close()
