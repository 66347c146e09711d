from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edgeflex.profiles import conditions, machine, power_w
from edgeflex.profiles.machine import MachineFacts
from edgeflex.schema import Conditions

if TYPE_CHECKING:
    from pathlib import Path

XEON = """\
processor\t: {index}
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
cpu MHz\t\t: {mhz}
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512_bf16 amx_bf16 avx512_vnni amx_tile amx_int8

"""
PI5 = """\
processor\t: {index}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
ORIN = """\
processor\t: {index}
model name\t: ARMv8 Processor rev 1 (v8l)
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42
CPU revision\t: 1

"""


def tree(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def xeon(root: Path) -> Path:
    cpuinfo = "".join(XEON.format(index=i, core=i % 2, mhz=2700.0 + 100 * i) for i in range(4))
    return tree(
        root,
        {
            "proc/cpuinfo": cpuinfo,
            "proc/meminfo": "MemTotal:       16265500 kB\nMemFree:  1 kB\n",
            "proc/loadavg": "0.52 0.58 0.59 1/967 31337\n",
            "sys/devices/system/cpu/cpu0/cache/index0/size": "48K\n",
            "sys/devices/system/cpu/cpu0/cache/index3/size": "105M\n",
            "sys/class/thermal/thermal_zone0/temp": "41000\n",
            "sys/class/thermal/thermal_zone1/temp": "53500\n",
            "sys/class/powercap/intel-rapl:0/energy_uj": "2500000\n",
            "sys/class/powercap/intel-rapl:0:0/energy_uj": "900000\n",
            "sys/class/powercap/intel-rapl:1/energy_uj": "500000\n",
        },
    )


def pi5(root: Path) -> Path:
    tail = "Revision\t: d04170\nSerial\t\t: 0000000000000000\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
    return tree(
        root,
        {
            "proc/cpuinfo": "".join(PI5.format(index=i) for i in range(4)) + tail,
            "proc/meminfo": "MemTotal:        8245056 kB\n",
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
            "sys/class/thermal/thermal_zone0/temp": "48850\n",
        },
    )


def orin_nano(root: Path) -> Path:
    return tree(
        root,
        {
            "proc/cpuinfo": "".join(ORIN.format(index=i) for i in range(6)),
            "proc/meminfo": "MemTotal:        7802448 kB\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
            "sys/class/thermal/thermal_zone0/temp": "51406\n",
            "sys/class/thermal/thermal_zone2/temp": "-256000\n",
            "sys/class/hwmon/hwmon1/name": "ina3221\n",
            "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
            "sys/class/hwmon/hwmon1/in1_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr1_input": "1200\n",
            "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
            "sys/class/hwmon/hwmon1/in2_input": "5000\n",
            "sys/class/hwmon/hwmon1/curr2_input": "300\n",
        },
    )


def test_an_x86_server_counts_cores_once_and_names_its_vector_units(tmp_path):
    facts = machine(xeon(tmp_path))
    assert facts.cpu_model == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert (facts.physical_cores, facts.logical_cores) == (2, 4)
    assert facts.isa == ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx")
    assert facts.ram_bytes == 16265500 * 1024
    assert facts.l3_bytes == 105 * 1024**2
    assert not facts.is_jetson


def test_conditions_take_mean_clock_hottest_zone_and_whole_packages(tmp_path):
    assert conditions(xeon(tmp_path)) == Conditions(
        load_average=0.52, clock_hz=2850e6, temperature_c=53.5, energy_j=3.0
    )


def test_a_raspberry_pi_is_named_by_its_core_and_board(tmp_path):
    facts = machine(pi5(tmp_path))
    assert facts.cpu_model == "Cortex-A76"
    assert (facts.physical_cores, facts.logical_cores) == (4, 4)
    assert facts.isa == ("neon", "fp16", "dotprod")
    assert facts.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert not facts.is_jetson
    assert conditions(tmp_path) == Conditions(clock_hz=1.95e9, temperature_c=48.85)


def test_a_jetson_is_recognised_with_its_release_and_its_input_power(tmp_path):
    facts = machine(orin_nano(tmp_path))
    assert facts.cpu_model == "Cortex-A78AE"
    assert facts.physical_cores == 6
    assert facts.is_jetson
    assert facts.jetson_release == "L4T R36.4.3"
    assert conditions(tmp_path).temperature_c == pytest.approx(51.406)
    assert power_w(tmp_path) == pytest.approx(6.0)


def test_without_an_input_rail_the_rails_add_up(tmp_path):
    root = orin_nano(tmp_path)
    (root / "sys/class/hwmon/hwmon1/in1_label").write_text("VDD_GPU_SOC\n")
    assert power_w(root) == pytest.approx(7.5)


def test_cores_of_two_types_share_only_common_instructions(tmp_path):
    little = ORIN.format(index=0).replace("0xd42", "0xd05").replace(" asimddp", "")
    facts = machine(tree(tmp_path, {"proc/cpuinfo": little + ORIN.format(index=1)}))
    assert facts.cpu_model == "Cortex-A55 + Cortex-A78AE"
    assert facts.isa == ("neon", "fp16")


def test_a_machine_that_tells_nothing_is_unknown_and_never_zero(tmp_path):
    assert machine(tmp_path) == MachineFacts()
    assert conditions(tmp_path) == Conditions()
    assert power_w(tmp_path) is None


def test_garbage_in_the_system_files_is_unknown(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/loadavg": "\n",
            "proc/meminfo": "MemTotal: lots\n",
            "proc/cpuinfo": "\x00\x01 nonsense\n\n",
            "sys/class/thermal/thermal_zone0/temp": "hot\n",
            "sys/class/powercap/intel-rapl:0/energy_uj": "\n",
        },
    )
    assert machine(root) == MachineFacts()
    assert conditions(root) == Conditions()


def test_this_machine_tells_its_cores_and_memory():
    facts = machine()
    assert facts.logical_cores is not None
    assert facts.logical_cores >= 1
    assert facts.ram_bytes is not None
    assert facts.ram_bytes > 1 << 28
