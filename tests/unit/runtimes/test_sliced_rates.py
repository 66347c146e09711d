"""What slices cost the processor: a ratio that is measured in turns, over memory that is walked through."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeflex.errors import InputError
from edgeflex.runtimes.cuda_slices import sliced
from edgeflex.runtimes.curves import Curve, Curves
from edgeflex.runtimes.division import CPU_IN_SLICES, cpu_in_slices
from edgeflex.runtimes.sliced_rates import sliced_ratio, stored_kind, time_slices
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS
from tests.tiny_decoder import tiny_graph

FP32, INT8, INT4 = Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32


class Pretender:
    """An engine that takes as long as it is told, a call over slices longer by a factor; and its own clock."""

    def __init__(self, factor: float) -> None:
        self.factor, self.now_s = factor, 0.0
        self.called: list[tuple[int, int, int]] = []

    def __call__(self, kind, record, rows):
        self.called.append((kind.down.slices, kind.down.columns, record.ctypes.data))
        drift = 1.0 + 0.01 * len(self.called)  # what else the machine does
        self.now_s += drift * kind.down.columns * (self.factor if kind.down.slices > 1 else 1.0)
        return rows

    def close(self):
        """Do nothing."""

    def clock(self) -> float:
        return self.now_s


def test_the_ratio_of_a_round_is_free_of_what_changes_steadily_meanwhile():
    kind, host = stored_kind(INT8, 64, 512), Pretender(1.25)
    found = time_slices(host, kind, walked_bytes=3 * kind.size_bytes, rounds=4, clock=host.clock)
    assert found.slices == 4
    assert found.rest_share == 0.5
    assert found.in_slices.value == pytest.approx(1.25)
    assert found.rest.value == pytest.approx(1.25)
    assert found.in_slices.low <= found.in_slices.value <= found.in_slices.high
    assert len(found.whole_s) == len(found.sliced_s) == len(found.rest_s) == 4


def test_forms_are_timed_in_turns_over_the_same_memory_and_all_of_it():
    kind, host = stored_kind(INT4, 64, 384), Pretender(1.0)
    found = time_slices(host, kind, walked_bytes=5 * 40960, rounds=1, clock=host.clock)
    count = found.walked_bytes // (kind.size_bytes + -kind.size_bytes % 4096)
    assert found.walked_bytes >= 5 * 40960
    assert found.rest_share == pytest.approx(2 / 3)
    passes = [host.called[first : first + count] for first in range(0, len(host.called), count)]
    assert [one[0][:2] for one in passes[6:]] == [(1, 384), (3, 384), (2, 256), (2, 256), (3, 384), (1, 384)]
    places = {frozenset(place for _, _, place in one) for one in passes}
    assert len(places) == 1
    assert len(next(iter(places))) == count > 1


def test_an_expert_that_stays_whole_is_refused():
    with pytest.raises(InputError, match="64 x 48 in fp32 do not lie in slices"):
        time_slices(Pretender(1.0), stored_kind(FP32, 64, 48))


@pytest.mark.parametrize("precision", DECODER_PRECISIONS)
def test_the_kernels_of_a_run_are_timed_and_nothing_in_their_numbers_slows_them(precision, one_thread):
    from edgeflex.runtimes.cuda_host import NativeExperts

    kind, seen = stored_kind(precision, 64, 384), []
    assert sliced(kind).down.slices == 3
    native = NativeExperts(1)

    class Watched(Pretender):
        def __call__(self, kind, record, rows):
            seen.append(native(kind, record, rows))
            return super().__call__(kind, record, rows)

    host = Watched(1.0)
    try:
        time_slices(host, kind, walked_bytes=1, rounds=1, clock=host.clock)
    finally:
        native.close()
    numbers = np.abs(np.concatenate(seen))
    assert np.isfinite(numbers).all()
    assert (numbers[numbers > 0] > 1e-30).all()  # nothing near the numbers that processors are slow with
    assert np.array_equal(seen[0], seen[1])  # one byte over and over: whole and in slices are the same expert


def test_a_decoders_ratio_is_measured_and_one_where_experts_stay_whole(one_thread):
    graph = tiny_graph()

    def of(inner: int):
        layers = [one if one.routing is None else one.model_copy(update={"expert_dim": inner}) for one in graph.layers]
        return graph.model_copy(update={"layers": tuple(layers)})

    assert sliced_ratio(of(48), FP32, 1, 1, rounds=1) == 1.0
    dense = graph.model_copy(update={"layers": tuple(one for one in graph.layers if one.routing is None)})
    assert sliced_ratio(dense, FP32, 1, 1, rounds=1) == 1.0
    assert 0.1 < sliced_ratio(of(384), INT4, 1, 1 << 20, rounds=3) < 10.0


# --- what the curves carry -------------------------------------------------------------------------------


def test_only_the_processors_curves_change_where_experts_lie_in_slices():
    one, other = Curve(((1, 1.0),)), Curve(((1, 2.0), (4, 8.0)))
    whole = Curves(
        gpu=one, cpu=other, link_bytes_per_s=4.0, cpu_start_s=0.5, kinds={"int4": (one, other)}, cpu_in_slices=1.5
    )
    laid = whole.in_slices()
    assert (laid.cpu_s(1), laid.cpu_s(4), laid.cpu_s(1, "int4")) == (3.0, 12.0, 3.0)
    assert (laid.gpu_s(1, "int4"), laid.cpu_start_s, laid.link_s(4)) == (1.0, 0.5, 1.0)
    assert laid.in_slices() == laid
    assert whole.scaled(cpu=2.0).in_slices().cpu_s(1) == 6.0
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="cpu_in_slices"):
            dataclasses.replace(whole, cpu_in_slices=wrong)


def test_every_precision_has_a_figure_and_those_that_decoders_run_were_measured():
    assert set(CPU_IN_SLICES) == set(DECODER_PRECISIONS)
    for precision in Precision:
        assert 0.8 < cpu_in_slices(precision) < 1.25
    assert cpu_in_slices(Precision.INT4_BLOCK64) == CPU_IN_SLICES[INT4]
    assert cpu_in_slices(Precision.FP16) == CPU_IN_SLICES[FP32]


def test_a_run_measures_what_slices_cost_its_processor_and_its_curves_are_of_whole_experts(one_thread):
    import torch

    from edgeflex.progress import Silent
    from edgeflex.runtimes.cuda_curves import measure_curves
    from edgeflex.runtimes.cuda_host import NativeExperts
    from edgeflex.runtimes.cuda_streams import HostStreams

    stored = {(0, number): stored_kind(INT4, 64, 384) for number in range(3)}
    laid = {key: sliced(kind) for key, kind in stored.items()}
    host = NativeExperts(1)
    try:
        kinds = (stored, laid)
        whole, cut = (
            measure_curves(HostStreams(), host, stored, one, torch.float32, progress=Silent()) for one in kinds
        )
    finally:
        host.close()
    assert whole.cpu_in_slices == 1.0
    assert cut.cpu_in_slices != 1.0
    assert 0.2 < cut.cpu_in_slices < 5.0
    assert cut.in_slices().cpu_s(1) == pytest.approx(cut.cpu_in_slices * cut.cpu_s(1))
