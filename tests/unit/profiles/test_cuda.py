"""What the NVIDIA driver says, asked through a library that answers as it does; what a profile makes of its GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from edgeflex.profiles.cuda import DriverFacts, GpuFacts, cuda_problem, driver
from edgeflex.profiles.machine import processor_isa


class Library:
    """The calls of libcuda that are made, with its ways of answering: by reference, and a status."""

    def __init__(self, status: int = 0, version: int = 12060, gpus: tuple[GpuFacts, ...] = ()) -> None:
        self.status, self.version, self.gpus = status, version, gpus

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's own name
        assert flags == 0
        return self.status

    def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802 - the driver's own name
        out._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802 - the driver's own name
        out._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:  # noqa: N802 - the driver's own name
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, handle: Any) -> int:  # noqa: N802 - the driver's own name
        buffer.value = self.gpus[handle.value].name.encode()[: size - 1]
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, handle: Any) -> int:  # noqa: N802 - the driver's own name
        out._obj.value = self.gpus[handle.value].memory_bytes
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, handle: Any) -> int:  # noqa: N802 - the driver's own name
        gpu = self.gpus[handle.value]
        major, minor = gpu.capability.split(".")
        out._obj.value = {75: int(major), 76: int(minor), 18: int(gpu.integrated)}[attribute]
        return 0


GPUS = (
    GpuFacts("Orin", "8.7", 8 << 30, integrated=True),
    GpuFacts("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, integrated=False),
)


def test_every_gpu_is_named_with_its_capability_and_memory():
    assert driver(lambda name: Library(gpus=GPUS)) == DriverFacts(None, "12.6", GPUS)


def test_no_library_at_all_is_no_driver():
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert driver(absent) == DriverFacts("no NVIDIA driver (libcuda.so.1 and nvcuda.dll are not found)")


@pytest.mark.parametrize(("status", "why"), [(100, "no GPU"), (803, "different versions"), (7, "CUresult")])
def test_a_driver_that_does_not_start_gives_its_number_and_what_it_means(status: int, why: str):
    facts = driver(lambda name: Library(status=status, version=13000))
    assert facts.cuda_version == "13.0"
    assert f"cuInit gives {status}" in str(facts.problem)
    assert why in str(facts.problem)


def test_a_driver_without_a_gpu_says_so():
    assert driver(lambda name: Library()).problem == "the NVIDIA driver sees no GPU"


def test_why_nothing_of_a_gpu_can_be_measured_is_told():
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert cuda_problem(absent) == driver(absent).problem
    assert "sees no GPU" in str(cuda_problem(lambda name: Library()))
    if not importlib.import_module("torch").cuda.is_available():
        assert "reaches no device" in str(cuda_problem(lambda name: Library(gpus=GPUS)))


def test_the_gpu_in_a_profile_is_told_from_its_processor():
    assert processor_isa(("avx2", "fma", "sm_89")) == ("avx2", "fma")
    assert processor_isa(("neon",)) == ("neon",)
