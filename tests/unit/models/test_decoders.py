"""A decoder's folder is read exactly, tensor by tensor, and whatever is wrong with it is said at once."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError, MissingDependencyError
from edgeflex.models.checkpoint import INDEX, SINGLE
from edgeflex.models.decoders import open_decoder
from tests.builders import needed_data

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, WIDTH, EXPERTS, LAYERS, WORDS = 8, 4, 3, 2, 11
CONFIG: dict[str, Any] = {
    "model_type": "olmoe",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "eos_token_id": [3, 4],
}
LATENT: dict[str, Any] = {
    **{key: value for key, value in CONFIG.items() if key not in {"num_experts", "num_key_value_heads"}},
    "model_type": "deepseek_v2",
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}


def olmoe_shapes(stacked: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "lm_head.weight": (WORDS, HIDDEN),
    }
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        for norm, length in (("input_layernorm", 8), ("post_attention_layernorm", 8)):
            shapes[f"{start}{norm}.weight"] = (length,)
        for part, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8)):
            shapes[f"{start}self_attn.{part}_proj.weight"] = (rows, HIDDEN)
        shapes[f"{start}self_attn.q_norm.weight"] = (8,)
        shapes[f"{start}self_attn.k_norm.weight"] = (4,)
        shapes[f"{start}mlp.gate.weight"] = (EXPERTS, HIDDEN)
        if stacked:
            shapes[f"{start}mlp.experts.gate_up_proj"] = (EXPERTS, 2 * WIDTH, HIDDEN)
            shapes[f"{start}mlp.experts.down_proj"] = (EXPERTS, HIDDEN, WIDTH)
            continue
        for expert in range(EXPERTS):
            for part, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
                shapes[f"{start}mlp.experts.{expert}.{part}_proj.weight"] = shape
    return shapes


def numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return distinct values that float16 and bfloat16 hold exactly."""
    draw = np.random.default_rng(0)
    return {name: draw.integers(-100, 100, shape).astype(np.float32) / 16 for name, shape in shapes.items()}


def encoded(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def write_shard(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, values in tensors.items():
        raw = encoded(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_model(
    folder: Path, tensors: dict[str, np.ndarray] | None = None, *, config: dict[str, Any] = CONFIG, dtype: str = "F32"
) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    held = numbers(olmoe_shapes()) if tensors is None else tensors
    write_shard(folder / SINGLE, held, dtype)
    return held


def write_sharded(folder: Path, count: int = 4) -> dict[str, np.ndarray]:
    held = write_model(folder)
    (folder / SINGLE).unlink()
    names = list(held)
    files = {name: f"model-{place % count:05}.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        write_shard(folder / file, {name: held[name] for name in names if files[name] == file})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return held


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, name: str, **changes: Any) -> None:
    """Change a header's entry; it may grow, so the file is written anew with the same numbers."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


# --- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("block", [7, 1 << 18])
def test_every_format_gives_the_same_numbers(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr("edgeflex.models.checkpoint._BLOCK_VALUES", block)
    held = write_model(tmp_path, dtype=dtype)
    source = open_decoder(tmp_path)
    attention = [held[f"model.layers.1.self_attn.{one}_proj.weight"] for one in "qkv"]
    expert = [held[f"model.layers.1.mlp.experts.2.{one}_proj.weight"] for one in ("gate", "up")]
    np.testing.assert_array_equal(source.tensor("layers.1.qkv"), np.concatenate(attention))
    np.testing.assert_array_equal(source.tensor("layers.1.experts.2.gate_up"), np.concatenate(expert))
    np.testing.assert_array_equal(source.tensor("norm"), held["model.norm.weight"])
    np.testing.assert_array_equal(source.tensor("head"), held["lm_head.weight"])
    assert source.tensor("layers.1.qkv").dtype == np.float32


def test_shards_stacks_and_single_tensors_give_the_same_numbers(tmp_path):
    single = write_model(tmp_path / "single")
    assert write_sharded(tmp_path / "sharded").keys() == single.keys()
    stacked = {name: single[name] for name in olmoe_shapes(stacked=True) if name in single}
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.mlp.experts."
        stacked[experts + "gate_up_proj"] = np.stack(
            [
                np.concatenate([single[f"{experts}{expert}.{one}_proj.weight"] for one in ("gate", "up")])
                for expert in range(EXPERTS)
            ]
        )
        stacked[experts + "down_proj"] = np.stack(
            [single[f"{experts}{expert}.down_proj.weight"] for expert in range(EXPERTS)]
        )
    write_model(tmp_path / "stacked", stacked)
    sources = [open_decoder(tmp_path / form) for form in ("single", "sharded", "stacked")]
    for name in sources[0].names:
        for other in sources[1:]:
            np.testing.assert_array_equal(sources[0].tensor(name), other.tensor(name), err_msg=name)


def test_names_are_those_of_the_schema(tmp_path):
    write_model(tmp_path)
    source = open_decoder(tmp_path)
    dense = ("input_norm", "post_norm", "qkv", "q_norm", "k_norm", "o", "router")
    assert source.layer_tensors(1) == tuple(f"layers.1.{name}" for name in dense)
    assert all(name in source.names for layer in range(LAYERS) for name in source.expert_tensors(layer, EXPERTS - 1))
    assert source.shape("layers.0.experts.0.gate_up") == (2 * WIDTH, HIDDEN)
    assert source.shape("layers.0.k_norm") == (4,)
    assert source.graph.end_tokens == (3, 4)
    with pytest.raises(KeyError):
        source.tensor("layers.0.shared.down")


def test_a_read_takes_exactly_the_bytes_of_what_is_asked(tmp_path):
    write_model(tmp_path, numbers(olmoe_shapes(stacked=True)), dtype="BF16")
    source = open_decoder(tmp_path, headers_only=True)
    assert source.checkpoint.data_bytes_read == 0
    for read, values in (
        (lambda: source.tensor("layers.1.experts.1.gate_up"), 2 * WIDTH * HIDDEN),
        (lambda: source.rows("layers.0.qkv", 7, 10), 3 * HIDDEN),
        (lambda: source.gather("embedding", [5, 2, 5]), 2 * HIDDEN),
    ):
        before = source.checkpoint.data_bytes_read
        read()
        assert source.checkpoint.data_bytes_read - before == values * 2


@given(start=st.integers(0, 16), stop=st.integers(0, 16))
@settings(max_examples=40)
def test_rows_are_slices_of_the_whole(tmp_path_factory, start, stop):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    source = open_decoder(folder)
    whole = source.tensor("layers.0.qkv")
    if start <= stop:
        np.testing.assert_array_equal(source.rows("layers.0.qkv", start, stop), whole[start:stop])
    else:
        with pytest.raises(IndexError):
            source.rows("layers.0.qkv", start, stop)


def test_rotary_rows_of_latent_attention_become_half_split(tmp_path):
    held = latent_numbers()
    write_model(tmp_path, held, config=LATENT)
    source = open_decoder(tmp_path)
    q = held["model.layers.0.self_attn.q_proj.weight"]
    # per head: 4 plain rows, then pairs (0, 1) and (2, 3) become first and second halves
    order = [0, 1, 2, 3, 4, 6, 5, 7, 8, 9, 10, 11, 12, 14, 13, 15]
    np.testing.assert_array_equal(source.tensor("layers.0.q"), q[order])
    np.testing.assert_array_equal(source.rows("layers.0.q", 5, 13), q[order][5:13])
    down = held["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    np.testing.assert_array_equal(source.tensor("layers.0.kv_a"), down[[0, 1, 2, 3, 4, 5, 6, 8, 7, 9]])
    assert [layer.routing is None for layer in source.graph.layers] == [True, False]
    assert source.shape("layers.1.shared.gate_up") == (2 * 2 * WIDTH, HIDDEN)


def latent_numbers() -> dict[str, np.ndarray]:
    shapes = {
        name: shape for name, shape in olmoe_shapes().items() if "self_attn" not in name and "layers.0.mlp" not in name
    }
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.self_attn."
        shapes[start + "q_proj.weight"] = (16, HIDDEN)
        shapes[start + "kv_a_proj_with_mqa.weight"] = (10, HIDDEN)
        shapes[start + "kv_a_layernorm.weight"] = (6,)
        shapes[start + "kv_b_proj.weight"] = (18, 6)
        shapes[start + "o_proj.weight"] = (HIDDEN, 10)
    for part in ("gate", "up"):
        shapes[f"model.layers.0.mlp.{part}_proj.weight"] = (WIDTH, HIDDEN)
        shapes[f"model.layers.1.mlp.shared_experts.{part}_proj.weight"] = (2 * WIDTH, HIDDEN)
    shapes["model.layers.0.mlp.down_proj.weight"] = (HIDDEN, WIDTH)
    shapes["model.layers.1.mlp.shared_experts.down_proj.weight"] = (HIDDEN, 2 * WIDTH)
    return numbers(shapes)


def test_a_tied_head_is_the_embedding_unless_the_file_holds_both(tmp_path):
    held = numbers(olmoe_shapes())
    without = {name: values for name, values in held.items() if name != "lm_head.weight"}
    write_model(tmp_path / "tied", without, config={**CONFIG, "tie_word_embeddings": True})
    tied = open_decoder(tmp_path / "tied")
    np.testing.assert_array_equal(tied.tensor("head"), held["model.embed_tokens.weight"])
    assert tied.graph.tied_embedding
    write_model(tmp_path / "both", held, config={**CONFIG, "tie_word_embeddings": True})
    both = open_decoder(tmp_path / "both")
    np.testing.assert_array_equal(both.tensor("head"), held["lm_head.weight"])
    assert not both.graph.tied_embedding


def test_generation_settings_say_what_ends_a_text(tmp_path):
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3, 7]}))
    assert open_decoder(tmp_path).graph.end_tokens == (7, 3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 1.0}))
    assert open_decoder(tmp_path).graph.end_tokens == (3, 4)


def test_opening_a_huge_checkpoint_reads_headers_only(tmp_path):
    """The file is as large as its header promises and holds not one block of numbers."""
    config = {**CONFIG, "hidden_size": 4096, "intermediate_size": 14336, "num_experts": 8, "num_hidden_layers": 2}
    shapes = {
        name: tuple({WORDS: WORDS, 4: 2048}.get(one, 4096) for one in shape)
        for name, shape in olmoe_shapes().items()
        if ".experts." not in name
    }
    for layer in range(2):
        shapes[f"model.layers.{layer}.mlp.gate.weight"] = (8, 4096)
        shapes[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (8, 28672, 4096)
        shapes[f"model.layers.{layer}.mlp.experts.down_proj"] = (8, 4096, 14336)
    header: dict[str, Any] = {}
    reached = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [reached, reached + size]}
        reached += size
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + reached)
    assert (tmp_path / SINGLE).stat().st_blocks * 512 < 1 << 20 < 5 << 30 < reached
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    source = open_decoder(tmp_path, headers_only=True)
    assert source.checkpoint.data_bytes_read == 0
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    # a part is read without its neighbours
    assert source.rows("layers.1.experts.7.gate_up", 28670, 28672).shape == (2, 4096)
    assert source.checkpoint.data_bytes_read == 2 * 4096 * 2


def test_digests_tell_trainings_apart_as_far_as_they_say(tmp_path):
    held = write_model(tmp_path / "one")
    write_model(tmp_path / "same")
    other = dict(held)
    other["lm_head.weight"] = held["lm_head.weight"] + 1
    write_model(tmp_path / "other", other)
    full = [open_decoder(tmp_path / name).graph.weights_digest for name in ("one", "same", "other")]
    assert full[0] == full[1] != full[2]
    headers = [open_decoder(tmp_path / name, headers_only=True).graph.weights_digest for name in ("one", "other")]
    assert headers[0] == headers[1] != full[0]
    write_sharded(tmp_path / "sharded")
    sharded = open_decoder(tmp_path / "sharded").graph.weights_digest
    last = tmp_path / "sharded" / "model-00003.safetensors"
    raw = last.read_bytes()
    last.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert open_decoder(tmp_path / "sharded").graph.weights_digest != sharded
    heard: list[int] = []
    content = [open_decoder(tmp_path / name).content_digest(heard.append) for name in ("one", "same", "other")]
    assert content[0] == content[1] != content[2]
    assert sum(heard) == 3 * (tmp_path / "one" / SINGLE).stat().st_size


@pytest.mark.needs_data
def test_the_trained_decoder_opens_from_its_headers():
    source = open_decoder(needed_data("moe-lm"), headers_only=True)
    assert source.checkpoint.data_bytes_read == 0
    routings = [layer.routing for layer in source.graph.layers]
    assert [(one.experts, one.top_k) for one in routings if one is not None] == [(32, 4)] * 8
    assert source.tokenizer_file.name == "tokenizer.json"
    values = sum(int(np.prod(source.shape(name))) for name in source.names if name != "head")
    assert values * 2 == source.checkpoint.size_bytes - source.checkpoint.shards[0].data


# --- what is refused ---------------------------------------------------------------------------------


def test_an_unknown_family_hears_the_known_ones(tmp_path):
    write_model(tmp_path, config={**CONFIG, "model_type": "llama"})
    with pytest.raises(InputError, match=r"'llama'.*deepseek_v2, mixtral, olmoe, qwen2_moe, qwen3_moe"):
        open_decoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 16}, "sliding_window 16 is in use"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported; default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rotary positions: factor is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 10.0}}}, "per kind of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"num_experts_per_tok": 5}, "more than the 3 experts"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_settings_that_are_not_supported_are_refused(tmp_path, changes, said):
    write_model(tmp_path, config={**CONFIG, **changes})
    with pytest.raises(InputError, match=said):
        open_decoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q_lora_rank": 64}, "compressed queries"),
        ({"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}, "n_group is 8"),
        ({"topk_method": "noaux_tc"}, "greedy"),
        ({"scoring_func": "sigmoid"}, "softmax"),
        ({"norm_topk_prob": True}, "normalised routing"),
        ({"rms_norm_eps": 1e-5}, "latent's norm"),
        ({"first_k_dense_replace": 2}, "no layer has experts"),
        ({"qk_rope_head_dim": 3}, "an odd number"),
    ],
)
def test_settings_of_latent_attention_that_are_not_supported_are_refused(tmp_path, changes, said):
    write_model(tmp_path, latent_numbers(), config={**LATENT, **changes})
    with pytest.raises(InputError, match=said):
        open_decoder(tmp_path)


def test_harmless_settings_pass(tmp_path):
    harmless = {"attention_dropout": 0.1, "sliding_window": 32, "router_aux_loss_coef": 1.0, "use_cache": False}
    write_model(tmp_path, config={**CONFIG, **harmless})
    assert open_decoder(tmp_path).graph.context_tokens == 32


def test_all_faults_of_a_configuration_come_in_one_error(tmp_path):
    write_model(tmp_path, config={**CONFIG, "clip_qkv": 8.0, "hidden_act": "relu", "vocab_size": None})
    with pytest.raises(InputError, match="3 faults") as caught:
        open_decoder(tmp_path)
    assert all(word in str(caught.value) for word in ("clip_qkv", "relu", "vocab_size is missing"))


def test_tensors_that_do_not_fit_are_named_by_kind(tmp_path):
    held = numbers(olmoe_shapes())
    del held["model.layers.1.mlp.experts.2.up_proj.weight"]
    held["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    held["model.norm.weight"] = np.zeros(5, np.float32)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    write_model(tmp_path, held)
    with pytest.raises(InputError, match="3 faults") as caught:
        open_decoder(tmp_path)
    text = str(caught.value)
    assert "missing: model.layers.1.mlp.experts.2.up_proj.weight" in text
    assert "unexpected: model.layers.0.self_attn.q_proj.bias\n" in text
    assert "model.norm.weight (5,) instead of (8,)" in text


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no safetensors header"),
        (b"\x10\0\0\0\0\0\0\0{}", "no safetensors header"),
        (b"\xff" * 16, "no safetensors header"),
        (struct.pack("<Q", 4) + b"nope", "not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "JSON list"),
        (struct.pack("<Q", 60_000) + b"[" * 60_000, "not valid JSON"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, raw, said):
    write_model(tmp_path)
    (tmp_path / SINGLE).write_bytes(raw)
    with pytest.raises(InputError, match=said):
        open_decoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "F8_E4M3"}, "other formats"),
        ({"shape": [8, -1]}, "entry is damaged: model.norm.weight"),
        ({"shape": [9]}, "entry is damaged: model.norm.weight"),
        ({"data_offsets": [0, 8]}, "entry is damaged"),
        ({"data_offsets": [True, 8]}, "entry is damaged"),
        ({"data_offsets": [0, 32]}, "overlap or leave a gap"),
        ({"data_offsets": [10**9, 10**9 + 32]}, "truncated"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, change, said):
    write_model(tmp_path)
    edit_header(tmp_path / SINGLE, "model.norm.weight", **change)
    with pytest.raises(InputError, match=said):
        open_decoder(tmp_path)


@pytest.mark.parametrize("lost", [1, 100, -4])
def test_truncated_and_prolonged_files_are_refused(tmp_path, lost):
    write_model(tmp_path)
    path = tmp_path / SINGLE
    os.truncate(path, path.stat().st_size - lost)
    with pytest.raises(InputError, match="truncated" if lost > 0 else "damaged"):
        open_decoder(tmp_path)


def test_a_file_that_changes_under_us_is_noticed(tmp_path):
    write_model(tmp_path)
    source = open_decoder(tmp_path)
    os.truncate(tmp_path / SINGLE, 5000)
    with pytest.raises(InputError, match="changed after it was opened"):
        source.tensor("norm")
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match="No such file"):
        source.tensor("norm")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_numbers_that_are_not_finite_are_refused_when_read(tmp_path, value, dtype):
    held = numbers(olmoe_shapes())
    held["model.layers.0.mlp.experts.1.down_proj.weight"][3, 2] = value
    write_model(tmp_path, held, dtype=dtype)
    source = open_decoder(tmp_path)
    source.tensor("layers.0.experts.1.gate_up")
    with pytest.raises(InputError, match=r"experts\.1\.down_proj.*NaN or infinite"):
        source.tensor("layers.0.experts.1.down")


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a\\b.safetensors", "..", "x\0y"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path, file):
    write_sharded(tmp_path / "model")
    write_shard(tmp_path / "other.safetensors", {"model.norm.weight": np.zeros(8, np.float32)})
    edit_index(tmp_path / "model", **{"model.norm.weight": file})
    with pytest.raises(InputError, match="not a plain name inside"):
        open_decoder(tmp_path / "model")


def test_a_link_that_leads_out_is_refused_and_one_inside_is_followed(tmp_path):
    folder = tmp_path / "model"
    write_sharded(folder)
    shard = folder / "model-00000.safetensors"
    shard.rename(folder / "real.bin")
    shard.symlink_to("real.bin")
    open_decoder(folder)
    shard.unlink()
    (folder / "real.bin").rename(tmp_path / "outside.bin")
    shard.symlink_to(tmp_path / "outside.bin")
    with pytest.raises(InputError, match=r"link to .*outside the folder"):
        open_decoder(folder)
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(InputError, match="is missing"):
        open_decoder(folder)


def test_a_snapshot_of_the_hub_cache_links_to_its_blobs(tmp_path):
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    write_model(folder)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (folder / SINGLE).rename(blobs / "123")
    (folder / SINGLE).symlink_to("../../blobs/123")
    assert open_decoder(folder).tensor("norm").shape == (HIDDEN,)


def test_faults_of_all_shards_come_in_one_error(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00001.safetensors").unlink()
    os.truncate(tmp_path / "model-00002.safetensors", 400)
    edit_index(tmp_path, stray="model-00003.safetensors")
    with pytest.raises(InputError, match="3 faults") as caught:
        open_decoder(tmp_path)
    assert all(word in str(caught.value) for word in ("is missing", "header", "lacks tensors", "stray"))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    held = write_sharded(tmp_path, count=2)
    write_shard(tmp_path / "model-00001.safetensors", held)
    with pytest.raises(InputError, match="repeats tensors"):
        open_decoder(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{", "\xff"])
def test_damaged_indexes_are_refused(tmp_path, text):
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"weight_map|JSON"):
        open_decoder(tmp_path)


def test_folders_without_weights_or_configuration_say_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"config\.json' does not exist"):
        open_decoder(tmp_path)
    write_model(tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match="holds neither"):
        open_decoder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="can run code"):
        open_decoder(tmp_path)


def test_a_missing_tokenizer_is_told_when_it_is_needed(tmp_path):
    write_model(tmp_path)
    source = open_decoder(tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        _ = source.tokenizer_file


@pytest.mark.parametrize("place", ["nowhere", "no/such/folder", "", "a\0b", "../x/y", "https://x/y"])
def test_places_that_are_no_folder_are_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        open_decoder(place, allow_download=True)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a folder"):
        open_decoder(tmp_path / "file", allow_download=True)


def test_an_id_is_fetched_only_when_asked_and_possible(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="hf download org/name --local-dir DIR"):
        open_decoder("org/name")
    # the tests are offline
    with pytest.raises(InputError, match=r"could not be fetched|not in the local cache"):
        open_decoder("org/name", allow_download=True)
    with pytest.raises(InputError, match="a dry run fetches nothing"):
        open_decoder("org/name", allow_download=True, headers_only=True)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        open_decoder("org/name", allow_download=True)
