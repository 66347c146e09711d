"""A decoder whose experts do not fit the GPU: tokens per second by how misses are dealt with; one table.

    python benchmarks/cuda_experts.py --folder /tmp/experts -o table.json

Writes a bundle of OLMoE-1B-7B's shape with random numbers (int4 in groups of 32; fewer layers by default, so that the
whole takes under ten minutes), then decodes the same tokens, forced, in one process per line. Lines: everything on the
GPU; for shares of the experts on the GPU the quickest mix, upload only (LRU), and a fixed placement; all experts on the
processor; and transformers with accelerate's offload of the same shape in bf16, in the same bytes of GPU memory.

Columns: tokens/s (median of the decoded tokens' times); MiB/token over the link; hits on the GPU; share of the copies'
time that did not make a token longer than with everything resident; share of the time bound, which no policy can beat
on the measured curves, dense parts taken as free; peak of the GPU's memory and what was planned for it. Nothing runs
without a GPU; it says so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.schema import Choice, FileEntry, Interval, Precision
from edgeflex.schema_moe import (
    Attention,
    DecoderBudget,
    DecoderGraph,
    DecoderLayer,
    DecoderManifest,
    DecoderMemory,
    DecoderPlan,
    DecoderPrediction,
    MatrixRecord,
    Routing,
)

MIB = 1 << 20
ALL = 1 << 42
HIDDEN, INNER, EXPERTS, TOP_K, HEADS, VOCABULARY = 2048, 1024, 64, 8, 16, 50304
SKEW = 0.25  # spread of the routers' row lengths: some experts are used more than others
SHARES = (0.1, 0.25, 0.5, 0.75)
LIMIT_S = 240


# --- the bundle ----------------------------------------------------------------------------------------


def graph_of(layers: int) -> DecoderGraph:
    head = HIDDEN // HEADS
    return DecoderGraph(
        name="random-olmoe",
        family="olmoe",
        weights_digest="0" * 64,
        hidden_dim=HIDDEN,
        vocabulary=VOCABULARY,
        layers=tuple(
            DecoderLayer(index=index, routing=Routing(experts=EXPERTS, top_k=TOP_K, normalised=False), expert_dim=INNER)
            for index in range(layers)
        ),
        attention=Attention(
            heads=HEADS,
            kv_heads=HEADS,
            head_dim=head,
            value_dim=head,
            rotary_dim=head,
            query_key_norm="projection",
            inverse_frequencies=tuple(10000.0 ** (-2 * i / head) for i in range(head // 2)),
            softmax_scale=head**-0.5,
        ),
        norm_epsilon=1e-5,
        tied_embedding=False,
        context_tokens=1024,
    )


def plan_of(graph: DecoderGraph) -> DecoderPlan:
    nothing = Interval(value=1.0, low=0.0, high=1.0)
    memory = DecoderMemory(dense_bytes=0, cache_bytes=0, kv_bytes=0, activations_bytes=0, runtime_bytes=0)
    promised = DecoderPrediction(
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
        graph_digest=graph.digest(),
        budget=DecoderBudget(),
        verdict="offload",
        reasons=("a benchmark",),
        choices=(Choice(subject="embedding", option="int4-group32"),),
        cache_bytes=ALL,
        cycle_bytes=0,
        context_tokens=1024,
        prefill_chunk_tokens=64,
        predicted=promised,
    )


class Writer:
    """Files of raw matrices, each piece at a multiple of 64, each file a multiple of 4096."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[FileEntry] = []
        self.matrices: list[MatrixRecord] = []
        self._draw = np.random.default_rng(0)

    def write(self, path: str, members: list[tuple[str, Precision, int, int, float]]) -> None:
        raw = bytearray()
        for name, precision, rows, columns, scale in members:
            raw += bytes(-len(raw) % 64)
            offset = len(raw)
            raw += self._codes(name, precision, rows, columns, scale)
            place = None
            if precision is Precision.INT4_GROUP32:
                raw += bytes(-len(raw) % 64)
                place = len(raw)
                # uniform codes of -8 to 7 have a deviation of 4.6
                bits = (np.float32([scale / 4.6]).view(np.uint32) >> 16).astype(np.uint16)
                raw += np.repeat(bits, rows * columns // 32).tobytes()
            self.matrices.append(
                MatrixRecord(
                    name=name,
                    precision=precision,
                    rows=rows,
                    columns=columns,
                    file=path,
                    offset=offset,
                    scales_offset=place,
                )
            )
        raw += bytes(-len(raw) % 4096)
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(raw)
        self.files.append(FileEntry(path=path, role=path, size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()))

    def _codes(self, name: str, precision: Precision, rows: int, columns: int, scale: float) -> bytes:
        if precision is Precision.INT4_GROUP32:
            return self._draw.bytes(rows * columns // 2)
        if name.endswith("norm"):
            return np.ones(rows * columns, np.float32).tobytes()
        lengths = np.exp(SKEW * self._draw.standard_normal((rows, 1)))
        return (lengths * scale * self._draw.standard_normal((rows, columns))).astype(np.float32).tobytes()


def write_bundle(folder: Path, layers: int) -> None:
    """Write the bundle; a marker says that all of it is there."""
    shutil.rmtree(folder, ignore_errors=True)
    graph, out, int4, fp32 = graph_of(layers), Writer(folder), Precision.INT4_GROUP32, Precision.FP32
    unit = HIDDEN**-0.5
    out.write("embedding.bin", [("embedding", int4, VOCABULARY, HIDDEN, 1.0)])
    out.write("head.bin", [("head", int4, VOCABULARY, HIDDEN, 2 * unit), ("norm", fp32, 1, HIDDEN, 1.0)])
    for layer in range(layers):
        start = f"layers.{layer}"
        norms = [(f"{start}.{name}", fp32, 1, HIDDEN, 1.0) for name in ("input_norm", "post_norm", "q_norm", "k_norm")]
        rest = [
            (f"{start}.qkv", int4, 3 * HIDDEN, HIDDEN, unit),
            (f"{start}.o", int4, HIDDEN, HIDDEN, unit),
            (f"{start}.router", fp32, EXPERTS, HIDDEN, 2 * unit),
        ]
        out.write(f"{start}/dense.bin", norms + rest)
        for expert in range(EXPERTS):
            name = f"{start}.experts.{expert}"
            pair = [
                (f"{name}.gate_up", int4, 2 * INNER, HIDDEN, unit),
                (f"{name}.down", int4, HIDDEN, INNER, 3 * INNER**-0.5),
            ]
            out.write(f"{start}/expert-{expert}.bin", pair)
    manifest = DecoderManifest(
        versions={}, graph=graph, plan=plan_of(graph), matrices=tuple(out.matrices), files=tuple(out.files)
    )
    (folder / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1) + "\n")


# --- one line, in a process of its own -----------------------------------------------------------------


def forced(tokens: list[int]):
    """Return a sampler that says these tokens whatever the logits are."""
    left = iter(tokens)
    return lambda _row: next(left)


def tokens_of(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, count).tolist()


def run_device(options: argparse.Namespace) -> dict[str, object]:
    """Decode on the device with one rule and one share of the experts there."""
    import torch

    from edgeflex.runtimes.tier_bounds import time_bound_s

    fixed = fixed_bytes(options.bundle, options.device)
    experts = sum(one.stat().st_size for one in options.bundle.glob("layers.*/expert-*.bin"))
    vram = fixed + int(options.share * experts)
    chosen = Settings(
        cache_bytes=options.ram or ALL,
        policy={"static": "static", "upload": "lru"}.get(options.rule),
        static=popular(options) if options.rule == "static" else None,
        threads=options.threads,
        record=True,
        device=options.device,
        vram_bytes=vram,
        device_rule=options.rule,
    )
    prompt, said = tokens_of(options.prompt, 1), tokens_of(options.tokens, 2)
    with DecoderSession.from_bundle(options.bundle, chosen) as session:
        list(session.generate(prompt, options.tokens, forced(said)))  # warms tiers and kernels
        before = session.device_stats()
        list(session.generate(prompt, options.tokens, forced(said)))
        stats, after = session.stats(), session.device_stats()
        trace, sizes, curves = session.trace(), session.store.sizes, session_curves(session)
    moved = after.decoding.upload_bytes - before.decoding.upload_bytes + after.divided_bytes - before.divided_bytes
    token_s = statistics.median(one.total_s for one in stats.times)
    kinds = dict.fromkeys(zip(*np.nonzero(sizes), strict=True), "int4-group32")
    bound_s = time_bound_s(
        trace,
        curves,
        after.vram_bytes + after.staged_bytes,
        after.ram_bytes,
        sizes=sizes,
        kind_of=lambda layer, expert: kinds[layer, expert],
    )
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    hits = after.decoding.gpu_hits - before.decoding.gpu_hits
    return {
        "token_s": token_s,
        "first_token_s": stats.first_token_s,
        "moved_bytes": moved / options.tokens,
        "hit_rate": hits / max(1, after.decoding.lookups - before.decoding.lookups),
        "host_experts": (after.host_experts - before.host_experts) / options.tokens,
        "upload_s": (after.upload_s - before.upload_s) / options.tokens,
        "bound_s": bound_s,
        "peak_bytes": peak,
        "planned_bytes": vram,
        "pinned": after.pinned,
        "errors": {name: error.mean_error for name, error in after.errors.items() if error.samples},
        "uses": (after.decoding.lookups - before.decoding.lookups) / options.tokens,
    }


def fixed_bytes(bundle: Path, device: str) -> int:
    import torch

    from edgeflex.bundle_moe import open_decoder_bundle
    from edgeflex.runtimes.cuda_memory import device_bytes
    from edgeflex.runtimes.cuda_streams import CUDA_LIBRARY_BYTES
    from edgeflex.runtimes.cuda_weights import open_experts

    manifest = open_decoder_bundle(bundle).manifest
    _, kinds = open_experts(bundle, manifest)
    plan, cuda = manifest.plan, device == "cuda"
    sizes = {"context_tokens": plan.context_tokens, "chunk_tokens": plan.prefill_chunk_tokens}
    dtype = torch.bfloat16 if cuda else torch.float32
    return device_bytes(manifest, kinds, dtype, library_bytes=CUDA_LIBRARY_BYTES if cuda else 0, **sizes).total


def session_curves(session: DecoderSession):
    return session._experts._refit.curves


def popular(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return experts by their uses on other tokens than those that are timed."""
    chosen = Settings(cache_bytes=ALL, record=True, device=options.device, device_rule="upload")
    with DecoderSession.from_bundle(options.bundle, chosen) as session:
        list(session.generate(tokens_of(options.prompt, 3), options.tokens, forced(tokens_of(options.tokens, 4))))
        uses = np.array(session.stats().expert_uses)
    order = np.argsort(-uses, axis=None, kind="stable")
    return [divmod(int(key), uses.shape[1]) for key in order]


def run_processor(options: argparse.Namespace) -> dict[str, object]:
    """Decode with the processor alone: ExecuTorch's kernels."""
    chosen = Settings(cache_bytes=ALL, threads=options.threads)
    with DecoderSession.from_bundle(options.bundle, chosen) as session:
        for _ in range(2):
            list(session.generate(tokens_of(options.prompt, 1), options.tokens, forced(tokens_of(options.tokens, 2))))
        stats = session.stats()
    return {
        "token_s": statistics.median(one.total_s for one in stats.times),
        "first_token_s": stats.first_token_s,
    }


def run_accelerate(options: argparse.Namespace) -> dict[str, object]:
    """Decode with transformers, what does not fit the same bytes of GPU memory offloaded by accelerate."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map
    from transformers import OlmoeConfig, OlmoeForCausalLM

    graph = graph_of(options.layers)
    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=len(graph.layers),
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e-3)
        for name, buffer in model.named_buffers():
            buffer.copy_(10000.0 ** (-torch.arange(len(buffer)) / len(buffer)) if "inv_freq" in name else buffer)
    experts = sum(one.stat().st_size for one in options.bundle.glob("layers.*/expert-*.bin"))
    budget = fixed_bytes(options.bundle, "cuda") + int(options.share * experts)
    places = infer_auto_device_map(
        model, max_memory={0: budget, "cpu": 1 << 40}, no_split_module_classes=["OlmoeDecoderLayer"]
    )
    model = dispatch_model(model, device_map=places)
    ids = torch.tensor([tokens_of(options.prompt, 1)], device="cuda")
    count = min(options.tokens, 16)
    times, past = [], None
    with torch.inference_mode():
        for token in [None, *tokens_of(count, 2)]:
            given = ids if token is None else torch.tensor([[token]], device="cuda")
            start = time.perf_counter()
            out = model(input_ids=given, past_key_values=past, use_cache=True)
            out.logits[0, -1].float().cpu()
            times.append(time.perf_counter() - start)
            past = out.past_key_values
    return {
        "token_s": statistics.median(times[1:]),
        "first_token_s": times[0],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "planned_bytes": budget,
        "note": f"{sum(place == 0 for place in places.values())} of {len(places)} modules on the GPU, bf16",
    }


LINES = {"device": run_device, "processor": run_processor, "accelerate": run_accelerate}


# --- the table -----------------------------------------------------------------------------------------


def lines_of(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    lines = [("all resident", ["device", "--rule", "upload", "--share", "1.0"])]
    for share in options.shares:
        for rule, name in (("auto", "quickest mix"), ("upload", "upload only"), ("static", "fixed placement")):
            lines.append((f"{name}, {share:.0%} on the GPU", ["device", "--rule", rule, "--share", str(share)]))
    lines.append(
        ("dense on the GPU, experts on the processor", ["device", "--rule", "cpu", "--share", str(options.shares[0])])
    )
    lines.append(("all on the processor", ["processor"]))
    lines.append(
        (f"transformers + accelerate, {options.shares[1]:.0%}", ["accelerate", "--share", str(options.shares[1])])
    )
    return lines


def asked(options: argparse.Namespace, arguments: list[str]) -> dict[str, object]:
    """Run one line in a process of its own and return its figures, or why there are none."""
    kept = ["--folder", str(options.folder), "--layers", str(options.layers), "--tokens", str(options.tokens)]
    kept += ["--prompt", str(options.prompt), "--threads", str(options.threads), "--device", options.device]
    kept += ["--ram", str(options.ram)]
    command = [sys.executable, __file__, "--line", *arguments, *kept]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"why": f"did not end in {LIMIT_S} s"}
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["no reason"])[-1][:110]}
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def shown(name: str, found: dict[str, object], resident_s: float | None) -> str:
    if "token_s" not in found:
        return f"{name:<46} {found.get('why', '')}"
    token_s = found["token_s"]
    cells = [f"{name:<46}", f"{1 / token_s:8.1f}"]
    if "moved_bytes" in found:
        copied = found["upload_s"]
        late = max(0.0, token_s - (resident_s or token_s))
        hidden = f"{max(0.0, 1 - late / copied):7.0%}" if copied > 0 and resident_s else "      –"
        cells += [
            f"{found['moved_bytes'] / MIB:8.1f}",
            f"{found['hit_rate']:6.1%}",
            f"{found['host_experts']:7.1f}",
            hidden,
        ]
        cells.append(f"{found['bound_s'] / token_s:7.0%}")
    else:
        cells += [f"{'–':>8}", f"{'–':>6}", f"{'–':>7}", f"{'–':>7}", f"{'–':>7}"]
    if found.get("planned_bytes"):
        cells.append(f"{found['peak_bytes'] / MIB:8.0f} {found['planned_bytes'] / MIB:8.0f}")
    cells.append(str(found.get("note", "")))
    return " ".join(cells)


def machine(device: str) -> str:
    text = f"{platform.machine()}, {os.cpu_count()} cores"
    if device == "cuda":
        import torch

        text = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {text}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/edgeflex-cuda-experts"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--ram", type=int, default=0, help="bytes of the RAM tier; 0 holds every expert")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--device", choices=("cuda", "cpu-torch"), default="cuda")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--line", choices=LINES, help=argparse.SUPPRESS)
    parser.add_argument("--rule", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.bundle = options.folder / "bundle"
    if options.line:
        print(json.dumps(LINES[options.line](options)))
        return 0
    if options.device == "cuda" and not has_cuda():
        print("skipped: PyTorch reaches no CUDA device here; nothing was measured")
        return 0
    start = time.monotonic()
    write_bundle(options.bundle, options.layers)
    print(f"{machine(options.device)}; {options.layers} layers of {EXPERTS} experts, {TOP_K} a token, int4;")
    print(
        f"written in {time.monotonic() - start:.0f} s; {options.tokens} tokens after {options.prompt}, "
        f"{options.threads} threads\n"
    )
    titles = ("tokens/s", "MiB/tok", "hits", "on CPU", "hidden", "bound", "peak MiB", "planned")
    print(
        f"{'':<46} "
        + " ".join(title.rjust(width) for title, width in zip(titles, (8, 8, 6, 7, 7, 7, 8, 8), strict=True))
    )
    found: dict[str, dict[str, object]] = {}
    resident_s: float | None = None
    for name, arguments in lines_of(options):
        found[name] = asked(options, arguments)
        if name == "all resident" and "token_s" in found[name]:
            resident_s = float(str(found[name]["token_s"]))
        print(shown(name, found[name], resident_s), flush=True)
    print(f"\n{time.monotonic() - start:.0f} s in all")
    if options.output:
        body = {"machine": machine(options.device), "lines": found, "layers": options.layers, "tokens": options.tokens}
        options.output.write_text(json.dumps(body, indent=1) + "\n")
    return 0


def has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


if __name__ == "__main__":
    raise SystemExit(main())
