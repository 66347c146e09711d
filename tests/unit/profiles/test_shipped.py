from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from edgeflex import profiles
from edgeflex.errors import InputError
from edgeflex.schema import DeviceProfile, Figure, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

WANTED = {
    "jetson-orin-nano-8gb",
    "jetson-orin-nano-8gb-super",
    "jetson-orin-nx-16gb",
    "jetson-agx-orin-64gb",
    "jetson-thor",
    "snapdragon-8-gen-3",
    "snapdragon-8-elite",
    "dimensity-9400",
    "raspberry-pi-5",
    "rtx-4090",
}
CARDS = {"rtx-4090"}  # a GPU alone, without the computer around it


def figures(node: object) -> Iterator[Figure]:
    if isinstance(node, dict):
        if "value" in node:
            yield Figure.model_validate(node)
        for child in node.values():
            yield from figures(child)
    elif isinstance(node, list):
        for child in node:
            yield from figures(child)


def host_bandwidth(name: str) -> float | None:
    rates = [tier.read_bytes_per_s for tier in profiles.load(name).tiers if tier.tier is Tier.HOST]
    return next((rate.value for rate in rates if rate is not None), None)


def test_every_promised_device_is_shipped():
    assert set(profiles.names()) == WANTED
    assert list(profiles.names()) == sorted(profiles.names())


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_shipped_profile_names_a_source_for_every_figure(name):
    profile = profiles.load(name)
    assert profile.name == name
    assert profile.origin == "datasheet"
    assert profile.unified_memory is (name not in CARDS)
    if name not in CARDS:
        assert profile.cpu_model
        assert profile.cores
        assert "neon" in profile.isa
    found = list(figures(json.loads(profile.canonical_json())))
    assert found
    assert all(figure.origin == "datasheet" and figure.spread is None for figure in found)
    assert all(len(figure.source) > 20 and figure.value > 0 for figure in found)


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_shipped_profile_claims_no_kernel_time_and_says_so(name):
    profile = profiles.load(name)
    assert profile.kernels == ()
    assert profile.call_s is None
    assert any("kernel times" in note for note in profile.notes)


@pytest.mark.parametrize(
    ("name", "bits", "transfers_per_s"),
    [
        ("jetson-orin-nano-8gb", 128, 4266e6),
        ("jetson-orin-nano-8gb-super", 128, 6398e6),
        ("jetson-orin-nx-16gb", 128, 6400e6),
        ("jetson-agx-orin-64gb", 256, 6400e6),
        ("jetson-thor", 256, 8533e6),
        ("snapdragon-8-gen-3", 64, 9600e6),
        ("snapdragon-8-elite", 64, 10600e6),
        ("raspberry-pi-5", 32, 4267e6),
    ],
)
def test_bandwidth_is_bus_width_times_transfer_rate(name, bits, transfers_per_s):
    assert host_bandwidth(name) == pytest.approx(bits / 8 * transfers_per_s, rel=0.005)


def gpu_rate(name: str, precision: str, *, sparse: bool = False) -> float | None:
    rates = [rate for rate in profiles.load(name).compute if rate.engine == "gpu" and rate.sparse is sparse]
    return next((rate.ops_per_s.value for rate in rates if rate.precision == precision), None)


@pytest.mark.parametrize(
    ("name", "cores", "clock_hz", "tensor_cores"),
    [
        ("jetson-orin-nano-8gb", 1024, 625e6, 32),
        ("jetson-orin-nano-8gb-super", 1024, 1.02e9, 32),
        ("jetson-orin-nx-16gb", 1024, 918e6, 32),
        ("jetson-agx-orin-64gb", 2048, 1.3e9, 64),
    ],
)
def test_rates_of_ampere_boards_are_cores_times_clock(name, cores, clock_hz, tensor_cores):
    """2 operations a CUDA core, 1,024 dense INT8 operations a tensor core each cycle; FP16 is half of INT8."""
    assert gpu_rate(name, "fp32") == pytest.approx(2 * cores * clock_hz, rel=0.01)
    dense = gpu_rate(name, "int8")
    assert dense is not None
    assert dense == pytest.approx(1024 * tensor_cores * clock_hz, rel=0.03)
    assert gpu_rate(name, "int8", sparse=True) == pytest.approx(2 * dense)
    assert gpu_rate(name, "fp16") == pytest.approx(dense / 2)
    assert gpu_rate(name, "fp8") is None


def test_a_derived_rate_says_from_what():
    for name in profiles.names():
        for rate in profiles.load(name).compute:
            if rate.engine == "gpu" and rate.precision in {"fp16", "fp32"} and name.startswith("jetson-orin"):
                assert rate.ops_per_s.source.startswith("derived: "), (name, rate.precision)


def test_a_bandwidth_that_no_source_gives_is_absent_and_asking_for_it_says_so():
    profile = profiles.load("dimensity-9400")
    assert host_bandwidth("dimensity-9400") is None
    with pytest.raises(InputError, match=r"dimensity-9400.*no memory bandwidth.*edgeflex profile"):
        profiles.require_figure(profile, None, "memory bandwidth")


def test_a_present_figure_is_returned_as_it_is():
    profile = profiles.load("raspberry-pi-5")
    figure = profile.tiers[0].read_bytes_per_s
    assert profiles.require_figure(profile, figure, "memory bandwidth") is figure


def test_an_unknown_device_names_the_nearest_and_all_others():
    with pytest.raises(InputError) as caught:
        profiles.load("rasberry-pi5")
    assert "Did you mean 'raspberry-pi-5'?" in str(caught.value)
    assert all(name in str(caught.value) for name in WANTED)


def test_a_device_like_no_other_gets_no_guess():
    with pytest.raises(InputError) as caught:
        profiles.load("zzz")
    assert "Did you mean" not in str(caught.value)


def test_a_written_profile_is_read_back_equal(tmp_path):
    profile = profiles.load("jetson-thor")
    path = tmp_path / "device.json"
    path.write_text(profile.model_dump_json())
    assert profiles.load(str(path)) == profile


def test_an_absent_or_damaged_profile_file_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        profiles.load(str(tmp_path / "device.json"))
    path = tmp_path / "torn.json"
    path.write_text('{"name": "x"')
    with pytest.raises(InputError, match=r"torn\.json is not a valid DeviceProfile"):
        profiles.load(str(path))


def test_no_heavy_package_is_imported_by_the_door():
    code = "import sys, edgeflex.profiles; print(sorted({'torch', 'numpy', 'executorch', 'psutil'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_profile_survives_its_own_json():
    for name in profiles.names():
        profile = profiles.load(name)
        assert DeviceProfile.parse(profile.canonical_json(), name) == profile
