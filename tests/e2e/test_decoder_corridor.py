"""A mixture-of-experts decoder walks the corridor, command by command: what comes out, what is kept, what is refused.

The decoder is random and small: two layers of eight experts. Its texts are noise, and the same noise every time.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from argparse import ArgumentParser
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgeflex.cli import main
from edgeflex.models.tiny_decoder import tiny_config
from edgeflex.runtimes.policies import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Command = Callable[..., Any]
    Start = Callable[..., subprocess.Popen[str]]

pytestmark = pytest.mark.timeout(600)  # whole commands, begun and killed

HIDDEN, INNER, EXPERTS, LAYERS, CONTEXT = 64, 32, 8, 2, 128
PATIENCE_S = 240
KIB = 1 << 10
CALIBRATE = ("calibrate", "-m", "in/model", "--text", "in/text.txt", "--tokens", 256, "-q")
SHORT = ("--prompt", "Return a string", "--max-tokens", 12)


def write_decoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a random decoder of OLMoE's family, wide enough that its texts vary, with the shipped tokenizer."""
    draw = np.random.default_rng(seed)
    ones = np.ones(HIDDEN, np.float32)
    config = {
        **tiny_config(), "dtype": "float32", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts": EXPERTS,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT, "eos_token_id": None,
    }  # fmt: skip

    def drawn(scale: float, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.asarray((scale * draw.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32))

    tensors = {
        "model.embed_tokens.weight": drawn(4, config["vocab_size"], HIDDEN),
        "model.norm.weight": ones,
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"{at}.{norm}.weight"] = ones
        for part in "qkvo":
            tensors[f"{at}.self_attn.{part}_proj.weight"] = drawn(1, HIDDEN, HIDDEN)
        tensors[f"{at}.mlp.gate.weight"] = drawn(3, EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                tensors[f"{at}.mlp.experts.{expert}.{part}_proj.weight"] = drawn(2, *shape)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = resources.files("edgeflex.models") / "data" / "tiny_decoder.tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


def answered(*line: object) -> dict[str, Any]:
    """Run a command in this process that must end well, and return its JSON document."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["edgeflex", *map(str, line), "--json"])
        with pytest.raises(SystemExit) as leaving:
            main()
    assert leaving.value.code == 0, f"edgeflex {' '.join(map(str, line))}: {printed.getvalue()}"
    document: dict[str, Any] = json.loads(printed.getvalue())
    return document


def total_bytes(plan: dict[str, Any]) -> int:
    return sum(plan["predicted"]["memory"].values())


@dataclass(frozen=True)
class Walk:
    """What the commands left behind, and the documents that they printed."""

    folder: Path
    graph: dict[str, Any]
    calibration: dict[str, Any]
    resident: dict[str, Any]
    plan: dict[str, Any]
    manifest: dict[str, Any]
    run: dict[str, Any]

    @property
    def budget_bytes(self) -> int:
        """The memory that was planned for."""
        limit: int = self.plan["budget"]["memory_bytes"]
        return limit


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Walk the corridor once, with a budget for two thirds of the experts."""
    folder = tmp_path_factory.mktemp("decoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = write_decoder(Path("model"))
        known = (str, bytes, dict, list, int, ArgumentParser, textwrap.TextWrapper, json, textwrap.dedent)
        Path("text.txt").write_text("\n\n".join(inspect.getdoc(one) or "" for one in known))
        graph = answered("inspect", model)
        Path("in").symlink_to(".")
        calibration = answered(*CALIBRATE, "--threads", 2)
        resident = answered("plan", "calibration", "--prompt-tokens", 16, "-o", "resident.json")
        plan = resident
        while (
            plan["verdict"] == "fits"
        ):  # once more where smaller weights make room, which a busy machine may call slower
            budget = total_bytes(plan) - plan["cache_bytes"] // 3
            plan = answered("plan", "calibration", "--prompt-tokens", 16, "--memory", budget)
        manifest = answered(
            "export", "plan.json", "-m", model, "--calibration", "calibration", "--no-stock", "-q", "-o", "bundle"
        )
        run = answered("run", "bundle", *SHORT)
    return Walk(folder, graph, calibration, resident, plan, manifest, run)


@pytest.fixture
def here(walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder from which ``in/`` leads to what the walk left."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "in").symlink_to(walk.folder)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def bundle(here: Path) -> Path:
    """Return a copy of the bundle, packed weights included, that may be damaged."""
    shutil.copytree("in/bundle", "bundle")
    return Path("bundle")


def refused(edgeflex: Command, line: Sequence[object], code: int, *parts: str) -> dict[str, Any]:
    """Run a command that must fail with one line and leave nothing; return the document that machines get."""
    before = sorted(path.name for path in Path().iterdir())
    done = edgeflex(*line, "--json")
    assert done.code == code, done.err
    said = [one for one in done.err.rstrip("\n").split("\n") if not one.endswith("…")]
    assert said[0].startswith("edgeflex: ")
    assert all(one.startswith("  - ") for one in said[1:]), "one line, or one line per fault below it"
    for part in parts:
        assert part in done.err
    document: dict[str, Any] = done.document
    assert document["message"] == "\n".join(said).removeprefix("edgeflex: ")
    assert sorted(path.name for path in Path().iterdir()) == before, "a refused command left something behind"
    return document


# --- what the walk made ----------------------------------------------------------------------------------


def test_inspect_tells_the_graph_from_the_folder(walk: Walk, edgeflex: Command, here: Path):
    assert walk.graph["family"] == "olmoe"
    assert [one["routing"]["experts"] for one in walk.graph["layers"]] == [EXPERTS] * LAYERS
    plain = edgeflex("inspect", "in/model")
    assert plain.code == 0
    assert "8 experts, 2 a token" in plain.out


def test_calibration_measured_every_unit_in_every_precision(walk: Walk):
    units = {"embedding", "head", *(f"layers.{layer}" for layer in range(LAYERS))}
    units |= {f"layers.{layer}.experts.{expert}" for layer in range(LAYERS) for expert in range(EXPERTS)}
    measured = {(one["unit"], one["precision"]) for one in walk.calibration["losses"]}
    assert measured == {(unit, precision) for unit in units for precision in ("int8-dynamic", "int4-group32")}
    assert 0 < walk.calibration["uniform_kl"]["int8-dynamic"] < walk.calibration["uniform_kl"]["int4-group32"]
    assert walk.calibration["tokens"] == 256


def test_a_budget_below_all_experts_is_offloaded_and_kept(walk: Walk):
    assert walk.resident["verdict"] == "fits"
    assert walk.plan["verdict"] == "offload"
    assert total_bytes(walk.plan) <= walk.budget_bytes < total_bytes(walk.resident)
    assert walk.plan["cycle_bytes"] <= walk.plan["cache_bytes"] < walk.resident["cache_bytes"]
    assert 0 < walk.plan["predicted"]["hit_rate"] <= walk.plan["predicted"]["belady_hit_rate"] < 1
    assert walk.plan["context_tokens"] == CONTEXT, "without --context, as many tokens as the decoder knows"


def test_the_plan_is_told_with_its_verdict_and_reasons(walk: Walk, edgeflex: Command, here: Path):
    plain = edgeflex("plan", "in/calibration", "--prompt-tokens", 16, "--memory", walk.budget_bytes)
    assert plain.code == 0, plain.err
    assert plain.out.startswith("OFFLOAD: experts are read from storage")
    assert "Belady" in plain.out
    written = json.loads(Path("plan.json").read_text())
    same = [name for name in written if name != "proof"]
    assert {name: written[name] for name in same} == {name: walk.plan[name] for name in same}


# --- plan for a GPU ----------------------------------------------------------------------------------------

ON_A_CARD = ("plan", "in/calibration", "--prompt-tokens", 16, "--device", "rtx-4090")


def least_of(document: dict[str, Any], name: str) -> int:
    """Return the least bytes that a refusal names."""
    return int(document["least"][name])


def test_a_plan_for_a_card_divides_its_memory_and_says_what_else_was_tried(walk: Walk, here: Path, edgeflex: Command):
    refusal = refused(edgeflex, (*ON_A_CARD, "--vram", "1MiB"), 3, "vram", "dense part takes")
    least = least_of(refusal, "vram")
    everything = answered(*ON_A_CARD, "--vram", "4GiB", "-o", "whole.json")
    assert (everything["verdict"], everything["gpu"]["placement"]) == ("fits", "resident")
    budget = least + everything["gpu"]["vram_cache_bytes"] // 2
    plan = answered(*ON_A_CARD, "--vram", budget, "--memory", "4GiB", "-o", "card.json")
    gpu = plan["gpu"]
    assert sum(gpu["memory"].values()) <= budget
    assert sum(plan["predicted"]["memory"].values()) <= 4 << 30
    assert gpu["origin"] == "datasheet"
    assert {one["placement"] for one in gpu["trials"]} == {"cache", "static", "cpu"}
    assert plan["predicted"]["token_s"]["value"] == min(one["token_s"] for one in gpu["trials"])
    assert plan["predicted"]["bound_token_s"] <= plan["predicted"]["token_s"]["value"]
    told = edgeflex(*ON_A_CARD, "--vram", budget, "--memory", "4GiB", "-o", "again.json")
    assert told.code == 0
    assert "Placements tried with these memories" in told.out
    assert "nothing was measured on it" in " ".join(told.out.split())
    assert json.loads(Path("again.json").read_text())["gpu"] == gpu


def test_a_plan_for_a_card_is_exported_and_a_run_on_a_device_takes_its_placement(here: Path, edgeflex: Command):
    least = least_of(refused(edgeflex, (*ON_A_CARD, "--vram", "1MiB"), 3), "vram")
    plan = answered(*ON_A_CARD, "--vram", least + 20_000, "-o", "card.json")
    line = ("export", "card.json", "-m", "in/model", "--calibration", "in/calibration", "--no-stock", "-q")
    manifest = answered(*line, "-o", "placed")
    assert manifest["plan"]["gpu"] == plan["gpu"]
    run = answered("run", "placed", *SHORT, "--device", "cpu-torch")
    assert len(run["tokens"]) == 12
    assert run["cache"]["capacity_bytes"] == plan["gpu"]["vram_cache_bytes"]
    report = edgeflex("report", "placed", "-o", "page.html")
    assert report.code == 0
    page = Path("page.html").read_text()
    assert "Placement" in page
    assert "rates from data sheets at least in part" in page


def test_a_board_with_one_memory_gets_one_tier_and_the_reason(here: Path, edgeflex: Command):
    board = ("plan", "in/calibration", "--prompt-tokens", 16, "--device", "jetson-orin-nano-8gb")
    plan = answered(*board, "--vram", "4GiB", "--memory", "6GiB")
    assert plan["gpu"]["one_memory"]
    assert plan["gpu"]["ram_cache_bytes"] == 0
    assert any("offloading to RAM gains nothing" in one for one in plan["reasons"])


def test_a_plan_without_a_gpu_says_nothing_of_one(walk: Walk):
    assert "gpu" not in walk.plan
    assert "vram_bytes" not in walk.plan["budget"]


def test_options_of_a_gpu_need_its_memory_and_a_gpu_needs_a_name(
    here: Path, edgeflex: Command, monkeypatch: pytest.MonkeyPatch
):
    refused(edgeflex, ON_A_CARD, 2, "--device", "--vram")
    refused(edgeflex, ("plan", "in/calibration", "--link", "25GB"), 2, "--link", "--vram")
    refused(edgeflex, ("plan", "--dry-run", "in/model", "--vram", "6GiB"), 2, "--vram", "headers")
    monkeypatch.setattr("edgeflex.profiles.cuda.cuda_problem", lambda: "no NVIDIA driver")
    refused(edgeflex, ("plan", "in/calibration", "--vram", "6GiB"), 2, "no NVIDIA driver", "--device rtx-4090")


# --- export ------------------------------------------------------------------------------------------------


def test_export_holds_the_plan_and_says_how_far_it_is_from_fp32(walk: Walk):
    assert walk.manifest["plan"] == walk.plan
    assert walk.manifest["measured_kl"] > 0
    assert walk.manifest["measured_perplexity"] > 0
    assert 0.5 < walk.manifest["router_agreement"] <= 1
    assert walk.manifest["expected"]
    chosen = {one["subject"]: one["option"] for one in walk.plan["choices"]}
    stored = {one["name"].rpartition(".")[0]: one["precision"] for one in walk.manifest["matrices"]}
    assert {unit: stored[unit] for unit in stored if ".experts." in unit} == {
        unit: chosen[unit] for unit in chosen if ".experts." in unit
    }


def test_the_same_plan_is_exported_for_tensorrt_with_the_same_numbers(walk: Walk, edgeflex: Command, here: Path):
    line = ("export", "in/plan.json", "-m", "in/model", "--calibration", "in/calibration", "--target", "tensorrt", "-q")
    done = edgeflex(*line, "-o", "engines")
    assert done.code == 0, done.err
    assert "Next: on the device: edgeflex build engines" in done.out
    manifest = json.loads(Path("engines/manifest.json").read_text())
    assert manifest["backend"] == "tensorrt"
    for name in ("plan", "measured_kl", "measured_perplexity", "router_agreement", "expected", "points"):
        assert manifest[name] == walk.manifest[name], name
    recipe = json.loads(Path("engines/build.json").read_text())
    assert {one["onnx"] for one in recipe["segments"]} == {one["path"] for one in manifest["programs"]}


def test_a_run_answers_and_counts(walk: Walk):
    run = walk.run
    assert len(run["tokens"]) == 12
    assert len(run["times"]) == 11
    assert run["text"]
    assert run["stopped_by"] == "length"
    cache = run["cache"]
    assert cache["capacity_bytes"] == walk.plan["cache_bytes"]
    assert 0 < cache["peak_bytes"] <= walk.plan["cache_bytes"]
    assert cache["decode_hits"] + cache["decode_misses"] == 11 * LAYERS * 2
    assert cache["misses"] > 0
    assert json.loads((walk.folder / "stats.json").read_text())["tokens"] == run["tokens"]


def test_plain_output_is_the_text_alone(walk: Walk, edgeflex: Command, here: Path):
    done = edgeflex("run", "in/bundle", *SHORT)
    assert (done.code, done.out) == (0, walk.run["text"] + "\n")
    quiet = edgeflex("run", "in/bundle", *SHORT, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, walk.run["text"] + "\n", "")


def test_a_terminal_that_knows_no_unicode_sees_escapes(
    walk: Walk, here: Path, start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start(["run", "in/bundle", *SHORT])
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "tokens/s" in err
    assert out == walk.run["text"].encode("ascii", "backslashreplace").decode() + "\n"


def test_signs_that_a_terminal_lacks_are_written_in_plain_letters(
    walk: Walk, here: Path, start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = start(["plan", "in/calibration", "--prompt-tokens", "16"])
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "\\" not in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("memory ")]
    assert row[1] == "-", "no limit"


def test_more_threads_than_processors_are_answered_with_a_note(walk: Walk, here: Path, start: Start):
    threads = (os.cpu_count() or 1) + 1
    process = start(["run", "in/bundle", *SHORT, "--threads", str(threads), "-q", "--json"])
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert json.loads(out)["text"] == walk.run["text"]
    assert err.startswith(f"edgeflex: note: {threads} threads on ")
    assert err.count("\n") == 1


def pretend_it_was_faster(manifest: Path, times: float) -> dict[str, float]:
    """Write into a bundle that its plan was made on this machine at so many times its speed; return that speed."""
    document = json.loads(manifest.read_text())
    then = document["plan"]["conditions"]
    then["arithmetic_s"] /= times
    then["memory_bytes_per_s"] *= times
    manifest.write_text(json.dumps(document))
    assert then["load_average"] is None, "nothing but the speed is kept"
    return {name: value for name, value in then.items() if value is not None}


def test_memory_and_files_are_measured_as_promised_and_reported(walk: Walk, here: Path, edgeflex: Command):
    """Times are not judged here: other work on the machine may double them, and answers are another test's.

    Memory is mostly the interpreter's for so small a decoder, and that varies by megabytes from start to start.
    """
    shutil.copytree("in/bundle", "bundle")
    faster = pretend_it_was_faster(Path("bundle/manifest.json"), times=10)
    done = edgeflex("verify", "bundle", "--json", "-q")
    checks = {one["name"]: one for one in done.document["checks"]}
    for name in ("sound files", "packed store", "expert cache"):
        assert checks[name]["ok"], checks[name]
    assert abs(checks["memory budget"]["measured"] - walk.budget_bytes) < 8 << 20
    bench = edgeflex("bench", "bundle", "--text", "in/text.txt", "--max-tokens", 4, "--repeats", 1, "-q")
    kept = {one["name"]: one["ok"] for one in json.loads(Path("bench.json").read_text())["checks"]}
    assert bench.code == (0 if kept["memory budget"] else 3)
    assert kept["expert cache"]
    slower = "This machine is slower now than at calibration: arithmetic takes"
    assert slower in " ".join(bench.out.split()), f"calibrated at {faster}"
    answered("run", "bundle", *SHORT)
    files = ("--bench", "bench.json", "--verify", "verify.json", "--stats", "stats.json")
    done = edgeflex("report", "bundle", *files)
    assert done.code == 0, done.err
    assert "sound files" in done.out
    Path("list.json").write_text("[1]")
    for other in ("stats.json", "list.json"):
        line = ("report", "bundle", "--verify", other, "-o", "other.html")
        refused(edgeflex, line, 2, "not a valid DecoderVerify")
    page = Path("report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert slower in page


# --- the same text, whatever the cache --------------------------------------------------------------------


def test_a_benchmark_on_a_device_is_recorded_told_and_drawn(here: Path, edgeflex: Command):
    """The processor stands in for the GPU."""
    shutil.copytree("in/bundle", "bundle")
    line = ("bench", "bundle", "--text", "in/text.txt", "--max-tokens", 12, "--repeats", 1, "--device", "cpu-torch")
    told = edgeflex(*line, "--vram", "64MiB", "--cache", "32KiB", "-q")
    assert told.code == 0
    assert "Share of the watched time" in told.out
    record = json.loads((here / "bench.json").read_text())["device"]
    assert record["requested_bytes"] == 64 << 20
    assert record["tokens"] == 3 * 11
    assert sum(record["busy_s"].values()) > 0
    edgeflex("report", "bundle", "--bench", "bench.json", "-o", "device.html")
    page = (here / "device.html").read_text()
    assert "<h2>Device</h2>" in page
    assert "Who waited" in page
    refused(edgeflex, ("bench", "bundle", "--text", "in/text.txt", "--vram", "1GiB"), 2, "--device cuda")
    refused(edgeflex, ("run", "bundle", "--prompt", "a", "--vram", "1GiB"), 2, "--device cuda")


@pytest.mark.parametrize("cache", ["8KiB", "16KiB", "24KiB", "40KiB", "1MiB"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_text_is_the_same_at_every_size_of_cache_and_number_of_threads(
    walk: Walk, here: Path, cache: str, threads: int
):
    run = answered("run", "in/bundle", *SHORT, "--cache", cache, "--threads", threads)
    assert (run["tokens"], run["text"]) == (walk.run["tokens"], walk.run["text"])
    assert run["threads"] == threads
    assert run["cache"]["peak_bytes"] <= run["cache"]["capacity_bytes"] <= 1 << 20


@pytest.mark.parametrize("policy", sorted({*POLICIES} - {"static"}))  # which needs an order of worth
def test_the_text_is_the_same_under_every_policy(walk: Walk, here: Path, policy: str):
    run = answered("run", "in/bundle", *SHORT, "--policy", policy, "--cache", "40KiB", "--prefetch", 1)
    assert (run["tokens"], run["cache"]["policy"]) == (walk.run["tokens"], policy)


def test_drawn_texts_are_the_same_for_the_same_seed_only(here: Path):
    line = ("run", "in/bundle", *SHORT, "--temperature", 2, "--top-k", 200, "--top-p", 0.99)
    drawn = [answered(*line, "--seed", seed)["tokens"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_from_a_file_is_the_same_prompt(walk: Walk, here: Path):
    Path("prompt.txt").write_text("Return a string")
    run = answered("run", "in/bundle", "--prompt-file", "prompt.txt", "--max-tokens", 12)
    assert run["tokens"] == walk.run["tokens"]


def test_an_answer_ends_where_the_context_does(here: Path):
    run = answered("run", "in/bundle", "--prompt", "Return a string", "--max-tokens", 500)
    assert run["stopped_by"] == "context"
    assert run["prompt_tokens"] + len(run["tokens"]) == CONTEXT + 1


def test_an_answer_ends_before_a_stop_string(walk: Walk, here: Path):
    text = walk.run["text"]
    stop = text[len(text) // 2 :][:3]
    run = answered("run", "in/bundle", *SHORT, "--stop", stop)
    assert run["text"] == text[: text.index(stop)]
    assert run["stopped_by"] == "stop"


def test_the_packed_store_is_made_again_when_it_is_missing(walk: Walk, bundle: Path):
    (store,) = bundle.glob("packed-*")
    before = {path.name: path.read_bytes() for path in store.glob("*.bin")}
    shutil.rmtree(store)
    run = answered("run", bundle, *SHORT)
    assert run["tokens"] == walk.run["tokens"]
    assert {path.name: path.read_bytes() for path in store.glob("*.bin")} == before


# --- talking -----------------------------------------------------------------------------------------------


def talk(edgeflex: Command, monkeypatch: pytest.MonkeyPatch, typed: str | bytes, *options: object) -> Any:
    raw = typed if isinstance(typed, bytes) else typed.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    return edgeflex("run", "in/bundle", "-i", "--max-tokens", 5, *options)


def test_every_line_is_answered_in_the_context_of_the_others(
    here: Path, edgeflex: Command, monkeypatch: pytest.MonkeyPatch
):
    both = talk(edgeflex, monkeypatch, "A dictionary\n\nof strings\n", "-q").out
    first = talk(edgeflex, monkeypatch, "A dictionary\n", "-q").out
    second = talk(edgeflex, monkeypatch, "of strings\n", "-q").out
    assert both.startswith(first)
    assert both != first + second, "the second answer knows what was said before"
    document = talk(edgeflex, monkeypatch, "A dictionary\n\nof strings\n", "--json").document
    assert document["text"] + "\n" == both


@pytest.mark.parametrize("typed", ["", "\n \n"])
def test_nothing_typed_is_bad_input(here: Path, edgeflex: Command, monkeypatch: pytest.MonkeyPatch, typed: str):
    done = talk(edgeflex, monkeypatch, typed)
    assert done.code == 2
    assert "no line to answer" in done.err


def test_typed_bytes_that_are_no_text_are_bad_input(here: Path, edgeflex: Command, monkeypatch: pytest.MonkeyPatch):
    done = talk(edgeflex, monkeypatch, b"\xff\xfe\n")
    assert done.code == 2
    assert "standard input: byte 0 is not UTF-8" in done.err


def test_a_talk_that_fills_the_context_says_so(here: Path, edgeflex: Command, monkeypatch: pytest.MonkeyPatch):
    done = talk(edgeflex, monkeypatch, "a b c d e f g h\n" * 20, "-q")
    assert done.code == 2
    assert f"the context holds {CONTEXT}" in done.err
    assert done.out.count("\n") > 2, "what was answered before stays said"


# --- another computer ----------------------------------------------------------------------------------------

WITHOUT_TORCH = "import sys; sys.modules.update(torch=None, transformers=None); from edgeflex.cli import main; main()"


def test_another_computer_needs_no_more_than_a_copy_of_the_calibration(walk: Walk, here: Path):
    shutil.copytree("in/calibration", "copy")
    known = json.loads(Path("copy/rates.json").read_text())
    Path("copy/rates.json").unlink()
    line = [sys.executable, "-c", WITHOUT_TORCH, "profile", "--decoder", "copy", "--threads", "1,2", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    rates = json.loads(done.stdout)
    assert rates == json.loads(Path("copy/rates.json").read_text())
    assert rates["conditions"]["machine"] == rates["device"]
    assert rates["runtime_bytes"] == pytest.approx(known["runtime_bytes"], rel=0.02), "the tokenizer counts"
    shapes = ("rows", "columns", "precision", "rows_in", "threads", "packed_bytes")
    assert [[one[name] for name in shapes] for one in rates["matrices"]] == [
        [one[name] for name in shapes] for one in known["matrices"]
    ]
    again = answered("plan", "copy", "--prompt-tokens", 16, "--memory", walk.budget_bytes, "-o", "again.json")
    assert again["graph_digest"] == walk.plan["graph_digest"]


def test_threads_are_those_that_were_measured_before_unless_named(walk: Walk, here: Path):
    shutil.copytree("in/calibration", "copy")
    assert {one["threads"] for one in answered("profile", "--decoder", "copy", "-q")["matrices"]} == {1, 2}
    again = answered("profile", "--decoder", "copy", "--threads", "1", "-q")
    assert {one["threads"] for one in again["matrices"]} == {1}


def test_a_plan_from_before_measuring_again_is_not_exported(walk: Walk, here: Path, edgeflex: Command):
    shutil.copytree("in/calibration", "copy")
    answered("profile", "--decoder", "copy", "-q")
    line = ("export", "in/plan.json", "-m", "in/model", "--calibration", "copy", "--no-stock", "-q", "-o", "out")
    refused(edgeflex, line, 2, "plan again")


def test_a_copy_without_its_tokenizer_or_with_a_damaged_one_is_refused_at_once(
    walk: Walk, here: Path, edgeflex: Command
):
    shutil.copytree("in/calibration", "copy")
    rates = Path("copy/rates.json").read_bytes()
    Path("copy/tokenizer.json").write_text("{}")
    refused(edgeflex, ("profile", "--decoder", "copy", "-q"), 2, "tokenizer.json", "calibrate again")
    Path("copy/tokenizer.json").unlink()
    refused(edgeflex, ("profile", "--decoder", "copy", "-q"), 2, "not finished")
    assert Path("copy/rates.json").read_bytes() == rates


def test_rates_of_another_computer_are_not_replaced_by_a_calibration_that_goes_on(
    walk: Walk, here: Path, edgeflex: Command
):
    shutil.copytree("in/calibration", "copy")
    rates = json.loads(Path("copy/rates.json").read_text())
    Path("copy/rates.json").write_text(json.dumps({**rates, "device": "Cortex-A76"}))
    line = (*CALIBRATE, "-o", "copy")
    answered(*line, "--threads", 2)  # what is asked for was measured there
    refused(edgeflex, (*line, "--threads", 3), 2, "Cortex-A76", "--decoder copy --threads 1,3")
    assert json.loads(Path("copy/rates.json").read_text())["device"] == "Cortex-A76"


def test_plans_count_weights_as_the_measured_computers_kernels_hold_them(walk: Walk, here: Path):
    shutil.copytree("in/calibration", "copy")
    rates = json.loads(Path("copy/rates.json").read_text())
    for one in rates["matrices"]:
        one["packed_bytes"] *= 8
    Path("copy/rates.json").write_text(json.dumps(rates))
    larger = answered("plan", "copy", "--prompt-tokens", 16, "-o", "larger.json")
    assert larger["cache_bytes"] > 4 * walk.resident["cache_bytes"]
    said, before = (one["predicted"]["memory"]["dense_bytes"] for one in (larger, walk.resident))
    assert said > 4 * before
    # export plans again, from the same sizes
    answered("export", "larger.json", "-m", "in/model", "--calibration", "copy", "--no-stock", "-q", "-o", "bundle")


# --- traces --------------------------------------------------------------------------------------------------


def test_the_recorded_trace_can_be_simulated(walk: Walk, here: Path, edgeflex: Command):
    line = ("trace", "simulate", "in/calibration/trace.csv", "--cache", "64KiB,96KiB")
    points = answered(*line, "--policy", "enu,lru")["results"]
    assert {(one["policy"], one["cache_bytes"]) for one in points} == {
        (policy, size * KIB) for policy in ("enu", "lru") for size in (64, 96)
    }
    for one in points:
        assert 0 < one["hit_rate"] <= one["belady_hit_rate"] < 1
        assert one["hits"] + one["misses"] == points[0]["hits"] + points[0]["misses"]
    misses = {(one["policy"], one["cache_bytes"]): one["misses"] for one in points}
    assert all(misses[policy, 96 * KIB] < misses[policy, 64 * KIB] for policy in ("enu", "lru"))
    plain = edgeflex(*line)
    assert plain.code == 0
    assert "behind Belady" in plain.out


# --- what is refused -----------------------------------------------------------------------------------------

RUN = ("run", "in/bundle")
EXPORT = ("export", "in/plan.json", "--calibration", "in/calibration", "-o", "out")
BAD_LINES: list[tuple[str, tuple[object, ...], tuple[str, ...]]] = [
    ("no prompt", RUN, ("none was given", "--prompt")),
    ("empty prompt", (*RUN, "--prompt", ""), ("the prompt: it is empty",)),
    ("two prompts", (*RUN, "--prompt", "a", "-i"), ("several were given",)),
    ("long prompt", (*RUN, "--prompt", "dictionary " * 199), (f"the context holds {CONTEXT}", "shorten it")),
    ("prompt of bytes", (*RUN, "--prompt", "a\udcff"), ("--prompt: character 1 is not UTF-8",)),
    ("missing prompt file", (*RUN, "--prompt-file", "none.txt"), ("none.txt", "does not exist")),
    ("prompt file of bytes", (*RUN, "--prompt-file", "in/bytes.txt"), ("in/bytes.txt: byte 3 is not UTF-8",)),
    ("unknown policy", (*RUN, "-p", "a", "--policy", "fifo"), ("'fifo'", "enu, lru")),
    ("tiny cache", (*RUN, "-p", "a", "--cache", "1KiB"), ("1024 bytes", "largest expert")),
    ("cache in words", (*RUN, "-p", "a", "--cache", "much"), ("'much'",)),
    ("no temperature", (*RUN, "-p", "a", "--temperature", "-1"), ("--temperature",)),
    ("share above one", (*RUN, "-p", "a", "--top-p", "1.5"), ("top-p 1.5", "at most 1")),
    ("empty stop", (*RUN, "-p", "a", "--stop", ""), ("a stop string is empty",)),
    ("images", (*RUN, "--data", "in/images"), ("--data", "--prompt")),
    ("no bundle", ("run", "nowhere", "-p", "a"), ("'nowhere' is not a folder",)),
    ("time per frame", ("plan", "in/calibration", "--latency", "60ms/frame"), ("'frame'", "60ms/token")),
    ("two times", ("plan", "in/calibration", "--latency", "6ms", "--latency", "7ms"), ("2 limits",)),
    ("statistic of a time", ("plan", "in/calibration", "--latency", "60ms:p95"), ("'60ms:p95'", "mean", "60ms/token")),
    ("option of images", ("plan", "in/calibration", "--max-drop", "1%"), ("--max-drop", "--max-kl")),
    ("certainty of a drop", ("plan", "in/calibration", "--confidence", "90%"), ("--confidence", "not for decoders")),
    ("decoder as its calibration", ("plan", "in/model"), ("'in/model'", "not its calibration", "--dry-run in/model")),
    ("unknown target", (*EXPORT, "-m", "in/model", "--target", "tflite"), ("'tflite'", "executorch, onnx, tensorrt")),
    (
        "model and calibration of images",
        ("export", "in/plan.json", "-m", "in/images", "--calibration", "in/images", "-o", "out"),
        ("plan of a decoder: 2 faults", "--model 'in/images'", "config.json", "--calibration 'in/images'"),
    ),
    ("long context", ("plan", "in/calibration", "--context", 129), ("--context", f"the {CONTEXT} that")),
    ("long prompt planned", ("plan", "in/calibration", "--prompt-tokens", 500), ("500 do not fit",)),
    ("calibration and folder", ("plan", "in/calibration", "--dry-run", "in/model"), ("two sources",)),
    ("unknown family", ("inspect", "in/unknown"), ("'bert'", "olmoe", "qwen2_moe")),
    ("broken configuration", ("inspect", "in/broken"), ("config.json", "not valid JSON")),
    ("cut weights", ("inspect", "in/cut"), ("model.safetensors", "truncated")),
    ("no weights", ("inspect", "in/bare"), ("in/bare", "model.safetensors")),
    ("weights of a decoder", ("inspect", "in/model", "--weights", "a.pt"), ("--weights", "decoder")),
    ("no text", ("calibrate", "-m", "in/model"), ("--text",)),
    ("images for a decoder", ("calibrate", "-m", "in/model", "--data", "in/images"), ("--text", "--data")),
    ("text for images", ("calibrate", "-m", "in/images", "--text", "in/text.txt"), ("--data", "no --text")),
    ("short text", ("calibrate", "-m", "in/model", "--text", "in/short.txt"), ("in/short.txt", "too few")),
    ("text of bytes", ("calibrate", "-m", "in/model", "--text", "in/bytes.txt"), ("byte 3 is not UTF-8",)),
    ("numbers that are none", ("calibrate", "-m", "in/noise", "--text", "in/text.txt"), ("NaN", "in/noise")),
    ("profile of no calibration", ("profile", "--decoder", "in/model"), ("'in/model'", "no calibration of a decoder")),
    (
        "options of a profile",
        ("profile", "--decoder", "in/calibration", "--quick", "-o", "a.json"),
        ("--output and --quick", "Leave them out"),
    ),
    ("trace of another kind", ("trace", "simulate", "in/text.txt", "--cache", "1MiB"), ("in/text.txt", "column")),
    ("tiny cache for a trace", ("trace", "simulate", "in/calibration/trace.csv", "--cache", 9), ("8.00 KiB",)),
    (
        "unknown policy for a trace",
        ("trace", "simulate", "in/calibration/trace.csv", "--cache", "1MiB", "--policy", "fifo,lru,best"),
        ("'fifo'", "'best'", "enu, lru", "belady"),
    ),
]


@pytest.fixture(scope="module")
def faulty(walk: Walk) -> Path:
    """Put bad inputs beside what the walk left."""
    folder = walk.folder
    (folder / "bytes.txt").write_bytes(b"abc\xff")
    (folder / "short.txt").write_text("A few words.")
    (folder / "images").mkdir()
    for name in ("unknown", "broken", "cut", "noise"):
        shutil.copytree(folder / "model", folder / name)
    shutil.copytree(folder / "model", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "unknown" / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    (folder / "broken" / "config.json").write_text(json.dumps(config)[:-9])
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    header = 8 + int.from_bytes(weights[:8], "little")
    (folder / "noise" / "model.safetensors").write_bytes(weights[:header] + b"\xff" * (len(weights) - header))
    return folder


@pytest.mark.parametrize(("line", "parts"), [row[1:] for row in BAD_LINES], ids=[row[0] for row in BAD_LINES])
def test_bad_input_is_one_clear_line_and_exit_code_2(
    edgeflex: Command, faulty: Path, here: Path, line: tuple[object, ...], parts: tuple[str, ...]
):
    if line[0] == "calibrate" and "in/noise" in line:  # found while reading: what was claimed stays, to be resumed
        Path("calibration").mkdir()
    assert refused(edgeflex, line, 2, *parts)["error"] == "InputError"


def test_all_faults_of_a_budget_are_told_at_once(here: Path, edgeflex: Command):
    line = ("plan", "in/calibration", "--memory", "2 gigs", "--latency", "60ms/frame", "--max-kl", "much")
    document = refused(edgeflex, line, 2, "2 gigs", "frame", "much")
    assert document["message"].startswith("the budget: 3 faults")


def test_a_dry_run_reads_headers_only(walk: Walk, faulty: Path, here: Path, edgeflex: Command):
    """Numbers that are none do not hinder what never reads them."""
    sizes, whole = (answered("plan", "--dry-run", f"in/{name}", "--memory", "2MiB") for name in ("noise", "model"))
    assert sizes["uniform"] == whole["uniform"]
    plain = edgeflex("plan", "--dry-run", "in/noise", "--memory", "1KiB")
    assert plain.code == 3
    assert "DECLINE" in plain.out
    assert not Path("plan.json").exists()


def test_a_budget_that_holds_not_even_one_token_is_declined_with_reasons(walk: Walk, here: Path, edgeflex: Command):
    least = total_bytes(walk.plan) - walk.plan["cache_bytes"]
    line = ("plan", "in/calibration", "--prompt-tokens", 16, "--memory", least + walk.plan["cycle_bytes"] // 2)
    document = refused(edgeflex, line, 3, "declined", "memory")
    assert (document["error"], document["verdict"], document["binding"]) == ("DeclinedError", "decline", ["memory"])
    assert document["reason"]
    assert document["cycle_bytes"] == walk.plan["cycle_bytes"]
    needed = int(document["least"]["memory"])
    assert answered("plan", "in/calibration", "--prompt-tokens", 16, "--memory", needed)["verdict"] == "offload"
    refused(edgeflex, (*line[:-1], needed - 1), 3)


# --- plans that are not the calibration's ----------------------------------------------------------------

EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "verdict": lambda plan: "fits",
    "policy": lambda plan: "lfu",
    "cache_bytes": lambda plan: plan["cache_bytes"] * 2,
    "cycle_bytes": lambda plan: plan["cycle_bytes"] - 4096,
    "prefetch_depth": lambda plan: 3,
    "prefill_chunk_tokens": lambda plan: 128,
    "predicted": lambda plan: {**plan["predicted"], "kl": 0.0},
    "choices": lambda plan: [{**plan["choices"][0], "option": "fp32"}, *plan["choices"][1:]],
}


@pytest.mark.parametrize("field", EDITS)
def test_a_plan_changed_by_hand_is_refused(walk: Walk, here: Path, edgeflex: Command, field: str):
    Path("plan.json").write_text(json.dumps({**walk.plan, field: EDITS[field](walk.plan)}))
    line = ("export", "plan.json", "-m", "in/model", "--calibration", "in/calibration", "-o", "bundle", "-q")
    refused(edgeflex, line, 2, field, "edgeflex plan")


def test_another_decoder_than_the_calibrated_one_is_refused(here: Path, edgeflex: Command):
    write_decoder(Path("other"), seed=1)
    line = ("export", "in/plan.json", "-m", "other", "--calibration", "in/calibration", "-o", "bundle", "-q")
    refused(edgeflex, line, 2, "the plan is for decoder", "'other'")
    again = ("calibrate", "-m", "other", "--text", "in/text.txt", "--tokens", 256, "-q", "-o", "in/calibration")
    refused(edgeflex, again, 2, "another weights_digest", "--overwrite")


def test_a_mistyped_text_does_not_cost_the_calibration_that_was_to_be_replaced(
    walk: Walk, here: Path, edgeflex: Command
):
    shutil.copytree("in/calibration", "calibration")
    line = ("calibrate", "-m", "in/model", "--text", "none.txt", "--overwrite", "-q")
    refused(edgeflex, line, 2, "none.txt")
    assert Path("calibration/rates.json").read_bytes() == Path("in/calibration/rates.json").read_bytes()


@pytest.mark.parametrize("name", ["decoder-calibration.json", "rates.json", "check.npy"])
def test_an_unfinished_or_damaged_calibration_says_what_to_do(walk: Walk, here: Path, edgeflex: Command, name: str):
    shutil.copytree("in/calibration", "calibration")
    line = ("export", "in/plan.json", "-m", "in/model", "--calibration", "calibration", "--no-stock", "-q", "-o", "out")
    (Path("calibration") / name).write_bytes(b"\x93NUMPY")
    refused(edgeflex, line, 2, name)
    (Path("calibration") / name).unlink()
    missing = ("holds no rates", "--decoder") if name == "rates.json" else ("not finished", "edgeflex calibrate")
    refused(edgeflex, line, 2, *missing)


# --- damaged bundles ------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def flip_an_expert(bundle: Path) -> None:
    flip(bundle / "weights" / "layers.1" / "expert.3.ptd")


def lose_an_expert(bundle: Path) -> None:
    (bundle / "weights" / "layers.0" / "expert.0.ptd").unlink()


def flip_packed_weights(bundle: Path) -> None:
    for path in next(bundle.glob("packed-*")).glob("*.bin"):
        flip(path)


def cut_packed_weights(bundle: Path) -> None:
    path = next(bundle.glob("packed-*/layer-*.bin"))
    path.write_bytes(path.read_bytes()[:-4096])


def spoil_the_index(bundle: Path) -> None:
    next(bundle.glob("packed-*/index.json")).write_text("{}")


def spoil_the_tokenizer(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("{}")


def cut_the_manifest(bundle: Path) -> None:
    raw = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(raw[: len(raw) // 2])


def lose_the_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def come_from_the_future(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))


DAMAGES: dict[Callable[[Path], None], tuple[str, ...]] = {
    flip_an_expert: ("expert.3.ptd", "SHA-256"),
    lose_an_expert: ("expert.0.ptd",),
    flip_packed_weights: ("packed-", "made again"),
    cut_packed_weights: ("packed-", "made again"),
    spoil_the_index: ("index.json", "made again"),
    spoil_the_tokenizer: ("tokenizer.json",),
    cut_the_manifest: ("manifest.json", "not JSON"),
    lose_the_manifest: ("manifest.json",),
    come_from_the_future: ("manifest.json", "99"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_bundle_is_never_used(bundle: Path, edgeflex: Command, damage: Callable[[Path], None]):
    damage(bundle)
    document = refused(edgeflex, ("run", bundle, *SHORT, "-q"), 6, *DAMAGES[damage])
    assert document["error"] == "BundleError"
    assert document["message"].count("\n") == 0


# --- Ctrl-C ---------------------------------------------------------------------------------------------------


def interrupt(process: subprocess.Popen[str], begun: Callable[[], bool]) -> tuple[int, str, str]:
    """Press Ctrl-C once ``begun`` holds; return how the process ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not begun():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the command ended before it could be interrupted: {process.communicate()}")
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def check_interrupted(ended: tuple[int, str, str]) -> None:
    code, out, err = ended
    assert (code, out) == (130, ""), err
    assert err.splitlines()[-1].startswith("edgeflex: interrupted, nothing is half-written.")
    assert "Traceback" not in err


def halves(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial", ".former"))]


def test_an_interrupted_calibration_goes_on_and_finds_the_same(walk: Walk, here: Path, start: Start):
    key = Path("calibration/decoder-key.json")
    check_interrupted(interrupt(start([*CALIBRATE]), key.exists))
    assert not halves(here)
    assert not Path("calibration/rates.json").exists()
    answered(*CALIBRATE)
    for name in ("decoder-calibration.json", "trace.csv", "check.npy"):
        assert Path("calibration", name).read_bytes() == Path("in/calibration", name).read_bytes()
    measured = Path("calibration/rates.json").read_bytes()
    answered(*CALIBRATE)
    assert Path("calibration/rates.json").read_bytes() == measured, "what is finished is not measured again"
    answered(*CALIBRATE, "--threads", 2)
    rates = json.loads(Path("calibration/rates.json").read_text())
    assert {one["threads"] for one in rates["matrices"]} == {1, 2}, "more threads are measured when they are asked for"
    Path("calibration/rates.json").write_text(json.dumps(rates | {"of_another_release": 1.0}))
    answered(*CALIBRATE)
    assert "of_another_release" not in Path("calibration/rates.json").read_text(), "what another release wrote is not"


def test_a_calibration_that_dies_at_each_file_in_turn_gets_there(
    walk: Walk, here: Path, edgeflex: Command, monkeypatch: pytest.MonkeyPatch
):
    written = os.fsync
    left = 0

    def write(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        written(descriptor)

    monkeypatch.setattr(os, "fsync", write)
    for number in range(40):  # what is saved between two layers is more than one file
        left = number
        done = edgeflex(*CALIBRATE)
        assert not halves(here)
        if Path("calibration/decoder-calibration.json").exists():
            break
        assert (done.code, done.out) == (130, "")
    found = Path("calibration/decoder-calibration.json").read_bytes()
    assert found == Path("in/calibration/decoder-calibration.json").read_bytes()


def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(walk: Walk, here: Path, start: Start):
    line = ["export", "in/plan.json", "-m", "in/model", "--calibration", "in/calibration", "--no-stock", "-q"]
    check_interrupted(interrupt(start(line), lambda: any(here.glob(".bundle.*.partial"))))
    assert [path.name for path in here.iterdir()] == ["in"]
    assert answered(*line)["files"] == walk.manifest["files"]


def test_a_talk_ends_with_ctrl_c(walk: Walk, here: Path, start: Start):
    process = start(["run", "in/bundle", "-i", "--max-tokens", 5, "-q"], stdin=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("A dictionary\n")
    process.stdin.flush()
    assert process.stdout.read(1), "it answers before the next line comes"
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 130
    assert err.startswith("edgeflex: interrupted")
