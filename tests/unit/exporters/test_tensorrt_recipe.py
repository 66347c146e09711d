"""The recipe of an export, and the script that builds from it, run for real with a trtexec that records its words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeflex.errors import InputError, UnsupportedError
from edgeflex.exporters.tensorrt import TENSORRT, EngineSource, engine_sources, write_recipe
from edgeflex.exporters.tensorrt_script import build_script, flags, shape_flags
from edgeflex.schema import Precision
from edgeflex.schema_trt import (
    SUPPORTED_VERSIONS,
    AxisRange,
    BuildOptions,
    BuildRecipe,
    EngineIndex,
    PortabilityKey,
    SegmentRecipe,
    TensorSpec,
)
from tests.small_nets import chain_model, ranges_of, residual_model

ONE = AxisRange(least=1, best=1, most=1)
PREFILL = {"T": AxisRange(least=1, best=64, most=512), "P": AxisRange(least=1, best=256, most=2048)}
DECODE = {"T": ONE, "P": AxisRange(least=1, best=1024, most=2048)}
# Every flag must exist in trtexec of 10.3 and of 11.4.
KNOWN_FLAGS = {
    *("onnx", "saveEngine", "stronglyTyped", "noTF32", "memPoolSize", "builderOptimizationLevel", "timingCacheFile"),
    *("skipInference", "allowWeightStreaming", "profile", "minShapes", "optShapes", "maxShapes"),
}
# A trtexec that answers as the real one does, writes an engine, and keeps what it was called with.
TRTEXEC = r"""#!/bin/sh
printf '&&&& RUNNING TensorRT.trtexec [TensorRT v%s] [b17] # trtexec\n' "${FAKE_RELEASE:-100300}"
case " $* " in *" --help "*) exit 0 ;; esac
for word in "$@"; do printf '%s\n' "$word"; done >>"$FAKE_CALLS"
printf -- '--\n' >>"$FAKE_CALLS"
echo "[08/17/2025-20:09:49] [I] Selected Device: ${FAKE_GPU-Orin}"
echo "[08/17/2025-20:09:49] [I] Selected Device ID: 0"
echo "[08/17/2025-20:09:49] [I] Compute Capability: 8.7"
echo "[08/17/2025-20:09:49] [I] TensorRT version: 10.3.0"
for word in "$@"; do
    case $word in
        --onnx=*) cat "${word#--onnx=}" >/dev/null || exit 1; onnx=${word#--onnx=} ;;
        --saveEngine=*) engine=${word#--saveEngine=} ;;
    esac
done
case $onnx in *"${FAKE_BREAKS:-nothing at all}"*) echo "[E] no implementation"; echo x >"$engine"; exit 1 ;; esac
printf 'engine of %s' "$onnx" >"$engine"
"""
NVIDIA_SMI = r"""#!/bin/sh
case "$*" in
    *compute_cap*) echo "${FAKE_CAPABILITY:-8.7}" ;;
    *query-gpu*) echo "Orin, 540.4.0" ;;
    *) echo "| NVIDIA-SMI 540.4.0    Driver Version: 540.4.0    CUDA Version: 12.6  |" ;;
esac
"""


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def save(folder: Path, name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], **constants: Any) -> None:
    """Write ``name.onnx`` with its constants in ``name.data``."""
    stored = [numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / f"{name}.onnx"
    if constants:
        onnx.save(model, str(path), save_as_external_data=True, location=f"{path.stem}.data", size_threshold=0)
    else:
        onnx.save(model, str(path))


def linear(folder: Path, name: str, kind: Any = np.float32) -> EngineSource:
    """A graph of one matrix product, stored in ``kind``."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    constants: dict[str, Any] = {"w": np.ones((64, 8), kind)}
    if kind is not np.float32:
        constants["s"] = np.full((1, 8) if kind is ml_dtypes.int4 else (), 0.5, np.float32)
        block = {"block_size": 64} if kind is ml_dtypes.int4 else {}
        nodes.insert(0, helper.make_node("DequantizeLinear", ["w", "s"], ["w_dq"], name="dq", axis=0, **block))
        nodes[1].input[1] = "w_dq"
    save(folder, name, nodes, [value("x", [1, 64])], [value("y", [1, 8])], **constants)
    return EngineSource(name=name, onnx=f"{name}.onnx", data=f"{name}.data")


def attention(folder: Path, **profiles: Any) -> EngineSource:
    """A graph with the axes of a decoder's stage: T new tokens, P rows of the cache."""
    (folder / "stages").mkdir(exist_ok=True)
    nodes = [
        helper.make_node("Concat", ["cache", "x"], ["all"], name="join", axis=0),
        helper.make_node("ReduceMean", ["all"], ["mean"], name="mean", keepdims=1),
        helper.make_node("Add", ["x", "mean"], ["y"], name="add"),
    ]
    inputs = [value("x", ["T", 16]), value("cache", ["P", 16]), value("bias", [16])]
    save(folder / "stages", "layer-0.attention", nodes, inputs, [value("y", ["T", 16])])
    return EngineSource(name="layer-0.attention", onnx="stages/layer-0.attention.onnx", profiles=profiles)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A PATH with nothing but the system's tools, a driver that answers and a trtexec that records."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("trtexec", TRTEXEC), ("nvidia-smi", NVIDIA_SMI)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("TRTEXEC", raising=False)
    return tools


@pytest.fixture
def bundle(tmp_path):
    """Two segments and their recipe, in a folder whose name has a space."""
    folder = tmp_path / "my bundle"
    folder.mkdir()
    write_recipe(folder, [linear(folder, "segment0"), linear(folder, "segment1", np.int8)])
    return folder


def run(folder: Path, *, expect: int = 0) -> str:
    """Run the script from elsewhere; return what it told people."""
    done = subprocess.run(
        ["sh", str(folder / "build.sh")], capture_output=True, text=True, cwd="/", check=False, timeout=60
    )
    assert done.returncode == expect, done.stderr
    return done.stderr


def calls() -> list[list[str]]:
    """Return the words of each call of trtexec since the test began."""
    path = Path(os.environ["FAKE_CALLS"])
    if not path.exists():
        return []
    found: list[list[str]] = [[]]
    for line in path.read_text().splitlines():
        if line == "--":
            found.append([])
        else:
            found[-1].append(line)
    return found[:-1]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the recipe --------------------------------------------------------------------------------------


def test_a_recipe_says_what_to_build_from_what(bundle):
    recipe = BuildRecipe.parse((bundle / "build.json").read_bytes(), "build.json")
    first, second = recipe.segments
    assert (first.name, first.onnx, first.data) == ("segment0", "segment0.onnx", "segment0.data")
    assert first.onnx_sha256 == sha256(bundle / "segment0.onnx")
    assert first.data_sha256 == sha256(bundle / "segment0.data")
    assert first.engine == "engines/segment0.engine"
    assert first.inputs == (TensorSpec(name="x", dtype="float32", shape=(1, 64)),)
    assert first.outputs == (TensorSpec(name="y", dtype="float32", shape=(1, 8)),)
    assert second.profiles == ()
    assert recipe.cuda_graph
    assert recipe.versions == SUPPORTED_VERSIONS
    assert recipe.least_version == (10, 3)
    assert recipe.options == BuildOptions()
    assert recipe.least_capability == (7, 5)
    assert set(recipe.hashes()) == {"segment0.onnx", "segment0.data", "segment1.onnx", "segment1.data"}


def test_a_recipe_survives_its_file_and_equal_exports_give_equal_bytes(bundle, tmp_path):
    text = (bundle / "build.json").read_bytes()
    recipe = BuildRecipe.parse(text, "build.json")
    assert BuildRecipe.parse(recipe.canonical_json(), "again") == recipe
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    write_recipe(other, [EngineSource(f"segment{i}", f"segment{i}.onnx", f"segment{i}.data") for i in range(2)])
    assert (other / "build.json").read_bytes() == text
    assert (other / "build.sh").read_bytes() == (bundle / "build.sh").read_bytes()


@pytest.mark.parametrize(
    ("kind", "capability"), [(np.int8, (7, 5)), (ml_dtypes.int4, (8, 0)), (ml_dtypes.float8_e4m3fn, (8, 9))]
)
def test_number_formats_ask_for_a_gpu_that_has_them(tmp_path, kind, capability):
    recipe = write_recipe(tmp_path, [linear(tmp_path, "segment0", kind)])
    assert recipe.least_capability == capability


def test_profiles_bound_every_dynamic_input(tmp_path):
    recipe = write_recipe(tmp_path, [attention(tmp_path, prefill=PREFILL, decode=DECODE)])
    (segment,) = recipe.segments
    assert [profile.name for profile in segment.profiles] == ["prefill", "decode"]
    assert set(segment.profiles[0].shapes) == {"x", "cache"}
    assert segment.profiles[0].shapes["x"].most == (512, 16)
    assert segment.profiles[1].shapes["x"].most == (1, 16)
    assert segment.profiles[1].shapes["cache"].best == (1024, 16)
    assert not recipe.cuda_graph
    assert segment.engine == "engines/layer-0.attention.engine"
    assert BuildRecipe.parse((tmp_path / "build.json").read_bytes(), "build.json") == recipe


def test_an_axis_without_a_range_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="does not bound the axes P"):
        write_recipe(tmp_path, [attention(tmp_path, decode={"T": ONE})])
    with pytest.raises(UnsupportedError, match=r"profiles are for dynamic inputs.*cache.*x"):
        write_recipe(tmp_path, [attention(tmp_path)])


def test_ranges_that_fall_are_refused():
    with pytest.raises(ValueError, match="must not fall"):
        AxisRange(least=4, best=2, most=8)


def test_a_graph_that_only_newer_versions_take_raises_the_least_version(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["w_dq"], name="dq", axis=1, block_size=64),
        helper.make_node("MatMul", ["x", "w_dq"], ["y"], name="product"),
    ]
    constants = {"w": np.ones((4, 64, 8), ml_dtypes.int4), "s": np.full((4, 1, 8), 0.5, np.float32)}
    save(tmp_path, "stacked", nodes, [value("x", [1, 64])], [value("y", [4, 1, 8])], **constants)
    stacked = EngineSource("stacked", "stacked.onnx", "stacked.data")
    recipe = write_recipe(tmp_path, [linear(tmp_path, "segment0"), stacked])
    assert recipe.least_version == (10, 8)
    assert recipe.versions == tuple(version for version in SUPPORTED_VERSIONS if version >= (10, 8))
    assert "-lt 100800" in (tmp_path / "build.sh").read_text()


def test_what_no_version_takes_is_refused_with_every_violation(tmp_path):
    nodes = [helper.make_node("Unique", ["x"], ["y"], name="unique")]
    save(tmp_path, "odd", nodes, [value("x", [4])], [value("y", ["U"])])
    with pytest.raises(
        UnsupportedError, match=r"(?s)no TensorRT from 10\.3 to 11\.4.*odd\.onnx: unique \[operator-unsup"
    ):
        write_recipe(tmp_path, [linear(tmp_path, "segment0"), EngineSource("odd", "odd.onnx")])
    assert not (tmp_path / "build.json").exists()


def test_names_that_a_shell_or_a_path_could_misread_are_refused(tmp_path):
    source = linear(tmp_path, "segment0")
    for name in ("a b", "$(id)", "a'b", "../up", "-x", ""):
        with pytest.raises(UnsupportedError, match="no recipe"):
            write_recipe(tmp_path, [EngineSource(name, source.onnx, source.data)])
    with pytest.raises(InputError, match="named twice"):
        write_recipe(tmp_path, [source, source])
    good = BuildRecipe.parse((write_recipe(tmp_path, [source])).canonical_json(), "here")
    for field, text in (("engine", "/etc/passwd"), ("onnx", "../segment0.onnx"), ("data", "a;b")):
        document = json.loads(good.canonical_json())
        document["segments"][0][field] = text
        with pytest.raises(InputError, match=field):
            BuildRecipe.parse(json.dumps(document), "build.json")


def test_an_input_that_a_shell_could_misread_is_refused(tmp_path):
    nodes = [helper.make_node("Abs", ["x;rm"], ["y"], name="abs")]
    save(tmp_path, "odd", nodes, [value("x;rm", [4])], [value("y", [4])])
    with pytest.raises(UnsupportedError, match="x;rm"):
        write_recipe(tmp_path, [EngineSource("odd", "odd.onnx")])


def test_the_recipe_is_read_with_neither_torch_nor_onnx():
    code = (
        "import edgeflex.schema_trt, sys; print([m for m in ('torch', 'onnx', 'numpy', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def key(**changes: Any) -> PortabilityKey:
    fields: dict[str, Any] = {
        "tensorrt": "10.3.0",
        "gpu": "Orin",
        "compute_capability": (8, 7),
        "driver": "12.6",
        "hashes": {"a.onnx": "0" * 64},
        "options": BuildOptions(),
    }
    return PortabilityKey(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"tensorrt": "10.3.0.26"}, ""),
        ({"driver": ""}, ""),
        ({"tensorrt": "10.7.0"}, "TensorRT was 10.3.0, is 10.7.0"),
        ({"gpu": "Thor"}, "GPU was Orin, is Thor"),
        ({"compute_capability": (11, 0)}, "compute capability was 8.7, is 11.0"),
        ({"driver": "13.0"}, "the driver's CUDA was 12.6, is 13.0"),
        ({"hashes": {"a.onnx": "1" * 64}}, "a.onnx has changed"),
        ({"hashes": {"a.onnx": "0" * 64, "b.onnx": "0" * 64}}, "b.onnx has changed"),
        ({"options": BuildOptions(optimization_level=5)}, "the builder's options have changed"),
    ],
)
def test_a_key_says_where_it_differs(changes, words):
    assert "; ".join(key().differences(key(**changes))) == words


# --- the script --------------------------------------------------------------------------------------


def test_the_script_is_posix_shell(bundle, tmp_path):
    folder = tmp_path / "decoder"
    folder.mkdir()
    write_recipe(
        folder, [attention(folder, prefill=PREFILL, decode=DECODE)], options=BuildOptions(weight_streaming=True)
    )
    for script in (bundle / "build.sh", folder / "build.sh"):
        assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
        assert os.access(script, os.X_OK)
        assert script.read_text().startswith("#!/bin/sh\n")
        assert "@" not in script.read_text().replace('"$@"', "")


@pytest.mark.parametrize("options", [BuildOptions(), BuildOptions(weight_streaming=True)])
def test_the_script_passes_shellcheck(tmp_path, options):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    write_recipe(tmp_path, [linear(tmp_path, "segment0")], options=options)
    done = subprocess.run(["shellcheck", "-s", "sh", str(tmp_path / "build.sh")], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()


def test_every_flag_is_one_that_trtexec_has_from_10_3_to_11(tmp_path):
    recipe = write_recipe(
        tmp_path, [attention(tmp_path, prefill=PREFILL, decode=DECODE)], options=BuildOptions(weight_streaming=True)
    )
    used = {flag.removeprefix("--").partition("=")[0] for flag in (*flags(recipe), *shape_flags(recipe.segments[0]))}
    assert used <= KNOWN_FLAGS
    assert KNOWN_FLAGS - used == {"onnx", "saveEngine"}


def test_the_script_builds_every_engine_and_their_index(bundle, board):
    assert "all engines are built" in run(bundle)
    first, second = calls()
    assert first == [
        "--onnx=segment0.onnx",
        "--saveEngine=engines/segment0.engine.part",
        "--stronglyTyped",
        "--noTF32",
        "--memPoolSize=workspace:1024",
        "--builderOptimizationLevel=3",
        "--timingCacheFile=engines/timing.cache",
        "--skipInference",
    ]
    assert second[0] == "--onnx=segment1.onnx"
    assert (bundle / "engines/segment1.engine").read_text() == "engine of segment1.onnx"
    recipe = BuildRecipe.parse((bundle / "build.json").read_bytes(), "build.json")
    index = EngineIndex.parse((bundle / "engines/index.json").read_bytes(), "index.json")
    assert index.key == key(hashes=recipe.hashes())
    assert [one.file for one in index.engines] == [segment.engine for segment in recipe.segments]
    for one in index.engines:
        assert one.sha256 == sha256(bundle / one.file)
        assert one.size_bytes == (bundle / one.file).stat().st_size
        assert 0 <= one.build_s < 60
    assert not list(bundle.rglob("*.part"))


def test_profiles_reach_trtexec_in_order(tmp_path, board):
    folder = tmp_path / "decoder"
    folder.mkdir()
    write_recipe(folder, [attention(folder, prefill=PREFILL, decode=DECODE)])
    run(folder)
    assert calls()[0][-8:] == [
        "--profile=0",
        "--minShapes=x:1x16,cache:1x16",
        "--optShapes=x:64x16,cache:256x16",
        "--maxShapes=x:512x16,cache:2048x16",
        "--profile=1",
        "--minShapes=x:1x16,cache:1x16",
        "--optShapes=x:1x16,cache:1024x16",
        "--maxShapes=x:1x16,cache:2048x16",
    ]
    one = write_recipe(folder, [attention(folder, decode=DECODE)])
    assert shape_flags(one.segments[0])[0].startswith("--minShapes=")


def test_a_second_run_builds_nothing_and_keeps_the_index(bundle, board):
    run(bundle)
    index = (bundle / "engines/index.json").read_bytes()
    said = run(bundle)
    assert len(calls()) == 2
    assert said.count("is up to date") == 2
    assert (bundle / "engines/index.json").read_bytes() == index


@pytest.mark.parametrize("change", ["engine removed", "engine harmed", "stamp removed", "graph", "options", "trtexec"])
def test_what_has_changed_is_built_again(bundle, board, change):
    run(bundle)
    engine = bundle / "engines/segment1.engine"
    again = 1
    if change == "engine removed":
        engine.unlink()
    elif change == "engine harmed":
        engine.write_bytes(b"x")
    elif change == "stamp removed":
        Path(f"{engine}.stamp").unlink()
    else:
        sources = [EngineSource(f"segment{i}", f"segment{i}.onnx", f"segment{i}.data") for i in range(2)]
        if change == "graph":
            linear(bundle, "segment1")
        again = 1 if change == "graph" else 2
        write_recipe(bundle, sources, options=BuildOptions(optimization_level=5 if change == "options" else 3))
        if change == "trtexec":
            (board / "trtexec").write_text(f"{TRTEXEC}# another version\n")
    run(bundle)
    assert len(calls()) == 2 + again
    assert engine.read_text() == "engine of segment1.onnx"


def test_a_failed_build_says_why_keeps_what_is_done_and_resumes(bundle, board, monkeypatch):
    monkeypatch.setenv("FAKE_BREAKS", "segment1")
    said = run(bundle, expect=7)
    assert "[E] no implementation" in said
    assert "trtexec could not build segment1; engines/segment1.engine.log says why" in said
    assert (bundle / "engines/segment0.engine").exists()
    assert not (bundle / "engines/segment1.engine").exists()
    assert not list(bundle.rglob("*.part"))
    assert not (bundle / "engines/index.json").exists()
    monkeypatch.delenv("FAKE_BREAKS")
    assert "segment0 is up to date" in run(bundle)
    assert [words[0] for words in calls()] == ["--onnx=segment0.onnx", *["--onnx=segment1.onnx"] * 2]


@pytest.mark.parametrize("name", ["segment0.onnx", "segment1.data"])
def test_a_changed_file_is_refused_before_it_is_built(bundle, board, name):
    path = bundle / name
    harmed = bytearray(path.read_bytes())
    harmed[len(harmed) // 2] ^= 1
    path.write_bytes(bytes(harmed))
    said = run(bundle, expect=6)
    assert f"{name} is not the file that was exported" in said
    assert "Copy the bundle again" in said
    path.unlink()
    assert f"{name} is missing" in run(bundle, expect=6)
    assert not any(words[0] == f"--onnx={path.stem}.onnx" for words in calls())


def test_a_missing_trtexec_is_named_with_the_line_that_installs_it(bundle, board, monkeypatch):
    if Path("/usr/src/tensorrt/bin/trtexec").exists():
        pytest.skip("this machine has a real trtexec")
    moved = board.parent / "trtexec-elsewhere"
    (board / "trtexec").rename(moved)
    said = run(bundle, expect=5)
    assert "trtexec is neither on the PATH nor at /usr/src/tensorrt/bin/trtexec" in said
    assert "apt install" in said
    monkeypatch.setenv("TRTEXEC", str(moved))
    run(bundle)


def test_a_missing_driver_is_named(bundle, board):
    if any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/nvgpu", "/proc/driver/nvidia/version")):
        pytest.skip("this machine has a driver")
    (board / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert "no NVIDIA driver was found" in run(bundle, expect=7)
    assert calls() == []


def test_an_old_tensorrt_and_a_gpu_without_fp8_are_refused_before_minutes_of_building(tmp_path, board, monkeypatch):
    folder = tmp_path / "fp8"
    folder.mkdir()
    write_recipe(folder, [linear(folder, "segment0", ml_dtypes.float8_e4m3fn)])
    said = run(folder, expect=4)
    assert "compute capability 8.7" in said
    assert "8.9 or above (FP8 layers" in said
    monkeypatch.setenv("FAKE_CAPABILITY", "12.0")
    monkeypatch.setenv("FAKE_RELEASE", "100100")
    assert "TensorRT is 10.1; these graphs need 10.3 or later" in run(folder, expect=4)
    monkeypatch.setenv("FAKE_RELEASE", "110400")
    run(folder)


def test_a_log_that_does_not_name_the_gpu_leaves_no_index(bundle, board, monkeypatch):
    monkeypatch.setenv("FAKE_GPU", "")
    assert "names no TensorRT version, GPU" in run(bundle, expect=7)
    assert not (bundle / "engines/index.json").exists()


def test_a_gpu_name_cannot_break_the_index(bundle, board, monkeypatch):
    monkeypatch.setenv("FAKE_GPU", 'NVIDIA "Orin"\\ (nvgpu)')
    run(bundle)
    index = EngineIndex.parse((bundle / "engines/index.json").read_bytes(), "index.json")
    assert index.key.gpu == "NVIDIA Orin (nvgpu)"


# --- the exporter ------------------------------------------------------------------------------------


MIX = {
    "stem": Precision.INT8_STATIC,
    "block.conv1": Precision.FP16,
    "block.conv2": Precision.INT8_STATIC,
    "wide": Precision.INT4_BLOCK64,
    "narrow": Precision.FP8,
    "last": Precision.FP16,
}


@pytest.mark.slow
def test_an_export_of_every_precision_in_one_network_suits_every_version(tmp_path):
    model = residual_model()
    written = TENSORRT.write(TENSORRT.prepare(model, MIX, ranges_of(model)), model.graph, tmp_path)
    assert {name: written.precisions[name] for name in MIX} == MIX
    recipe = BuildRecipe.parse((tmp_path / "build.json").read_bytes(), "build.json")
    assert recipe.versions == SUPPORTED_VERSIONS
    assert recipe.least_capability == (8, 9)
    assert [spec.name for spec in recipe.segments[0].outputs] == ["activations", "probabilities", "confidence"]
    assert recipe.segments[0].outputs[0].shape == recipe.segments[1].inputs[0].shape
    assert recipe.cuda_graph


def test_an_export_holds_graphs_recipe_and_script_and_padding_keeps_them_true(tmp_path, board):
    model = chain_model()
    layers = {layer.name: Precision.INT8_STATIC for layer in model.graph.layers[:1]}
    prepared = TENSORRT.prepare(model, layers, ranges_of(model))
    written = TENSORRT.write(prepared, model.graph, tmp_path)
    assert written.files["recipe"] == "build.json"
    assert written.files["build_script"] == "build.sh"
    sources = engine_sources(written)
    assert [source.name for source in sources] == [f"segment{i}" for i in range(len(written.segments))]
    programs = [path for role, path in written.files.items() if role.startswith("program:")]
    assert written.size_bytes == sum((tmp_path / path).stat().st_size for path in programs)
    size_bytes = written.size_bytes + 1000
    TENSORRT.pad(written, tmp_path, size_bytes)
    assert sum((tmp_path / path).stat().st_size for path in programs) == size_bytes
    recipe = BuildRecipe.parse((tmp_path / "build.json").read_bytes(), "build.json")
    assert recipe.hashes() == {path: sha256(tmp_path / path) for path in programs}
    assert recipe.versions == SUPPORTED_VERSIONS
    assert isinstance(recipe.segments[0], SegmentRecipe)
    assert build_script(recipe) == (tmp_path / "build.sh").read_text()
    run(tmp_path)
