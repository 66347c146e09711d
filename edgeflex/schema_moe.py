"""The nouns of mixture-of-experts decoders: graph, calibration, plan, manifest, statistics.

Units as in ``schema``. A *unit* of a decoder is what one precision is chosen for: the dense part of a layer
(``layers.3``), one expert (``layers.3.experts.17``), ``embedding`` or ``head``. A *matrix* is what one kernel
multiplies with, ``[rows, columns]`` = [outputs, inputs]; its name starts with its unit's:

    embedding  head
    layers.I.qkv  layers.I.o                      attention: query, key and value rows, stacked in this order
    layers.I.q  layers.I.kv_a  layers.I.kv_b      latent attention (DeepSeek-V2) instead of qkv; o follows
    layers.I.mlp.gate_up  layers.I.mlp.down       a dense layer's feed-forward; gate rows, then up rows
    layers.I.shared.gate_up  layers.I.shared.down the shared experts, one stacked feed-forward
    layers.I.experts.E.gate_up  layers.I.experts.E.down

Small tensors stay in fp32 and are named like matrices: ``layers.I.input_norm``, ``layers.I.post_norm``,
``layers.I.q_norm``, ``layers.I.k_norm``, ``layers.I.kv_norm``, ``layers.I.qkv_bias``, ``layers.I.router``
``[experts, hidden]``, ``layers.I.shared_gate`` ``[1, hidden]``, ``norm``.
"""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from edgeflex.schema import (
    Check,
    Choice,
    Conditions,
    Document,
    FileEntry,
    Grown,
    Interval,
    Noun,
    Precision,
    Proof,
)
from edgeflex.schema_gpu import DeviceRecord, GpuPlacement, HeldBytes

# What decoder kernels run here: fp32, int8 per output channel and int4 per group of 32, activations in 8 bits
# quantised per row while running.
DECODER_PRECISIONS = (Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32)

Family = Literal["olmoe", "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v2"]
PolicyName = str


class Attention(Noun):
    """How a decoder attends. Rotary dimensions are in half-split order (first half, second half).

    Args:
        kind: ``grouped`` (multi-head or grouped-query) or ``latent`` (DeepSeek-V2: keys and values from a
            compressed row of ``latent_dim`` plus ``rotary_dim`` shared key dimensions).
        head_dim: Of queries and keys; for ``latent`` it is ``head_dim - rotary_dim`` plain dimensions first,
            then the rotary ones.
        value_dim: Of values.
        query_key_norm: None, over the whole projection (OLMoE), or per head (Qwen3).
        inverse_frequencies: ``[rotary_dim / 2]``, scaling applied.
        rotary_scale: What cosine and sine are multiplied with (1 unless the scaling says otherwise).
        softmax_scale: What scores are multiplied with.
    """

    kind: Literal["grouped", "latent"] = "grouped"
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    latent_dim: int = 0
    query_key_norm: Literal["none", "projection", "head"] = "none"
    bias: bool = False
    inverse_frequencies: tuple[float, ...]
    rotary_scale: float = 1.0
    softmax_scale: float

    def matrix_shapes(self, hidden_dim: int) -> dict[str, tuple[int, int]]:
        """Return (rows, columns) of each of its matrices by name."""
        out = (hidden_dim, self.heads * self.value_dim)
        if self.kind == "grouped":
            rows = self.heads * self.head_dim + self.kv_heads * (self.head_dim + self.value_dim)
            return {"qkv": (rows, hidden_dim), "o": out}
        plain = self.head_dim - self.rotary_dim
        return {
            "q": (self.heads * self.head_dim, hidden_dim),
            "kv_a": (self.latent_dim + self.rotary_dim, hidden_dim),
            "kv_b": (self.heads * (plain + self.value_dim), self.latent_dim),
            "o": out,
        }


class Routing(Noun):
    """How tokens choose experts: softmax over all, the ``top_k`` largest, ties to the lower index.

    ``normalised``: the chosen weights are divided by their sum. ``scale``: then multiplied by this.
    """

    experts: int
    top_k: int
    normalised: bool
    scale: float = 1.0


class DecoderLayer(Noun):
    """One layer. ``routing`` is None for a dense layer, which then has ``dense_dim``.

    ``shared_dim`` is the inner width of the shared experts together (0: none); ``shared_gate``: their output is
    multiplied by the sigmoid of a learned product (Qwen2-MoE).
    """

    index: int
    routing: Routing | None
    expert_dim: int = 0
    dense_dim: int = 0
    shared_dim: int = 0
    shared_gate: bool = False


class DecoderGraph(Document):
    """A decoder as the planner and the runtime see it: pre-norm, SwiGLU, rotary positions, RMS norms."""

    name: str
    family: Family
    weights_digest: str
    hidden_dim: int
    vocabulary: int
    layers: tuple[DecoderLayer, ...]
    attention: Attention
    norm_epsilon: float
    tied_embedding: bool
    context_tokens: int
    begin_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (rows, columns) of every matrix by name; ``head`` also where it is tied."""
        shapes = {"embedding": (self.vocabulary, self.hidden_dim), "head": (self.vocabulary, self.hidden_dim)}
        for layer in self.layers:
            start = f"layers.{layer.index}."
            shapes |= {start + name: shape for name, shape in self.attention.matrix_shapes(self.hidden_dim).items()}
            widths = {"mlp": 0 if layer.routing else layer.dense_dim, "shared": layer.shared_dim}
            experts = layer.routing.experts if layer.routing else 0
            widths |= {f"experts.{expert}": layer.expert_dim for expert in range(experts)}
            for name, width in widths.items():
                if width:
                    shapes[f"{start}{name}.gate_up"] = (2 * width, self.hidden_dim)
                    shapes[f"{start}{name}.down"] = (self.hidden_dim, width)
        return shapes

    def small_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every small tensor by name."""
        one, hidden = self.attention, self.hidden_dim
        norms: dict[str, tuple[int, ...]] = {"input_norm": (hidden,), "post_norm": (hidden,)}
        if one.query_key_norm != "none":
            whole = one.query_key_norm == "projection"
            norms["q_norm"] = (one.head_dim * (one.heads if whole else 1),)
            norms["k_norm"] = (one.head_dim * (one.kv_heads if whole else 1),)
        if one.kind == "latent":
            norms["kv_norm"] = (one.latent_dim,)
        if one.bias:
            norms["qkv_bias"] = (one.matrix_shapes(hidden)["qkv"][0],)
        shapes: dict[str, tuple[int, ...]] = {"norm": (hidden,)}
        for layer in self.layers:
            here = dict(norms)
            if layer.routing is not None:
                here["router"] = (layer.routing.experts, hidden)
            if layer.shared_gate:
                here["shared_gate"] = (1, hidden)
            shapes |= {f"layers.{layer.index}.{name}": shape for name, shape in here.items()}
        return shapes


# --- calibration -------------------------------------------------------------------------------------


class UnitLoss(Noun):
    """What one precision of one unit costs: KL divergence from the fp32 decoder, nats per token."""

    unit: str
    precision: Precision
    kl: float
    tokens: int


class DecoderCalibration(Document):
    """What calibration found; the routing trace lies beside it as ``trace.csv``.

    ``router_agreement``: share of the top-k choices that stay the same with everything in this precision.
    """

    graph: DecoderGraph
    text_digest: str
    tokens: int
    reference_loss: float
    losses: tuple[UnitLoss, ...]
    router_agreement: Mapping[Precision, float] = {}
    uniform_kl: Mapping[Precision, float] = {}


class MatrixRate(Grown):
    """Measured seconds of one matrix shape in one precision with ``rows_in`` input rows and weights from memory.

    ``packed_bytes`` are what that machine's kernels hold of it; None in rates of older releases.
    """

    LATER = ("packed_bytes",)

    rows: int
    columns: int
    precision: Precision
    rows_in: int
    threads: int
    seconds: float
    packed_bytes: int | None = None


class TokenRatio(Noun):
    """How many times longer matrices of one row take within a decoded token than by themselves, as measured.

    ``dense``: of attention, shared experts and the head, which every token uses; ``experts``: of the chosen ones.
    """

    precision: Precision
    threads: int
    dense: float
    experts: float


class DecoderRates(Grown, Document):
    """What this machine does with this decoder's shapes; measured, never assumed.

    ``read_bytes_per_s`` is the store's rate with as many reads in flight as the runtime keeps, and
    ``first_read_bytes_per_s`` the same where each expert's hash is checked, as at its first use.
    ``other_token_s`` is what a decoded token costs beside matrices (attention, norms, routing, the loop).
    ``matrices`` were timed by themselves; within a token those of one row take ``token_ratios`` times as long.
    ``conditions`` are the machine's around measuring; rates of before have none.
    """

    LATER = ("conditions",)

    device: str
    matrices: tuple[MatrixRate, ...]
    read_bytes_per_s: float
    first_read_bytes_per_s: float | None = None
    read_latency_s: float
    memory_bytes_per_s: float
    other_token_s: float
    other_prefill_token_s: float
    token_ratios: tuple[TokenRatio, ...] = ()
    runtime_bytes: int
    conditions: Conditions | None = None


class MissPoint(Noun):
    """One replay of the trace through the cache: per decoded token, and for the prefill of the prompt."""

    policy: PolicyName
    cache_bytes: int
    hits: int
    misses: int
    decode_tokens: int
    decode_bytes: int
    prefill_bytes: int
    belady_misses: int | None = None


class SimulatedCache(Noun):
    """One replay of a trace: lookups while decoding, prompts only warm the cache.

    ``token_s`` and ``bound_share`` need a link's rate: the time is ``compute_s`` plus the misses' bytes over it, the
    share is what the best possible cache (Belady) would need over this. ``layer_hit_rates`` show starved layers.
    """

    policy: PolicyName
    cache_bytes: int
    hit_rate: float
    hits: int
    misses: int
    bytes_per_token: float
    belady_hit_rate: float
    layer_hit_rates: tuple[float, ...]
    token_s: float | None = None
    bound_share: float | None = None


class Simulation(Document):
    """Replays of one trace, policies outermost."""

    kind: Literal["decoder"] = "decoder"
    trace: str
    decode_tokens: int
    link_bytes_per_s: float | None = None
    compute_s: float | None = None
    results: tuple[SimulatedCache, ...]


# --- plan --------------------------------------------------------------------------------------------


class DecoderBudget(Grown):
    """What the user allows. ``max_kl`` in nats per token against fp32, ``max_perplexity_rise`` a fraction of fp32's.

    On text that the decoder predicts as well as its own samples, the expected rise of the logarithm of perplexity is
    the divergence; plans use that, and export measures both.
    """

    LATER = ("vram_bytes",)

    memory_bytes: int | None = None
    token_s: float | None = None
    first_token_s: float | None = None
    disk_bytes: int | None = None
    max_kl: float | None = None
    max_perplexity_rise: float | None = None
    minimize: Literal["latency", "kl", "memory"] = "latency"
    prompt_tokens: int = 256
    context_tokens: int = 1024
    vram_bytes: int | None = None

    @property
    def kl_limit(self) -> float | None:
        """The most divergence that both limits of accuracy allow a plan, nats per token."""
        given = [self.max_kl] if self.max_kl is not None else []
        if self.max_perplexity_rise is not None:
            given.append(math.log1p(self.max_perplexity_rise))
        return min(given, default=None)


class DecoderMemory(HeldBytes):
    """Bytes that a run's process holds."""

    dense_bytes: int
    cache_bytes: int
    kv_bytes: int
    activations_bytes: int
    runtime_bytes: int


class DecoderPrediction(Noun):
    """What the plan promises. ``kl`` is the additive estimate; hits over all expert uses of decoding."""

    token_s: Interval
    first_token_s: Interval
    memory: DecoderMemory
    disk_bytes: int
    kl: float
    hit_rate: float
    bytes_per_token: float
    belady_hit_rate: float | None = None
    bound_token_s: float


class UniformSize(Noun):
    """What a decoder needs with everything in one precision. ``cycle_bytes`` is T."""

    precision: Precision
    dense_bytes: int
    experts_bytes: int
    cycle_bytes: int
    verdict: Literal["fits", "offload", "decline"]


class DecoderSizes(Document):
    """What the headers of a checkpoint tell before anything is measured.

    ``fixed_bytes``: keys and values, buffers, norms and routers.
    """

    kind: Literal["decoder"] = "decoder"
    graph: DecoderGraph
    budget: DecoderBudget
    fixed_bytes: int
    uniform: tuple[UniformSize, ...]


class DecoderPlan(Grown, Document):
    """Precisions, cache and promise. ``cycle_bytes`` is T: the bytes of the experts that one token uses.

    With ``gpu`` the decoder runs there: ``cache_bytes``, ``policy`` and ``predicted.memory`` are the processor's part.
    ``conditions`` are those in which its times were measured; with ``gpu`` there are none: they come from elsewhere.
    """

    LATER = ("gpu", "conditions")

    kind: Literal["decoder"] = "decoder"
    graph_digest: str
    budget: DecoderBudget
    verdict: Literal["fits", "offload", "decline"]
    reasons: tuple[str, ...]
    choices: tuple[Choice, ...]
    cache_bytes: int
    cycle_bytes: int
    policy: PolicyName = "enu"
    prefetch_depth: int = 0
    threads: int = 1
    context_tokens: int
    prefill_chunk_tokens: int
    predicted: DecoderPrediction
    proof: Proof | None = None
    gpu: GpuPlacement | None = None
    conditions: Conditions | None = None

    @property
    def alone_cache_bytes(self) -> int:
        """Bytes of experts for a run on the processor alone, of which a plan for a GPU promises nothing."""
        return self.cache_bytes if self.gpu is None else max(self.cache_bytes, self.gpu.vram_cache_bytes)


# --- bundle ------------------------------------------------------------------------------------------


class MatrixRecord(Noun):
    """Where one matrix or small tensor lies in the bundle, raw.

    ``int4-group32``: two codes a byte (low nibble first, stored as value + 8), row-major, then its bfloat16
    scales ``[rows, columns / 32]``. ``int8-dynamic``: int8 row-major, fp32 scales ``[rows]``. ``fp32``: no scales.
    """

    name: str
    precision: Precision
    rows: int
    columns: int
    file: str
    offset: int
    scales_offset: int | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights without scales."""
        return self.rows * self.columns * self.precision.bits // 8

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales."""
        if self.precision is Precision.INT4_GROUP32:
            return self.rows * (self.columns // 32) * 2
        return self.rows * 4 if self.precision is Precision.INT8_DYNAMIC else 0


class StockProgram(Noun):
    """One program, with the data files that it needs: for a stock ExecuTorch, or a stage for ONNX Runtime or TensorRT.

    ``gather`` and ``sum`` are of TensorRT alone: rows put together for experts, and what these gave added up.
    """

    role: Literal["embedding", "attention", "expert", "dense", "head", "gather", "sum"]
    layer: int | None
    precision: Precision | None
    path: str
    data: tuple[str, ...] = ()


class Expected(Noun):
    """What the fp32-activation reference of the exported numbers answers to a prompt, greedily."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


class DecoderManifest(Grown, Document):
    """A decoder's bundle. Experts' matrices are in ``matrices`` too, each expert in a file of its own.

    ``points`` are replays of the calibration's trace with the planned sizes, at other sizes of the cache.
    ``layout_digest`` is the SHA-256 of all that ``matrices`` and ``programs`` say; bundles of before have none.
    """

    LATER = ("layout_digest",)

    kind: Literal["decoder"] = "decoder"
    backend: Literal["executorch", "onnx", "tensorrt"] = "executorch"
    versions: Mapping[str, str]
    graph: DecoderGraph
    plan: DecoderPlan
    matrices: tuple[MatrixRecord, ...]
    files: tuple[FileEntry, ...]
    programs: tuple[StockProgram, ...] = ()
    expected: tuple[Expected, ...] = ()
    measured_kl: float | None = None
    measured_perplexity: float | None = None
    reference_perplexity: float | None = None
    router_agreement: float | None = None
    points: tuple[MissPoint, ...] = ()
    layout_digest: str | None = None


# --- run ---------------------------------------------------------------------------------------------


class DecoderCacheStats(Noun):
    """Counters of the expert cache; bytes as read from the store."""

    policy: PolicyName
    capacity_bytes: int
    peak_bytes: int
    hits: int
    misses: int
    evictions: int
    read_bytes: int
    prefetch_fetched_bytes: int = 0
    prefetch_useful_bytes: int = 0
    prefetch_stopped: bool = False
    decode_hits: int = 0
    decode_misses: int = 0
    decode_read_bytes: int = 0
    layer_hits: tuple[int, ...] = ()
    layer_misses: tuple[int, ...] = ()


class TokenTime(Noun):
    """One generated token's time, split. ``wait_s`` is time in which nothing could be computed."""

    total_s: float
    dense_s: float
    expert_s: float
    wait_s: float


class DecoderRunStats(Document):
    """Raw samples of one generation."""

    kind: Literal["decoder"] = "decoder"
    manifest_digest: str
    device: str
    threads: int
    prompt_tokens: int
    tokens: tuple[int, ...]
    times: tuple[TokenTime, ...]
    first_token_s: float
    load_s: float
    peak_memory_bytes: int
    runtime_memory_bytes: int
    cache: DecoderCacheStats
    before: Conditions
    after: Conditions
    expert_uses: tuple[tuple[int, ...], ...] = Field(default=(), description="[layers][experts] uses")
    decode_events: int = Field(default=0, description="events of decoding: a layer of a decoded token, or a part of it")
    expert_residency: tuple[tuple[int, ...], ...] = Field(
        default=(), description="[layers][experts] events of decoding at whose end the cache held it"
    )
    held_bytes: tuple[int, ...] = Field(default=(), description="[tokens] bytes of the process after each token")
    stopped_by: Literal["end", "length", "stop", "context", "interrupt"] = "length"


class DecoderBench(Document):
    """Repeated generations against the promise. Raw samples: seconds per decoded token of each repeat.

    ``device`` is of runs on a device with a memory of its own.
    """

    kind: Literal["decoder"] = "decoder"
    manifest_digest: str
    runs: tuple[DecoderRunStats, ...]
    checks: tuple[Check, ...]
    device: DeviceRecord | None = None


class DecoderVerify(Document):
    """What a check of a decoder's files, packed weights, answers and limits found."""

    kind: Literal["decoder"] = "decoder"
    manifest_digest: str
    checks: tuple[Check, ...]


class DeviceSimulation(Document):
    """A trace on a machine with a GPU that is not at hand, in virtual time: nothing here was measured on it.

    Decoded tokens after the calibration's part are judged. ``token_s`` and ``tokens_per_s`` reach from all rates at
    their upper to all at their lower end; ``bound_token_s`` is what no cache and no scheduler can beat on the middle
    curves. ``rival_token_s`` are published rules on the same curves. ``waited``: share of the time that each resource
    (gpu, cpu, link, disk) had nothing to do. Bytes are per token: uploaded for an event, copied ahead, read from flash.
    """

    kind: Literal["decoder"] = "decoder"
    device: str
    trace: str
    decode_tokens: int
    precision: Precision
    vram_bytes: int
    ram_bytes: int
    placement: Literal["cache", "static"]
    token_s: Interval
    tokens_per_s: Interval
    bound_token_s: float
    hit_rate: float
    upload_bytes: float
    ahead_bytes: float
    flash_bytes: float
    waited: Mapping[str, float]
    rival_token_s: Mapping[str, float]
    assumptions: tuple[str, ...]
