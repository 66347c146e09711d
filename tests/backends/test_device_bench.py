"""A benchmark on a device, the processor standing in for it: what is recorded, judged and drawn."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.cli import app
from edgeflex.errors import DeviceError, InputError
from edgeflex.reports.decoder import build_decoder_report, outcome, to_decoder_html
from edgeflex.runtimes.cuda_memory import device_bytes
from edgeflex.runtimes.cuda_streams import HostStreams
from edgeflex.runtimes.cuda_weights import open_experts
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_bench import bench_decoder, verify_decoder
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.device_record import record_of
from edgeflex.schema_moe import DecoderBench, DecoderBudget, Expected
from edgeflex.terminal_moe import device_record_text
from tests.tiny_decoder import write_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.schema_gpu import DeviceRecord

PROMPTS = [[7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30], [5, 6, 7]]
NEW = 14


pytestmark = pytest.mark.usefixtures("one_thread")  # of tests/conftest.py


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    budget = DecoderBudget(memory_bytes=2 << 30, token_s=1.0, prompt_tokens=len(PROMPTS[0]))
    return write_tiny_bundle(tmp_path_factory.mktemp("device") / "bundle", budget=budget)


def sizes_of(folder: Path) -> tuple[int, int, int]:
    """Return the bytes of the device beside experts, of the largest expert, and of all."""
    manifest = open_decoder_bundle(folder).manifest
    store, kinds = open_experts(folder, manifest)
    plan = manifest.plan
    sizes = {"context_tokens": plan.context_tokens, "chunk_tokens": plan.prefill_chunk_tokens}
    fixed = device_bytes(manifest, kinds, torch.float32, library_bytes=0, **sizes).total
    return fixed, int(store.sizes.max()), int(store.sizes.sum())


def settings(folder: Path, **more: Any) -> Settings:
    fixed, one, total = sizes_of(folder)
    values: dict[str, Any] = {"device": "cpu-torch", "cache_bytes": total // 2, "vram_bytes": fixed + 3 * one}
    return Settings(**{**values, **more})


@pytest.fixture(scope="module")
def bench(bundle) -> DecoderBench:
    return bench_decoder(bundle, PROMPTS, max_tokens=NEW, repeats=2, settings=settings(bundle), device="a desk")


@pytest.fixture(scope="module")
def record(bench: DecoderBench) -> DeviceRecord:
    assert bench.device is not None
    return bench.device


def test_every_repeat_is_in_the_record(bundle, bench, record):
    fixed, one, _ = sizes_of(bundle)
    assert record.tokens == sum(len(run.times) for run in bench.runs) == 2 * 2 * (NEW - 1)
    assert (record.vram_bytes, record.planned_bytes) == (3 * one, fixed + 3 * one)
    assert record.requested_bytes == fixed + 3 * one
    assert (record.rule, record.policy) == ("auto", "reuse")
    assert record.lookups == sum(run.cache.decode_hits + run.cache.decode_misses for run in bench.runs)
    assert 0 < record.gpu_hits < record.lookups
    assert {run.device for run in bench.runs} == {f"{HostStreams.name}, with a desk"}


def test_no_more_experts_were_on_the_device_than_it_has_room_for(bench):
    for run in bench.runs:
        assert run.decode_events >= 3 * (NEW - 1)
        held = sum(map(sum, run.expert_residency)) / run.decode_events
        assert 0 < held <= 3 * 2, "three of the largest, or of those half as large"


def test_events_are_there_as_predicted_and_as_measured(record):
    decoded = [one for one in record.sample if one.decoding]
    assert decoded
    assert len(record.sample) < len(decoded) + record.sampled
    assert all(one.predicted_s > 0 < one.actual_s for one in record.sample)
    assert all(max(one.actual_busy_s) <= one.actual_s * (1 + 1e-6) + 1e-9 for one in record.sample)
    assert record.errors["event"].samples == len(decoded)
    assert {"gpu", "cpu", "link", "disk"} & set(record.errors)


def test_the_shares_of_the_watched_time_make_sense(record):
    assert record.passes > 0
    assert 0 < record.event_s <= record.pass_s
    for name in ("gpu", "cpu", "disk"):
        assert record.busy_s[name] + record.waited_s[name] == pytest.approx(record.event_s, rel=0.02)
    assert 0 <= record.exposed_s <= record.busy_s["link"] + 1e-9
    assert record.hidden_share is None or 0 <= record.hidden_share <= 1


def test_the_bound_lies_below_what_was_measured(record):
    assert record.bound_share is not None
    assert 0 < record.bound_share < 1


def test_a_plan_for_the_processor_is_not_judged_by_a_stand_in(bench):
    checks = {check.name: check for check in bench.checks}
    for name in ("time per token", "time per token budget", "memory", "memory budget", "hit rate"):
        assert not checks[name].was_measured
        assert "stood in" in checks[name].note
    assert checks["expert cache"].ok
    assert not checks["vram"].was_measured
    assert checks["vram budget"].limit == checks["vram"].promised


class Counted(HostStreams):
    """A device whose memory somebody counts."""

    def __init__(self, peak: int) -> None:
        super().__init__()
        self._peak = peak

    def peak_bytes(self) -> int:  # type: ignore[override]
        return self._peak


def test_the_most_that_a_device_held_is_recorded(bundle):
    chosen = settings(bundle, record=True, device_parts={"streams": Counted(12345)})
    with DecoderSession.from_bundle(bundle, chosen) as session:
        list(session.generate(PROMPTS[0], NEW))
        found = record_of(session, [session.stats()])
    assert found.peak_bytes == 12345
    assert found.tokens == NEW - 1


def test_measuring_at_the_start_finds_the_disk_too(bundle):
    with DecoderSession.from_bundle(bundle, settings(bundle)) as session:
        list(session.generate(PROMPTS[0], NEW))
        done = session.device_stats()
    assert 1e5 < done.curves.disk_bytes_per_s < 1e12
    assert done.curves.cpu_beside_link >= 1 <= done.curves.link_beside_cpu
    assert done.errors["disk"].samples > 0


def test_a_record_needs_a_device_and_recorded_events(bundle):
    with DecoderSession.from_bundle(bundle) as session:
        list(session.generate(PROMPTS[0], 2))
        with pytest.raises(DeviceError, match="on the processor"):
            record_of(session, [session.stats()])


def test_the_page_draws_events_and_waiting(bundle, bench):
    report = build_decoder_report(open_decoder_bundle(bundle).manifest, bench, None)
    html = to_decoder_html(report)
    assert "Predicted against measured" in html
    assert 'class="dots event"' in html
    assert html.count("wait-work") > 4
    assert "copies in the processor&#39;s memory are not shown" in html
    assert "promised on the processor" in outcome(report)[1]
    assert "copies to the GPU" in device_record_text(bench.device)


def test_verify_answers_on_the_device(bundle, tmp_path):
    with DecoderSession.from_bundle(bundle) as session:
        said = tuple(session.generate(PROMPTS[0], NEW))
    own = tmp_path / "own"
    shutil.copytree(bundle, own)
    changes = {"expected": (Expected(prompt=tuple(PROMPTS[0]), tokens=said),)}
    manifest = open_decoder_bundle(own).manifest.model_copy(update=changes)
    (own / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")))
    checks = {check.name: check for check in verify_decoder(own, settings=settings(own))}
    assert checks["greedy agreement"].ok
    assert checks["expert cache"].ok
    assert {"memory", "vram"}.isdisjoint(checks)


# --- the command line -----------------------------------------------------------------------------------


def ran(*words: str) -> Any:
    return CliRunner().invoke(app, [*words])


def test_reading_early_is_refused_beside_a_device(bundle):
    for device in ("cpu-torch", "cuda"):
        told = ran("run", str(bundle), "-p", "a", "--device", device, "--prefetch", "1")
        assert isinstance(told.exception, InputError)
        assert "--prefetch" in str(told.exception)
    with pytest.raises(InputError, match="--prefetch"):
        DecoderSession.from_bundle(bundle, Settings(device="cpu-torch", prefetch_depth=0))


@pytest.mark.parametrize("command", ["bench", "verify", "run"])
def test_a_place_without_a_gpu_has_none_of_its_memory(bundle, tmp_path, command):
    text = tmp_path / "text.txt"
    text.write_text("abc " * 50)
    more = {"bench": ["--text", str(text)], "verify": [], "run": ["-p", "a"]}[command]
    told = ran(command, str(bundle), *more, "--vram", "1GiB", "-o", str(tmp_path / "out.json"))
    assert isinstance(told.exception, InputError)
    assert "--device cuda" in str(told.exception)


def test_without_a_gpu_cuda_is_refused_by_every_command(bundle, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    told = ran("verify", str(bundle), "--device", "cuda", "-o", str(tmp_path / "out.json"))
    assert isinstance(told.exception, DeviceError)
    assert "no CUDA device" in str(told.exception)
    assert not (tmp_path / "out.json").exists()


def test_the_record_is_in_the_file(bench, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(bench.canonical_json())
    assert DecoderBench.parse(path.read_bytes(), "bench.json") == bench
    assert json.loads(path.read_text())["device"]["name"] == HostStreams.name
