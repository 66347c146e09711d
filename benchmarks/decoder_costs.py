"""What a miss, a hit and a start of a decoder cost, against what they cannot cost less than.

    python benchmarks/decoder_costs.py --bundle olmoe.bundle --small moe-lm.bundle

A miss: seconds of a decoded token with a small cache less those with every expert in memory, over the misses; against
reading as many bytes of random packed experts cold, one after the other, past the page cache. A hit: seconds of
a token with every expert resident that no kernel accounts for, over the experts used. A start: wall time of
`edgeflex run BUNDLE --max-tokens 1` in a process of its own. Orders alternate (A B B A), medians; one thread.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings

PROMPT = list(range(5, 37))


def decoded(bundle: Path, cache_bytes: int, tokens: int):
    """Return per-token seconds, native seconds, misses per token and uses per token."""
    with DecoderSession.from_bundle(bundle, Settings(cache_bytes=cache_bytes, threads=1)) as session:
        for _ in range(2):  # the second answer is the first again: what fits is there by then
            for _ in session.generate(PROMPT, tokens):
                pass
        stats = session.stats()
        uses = stats.cache.decode_hits + stats.cache.decode_misses
    totals = [one.total_s for one in stats.times]
    native = [one.dense_s + one.expert_s for one in stats.times]
    count = len(totals)
    return statistics.mean(totals), statistics.mean(native), stats.cache.decode_misses / count, uses / count


def cold_read_s(bundle: Path, count: int, seed: int) -> tuple[float, int]:
    """Return the mean seconds of one record read cold, and its bytes."""
    with DecoderSession.from_bundle(bundle, Settings(cache_bytes=1 << 26, threads=1)) as session:
        records = [one.record for one in session.store.experts.values()]
    rng = np.random.default_rng(seed)
    buffer = mmap.mmap(-1, max(one.size_bytes for one in records))
    view = memoryview(buffer)
    seconds = []
    for index in rng.permutation(len(records))[:count]:
        record = records[int(index)]
        fd = os.open(record.file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        start = time.perf_counter()
        left, place = record.size_bytes, 0
        while left > 0:
            got = os.preadv(fd, [view[place : place + left]], record.offset + place)
            left, place = left - got, place + got
        seconds.append(time.perf_counter() - start)
        os.close(fd)
    return statistics.mean(seconds), records[0].size_bytes


def start_s(bundle: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        line = [
            sys.executable,
            "-m",
            "edgeflex",
            "run",
            str(bundle.resolve()),
            "--prompt",
            "The",
            "--max-tokens",
            "1",
            "-q",
        ]
        start = time.perf_counter()
        subprocess.run(line, check=True, capture_output=True, cwd=folder)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--small", type=Path, help="a small trained decoder, for the start")
    parser.add_argument("--share", type=float, default=0.3, help="of the experts' bytes that the small cache holds")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with DecoderSession.from_bundle(arguments.bundle, Settings(cache_bytes=1 << 26, threads=1)) as session:
        everything = int(session.store.sizes.sum())
    small, whole, reads = [], [], []
    for number in range(arguments.rounds):
        for which in ("small", "read", "whole", "whole", "read", "small"):
            if which == "read":
                reads.append(cold_read_s(arguments.bundle, 100, len(reads)))
            else:
                cache = everything if which == "whole" else int(arguments.share * everything)
                (whole if which == "whole" else small).append(decoded(arguments.bundle, cache, arguments.tokens))
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
    read_s, record_bytes = statistics.median(one[0] for one in reads), reads[0][1]
    misses = statistics.median(one[2] for one in small)
    resident_s = statistics.median(one[0] for one in whole)
    miss_s = (statistics.median(one[0] for one in small) - resident_s) / misses
    print(
        f"expert: {record_bytes / 1e6:.2f} MB; cold read {read_s * 1e3:.2f} ms, {record_bytes / read_s / 1e6:.0f} MB/s"
    )
    print(f"miss: {miss_s * 1e3:.2f} ms at {misses:.1f} misses a token: {miss_s / read_s:.2f} of the cold read")
    if arguments.small:
        times = [start_s(arguments.small) for _ in range(7)]
        print(f"start to first token: median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f} s")
        total, native, missed, uses = decoded(arguments.small, 1 << 40, 400)
        print(
            f"hit, small decoder with all experts in memory ({missed:.2f} misses a token left): at most "
            f"{(total - native) / uses * 1e6:.1f} us an expert beside its kernels (attention, norms and loop included)"
        )


if __name__ == "__main__":
    main()
