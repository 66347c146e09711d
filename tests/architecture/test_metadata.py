"""The installed package says what it needs and where it starts."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import entry_points, requires, version
from pathlib import Path
from typing import Any

import edgeflex

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
NEEDED = {
    "executorch": ">=1.5.1,<1.6",
    "torch": ">=2.13,<2.14",
    "pydantic": ">=2.7,<3",
    **dict.fromkeys(("torchao", "numpy", "scipy", "typer", "rich", "jinja2", "matplotlib"), None),
    **dict.fromkeys(("psutil", "pillow", "safetensors", "platformdirs"), None),
}


def pyproject() -> dict[str, Any]:
    reader: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    read: dict[str, Any] = reader.loads(PYPROJECT.read_text(encoding="utf-8"))
    return read


def split(requirement: str) -> tuple[str, str]:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match.group(), requirement[match.end() :].replace(" ", "")


def test_dependencies_are_those_that_a_user_was_told():
    stated = dict(split(one) for one in pyproject()["project"]["dependencies"])
    assert set(NEEDED) <= set(stated)
    assert {name: stated[name] for name, limits in NEEDED.items() if limits} == {
        name: limits for name, limits in NEEDED.items() if limits
    }
    assert all(limits for limits in stated.values()), "every dependency states the versions that it works with"


def test_the_installed_metadata_is_that_of_the_sources():
    stated = {split(one)[0].lower() for one in pyproject()["project"]["dependencies"]}
    plain = [one for one in requires("edgeflex") or () if "extra ==" not in one]
    assert {split(one)[0].lower() for one in plain} == stated
    assert version("edgeflex") == edgeflex.__version__ == pyproject()["project"]["version"]


def test_the_console_script_is_the_command_line():
    script = next(one for one in entry_points(group="console_scripts") if one.name == "edgeflex")
    from edgeflex.cli import main

    assert script.load() is main


def test_the_package_is_typed_and_asks_for_python_3_10():
    assert (Path(edgeflex.__file__).parent / "py.typed").exists()
    assert pyproject()["project"]["requires-python"] == ">=3.10"
