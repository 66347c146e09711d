"""A board's day at the command line: build, run, build again; the driver and TensorRT are stand-ins."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest

from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder
from tests.fake_cuda import FakeCuda
from tests.random_decoder import RandomSource, family_graph, kind_plan
from tests.toy_bundle import write_images
from tests.toy_engines import install, write_exported_bundle


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch):
    """A machine whose driver and TensorRT 10.3 are the fakes."""
    cuda, found = FakeCuda(), ctypes.CDLL

    def load(name: Any, *rest: Any, **options: Any) -> Any:
        return cuda if "cuda" in str(name) else found(name, *rest, **options)

    monkeypatch.setattr(ctypes, "CDLL", load)
    return install(monkeypatch, "10.3", cuda=cuda)


def test_engines_are_built_run_and_kept(edgeflex, board, tmp_path):
    bundle = write_exported_bundle(tmp_path / "bundle").path
    write_images(tmp_path / "images", 2)
    asked = edgeflex("run", bundle, "--data", tmp_path / "images", "-o", tmp_path / "stats.json", "--quiet")
    assert asked.code == 7
    assert f"edgeflex build {bundle}" in asked.err
    built = edgeflex("build", bundle, "--workspace", "64MiB", "--quiet")
    assert built.code == 0, built.err
    assert "engines/segment2.engine" in built.out
    run = edgeflex("run", bundle, "--data", tmp_path / "images", "-o", tmp_path / "stats.json", "--quiet")
    assert run.code == 0, run.err
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["runtime"], len(stats["requests"])) == ("tensorrt", 6)
    again = edgeflex("build", bundle, "--workspace", "64MiB", "--json", "--quiet")
    assert again.document["key"]["tensorrt"] == "10.3.0"
    assert len(board.named("Builder.build_serialized_network")) == 3
    assert board.cuda.alive == []


def test_engines_of_a_decoder_are_built_too(edgeflex, board, tmp_path):
    graph = family_graph("olmoe")
    bundle = tmp_path / "bundle"
    source: Any = RandomSource(graph, tmp_path / "model")
    export_tensorrt_decoder(source, kind_plan(graph, "int4-group32"), bundle)
    built = edgeflex("build", bundle, "--quiet")
    assert built.code == 0, built.err
    assert "engines/expert-32.int4-group32.engine" in built.out
    assert f'Next: edgeflex run {bundle} --prompt "Once upon a time"' in built.out
    assert board.cuda.alive == []
