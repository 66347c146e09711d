from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import DeviceError, InputError
from edgeflex.profiles import KernelJob, kernel_grid, measure_kernels
from edgeflex.profiles.kernels import conv, linear
from edgeflex.schema import LayerKind, Precision

if TYPE_CHECKING:
    from collections.abc import Sequence

XNNPACK = {
    LayerKind.LINEAR: (
        Precision.FP32,
        Precision.FP16,
        Precision.INT8_STATIC,
        Precision.INT8_DYNAMIC,
        Precision.INT4_CHANNEL,
        Precision.INT4_GROUP32,
    ),
    LayerKind.CONV2D: (Precision.FP32, Precision.FP16, Precision.INT8_STATIC),
}
JOBS = tuple(KernelJob(linear(64, 64 * n, 1), Precision.FP32, 1) for n in range(1, 5))


class Bench:
    """Gives fixed times and remembers what was asked; stops like Ctrl-C after so many jobs."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[KernelJob] = []
        self.stop_after = stop_after

    def __call__(self, job: KernelJob) -> Sequence[float]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(job)
        base = job.shape.macs * 1e-9
        return [base, 2 * base, 3 * base]


def test_the_full_grid_covers_every_kind_precision_thread_count_and_row_count():
    jobs = kernel_grid(XNNPACK, quick=False, threads=(1, 4))
    assert len(set(jobs)) == len(jobs)
    assert {(job.shape.kind, job.precision) for job in jobs} == {(k, p) for k, ps in XNNPACK.items() for p in ps}
    assert {job.threads for job in jobs} == {1, 4}
    linears = {job.shape for job in jobs if job.shape.kind is LayerKind.LINEAR}
    assert {shape.rows for shape in linears} == {1, 4, 16, 64, 256}
    assert {shape.in_channels for shape in linears} == {64, 256, 1024, 4096}
    convs = {job.shape for job in jobs if job.shape.kind is LayerKind.CONV2D}
    assert {"plain", "strided", "depthwise", "pointwise"} == {
        "depthwise"
        if shape.groups > 1
        else "pointwise"
        if shape.kernel == 1
        else "strided"
        if shape.stride == 2
        else "plain"
        for shape in convs
    }
    assert {shape.height for shape in convs} >= {8, 112}
    assert max(shape.macs for shape in linears | convs) <= 1 << 30


def test_the_grid_is_the_same_every_time_and_counts_equal_thread_counts_once():
    assert kernel_grid(XNNPACK, quick=False, threads=(1, 1)) == kernel_grid(XNNPACK, quick=False, threads=(1,))


def test_the_quick_grid_is_small_and_still_covers_every_precision():
    jobs = kernel_grid(XNNPACK, quick=True, threads=(1, 2))
    assert len(jobs) == 9
    assert {(job.shape.kind, job.precision) for job in jobs} == {(k, p) for k, ps in XNNPACK.items() for p in ps}
    assert {job.threads for job in jobs} == {1}


def test_a_kind_without_precisions_is_left_out_and_groups_must_divide():
    jobs = kernel_grid({LayerKind.CONV2D: (Precision.INT4_GROUP32,)}, quick=False, threads=(1,))
    assert jobs
    assert all(job.shape.kind is LayerKind.CONV2D for job in jobs)
    assert all((job.shape.in_channels // job.shape.groups) % 32 == 0 for job in jobs)


def test_convolutions_of_the_grid_keep_or_halve_the_size():
    assert conv(16, 16, 32, kernel=3).out_positions == 32 * 32
    assert conv(16, 32, 32, kernel=3, stride=2).out_positions == 16 * 16
    assert conv(64, 16, 56).out_positions == 56 * 56


def test_a_kernel_gets_the_median_and_the_spread_of_its_samples():
    (kernel,) = measure_kernels(JOBS[:1], run=Bench())
    base = 64 * 64 * 1e-9
    assert kernel.seconds.value == pytest.approx(2 * base)
    assert kernel.seconds.spread == pytest.approx(0.5)  # quartiles 1.5 and 2.5 times the base
    assert kernel.seconds.origin == "measured"


def test_ctrl_c_keeps_what_is_finished_and_the_next_run_does_the_rest(tmp_path):
    journal = tmp_path / "kernels.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure_kernels(JOBS, run=Bench(stop_after=2), journal=journal)
    assert len(journal.read_text().splitlines()) == 2
    second = Bench()
    kernels = measure_kernels(JOBS, run=second, journal=journal)
    assert second.asked == list(JOBS[2:])
    assert kernels == measure_kernels(JOBS, run=Bench())
    third = Bench()
    assert measure_kernels(JOBS, run=third, journal=journal) == kernels
    assert third.asked == []


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 2000), tail=st.binary(max_size=8))
def test_a_journal_cut_anywhere_loses_at_most_what_was_cut(cut, tail):
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "kernels.jsonl"
        whole = measure_kernels(JOBS, run=Bench(), journal=journal)
        raw = journal.read_bytes()
        kept = raw[:cut]
        journal.write_bytes(kept + tail)
        bench = Bench()
        assert measure_kernels(JOBS, run=bench, journal=journal) == whole
        # A tail may damage the line it hangs on, never one before it.
        assert len(JOBS) - kept.count(b"\n") <= len(bench.asked) + 1
        assert len(bench.asked) <= len(JOBS) - kept.count(b"\n")
        assert measure_kernels(JOBS, run=Bench(stop_after=0), journal=journal) == whole


def test_times_of_another_machine_are_not_used(tmp_path):
    journal = tmp_path / "kernels.jsonl"
    measure_kernels(JOBS, run=Bench(), journal=journal, context="a")
    bench = Bench()
    measure_kernels(JOBS, run=bench, journal=journal, context="b")
    assert len(bench.asked) == len(JOBS)


def test_progress_hears_of_resumed_kernels_too(tmp_path):
    class Ears:
        def __init__(self):
            self.total = 0
            self.done = 0

        @contextmanager
        def task(self, title, total):
            self.total = total

            def advance(count):
                self.done += count

            yield advance

        def note(self, text):
            raise AssertionError(text)

    journal = tmp_path / "kernels.jsonl"
    measure_kernels(JOBS[:2], run=Bench(), journal=journal)
    ears = Ears()
    measure_kernels(JOBS, run=Bench(), journal=journal, progress=ears)
    assert (ears.done, ears.total) == (4, 4)


@pytest.mark.parametrize("samples", [[], [0.0], [1e-3, -1e-3], [float("nan")], [float("inf")]])
def test_a_run_without_positive_times_is_refused(samples):
    with pytest.raises(DeviceError, match="positive"):
        measure_kernels(JOBS[:1], run=lambda _job: samples)


def test_a_journal_that_cannot_be_written_is_bad_input(tmp_path):
    with pytest.raises(InputError):
        measure_kernels(JOBS, run=Bench(), journal=tmp_path)
