from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from edgeflex.errors import InputError, MissingDependencyError
from edgeflex.registry import EXPORTERS, RUNTIMES, Row, Table, capabilities, get, names
from edgeflex.schema import Capabilities, LayerKind, Precision

if TYPE_CHECKING:
    from pathlib import Path

CAPABILITIES = Capabilities(backend="none", precisions={})


def row(name: str, target: str, extra: str = "") -> Row:
    return Row(name=name, target=target, extra=extra, description="a test row", capabilities=CAPABILITIES)


def table(*rows: Row) -> Table:
    return Table(kind="runtime", group="edgeflex.runtimes", rows=rows)


def install_plugin(folder: Path, name: str, value: str, source: str) -> None:
    """Lay out an installed distribution that offers one entry point."""
    module = value.partition(":")[0]
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[edgeflex.runtimes]\n{name} = {value}\n")


ROW_SOURCE = """
from edgeflex.registry import Row
from edgeflex.schema import Capabilities
ROW = Row(name="phone", target="math:floor", extra="", description="x",
          capabilities=Capabilities(backend="phone", precisions={}))
"""


def test_both_backends_name_only_what_their_kernels_run() -> None:
    for name in ("executorch", "reference"):
        held = capabilities(RUNTIMES, name).precisions
        assert held[LayerKind.CONV2D] == (Precision.FP32, Precision.INT8_STATIC)
        assert Precision.INT4_GROUP32 in held[LayerKind.LINEAR]
        assert Precision.FP16 not in held[LayerKind.LINEAR]
    assert capabilities(EXPORTERS, "executorch") == capabilities(RUNTIMES, "executorch")


def test_a_target_is_imported_only_when_asked_for() -> None:
    lazy = table(row("lazy", "edgeflex_no_such_module:thing"), row("floor", "math:floor"))
    assert names(lazy) == ("lazy", "floor")
    assert get(lazy, "floor")(2.5) == 2


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(InputError, match=r"unknown runtime 'executroch'. Did you mean 'executorch'\?.*reference"):
        get(RUNTIMES, "executroch")
    with pytest.raises(InputError, match=r"unknown exporter 'zzz'\. Known: executorch"):
        get(EXPORTERS, "zzz")


@pytest.mark.parametrize(
    ("extra", "line"), [("", "pip install edgeflex_absent"), ("gpu", r"pip install 'edgeflex\[gpu\]'")]
)
def test_a_missing_package_is_answered_with_the_pip_line(extra: str, line: str) -> None:
    with pytest.raises(MissingDependencyError, match=rf"'edgeflex_absent', which is not installed. Run: {line}$"):
        get(table(row("x", "edgeflex_absent.session:Session", extra)), "x")


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"edgeflex\.no_such_room"):
        get(table(row("x", "edgeflex.no_such_room:thing")), "x")


def test_a_plug_in_adds_a_row_that_is_read_without_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, "phone", "phone_plugin_a:ROW", ROW_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert names(RUNTIMES) == ("executorch", "reference", "phone")
    assert capabilities(RUNTIMES, "phone").backend == "phone"
    assert get(RUNTIMES, "phone")(1.5) == 1
    sys.modules.pop("phone_plugin_a", None)


def test_a_plug_in_may_not_take_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, "executorch", "phone_plugin_b:ROW", ROW_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"'executorch' is offered by 'phone_plugin_b:ROW' and by edgeflex itself"):
        names(RUNTIMES)


def test_a_plug_in_that_gives_no_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, "phone", "phone_plugin_c:ROW", "ROW = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"is not an edgeflex\.registry\.Row of that name"):
        get(RUNTIMES, "phone")
