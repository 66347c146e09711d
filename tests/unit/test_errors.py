"""Errors: each with its exit code, all faults of one input in one, and the fields for machines."""

from __future__ import annotations

import json

import pytest

from edgeflex import errors
from edgeflex.errors import EdgeflexError, InfeasibleError, InputError

CODES = {
    "EdgeflexError": 1,
    "InputError": 2,
    "InfeasibleError": 3,
    "CheckFailedError": 3,
    "UnsupportedError": 4,
    "MissingDependencyError": 5,
    "BundleError": 6,
    "DeviceError": 7,
}


def test_every_error_has_the_exit_code_that_the_help_tells():
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, EdgeflexError)
    }
    assert found == CODES


def test_one_fault_is_one_line_and_several_are_listed():
    assert str(InputError.collect("the file", ["it is empty"])) == "the file: it is empty"
    several = str(InputError.collect("the file", ["a", "b", "c"]))
    assert several.splitlines() == ["the file: 3 faults", "  - a", "  - b", "  - c"]


def test_an_infeasible_answer_carries_its_fields_as_plain_values():
    error = InfeasibleError("no", binding=["memory"], least={"memory": 5}, relaxation="--memory 5")
    assert json.loads(json.dumps(error.details())) == {
        "binding": ["memory"],
        "least": {"memory": 5},
        "relaxation": "--memory 5",
    }
    assert InfeasibleError("no").details() == {"binding": [], "least": {}, "relaxation": ""}


@pytest.mark.parametrize("name", sorted(set(CODES) - {"InfeasibleError"}))
def test_other_errors_add_no_fields(name: str):
    assert vars(errors)[name]("x").details() == {}
