"""Building engines: the calls, in every version; what is kept; and what every failure says."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import pytest

from edgeflex.bundle import open_bundle
from edgeflex.errors import BundleError, DeviceError, EdgeflexError, MissingDependencyError, UnsupportedError
from edgeflex.runtimes import tensorrt_build
from edgeflex.runtimes.tensorrt_build import build, load_tensorrt, version_of
from edgeflex.runtimes.tensorrt_progress import Phases
from edgeflex.schema_trt import EngineIndex, Need
from tests.fake_cuda import Device, FakeCuda
from tests.fake_tensorrt import VERSIONS, members_of, names_of
from tests.toy_engines import install, streaming, write_engine_bundle

GRAPHS = ["segment0.onnx", "segment1.onnx", "segment2.onnx"]


class Heard:
    """Progress that is written down."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[int]] = {}

    def task(self, title: str, total: int):
        from contextlib import nullcontext

        self.tasks[title] = []
        return nullcontext(self.tasks[title].append)

    def note(self, text: str) -> None:
        raise AssertionError(text)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_every_segment_strongly_typed_in_real_fp32(tmp_path, monkeypatch, version: str):
    bundle = write_engine_bundle(tmp_path / "bundle", profiles=True, options=streaming())
    trt = install(monkeypatch, version)
    index = build(bundle, library=trt.cuda)
    assert [name for name, _, _ in trt.named("Builder.build_serialized_network")] == GRAPHS
    for _, strongly_typed, flags in trt.named("Builder.build_serialized_network"):
        assert strongly_typed
        assert flags == ["WEIGHT_STREAMING"]
    assert [one.segment for one in index.engines] == ["segment0", "segment1", "segment2"]
    assert (index.key.tensorrt, index.key.gpu, index.key.driver) == (f"{version}.0", "Orin", "12.6")
    assert trt.cuda.alive == []
    for entry in index.engines:
        assert (bundle.path / entry.file).stat().st_size == entry.size_bytes


@pytest.mark.parametrize("version", VERSIONS)
def test_only_names_of_all_versions_are_used(tmp_path, monkeypatch, version: str):
    bundle = write_engine_bundle(tmp_path / "bundle", profiles=True, options=streaming())
    trt = install(monkeypatch, version)
    build(bundle, library=trt.cuda)
    assert len(trt.touched) > 20
    for kind, name in trt.touched:
        assert all(name in names_of(kind, one) for one in VERSIONS), f"{kind}.{name}"


def test_the_fake_refuses_what_a_version_lacks_and_what_does_not_exist(monkeypatch):
    old, new = install(monkeypatch, "10.3"), install(monkeypatch, "11.0")
    assert old.BuilderFlag.FP16 == 0
    assert old.BuilderFlag.WEIGHT_STREAMING != new.BuilderFlag.WEIGHT_STREAMING
    for name in ("IInt8Calibrator", "IStreamReader", "Bilder"):
        with pytest.raises(AttributeError, match=name):
            getattr(new, name)
    config = old.Builder(tensorrt_build.messages_of(old)).create_builder_config()
    with pytest.raises(AttributeError, match="optimisation"):
        config.builder_optimisation_level = 5
    assert members_of("NetworkDefinitionCreationFlag", "11.4") == {"STRONGLY_TYPED": 0}


def test_the_recipe_sets_level_workspace_and_profiles(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle", profiles=True)
    trt = install(monkeypatch, "10.3")
    index = build(bundle, library=trt.cuda, workspace_bytes=64 << 20)
    assert trt.named("IBuilderConfig.set_memory_pool_limit") == [("WORKSPACE", 64 << 20)] * 3
    assert index.key.options.workspace_bytes == 64 << 20
    assert trt.named("IBuilderConfig.builder_optimization_level") == [3] * 3
    first = trt.named("IOptimizationProfile.set_shape")[0]
    assert first == ("x", (1, 3, 16, 16), (1, 3, 16, 16), (4, 3, 16, 16))


def test_the_timing_cache_grows_from_engine_to_engine_and_is_kept(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    trt = install(monkeypatch)
    build(bundle, library=trt.cuda)
    given = [data for (data,) in trt.named("IBuilderConfig.create_timing_cache")]
    assert given == [b"", b"segment0", b"segment0segment1"]
    assert (bundle.path / "engines" / "timing.cache").read_bytes() == b"segment0segment1segment2"
    assert set(trt.named("IBuilderConfig.set_timing_cache")) == {(False,)}


@pytest.mark.parametrize("content", [b"damaged", b"foreign"])
def test_a_timing_cache_of_elsewhere_is_begun_anew(tmp_path, monkeypatch, content: bytes):
    bundle = write_engine_bundle(tmp_path / "bundle")
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines" / "timing.cache").write_bytes(content)
    trt = install(monkeypatch)
    build(bundle, library=trt.cuda)
    assert (bundle.path / "engines" / "timing.cache").read_bytes() == b"segment0segment1segment2"


def test_progress_is_what_the_monitor_says_and_ends_whole(tmp_path, monkeypatch):
    trt, heard = install(monkeypatch), Heard()
    build(write_engine_bundle(tmp_path / "bundle"), library=trt.cuda, progress=heard)
    assert list(heard.tasks) == ["Building segment0", "Building segment1", "Building segment2"]
    for steps in heard.tasks.values():
        assert sum(steps) == 100
        assert len(steps) == 8
        assert min(steps) > 0


def test_nested_phases_add_up_and_never_fall():
    phases = Phases()
    phases.start("all", None, 2)
    phases.start("part", "all", 4)
    phases.step("part", 1)
    assert phases.share() == pytest.approx(0.25)
    phases.finish("part")
    assert phases.share() == pytest.approx(0.25)
    phases.step("all", 0)
    assert phases.share() == pytest.approx(0.5)
    phases.finish("all")
    phases.start("again", None, 0)
    assert phases.share() == pytest.approx(0.5)


def test_ctrl_c_stops_the_builder_and_comes_out_as_itself(tmp_path, monkeypatch):
    trt = install(monkeypatch)

    class Impatient(Heard):
        def task(self, title: str, total: int):
            from contextlib import nullcontext

            def stop(_count: int) -> None:
                raise KeyboardInterrupt

            return nullcontext(stop)

    with pytest.raises(KeyboardInterrupt):
        build(write_engine_bundle(tmp_path / "bundle"), library=trt.cuda, progress=Impatient())
    assert trt.cuda.alive == []
    assert not (tmp_path / "bundle" / "engines" / "index.json").exists()


# --- going on, and going on from nothing -------------------------------------------------------------


def test_a_build_that_was_stopped_goes_on_where_it_stopped(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    broken = install(monkeypatch, fail={"plan segment1"})
    with pytest.raises(DeviceError, match="could not build segment1"):
        build(bundle, library=broken.cuda)
    assert not (bundle.path / "engines" / "index.json").exists()
    mended = install(monkeypatch)
    index = build(bundle, library=mended.cuda)
    assert [name for name, _, _ in mended.named("Builder.build_serialized_network")] == GRAPHS[1:]
    assert len(index.engines) == 3
    assert EngineIndex.parse((bundle.path / "engines" / "index.json").read_bytes(), "index") == index
    assert sorted(one.name for one in (bundle.path / "engines").iterdir()) == [
        "index.json",
        "segment0.engine",
        "segment1.engine",
        "segment2.engine",
        "timing.cache",
    ]


def test_what_is_built_already_is_not_built_again_unless_forced(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    trt = install(monkeypatch)
    first = build(bundle, library=trt.cuda)
    assert build(bundle, library=trt.cuda) == first
    assert len(trt.named("Builder.build_serialized_network")) == 3
    build(bundle, library=trt.cuda, force=True)
    assert len(trt.named("Builder.build_serialized_network")) == 6
    open_bundle(bundle.path)  # engines beside it leave the bundle whole


def test_a_damaged_engine_alone_is_built_again(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    trt = install(monkeypatch)
    build(bundle, library=trt.cuda)
    (bundle.path / "engines" / "segment1.engine").write_bytes(b"half")
    build(bundle, library=trt.cuda)
    assert [name for name, _, _ in trt.named("Builder.build_serialized_network")][3:] == ["segment1.onnx"]


def test_another_version_device_or_driver_builds_everything_again(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    others = [
        ("10.3", FakeCuda()),
        ("10.13", FakeCuda()),
        ("10.13", FakeCuda(devices=(Device("Orin Nano"),))),
        ("10.13", FakeCuda(devices=(Device("Orin Nano"),), version=13020)),
    ]
    for version, cuda in others:
        trt = install(monkeypatch, version, cuda=cuda)
        build(bundle, library=cuda)
        assert len(trt.named("Builder.build_serialized_network")) == 3


def test_engines_may_go_to_another_folder(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    trt = install(monkeypatch)
    build(bundle, library=trt.cuda, out=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "engines" / "index.json").is_file()
    assert not (bundle.path / "engines").exists()


# --- refusals ----------------------------------------------------------------------------------------


def test_bundles_of_other_backends_have_no_engines(tmp_path, monkeypatch):
    trt = install(monkeypatch)
    with pytest.raises(UnsupportedError, match="exported for 'onnx'"):
        build(write_engine_bundle(tmp_path / "bundle", backend="onnx"), library=trt.cuda)
    assert trt.calls == []


def test_a_graph_that_changed_after_the_bundle_was_opened_is_damage(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    trt = install(monkeypatch)
    (bundle.path / "segment1.onnx").write_text("other")
    with pytest.raises(BundleError, match=r"segment1\.onnx changed since the export"):
        build(bundle, library=trt.cuda)
    assert trt.calls == []


def _rewritten(bundle, change):
    """Return the bundle with another recipe, sealed again."""
    path = bundle.path / "build.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    from edgeflex.bundle import seal, write_manifest

    paths = {entry.role: entry.path for entry in bundle.manifest.files}
    return write_manifest(bundle.path, bundle.manifest.model_copy(update={"files": seal(bundle.path, paths)}))


def test_a_recipe_of_other_files_is_damage(tmp_path, monkeypatch):
    trt = install(monkeypatch)

    def other(document) -> None:
        document["segments"][0]["onnx_sha256"] = "0" * 64

    bundle = _rewritten(write_engine_bundle(tmp_path / "bundle"), other)
    with pytest.raises(BundleError, match=r"written for other files than the manifest names: segment0\.onnx"):
        build(bundle, library=trt.cuda)


@pytest.mark.parametrize("place", ["manifest.json", "segment0.onnx", "engines"])
def test_a_recipe_cannot_write_outside_the_engines_folder(tmp_path, monkeypatch, place: str):
    trt = install(monkeypatch)

    def elsewhere(document) -> None:
        document["segments"][0]["engine"] = place

    bundle = _rewritten(write_engine_bundle(tmp_path / "bundle"), elsewhere)
    before = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="would write outside 'engines'"):
        build(bundle, library=trt.cuda)
    assert (bundle.path / "manifest.json").read_bytes() == before
    assert trt.cuda.alive == []


def test_a_link_in_place_of_the_engines_folder_cannot_lead_outside(tmp_path, monkeypatch):
    trt = install(monkeypatch)
    bundle = write_engine_bundle(tmp_path / "bundle")
    (tmp_path / "outside").mkdir()
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines" / "segment0.engine").symlink_to(tmp_path / "outside" / "file")
    with pytest.raises(BundleError, match="would write outside"):
        build(bundle, library=trt.cuda)
    assert list((tmp_path / "outside").iterdir()) == []


def test_an_old_tensorrt_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    trt = install(monkeypatch, "10.3")
    bundle = write_engine_bundle(tmp_path / "bundle", least_version=(10, 8), versions=((10, 8),))
    with pytest.raises(UnsupportedError, match=r"needs TensorRT 10\.8 or newer; this is 10\.3\.0"):
        build(bundle, library=trt.cuda)
    assert trt.calls == []


def test_a_gpu_that_lacks_a_number_format_is_refused_with_the_reason(tmp_path, monkeypatch):
    trt = install(monkeypatch)
    needs = (Need(compute_capability=(8, 9), reason="FP8 layers"), Need(compute_capability=(8, 0), reason="INT4"))
    bundle = write_engine_bundle(tmp_path / "bundle", needs=needs)
    with pytest.raises(UnsupportedError, match=r"Orin has compute capability 8\.7; .* needs 8\.9 \(FP8 layers\)"):
        build(bundle, library=trt.cuda)


FAILURES = {
    "builder": (DeviceError, "does not start: it gave no reason"),
    "driver": (DeviceError, "does not start: CUDA initialization failure with error: 35"),
    "network": (DeviceError, "gave no network"),
    "config": (DeviceError, "gave no builder configuration"),
    "plan": (DeviceError, r"could not build segment0: \[builder\] out of memory while choosing kernels"),
    "profile": (UnsupportedError, "refuses profile 'batch'"),
    "shape": (UnsupportedError, "refuses profile 'batch'"),
    "parse": (UnsupportedError, r"node 'conv' \(Conv\): scale must be > 0; no such operator"),
}


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_every_failure_says_what_tensorrt_said_and_leaves_no_index(tmp_path, monkeypatch, fail: str, version: str):
    kind, text = FAILURES[fail]
    trt = install(monkeypatch, version, fail={fail})
    bundle = write_engine_bundle(tmp_path / "bundle", profiles=True)
    with pytest.raises(kind, match=text):
        build(bundle, library=trt.cuda)
    assert not (bundle.path / "engines" / "index.json").exists()
    assert trt.cuda.alive == []


def test_a_timing_cache_that_cannot_be_serialised_does_not_stop_the_build(tmp_path, monkeypatch):
    trt = install(monkeypatch, fail={"cache serialize"})
    bundle = write_engine_bundle(tmp_path / "bundle")
    build(bundle, library=trt.cuda)
    assert not (bundle.path / "engines" / "timing.cache").exists()


# --- finding TensorRT --------------------------------------------------------------------------------


def test_a_driver_that_is_too_old_is_told_by_its_cuda(monkeypatch):
    trt = install(monkeypatch, cuda=FakeCuda(version=12040))
    monkeypatch.setattr(tensorrt_build, "version", _packages({"tensorrt-cu13-libs": "11.0"}))
    with pytest.raises(DeviceError, match=r"made for CUDA 13, the NVIDIA driver serves up to CUDA 12\.4"):
        load_tensorrt(trt.cuda)


@pytest.mark.parametrize("packages", [{"tensorrt-cu12": "10.3"}, {}])
def test_a_driver_of_the_same_or_an_unknown_cuda_is_tried(monkeypatch, packages: dict[str, str]):
    trt = install(monkeypatch, cuda=FakeCuda(version=12040))
    monkeypatch.setattr(tensorrt_build, "version", _packages(packages))
    assert load_tensorrt(trt.cuda) is trt


def _packages(held: dict[str, str]):
    def version(name: str) -> str:
        if name not in held:
            raise importlib.metadata.PackageNotFoundError(name)
        return held[name]

    return version


def test_no_driver_means_that_tensorrt_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise AssertionError('imported without a driver')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(DeviceError, match="TensorRT needs a GPU: the NVIDIA driver shows no device"):
        load_tensorrt(FakeCuda(devices=()))


def test_libraries_that_are_absent_are_a_missing_dependency(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependencyError, match=r"cannot be loaded: libnvinfer\.so\.10.*apt-get install"):
        load_tensorrt(FakeCuda())


def test_versions_are_numbers(monkeypatch):
    trt = install(monkeypatch, "10.3")
    assert version_of(trt) == (10, 3, 0)
    trt.__version__ = "10.16.1.11.post1"
    assert version_of(trt) == (10, 16, 1, 11)


def test_every_refusal_ends_with_what_to_do(tmp_path, monkeypatch):
    for number, fail in enumerate(FAILURES):
        trt = install(monkeypatch, fail={fail})
        with pytest.raises(EdgeflexError) as caught:
            build(write_engine_bundle(tmp_path / str(number), profiles=True), library=trt.cuda)
        assert str(caught.value).endswith((".", "`)."))
        assert "\n" not in str(caught.value)
