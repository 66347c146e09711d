"""What it costs the processor that an expert lies in slices: the run's own kernel over both layouts; one table.

    python benchmarks/sliced_experts.py [--threads 1 2] [--precisions int4-group32 ...] [--walked 256MiB] -o table.json

Where one missing expert of an event may be divided between processor and GPU, experts lie in RAM slice by slice (see
`division` and `cuda_slices`), and the processor reads all of them so. Timed is one token (decoding) through experts
of models' shapes with random routing over more memory than the last cache holds: whole, as the file is; in slices, all
of them; and the rest, all but the first half of the slices, as where that was copied to the GPU. In turns A B C C B A;
each figure is the median of the rounds' ratios, with quartiles beside it, so that only the ratio counts and not what
else the machine does. Reads per second are of the whole expert.

Expected, written down before it was first run: int8 within 2 % of the whole either way (64 columns of a row and slice
are one line of the cache, and lines are asked for ahead). int4 5 to 10 % longer with one thread, since it computes as
long as it reads, and sums of 32 bytes a row and slice are put aside and taken up again between slices; under 5 % with
two threads or wherever memory sets the pace. The rest 1 to 3 % above its share of the sliced whole: a call costs some
microseconds for few slices as for many.

What was found then: slices of 32 and 64 columns cost 9 to 19 % in int4 and up to 9 % in int8, since a row of one has
too few bytes for the processor to see what comes, and wide ones up to 45 %, where what was asked for ahead was put out
of the cache before it was needed. So slices have 128 columns or more, and the kernel asks for the next rows of all
slices in the order in which they lie. What a simulation takes of the figures stands in `division.CPU_IN_SLICES`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeflex.runtimes.cuda_host import NativeExperts
from edgeflex.runtimes.sliced_rates import ROUNDS, SlicedTimes, stored_kind, time_slices
from edgeflex.schema import Precision
from edgeflex.schema_moe import DECODER_PRECISIONS
from edgeflex.units import parse_size_bytes

MIB = 1 << 20


class Expert(NamedTuple):
    """The shape of a model's experts."""

    model: str
    hidden: int
    inner: int


EXPERTS = (
    Expert("Qwen3-Next-80B", 2048, 512),
    Expert("Qwen3-30B-A3B", 2048, 768),
    Expert("OLMoE-1B-7B", 2048, 1024),
    Expert("DeepSeek-V2-Lite", 2048, 1408),
    Expert("gpt-oss-120b", 2880, 2880),
    Expert("Mixtral-8x7B", 4096, 14336),
)


class Line(NamedTuple):
    """One expert in one precision with some threads."""

    expert: Expert
    precision: Precision
    threads: int
    times: SlicedTimes

    def document(self) -> dict[str, object]:
        return {
            **self.expert._asdict(),
            "precision": self.precision.value,
            "threads": self.threads,
            "slices": self.times.slices,
            "expert_bytes": self.times.expert_bytes,
            "walked_bytes": self.times.walked_bytes,
            "whole_s": self.times.whole_s,
            "sliced_s": self.times.sliced_s,
            "rest_s": self.times.rest_s,
            "rest_share": self.times.rest_share,
            "in_slices": self.times.in_slices._asdict(),
            "rest": self.times.rest._asdict(),
        }


def processor() -> str:
    """Return the processor's name and cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def last_cache_bytes() -> int:
    """Return the bytes of the largest cache that the system tells of; 0: of none."""
    paths = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((parse_size_bytes(path.read_text().strip() + "iB") for path in paths), default=0)


def median_us(seconds: tuple[float, ...]) -> str:
    return f"{1e6 * sorted(seconds)[len(seconds) // 2]:.0f}"


def print_table(lines: list[Line]) -> None:
    header = ["expert", "precision", "threads", "slices", "MB", "whole us", "GB/s", "sliced us", "in slices / whole"]
    rows = [[*header, "rest us", "rest / its share"]]
    for one in lines:
        times = one.times
        ratios = [f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" for ratio in (times.in_slices, times.rest)]
        whole_s = sorted(times.whole_s)[len(times.whole_s) // 2]
        rows.append(
            [
                f"{one.expert.model} {one.expert.hidden} x {one.expert.inner}",
                one.precision.value,
                str(one.threads),
                str(times.slices),
                f"{times.expert_bytes / 1e6:.1f}",
                median_us(times.whole_s),
                f"{times.expert_bytes / whole_s / 1e9:.1f}",
                median_us(times.sliced_s),
                ratios[0],
                median_us(times.rest_s),
                ratios[1],
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                cell.rjust(width) if at > 1 else cell.ljust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def print_means(lines: list[Line]) -> None:
    """Print the mean over the models, by precision and threads."""
    for precision, threads in dict.fromkeys((one.precision, one.threads) for one in lines):
        mine = [one.times for one in lines if (one.precision, one.threads) == (precision, threads)]
        found = [one.in_slices.value for one in mine]
        rest = [one.rest.value for one in mine]
        print(
            f"{precision.value}, {threads} thread{'s' * (threads > 1)}: in slices {sum(found) / len(found):.3f} in the "
            f"mean, {min(found):.3f} to {max(found):.3f}; the rest {sum(rest) / len(rest):.3f}, "
            f"{min(rest):.3f} to {max(rest):.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=[one.value for one in DECODER_PRECISIONS],
        default=["int8-dynamic", "int4-group32"],
    )
    parser.add_argument("--models", nargs="+", help="only those whose names contain one of these")
    parser.add_argument("--walked", default=None, help="bytes of experts; default 256MiB, or 4 times the last cache")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("-o", "--output", type=Path, help="all seconds as JSON")
    asked = parser.parse_args()
    walked = parse_size_bytes(asked.walked) if asked.walked else max(256 * MIB, 4 * last_cache_bytes())
    chosen = [
        one for one in EXPERTS if not asked.models or any(name.lower() in one.model.lower() for name in asked.models)
    ]
    started, load = datetime.now(timezone.utc), os.getloadavg()[0]
    print(
        f"{processor()}; last cache {last_cache_bytes() / MIB:.0f} MiB, {walked / MIB:.0f} MiB walked; load {load:.1f}"
    )
    lines = []
    for threads in asked.threads:
        host = NativeExperts(threads)
        try:
            for precision in map(Precision, asked.precisions):
                for one in chosen:
                    kind = stored_kind(precision, one.hidden, one.inner)
                    times = time_slices(host, kind, walked_bytes=walked, rounds=asked.rounds)
                    lines.append(Line(one, precision, threads, times))
        finally:
            host.close()
    print_table(lines)
    print_means(lines)
    if asked.output:
        document = {
            "processor": processor(),
            "last_cache_bytes": last_cache_bytes(),
            "walked_bytes": walked,
            "rounds": asked.rounds,
            "started": started.isoformat(timespec="seconds"),
            "load": [load, os.getloadavg()[0]],
            "lines": [one.document() for one in lines],
        }
        asked.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
