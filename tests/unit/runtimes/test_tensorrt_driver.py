"""The driver by itself: what it says, every failure named, and nothing left behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from edgeflex.errors import DeviceError
from edgeflex.runtimes import cuda_driver
from edgeflex.runtimes.cuda_driver import CudaContext, Driver, driver_facts, driver_problem, host_view
from tests.fake_cuda import CONTEXT, Device, FakeCuda


def test_a_machine_without_the_library_has_a_problem_and_no_crash(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_LIBRARIES", ("libno-such-library.so.1",))
    assert "no NVIDIA driver" in (driver_problem() or "")
    with pytest.raises(DeviceError, match=r"libcuda\.so\.1 was not found"):
        driver_facts()


def test_a_working_driver_has_no_problem_and_tells_its_devices():
    cuda = FakeCuda(version=13020, devices=(Device("NVIDIA H200", (9, 0), 141 << 30, integrated=False), Device()))
    assert driver_problem(cuda) is None
    facts = driver_facts(cuda)
    assert facts.version == (13, 2)
    first, second = facts.devices
    assert (first.name, first.compute_capability, first.integrated) == ("NVIDIA H200", (9, 0), False)
    assert first.memory_bytes == 141 << 30
    assert (second.index, second.integrated) == (1, True)


def test_a_driver_that_does_not_start_says_which_error():
    assert "CUDA_ERROR_UNKNOWN (999)" in (driver_problem(FakeCuda(fail={"cuInit": (1, 999)})) or "")


def test_a_driver_without_devices_is_a_problem():
    assert "shows no device" in (driver_problem(FakeCuda(devices=())) or "")


def test_an_error_that_the_driver_does_not_know_still_has_its_number():
    with pytest.raises(DeviceError, match=r"cuMemAlloc_v2 failed: an unknown error \(12345\)"):
        CudaContext(FakeCuda(fail={"cuMemAlloc_v2": (1, 12345)})).allocate(4)


def test_a_function_that_the_driver_lacks_is_an_old_driver():
    with pytest.raises(DeviceError, match="has no cuNoSuchFunction: it is too old"):
        Driver(FakeCuda()).call("cuNoSuchFunction")


def test_a_context_gives_back_everything_last_first_and_once():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    context.allocate(100)
    context.allocate_pinned(100)
    stream = context.new_stream()
    context.new_event()
    context.capture(stream, lambda: None)
    assert len(cuda.alive) == 6
    context.close()
    assert cuda.alive == []
    context.close()
    frees = [name for name in cuda.calls if "Free" in name or "Destroy" in name or "Release" in name]
    assert frees == [
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuEventDestroy_v2",
        "cuStreamDestroy_v2",
        "cuMemFreeHost",
        "cuMemFree_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ]


def test_the_context_that_another_framework_had_is_current_again_afterwards():
    cuda = FakeCuda()
    cuda.current[threading.get_ident()] = 0x99
    context = CudaContext(cuda)
    assert cuda.current[threading.get_ident()] == CONTEXT
    context.close()
    assert cuda.current[threading.get_ident()] == 0x99


def test_another_thread_gets_the_context_too():
    cuda, found = FakeCuda(), []
    context = CudaContext(cuda)

    def work() -> None:
        context.make_current()
        found.append(context.allocate(10))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found
    context.make_current()
    context.allocate(10)
    closer = threading.Thread(target=context.close)
    closer.start()
    closer.join()
    assert cuda.alive == []


@pytest.mark.parametrize("name", ["cuCtxSetCurrent", "cuDevicePrimaryCtxRetain"])
def test_a_context_that_cannot_be_made_leaves_nothing_behind(name: str):
    cuda = FakeCuda(fail={name: (1, 2)})
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        CudaContext(cuda)
    assert cuda.alive == []


def test_a_failure_while_closing_is_logged_and_the_rest_is_still_given_back(caplog):
    cuda = FakeCuda(fail={"cuMemFreeHost": (1, 700)})
    context = CudaContext(cuda)
    context.allocate(8)
    context.allocate_pinned(8)
    context.close()
    assert [one.split()[0] for one in cuda.alive] == ["pinned"]
    assert "while closing" in caplog.text
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in caplog.text


def test_copies_carry_data_up_and_down_and_only_when_waited_for():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream, device = context.new_stream(), context.allocate(24)
    up, down = context.allocate_pinned(24), context.allocate_pinned(24)
    sent = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.copyto(host_view(up, (2, 3)), sent)
    context.upload(device, up, 24, stream)
    context.download(down, device, 24, stream)
    assert not np.array_equal(host_view(down, (2, 3)), sent)
    context.synchronize(stream)
    assert np.array_equal(host_view(down, (2, 3)), sent)
    context.close()


def test_a_captured_graph_does_nothing_until_launched_and_then_as_often_as_launched():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream, address, host = context.new_stream(), context.allocate(4), context.allocate_pinned(4)
    host_view(host, (1,))[0] = 7.0
    graph = context.capture(stream, lambda: context.upload(address, host, 4, stream))
    context.synchronize(stream)
    assert cuda.array(address, (1,))[0] != 7.0
    for value in (7.0, 8.0):
        host_view(host, (1,))[0] = value
        context.launch(graph, stream)
        context.synchronize(stream)
        assert cuda.array(address, (1,))[0] == value
    context.close()
    assert cuda.alive == []


def test_a_capture_that_fails_leaves_a_stream_that_works():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream, address = context.new_stream(), context.allocate(4)
    with pytest.raises(DeviceError, match="CAPTURE_UNSUPPORTED"):
        context.capture(stream, lambda: context.synchronize(stream))

    def fault() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        context.capture(stream, fault)
    context.fill_zeros(address, 4, stream)
    context.synchronize(stream)
    assert cuda.array(address, (1,))[0] == 0.0
    context.close()
    assert cuda.alive == []


def test_a_graph_that_cannot_be_made_ready_is_dropped():
    cuda = FakeCuda(fail={"cuGraphInstantiateWithFlags": (1, 2)})
    context = CudaContext(cuda)
    stream = context.new_stream()
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        context.capture(stream, lambda: None)
    context.close()
    assert cuda.alive == []


def test_events_measure_seconds():
    context = CudaContext(FakeCuda())
    stream = context.new_stream()
    start, end = context.new_event(timing=True), context.new_event(timing=True)
    context.record(start, stream)
    context.record(end, stream)
    context.wait_for(end)
    assert context.elapsed_s(start, end) == pytest.approx(2.5e-3)
    context.close()
