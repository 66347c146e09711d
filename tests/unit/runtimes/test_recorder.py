from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeflex.errors import InputError
from edgeflex.images import open_images
from edgeflex.runtimes import exits_for
from edgeflex.runtimes.recorder import MemoryReading, Recorder, memory_now, reset_peak, run_images
from edgeflex.runtimes.reference import ReferenceSession
from edgeflex.schema import Conditions, RunStats
from tests.toy_bundle import (
    reference_probabilities,
    toy_inputs,
    toy_segments,
    write_images,
    write_toy_bundle,
)

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def test_every_sample_is_kept_with_the_time_of_the_given_clock() -> None:
    ticks = itertools.count()
    inputs = toy_inputs(3)
    readings = iter([MemoryReading(100, 50, 80, None), MemoryReading(175, 60, 90, None)])
    session = ReferenceSession(toy_segments())
    recorder = Recorder(session, (None, None, None), clock=lambda: float(next(ticks)), memory=lambda: next(readings))
    with session:
        for index in range(3):
            recorder.infer(f"image{index}", inputs[index : index + 1], label=index)
        stats = recorder.stats(
            manifest_digest="d", runtime="reference", device="here", threads=1, before=Conditions(load_average=0.5)
        )
    expected = reference_probabilities(inputs)[:, 2]
    assert [r.latency_s for r in stats.requests] == [1.0, 1.0, 1.0]
    assert [r.prediction for r in stats.requests] == expected.argmax(1).tolist()
    assert [r.confidence for r in stats.requests] == pytest.approx(expected.max(1).tolist())
    assert [(r.input, r.exit, r.label) for r in stats.requests] == [(f"image{i}", 2, i) for i in range(3)]
    assert (stats.peak_memory_bytes, stats.runtime_memory_bytes) == (75, 50)
    assert stats.before.load_average == 0.5
    assert RunStats.parse(stats.canonical_json(), "stats.json") == stats


def test_running_a_folder_records_every_image_in_order(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "blue").rename(tmp_path / "images" / "azure")  # unknown to the network
    images = open_images(tmp_path / "images")
    bundle = write_toy_bundle(tmp_path / "bundle")
    # what the first session of a process pays or gives back once (thread pool, kernel tables) is not the model's
    run_images(bundle, images, limit=1)
    states = iter([Conditions(load_average=1.0), Conditions(load_average=2.0)])
    stats = run_images(bundle, images, limit=7, device="toy", conditions=lambda: next(states))
    preprocessing = bundle.manifest.graph.preprocessing
    assert preprocessing is not None
    p = reference_probabilities(images.load(range(7), preprocessing))
    exits = exits_for(p, bundle.manifest.plan.thresholds)
    assert [request.input for request in stats.requests] == [item.path for item in images.items[:7]]
    assert [request.exit for request in stats.requests] == exits.tolist()
    assert [request.prediction for request in stats.requests] == p[np.arange(7), exits].argmax(1).tolist()
    assert [request.label for request in stats.requests] == [None] * 3 + [1] * 3 + [2]
    assert stats.manifest_digest == bundle.manifest.digest()
    assert (stats.before.load_average, stats.after.load_average) == (1.0, 2.0)
    assert 20_000 < stats.peak_memory_bytes < stats.runtime_memory_bytes
    assert stats.load_s > 0.0
    with pytest.raises(InputError, match="at most 0 images"):
        run_images(bundle, images, limit=0)


def test_the_memory_reading_sees_what_is_held_and_what_was_freed() -> None:
    base = memory_now()
    block = np.ones(8 * MIB, dtype=np.uint8)
    held = memory_now().above(base)
    assert held == pytest.approx(block.nbytes, rel=0.02)
    del block
    assert memory_now().above(base) < MIB


def test_bytes_that_were_given_back_do_not_count_below_zero() -> None:
    assert MemoryReading(10, 10, 10, None).above(MemoryReading(20, 20, 20, None)) == 0


def test_anonymous_bytes_stand_in_where_the_c_library_keeps_no_books() -> None:
    assert MemoryReading(None, 30, 99, None).above(MemoryReading(5, 10, 10, None)) == 20


def test_the_peak_can_be_started_anew() -> None:
    # Small blocks, so that the C library keeps what is freed instead of giving it back at once.
    blocks = [np.ones(64 * 1024, dtype=np.uint8) for _ in range(1024)]
    del blocks
    if not reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    reading = memory_now()
    assert reading.peak_resident_bytes is not None
    assert reading.peak_resident_bytes < reading.resident_bytes + 16 * MIB
