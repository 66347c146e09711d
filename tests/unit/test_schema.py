"""Nouns: every document survives its own canonical JSON, keeps its digest, and refuses what it does not know."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from edgeflex import schema
from edgeflex.errors import InputError
from edgeflex.schema import Budget, Conditions, Document, LayerKind, LayerShape, Precision
from tests.builders import random_table
from tests.plan_samples import rates_of
from tests.tiny_decoder import tiny_graph, tiny_plan
from tests.toy_bundle import toy_plan

DOCUMENTS = sorted(
    (kind for kind in vars(schema).values() if inspect.isclass(kind) and issubclass(kind, Document)),
    key=lambda kind: kind.__name__,
)
DOCUMENTS.remove(Document)


def strategy(annotation: Any) -> st.SearchStrategy[Any]:
    """Return JSON-able values of an annotation of the schema, small and with every optional part now and then."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 2**53),
        float: st.floats(0.001, 0.999),
        str: st.text(min_size=1, max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }
    if annotation in plain:
        return plain[annotation]
    if origin in {Union, types.UnionType}:
        return st.one_of([strategy(one) for one in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(strategy(arguments[0]), min_size=1, max_size=2)
    if origin is Mapping:
        return st.dictionaries(strategy(arguments[0]), strategy(arguments[1]), max_size=2)
    if issubclass(annotation, Enum):
        return st.sampled_from([one.value for one in annotation])
    return fields(annotation)


def fields(kind: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: strategy(field.annotation) for name, field in kind.model_fields.items()})


def test_the_documents_are_those_that_the_corridor_writes():
    assert {kind.__name__ for kind in DOCUMENTS} >= {
        "BenchResult",
        "BundleManifest",
        "Candidates",
        "CostTable",
        "Curve",
        "DeviceProfile",
        "ModelGraph",
        "Plan",
        "Report",
        "RunStats",
        "VerifyResult",
    }


@pytest.mark.parametrize("kind", DOCUMENTS)
@settings(max_examples=8)
@given(data=st.data())
def test_a_document_survives_its_canonical_json(kind: type[Document], data: st.DataObject):
    value = kind.model_validate(data.draw(fields(kind)))
    text = value.canonical_json()
    again = kind.parse(text, "the file")
    assert again == value
    assert again.canonical_json() == text
    assert again.digest() == value.digest()


@pytest.mark.parametrize("kind", DOCUMENTS)
@settings(max_examples=3)
@given(data=st.data())
def test_an_unknown_field_is_refused_by_its_name(kind: type[Document], data: st.DataObject):
    document = json.loads(kind.model_validate(data.draw(fields(kind))).canonical_json())
    with pytest.raises(InputError, match=rf"the file is not a valid {kind.__name__}: surprise: is no field of it"):
        kind.parse(json.dumps({**document, "surprise": 1}), "the file")


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_another_schema_version_is_refused(kind: type[Document]):
    with pytest.raises(InputError, match="schema_version: Input should be 1"):
        kind.parse('{"schema_version": 2}', "the file")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", b"\xff\xfe", '{"a": NaN}'])
def test_what_is_no_document_is_an_input_error(text: str | bytes):
    with pytest.raises(InputError, match=r"plan\.json is not a valid Plan"):
        schema.Plan.parse(text, "plan.json")


def test_a_fault_deep_inside_is_named_by_its_path_and_all_are_told():
    document = json.loads(random_table(3).canonical_json())
    document["decisions"][1]["options"][0]["latency_s"] = "soon"
    document["scenarios"][0]["reach"] = None
    with pytest.raises(InputError) as refused:
        schema.CostTable.parse(json.dumps(document), "table.json")
    assert "decisions.1.options.0.latency_s:" in str(refused.value)
    assert "scenarios.0.reach:" in str(refused.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(number: float):
    with pytest.raises(ValidationError):
        Budget(max_drop=number)


def test_values_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Budget().max_drop = 0.5


def test_a_digest_stays_the_same_between_versions():
    # Recorded figures of others hang on it: a change of this digest is a change of the schema version.
    assert Budget().canonical_json() == (
        '{"confidence":0.95,"disk_bytes":null,"latency":[],"max_drop":null,"memory_bytes":{},'
        '"minimize":"latency","statistic":"mean"}'
    )
    assert Budget().digest() == "7ec4521ece545a548ac2c75df7ee8d46fbdedad9873f5962dc8536fba901aabd"


def test_equal_values_have_equal_digests_and_others_have_not():
    assert random_table(1).digest() == random_table(1).digest()
    assert len({random_table(seed).digest() for seed in range(20)}) == 20


def test_the_order_of_a_mapping_has_no_part_in_the_digest():
    one = Budget.model_validate({"memory_bytes": {"host": 1, "device": 2}})
    other = Budget.model_validate({"memory_bytes": {"device": 2, "host": 1}})
    assert one.digest() == other.digest()


def test_shapes_count_what_a_hand_counts():
    # 3×3 convolution, 16 to 32 channels in 4 groups, stride 2 over 9×7 with padding 1: 5×4 places.
    conv = LayerShape(
        kind=LayerKind.CONV2D,
        in_channels=16,
        out_channels=32,
        kernel=3,
        stride=2,
        padding=1,
        groups=4,
        height=9,
        width=7,
    )
    assert (conv.out_positions, conv.weight_count, conv.macs) == (20, 32 * 4 * 9, 20 * 32 * 4 * 9)
    linear = LayerShape(kind=LayerKind.LINEAR, in_channels=10, out_channels=3, rows=7)
    assert (linear.out_positions, linear.weight_count, linear.macs) == (7, 30, 210)


@pytest.mark.parametrize(
    ("precision", "bits", "group"),
    [
        ("fp32", 32, None),
        ("fp16", 16, None),
        ("int8-static", 8, None),
        ("int8-dynamic", 8, None),
        ("int4-channel", 4, None),
        ("int4-group32", 4, 32),
    ],
)
def test_a_precision_knows_its_bits(precision: str, bits: int, group: int | None):
    assert (Precision(precision).bits, Precision(precision).group_size) == (bits, group)


def test_a_file_of_another_kind_is_told_in_a_few_lines():
    with pytest.raises(InputError) as refused:
        schema.Plan.parse(json.dumps({f"field{index}": index for index in range(30)}), "bench.json")
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("bench.json is not a valid Plan")
    assert len(lines) < 10
    assert "more: it seems to be a file of another kind" in lines[-1]


def test_conditions_without_speed_are_written_as_they_always_were():
    assert Conditions(load_average=0.5).canonical_json() == (
        '{"clock_hz":null,"energy_j":null,"load_average":0.5,"temperature_c":null}'
    )
    fast = Conditions(arithmetic_s=1e-3, memory_bytes_per_s=1e10)
    assert fast.canonical_json() == (
        '{"arithmetic_s":0.001,"clock_hz":null,"energy_j":null,"load_average":null,"memory_bytes_per_s":10000000000.0,'
        '"temperature_c":null}'
    )
    assert Conditions.model_validate_json(fast.canonical_json()) == fast


@pytest.mark.parametrize("field", ["arithmetic_s", "memory_bytes_per_s"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_speed_of_nothing_is_refused(field: str, value: float):
    with pytest.raises(ValidationError, match="greater than 0"):
        Conditions.model_validate({field: value})


@pytest.mark.parametrize(
    "document",
    [random_table(3), toy_plan(), tiny_plan(tiny_graph()), rates_of(tiny_graph(), lambda *_: 1e-6)],
    ids=lambda one: type(one).__name__,
)
def test_documents_without_conditions_keep_their_digests_and_with_them_survive_their_json(document: Document):
    before = json.loads(document.canonical_json())
    assert "conditions" not in before
    assert type(document).parse(json.dumps(before), "the file") == document
    told = document.model_copy(update={"conditions": Conditions(arithmetic_s=1e-3, load_average=2.0)})
    again = type(document).parse(told.canonical_json(), "the file")
    assert again == told
    assert again.digest() != document.digest()
    assert {**json.loads(told.canonical_json()), "conditions": None}.keys() - before.keys() == {"conditions"}
