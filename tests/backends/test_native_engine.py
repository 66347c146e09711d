"""The native decoder against a slow NumPy reference, and against itself under any residency, chunk and thread count."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex import native as native_package
from edgeflex.errors import DeviceError, InputError, MissingDependencyError
from edgeflex.native import build
from edgeflex.runtimes import native
from edgeflex.runtimes.native import Engine
from edgeflex.schema import Precision
from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer, Routing

PRECISIONS = (Precision.FP32, Precision.INT8_DYNAMIC, Precision.INT4_GROUP32)
HIDDEN, VOCABULARY, CONTEXT = 64, 50, 48


# --- graphs ------------------------------------------------------------------------------------------


def _attention(**changes):
    values = {
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 16,
        "value_dim": 16,
        "rotary_dim": 16,
        "inverse_frequencies": tuple(10000.0 ** (-np.arange(8) / 8)),
        "softmax_scale": 0.25,
    }
    return Attention(**{**values, **changes})


def _routed(index, **changes):
    routing = Routing(experts=6, top_k=2, normalised=True)
    return DecoderLayer(index=index, **{"routing": routing, "expert_dim": 32, **changes})


def _graph(attention=None, layers=None, **changes):
    return DecoderGraph(
        name="tiny",
        family="olmoe",
        weights_digest="0" * 64,
        hidden_dim=HIDDEN,
        vocabulary=VOCABULARY,
        layers=tuple(layers or (_routed(0), _routed(1))),
        attention=attention or _attention(),
        norm_epsilon=1e-5,
        tied_embedding=False,
        context_tokens=CONTEXT,
        **changes,
    )


def _latent():
    return _attention(
        kind="latent",
        head_dim=20,
        value_dim=24,
        rotary_dim=8,
        latent_dim=32,
        inverse_frequencies=(1.0, 0.3, 0.1, 0.02),
        rotary_scale=1.3,
        softmax_scale=0.2,
    )


def _unnormalised(index):
    return _routed(index, routing=Routing(experts=5, top_k=3, normalised=False, scale=2.5))


GRAPHS = {
    "plain": _graph(),
    "grouped-query": _graph(_attention(kv_heads=2)),
    "multi-query": _graph(_attention(kv_heads=1)),
    "norm-over-projection": _graph(_attention(query_key_norm="projection")),
    "norm-per-head": _graph(_attention(kv_heads=2, query_key_norm="head")),
    "bias": _graph(_attention(bias=True, kv_heads=2)),
    "partial-rotary": _graph(_attention(rotary_dim=8, inverse_frequencies=(1.0, 0.5, 0.1, 0.01))),
    "unnormalised-scaled": _graph(layers=(_unnormalised(0), _unnormalised(1))),
    "shared": _graph(layers=(_routed(0, shared_dim=64), _routed(1, shared_dim=32))),
    "shared-gated": _graph(layers=(_routed(0, shared_dim=64, shared_gate=True), _routed(1))),
    "dense-first": _graph(layers=(DecoderLayer(index=0, routing=None, dense_dim=96), _routed(1))),
    "latent": _graph(_latent(), (DecoderLayer(index=0, routing=None, dense_dim=96), _routed(1, shared_dim=64))),
    "one-expert": _graph(layers=(_routed(0, routing=Routing(experts=1, top_k=1, normalised=True)),)),
}


# --- weights -----------------------------------------------------------------------------------------


def _is_small(name):
    return name.split(".")[-1] in {
        *("input_norm", "post_norm", "q_norm", "k_norm", "kv_norm", "qkv_bias", "router", "shared_gate", "norm"),
    }


def _shapes(graph):
    """Names and shapes of every tensor, as the package's naming has them."""
    attention = graph.attention
    hidden, heads, dims, values = graph.hidden_dim, attention.heads, attention.head_dim, attention.value_dim
    shapes = {"embedding": (graph.vocabulary, hidden), "head": (graph.vocabulary, hidden), "norm": (1, hidden)}
    for layer in graph.layers:
        prefix = f"layers.{layer.index}."
        here = {"input_norm": (1, hidden), "post_norm": (1, hidden), "o": (hidden, heads * values)}
        if attention.kind == "latent":
            here["q"] = (heads * dims, hidden)
            here["kv_a"] = (attention.latent_dim + attention.rotary_dim, hidden)
            here["kv_norm"] = (1, attention.latent_dim)
            here["kv_b"] = (heads * (dims - attention.rotary_dim + values), attention.latent_dim)
        else:
            rows = heads * dims + attention.kv_heads * (dims + values)
            here["qkv"] = (rows, hidden)
            if attention.bias:
                here["qkv_bias"] = (1, rows)
            if attention.query_key_norm != "none":
                whole = attention.query_key_norm == "projection"
                here["q_norm"] = (1, heads * dims if whole else dims)
                here["k_norm"] = (1, attention.kv_heads * dims if whole else dims)
        parts = {"mlp": layer.dense_dim if layer.routing is None else 0}
        if layer.routing is not None:
            here["router"] = (layer.routing.experts, hidden)
            parts["shared"] = layer.shared_dim
            parts.update({f"experts.{e}": layer.expert_dim for e in range(layer.routing.experts)})
            if layer.shared_gate:
                here["shared_gate"] = (1, hidden)
        for part, inner in parts.items():
            if inner:
                here[f"{part}.gate_up"] = (2 * inner, hidden)
                here[f"{part}.down"] = (hidden, inner)
        shapes.update({prefix + name: shape for name, shape in here.items()})
    return shapes


def _tensors(graph, seed=0):
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in _shapes(graph).items():
        values = random.standard_normal(shape)
        if name.endswith("norm"):
            values = 1.0 + 0.2 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif name != "embedding":
            values = values * (2.0 if name.endswith("router") else 1.2) / np.sqrt(shape[1])
        tensors[name] = values.astype(np.float32)
    return tensors


def _quantised(weights, precision):
    """Raw codes, raw scales and the numbers they mean."""
    rows, columns = weights.shape
    if precision is Precision.FP32:
        return weights, None, weights
    if precision is Precision.INT8_DYNAMIC:
        scales = (np.abs(weights).max(axis=1, keepdims=True) / 127).astype(np.float32)
        codes = np.clip(np.rint(weights / np.where(scales > 0, scales, 1)), -127, 127)
        return codes.astype(np.int8), scales, (codes * scales).astype(np.float32)
    groups = weights.reshape(rows, columns // 32, 32)
    bits = (np.abs(groups).max(axis=2) / 7).astype(np.float32).view(np.uint32)
    bfloats = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    scales = (bfloats.astype(np.uint32) << 16).view(np.float32)[..., None]
    codes = np.clip(np.rint(groups / np.where(scales > 0, scales, 1)), -8, 7)
    nibbles = (codes.reshape(rows, columns) + 8).astype(np.uint8)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return packed, bfloats, (codes * scales).reshape(rows, columns).astype(np.float32)


class _Weights:
    """One precision for every matrix, unless ``choose`` says otherwise by name."""

    def __init__(self, graph, precision, seed=0, choose=None):
        self.precision_of = choose or (lambda name: precision)
        self.raw, self.numbers = {}, {}
        for name, values in _tensors(graph, seed).items():
            if _is_small(name):
                self.numbers[name] = values
                continue
            codes, scales, numbers = _quantised(values, self.precision_of(name))
            self.raw[name] = (codes, scales, values.shape)
            self.numbers[name] = numbers


# --- the reference -----------------------------------------------------------------------------------


def _norm(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight.reshape(-1)


def _swiglu(x, gate_up, down):
    gate, up = np.split(x @ gate_up.T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def _rotated(x, frequencies, scale):
    """``x`` [tokens, heads, 2 * len(frequencies)]"""
    angles = np.arange(len(x))[:, None] * np.asarray(frequencies)
    cosine, sine = np.cos(angles)[:, None] * scale, np.sin(angles)[:, None] * scale
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _keys_and_values(graph, numbers, prefix, x):
    a = graph.attention
    tokens = len(x)
    if a.kind == "latent":
        plain = a.head_dim - a.rotary_dim
        query = (x @ numbers[prefix + "q"].T).reshape(tokens, a.heads, a.head_dim)
        down = x @ numbers[prefix + "kv_a"].T
        latent = _norm(down[:, : a.latent_dim], numbers[prefix + "kv_norm"], graph.norm_epsilon)
        up = (latent @ numbers[prefix + "kv_b"].T).reshape(tokens, a.heads, plain + a.value_dim)
        turned = _rotated(down[:, None, a.latent_dim :], a.inverse_frequencies, a.rotary_scale)
        key = np.concatenate([up[..., :plain], np.repeat(turned, a.heads, axis=1)], axis=-1)
        rotary = _rotated(query[..., plain:], a.inverse_frequencies, a.rotary_scale)
        return np.concatenate([query[..., :plain], rotary], axis=-1), key, up[..., plain:]
    rows = x @ numbers[prefix + "qkv"].T
    if a.bias:
        rows = rows + numbers[prefix + "qkv_bias"]
    cuts = (a.heads * a.head_dim, (a.heads + a.kv_heads) * a.head_dim)
    query, key, value = np.split(rows, cuts, axis=-1)
    if a.query_key_norm == "projection":
        query = _norm(query, numbers[prefix + "q_norm"], graph.norm_epsilon)
        key = _norm(key, numbers[prefix + "k_norm"], graph.norm_epsilon)
    query, key = query.reshape(tokens, a.heads, -1), key.reshape(tokens, a.kv_heads, -1)
    if a.query_key_norm == "head":
        query = _norm(query, numbers[prefix + "q_norm"], graph.norm_epsilon)
        key = _norm(key, numbers[prefix + "k_norm"], graph.norm_epsilon)

    def turn(rows):
        turned = _rotated(rows[..., : a.rotary_dim], a.inverse_frequencies, a.rotary_scale)
        return np.concatenate([turned, rows[..., a.rotary_dim :]], axis=-1)

    repeat = a.heads // a.kv_heads
    value = value.reshape(tokens, a.kv_heads, a.value_dim)
    return turn(query), np.repeat(turn(key), repeat, axis=1), np.repeat(value, repeat, axis=1)


def _choices(routing, scores):
    """Top-k ids and weights of one token, ties to the lower index."""
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    ids = sorted(range(routing.experts), key=lambda expert: (-scores[expert], expert))[: routing.top_k]
    weights = shares[ids]
    if routing.normalised:
        weights = weights / weights.sum()
    return ids, weights * routing.scale


def _reference(graph, numbers, tokens):
    """Logits [tokens, vocabulary] and the choices [layer][token], in double precision."""
    numbers = {name: values.astype(np.float64) for name, values in numbers.items()}
    x = numbers["embedding"][list(tokens)]
    mask = np.tril(np.ones((len(tokens), len(tokens)), dtype=bool))
    chosen: dict[int, list[list[int]]] = {}
    for layer in graph.layers:
        prefix = f"layers.{layer.index}."
        normed = _norm(x, numbers[prefix + "input_norm"], graph.norm_epsilon)
        query, key, value = _keys_and_values(graph, numbers, prefix, normed)
        scores = np.einsum("qhd,khd->hqk", query, key) * graph.attention.softmax_scale
        scores = np.where(mask, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, value).reshape(len(tokens), -1)
        x = x + mixed @ numbers[prefix + "o"].T
        normed = _norm(x, numbers[prefix + "post_norm"], graph.norm_epsilon)
        if layer.routing is None:
            x = x + _swiglu(normed, numbers[prefix + "mlp.gate_up"], numbers[prefix + "mlp.down"])
            continue
        out = np.zeros_like(x)
        chosen[layer.index] = []
        for token, row in enumerate(normed):
            ids, weights = _choices(layer.routing, numbers[prefix + "router"] @ row)
            chosen[layer.index].append(ids)
            for expert, weight in zip(ids, weights, strict=True):
                at = f"{prefix}experts.{expert}."
                out[token] += weight * _swiglu(row, numbers[at + "gate_up"], numbers[at + "down"])
        if layer.shared_dim:
            shared = _swiglu(normed, numbers[prefix + "shared.gate_up"], numbers[prefix + "shared.down"])
            if layer.shared_gate:
                shared = shared / (1 + np.exp(-(normed @ numbers[prefix + "shared_gate"].T)))
            out += shared
        x = x + out
    return _norm(x, numbers["norm"], graph.norm_epsilon) @ numbers["head"].T, chosen


# --- the engine --------------------------------------------------------------------------------------


def _aligned(size):
    room = np.zeros(size + 64, dtype=np.uint8)
    return room[-room.ctypes.data % 64 :][:size]


def _packed(raw, precision):
    codes, scales, (rows, columns) = raw
    out = _aligned(native.packed_bytes(precision, rows, columns))
    native.pack(precision, rows, columns, codes, scales, out)
    return out


def _opened(graph, weights, *, chunk=16, threads=1, context=CONTEXT, half_cache=False):
    engine = Engine(graph, context_tokens=context, chunk_tokens=chunk, threads=threads, half_cache=half_cache)
    for name, values in weights.numbers.items():
        if _is_small(name):
            engine.set_small(name, values)
        elif name == "embedding":
            engine.set_embedding(weights.precision_of(name), *weights.raw[name][:2])
        elif "experts" not in name:
            precision = weights.precision_of(name)
            rows, columns = values.shape
            engine.set_matrix(name, precision, rows, columns, _packed(weights.raw[name], precision))
    return engine


class _Store:
    """Experts' packed bytes, and a first-in-first-out cache of ``slots`` of them in the engine's arena."""

    def __init__(self, engine, graph, weights, slots=None):
        self.engine, self.held, self.bytes, self.precision = engine, {}, {}, {}
        for layer in graph.layers:
            for expert in range(layer.routing.experts if layer.routing else 0):
                name = f"layers.{layer.index}.experts.{expert}"
                precision = weights.precision_of(name + ".gate_up")
                size, down = engine.expert_bytes(layer.index, precision)
                whole = np.zeros(size, dtype=np.uint8)
                first = _packed(weights.raw[name + ".gate_up"], precision)
                second = _packed(weights.raw[name + ".down"], precision)
                whole[: first.size], whole[down : down + second.size] = first, second
                self.bytes[layer.index, expert], self.precision[layer.index, expert] = whole, precision
        self.slot = max(-(-bytes_.size // 64) * 64 for bytes_ in self.bytes.values())
        self.slots = slots or len(self.bytes)
        self.arena = engine.arena(self.slot * self.slots)
        self.free = list(range(self.slots))

    def bind(self, key, keep=()):
        if key in self.held:
            return
        if not self.free:
            victim = next(held for held in self.held if held not in keep)
            self.engine.unbind(*victim)
            self.free.append(self.held.pop(victim))
        slot = self.free.pop()
        self.held[key] = slot
        offset = slot * self.slot
        self.arena[offset : offset + self.slot] = 0xFF  # whatever was there is gone
        self.arena[offset : offset + self.bytes[key].size] = self.bytes[key]
        self.engine.bind(*key, self.precision[key], offset)

    def bind_all(self):
        for key in self.bytes:
            self.bind(key)

    def run(self, tokens, position, **options):
        missing = self.engine.forward(np.asarray(tokens, dtype=np.int32), position, **options)
        while missing is not None:
            for group in itertools.zip_longest(*[iter(missing.experts)] * self.slots):
                keys = [(missing.layer, expert) for expert in group if expert is not None]
                for key in keys:
                    self.bind(key, keep=keys)
                self.engine.compute([expert for _, expert in keys])
            missing = self.engine.resume()
        return self.engine.logits()


TOKENS = tuple(int(token) for token in np.random.default_rng(7).integers(0, VOCABULARY, 21))


def _logits(graph, weights, *, chunk, threads=1, slots=None, tokens=TOKENS, half_cache=False):
    """Logits of every token, run in chunks."""
    with _opened(graph, weights, chunk=chunk, threads=threads, half_cache=half_cache) as engine:
        store = _Store(engine, graph, weights, slots)
        if slots is None:
            store.bind_all()
        rows = [
            store.run(tokens[start : start + chunk], start, every_logit=True) for start in range(0, len(tokens), chunk)
        ]
        return np.concatenate(rows)


# --- against the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_fp32_logits_equal_the_reference(name):
    graph = GRAPHS[name]
    weights = _Weights(graph, Precision.FP32)
    expected, _ = _reference(graph, weights.numbers, TOKENS)
    got = _logits(graph, weights, chunk=8)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "grouped-query", "shared-gated", "latent"])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_quantised_logits_follow_the_dequantised_weights(name, precision):
    # Activations in 8 bits per row: about 0.5 % of noise a matrix; a wrong scale or order gives far more than 10 %.
    graph = GRAPHS[name]
    weights = _Weights(graph, precision)
    expected, chosen = _reference(graph, weights.numbers, TOKENS)
    with _opened(graph, weights, chunk=len(TOKENS)) as engine:
        store = _Store(engine, graph, weights)
        store.bind_all()
        got = store.run(TOKENS, 0, every_logit=True)
        events = engine.take_events()
    same = np.ones(len(TOKENS), dtype=bool)  # near ties are routed otherwise and spoil later tokens through attention
    for event in events:
        for token, ids in enumerate(chosen[event.layer]):
            same[token:] &= set(event.experts[token].tolist()) == set(ids)
    assert same[:3].all()
    error = np.linalg.norm(got[same] - expected[same]) / np.linalg.norm(expected[same])
    assert error < 0.04


@pytest.mark.parametrize("name", ["grouped-query", "latent"])
def test_a_half_precision_cache_takes_half_the_memory_and_stays_near(name):
    graph = GRAPHS[name]
    weights = _Weights(graph, Precision.FP32)
    expected, _ = _reference(graph, weights.numbers, TOKENS)
    got = _logits(graph, weights, chunk=8, half_cache=True)
    assert 1e-6 < np.abs(got - expected).max() < 1e-2
    np.testing.assert_allclose(_logits(graph, weights, chunk=1, half_cache=True), got, rtol=0, atol=2e-4)
    sizes = {}
    for half_cache in (False, True):
        with Engine(graph, context_tokens=4096, chunk_tokens=1, threads=1, half_cache=half_cache) as engine:
            sizes[half_cache] = engine.memory_bytes
    attention = graph.attention
    padded = -(-attention.value_dim // 16) * 16
    kept = len(graph.layers) * attention.kv_heads * 4096 * (attention.head_dim + padded) * 4
    assert sizes[False] - sizes[True] == kept // 2


def test_each_expert_may_have_its_own_precision():
    graph = GRAPHS["shared"]

    def choose(name):
        parts = name.split(".")
        return PRECISIONS[int(parts[3]) % 3] if "experts" in parts else PRECISIONS[len(name) % 3]

    weights = _Weights(graph, None, choose=choose)
    expected, _ = _reference(graph, weights.numbers, TOKENS[:6])
    got = _logits(graph, weights, chunk=6, tokens=TOKENS[:6])
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.05


@pytest.mark.parametrize("precision", PRECISIONS)
def test_matrices_of_uneven_shapes_are_right(precision):
    layer = DecoderLayer(index=0, routing=None, dense_dim=32)
    graph = _graph(layers=(layer,))
    weights = _Weights(graph, precision)
    weights.numbers["head"][3] = 0.0  # a row whose scale is zero
    weights.raw["head"] = (*_quantised(weights.numbers["head"], precision)[:2], weights.raw["head"][2])
    weights.numbers["head"] = _quantised(weights.numbers["head"], precision)[2]
    expected, _ = _reference(graph, weights.numbers, TOKENS[:3])
    with _opened(graph, weights) as engine:
        assert engine.forward(np.asarray(TOKENS[:3]), 0, every_logit=True) is None
        got = engine.logits()
    assert (got[:, 3] == 0.0).all()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.04


def test_equal_router_scores_choose_the_lower_expert():
    graph = GRAPHS["plain"]
    weights = _Weights(graph, Precision.FP32)
    for layer in (0, 1):
        weights.numbers[f"layers.{layer}.router"][:] = 0.0
    with _opened(graph, weights) as engine:
        store = _Store(engine, graph, weights)
        store.bind_all()
        store.run(TOKENS[:4], 0)
        for event in engine.take_events():
            assert (event.experts == [0, 1]).all()
            np.testing.assert_allclose(event.weights, 0.5)


# --- against itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped-query", "latent", "shared-gated"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_chunks_equal_token_by_token(name, precision):
    graph = GRAPHS[name]
    weights = _Weights(graph, precision)
    singly = _logits(graph, weights, chunk=1)
    for chunk in (3, 8, 21):
        np.testing.assert_allclose(_logits(graph, weights, chunk=chunk), singly, rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["plain", "latent"])
def test_logits_are_identical_at_every_cache_size_and_thread_count(name, precision):
    graph = GRAPHS[name]
    weights = _Weights(graph, precision)
    whole = _logits(graph, weights, chunk=8)
    for slots, threads in ((1, 1), (2, 2), (3, 1), (5, 2), (6, 3), (None, 2)):
        np.testing.assert_array_equal(_logits(graph, weights, chunk=8, threads=threads, slots=slots), whole)
        decoded = _logits(graph, weights, chunk=1, threads=threads, slots=slots, tokens=TOKENS[:6])
        np.testing.assert_array_equal(decoded, _logits(graph, weights, chunk=1, tokens=TOKENS[:6]))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_any_order_of_binding_and_computing_gives_the_same_logits(seed, data):
    graph = GRAPHS["shared"]
    weights = _Weights(graph, Precision.INT4_GROUP32, seed=seed)
    with _opened(graph, weights) as engine:
        store = _Store(engine, graph, weights)
        missing = engine.forward(np.asarray(TOKENS[:5]), 0)
        while missing is not None:
            assert missing.missing
            bound = data.draw(st.permutations(missing.missing))[: data.draw(st.integers(1, len(missing.missing)))]
            for expert in bound:
                store.bind((missing.layer, expert))
            engine.compute([expert for expert in bound if data.draw(st.booleans())])
            missing = engine.resume()
        got = engine.logits()
    np.testing.assert_array_equal(got, _logits(graph, weights, chunk=5, tokens=TOKENS[:5])[-1])


# --- packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packing_is_deterministic_and_as_long_as_promised(precision):
    weights = np.random.default_rng(3).standard_normal((40, 96)).astype(np.float32)
    codes, scales, _ = _quantised(weights, precision)
    size = native.packed_bytes(precision, 40, 96)
    assert size % 64 == 0
    packed = []
    for filler in (0x00, 0xFF):
        room = np.full(size + 64, filler, dtype=np.uint8)
        out = room[-room.ctypes.data % 64 :][:size]
        native.pack(precision, 40, 96, codes, scales, out)
        packed.append(out.copy())
    np.testing.assert_array_equal(packed[0], packed[1])


def test_the_kernels_name_is_stable_and_a_file_name():
    assert native.kernel_id() == native.kernel_id()
    assert native.kernel_id().replace("-", "").replace("_", "").isalnum()


def test_packing_refuses_what_has_no_kernel():
    out = np.zeros(1 << 16, dtype=np.uint8)
    with pytest.raises(InputError, match="groups of 32"):
        native.packed_bytes(Precision.INT4_GROUP32, 4, 40)
    with pytest.raises(InputError, match="precision"):
        native.packed_bytes(Precision.FP16, 4, 32)
    with pytest.raises(InputError, match="between 1 and"):
        native.packed_bytes(Precision.FP32, 0, 32)
    with pytest.raises(InputError, match=r"2 faults(.|\n)*codes(.|\n)*scales"):
        native.pack(Precision.INT8_DYNAMIC, 4, 32, b"1234", None, out)
    scales = np.full(4, np.nan, dtype=np.float32)
    with pytest.raises(InputError, match="finite"):
        native.pack(Precision.INT8_DYNAMIC, 4, 32, bytes(128), scales, out)
    with pytest.raises(InputError, match="read-only"):
        native.pack(Precision.FP32, 4, 32, bytes(512), None, bytes(1 << 16))


# --- bad arguments -----------------------------------------------------------------------------------


def test_a_bad_argument_is_an_error_and_never_a_crash():
    graph = GRAPHS["plain"]
    weights = _Weights(graph, Precision.FP32)
    with _opened(graph, weights, chunk=4) as engine:
        store = _Store(engine, graph, weights)
        size, _ = engine.expert_bytes(0, Precision.FP32)
        room = _aligned(1 << 16)
        faults = {
            "no expert 6": lambda: engine.bind(0, 6, Precision.FP32, 0),
            "no expert 0 in layer 9": lambda: engine.unbind(9, 0),
            "does not lie in the arena": lambda: engine.bind(0, 0, Precision.FP32, store.arena.size - size + 64),
            "at a multiple of 64": lambda: engine.bind(0, 0, Precision.FP32, 32),
            "outside the arena": lambda: engine.bind(0, 0, Precision.FP32, -64),
            "no such tensor": lambda: engine.set_small("layers.0.bogus", np.zeros(3, dtype=np.float32)),
            "this decoder needs 64": lambda: engine.set_small("layers.1.input_norm", np.zeros(3, dtype=np.float32)),
            "layers.7.o: no such": lambda: engine.set_matrix("layers.7.o", Precision.FP32, 64, 64, room),
            "needs 64 x 64": lambda: engine.set_matrix("layers.0.o", Precision.FP32, 64, 32, room),
            "are needed: pack": lambda: engine.set_matrix("layers.0.o", Precision.FP32, 64, 64, room[:640]),
            "start at a multiple": lambda: engine.set_matrix("layers.0.o", Precision.FP32, 64, 64, room[4:]),
            "the embedding has": lambda: engine.set_embedding(Precision.FP32, b"123", None),
            "has no experts": lambda: engine.expert_bytes(5, Precision.FP32),
        }
        for text, act in faults.items():
            with pytest.raises(InputError, match=text):
                act()
        assert engine.forward(np.zeros(4, dtype=np.int32), 0) is not None
        with pytest.raises(InputError, match="not bound"):
            engine.compute([engine.forward(np.zeros(1, dtype=np.int32), 0).experts[0]])
        with pytest.raises(InputError, match="not in the present event"):
            engine.compute([77])


def test_weights_that_are_not_set_are_named():
    graph = GRAPHS["plain"]
    with (
        Engine(graph, context_tokens=8, chunk_tokens=2, threads=1) as engine,
        pytest.raises(InputError, match=r"not set yet: norm, head, layers.0.input_norm.*more"),
    ):
        engine.forward(np.zeros(1, dtype=np.int32), 0)


def test_damaged_weights_end_in_an_error_and_not_in_text():
    graph = GRAPHS["plain"]
    weights = _Weights(graph, Precision.FP32)
    weights.numbers["layers.1.router"][2, 5] = np.nan
    with _opened(graph, weights) as engine:
        store = _Store(engine, graph, weights)
        store.bind_all()
        with pytest.raises(DeviceError, match=r"layer 1.*not finite"):
            store.run(TOKENS[:2], 0)


def test_an_impossible_graph_is_refused():
    for changes, text in (({"heads": 3, "kv_heads": 2}, "multiple"), ({"rotary_dim": 14}, "frequencies")):
        with pytest.raises(InputError, match=text):
            Engine(_graph(_attention(**changes)), context_tokens=8, chunk_tokens=2, threads=1)
    with pytest.raises(InputError, match="threads is 0"):
        Engine(GRAPHS["plain"], context_tokens=8, chunk_tokens=2, threads=0)


@pytest.mark.parametrize("field", ["dense_dim", "shared_dim", "expert_dim"])
def test_dimensions_that_no_layer_has_are_refused_before_memory_is_asked_for(field):
    graph = GRAPHS["plain"]
    for size, text in ((-1, "negative|at least 1"), (1 << 32 | 64, "32 bits"), (1 << 31, "32 bits")):
        layers = tuple(layer.model_copy(update={field: size}) for layer in graph.layers)
        with pytest.raises(InputError, match=text):
            Engine(graph.model_copy(update={"layers": layers}), context_tokens=8, chunk_tokens=2, threads=1)
    with pytest.raises(InputError, match="context_tokens is 4294967304"):
        Engine(graph, context_tokens=(1 << 32) + 8, chunk_tokens=2, threads=1)


# --- libraries ---------------------------------------------------------------------------------------


def test_a_library_of_other_sources_or_no_library_is_refused(tmp_path, monkeypatch):
    wrong = tmp_path / "libwrong.so"
    wrong.write_bytes(b"not a library")
    backend, threads = native.executorch_libraries()
    with pytest.raises(MissingDependencyError, match="does not open"):
        native.open_native(wrong, backend, threads)
    with pytest.raises(MissingDependencyError, match="does not open"):
        native.open_native(threads, backend, threads)  # a library, but not ours
    monkeypatch.setattr(native, "sources_digest", lambda: "f" * 16)
    with pytest.raises(MissingDependencyError, match="other sources"):
        native.open_native(native_package.library_path(), backend, threads)


def test_a_library_for_another_processor_is_refused(monkeypatch):
    backend, threads = native.executorch_libraries()
    monkeypatch.setattr(native, "_absent_features", lambda _: ["avx9000"])
    with pytest.raises(MissingDependencyError, match="avx9000"):
        native.open_native(native_package.library_path(), backend, threads)


def test_executorchs_library_that_lacks_functions_is_named(tmp_path):
    # A copy, since the native library opens ExecuTorch's only once in a process.
    copy = tmp_path / "libcopy.so"
    shutil.copy(native_package.library_path(), copy)
    _, threads = native.executorch_libraries()
    with pytest.raises(DeviceError, match=r"lacks xnn_initialize.*install executorch"):
        native.open_native(copy, threads, threads)
    with pytest.raises(DeviceError, match="does not open"):
        native.open_native(copy, Path("/nowhere/lib.so"), threads)


def test_an_absent_library_names_the_build_command(monkeypatch, tmp_path):
    monkeypatch.setattr(native_package, "_FOLDER", tmp_path)
    with pytest.raises(MissingDependencyError, match=r"python -m edgeflex\.native\.build"):
        native_package.library_path()


# --- building ----------------------------------------------------------------------------------------


def test_no_compiler_is_a_missing_dependency_that_says_how_to_get_one(tmp_path):
    with pytest.raises(MissingDependencyError, match=r"tried nosuch.*apt-get install g\+\+"):
        build.find_compiler({"CXX": "nosuch -m64", "PATH": str(tmp_path)})
    with pytest.raises(MissingDependencyError, match=r"tried g\+\+, clang\+\+, c\+\+"):
        build.find_compiler({"PATH": str(tmp_path)})


def test_flags_given_for_another_machine_replace_those_of_this_one(tmp_path):
    here = build.compile_command(["g++"], tmp_path / "a.so", {})
    there = build.compile_command(["cross-g++"], tmp_path / "a.so", {"CXXFLAGS": "-march=armv8.2-a+dotprod"})
    assert "-march=native" in here
    assert "-march=native" not in there
    assert there[0] == "cross-g++"
    assert "-march=armv8.2-a+dotprod" in there


def test_a_failed_build_leaves_the_old_library_and_shows_the_command(tmp_path, monkeypatch):
    output = tmp_path / "lib.so"
    output.write_bytes(b"old")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(DeviceError, match=r"status 1: false -std=c\+\+17"):
        build.build(output)
    assert output.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(InputError, match="cannot be written"):
        build.build(tmp_path / "absent" / "lib.so")
    assert build.main([str(output)]) == DeviceError.exit_code
