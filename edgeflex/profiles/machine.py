"""What this machine is, and in what state: read from ``/proc``, ``/sys`` and ``/etc``.

Every reader takes the root of the file tree, so that recorded trees stand in for other machines. What a
machine does not tell is None, never zero: a zero would enter arithmetic as if it were known.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from edgeflex.profiles.yardsticks import speed
from edgeflex.schema import Conditions

if TYPE_CHECKING:
    from collections.abc import Callable

# The kernel's own names: arch/x86/include/asm/cpufeatures.h and arch/arm64/kernel/cpuinfo.c.
_X86_ISA = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx",
}
_ARM_ISA = {
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
# (implementer, part) as in arch/arm64/include/asm/cputype.h.
_ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD85): "Cortex-X925",
    (0x51, 0x001): "Oryon",
}
_PLAUSIBLE_C = (-40.0, 150.0)
_Value = TypeVar("_Value", str, int)


@dataclass(frozen=True)
class MachineFacts:
    """What a machine is; None where it does not tell.

    Attributes:
        cpu_model: The processor's name; several core types are joined with ``+``.
        physical_cores: Cores, counting the threads of one core once.
        logical_cores: Processors that the kernel schedules on.
        isa: Instruction sets that decide kernel speed, in a fixed order.
        ram_bytes: Memory that the kernel manages.
        l3_bytes: The largest last-level cache of one processor.
        board: The board's name as firmware gives it.
        jetson_release: The first line of ``/etc/nv_tegra_release``, shortened.
        is_jetson: Whether board or release say NVIDIA Jetson.
    """

    cpu_model: str | None = None
    physical_cores: int | None = None
    logical_cores: int | None = None
    isa: tuple[str, ...] = ()
    ram_bytes: int | None = None
    l3_bytes: int | None = None
    board: str | None = None
    jetson_release: str | None = None
    is_jetson: bool = False


def machine(root: Path = Path("/")) -> MachineFacts:
    """Return what the machine whose file tree starts at ``root`` is."""
    processors = _processors(_text(root / "proc/cpuinfo") or "")
    board = _board(root)
    release = _jetson_release(root)
    return MachineFacts(
        cpu_model=_cpu_model(processors) or _host_only(root, platform.processor()),
        physical_cores=_physical_cores(processors),
        logical_cores=len(processors) or _host_only(root, os.cpu_count()),
        isa=_isa(processors),
        ram_bytes=_ram_bytes(root),
        l3_bytes=_l3_bytes(root),
        board=board,
        jetson_release=release,
        is_jetson=release is not None or "jetson" in (board or "").lower(),
    )


def processor_isa(isa: tuple[str, ...]) -> tuple[str, ...]:
    """Return the instruction sets of the processor alone: a profile's ``isa`` may also name its GPU, as ``sm_87``.

    >>> processor_isa(("neon", "fp16", "sm_87"))
    ('neon', 'fp16')
    """
    return tuple(name for name in isa if not name.startswith("sm_"))


def conditions(root: Path = Path("/"), *, clock: Callable[[], float] = time.perf_counter) -> Conditions:
    """Return load, clock, temperature, energy counter and speed as they are now.

    The clock is the mean over the processors, the temperature the hottest plausible zone. The energy is a
    counter in joules (RAPL packages, or ``energy*_input`` of hwmon): only a difference of two means something.
    The speed is timed with ``clock`` (see ``yardsticks``), some tens of milliseconds of one core; a recorded tree has
    none.
    """
    state = Conditions(
        load_average=_number(_first_word(_text(root / "proc/loadavg"))),
        clock_hz=_clock_hz(root),
        temperature_c=_temperature_c(root),
        energy_j=_energy_j(root),
    )
    if root != Path("/"):
        return state
    arithmetic_s, memory_bytes_per_s = speed(clock)
    figures = {"arithmetic_s": arithmetic_s, "memory_bytes_per_s": memory_bytes_per_s}
    return state.model_copy(update={**figures, "machine": machine().cpu_model})


def power_w(root: Path = Path("/")) -> float | None:
    """Return the power drawn now in watts, from an INA3221 monitor as on Jetson boards.

    The input rail ``VDD_IN`` alone where there is one, since the other rails hang behind it; else the sum.
    """
    rails: dict[str, float] = {}
    for monitor in sorted(root.glob("sys/class/hwmon/hwmon*")):
        if (_text(monitor / "name") or "").strip() == "ina3221":
            rails.update(_ina3221_rails(monitor))
    if not rails:
        return None
    return rails.get("VDD_IN", sum(rails.values()))


def _ina3221_rails(monitor: Path) -> dict[str, float]:
    rails = {}
    for label_file in sorted(monitor.glob("in*_label")):
        channel = label_file.name[2:].removesuffix("_label")
        millivolts = _number(_text(monitor / f"in{channel}_input"))
        milliamperes = _number(_text(monitor / f"curr{channel}_input"))
        if millivolts is not None and milliamperes is not None:
            rails[(_text(label_file) or channel).strip()] = millivolts * milliamperes * 1e-6
    return rails


def _host_only(root: Path, value: _Value | None) -> _Value | None:
    # Python's own answer is about this host, so it must not leak into a recorded tree.
    return (value or None) if root == Path("/") else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _first_word(text: str | None) -> str | None:
    return text.split()[0] if text and text.split() else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _processors(cpuinfo: str) -> list[dict[str, str]]:
    """Return the fields of each processor; a trailing block without one (Model, Revision) is left out."""
    blocks = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in re.split(r"\n\s*\n", cpuinfo)
    ]
    return [block for block in blocks if "processor" in block]


def _cpu_model(processors: list[dict[str, str]]) -> str | None:
    cores = [core for block in processors if (core := _arm_core(block))]
    if cores:
        return " + ".join(dict.fromkeys(cores))
    return next((block["model name"] for block in processors if block.get("model name")), None)


def _arm_core(block: dict[str, str]) -> str | None:
    try:
        key = (int(block["CPU implementer"], 16), int(block["CPU part"], 16))
    except (KeyError, ValueError):
        return None
    return _ARM_CORES.get(key)


def _physical_cores(processors: list[dict[str, str]]) -> int | None:
    places = {(block.get("physical id"), block["core id"]) for block in processors if "core id" in block}
    if places:
        return len(places)
    # Arm's kernels print no core ids; the cores in our table run one thread each.
    return len(processors) if processors and all(_arm_core(block) for block in processors) else None


def _isa(processors: list[dict[str, str]]) -> tuple[str, ...]:
    """Return what every processor has: on big.LITTLE a thread may land on any."""
    shared: set[str] | None = None
    for block in processors:
        words = set(block.get("flags", "").split() or block.get("Features", "").split())
        shared = words if shared is None else shared & words
    table = _X86_ISA if any("flags" in block for block in processors) else _ARM_ISA
    return tuple(name for word, name in table.items() if word in (shared or ()))


def _ram_bytes(root: Path) -> int | None:
    match = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    if match:
        return int(match.group(1)) * 1024
    if root != Path("/"):
        return None
    import psutil

    return int(psutil.virtual_memory().total)


def _l3_bytes(root: Path) -> int | None:
    sizes = []
    for cache in root.glob("sys/devices/system/cpu/cpu0/cache/index*"):
        match = re.fullmatch(r"(\d+)([KM])", (_text(cache / "size") or "").strip())
        if match:
            sizes.append(int(match.group(1)) * (1024 if match.group(2) == "K" else 1024**2))
    return max(sizes, default=None)


def _board(root: Path) -> str | None:
    for place in (
        "proc/device-tree/model",
        "sys/firmware/devicetree/base/model",
        "sys/class/dmi/id/product_name",
    ):
        # Device-tree strings end with a NUL byte.
        if name := (_text(root / place) or "").replace("\0", "").strip():
            return name
    return None


def _jetson_release(root: Path) -> str | None:
    match = re.match(r"#\s*(R\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release") or "")
    return f"L4T {match.group(1)}.{match.group(2)}" if match else None


def _clock_hz(root: Path) -> float | None:
    kilohertz = [
        value
        for place in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
        if (value := _number(_text(place)))
    ]
    if kilohertz:
        return statistics.fmean(kilohertz) * 1e3
    cpuinfo = _text(root / "proc/cpuinfo") or ""
    megahertz = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo, re.MULTILINE)]
    return statistics.fmean(megahertz) * 1e6 if megahertz else None


def _temperature_c(root: Path) -> float | None:
    # Zones that are off report nonsense such as -256 degrees, or fail to read.
    zones = [
        value / 1e3
        for place in root.glob("sys/class/thermal/thermal_zone*/temp")
        if (value := _number(_text(place))) is not None
    ]
    low, high = _PLAUSIBLE_C
    return max((value for value in zones if low < value < high), default=None)


def _energy_j(root: Path) -> float | None:
    # "intel-rapl:0" is a package, "intel-rapl:0:1" a part of it that would be counted twice.
    packages = [place / "energy_uj" for place in root.glob("sys/class/powercap/*-rapl:[0-9]*")]
    places = [place for place in packages if place.parent.name.count(":") == 1]
    places += sorted(root.glob("sys/class/hwmon/hwmon*/energy1_input"))
    microjoules = [value for place in places if (value := _number(_text(place))) is not None]
    return sum(microjoules) * 1e-6 if microjoules else None
