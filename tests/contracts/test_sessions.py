"""What every session keeps. A backend that passes is a backend; every row of the registry's runtimes is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import DeviceError, InputError, MissingDependencyError
from edgeflex.registry import RUNTIMES, get
from edgeflex.runtimes import exits_for, open_session
from edgeflex.runtimes.reference import ReferenceSession
from edgeflex.runtimes.segments import all_exits
from edgeflex.runtimes.tensorrt import TensorrtSession
from edgeflex.runtimes.tensorrt_build import build
from tests.toy_bundle import SHAPES, reference_probabilities, toy_inputs, toy_segments, write_toy_bundle
from tests.toy_engines import install, write_engine_bundle

if TYPE_CHECKING:
    from edgeflex.registry import Row
    from edgeflex.runtimes import Session

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=RUNTIMES.rows, ids=lambda row: row.name)
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    row: Row = request.param
    if row.name == "reference":
        yield lambda: ReferenceSession(toy_segments())
        return
    folder = tmp_path_factory.mktemp("contract") / "bundle"
    if row.name == "tensorrt":  # on the fake, whose engines compute the toy; tests/gpu has the real thing
        with pytest.MonkeyPatch.context() as patch:
            trt, bundle = install(patch), write_engine_bundle(folder)
            build(bundle, library=trt.cuda)
            yield lambda: TensorrtSession(bundle, library=trt.cuda)
        return
    try:
        get(RUNTIMES, row.name)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    bundle = write_toy_bundle(folder, backend=row.capabilities.backend)
    yield lambda: open_session(bundle, row.name)


def test_every_segment_says_what_the_reference_says(make) -> None:
    inputs = toy_inputs(8)
    with make() as session:
        assert session.segment_count == 3
        got = all_exits(session, [inputs])
    assert got.dtype == np.float32
    assert np.abs(got - reference_probabilities(inputs)).max() < TOLERANCE


def test_activations_have_the_next_segments_shape_and_end_with_the_last(make) -> None:
    x = toy_inputs(1)
    with make() as session:
        for index, following in enumerate([*SHAPES[1:], None]):
            x, probabilities = session.segment(index, x)
            assert probabilities.shape == (3,)
            assert probabilities.sum() == pytest.approx(1.0, abs=1e-5)
            assert (x if following is None else x.shape) == following


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    thresholds=st.tuples(*[st.one_of(st.none(), st.floats(0.3, 1.0))] * 3),
)
def test_leaving_early_gives_the_answer_of_the_exit_that_the_rule_names(make, seed: int, thresholds) -> None:
    inputs = toy_inputs(6, seed)
    with make() as session:
        everything = all_exits(session, [inputs])
        outcomes = [session.infer(inputs[i : i + 1], thresholds) for i in range(6)]
    exits = exits_for(everything, thresholds)
    assert [outcome.exit for outcome in outcomes] == exits.tolist()
    for index, outcome in enumerate(outcomes):
        assert outcome.probabilities.tolist() == everything[index, exits[index]].tolist()
        assert outcome.confidence == float(outcome.probabilities.max())


def test_answers_are_copies_that_later_work_does_not_touch(make) -> None:
    inputs = toy_inputs(2)
    with make() as session:
        first = session.infer(inputs[:1], (None, None, None))
        activations, probabilities = session.segment(0, inputs[:1])
        kept = (first.probabilities.copy(), activations.copy(), probabilities.copy())
        session.infer(inputs[1:], (None, None, None))
        session.segment(0, inputs[1:])
    assert np.array_equal(first.probabilities, kept[0])
    assert np.array_equal(activations, kept[1])
    assert np.array_equal(probabilities, kept[2])


def test_the_same_input_gets_the_same_answer_whatever_came_between(make) -> None:
    inputs = toy_inputs(3)
    with make() as session:
        before = session.infer(inputs[:1], (None, None, None)).probabilities
        for other in (1, 2):
            session.infer(inputs[other : other + 1], (0.0, None, None))
        after = session.infer(inputs[:1], (None, None, None)).probabilities
    assert np.array_equal(before, after)


def test_inputs_are_not_written_to_and_may_be_strided_or_read_only(make) -> None:
    inputs = toy_inputs(1)
    strided = np.asfortranarray(inputs)
    frozen = inputs.copy()
    frozen.flags.writeable = False
    with make() as session:
        answers = [session.infer(x, (None, None, None)).probabilities for x in (inputs, strided, frozen)]
    assert np.array_equal(inputs, toy_inputs(1))
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])


def test_a_closed_session_says_so(make) -> None:
    session: Session = make()
    with pytest.raises(DeviceError, match="the session is closed"):
        session.infer(toy_inputs(1), (None, None, None))
    with session:
        session.infer(toy_inputs(1), (None, None, None))
    session.close()
    session.close()
    with pytest.raises(DeviceError, match="the session is closed"):
        session.segment(0, toy_inputs(1))


def test_a_session_can_be_entered_again(make) -> None:
    session = make()
    with session:
        first = session.infer(toy_inputs(1), (None, None, None))
    with session:
        second = session.infer(toy_inputs(1), (None, None, None))
    assert first.probabilities.tolist() == second.probabilities.tolist()


@pytest.mark.parametrize(
    "x",
    [toy_inputs(1)[:, :1], toy_inputs(1).astype(np.float64)],
    ids=["a missing channel", "double precision"],
)
def test_a_wrong_input_is_bad_input_and_the_session_goes_on(make, x: np.ndarray) -> None:
    with make() as session:
        with pytest.raises(InputError, match="Prepare it with"):
            session.infer(x, (None, None, None))
        assert session.infer(toy_inputs(1), (None, None, None)).exit == 2


def test_thresholds_must_be_one_per_segment(make) -> None:
    with make() as session, pytest.raises(InputError, match="2 thresholds for 3 segments"):
        session.infer(toy_inputs(1), (0.5, None))


@pytest.mark.parametrize("index", [-1, 3])
def test_a_segment_that_is_not_there_is_bad_input(make, index: int) -> None:
    with make() as session, pytest.raises(InputError, match=f"segment {index}: there are segments 0 to 2"):
        session.segment(index, toy_inputs(1))


def test_input_that_is_not_a_number_is_a_failure_not_an_answer(make) -> None:
    x = np.full((1, 3, 16, 16), np.nan, dtype=np.float32)
    with make() as session, pytest.raises(DeviceError, match="which is no probability"):
        session.infer(x, (None, None, None))


def test_outputs_of_many_images_that_are_no_numbers_are_a_failure_too(make) -> None:
    x = toy_inputs(3)
    x[1] = np.nan
    with (
        make() as session,
        pytest.raises(DeviceError, match=r"exit 0 gave .* no numbers for 1 of 3 images.* number 1\."),
    ):
        all_exits(session, [x])
