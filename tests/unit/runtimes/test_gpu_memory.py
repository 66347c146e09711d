"""A GPU's memory under an engine: what the driver misses, what a plan calls it, and one memory counted once."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from edgeflex import terminal
from edgeflex.errors import DeviceError
from edgeflex.runtimes.bench import bench, counted_memory
from edgeflex.runtimes.measure import DeviceMemory, ModelMemory, OnDevice, measured_here
from edgeflex.runtimes.tensorrt import TensorrtSession, device_limit
from edgeflex.runtimes.tensorrt_build import build
from edgeflex.schema import Budget, MemoryBreakdown, Plan, Tier
from tests.fake_cuda import Device, FakeCuda
from tests.toy_bundle import toy_inputs, toy_plan, write_toy_bundle
from tests.toy_engines import NEWEST, install, write_engine_bundle

MIB = 1 << 20
CARD = Device("GeForce", (8, 9), 24 << 30, integrated=False)


class Filling(FakeCuda):
    """A driver whose free memory falls by what is allocated, and by what engines take."""

    taken = 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802 - the driver's own name
        code = super().cuMemGetInfo_v2(free, total)
        free._obj.value = self.free - self.taken - sum(one.nbytes for one in self.device_memory.values())
        return code


def opened(tmp_path, monkeypatch, cuda: FakeCuda, **fields: Any) -> TensorrtSession:
    bundle = write_engine_bundle(tmp_path / "bundle", **fields)
    builder = install(monkeypatch, NEWEST, cuda=Filling(devices=cuda.devices))
    build(bundle, library=builder.cuda)
    trt = install(monkeypatch, NEWEST, cuda=cuda)
    return TensorrtSession(bundle, library=trt.cuda)


@pytest.mark.parametrize("integrated", [False, True])
def test_what_the_driver_has_less_of_is_what_loading_took(tmp_path, monkeypatch, integrated: bool):
    cuda = Filling(devices=(Device("GPU", (8, 7), 8 << 30, integrated=integrated),))
    session = opened(tmp_path, monkeypatch, cuda)
    assert isinstance(session, OnDevice)
    with session:
        cuda.taken = 5 * MIB  # what engines hold beside our own allocations
        found = session.device_memory()
        own = sum(one.nbytes for one in cuda.device_memory.values())
        assert found == DeviceMemory(5 * MIB + own, integrated)
    with pytest.raises(DeviceError, match="closed"):
        session.device_memory()


def test_memory_that_others_free_meanwhile_hides_none_of_what_is_known(tmp_path, monkeypatch):
    cuda = Filling(devices=(CARD,))
    session = opened(tmp_path, monkeypatch, cuda)
    with session:
        cuda.taken = -(1 << 30)
        own = sum(one.nbytes for one in cuda.device_memory.values())
        assert session.device_memory().model_bytes == own + 3 * 1000  # each engine needs 1000 bytes to work in


def test_a_bundle_for_a_gpu_is_measured_there_and_all_of_it_is_given_back(tmp_path, monkeypatch):
    bundle = write_engine_bundle(tmp_path / "bundle")
    cuda, found = Filling(devices=(CARD,)), ctypes.CDLL

    def load(name: Any, *rest: Any, **more: Any) -> Any:
        return cuda if "cuda" in str(name) else found(name, *rest, **more)

    monkeypatch.setattr(ctypes, "CDLL", load)
    install(monkeypatch, NEWEST, cuda=cuda)
    build(bundle)
    held = measured_here(bundle.path, 1, 2)
    assert held.unified is False
    assert held.device_bytes is not None
    assert held.device_bytes > 3 * 1000
    assert cuda.alive == []


def gpu_plan(**changes: Any) -> Plan:
    budget = Budget(memory_bytes={Tier.HOST: 120_000})
    promise = MemoryBreakdown(weights_bytes=100_000, activation_bytes=0, overhead_bytes=0)
    return toy_plan(budget=budget, memory=promise).model_copy(update={"backend": "tensorrt", **changes})


def memory(device: int | None, *, unified: bool | None = None) -> ModelMemory:
    return ModelMemory(runtime_bytes=1, model_bytes=30_000, load_peak_bytes=None, device_bytes=device, unified=unified)


@pytest.mark.slow
def test_a_card_of_its_own_memory_is_judged_by_that_alone():
    found, told = counted_memory(gpu_plan(memory_of="gpu"), memory(110_000, unified=False))
    assert found == 110_000
    assert "29.30 KiB beside" in told


def test_one_memory_holds_both_parts():
    found, told = counted_memory(gpu_plan(memory_of="shared"), memory(110_000, unified=True))
    assert found == 140_000
    assert "one memory" in told


def test_what_nobody_saw_is_not_judged():
    assert counted_memory(gpu_plan(), memory(None)) == (None, "the process does not see what the GPU holds")


def checks_of(tmp_path, plan: Plan, held: ModelMemory) -> dict[str, Any]:
    """Bench a bundle that runs here under a plan for a GPU: memory is what is handed in."""
    bundle = write_toy_bundle(tmp_path / "bundle", plan=plan)
    result = bench(bundle, toy_inputs(1), repeats=1, warmup=1, memory=lambda *_: held)
    assert result.device_memory_bytes == held.device_bytes
    assert result.unified_memory is held.unified
    return {check.name: check for check in result.checks}


@pytest.mark.slow
def test_a_benchmark_names_and_judges_the_gpus_memory(tmp_path):
    checks = checks_of(tmp_path, gpu_plan(memory_of="gpu"), memory(110_000, unified=False))
    assert (checks["GPU memory"].measured, checks["GPU memory"].ok) == (110_000, True)
    assert (checks["GPU memory budget"].limit, checks["GPU memory budget"].ok) == (120_000, True)
    over = checks_of(tmp_path / "over", gpu_plan(memory_of="gpu"), memory(121_000, unified=False))
    assert not over["GPU memory budget"].ok
    assert not over["GPU memory"].ok  # 10 % above the promise is 110 000
    shared = checks_of(tmp_path / "shared", gpu_plan(memory_of="shared"), memory(95_000, unified=True))
    assert shared["memory shared by CPU and GPU budget"].measured == 125_000
    unseen = checks_of(tmp_path / "unseen", gpu_plan(memory_of="gpu"), memory(None))
    assert not unseen["GPU memory"].was_measured


@pytest.mark.parametrize(
    ("memory_of", "name"), [("gpu", "GPU memory"), ("shared", "memory shared by CPU and GPU"), (None, "memory")]
)
def test_a_plans_text_calls_its_memory_by_name(memory_of, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    plan = gpu_plan(memory_of=memory_of)
    assert any(line.strip().startswith(name) for line in terminal.plan_text(plan).splitlines())
    assert ("memory_of" in plan.canonical_json()) is (memory_of is not None)
    assert Plan.parse(plan.canonical_json(), "plan") == plan


def test_weights_stream_within_the_memory_that_users_name():
    plan = gpu_plan(memory_of="gpu")
    assert device_limit(plan, 10**9) == 120_000
    assert device_limit(gpu_plan(), 10**9) == 10**9
    given = plan.model_copy(update={"budget": Budget(memory_bytes={Tier.DEVICE: 5, Tier.HOST: 7})})
    assert device_limit(given, 10**9) == 5
