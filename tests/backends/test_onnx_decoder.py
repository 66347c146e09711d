"""A decoder's ONNX bundle: what is ONNX Runtime's own; ``tests/contracts/test_decoder_engines.py`` has the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import BundleError
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_bench import bench_decoder, verify_decoder
from edgeflex.schema_moe import Expected
from tests.engine_samples import NEW, ONNX, PROMPT, Lab

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(bundles) -> Path:
    """The bundle with experts of two precisions, and so of two sizes."""
    folder: Path = bundles.mixed(ONNX)
    return folder


@pytest.fixture(scope="module")
def expected(bundles) -> list[int]:
    said: list[int] = bundles.said(ONNX)
    return said


@pytest.fixture
def own(bundle, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    folder: Path = tmp_path / "own"
    shutil.copytree(bundle, folder)
    return folder


def test_experts_are_computed_from_the_arenas_own_bytes(bundles, monkeypatch):
    lab = Lab(ONNX, bundles, monkeypatch)
    with lab.loaded(lab.mixed()) as loaded:
        loaded.bring_all()
        before = loaded.run([1, 2])
        held = loaded.arena.copy()
        loaded.arena[:] = 0  # after binding: what is computed next must see it
        assert not np.array_equal(loaded.run([1, 2]), before)
        loaded.arena[:] = held
        assert np.array_equal(loaded.run([1, 2]), before)


# --- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "dense", "expert", "head", "data", "embedding"])
def test_damaged_stages_and_embeddings_are_found_at_load(own, kind):
    manifest = open_decoder_bundle(own).manifest
    if kind == "embedding":
        path = next(one.file for one in manifest.matrices if one.name == "embedding")
    elif kind == "data":
        path = next(one.data[0] for one in manifest.programs if one.data)
    else:
        path = next(one.path for one in manifest.programs if one.role == kind)
    raw = bytearray((own / path).read_bytes())
    raw[len(raw) // 2] ^= 1
    (own / path).write_bytes(raw)
    with pytest.raises(BundleError, match=Path(path).name), DecoderSession.from_bundle(own):
        pass


def test_a_manifest_without_a_stage_is_a_damaged_bundle(own):
    manifest = open_decoder_bundle(own).manifest
    fewer = manifest.model_copy(update={"programs": manifest.programs[1:]})
    with pytest.raises(BundleError, match="no stage"), DecoderSession(own, fewer) as session:
        list(session.generate(PROMPT, 3))


def test_graphs_for_onnx_runtime_are_none_for_tensorrt(own):
    document = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**document, "backend": "tensorrt"}))
    with pytest.raises(BundleError, match="names no stage for the sum of layer 0"):
        DecoderSession.from_bundle(own).__enter__()


# --- processes -----------------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_running_it_loads_neither_torch_nor_executorch_nor_onnx(bundle, expected):
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
with DecoderSession.from_bundle(sys.argv[1], Settings(cache_bytes=48 << 10)) as session:
    print(list(session.generate([int(one) for one in sys.argv[2].split(",")], int(sys.argv[3]))))
    session.stats()
heavy = {"torch", "torchao", "executorch", "onnx", "scipy", "matplotlib", "transformers"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    assert python(code, str(bundle), ",".join(map(str, PROMPT)), str(NEW)) == str(expected)


def test_bench_and_verify_judge_it_like_any_bundle(own, expected):
    said = Expected(prompt=tuple(PROMPT), tokens=tuple(expected))
    document = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**document, "expected": [said.model_dump()]}))
    (own / "tokenizer.json").unlink()
    files = [one for one in document["files"] if one["path"] != "tokenizer.json"]
    document = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**document, "files": files}))
    checks = {check.name: check for check in verify_decoder(own)}
    assert checks["sound files"].ok
    assert checks["packed store"].ok
    assert checks["greedy agreement"].measured == 1.0
    assert checks["expert cache"].ok
    bench = bench_decoder(own, [PROMPT], max_tokens=NEW, repeats=1)
    assert list(bench.runs[0].tokens) == expected
    assert all(check.was_measured or check.promised == 0 for check in bench.checks if "first" not in check.name)
