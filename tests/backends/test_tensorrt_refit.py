"""Experts as inputs against experts put into an engine, on a pretended device: both computed, the faster one kept."""

from __future__ import annotations

import itertools
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.cli import main
from edgeflex.errors import DeviceError, UnsupportedError
from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder
from edgeflex.exporters.tensorrt_decoder_refit import check_refit
from edgeflex.models.decoder_reference import Reference
from edgeflex.runtimes import cuda_driver
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_bench import _way_checks as way_checks
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.tensorrt_build import build
from edgeflex.runtimes.tensorrt_ways import measured_ways, measuring
from edgeflex.schema_trt import INDEX_FILE, BuildRecipe, EngineIndex
from edgeflex.terminal import engines_text
from tests.engine_samples import BOARDS, PROMPT
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import VERSIONS, names_of
from tests.random_decoder import RandomSource, exact_plan, mixed_plan
from tests.tiny_decoder import tiny_graph
from tests.toy_engines import NEWEST, install

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgeflex.bundle_moe import DecoderBundle

NEW = 6
SEGMENT, RIVAL = "expert-64.fp32", "expert-64.fp32.refit"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return RandomSource(tiny_graph(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exact(source, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("exact") / "bundle"
    export_tensorrt_decoder(source, exact_plan(source.graph), folder, half=False)
    return folder


@pytest.fixture(scope="module")
def wanted(source) -> list[int]:
    return list(Reference(source).generate(PROMPT, NEW))


def clock(inputs_s: float, refit_s: float) -> Callable[[], float]:
    """Return seconds that pass as given at every look: inputs are timed first, then the refit, as often."""
    looks = itertools.count()
    times = [0.0]

    def now() -> float:
        times[0] += inputs_s if next(looks) < 36 else refit_s
        return times[0]

    return now


@pytest.fixture
def board(monkeypatch):
    """Return a function that gives this process a pretended device."""

    def give(kind: str = "Jetson", *, version: str = NEWEST, fail=()) -> Any:
        cuda = FakeCuda(devices=(BOARDS[kind],))
        trt = install(monkeypatch, version, cuda=cuda, fail=fail)
        monkeypatch.setattr(cuda_driver, "_load", lambda: cuda)
        return trt

    return give


def built(bundle: DecoderBundle, *, library: Any, force: bool = False) -> EngineIndex:
    """Build, and measure how experts best get their weights."""
    return build(bundle, library=library, force=force, measure=measuring(bundle, library=library))


def chosen(folder: Path, trt: Any, now: Callable[[], float]) -> EngineIndex:
    """Build, and measure by another clock."""
    bundle = open_decoder_bundle(folder)
    index = built(bundle, library=trt.cuda)
    bare = index.model_copy(update={"experts": ()})
    index = index.model_copy(update={"experts": measured_ways(bundle, folder, bare, library=trt.cuda, clock=now)})
    (folder / INDEX_FILE).write_text(index.canonical_json())
    assert trt.cuda.alive == []
    return index


def recipe_of(folder: Path) -> BuildRecipe:
    return BuildRecipe.parse((folder / "build.json").read_bytes(), "here")


# --- what is written -----------------------------------------------------------------------------------


def test_the_rival_lies_on_the_disk_once_in_an_experts_own_file(exact):
    (rival,) = recipe_of(exact).refits
    assert (rival.name, rival.rival_of, rival.data) == (RIVAL, SEGMENT, "experts/layer-1/expert-0.bin")
    assert [spec.name for spec in rival.inputs] == ["y"]
    assert {spec.name: spec.shape for spec in rival.weights} == {"gate_up": (128, 64), "down": (64, 64)}
    assert (exact / rival.onnx).stat().st_size < 2048
    template = next(one for one in recipe_of(exact).segments if one.name == SEGMENT)
    assert [one.name for one in rival.profiles] == [one.name for one in template.profiles]


def test_its_constants_stand_on_the_left_where_no_importer_turns_them(exact):
    graph = onnx.load(exact / f"{RIVAL}.onnx", load_external_data=False).graph
    constants = {one.name for one in graph.initializer}
    readers = [node for node in graph.node if constants & set(node.input)]
    assert [(node.op_type, node.input[0] in constants) for node in readers] == [("MatMul", True)] * 2


def test_a_rival_that_computes_something_else_is_not_shipped(exact):
    shape = np.zeros((128, 64), np.float32), np.zeros((64, 64), np.float32)
    drawn = [np.random.default_rng(1).standard_normal(one.shape, dtype=np.float32) for one in shape]
    with pytest.raises(UnsupportedError, match=f"{RIVAL}.onnx: the stage differs by"):
        check_refit(exact, f"{RIVAL}.onnx", *drawn)


def test_weights_of_fewer_bits_have_no_rival(source, tmp_path, board):
    folder = tmp_path / "mixed"
    export_tensorrt_decoder(source, mixed_plan(source.graph), folder, half=False)
    assert recipe_of(folder).refits == ()
    index = built(open_decoder_bundle(folder), library=board().cuda)
    assert {one.way for one in index.experts} == {"inputs"}
    assert {one.segment: one.reason.partition(":")[0] for one in index.experts} == {
        "expert-64.int4-group32": "int4-group32 weights cannot be refitted",
        "expert-64.int8-dynamic": "int8-dynamic weights cannot be refitted",
    }
    assert all(one.inputs_s is one.refit_s is None for one in index.experts)


# --- what is measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOARDS)
@pytest.mark.parametrize(
    ("inputs_s", "refit_s", "way"), [(2.0, 1.0, "refit"), (1.0, 2.0, "inputs"), (1.0, 1.0, "inputs")]
)
def test_the_faster_way_is_kept_with_both_figures_and_says_the_same(board, exact, wanted, kind, inputs_s, refit_s, way):
    (found,) = chosen(exact, board(kind), clock(inputs_s, refit_s)).experts
    assert (found.segment, found.way, found.inputs_s, found.refit_s) == (SEGMENT, way, inputs_s, refit_s)
    trt = board(kind)
    with DecoderSession.from_bundle(exact, Settings(48 << 10)) as session:
        assert list(session.generate(PROMPT, NEW)) == wanted
    refits = trt.named("Refitter.refit_cuda_engine_async")
    assert bool(refits) is (way == "refit")
    assert len(trt.named("Refitter.set_named_weights")) == (2 if way == "refit" else 0)  # once, however many experts
    assert trt.cuda.alive == []


def test_the_real_clock_gives_figures_too_and_the_index_keeps_them(board, exact):
    trt = board()
    index = built(open_decoder_bundle(exact), library=trt.cuda)
    (found,) = index.experts
    assert found.inputs_s is not None
    assert found.refit_s is not None
    assert min(found.inputs_s, found.refit_s) > 0.0
    assert EngineIndex.parse((exact / INDEX_FILE).read_bytes(), "here") == index
    assert RIVAL in {one.segment for one in index.engines}
    assert trt.cuda.alive == []


def test_what_is_built_already_stays_and_is_measured_again(board, exact):
    built(open_decoder_bundle(exact), library=board().cuda)
    trt = board()
    index = built(open_decoder_bundle(exact), library=trt.cuda)
    assert trt.named("Builder.build_serialized_network") == []
    assert index.experts[0].refit_s is not None


def test_only_the_named_weights_may_be_replaced(board, exact):
    trt = board()
    built(open_decoder_bundle(exact), library=trt.cuda, force=True)
    assert trt.named("INetworkDefinition.mark_weights_refittable") == [("gate_up",), ("down",)]
    flags = {name: flags for name, _, flags in trt.named("Builder.build_serialized_network")}
    assert [name for name, found in flags.items() if "REFIT_INDIVIDUAL" in found] == [f"{RIVAL}.onnx"]


@pytest.mark.parametrize("version", VERSIONS)
def test_only_names_that_every_version_has_are_used(board, exact, wanted, version):
    trt = board(version=version)
    chosen(exact, trt, clock(2.0, 1.0))
    with DecoderSession.from_bundle(exact, Settings(48 << 10)) as session:
        assert list(session.generate(PROMPT, 2)) == wanted[:2]
    assert ("Refitter", "refit_cuda_engine_async") in trt.touched
    for kind, name in trt.touched:
        assert all(name in names_of(kind, one) for one in VERSIONS), f"{kind}.{name}"


FAILURES = {
    "mark": "does not let gate_up, down be replaced",
    f"plan {RIVAL}": "could not build expert-64.fp32.refit: [builder] out of memory",
    "refitter": "lets no weights be replaced: the engine is not refittable",
    "set weights": "does not let 'gate_up' be replaced",
    "missing weights": "wants another to be replaced too",
    "refit": "could not take an expert's weights: refit: out of memory",
    "other numbers": "after a refit the engine gives other numbers",
}


@pytest.mark.parametrize("fail", FAILURES)
def test_a_refit_that_fails_or_lies_leaves_experts_inputs_and_says_why(board, exact, wanted, fail):
    trt = board(fail={fail})
    index = built(open_decoder_bundle(exact), library=trt.cuda, force=True)
    (found,) = index.experts
    assert found.way == "inputs"
    assert FAILURES[fail] in found.reason
    assert trt.cuda.alive == []
    board()
    with DecoderSession.from_bundle(exact, Settings(48 << 10)) as session:
        assert list(session.generate(PROMPT, NEW)) == wanted


# --- what runs -----------------------------------------------------------------------------------------


def test_a_refit_that_fails_while_running_is_a_device_error(board, exact):
    chosen(exact, board(), clock(2.0, 1.0))
    trt = board(fail={"refit"})
    with (
        pytest.raises(DeviceError, match="could not take an expert's weights: refit: out of memory"),
        DecoderSession.from_bundle(exact) as session,
    ):
        list(session.generate(PROMPT, NEW))
    assert trt.cuda.alive == []


def test_an_index_that_chose_the_refit_and_lacks_its_engine_asks_for_it(board, exact):
    chosen(exact, board(), clock(2.0, 1.0))
    document = json.loads((exact / INDEX_FILE).read_text())
    document["engines"] = [one for one in document["engines"] if one["segment"] != RIVAL]
    (exact / INDEX_FILE).write_text(json.dumps(document))
    board()
    with pytest.raises(DeviceError, match=f"no engine of {RIVAL}"):
        DecoderSession.from_bundle(exact).__enter__()


def test_memory_counts_the_copy_that_an_engine_has_of_an_expert(board, exact):
    def held(inputs_s: float, refit_s: float) -> int:
        chosen(exact, board(), clock(inputs_s, refit_s))
        board()
        with DecoderSession.from_bundle(exact) as session:
            list(session.generate(PROMPT, 2))
            return session.unseen_bytes

    expert = (128 * 64 + 64 * 64) * 4
    assert held(2.0, 1.0) - held(1.0, 2.0) == expert  # where it is copied from; the engine's own is TensorRT's


def test_no_bit_of_any_logit_depends_on_what_is_resident(board, exact):
    chosen(exact, board("desktop"), clock(2.0, 1.0))

    def rows(settings: Settings) -> list[Any]:
        board("desktop")
        found: list[Any] = []

        def choose(row: Any) -> int:
            found.append(row)
            return int(row.argmax())

        with DecoderSession.from_bundle(exact, settings) as session:
            list(session.generate(PROMPT, NEW, choose))
        return found

    one = max(entry.size_bytes for entry in open_decoder_bundle(exact).manifest.files if "experts" in entry.path)
    wanted = rows(Settings(1 << 30))
    assert np.array_equal(rows(Settings(3 * one, "lru", prefetch_depth=1)), wanted)


# --- what people read ----------------------------------------------------------------------------------


def test_build_and_bench_tell_both_figures(board, exact, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    index = chosen(exact, board(), clock(2.0, 1.0))
    told = engines_text(index)
    assert f"{SEGMENT}: weights are put into the engine before each run (2.00 s as inputs, 1.00 s by refit)" in told
    (check,) = way_checks(exact, open_decoder_bundle(exact).manifest)
    assert (check.name, check.measured, check.promised, check.ok) == (f"{SEGMENT} by refit", 1.0, 2.0, True)
    assert "promised is what inputs takes" in check.note
    monkeypatch.setattr(sys, "argv", ["edgeflex", "build", str(exact), "--quiet"])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    assert f"{SEGMENT}: weights are" in capsys.readouterr().out
    assert EngineIndex.parse((exact / INDEX_FILE).read_bytes(), "here").experts[0].refit_s is not None


def test_what_was_not_measured_or_lied_is_no_check(board, exact):
    board(fail={"other numbers"})
    built(open_decoder_bundle(exact), library=sys.modules["tensorrt"].cuda, force=True)
    manifest = open_decoder_bundle(exact).manifest
    assert all(one.measured <= one.promised for one in way_checks(exact, manifest))
    (exact / INDEX_FILE).unlink()
    assert way_checks(exact, manifest) == []
