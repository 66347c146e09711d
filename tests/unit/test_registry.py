from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from edgeflex import profiles
from edgeflex.errors import InputError, MissingDependencyError, UnsupportedError
from edgeflex.registry import (
    EXPORTERS,
    NVIDIA_DEVICES,
    RUNTIMES,
    Row,
    Table,
    capabilities,
    capabilities_for,
    compute_capability,
    get,
    names,
)
from edgeflex.schema import Capabilities, DeviceProfile, LayerKind, Precision

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
    with pytest.raises(InputError, match=r"unknown target 'zzz'\. Known: executorch"):
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
    assert names(RUNTIMES) == (*(row.name for row in RUNTIMES.rows), "phone")
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


# --- what a device's GPU takes ---------------------------------------------------------------------------

BLOCKS = {Precision.INT4_BLOCK64, Precision.INT4_BLOCK128}


def gpu(*isa: str) -> DeviceProfile:
    return DeviceProfile(name="a-gpu", title="A GPU", origin="datasheet", isa=isa)


def linear_precisions(device: DeviceProfile) -> set[Precision]:
    return set(capabilities_for(EXPORTERS, "tensorrt", device).precisions[LayerKind.LINEAR])


def test_a_compute_capability_is_read_from_its_entry() -> None:
    assert compute_capability(gpu("neon", "fp16", "sm_87")) == (8, 7)
    assert compute_capability(gpu("sm_110")) == (11, 0)
    assert compute_capability(gpu("sm_90a")) == (9, 0)
    assert compute_capability(gpu("avx2", "smp")) is None


@pytest.mark.parametrize(
    ("isa", "added"),
    [
        ("sm_75", set()),
        ("sm_86", BLOCKS),
        ("sm_87", BLOCKS),
        ("sm_89", {*BLOCKS, Precision.FP8}),
        ("sm_110", {*BLOCKS, Precision.FP8}),
        ("sm_120", {*BLOCKS, Precision.FP8}),
    ],
)
def test_a_gpu_is_offered_only_what_it_has_kernels_for(isa: str, added: set[Precision]) -> None:
    assert linear_precisions(gpu(isa)) == {Precision.FP32, Precision.FP16, Precision.INT8_STATIC, *added}
    held = capabilities_for(RUNTIMES, "tensorrt", gpu(isa)).precisions[LayerKind.CONV2D]
    assert held == (Precision.FP32, Precision.FP16, Precision.INT8_STATIC)


def test_what_two_devices_share_is_what_the_older_gpu_has() -> None:
    older, newer = profiles.load("jetson-orin-nano-8gb"), profiles.load("jetson-thor")
    shared = capabilities_for(EXPORTERS, "tensorrt", older, newer)
    assert (
        shared
        == capabilities_for(EXPORTERS, "tensorrt", newer, older)
        != capabilities_for(EXPORTERS, "tensorrt", newer)
    )
    assert shared == capabilities_for(EXPORTERS, "tensorrt", older)


def test_a_device_without_an_nvidia_gpu_is_answered_with_those_that_have_one() -> None:
    with pytest.raises(InputError, match="'raspberry-pi-5' names no compute capability") as raised:
        capabilities_for(EXPORTERS, "tensorrt", profiles.load("raspberry-pi-5"))
    assert all(name in str(raised.value) for name in NVIDIA_DEVICES)


def test_the_devices_that_are_named_are_those_that_are_shipped_with_a_gpu() -> None:
    shipped = [name for name in profiles.names() if compute_capability(profiles.load(name)) is not None]
    assert list(NVIDIA_DEVICES) == shipped


def test_a_gpu_before_turing_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.2; TensorRT 10 and later run from 7\.5"):
        capabilities_for(EXPORTERS, "tensorrt", gpu("sm_72"))


def test_other_targets_run_the_same_on_every_device() -> None:
    for name in ("executorch", "onnx"):
        assert capabilities_for(EXPORTERS, name, gpu()) == capabilities(EXPORTERS, name)
    with pytest.raises(InputError, match="unknown target 'zzz'"):
        capabilities_for(EXPORTERS, "zzz", gpu("sm_87"))
