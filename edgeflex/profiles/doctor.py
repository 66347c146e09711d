"""What of edgeflex works on this machine, what does not, and the command that mends it.

Nothing heavy is imported here and nothing can crash the caller: packages are looked up by their metadata, and the
rest is asked in other processes (``edgeflex.profiles.surroundings``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeflex import __version__, native
from edgeflex.errors import EdgeflexError, MissingDependencyError
from edgeflex.native.build import find_compiler, sources_digest
from edgeflex.profiles.machine import machine
from edgeflex.profiles.surroundings import LOOK_TIMEOUT_S, Surroundings, package_root
from edgeflex.registry import EXPORTERS, RUNTIMES
from edgeflex.schema import Document, Noun
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgeflex.profiles.machine import MachineFacts
    from edgeflex.registry import Table

State = Literal["ok", "missing", "broken", "unavailable"]
Group = Literal["system", "package", "device", "target"]

LEAST_PYTHON = (3, 10)
# What the exporter's graphs and the builder's names are checked against.
TENSORRT_FROM, TENSORRT_BEFORE = (10, 3), (12, 0)
_TRTEXEC = "usr/src/tensorrt/bin/trtexec"
_LITTLE_DISK_BYTES = 2 << 30


class Finding(Noun):
    """One thing that was looked at.

    ``remedy`` is the command or the deed that mends it, empty where nothing has to be or can be done; ``required``
    marks what every command needs.
    """

    name: str
    group: Group
    state: State
    version: str = ""
    detail: str = ""
    remedy: str = ""
    needed_by: str = ""
    required: bool = False


class Doctor(Document):
    """All findings, in the order in which one would mend them."""

    findings: tuple[Finding, ...]

    @property
    def lacking(self) -> tuple[Finding, ...]:
        """What every command needs and is not there, or not in order."""
        return tuple(one for one in self.findings if one.required and one.state != "ok")

    @property
    def exit_code(self) -> int:
        """0, or that of ``MissingDependencyError`` where something lacks that every command needs."""
        return MissingDependencyError.exit_code if self.lacking else 0


@dataclass(frozen=True)
class _Package:
    name: str
    needed_by: str
    required: bool = False
    module: str = ""
    extra: str = ""


_EVERYTHING = "every command"
_PACKAGES = (
    *(_Package(name, _EVERYTHING, required=True) for name in ("numpy", "pydantic", "typer", "rich", "platformdirs")),
    _Package("psutil", _EVERYTHING, required=True),
    _Package("pillow", "calibrate, run, bench, verify: reading images", required=True, module="PIL"),
    _Package("safetensors", "export, run, bench, verify", required=True),
    _Package("jinja2", "report"),
    _Package("matplotlib", "plan --plot, trace simulate --plot"),
    _Package("scipy", "calibrate, plan"),
    _Package("scikit-learn", "quickstart, zoo:digits-cnn", module="sklearn"),
    _Package("torch", "inspect, fit-exits, calibrate, export; the runtime executorch"),
    _Package("torchao", "the target executorch"),
    _Package("executorch", "the target and the runtime executorch; decoders"),
    _Package("onnx", "the targets onnx and tensorrt"),
    _Package("onnxscript", "the targets onnx and tensorrt"),
    _Package("tokenizers", "decoders: text"),
    _Package("huggingface_hub", "models named as on Hugging Face; optional", extra="hub"),
)


def examine(around: Surroundings | None = None) -> Doctor:
    """Look at this machine; nothing is changed, and nothing here can crash the caller.

    Args:
        around: What to look at; this machine by default.

    Returns:
        System and compiler, packages, the NVIDIA side, then what each target and runtime lacks.
    """
    here = around or Surroundings()
    facts = machine(here.root)
    found = [*_system(here), *(_package(one, here) for one in _PACKAGES), _onnxruntime(here), *_nvidia(here, facts)]
    by_name = {one.name: one for one in found}
    found += [finding for table in (EXPORTERS, RUNTIMES) for finding in _offers(table, by_name)]
    return Doctor(findings=tuple(found))


# --- system ------------------------------------------------------------------------------------------


def _system(here: Surroundings) -> list[Finding]:
    return [_python(here), _own_version(), _compiler(here), _native_library(here), *_memory(here), _disk(here)]


def _python(here: Surroundings) -> Finding:
    version = ".".join(map(str, here.python))
    fits = here.python[:2] >= LEAST_PYTHON
    least = ".".join(map(str, LEAST_PYTHON))
    return Finding(
        name="python",
        group="system",
        state="ok" if fits else "broken",
        version=version,
        detail="in a virtual environment" if here.in_environment else "the system's own",
        remedy="" if fits else f"install Python {least} or later and make the environment anew: python3 -m venv .venv",
        needed_by=_EVERYTHING,
        required=True,
    )


def _own_version() -> Finding:
    return Finding(name="edgeflex", group="system", state="ok", version=__version__, detail=str(package_root()))


def _compiler(here: Surroundings) -> Finding:
    needed_by = "building the native library of decoders"
    try:
        command = find_compiler(here.environment)
    except EdgeflexError as error:
        remedy = "sudo apt install g++"
        said = str(error).partition(". ")[0]
        return Finding(
            name="compiler", group="system", state="missing", detail=said, remedy=remedy, needed_by=needed_by
        )
    return Finding(name="compiler", group="system", state="ok", detail=" ".join(command), needed_by=needed_by)


def _native_library(here: Surroundings) -> Finding:
    state: State = "ok"
    detail, remedy = "built from these sources", ""
    try:
        held = here.library.read_bytes()
    except OSError:
        state, detail, remedy = "missing", f"{here.library} is absent", native.BUILD_COMMAND
    else:
        if sources_digest().encode() not in held:
            state, detail, remedy = "broken", "built from other sources than these", native.BUILD_COMMAND
    needed_by = "decoders for executorch"
    return Finding(
        name="native library", group="system", state=state, detail=detail, remedy=remedy, needed_by=needed_by
    )


def _memory(here: Surroundings) -> list[Finding]:
    text = _text(here.root / "proc/meminfo")
    kilobytes = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    if "MemTotal" not in kilobytes:
        return []
    total = format_bytes(1024 * kilobytes["MemTotal"])
    free = kilobytes.get("MemAvailable")
    detail = total if free is None else f"{total}, {format_bytes(1024 * free)} available"
    found = [Finding(name="memory", group="system", state="ok", detail=detail)]
    limit_bytes = _memory_limit_bytes(here.root)
    if limit_bytes is not None and limit_bytes < 1024 * kilobytes["MemTotal"]:
        detail = f"this process and its group may use {format_bytes(limit_bytes)}"
        found.append(Finding(name="memory limit", group="system", state="ok", detail=detail))
    return found


def _memory_limit_bytes(root: Path) -> int | None:
    """Return the least memory limit of the control groups that this process is in, or None."""
    groups = root / "sys/fs/cgroup"
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, inner = rest.partition(":")
        if number == "0":  # version 2: one tree, where every ancestor limits too
            folder = groups / inner.lstrip("/")
            limits += [_text(one / "memory.max") for one in (folder, *folder.parents) if one.is_relative_to(groups)]
        elif "memory" in controllers.split(","):
            limits += [_text(groups / "memory" / part / "memory.limit_in_bytes") for part in (inner.lstrip("/"), "")]
    return min((int(text) for text in limits if text.strip().isdigit()), default=None)


def _disk(here: Surroundings) -> Finding:
    free_bytes = here.disk_free_bytes(here.folder)
    direct = here.reads_direct(here.folder)
    said = {
        True: "read past the page cache",
        False: "the file system refuses O_DIRECT, so that experts are read through the page cache",
        None: "not writable",
    }[direct]
    remedy = ""
    if direct is None:
        remedy = "work in a folder that you may write to"
    elif free_bytes < _LITTLE_DISK_BYTES:
        remedy = (
            f"free space, or work in another folder: engines and bundles may need {format_bytes(_LITTLE_DISK_BYTES)}"
        )
    return Finding(
        name="disk",
        group="system",
        state="broken" if remedy else "ok",
        detail=f"{format_bytes(free_bytes)} free in {here.folder}; {said}",
        remedy=remedy,
        needed_by="bundles and engines",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- packages ----------------------------------------------------------------------------------------


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def fits(version: str, wanted: str) -> bool:
    """Say whether a version keeps the limits of a requirement such as ``>=2.13,<2.14``.

    Only ``>=`` and ``<`` are read, which is all that edgeflex states.

    >>> fits("2.13.0+cpu", ">=2.13,<2.14"), fits("2.14.0", ">=2.13,<2.14")
    (True, False)
    """
    held = _numbers(version)
    for limit in filter(None, wanted.split(",")):
        if limit.startswith(">=") and held < _numbers(limit[2:]):
            return False
        if limit.startswith("<") and not limit.startswith("<=") and held >= _numbers(limit[1:]):
            return False
    return True


def _package(package: _Package, here: Surroundings) -> Finding:
    wanted = here.requirements.get(package.name.lower().replace("_", "-"), "")
    version = here.version_of(package.name)
    present = here.importable(package.module or package.name.replace("-", "_"))
    state: State = "ok"
    detail = ""
    if version is None or not present:
        state = "missing"
        detail = "not installed" if version is None else "listed as installed, but its module is not found"
    elif not fits(version, wanted):
        state, detail = "broken", f"edgeflex works with {wanted}"
    line = f"pip install 'edgeflex[{package.extra}]'" if package.extra else f"pip install '{package.name}{wanted}'"
    return Finding(
        name=package.name,
        group="package",
        state=state,
        version=version or "",
        detail=detail,
        remedy="" if state == "ok" else line,
        needed_by=package.needed_by,
        required=package.required,
    )


def _onnxruntime(here: Surroundings) -> Finding:
    needed_by = "the runtime onnxruntime; calibrate for the targets onnx and tensorrt"
    names = ("onnxruntime", "onnxruntime-gpu")
    version = next((found for name in names if (found := here.version_of(name))), None)
    package = _package(_Package("onnxruntime", needed_by), here)
    if version is None or not here.importable("onnxruntime"):
        return package
    answer, problem = here.look("onnxruntime")
    if answer is None:
        line = f"pip install --force-reinstall 'onnxruntime{here.requirements.get('onnxruntime', '')}'"
        return package.model_copy(
            update={"state": "broken", "version": version, "detail": f"not importable: {problem}", "remedy": line}
        )
    detail = f"providers: {', '.join(answer['providers'])}"
    return package.model_copy(update={"state": "ok", "version": version, "detail": detail, "remedy": ""})


# --- NVIDIA ------------------------------------------------------------------------------------------

# Releases of Jetson Linux by JetPack (NVIDIA's JetPack archive), with the TensorRT that comes with each.
_JETPACKS = (
    ("36.2", "6.0 DP, TensorRT 8.6"),
    ("36.3", "6.0, TensorRT 8.6"),
    ("36.4", "6.1 to 6.2.1, TensorRT 10.3"),
    ("36.5", "6.2.2, TensorRT 10.3"),
    ("38.2", "7.0"),
    ("38.4", "7.1, TensorRT 10.13"),
    ("39.2", "7.2, TensorRT 10.16"),
)
_LEAST_L4T = (36, 4)
_TENSORRT_NEEDED_BY = "build, and the runtime tensorrt"


def _nvidia(here: Surroundings, facts: MachineFacts) -> list[Finding]:
    driver = _driver(here, facts)
    found = [_jetpack(facts), driver]
    if facts.is_jetson:
        found += _power_mode(here)
    tools = [_tensorrt(here, facts), _trtexec(here, facts)]
    if driver.state == "unavailable":  # installing them would mend nothing
        idle = {"state": "unavailable", "remedy": ""}
        tools = [one if one.state == "ok" else one.model_copy(update=idle) for one in tools]
    return [*found, *tools]


def _jetpack(facts: MachineFacts) -> Finding:
    if facts.jetson_release is None:
        detail = "the board says Jetson, but /etc/nv_tegra_release is absent" if facts.is_jetson else "no Jetson"
        return Finding(name="jetpack", group="device", state="unavailable", detail=detail)
    release = facts.jetson_release.removeprefix("L4T R")
    known = next((said for prefix, said in _JETPACKS if f"{release}.".startswith(f"{prefix}.")), "")
    old = _numbers(release) < _LEAST_L4T
    return Finding(
        name="jetpack",
        group="device",
        state="broken" if old else "ok",
        version=facts.jetson_release,
        detail=f"JetPack {known}" if known else "JetPack of a release that edgeflex does not know",
        remedy="flash JetPack 6.1 or later: edgeflex builds engines with TensorRT 10.3 and later" if old else "",
        needed_by=_TENSORRT_NEEDED_BY,
    )


def _driver(here: Surroundings, facts: MachineFacts) -> Finding:
    answer, problem = here.look("driver")
    problem = problem if answer is None else str(answer["problem"] or "")
    version = None if answer is None else answer["cuda_version"]
    finding = Finding(
        name="nvidia driver",
        group="device",
        state="ok",
        version="" if version is None else f"CUDA {version}",
        needed_by=_TENSORRT_NEEDED_BY,
    )
    if answer is not None and not problem:
        return finding.model_copy(update={"detail": "; ".join(_gpu_text(gpu) for gpu in answer["gpus"])})
    if not facts.is_jetson and not _has_nvidia_card(here.root):
        return finding.model_copy(update={"state": "unavailable", "detail": f"{problem}; no NVIDIA GPU is seen"})
    remedy = "sudo apt install nvidia-l4t-cuda" if facts.is_jetson else "sudo ubuntu-drivers install"
    return finding.model_copy(
        update={
            "state": "missing" if version is None else "broken",
            "detail": problem,
            "remedy": f"{remedy}; in a container, start it with --runtime nvidia or --gpus all",
        }
    )


def _gpu_text(gpu: Mapping[str, Any]) -> str:
    memory = "memory shared with the processor" if gpu["integrated"] else f"{format_bytes(gpu['memory_bytes'])} memory"
    return f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"


def _has_nvidia_card(root: Path) -> bool:
    """Say whether a PCI device of NVIDIA (vendor 0x10de) is there, whatever its driver."""
    return any(_text(place).strip() == "0x10de" for place in root.glob("sys/bus/pci/devices/*/vendor"))


def _power_mode(here: Surroundings) -> list[Finding]:
    """Return the mode that clocks are held to; a figure without it says little."""
    done = here.run(["nvpmodel", "-q"], LOOK_TIMEOUT_S)
    match = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    if done.code != 0 or match is None:
        return []
    detail = "note it beside every figure; /etc/nvpmodel.conf lists the modes, sudo jetson_clocks holds the clocks"
    return [Finding(name="power mode", group="device", state="ok", version=match.group(1), detail=detail)]


def _tensorrt(here: Surroundings, facts: MachineFacts) -> Finding:
    finding = Finding(name="tensorrt", group="device", state="ok", needed_by=_TENSORRT_NEEDED_BY)
    install = _tensorrt_line(here, facts)
    if not here.importable("tensorrt"):
        return finding.model_copy(update={"state": "missing", "detail": "not installed", "remedy": install})
    answer, problem = here.look("tensorrt")
    if answer is None:
        detail = f"its Python package is here, but cannot be imported: {problem}"
        return finding.model_copy(update={"state": "broken", "detail": detail, "remedy": install})
    version = str(answer["version"])
    if not TENSORRT_FROM <= _numbers(version)[:2] < TENSORRT_BEFORE:
        limits = f"from {'.'.join(map(str, TENSORRT_FROM))} to before {'.'.join(map(str, TENSORRT_BEFORE))}"
        update = {"state": "broken", "version": version, "detail": f"edgeflex works {limits}", "remedy": install}
        return finding.model_copy(update=update)
    return finding.model_copy(update={"version": version})


def _tensorrt_line(here: Surroundings, facts: MachineFacts) -> str:
    if not facts.is_jetson:
        return "pip install --extra-index-url https://pypi.nvidia.com 'edgeflex[tensorrt]'"
    install = "sudo apt install tensorrt python3-libnvinfer"
    if here.in_environment:  # where the system's packages are out of sight
        return f"{install}; then make the environment with python3 -m venv --system-site-packages"
    return install


def _trtexec(here: Surroundings, facts: MachineFacts) -> Finding:
    beside = here.root / _TRTEXEC
    place = here.which("trtexec") or (str(beside) if beside.is_file() else None)
    missing = place is None
    remedy = (
        "sudo apt install libnvinfer-bin" if facts.is_jetson else "install TensorRT's package of tools, libnvinfer-bin"
    )
    return Finding(
        name="trtexec",
        group="device",
        state="missing" if missing else "ok",
        detail=place or f"neither on the path nor at /{_TRTEXEC}",
        remedy=remedy if missing else "",
        needed_by="a bundle's build.sh, for boards without Python",
    )


# --- targets -----------------------------------------------------------------------------------------

_GRAPHS = ("torch", "onnx", "onnxscript", "onnxruntime", "scipy")
_NEEDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("target", "executorch"): ("torch", "torchao", "executorch", "scipy"),
    ("target", "onnx"): _GRAPHS,
    ("target", "tensorrt"): _GRAPHS,
    ("runtime", "executorch"): ("torch", "executorch"),
    ("runtime", "onnxruntime"): ("onnxruntime",),
    ("runtime", "tensorrt"): ("nvidia driver", "tensorrt"),
    ("runtime", "reference"): ("torch",),
}


_PIP = "pip install "
_USES = {"target": "calibrate, export", "runtime": "run, bench, verify"}


def _offers(table: Table, found: Mapping[str, Finding]) -> list[Finding]:
    """Return a finding per row of a table, plug-ins too."""
    try:
        names = table.names()
    except EdgeflexError as error:  # two packages offer one name
        return [Finding(name=f"{table.kind}s", group="target", state="broken", detail=str(error))]
    return [_offer(table, name, found) for name in names]


def _offer(table: Table, name: str, found: Mapping[str, Finding]) -> Finding:
    finding = Finding(name=f"{table.kind} {name}", group="target", state="ok", needed_by=_USES.get(table.kind, ""))
    try:
        row = table.row(name)
    except EdgeflexError as error:
        said, _, remedy = str(error).rpartition(" Run: ")
        return finding.model_copy(update={"state": "unavailable", "detail": said or str(error), "remedy": remedy})
    lacking = [found[one] for one in _NEEDS.get((table.kind, name), ()) if found[one].state != "ok"]
    if not lacking:
        return finding.model_copy(update={"detail": row.description})
    why = "; ".join(f"{one.name}: {one.detail or one.state}" for one in lacking)
    remedy = _together([one.remedy for one in lacking if one.remedy])
    return finding.model_copy(update={"state": "unavailable", "detail": why, "remedy": remedy})


def _together(remedies: Sequence[str]) -> str:
    """Return remedies as one text: packages in one line of pip, the rest after it."""
    plain = [one.removeprefix(_PIP) for one in remedies if one.startswith(f"{_PIP}'")]
    others = [one for one in remedies if not one.startswith(f"{_PIP}'")]
    return "; ".join(dict.fromkeys([*([f"{_PIP}{' '.join(dict.fromkeys(plain))}"] if plain else []), *others]))
