"""Traces: what is read, in which order it is replayed, and what is said of damaged files."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.runtimes.expert_cache import union_of
from edgeflex.runtimes.trace import COLUMNS, Trace, read_trace, write_trace
from tests.builders import needed_data

PUBLIC = """# route_trace v1
# model=/a path/Some Model.gguf arch=qwen3moe n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=7
# layer=1 expert_bytes=200 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,5,0.75,0,100
0,0,0,0,1,3,0.25,0,100
0,0,1,0,0,3,0.5,0,100
0,0,1,0,1,2,0.5,0,0
0,0,1,1,0,1,nan,0,0
0,0,1,1,1,0,0.5,0,0
0,1,2,0,0,7,0.75,1,0
0,1,2,0,1,2,0.25,0,100
"""


def wrote(folder, text):
    path = folder / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fault(folder, text) -> str:
    with pytest.raises(InputError) as caught:
        read_trace(wrote(folder, text))
    return str(caught.value)


def random_trace(seed: int) -> Trace:
    draw = np.random.default_rng(seed)
    rows = [
        (turn, phase, step, layer, chunk, slot, expert)
        for turn in range(2)
        for phase, step, chunk in ((0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 3, 0), (1, 4, 0))
        for layer in range(3)
        for slot, expert in enumerate(draw.permutation(6)[:2])
    ]
    columns = dict(zip(COLUMNS[:-1], np.array(rows, dtype=np.int64).T, strict=True))
    return Trace(
        **columns,
        weight=draw.random(len(rows), dtype=np.float32),
        layers=4,
        experts=6,
        top_k=2,
        expert_bytes=np.array([10, 0, 30, 40]),
        precision_bytes={"int8-dynamic": np.array([20, 0, 60, 80])},
        name="a model",
    )


def test_a_public_trace_is_read_by_the_names_of_its_columns(tmp_path):
    trace = read_trace(wrote(tmp_path, PUBLIC))
    assert (trace.layers, trace.experts, trace.top_k, trace.decode_tokens) == (2, 8, 2, 1)
    assert trace.name == "/a path/Some Model.gguf"
    assert trace.sizes()[:, 0].tolist() == [100, 200]
    first, second, third = trace.events
    # the prompt is one event a layer: two tokens together, expert 3 in both
    assert first == (False, 0, 0, 0, (2, 3, 5), (0.25, 0.375, 0.375), 2)
    # a weight that is unknown makes the event's weights unknown
    assert second == (False, 0, 0, 1, (0, 1), None, 1)
    assert third == (True, 0, 1, 0, (2, 7), (0.25, 0.75), 1)
    assert trace.uses()[0].tolist() == [0, 0, 2, 2, 0, 1, 0, 1]
    assert trace.uses(decoding=True).sum() == 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_writing_and_reading_gives_the_same_back_to_the_last_bit(seed, tmp_path_factory):
    trace = random_trace(seed)
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    write_trace(path, trace)
    again = read_trace(path)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    assert again.events == trace.events
    assert (again.layers, again.experts, again.top_k, again.name) == (4, 6, 2, "a model")
    np.testing.assert_array_equal(again.expert_bytes, trace.expert_bytes)
    np.testing.assert_array_equal(again.precision_bytes["int8-dynamic"], [20, 0, 60, 80])


def test_events_do_not_depend_on_the_order_of_rows():
    trace = random_trace(3)
    mixed = np.random.default_rng(1).permutation(len(trace.step))
    shuffled = Trace(**{**vars(trace), **{name: getattr(trace, name)[mixed] for name in COLUMNS}})
    assert shuffled.events == trace.events


def test_chunks_of_a_prompt_are_passes_of_their_own():
    trace = random_trace(3)
    steps = [(event.step, event.decoding, event.layer, event.tokens) for event in trace.events]
    first, second = [(0, False, layer, 2) for layer in range(3)], [(1, False, layer, 1) for layer in range(3)]
    assert steps[:6] == first + second
    assert steps[6] == (2, True, 0, 1)


def test_events_have_what_the_runtime_computes_from_the_same_routing():
    trace = random_trace(7)
    rows = (trace.turn == 0) & (trace.phase == 0) & (trace.iter == 0) & (trace.layer == 1)
    experts, weights = trace.expert[rows].reshape(2, 2), trace.weight[rows].reshape(2, 2)
    event = next(event for event in trace.events if event.layer == 1)
    assert (event.experts, event.weights) == union_of(experts, weights)


def test_columns_that_may_be_absent_have_a_meaning(tmp_path):
    trace = read_trace(wrote(tmp_path, "phase,step,layer,expert\n1,0,0,4\n1,0,0,2\n1,1,0,2\n1,1,0,3\n"))
    assert [event.experts for event in trace.events] == [(2, 4), (2, 3)]
    assert trace.events[0].weights is None
    assert (trace.layers, trace.experts, trace.top_k) == (1, 5, 2)
    with pytest.raises(InputError, match="how many bytes the experts of layers 0 have"):
        trace.sizes()
    with pytest.raises(InputError, match="no bytes for precision 'int4'"):
        trace.sizes("int4")


# --- damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("0,0,1,0,0,3,0.5,0,100", "0,0,1,0,0,3", r"line 8 has 6 columns and 9 are named"),
        ("0,1,2,0,1,2,0.25,0,100\n", "0,1,2,0,", r"line 13 has 5 columns and 9 are named"),
        ("0,0,1,0,0,3,0.5", "0,0,1,0,0,x,0.5", r"line 8 has no number as expert: 'x'"),
        ("0,0,1,0,0,3,0.5", "0,0,1,0,0,8,0.5", r"line 8 has expert 8 \(1 such in all\); a whole number from 0 to 7"),
        ("0,0,1,0,0,3,0.5", "0,0,1,2,0,3,0.5", r"line 8 has layer 2 .* from 0 to 1 is needed"),
        ("0,0,1,0,0,3,0.5", "0,3,1,0,0,3,0.5", r"line 8 has phase 3"),
        ("0,0,1,0,0,3,0.5", "0,0,1.5,0,0,3,0.5", r"line 8 has step 1.5"),
        ("0,0,1,0,0,3,0.5", "0,0,-1,0,0,3,0.5", r"line 8 has step -1"),
        ("0,0,1,0,0,3,0.5", "0,0,nan,0,0,3,0.5", r"line 8 has step nan"),
        ("0,0,1,0,0,3,0.5", "0,0,1e30,0,0,3,0.5", r"line 8 has step 1e\+30"),
        ("0,0,1,0,0,3,0.5", "0,0,1,0,0,3,-0.5", r"line 8 has weight -0.5 .* weight of at least 0"),
        ("0,0,1,0,0,3,0.5", "0,0,1,0,0,2,0.5", r"line 9 names an expert that its token has already"),
        ("turn,phase,step", "turn,phase,stop", r"the column 'step' is missing"),
        ("residency,expert_bytes", "step,expert_bytes", r"the column 'step' is there twice"),
        ("n_expert=8", "n_expert=many", r"n_expert=many; a whole number"),
        ("# layer=1 expert_bytes=200", "# layer=1 expert_bytes=2OO", r"something else than whole numbers"),
        ("# layer=1 expert_bytes=200", "# layer=0 expert_bytes=200", r"repeats a layer"),
        ("# layer=1 expert_bytes=200", "# layer=1 expert_bytes=-200", r"impossible number"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path, old, new, said):
    assert old in PUBLIC
    assert re.search(said, fault(tmp_path, PUBLIC.replace(old, new, 1)))


def test_what_is_no_trace_at_all_is_refused(tmp_path):
    assert "no line of column names" in fault(tmp_path, "")
    assert "no line of column names" in fault(tmp_path, "# route_trace v1\n")
    assert "not UTF-8" in fault(tmp_path, b"\x89PNG\r\n\xff\xfe")
    assert "the column 'layer' is missing" in fault(tmp_path, "<html>\n<body>\n")
    assert "no rows" in fault(tmp_path, "phase,step,layer,expert\n")
    with pytest.raises(InputError, match="does not exist"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="directory"):
        read_trace(tmp_path)


def test_many_bad_lines_are_counted_and_not_all_listed(tmp_path):
    text = fault(tmp_path, "phase,step,layer,expert\n" + "1,2\n" * 50)
    assert text.count("has 2 columns") == 5
    assert "and 45 more lines" in text


def test_a_token_with_too_few_experts_is_told(tmp_path, caplog):
    read_trace(wrote(tmp_path, PUBLIC.rsplit("\n", 2)[0] + "\n"))
    assert "may have been cut off" in caplog.text


@pytest.mark.needs_data
@pytest.mark.parametrize(("name", "tokens", "cycle_mib"), [("qwen", 128, 785), ("gptoss", 64, 908)])
def test_the_public_traces_load(name, tokens, cycle_mib):
    trace = read_trace(needed_data("moe-traces", f"{name}.route.csv"))
    assert trace.decode_tokens == tokens
    assert int((trace.sizes()[:, 0] * trace.top_k).sum()) >> 20 in {cycle_mib - 1, cycle_mib}
