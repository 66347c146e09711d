"""What loads what: the command line stays light, rooms of plain values stay free of torch, no cycles."""

from __future__ import annotations

import pkgutil
import resource
import statistics
import subprocess
import sys

import pytest
import typer

import edgeflex
from edgeflex.cli import app

HEAVY = (
    "executorch",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "scipy",
    "sklearn",
    "tokenizers",
    "torch",
    "torchao",
    "transformers",
)
WITHOUT_TORCH = (
    "edgeflex.budget",
    "edgeflex.bundle",
    "edgeflex.bundle_moe",
    "edgeflex.cli",
    "edgeflex.costs.store",
    "edgeflex.errors",
    "edgeflex.files",
    "edgeflex.flow",
    "edgeflex.flow.conversation",
    "edgeflex.images",
    "edgeflex.plans",
    "edgeflex.profiles",
    "edgeflex.progress",
    "edgeflex.quickstart",
    "edgeflex.registry",
    "edgeflex.reports",
    "edgeflex.runtimes",
    "edgeflex.runtimes.decoder",
    "edgeflex.runtimes.decoder_bench",
    "edgeflex.runtimes.decoder_rates",
    "edgeflex.runtimes.replay",
    "edgeflex.schema",
    "edgeflex.schema_moe",
    "edgeflex.terminal",
    "edgeflex.terminal_costs",
    "edgeflex.terminal_moe",
    "edgeflex.units",
)


def modules() -> list[str]:
    found = pkgutil.walk_packages(edgeflex.__path__, "edgeflex.", onerror=lambda _name: None)
    # the native library lies among the modules, and pkgutil takes it for one
    ours = (one.name for one in found if not one.name.endswith(("__main__", "libedgeflex_decoder")))
    return ["edgeflex", *ours]


def commands() -> list[tuple[str, ...]]:
    """Return every command line up to its ``--help``."""

    def below(command, path):
        yield path
        for name, child in sorted(getattr(command, "commands", {}).items()):
            yield from below(child, (*path, name))

    return list(below(typer.main.get_command(app), ()))


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_help_of_every_command_loads_nothing_heavy():
    code = f"""
import contextlib, io, sys
from edgeflex.cli import main
for line in {commands()!r}:
    sys.argv = ["edgeflex", *line, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main()
        except SystemExit as leaving:
            status = leaving.code
    loaded = sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r}))
    if status or loaded or "Usage" not in shown.getvalue():
        sys.exit(f"{{line}}: status {{status}}, loaded {{loaded}}")
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert len(commands()) > 13


def test_help_takes_less_than_half_a_second():
    # of the processor: what else runs on this machine is not the command's
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "edgeflex", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert statistics.median(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("line", [("devices",), ("devices", "show", "raspberry-pi-5"), ("plan", "--memory", "6 gigs")])
def test_what_needs_no_model_loads_no_torch(line: tuple[str, ...]):
    code = """
import contextlib, io, sys
from edgeflex.cli import main
sys.argv = ["edgeflex", *sys.argv[1:]]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
print("torch" in sys.modules)
"""
    assert python(code, *line).stdout.strip() == "False"


def test_rooms_of_plain_values_load_no_torch():
    assert set(WITHOUT_TORCH) <= set(modules())
    plans_and_reports = [name for name in modules() if name.startswith(("edgeflex.plans.", "edgeflex.reports."))]
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    for heavy in ("torch", "executorch", "torchao"):
        if heavy in sys.modules:
            sys.exit(f"{name} loads {heavy}")
"""
    done = python(code, *WITHOUT_TORCH, *plans_and_reports)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_module_can_be_the_first_that_is_imported():
    # A fork per module starts without any of ours, but with the heavy packages that they share; one a core at a time.
    code = """
import os, sys
import numpy, pydantic, torch, torchao, executorch.exir, safetensors.torch, scipy.optimize
from executorch.backends.xnnpack.partition import xnnpack_partitioner
failed, running = [], {}

def reap():
    child, status = os.wait()
    name = running.pop(child)
    if status != 0:
        failed.append(name)

for name in sys.argv[1:]:
    if len(running) == os.cpu_count():
        reap()
    child = os.fork()
    if child == 0:
        try:
            __import__(name)
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    running[child] = name
while running:
    reap()
sys.exit(len(failed))
"""
    done = python(code, *modules())
    assert done.returncode == 0, done.stderr
