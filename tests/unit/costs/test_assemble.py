"""Which mixes are measured, and what a folder of measurements becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeflex.costs.assemble import assemble, mix_of, random_mix, uniform_mixes
from edgeflex.costs.latency import LatencyModel, predicted_segments_s
from edgeflex.costs.store import Calibration, CalibrationMeta, MixRecord, mix_digest, save_array
from edgeflex.costs.table import disk_bytes, layer_options, stored_bytes
from edgeflex.errors import InputError
from edgeflex.plans import footprint, solve
from edgeflex.plans.choose import shipping_table
from edgeflex.schema import Budget, Choice, Conditions, Layer, Precision, Tier
from tests.small_graphs import (
    CAPABILITIES,
    CHANNEL,
    DYNAMIC,
    FP32,
    GROUP,
    RATES,
    STATIC,
    changed,
    conv,
    device,
    graph,
    kernels,
    probabilities,
)

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = graph()
OPTIONS = layer_options(GRAPH, CAPABILITIES)
DEVICE = device(*kernels(GRAPH))
COUNT = 200
ROUGHNESS = {FP32: 0.0, STATIC: 0.1, DYNAMIC: 0.1, CHANNEL: 0.4, GROUP: 0.3}


def layer_s(layer: Layer, precision: Precision) -> float:
    return 2e-6 + layer.shape.macs * RATES[precision]


def truth() -> LatencyModel:
    """Return what a program of the small graph takes on the device: kernels, 1.2 times over, and conversions."""
    times = {(layer.name, one): layer_s(layer, one) for layer in GRAPH.layers for one in OPTIONS[layer.name]}
    return LatencyModel(times, (4e-6, 4e-6, 4e-6), dict.fromkeys(RATES, 1.2), 3e-10, 0.0)


def measure(
    folder: Calibration,
    mix: dict[str, Precision],
    overhead_bytes: int = 3000,
    role: str = "seed",
    speed: float = 1.0,
    conditions: Conditions | None = None,
) -> None:
    """Write what running ``mix`` would have shown: accuracy falls with rough layers, bytes add up."""
    full = {layer.name: mix.get(layer.name, FP32) for layer in GRAPH.layers}
    amount = sum(ROUGHNESS[one] for one in full.values()) / 4
    stored = sum(stored_bytes(layer, full[layer.name]) for layer in GRAPH.layers)
    entries = sum(disk_bytes(layer, full[layer.name]) for layer in GRAPH.layers)
    record = MixRecord(
        precisions=full,
        segment_s=tuple(speed * seconds for seconds in predicted_segments_s(truth(), GRAPH, full)),
        program_bytes=entries + overhead_bytes,
        memory_bytes=round(1.1 * stored) + 40_000,
        role=role,
        conditions=conditions,
    )
    _, base = probabilities(2 * COUNT, 0)
    found = changed(base, 1, amount) if amount else base
    folder.write_mix(record, found[:COUNT], found[COUNT:])


def calibrated(folder: Path, mixes: list[dict[str, Precision]]) -> Calibration:
    meta = CalibrationMeta(
        weights_digest="a", images_digest="b", seed=0, shares={"choose": 0.5, "certify": 0.5}, backend="executorch"
    )
    opened = Calibration.create(folder, meta)
    labels, base = probabilities(2 * COUNT, 0)
    for part, indices in (("choose", np.arange(COUNT)), ("certify", np.arange(COUNT, 2 * COUNT))):
        save_array(folder / f"{part}.npy", indices)
    save_array(folder / "labels.npy", labels)
    save_array(folder / "sensitivity" / "baseline.npy", base[:100])
    for number, (layer, precisions) in enumerate(OPTIONS.items()):
        for one in precisions[1:]:
            disturbed = changed(base[:100], number, ROUGHNESS[one] / 2)
            save_array(opened.sensitivity_path(layer, one), disturbed)
    for mix in mixes:
        measure(opened, mix)
    return opened


def standard_mixes() -> list[dict[str, Precision]]:
    uniform = [mix for _, mix in uniform_mixes(GRAPH, OPTIONS)]
    return [*uniform, *(random_mix(GRAPH, OPTIONS, seed) for seed in range(8))]


# --- which mixes -----------------------------------------------------------------------------------------


def test_there_is_a_uniform_mix_for_every_form_of_the_linear_layers():
    mixes = dict(uniform_mixes(GRAPH, OPTIONS))
    assert list(mixes) == ["fp32", "int8-static", "int8-dynamic", "int4-channel", "int4-group32"]
    assert set(mixes["fp32"].values()) == {FP32}
    assert set(mixes["int8-static"].values()) == {STATIC}
    assert mixes["int4-group32"] == {
        "stem": STATIC,
        "exit0.linear": STATIC,  # 16 inputs make no group
        "body": STATIC,
        "exit1.linear": GROUP,
        "wide": GROUP,
        "last": GROUP,
    }


def test_where_linear_layers_hold_next_to_nothing_only_static_int8_is_tried():
    layers = tuple(
        layer.model_copy(update={"shape": conv(256, 256, 8)}) if layer.name == "body" else layer
        for layer in GRAPH.layers
    )
    heavy = GRAPH.model_copy(update={"layers": layers})
    assert [name for name, _ in uniform_mixes(heavy, OPTIONS)] == ["fp32", "int8-static"]


def test_every_uniform_and_random_mix_is_one_that_the_backend_runs():
    mixes = [mix for _, mix in uniform_mixes(GRAPH, OPTIONS)] + [random_mix(GRAPH, OPTIONS, n) for n in range(20)]
    for mix in mixes:
        assert list(mix) == [layer.name for layer in GRAPH.layers]
        assert all(precision in OPTIONS[name] for name, precision in mix.items())


def test_a_random_mix_follows_from_its_seed_and_takes_every_option_in_time():
    assert random_mix(GRAPH, OPTIONS, 3) == random_mix(GRAPH, OPTIONS, 3)
    drawn = [random_mix(GRAPH, OPTIONS, seed) for seed in range(60)]
    for name, row in OPTIONS.items():
        assert {mix[name] for mix in drawn} == set(row)


def test_choices_and_mixes_say_the_same():
    mix = random_mix(GRAPH, OPTIONS, 0)
    assert mix_of([Choice(subject=name, option=one.value) for name, one in mix.items()]) == mix


# --- what they become --------------------------------------------------------------------------------------


def test_every_measured_mix_becomes_a_candidate_with_its_own_drops(tmp_path: Path):
    opened = calibrated(tmp_path, standard_mixes())
    table, candidates = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    assert {one.mix for one in candidates.candidates} == {mix.digest for mix in opened.mixes()}
    assert candidates.table_digest == table.digest()
    labels, base = probabilities(2 * COUNT, 0)
    right = base[:COUNT].argmax(2) == labels[:COUNT, None]
    assert candidates.reference_accuracy == pytest.approx(right[:, -1].mean())
    for one in candidates.candidates:
        assert mix_digest(mix_of(one.choices)) == one.mix
        assert one.accuracy == pytest.approx((opened.mix(one.mix).choose[:, -1].argmax(1) == labels[:COUNT]).mean())
        for scenario in one.scenarios:
            assert scenario.reach[0] == 1.0
            assert len(scenario.thresholds) == 3
            assert -1.0 <= scenario.loss <= 1.0


def test_predictions_of_measured_mixes_are_what_was_measured(tmp_path: Path):
    opened = calibrated(tmp_path, standard_mixes())
    table, candidates = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    for one in candidates.candidates:
        record = opened.mix(one.mix).record
        counted = footprint(shipping_table(table, one), 0, one.choices)
        assert counted.block_latency_s == pytest.approx(record.segment_s, rel=0.05)
        assert counted.memory_bytes[Tier.HOST] == pytest.approx(record.memory_bytes, rel=0.02)
        assert counted.disk_bytes >= record.program_bytes


def test_the_promise_on_disk_covers_the_largest_overhead_that_was_seen(tmp_path: Path):
    opened = calibrated(tmp_path, [{}])
    measure(opened, random_mix(GRAPH, OPTIONS, 1), overhead_bytes=70_001)
    table, _ = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    assert table.fixed_disk_bytes >= 70_001
    assert table.fixed_disk_bytes % 4096 == 0


def test_on_another_device_the_times_of_this_one_play_no_part(tmp_path: Path):
    opened = calibrated(tmp_path, standard_mixes())
    table, candidates = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=False)
    assert table.fixed_latency_s == (5e-6,) * 3  # the device's own cost of a call
    fp32 = next(one for one in candidates.candidates if one.mix == mix_digest({}))
    counted = footprint(shipping_table(table, fp32), 0, fp32.choices)
    layers = [layer_s(layer, FP32) for layer in GRAPH.layers if layer.segment == 2]
    assert counted.block_latency_s[2] == pytest.approx(5e-6 + sum(layers))


def test_a_device_without_figures_is_refused_by_name(tmp_path: Path):
    opened = calibrated(tmp_path, [{}])
    with pytest.raises(InputError, match="bench-board"):
        assemble(opened, GRAPH, device(), CAPABILITIES, threads=1, here=False)


def test_the_table_can_be_planned_with_and_says_what_it_came_from(tmp_path: Path):
    opened = calibrated(tmp_path, standard_mixes())
    table, _ = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    assert solve(table, Budget(max_drop=0.1)).proof.status == "optimal"
    assert table.calibration_digest == opened.digest()
    assert (table.graph_digest, table.device_digest) == (GRAPH.digest(), DEVICE.digest())


def test_the_same_folder_gives_the_same_table(tmp_path: Path):
    opened = calibrated(tmp_path, standard_mixes())
    first = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    again = assemble(Calibration.open(tmp_path), GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    assert [one.digest() for one in first] == [one.digest() for one in again]


def test_the_table_that_asks_for_mixes_does_not_depend_on_those_it_asked_for(tmp_path: Path):
    opened = calibrated(tmp_path, standard_mixes())

    def asking(*, seeds_only: bool = True) -> str:
        table, _ = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True, seeds_only=seeds_only)
        return table.model_copy(update={"calibration_digest": ""}).digest()

    before = asking()
    for seed in range(20, 23):
        measure(opened, random_mix(GRAPH, OPTIONS, seed), role="candidate", speed=1.5)
    assert asking() == before
    assert asking(seeds_only=False) != before


def test_a_table_carries_the_median_speed_of_the_machine_that_ran_its_mixes_and_of_no_other(tmp_path: Path):
    opened = calibrated(tmp_path, [])
    for mix, arithmetic_s, rate in zip(standard_mixes(), [4e-4] * 6 + [1e-3] * 7, [9e9] * 8 + [5e9] * 5, strict=True):
        measure(opened, mix, conditions=Conditions(arithmetic_s=arithmetic_s, memory_bytes_per_s=rate))
    here, _ = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    assert here.conditions == Conditions(arithmetic_s=1e-3, memory_bytes_per_s=9e9)
    elsewhere, _ = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=False)
    assert elsewhere.conditions is None


def test_a_table_some_of_whose_mixes_ran_at_unknown_speed_says_nothing_of_it(tmp_path: Path):
    opened = calibrated(tmp_path, standard_mixes()[:-1])
    measure(opened, standard_mixes()[-1], conditions=Conditions(arithmetic_s=1e-3, memory_bytes_per_s=9e9))
    table, _ = assemble(opened, GRAPH, DEVICE, CAPABILITIES, threads=1, here=True)
    assert table.conditions is None
    assert "conditions" not in table.canonical_json()
