"""The pages say what is so: their commands parse, their links lead somewhere, what they name exists."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgeflex import errors
from edgeflex.budget import parse_budget, parse_decoder_budget
from edgeflex.cli import app
from edgeflex.errors import EdgeflexError, InfeasibleError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "edgeflex"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CLI: Any = typer.main.get_command(app)
# typer may carry click's classes under its own roof
PARSER_ERROR: type[Exception] = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def fenced_commands(page: Path) -> list[str]:
    """Every ``edgeflex …`` line of a page's fenced blocks, continued lines joined, prompts left out."""
    found = []
    for _, body in _FENCE.findall(text_of(page)):
        lines = (line.strip().removeprefix("$ ") for line in body.replace("\\\n", " ").splitlines())
        found += [line for line in lines if line.startswith("edgeflex ")]
    return found


def inline_commands(page: Path) -> list[str]:
    """Every ``edgeflex NAME …`` in backticks of a page's running text."""
    return [text for text in _INLINE.findall(without_fences(text_of(page))) if text.startswith("edgeflex ")]


def command_for(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that the arguments reach, and what is left for it."""
    command, rest = CLI, list(arguments)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    return command, rest


def fault_of(line: str) -> str:
    """What the command line's own parser has against ``line``, or nothing."""
    command, rest = command_for(shlex.split(line, comments=True)[1:])
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        return f"there is no command {rest[0]!r}"
    try:
        context = command.make_context(command.name, rest)
    except typer.Exit:  # what --help ends with
        return ""
    except PARSER_ERROR as error:
        return str(error)
    return budget_fault(context.params) if command.name == "plan" else ""


def budget_fault(given: dict[str, Any]) -> str:
    latency = given["latency"] or ()
    names = ("memory", "disk", "minimize")
    limits = {name: given[name] for name in names}
    decoder = {name: given[name] for name in ("first_token", "max_kl", "dry_run") if given[name]}
    try:
        if decoder or any("/" in one for one in latency) or given["minimize"] == "kl":
            counts = {"prompt_tokens": given["prompt_tokens"], "context_tokens": given["context"]}
            decoder.pop("dry_run", None)
            parse_decoder_budget(latency=latency, **limits, **decoder, **counts)
        else:
            parse_budget(latency=latency, max_drop=given["max_drop"], confidence=given["confidence"], **limits)
    except EdgeflexError as error:
        return str(error)
    return ""


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be reached by."""
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        for heading in _HEADING.findall(without_fences(text_of(page)))
    }


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in _LINK.findall(without_fences(text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, fragment = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        found = target.is_relative_to(ROOT) and target.exists()
        if not found or (fragment and fragment not in anchors(target)):
            dead.append(link)
    return dead


def missing_files(page: Path) -> list[str]:
    """Paths of the repository in backticks that lead nowhere; a room may stand without the package's name."""
    rooms = [folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and (folder / "__init__.py").exists()]
    tops = ["benchmarks", "docs", "edgeflex", "tests", ".ci", *rooms]
    ours = re.compile(rf"(?:{'|'.join(map(re.escape, tops))})/[\w./*-]*")
    named = [text for text in _INLINE.findall(without_fences(text_of(page))) if ours.fullmatch(text)]
    return [text for text in named if not any(any(base.glob(text.rstrip("/"))) for base in (ROOT, PACKAGE))]


def sections() -> dict[str, str]:
    """The text of each ``## edgeflex NAME`` of the commands' page."""
    parts = re.split(r"^## edgeflex ([\w-]+)$", text_of(ROOT / "docs" / "commands.md"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def leaves() -> list[tuple[str, Any]]:
    """Every command with the section that it belongs to."""
    found = []
    for name, command in CLI.commands.items():
        found.append((name, command))
        found += [(name, below) for below in getattr(command, "commands", {}).values()]
    return found


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
class TestPage:
    def test_every_command_in_a_block_parses(self, page: Path) -> None:
        wrong = {line: fault for line in fenced_commands(page) if (fault := fault_of(line))}
        on_purpose = {line for line in wrong if page.name == "errors.md" and "6 gigs" in line}
        assert {line: fault for line, fault in wrong.items() if line not in on_purpose} == {}

    def test_every_command_in_the_text_exists(self, page: Path) -> None:
        for line in inline_commands(page):
            command, rest = command_for(shlex.split(line)[1:])
            unknown = [word for word in rest if word.startswith("--") and word not in {"--help", *options_of(command)}]
            assert not unknown, line
            assert command is not CLI or not rest or rest[0].startswith("-"), line

    def test_every_relative_link_leads_somewhere(self, page: Path) -> None:
        assert dead_links(page) == []

    def test_every_file_that_it_names_exists(self, page: Path) -> None:
        assert missing_files(page) == []


def test_the_commands_page_has_a_section_per_command_in_the_order_of_the_help() -> None:
    listed = list(sections())
    assert sorted(listed) == sorted(CLI.commands)
    groups = {"devices", "trace"}  # which the help puts last whatever their place in the work
    ordered = [name for name in CLI.commands if name not in groups]
    assert [name for name in listed if name not in groups] == ordered


@pytest.mark.parametrize(("section", "command"), leaves(), ids=lambda value: str(getattr(value, "name", value)))
def test_every_option_stands_in_its_command_section(section: str, command: Any) -> None:
    text = sections()[section]
    everywhere = text_of(ROOT / "docs" / "commands.md").partition("\n## ")[0]
    common = {option for option in ("--json", "--quiet", "--help") if f"`{option}`" in everywhere}
    assert options_of(command) - common <= set(re.findall(r"^\| `(--[\w-]+)`", text, flags=re.MULTILINE))


@pytest.mark.parametrize(("section", "command"), leaves(), ids=lambda value: str(getattr(value, "name", value)))
def test_every_default_in_a_section_is_the_command_own(section: str, command: Any) -> None:
    rows = re.findall(r"^\| `(--[\w-]+)`.*\| `?([^|`]+?)`? \|$", sections()[section], flags=re.MULTILINE)
    defaults = {name: parameter.default for parameter in command.params for name in parameter.opts}
    told = {name: text for name, text in rows if name in defaults and isinstance(defaults[name], str | int | Path)}
    own = {name: {"False": "off", "True": "on"}.get(str(defaults[name]), str(defaults[name])) for name in told}
    assert {name: text for name, text in told.items() if own[name]} == {n: t for n, t in own.items() if t}


def test_the_architecture_names_every_module() -> None:
    text = text_of(ROOT / "ARCHITECTURE.md")
    modules = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name[:2] != "__"]
    assert [name for name in modules if f"`{name}`" not in text] == []


def test_the_architecture_shows_the_layers_that_are_enforced() -> None:
    enforced = re.search(r"^layers = \[(.*?)^\]", text_of(ROOT / "pyproject.toml"), re.MULTILINE | re.DOTALL)
    assert enforced is not None
    layers = [line.replace("edgeflex.", "") for line in re.findall(r'"([^"]+)"', enforced[1])]
    blocks = [body.splitlines() for _, body in _FENCE.findall(text_of(ROOT / "ARCHITECTURE.md"))]
    assert [layer for layer in layers if layer != "__main__"] in blocks


def test_the_errors_page_has_every_error_with_its_code() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text_of(ROOT / "docs" / "errors.md"), flags=re.MULTILINE)
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, EdgeflexError)]
    assert {(int(code), name) for code, name in rows} == {(one.exit_code, one.__name__) for one in classes}


def test_the_infeasible_example_is_what_the_command_answers() -> None:
    page = ROOT / "docs" / "errors.md"
    line = next(one for one in fenced_commands(page) if one.endswith("--json"))
    arguments = [str(ROOT / word) if word.startswith("docs/") else word for word in shlex.split(line)[1:]]
    answered = CliRunner().invoke(app, arguments).exception
    assert isinstance(answered, InfeasibleError)
    shown = next(json.loads(body) for kind, body in _FENCE.findall(text_of(page)) if kind == "json")
    said = {"error": "InfeasibleError", "message": str(answered), "schema_version": 1, **answered.details()}
    assert shown == json.loads(json.dumps(said))


def test_the_tables_of_the_format_page_are_the_fields_of_the_nouns() -> None:
    from edgeflex.schema import Boundary, CostTable, Decision, Option, Rule, Scenario

    text = text_of(ROOT / "docs" / "table-format.md")
    for noun in (CostTable, Scenario, Decision, Option, Boundary, Rule):
        for field in noun.model_fields:
            assert re.search(rf'[`"]{field}[`"]', text), f"{noun.__name__}.{field}"
