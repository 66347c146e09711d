"""The house rules that no linter holds: sizes, documents, printing, and what would make a program unsafe."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edgeflex

PACKAGE = Path(edgeflex.__file__).parent
MOST_LINES = 600
MOST_BODY_LINES = 60
# Why a file may be longer.
LONG_FILES = {
    "cli.py": "every command with its options stands on one page, and nothing else does",
    "runtimes/native.py": "the whole border to C++ stands on one page, beside the types that it hands out",
    "schema.py": "all nouns stand on one page, so that what crosses rooms can be read in one place",
}
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "socket", "telnetlib", "urllib3"}
# Who may fetch what, in which function; only when the caller passed `allow_download`.
DOWNLOADS = {("models/decoders.py", "huggingface_hub"): "_fetched"}
UNPICKLING = {"Pickler", "Unpickler", "dump", "dumps", "load", "loads"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sources()}


def nodes(kind):
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` of an attribute chain, or nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls() -> list[tuple[str, ast.Call, str]]:
    return [(name, node, dotted(node.func)) for name, node in nodes(ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    values = [one.value for one in call.keywords if one.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def imported() -> list[tuple[str, str]]:
    found = [(name, alias.name) for name, node in nodes(ast.Import) for alias in node.names]
    return found + [(name, node.module or "") for name, node in nodes(ast.ImportFrom)]


def is_of(node: ast.ImportFrom, package: str) -> bool:
    return (node.module or "").split(".")[0] == package


def documented_nodes(body):
    """Yield public functions and classes, and the public methods of those classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from documented_nodes(node.body)


def body_lines(node: ast.FunctionDef) -> int:
    """Return the lines below signature and docstring: the signature of a command is its list of options."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_file_is_longer_than_the_house_allows():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert {name for name in long if name not in LONG_FILES} == set(), long
    assert set(LONG_FILES) <= set(long), "an exemption is no longer needed"


def test_no_function_is_longer_than_a_screen():
    long = [f"{name}:{node.name} {body_lines(node)}" for name, node in nodes(ast.FunctionDef)]
    assert [one for one in long if int(one.split()[-1]) > MOST_BODY_LINES] == []


def test_everything_public_is_documented():
    bare = [
        f"{name}:{node.name}"
        for name, tree in TREES.items()
        for node in documented_nodes(tree.body)
        if not ast.get_docstring(node)
    ]
    assert bare == []
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_only_the_command_line_prints():
    printing = {name for name, _, called in calls() if called in {"print", "sys.stdout.write", "pprint.pprint"}}
    assert printing <= {"cli.py", "native/build.py"}, "building is a command of its own: installers run it alone"


def test_shipped_code_asserts_nothing():
    # `python -O` drops assertions, and a user cannot act on one.
    assert [f"{name}:{node.lineno}" for name, node in nodes(ast.Assert)] == []


def test_nothing_is_unpickled():
    users = {name for name, module in imported() if module.split(".")[0] in {"cPickle", "dill", "joblib", "pickle"}}
    assert users <= {"models/sources.py"}, "sources.py alone needs the type of the error of a refused file"
    for name, called in ((name, called) for name, _, called in calls()):
        assert not (called.startswith("pickle.") and called.split(".")[-1] in UNPICKLING), name


@pytest.mark.parametrize(
    ("function", "option", "value"),
    [
        ("torch.load", "weights_only", True),
        ("np.load", "allow_pickle", False),  # what it does by default, but said
        ("np.lib.format.read_array", "allow_pickle", False),
    ],
)
def test_loaders_that_could_run_code_are_told_not_to(function: str, option: str, value: bool):
    loose = [f"{name}:{call.lineno}" for name, call, called in calls() if called == function]
    strict = [
        f"{name}:{call.lineno}"
        for name, call, called in calls()
        if called == function and keyword(call, option) is value
    ]
    assert loose == strict
    assert strict, f"no {function} at all: this test looks for the wrong name"


def test_no_text_is_run_as_code():
    running = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "torch.hub.load"}
    found = [(name, call, called) for name, call, called in calls() if called in running]
    # __main__ runs an empty text, for what CPython does on its way
    ran = [f"{name}:{call.lineno} {called}" for name, call, called in found if ast.unparse(call) != "exec('')"]
    assert ran == []
    shells = [f"{name}:{call.lineno}" for name, call, _ in calls() if keyword(call, "shell")]
    assert shells == []


def test_nothing_is_fetched_from_a_network_unless_a_download_was_asked_for():
    fetching = {(name, module) for name, module in imported() if module.split(".")[0] in NETWORK}
    fetching |= {(name, module) for name, module in imported() if module.startswith("urllib.request")}
    assert {(name, module.split(".")[0]) for name, module in fetching} <= set(DOWNLOADS)


@pytest.mark.parametrize(("name", "package"), DOWNLOADS)
def test_a_download_is_refused_by_default_and_its_package_loaded_by_one_function_only(name: str, package: str):
    function = DOWNLOADS[name, package]
    bodies = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(bodies) == 1
    uses = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom) and is_of(node, package)]
    inside = [node for node in ast.walk(bodies[0]) if isinstance(node, ast.ImportFrom) and is_of(node, package)]
    assert uses == inside != []
    asked = [
        (one.arg, isinstance(default, ast.Constant) and default.value)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef)
        for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if one.arg == "allow_download"
    ]
    assert asked == [("allow_download", False)]


def test_layers_of_the_linter_name_every_module():
    settings = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    layers = settings.partition("layers = [")[2].partition("]")[0]
    tops = {name.split("/")[0].removesuffix(".py") for name in TREES} - {"__init__"}
    named = {one.strip().removeprefix("edgeflex.") for one in layers.replace('"', "").replace("|", ",").split(",")}
    assert tops == named - {""}
