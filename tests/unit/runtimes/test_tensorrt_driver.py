"""The driver by itself: what it says, every failure named, and nothing left behind."""

from __future__ import annotations

import threading
import time

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


def test_events_measure_the_seconds_between_them():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream = context.new_stream()
    start, end = context.new_event(timing=True), context.new_event(timing=True)
    context.record(start, stream)
    cuda.submit(stream, lambda: time.sleep(0.01))
    context.record(end, stream)
    with pytest.raises(DeviceError, match="CUDA_ERROR_NOT_READY"):
        context.elapsed_s(start, end)
    context.wait_for(end)
    assert 0.01 <= context.elapsed_s(start, end) < 1.0
    context.close()


# --- memory that is given back early, and pages that the device shares ---------------------------------


def test_memory_can_be_given_back_before_the_rest_and_only_once():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    first, second, pinned = context.allocate(1000), context.allocate(500), context.allocate_pinned(100)
    assert context.allocated_bytes == 1500
    for _ in range(2):
        context.free(first)
        context.free(pinned)
    assert context.allocated_bytes == 500
    assert list(cuda.device_memory) == [second]
    assert cuda.host_memory == {}
    context.close()
    assert cuda.alive == []
    assert cuda.calls.count("cuMemFree_v2") == 2


@pytest.mark.parametrize("fail", [{}, {"cuMemHostRegister_v2": (1, 801)}], ids=["own pages", "the driver's pages"])
def test_the_device_reads_and_writes_pages_of_the_host_where_they_lie(fail):
    cuda = FakeCuda(fail=fail)
    context = CudaContext(cuda)
    stream, device = context.new_stream(), context.allocate(10_000)
    pages = context.host_pages(10_000)
    assert pages.data.size == 10_000
    assert pages.data.ctypes.data % 4096 == pages.address % 256 == 0
    assert pages.counted is not bool(fail)
    assert not pages.data.any()
    pages.data[:] = np.arange(10_000) % 251
    context.copy(device, pages.address + 256, 1000, stream)
    context.copy(pages.address, device, 1000, stream)
    context.synchronize(stream)
    assert np.array_equal(pages.data[:1000], np.arange(256, 1256) % 251)
    context.free(pages.address)
    assert not cuda.registered
    assert not cuda.host_memory
    assert not cuda.shared
    context.host_pages(1)
    context.close()
    assert cuda.alive == []


def test_pages_that_the_device_does_not_find_are_given_back():
    cuda = FakeCuda(fail={"cuMemHostGetDevicePointer_v2": (1, 1)})
    context = CudaContext(cuda)
    with pytest.raises(DeviceError, match="cuMemHostGetDevicePointer_v2 failed"):
        context.host_pages(4096)
    assert cuda.registered == {}
    context.close()
    assert cuda.alive == []


def test_more_pages_than_the_machine_has_are_refused_before_the_driver_is_asked():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    with pytest.raises(DeviceError, match="Give a smaller cache"):
        context.host_pages(1 << 62)
    assert "cuMemHostRegister_v2" not in cuda.calls
    context.close()


def test_rows_are_copied_from_one_pitch_to_another():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    stream, source, target = context.new_stream(), context.allocate(600), context.allocate(600)
    context.fill_zeros(target, 600, stream)
    context.synchronize(stream)
    cuda.device_memory[source][:] = np.arange(600) % 256
    context.copy_rows((target + 4, 100), (source + 8, 30), 20, 5, stream)
    context.synchronize(stream)
    found = cuda.device_memory[target][4:504].reshape(5, 100)
    wanted = cuda.device_memory[source][8:158].reshape(5, 30)
    assert np.array_equal(found[:, :20], wanted[:, :20])
    assert not found[:, 20:].any()
    context.close()


def test_one_stream_waits_for_anothers_event():
    cuda = FakeCuda()
    context = CudaContext(cuda)
    first, second, event = context.new_stream(), context.new_stream(), context.new_event()
    done: list[str] = []
    cuda.submit(first, lambda: done.append("copied"))
    context.record(event, first)
    cuda.submit(first, lambda: done.append("later"))
    context.order_after(event, second)
    cuda.submit(second, lambda: done.append("computed"))
    context.synchronize(second)
    assert done == ["copied", "computed"]
    context.close()
