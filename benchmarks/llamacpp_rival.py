"""Decode and read prompts with llama.cpp and with edgeflex, in turns, on the same numbers; and under a kernel limit.

python benchmarks/llamacpp_rival.py build --folder /tmp/llama
python benchmarks/llamacpp_rival.py export --model /tmp/olmoe --bundle /tmp/olmoe.bundle
python benchmarks/llamacpp_rival.py compare --llama-bench /tmp/llama/build/bin/llama-bench \
    --gguf /tmp/olmoe.gguf --bundle /tmp/olmoe.bundle --threads 1 2
python benchmarks/llamacpp_rival.py limited --llama-bench ... --gguf ... --bundle ... --shares 0.5 0.25

`build` takes llama.cpp from the source distribution of llama-cpp-python (a C++ compiler and cmake are needed) and
builds llama-bench, Release, for this processor. The GGUF is that of `decoder_checkpoint.py --gguf`; the bundle is
edgeflex's export of the checkpoint beside it, int4 in groups of 32. Every measurement is a process of its own,
pinned to the first cores of `--cores`; the order is A B B A, figures are medians. The floor is what memory gives:
bytes that one token needs over the rate of a read loop between the rounds. `limited` puts each process alone into
a memory cgroup whose limit is a share of the GGUF's size (root is needed), with nothing of its files in the page
cache; llama.cpp maps its file there and does not repack, since a repacked copy would not fit.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from typing_extensions import Self

from edgeflex.profiles.probe import memory_read

_CGROUP = Path("/sys/fs/cgroup")
_EVERYTHING = 1 << 60
_OVERHEAD_BYTES = 140 << 20  # interpreter, NumPy, engine and activations, with room: the cache gets what is left
_KV_BYTES = 4


# --- building -----------------------------------------------------------------------------------------


def build(folder: Path, jobs: int) -> Path:
    """Download, unpack and build; return the path of llama-bench."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("cmake") is None:
        raise SystemExit("cmake is not installed; llama.cpp cannot be built here")
    if not list(folder.glob("llama_cpp_python-*.tar.gz")):
        # metadata alone is built by pip; its build tools come from the package index as well
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "llama-cpp-python"]
        subprocess.run([*download, "-d", str(folder)], check=True)
    archive = next(iter(sorted(folder.glob("llama_cpp_python-*.tar.gz"))))
    source = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    if not source.is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    out = folder / "build"
    options = ["BUILD_SHARED_LIBS=OFF", "GGML_NATIVE=ON", "CMAKE_BUILD_TYPE=Release"]
    options += [
        f"LLAMA_{name}=OFF" for name in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "OPENSSL")
    ]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(["cmake", *generator, "-S", source, "-B", out, *(f"-D{one}" for one in options)], check=True)
    subprocess.run(["cmake", "--build", out, "--target", "llama-bench", "-j", str(jobs)], check=True)
    return out / "bin" / "llama-bench"


def uniform_plan(source, context: int):
    """Return a plan with int4 everywhere and a cache for all experts; its promise is not looked at here."""
    from edgeflex.schema import Choice, Interval, Precision
    from edgeflex.schema_moe import DecoderBudget, DecoderMemory, DecoderPlan, DecoderPrediction

    units = ["embedding", "head"]
    for layer in source.graph.layers:
        units.append(f"layers.{layer.index}")
        units += [f"layers.{layer.index}.experts.{expert}" for expert in range(layer.routing.experts)]
    nothing = Interval(value=1.0, low=0.0, high=1.0)
    memory = DecoderMemory(dense_bytes=0, cache_bytes=0, kv_bytes=0, activations_bytes=0, runtime_bytes=0)
    prediction = DecoderPrediction(
        token_s=nothing,
        first_token_s=nothing,
        memory=memory,
        disk_bytes=0,
        kl=0.0,
        hit_rate=0.0,
        bytes_per_token=0.0,
        bound_token_s=0.0,
    )
    return DecoderPlan(
        graph_digest=source.graph.digest(),
        budget=DecoderBudget(),
        verdict="fits",
        reasons=("one precision everywhere, for a comparison of speed",),
        choices=tuple(Choice(subject=unit, option=Precision.INT4_GROUP32.value) for unit in units),
        cache_bytes=_EVERYTHING,
        cycle_bytes=0,
        context_tokens=context,
        prefill_chunk_tokens=256,
        predicted=prediction,
    )


def export(options: argparse.Namespace) -> None:
    """Write a bundle of a checkpoint in int4 throughout, without calibrating and without stock programs."""
    from edgeflex.exporters.decoder import export_decoder
    from edgeflex.models.decoders import open_decoder

    start = time.monotonic()
    source = open_decoder(options.model)
    export_decoder(source, uniform_plan(source, options.context), options.bundle, stock=False, overwrite=True)
    size = sum(one.stat().st_size for one in options.bundle.rglob("*") if one.is_file())
    print(f"{size / 1e9:.2f} GB in {options.bundle} after {time.monotonic() - start:.0f} s")


# --- one measurement, in a process of its own ---------------------------------------------------------


def pin(cores: list[int]) -> None:
    """Keep this process on ``cores``."""
    os.sched_setaffinity(0, cores)


def run_pinned(command: list[str], cores: list[int], *, group: Path | None = None, timeout_s: float | None = None):
    """Run a command on ``cores``, inside a memory cgroup where one is given; None if the time ran out."""

    def enter() -> None:
        pin(cores)
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    # the folder of this repository is found from the child as well
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "OMP_NUM_THREADS": str(len(cores)),
    }
    try:
        return subprocess.run(
            command, preexec_fn=enter, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return None


def llama_command(options: argparse.Namespace, threads: int, *more: str) -> list[str]:
    """Return the command line of llama-bench."""
    return [str(options.llama_bench), "-m", str(options.gguf), "-t", str(threads), "-o", "json", "-ngl", "0", *more]


def llama_rates(options: argparse.Namespace, threads: int, cores: list[int]) -> dict[str, float]:
    """Return tokens per second of decoding and of reading a prompt: llama-bench's own samples, medians."""
    more = ("-p", str(options.prompt), "-n", str(options.decode), "-r", str(options.repeats))
    done = run_pinned(llama_command(options, threads, *more), cores)
    if done is None or done.returncode != 0:
        raise SystemExit(f"llama-bench failed:\n{done.stderr[-3000:] if done else 'no time left'}")
    found = {}
    for test in json.loads(done.stdout):
        found["decode" if test["n_gen"] else "prefill"] = statistics.median(test["samples_ts"])
    return found


def child_command(options: argparse.Namespace, threads: int, *more: str) -> list[str]:
    """Return the command line of edgeflex's side."""
    here = [sys.executable, str(Path(__file__).resolve()), "child", "--bundle", str(options.bundle)]
    sizes = ["--decode", str(options.decode), "--prompt", str(options.prompt), "--repeats", str(options.repeats)]
    return [*here, "--threads", str(threads), *sizes, *more]


def edgeflex_result(options: argparse.Namespace, threads: int, cores: list[int], *more: str, group: Path | None = None):
    """Return what the child printed."""
    done = run_pinned(child_command(options, threads, *more), cores, group=group)
    if done is None or done.returncode != 0:
        raise SystemExit(
            f"edgeflex's process ended with {done.returncode if done else '?'}:\n{done.stderr[-3000:] if done else ''}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace) -> None:
    """Generate with edgeflex and print rates, misses and memory as one line of JSON."""
    from edgeflex.runtimes.decoder import DecoderSession
    from edgeflex.runtimes.decoder_settings import Settings

    limited = options.cache_bytes is not None
    context = options.prompt + options.decode + 8
    settings = Settings(
        cache_bytes=options.cache_bytes if limited else _EVERYTHING,
        threads=options.threads,
        context_tokens=context,
        policy=options.policy,
    )
    rng = random.Random(0)
    with DecoderSession.from_bundle(options.bundle, settings) as session:
        vocabulary = session.manifest.graph.vocabulary

        def prompt(count: int) -> list[int]:
            return [rng.randrange(1, vocabulary - 1) for _ in range(count)]

        if not limited:
            fill(session, prompt, options.prompt or options.decode)
        decode, prefill, misses, read_bytes, seconds = [], [], 0, 0, 0.0
        while len(decode) < options.repeats:
            if options.prompt and not limited:
                list(session.generate(prompt(options.prompt), 1))
                clean = session.stats()
                prefill += [] if clean.cache.misses else [options.prompt / clean.first_token_s]
            list(session.generate(prompt(1), options.decode + 1))
            stats = session.stats()
            if stats.cache.misses and not limited:
                continue  # an expert that no prompt had used yet; from now on it is in memory
            spent = sum(one.total_s for one in stats.times)
            decode.append(len(stats.times) / spent)
            misses, read_bytes = misses + stats.cache.decode_misses, read_bytes + stats.cache.decode_read_bytes
            seconds += spent
        found = {
            "decode": statistics.median(decode),
            "prefill": statistics.median(prefill) if prefill else None,
            "misses": misses,
            "read_bytes": read_bytes,
            "seconds": seconds,
            "cache_bytes": session.cache_bytes,
            "anonymous_bytes": anonymous_bytes(),
            "read_bytes_per_s": expert_read_rate(session.store) if limited else None,
        }
    print(json.dumps(found))


def fill(session, prompt, tokens: int) -> None:
    """Read prompts until three in a row miss nothing: then every expert that is used lies in memory."""
    clean = 0
    for _ in range(300):
        list(session.generate(prompt(tokens), 1))
        clean = clean + 1 if session.stats().cache.misses == 0 else 0
        if clean == 3:
            return
    raise SystemExit("experts were still missing after 300 prompts")


def anonymous_bytes() -> int:
    """Return this process's resident memory without pages of files; it only grows while a session is open."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


def expert_read_rate(store, *, count: int = 96, in_flight: int = 4) -> float:
    """Return bytes per second of reading random experts around the page cache, as many at once as the runtime."""
    records = [expert.record for expert in store.experts.values()]
    chosen = random.Random(1).choices(records, k=count)
    files = {record.file: os.open(record.file, os.O_RDONLY | getattr(os, "O_DIRECT", 0)) for record in chosen}
    buffers = [mmap.mmap(-1, max(record.size_bytes for record in chosen)) for _ in range(in_flight)]

    def read(job) -> int:
        record, buffer = job
        done = 0
        while done < record.size_bytes:
            view = memoryview(buffer)[done : record.size_bytes]
            done += os.preadv(files[record.file], [view], record.offset + done)
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        # each worker keeps to its own buffer
        lanes = [[(record, buffers[lane]) for record in chosen[lane::in_flight]] for lane in range(in_flight)]
        total = sum(pool.map(lambda lane: sum(map(read, lane)), lanes))
    elapsed = time.perf_counter() - start
    for descriptor in files.values():
        os.close(descriptor)
    return total / elapsed


# --- tables -------------------------------------------------------------------------------------------


def token_bytes(bundle: Path) -> float:
    """Return the bytes of weights that one decoded token reads, as stored (scales included)."""
    from edgeflex.runtimes.decoder import DecoderSession

    manifest = DecoderSession.from_bundle(bundle).manifest
    routing = {layer.index: layer.routing for layer in manifest.graph.layers}
    total = 0.0
    for matrix in manifest.matrices:
        size = matrix.weights_bytes + matrix.scales_bytes
        parts = matrix.name.split(".")
        if "experts" in parts:
            chosen = routing[int(parts[1])]
            total += size * chosen.top_k / chosen.experts
        elif matrix.name != "embedding":
            total += size
    return total


def compare(options: argparse.Namespace) -> None:
    """Measure in turns A B B A and print one table."""
    needed = token_bytes(options.bundle)
    print(f"one token reads {needed / 1e6:.0f} MB of weights; load average before: {os.getloadavg()[0]:.2f}")
    rows = []
    for threads in options.threads:
        cores = options.cores[:threads]
        if len(cores) < threads:
            raise SystemExit(f"{threads} threads need {threads} cores; --cores names {options.cores}")
        pin(cores)
        ours, theirs, memory = [], [], []
        for _ in range(options.rounds):
            for side in (theirs, ours, ours, theirs):
                memory.append(memory_read(threads, passes=5).value)
                side.append((llama_rates if side is theirs else edgeflex_result)(options, threads, cores))
        floor = statistics.median(memory) / needed
        rows += table_rows(threads, theirs, ours, floor)
        if options.json:
            print(json.dumps({"threads": threads, "llama": theirs, "edgeflex": ours, "memory": memory}))
    print(f"{'threads':>7} {'what':<22} {'llama.cpp':>10} {'edgeflex':>10} {'ratio':>6} {'floor':>7} {'share':>6}")
    for row in rows:
        print(row)
    print(f"tokens/s, medians of {2 * options.rounds} processes × {options.repeats} each; cores {options.cores}; "
          f"load average after: {os.getloadavg()[0]:.2f}")  # fmt: skip


def table_rows(threads: int, theirs: list[dict], ours: list[dict], floor: float) -> list[str]:
    """Return the lines of one number of threads."""
    rows = []
    for what, key in (("decode", "decode"), ("prefill", "prefill")):
        a = statistics.median(one[key] for one in theirs)
        b = statistics.median(one[key] for one in ours)
        bound = f"{floor:7.1f} {b / floor:6.0%}" if key == "decode" else f"{'':>7} {'':>6}"
        rows.append(f"{threads:>7} {what:<22} {a:>10.2f} {b:>10.2f} {b / a:>6.2f} {bound}")
    return rows


# --- under a limit of the kernel ----------------------------------------------------------------------


class MemoryGroup:
    """A memory cgroup with a limit, version 1 or 2; removed at the end."""

    def __init__(self, limit_bytes: int) -> None:
        first = _CGROUP / "memory"
        controllers = _CGROUP / "cgroup.controllers"
        if first.is_dir():
            self.path, limit, self._peak = (
                first / f"edgeflex-{os.getpid()}",
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
            )
        elif controllers.exists() and "memory" in controllers.read_text().split():
            self.path, limit, self._peak = _CGROUP / f"edgeflex-{os.getpid()}", "memory.max", "memory.peak"
        else:
            raise SystemExit("no memory cgroup is mounted here; a limit by the kernel cannot be set")
        try:
            self.path.mkdir(exist_ok=True)
            (self.path / limit).write_text(str(limit_bytes))
        except OSError as error:
            raise SystemExit(f"{self.path}: {error.strerror}; this needs root and a writable cgroup") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for _ in range(50):
            try:
                self.path.rmdir()
            except OSError:  # noqa: PERF203
                time.sleep(0.1)  # a killed process takes a moment to leave
            else:
                return

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes charged, the page cache included."""
        file = self.path / self._peak
        return int(file.read_text()) if file.exists() else None

    @property
    def kills(self) -> int:
        """How many processes the kernel killed here for memory."""
        for name in ("memory.oom_control", "memory.events"):
            if (self.path / name).exists():
                fields = dict(line.split() for line in (self.path / name).read_text().splitlines())
                return int(fields.get("oom_kill", 0))
        return 0


def forget(*paths: Path) -> None:
    """Drop files from the page cache, so that whoever reads them pays for them."""
    for path in paths:
        for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def cache_within(bundle: Path, limit_bytes: int, context: int) -> int:
    """Return what an expert cache may take of ``limit_bytes``: the rest after dense weights and overhead."""
    from edgeflex.runtimes.decoder import DecoderSession

    manifest = DecoderSession.from_bundle(bundle).manifest
    dense = sum(one.weights_bytes + one.scales_bytes for one in manifest.matrices if ".experts." not in one.name)
    heads = manifest.graph.attention
    kv = context * len(manifest.graph.layers) * heads.kv_heads * (heads.head_dim + heads.value_dim) * _KV_BYTES
    left = limit_bytes - dense - kv - _OVERHEAD_BYTES
    if left <= 0:
        raise SystemExit(f"a limit of {limit_bytes} bytes leaves nothing for experts ({dense} bytes are dense)")
    return left


def limited(options: argparse.Namespace) -> None:
    """Print rates of both under limits of the kernel."""
    size, threads = options.gguf.stat().st_size, options.threads[0]
    cores = options.cores[:threads]
    whole = str(cache_within(options.bundle, size, 512))
    edgeflex_result(options, threads, cores, "--cache-bytes", whole)  # packs, once, before any limit
    heads = ("share", "limit MB", "llama.cpp", "edgeflex", "ratio", "bound", "reads MB/s", "anonymous MB", "charged MB")
    print(" ".join(f"{head:>16}" if head == "llama.cpp" else f"{head:>12}" for head in (*heads, "kills")))
    for share in options.shares:
        limit = int(share * size)
        forget(options.gguf, options.bundle)
        with MemoryGroup(limit) as group:
            theirs, said = limited_llama(options, threads, cores, group)
        forget(options.gguf, options.bundle)
        with MemoryGroup(limit) as group:
            context = options.prompt + options.decode + 8
            more = ("--cache-bytes", str(cache_within(options.bundle, limit, context)))
            ours = edgeflex_result(options, threads, cores, *more, group=group.path)
            charged, kills = group.peak_bytes or 0, group.kills
        bound = ours["read_bytes"] / ours["read_bytes_per_s"] / ours["seconds"]
        cells = [f"{share:.0%}", f"{limit / 1e6:.0f}", said, f"{ours['decode']:.2f}", f"{ours['decode'] / theirs:.0f}x"]
        cells += [f"{bound:.0%}", f"{ours['read_bytes_per_s'] / 1e6:.0f}", f"{ours['anonymous_bytes'] / 1e6:.0f}"]
        cells += [f"{charged / 1e6:.0f}", str(kills)]
        print(" ".join(f"{cell:>16}" if index == 2 else f"{cell:>12}" for index, cell in enumerate(cells)), flush=True)
    print(f"decoded tokens/s with {threads} thread(s) on cores {cores}. bound: seconds of reading the missed bytes at")
    print("the measured rate over seconds of decoding. ratio: at least, where llama.cpp printed no rate.")


def limited_llama(options: argparse.Namespace, threads: int, cores: list[int], group: MemoryGroup) -> tuple[float, str]:
    """Return llama.cpp's rate (or what it stayed below) and how the table says it."""
    more = (
        "-p",
        "0",
        "-n",
        str(options.limited_decode),
        "-r",
        "1",
        "--no-warmup",
        "--load-mode",
        "mmap",
        "--repack",
        "0",
    )
    done = run_pinned(llama_command(options, threads, *more), cores, group=group.path, timeout_s=options.timeout_s)
    if done is None:
        most = options.limited_decode / options.timeout_s
        return most, f"<{most:.3f} ({options.timeout_s:.0f} s)"
    if done.returncode != 0:
        most = options.limited_decode / options.timeout_s
        return most, f"ended with {done.returncode}"
    rate = json.loads(done.stdout)[0]["avg_ts"]
    return rate, f"{rate:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    builder = modes.add_parser("build")
    builder.add_argument("--folder", type=Path, required=True)
    builder.add_argument("--jobs", type=int, default=1)
    exporter = modes.add_parser("export")
    exporter.add_argument("--model", type=Path, required=True)
    exporter.add_argument("--bundle", type=Path, required=True)
    exporter.add_argument("--context", type=int, default=512)
    for name in ("compare", "limited", "child"):
        mode = modes.add_parser(name)
        mode.add_argument("--bundle", type=Path, required=True)
        mode.add_argument("--decode", type=int, default=64)
        mode.add_argument("--prompt", type=int, default=256)
        mode.add_argument("--repeats", type=int, default=3)
        mode.add_argument("--policy", default=None)
        if name == "child":
            mode.add_argument("--threads", type=int, required=True)
            mode.add_argument("--cache-bytes", type=int)
            continue
        mode.add_argument("--llama-bench", type=Path, required=True)
        mode.add_argument("--gguf", type=Path, required=True)
        mode.add_argument("--threads", type=int, nargs="+", default=[1])
        mode.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)))
        mode.add_argument("--rounds", type=int, default=2, help="each is A B B A")
        mode.add_argument("--json", action="store_true", help="also print the raw figures")
        mode.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
        mode.add_argument("--timeout-s", type=float, default=250.0)
        mode.add_argument("--limited-decode", type=int, default=16)
    options = parser.parse_args()
    if options.mode == "build":
        print(build(options.folder, options.jobs))
    else:
        {"export": export, "compare": compare, "limited": limited, "child": child}[options.mode](options)


if __name__ == "__main__":
    main()
