"""A recipe as a shell script, for boards that have TensorRT's ``trtexec`` and no Python.

POSIX ``sh`` alone, with the tools that every Linux has. The flags are those that ``trtexec`` knows from 10.3 to 11.4
(``--stronglyTyped`` does nothing from 11.0, where nothing else exists). It leaves what ``edgeflex build`` leaves: an
engine for each segment, and the index that says where they may run.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from edgeflex.schema_trt import ENGINE_FOLDER, INDEX_FILE, BuildRecipe, SegmentRecipe, version_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MIB = 1 << 20

_HEAD = r"""#!/bin/sh
# Builds the TensorRT engines of this bundle with trtexec, without Python. Written by edgeflex, as build.json was.
#
#   sh build.sh
#
# Run it again after an interruption: engines that are up to date stay. TRTEXEC=/path/to/trtexec names the tool where it
# is neither on the PATH nor in /usr/src/tensorrt/bin. Exit codes: 4 TensorRT or GPU too old, 5 a tool is missing, 6 a
# file is damaged, 7 the driver is missing or a build failed.
set -eu
LC_ALL=C
export LC_ALL

say() {
    printf 'build.sh: %s\n' "$*" >&2
}
fail() {
    code=$1
    shift
    say "$*"
    exit "$code"
}

CDPATH='' cd -- "$(dirname -- "$0")"

# --- what this machine has -------------------------------------------------------------------------

command -v sha256sum >/dev/null 2>&1 || fail 5 "sha256sum is missing. Run: sudo apt install coreutils"

trtexec=${TRTEXEC:-$(command -v trtexec || true)}
if [ -z "$trtexec" ]; then
    trtexec=/usr/src/tensorrt/bin/trtexec
fi
if [ ! -f "$trtexec" ] || [ ! -x "$trtexec" ]; then
    fail 5 "trtexec is neither on the PATH nor at $trtexec. Run: sudo apt install libnvinfer-bin (or set TRTEXEC)"
fi

# nvidia-smi is absent on some Jetsons, where the device files tell
driver_found() {
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        return 0
    fi
    for place in /dev/nvidiactl /dev/nvgpu /dev/nvhost-gpu /proc/driver/nvidia/version; do
        if [ -e "$place" ]; then
            return 0
        fi
    done
    return 1
}
driver_found || fail 7 "no NVIDIA driver was found. Run this on the device that will run the engines."

# the first line is: &&&& RUNNING TensorRT.trtexec [TensorRT v100300] ...
release=$("$trtexec" --help 2>&1 | sed -n 's/.*\[TensorRT v\([0-9][0-9]*\)\].*/\1/p' | sed -n 1p)
if [ -n "$release" ] && [ "$release" -lt @LEAST_NUMBER@ ]; then
    fail 4 "TensorRT is $((release / 10000)).$((release % 10000 / 100)); these graphs need @LEAST_VERSION@ or later."
fi

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1{s/[^0-9.]//g;p;}' || true)
case $capability in
    [0-9]*.[0-9]*)
        if [ "$((${capability%%.*} * 10 + ${capability#*.}))" -lt @LEAST_CAPABILITY_NUMBER@ ]; then
            fail 4 "this GPU has compute capability $capability; @NEEDS@"
        fi
        ;;
esac

digest() {
    sum=$(sha256sum <"$1")
    printf '%s' "${sum%% *}"
}
describe() {
    if [ -r /proc/device-tree/model ]; then
        tr -d '\000' </proc/device-tree/model
    fi
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || true
    if [ -r /proc/driver/nvidia/version ]; then
        cat /proc/driver/nvidia/version
    fi
    digest "$trtexec"
}
# engines belong to this board, driver and trtexec
board=$(describe | sha256sum)
board=${board%% *}

# --- building --------------------------------------------------------------------------------------

part=
leave() {
    if [ -n "$part" ]; then
        rm -f -- "$part"
    fi
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

verify() {
    [ -f "$1" ] || fail 6 "$1 is missing. Copy the bundle again."
    if [ "$(digest "$1")" != "$2" ]; then
        fail 6 "$1 is not the file that was exported: its SHA-256 differs from $2. Copy the bundle again."
    fi
}

up_to_date() {
    [ -f "$1" ] && [ -f "$1.stamp" ] || return 1
    [ "$(sed -n 1p "$1.stamp")" = "$2" ] && [ "$(sed -n 2p "$1.stamp")" = "$(digest "$1")" ]
}

entries=
# NAME ONNX SHA256 DATA SHA256 ENGINE [shapes ...]; DATA is empty where the graph has none
build() {
    name=$1 onnx=$2 onnx_sha=$3 data=$4 data_sha=$5 engine=$6
    shift 6
    verify "$onnx" "$onnx_sha"
    if [ -n "$data" ]; then
        verify "$data" "$data_sha"
    fi
    set -- @FLAGS@ "$@"
    stamp="$onnx_sha $data_sha $board $*"
    if up_to_date "$engine" "$stamp"; then
        say "$name is up to date"
    else
        say "building $name (minutes on a small board; its log is $engine.log)"
        part=$engine.part
        rm -f -- "$engine" "$engine.stamp" "$part"
        begun=$(date +%s)
        if ! "$trtexec" --onnx="$onnx" --saveEngine="$part" "$@" >"$engine.log" 2>&1; then
            tail -n 20 -- "$engine.log" >&2
            fail 7 "trtexec could not build $name; $engine.log says why."
        fi
        [ -s "$part" ] || fail 7 "trtexec wrote no engine for $name; $engine.log says why."
        mv -f -- "$part" "$engine"
        part=
        printf '%s\n%s\n%s\n' "$stamp" "$(digest "$engine")" "$(($(date +%s) - begun))" >"$engine.stamp"
    fi
    size=$(wc -c <"$engine" | tr -d ' ')
    entry=$(printf '{"segment":"%s","file":"%s","size_bytes":%s,"sha256":"%s","build_s":%s}' \
        "$name" "$engine" "$size" "$(sed -n 2p "$engine.stamp")" "$(sed -n 3p "$engine.stamp")")
    entries=${entries:+$entries,}$entry
}

# what trtexec logged about this machine, once; no quotes or backslashes come through
logged() {
    sed -n "s/.*$1: *//p" "$engine.log" | sed -n 1p | tr -cd 'A-Za-z0-9 ._,/()+-'
}
"""

_TAIL = r"""
# --- the index -------------------------------------------------------------------------------------

version=$(logged 'TensorRT version')
gpu=$(logged 'Selected Device')
capability=$(logged 'Compute Capability')
case $capability in
    [0-9]*.[0-9]*) ;;
    *) capability= ;;
esac
if [ -z "$version" ] || [ -z "$gpu" ] || [ -z "$capability" ]; then
    say "the engines are built, but $engine.log names no TensorRT version, GPU or compute capability"
    fail 7 "without these the engines are not loaded. Build them with: edgeflex build"
fi
driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9][0-9.]*\).*/\1/p' | sed -n 1p || true)
{
    printf '{"schema_version":1,"key":{"tensorrt":"%s","gpu":"%s","compute_capability":[%s,%s],"driver":"%s",' \
        "$version" "$gpu" "${capability%%.*}" "${capability#*.}" "$driver"
    printf '%s' '@HASHES_AND_OPTIONS@'
    printf '},"engines":[%s]}\n' "$entries"
} >@INDEX@.part
mv -f -- @INDEX@.part @INDEX@
say "all engines are built; @INDEX@ says for which TensorRT and GPU"
"""


def build_script(recipe: BuildRecipe) -> str:
    """Return the script that builds the engines of ``recipe`` and writes their index."""
    least, capability = recipe.least_version, recipe.least_capability
    reasons = [need.reason for need in recipe.needs if need.compute_capability == capability]
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    tokens = {
        "LEAST_NUMBER": str(least[0] * 10_000 + least[1] * 100),
        "LEAST_VERSION": version_text(least),
        "LEAST_CAPABILITY_NUMBER": str(capability[0] * 10 + capability[1]),
        "NEEDS": f"these graphs need {version_text(capability)} or above{reason}.",
        "FLAGS": " ".join(_quoted(flag) for flag in flags(recipe)),
        "HASHES_AND_OPTIONS": _hashes_and_options(recipe),
        "INDEX": INDEX_FILE,
    }
    folders = sorted({segment.engine.rpartition("/")[0] or "." for segment in recipe.segments} | {ENGINE_FOLDER})
    made = f"mkdir -p -- {' '.join(_quoted(folder) for folder in folders)}\n"
    calls = "".join(_call(segment) for segment in recipe.segments)
    return _filled(_HEAD, tokens) + "\n" + made + calls + _filled(_TAIL, tokens)


def flags(recipe: BuildRecipe) -> tuple[str, ...]:
    """Return the flags of ``trtexec`` that all engines of a recipe share; all exist from 10.3 to 11.4."""
    options = recipe.options
    streaming = ("--allowWeightStreaming",) if options.weight_streaming else ()
    return (
        "--stronglyTyped",
        "--noTF32",
        f"--memPoolSize=workspace:{options.workspace_bytes // _MIB}",
        f"--builderOptimizationLevel={options.optimization_level}",
        f"--timingCacheFile={options.timing_cache}",
        "--skipInference",
        *streaming,
    )


def shape_flags(segment: SegmentRecipe) -> tuple[str, ...]:
    """Return the flags that bound the shapes of a segment, profile by profile; none where shapes are fixed."""
    found: list[str] = []
    for index, profile in enumerate(segment.profiles):
        if len(segment.profiles) > 1:
            found.append(f"--profile={index}")
        for flag, shapes in (
            ("minShapes", {name: bounds.least for name, bounds in profile.shapes.items()}),
            ("optShapes", {name: bounds.best for name, bounds in profile.shapes.items()}),
            ("maxShapes", {name: bounds.most for name, bounds in profile.shapes.items()}),
        ):
            found.append(f"--{flag}={','.join(f'{name}:{_shape(shape)}' for name, shape in shapes.items())}")
    return tuple(found)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _call(segment: SegmentRecipe) -> str:
    words = (
        segment.name,
        segment.onnx,
        segment.onnx_sha256,
        segment.data or "",
        segment.data_sha256 or "",
        segment.engine,
        *shape_flags(segment),
    )
    return f"build {' '.join(_quoted(word) for word in words)}\n"


def _quoted(word: str) -> str:
    """Return a word in single quotes; the recipe's nouns let no quote in."""
    return f"'{word}'"


def _hashes_and_options(recipe: BuildRecipe) -> str:
    body: Mapping[str, object] = {"hashes": recipe.hashes(), "options": recipe.options.model_dump(mode="json")}
    return json.dumps(body, sort_keys=True, separators=(",", ":"))[1:-1]


def _filled(text: str, tokens: Mapping[str, str]) -> str:
    for name, value in tokens.items():
        text = text.replace(f"@{name}@", value)
    return text
