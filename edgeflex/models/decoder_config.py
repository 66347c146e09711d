"""From a Hugging Face ``config.json`` to a ``DecoderGraph``: what a decoder computes, without its numbers.

Every setting that would change the computation is either understood or refused; all faults come in one error.
The meaning of each setting, its default and the rotary formulas follow transformers 5.23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from edgeflex.errors import InputError
from edgeflex.files import read_bytes
from edgeflex.models.checkpoint import read_json_object
from edgeflex.schema_moe import Attention, DecoderGraph, DecoderLayer, Family, Routing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

FAMILIES: tuple[Family, ...] = get_args(Family)

# Bounds that no real model comes near, so that a damaged file does not ask for all time or memory.
_MOST_LAYERS = 1024
_MOST_EXPERTS = 4096
_MOST = 1 << 24

# DeepSeek-V2's norm of the latent row has this epsilon whatever the configuration says.
_LATENT_EPSILON = 1e-6


@dataclass(frozen=True)
class _Style:
    """What differs between families; ``normalised`` is None where ``norm_topk_prob`` says it."""

    expert_width: str
    normalised: bool | None
    query_key_norm: Literal["none", "projection", "head"] = "none"
    epsilon: float = 1e-6
    kv_heads: int | None = None
    theta: float = 10_000.0


_STYLES: dict[str, _Style] = {
    "olmoe": _Style("intermediate_size", None, "projection", epsilon=1e-5),
    "qwen3_moe": _Style("moe_intermediate_size", None, "head", kv_heads=4),
    "mixtral": _Style("intermediate_size", normalised=True, epsilon=1e-5, kv_heads=8, theta=1e6),
    "qwen2_moe": _Style("moe_intermediate_size", None, kv_heads=16),
    "deepseek_v2": _Style("moe_intermediate_size", normalised=False),
}


class _Fields:
    """A configuration being read. Faults are kept, and a harmless value stands in, so that all are told at once."""

    def __init__(self, raw: Mapping[str, object]) -> None:
        self.raw = raw
        self.faults: list[str] = []

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """Return a whole number within bounds; null counts as absent."""
        value = self._given(key, default)
        if value is None:
            return max(least, 1)
        if type(value) is not int or not least <= value <= most:
            self.faults.append(f"{key} is {value!r}; a whole number from {least} to {most} is needed")
            return max(least, 1)
        return value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        """Return a finite number above ``least``; null counts as absent."""
        value = self._given(key, default)
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < 1e30:
            self.faults.append(f"{key} is {value!r}; a number above {least:g} is needed")
            return 1.0
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false; null counts as absent."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            self.faults.append(f"{key} is {value!r}; true or false is needed")
            return default
        return value

    def refuse(self, key: str, *allowed: object, why: str) -> None:
        """Keep a fault unless ``key`` is absent, null or one of ``allowed``."""
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            self.faults.append(f"{key} is {value!r}; {why}")

    def _given(self, key: str, default: object) -> object:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            self.faults.append(f"{key} is missing")
        return default


def read_graph(folder: Path, name: str) -> DecoderGraph:
    """Return the graph that ``config.json`` (and ``generation_config.json``) in ``folder`` describe.

    ``weights_digest`` is left empty: it is about the weights, which are not looked at here.

    Raises:
        InputError: The file is absent or damaged, of an unknown family, or asks for what is not supported; all
            faults at once.
    """
    path = folder / "config.json"
    raw = read_json_object(read_bytes(path, "configuration"), str(path))
    family = next((known for known in FAMILIES if known == raw.get("model_type")), None)
    if family is None:
        raise InputError(
            f"{str(path)!r}: model_type {raw.get('model_type')!r} is not a mixture-of-experts decoder known here. "
            f"Known: {', '.join(sorted(FAMILIES))}."
        )
    fields = _Fields(raw)
    graph = _graph(fields, family, name, _end_tokens(fields, folder))
    if fields.faults:
        raise InputError.collect(f"{str(path)!r} ({family})", list(dict.fromkeys(fields.faults)))
    return graph


def _graph(fields: _Fields, family: Family, name: str, end_tokens: tuple[int, ...]) -> DecoderGraph:
    style = _STYLES[family]
    context = fields.integer("max_position_embeddings", most=1 << 28)
    _refuse_unsupported(fields, family, context)
    layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
    begin = fields.raw.get("bos_token_id")
    return DecoderGraph(
        name=name,
        family=family,
        weights_digest="",
        hidden_dim=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        layers=_layers(fields, family, layers),
        attention=_latent(fields) if family == "deepseek_v2" else _grouped(fields, family),
        norm_epsilon=fields.number("rms_norm_eps", style.epsilon),
        tied_embedding=fields.flag("tie_word_embeddings"),
        context_tokens=context,
        begin_token=begin if type(begin) is int else None,
        end_tokens=end_tokens,
    )


def _end_tokens(fields: _Fields, folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a text: of the generation settings, where there are some, else of the model."""
    value = fields.raw.get("eos_token_id")
    path = folder / "generation_config.json"
    if path.is_file():
        value = read_json_object(read_bytes(path, "generation settings"), str(path)).get("eos_token_id", value)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and one >= 0 for one in found):
        fields.faults.append(f"eos_token_id is {value!r}; a token's number or a list of them is needed")
        return ()
    return tuple(dict.fromkeys(found))


# --- what is refused ---------------------------------------------------------------------------------


def _refuse_unsupported(fields: _Fields, family: Family, context: int) -> None:
    fields.refuse("hidden_act", "silu", "swish", why="only silu runs here")
    fields.refuse("attention_bias", False, why="biases of the attention's output are not supported")
    fields.refuse("clip_qkv", why="clipping of queries, keys and values is not supported")
    if fields.raw.get("quantization_config") is not None:
        fields.faults.append("quantization_config is set; start from the unquantised checkpoint, bits are chosen here")
    _refuse_window(fields, family, context)
    if family == "deepseek_v2":
        _refuse_deepseek(fields)


def _refuse_window(fields: _Fields, family: Family, context: int) -> None:
    """Refuse a sliding window that is in use; one as long as the context changes nothing."""
    window = fields.raw.get("sliding_window")
    used = fields.flag("use_sliding_window") if family.startswith("qwen") else window is not None
    if used and (type(window) is not int or window < context):
        fields.faults.append(f"sliding_window {window!r} is in use below the context of {context}; it is not supported")
    kinds = fields.raw.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        fields.faults.append("layer_types holds others than full_attention; only that is supported")


def _refuse_deepseek(fields: _Fields) -> None:
    fields.refuse("q_lora_rank", why="compressed queries are not supported (DeepSeek-V2-Lite has none)")
    fields.refuse("mlp_bias", False, why="biases of feed-forwards are not supported")
    fields.refuse("scoring_func", "softmax", why="only softmax routing is supported")
    fields.refuse("moe_layer_freq", 1, why="experts in every layer after the dense ones are supported only")
    groups = fields.raw.get("n_group")
    if groups is not None and groups != 1:
        fields.faults.append(f"n_group is {groups!r}; routing limited to groups of experts is not supported")
    elif groups is None:
        fields.refuse("topk_method", "greedy", why="only greedy routing is supported")
    else:
        # limited to one of one group is greedy
        fields.refuse("topk_method", "greedy", "group_limited_greedy", why="only greedy routing is supported")
    # transformers ignores it, DeepSeek's own code does not: with it there is no one truth to be equal to
    fields.refuse("norm_topk_prob", False, why="normalised routing is not defined for this family")
    if not math.isclose(fields.number("rms_norm_eps", _LATENT_EPSILON), _LATENT_EPSILON):
        fields.faults.append(f"rms_norm_eps is not {_LATENT_EPSILON:g}, which the latent's norm has; not supported")


# --- layers ------------------------------------------------------------------------------------------


def _layers(fields: _Fields, family: Family, count: int) -> tuple[DecoderLayer, ...]:
    sparse = _sparse_layers(fields, family, count)
    if not any(sparse):
        fields.faults.append("no layer has experts; a dense decoder has nothing to plan here")
    routing = _routing(fields, family)
    expert_dim = fields.integer(_STYLES[family].expert_width)
    dense_dim = 0 if all(sparse) else fields.integer("intermediate_size")
    shared_dim = _shared_dim(fields, family, expert_dim)
    gated = family == "qwen2_moe" and shared_dim > 0
    return tuple(
        DecoderLayer(index=i, routing=routing, expert_dim=expert_dim, shared_dim=shared_dim, shared_gate=gated)
        if has_experts
        else DecoderLayer(index=i, routing=None, dense_dim=dense_dim)
        for i, has_experts in enumerate(sparse)
    )


def _sparse_layers(fields: _Fields, family: Family, count: int) -> list[bool]:
    """Return for each layer whether it has experts."""
    if family == "deepseek_v2":
        first = fields.integer("first_k_dense_replace", 0, least=0)
        return [index >= first for index in range(count)]
    if not family.startswith("qwen"):
        return [True] * count
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(one) is int for one in dense):
        fields.faults.append(f"mlp_only_layers is {dense!r}; a list of layer numbers is needed")
        dense = []
    return [index not in dense and (index + 1) % step == 0 for index in range(count)]


def _routing(fields: _Fields, family: Family) -> Routing:
    keys = ("n_routed_experts", "num_experts", "num_local_experts")
    key = next((one for one in keys if fields.raw.get(one) is not None), keys[0 if family == "deepseek_v2" else 1])
    experts = fields.integer(key, most=_MOST_EXPERTS)
    top_k = fields.integer("num_experts_per_tok", most=_MOST_EXPERTS)
    if top_k > experts:
        fields.faults.append(f"num_experts_per_tok {top_k} is more than the {experts} experts")
    fixed = _STYLES[family].normalised
    normalised = fields.flag("norm_topk_prob") if fixed is None else fixed
    scale = fields.number("routed_scaling_factor", 1.0) if family == "deepseek_v2" else 1.0
    return Routing(experts=experts, top_k=top_k, normalised=normalised, scale=scale)


def _shared_dim(fields: _Fields, family: Family, expert_dim: int) -> int:
    if family == "qwen2_moe":
        return fields.integer("shared_expert_intermediate_size", least=0)
    if family == "deepseek_v2":
        # absent means two in transformers, null means none in DeepSeek's own code
        missing = 2 if "n_shared_experts" not in fields.raw else 0
        return fields.integer("n_shared_experts", missing, least=0, most=_MOST_EXPERTS) * expert_dim
    return 0


# --- attention ---------------------------------------------------------------------------------------


def _grouped(fields: _Fields, family: Family) -> Attention:
    style = _STYLES[family]
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    # null means one per head where transformers says so, absence the family's own default
    default = heads if "num_key_value_heads" in fields.raw or style.kv_heads is None else style.kv_heads
    kv_heads = fields.integer("num_key_value_heads", default)
    if heads % kv_heads:
        fields.faults.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if hidden % heads and fields.raw.get("head_dim") is None:
        fields.faults.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", max(hidden // heads, 1))
    frequencies, scale = _rotary(fields, head_dim, style.theta)
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        rotary_dim=head_dim,
        query_key_norm=style.query_key_norm,
        bias=family == "qwen2_moe" and fields.flag("qkv_bias", default=True),
        inverse_frequencies=frequencies,
        rotary_scale=scale,
        softmax_scale=head_dim**-0.5,
    )


def _latent(fields: _Fields) -> Attention:
    heads = fields.integer("num_attention_heads")
    if fields.integer("num_key_value_heads", heads) != heads:
        fields.faults.append("num_key_value_heads differs from num_attention_heads; latent attention has one for each")
    rotary_dim = fields.integer("qk_rope_head_dim", 64)
    head_dim = fields.integer("qk_nope_head_dim", 128) + rotary_dim
    frequencies, scale = _rotary(fields, rotary_dim, _STYLES["deepseek_v2"].theta)
    return Attention(
        kind="latent",
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        value_dim=fields.integer("v_head_dim", 128),
        rotary_dim=rotary_dim,
        latent_dim=fields.integer("kv_lora_rank", 512),
        inverse_frequencies=frequencies,
        rotary_scale=scale,
        softmax_scale=_latent_softmax_scale(fields, head_dim),
    )


def _latent_softmax_scale(fields: _Fields, head_dim: int) -> float:
    """Return 1/√d, times the squared attention scale of YaRN where ``mscale_all_dim`` asks for it."""
    rope = _rope_fields(fields)
    if _rope_type(rope) == "default" or not rope.raw.get("mscale_all_dim"):
        return head_dim**-0.5
    return float(head_dim**-0.5 * _yarn_scale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2)


# --- rotary positions --------------------------------------------------------------------------------


def _rope_fields(fields: _Fields) -> _Fields:
    """Return the rotary settings under their new or old name; the old one wins, as in transformers."""
    key = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    found = fields.raw.get(key) or {}
    if not isinstance(found, dict):
        fields.faults.append(f"{key} is {found!r}; an object is needed")
        return _Fields({})
    if any(isinstance(value, dict) for value in found.values()):
        fields.faults.append(f"{key} differs per kind of layer; one for all layers is supported")
    return _Fields(found)


def _rope_type(rope: _Fields) -> object:
    return rope.raw.get("rope_type", rope.raw.get("type", "default"))


def _rotary(fields: _Fields, dim: int, theta: float) -> tuple[tuple[float, ...], float]:
    """Return the inverse frequencies ``[dim / 2]`` and what cosine and sine are multiplied with."""
    rope = _rope_fields(fields)
    base = rope.number("rope_theta", fields.number("rope_theta", theta), least=1.0)
    if dim % 2:
        fields.faults.append(f"rotary positions turn {dim} dimensions, an odd number")
    for settings in (fields, rope):
        settings.refuse("partial_rotary_factor", 1, 1.0, why="partly rotated heads are not supported")
    kind = _rope_type(rope)
    context = fields.integer("max_position_embeddings", most=1 << 28)
    original = fields.raw.get("original_max_position_embeddings")
    if original is not None:
        rope = _merged(rope, {"original_max_position_embeddings": original})
    plain = _plain_frequencies(base, dim)
    scale = 1.0
    if kind == "linear":
        plain = plain / np.float32(rope.number("factor"))
    elif kind == "llama3":
        plain = _llama3(rope, plain, context)
    elif kind == "yarn":
        plain, scale = _yarn(rope, base, dim, context)
    elif kind != "default":
        rope.faults.append(f"rope type {kind!r} is not supported; default, linear, llama3 and yarn are")
    fields.faults += [f"rotary positions: {fault}" for fault in rope.faults]
    return tuple(float(one) for one in plain), scale


def _merged(rope: _Fields, more: Mapping[str, object]) -> _Fields:
    merged = _Fields({**rope.raw, **more})
    merged.faults = rope.faults
    return merged


def _plain_frequencies(base: float, dim: int) -> NDArray[np.float32]:
    """Return base^(-2i/dim), in float32 step by step as the models were trained."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(base) ** exponents


def _llama3(rope: _Fields, plain: NDArray[np.float32], context: int) -> NDArray[np.float32]:
    """Divide long wavelengths by a factor, keep short ones, and go over smoothly (Llama 3.1)."""
    factor, low, high = rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor")
    original = rope.integer("original_max_position_embeddings", context, most=1 << 28)
    if high <= low:
        rope.faults.append(f"high_freq_factor {high:g} is not above low_freq_factor {low:g}")
        return plain
    lengths = 2 * math.pi / plain
    smooth = (original / lengths - low) / (high - low)
    middle = (1 - smooth) * plain / factor + smooth * plain
    long, short = lengths > original / low, lengths < original / high
    return np.where(long, plain / factor, np.where(short, plain, middle)).astype(np.float32)


def _yarn(rope: _Fields, base: float, dim: int, context: int) -> tuple[NDArray[np.float32], float]:
    """Return YaRN's frequencies and attention scale (https://arxiv.org/abs/2309.00071, sections 3.2 to 3.4)."""
    original = rope.integer("original_max_position_embeddings", context, most=1 << 28)
    factor = rope.number("factor", context / original)
    positions = np.float32(base) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    low, high = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0))
    )
    if rope.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.arange(dim // 2, dtype=np.float32) - np.float32(low)
    ramp = np.clip(ramp / np.float32(high - low if high != low else 0.001), 0, 1)
    keep = np.float32(1) - ramp
    mixed = (np.float32(1) / (np.float32(factor) * positions)) * (1 - keep) + (np.float32(1) / positions) * keep
    return mixed.astype(np.float32), _yarn_attention(rope, factor)


def _yarn_attention(rope: _Fields, factor: float) -> float:
    if rope.raw.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.raw.get("mscale") and rope.raw.get("mscale_all_dim"):
        return _yarn_scale(factor, rope.number("mscale")) / _yarn_scale(factor, rope.number("mscale_all_dim"))
    return _yarn_scale(factor)


def _yarn_scale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
