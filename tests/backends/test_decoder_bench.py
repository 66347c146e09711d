"""A decoder's bench and verify: what is promised is held against what fresh processes did, and no damage passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from edgeflex.errors import BundleError, InputError
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_bench import bench_decoder, verify_decoder
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.replay import replay
from edgeflex.schema import Conditions, Interval
from edgeflex.schema_moe import DecoderBudget, DecoderManifest, Expected
from tests.tiny_decoder import tiny_graph, tiny_plan, write_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.schema import Check
    from edgeflex.schema_moe import DecoderBench

PROMPT, SECOND = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30], [5, 6, 7]
NEW = 12


def predicted(**changes: Any) -> Any:
    """Return generous predictions, with changes."""
    known = tiny_plan(tiny_graph()).predicted
    memory = known.memory.model_copy(update={"runtime_bytes": 1 << 30})
    return known.model_copy(update={"memory": memory, **changes})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    budget = DecoderBudget(memory_bytes=2 << 30, token_s=1.0, first_token_s=20.0, prompt_tokens=len(PROMPT))
    folder = tmp_path_factory.mktemp("decoder") / "bundle"
    return write_tiny_bundle(folder, budget=budget, predicted=predicted())


@pytest.fixture(scope="module")
def bench(bundle) -> DecoderBench:
    ticks = iter(range(100))
    return bench_decoder(
        bundle,
        [PROMPT, SECOND],
        max_tokens=NEW,
        repeats=2,
        device="a desk",
        conditions=lambda: Conditions(load_average=float(next(ticks))),
    )


@pytest.fixture
def own(bundle, bench, tmp_path) -> Path:
    """Return a packed copy that a test may damage."""
    folder: Path = tmp_path / "own"
    shutil.copytree(bundle, folder)
    return folder


def change_manifest(folder: Path, **changes: Any) -> DecoderManifest:
    path = folder / "manifest.json"
    manifest = DecoderManifest.parse(path.read_text(), "manifest").model_copy(update=changes)
    path.write_text(json.dumps(manifest.model_dump(mode="json")))
    return manifest


def named(checks: tuple[Check, ...]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    return found


# --- bench ------------------------------------------------------------------------------------------------


def test_a_repeat_is_a_fresh_process_whose_later_prompts_meet_a_warm_cache(bundle, bench):
    runs = bench.runs
    assert [run.prompt_tokens for run in runs] == [11, 3, 11, 3]
    assert [run.cache for run in runs[:2]] == [run.cache for run in runs[2:]]
    assert [run.tokens for run in runs[:2]] == [run.tokens for run in runs[2:]]
    with DecoderSession.from_bundle(bundle) as session:
        for run, prompt in zip(runs, (PROMPT, SECOND), strict=False):
            assert list(session.generate(prompt, NEW)) == list(run.tokens)
            assert session.stats().cache == run.cache


def test_the_record_says_where_and_in_which_state_it_was_measured(bench):
    assert {run.device for run in bench.runs} == {"a desk"}
    assert [(run.before.load_average, run.after.load_average) for run in bench.runs] == [(0, 1), (0, 1), (2, 3), (2, 3)]


def test_every_promise_and_every_budget_is_checked(bench):
    checks = named(bench.checks)
    assert set(checks) == {
        "time per token",
        "time per token budget",
        "time to first token",
        "time to first token budget",
        "memory",
        "memory budget",
        "expert cache",
        "hit rate",
    }
    assert all(check.was_measured for check in bench.checks)
    assert all(checks[name].ok for name in checks if name.endswith("budget"))
    assert checks["expert cache"].ok
    assert checks["expert cache"].promised == 96 << 10


def test_time_per_token_is_the_median_of_the_repeats_means_once_a_prompt_warmed_the_cache(bench):
    means = []
    for repeat in (bench.runs[:2], bench.runs[2:]):
        times = [time.total_s for time in repeat[1].times]
        assert len(times) == NEW - 1
        means.append(sum(times) / len(times))
    check = named(bench.checks)["time per token"]
    assert check.measured == pytest.approx(sum(means) / 2)
    assert "from the second prompt on" in check.note


def test_the_hit_rate_is_the_simulators(bundle, bench):
    with DecoderSession.from_bundle(bundle, Settings(record=True)) as session:
        for prompt in (PROMPT, SECOND):
            list(session.generate(prompt, NEW))
        simulated = replay(session.trace(), 96 << 10, "enu", sizes=session.store.sizes)
    assert named(bench.checks)["hit rate"].measured == pytest.approx(simulated.hit_rate)
    repeat = bench.runs[2:]
    assert sum(run.decode_events for run in repeat) == simulated.occupancy.events == 2 * (NEW - 1) * 3
    pairs = zip(*(run.expert_residency for run in repeat), strict=True)
    resident = tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in pairs)
    assert resident == simulated.occupancy.resident


def test_memory_holds_the_runtime_and_the_bundle(bench):
    held = max(run.peak_memory_bytes + run.runtime_memory_bytes for run in bench.runs)
    assert named(bench.checks)["memory"].measured == held
    assert all(run.peak_memory_bytes >= run.cache.peak_bytes for run in bench.runs)
    assert all(len(run.held_bytes) == len(run.tokens) for run in bench.runs)
    assert all(max(run.held_bytes) <= run.peak_memory_bytes + run.runtime_memory_bytes for run in bench.runs)


def test_a_broken_promise_is_told_from_a_kept_budget(own):
    fast = Interval(value=1e-9, low=0.0, high=1.0)
    plan = tiny_plan(
        tiny_graph(),
        budget=DecoderBudget(memory_bytes=1, token_s=20.0, prompt_tokens=256),
        predicted=predicted(token_s=fast, hit_rate=1.0),
    )
    change_manifest(own, plan=plan)
    checks = named(bench_decoder(own, [PROMPT], max_tokens=4, repeats=1).checks)
    assert not checks["time per token"].ok
    assert checks["time per token budget"].ok
    assert checks["memory"].ok
    assert not checks["memory budget"].ok
    assert not checks["hit rate"].ok
    assert not checks["time to first token"].was_measured
    assert "for 256 prompt tokens" in checks["time to first token"].note


def test_other_settings_than_the_plans_judge_no_promise_but_every_limit(bundle, bench):
    checks = named(
        bench_decoder(bundle, [PROMPT], max_tokens=4, repeats=1, settings=Settings(cache_bytes=1 << 20)).checks
    )
    assert not checks["time per token"].was_measured
    assert not checks["hit rate"].was_measured
    assert "other settings" in checks["hit rate"].note
    assert checks["time per token budget"].ok
    assert checks["expert cache"].was_measured


def test_static_experts_reach_the_process(bundle, bench):
    static = iter([(1, 0), (2, 3)])
    found = bench_decoder(bundle, [SECOND], max_tokens=3, repeats=2, settings=Settings(policy="static", static=static))
    assert [run.cache.policy for run in found.runs] == ["static", "static"]
    assert found.runs[0].cache == found.runs[1].cache


def test_nothing_to_do_is_refused_all_at_once(bundle):
    with pytest.raises(InputError) as caught:
        bench_decoder(bundle, [], max_tokens=1, repeats=0)
    assert "3 faults" in str(caught.value)


def test_answers_that_are_given_are_what_is_decoded(bundle):
    given = [[9, 4, 9, 4], [77, 78, 79, 80]]
    found = bench_decoder(bundle, [PROMPT, SECOND], max_tokens=4, repeats=1, answers=given)
    assert [list(run.tokens) for run in found.runs] == given


def test_an_error_of_the_process_is_the_callers(bundle):
    with pytest.raises(InputError, match="token 5000 does not exist"):
        bench_decoder(bundle, [[5000]], max_tokens=4, repeats=1)


# --- verify -----------------------------------------------------------------------------------------------


def answers(folder: Path) -> tuple[Expected, ...]:
    with DecoderSession.from_bundle(folder) as session:
        return tuple(
            Expected(prompt=tuple(prompt), tokens=tuple(session.generate(prompt, NEW))) for prompt in (PROMPT, SECOND)
        )


def test_a_whole_bundle_is_verified(own):
    change_manifest(own, expected=answers(own))
    checks = named(verify_decoder(own))
    assert list(checks) == [
        "sound files",
        "packed store",
        "greedy agreement",
        "memory",
        "memory budget",
        "expert cache",
    ]
    assert all(check.ok for check in checks.values())
    assert checks["greedy agreement"].measured == 1.0
    assert "100.0 % of them stand before" in checks["greedy agreement"].note


def test_one_other_token_counts_as_one(own):
    first, second = answers(own)
    other = tuple((token + 1) % 96 if place == 3 else token for place, token in enumerate(first.tokens))
    change_manifest(own, expected=(first.model_copy(update={"tokens": other}), second))
    check = named(verify_decoder(own))["greedy agreement"]
    # what follows the forced other token may differ too, what stands before it does not
    assert check.measured < 1.0
    assert f"{(3 + NEW) / (2 * NEW) * 100:.1f} % of them" in check.note


def test_a_bundle_without_reference_answers_is_not_said_to_agree(own):
    check = named(verify_decoder(own))["greedy agreement"]
    assert not check.was_measured
    assert not check.ok


def test_a_changed_file_is_named_and_nothing_is_run(own):
    path = own / "weights" / "layers.1" / "expert.2.ptd"
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    checks = named(verify_decoder(own))
    files = checks.pop("sound files")
    assert not files.ok
    assert files.measured == files.promised - 1
    assert "weights/layers.1/expert.2.ptd" in files.note
    assert not any(check.was_measured or check.ok for check in checks.values())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_bundle_with_a_short_or_missing_file_is_not_opened(own, damage):
    path = own / "weights" / "layers.1" / "expert.2.ptd"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"layers\.1/expert\.2\.ptd"):
        verify_decoder(own)


def test_a_flipped_bit_in_the_packed_store_is_found(own):
    with DecoderSession.from_bundle(own) as session:
        record = session.store.experts[2, 5].record
    raw = bytearray(record.file.read_bytes())
    raw[record.offset + 100] ^= 4
    record.file.write_bytes(raw)
    check = named(verify_decoder(own))["packed store"]
    assert not check.ok
    assert record.name in check.note


def test_benching_imports_neither_torch_nor_executorch():
    code = (
        "import sys, edgeflex.runtimes.decoder_bench; print([n for n in ('torch', 'executorch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
