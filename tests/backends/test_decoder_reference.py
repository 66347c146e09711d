"""The fp32 reference says what transformers says, for every family and form of checkpoint, whatever is replaced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeflex.errors import InputError
from edgeflex.models.decoder_reference import KeyValues, Reference, divergence
from edgeflex.models.decoders import open_decoder
from tests.builders import needed_data

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers", reason="parity is against transformers")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "intermediate_size": 48}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "olmoe tied": (
        "Olmoe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 24, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v2 scaled": (
        "DeepseekV2",
        {
            **LATENT,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.707,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}


def tiny(kind: str, **more: Any) -> Any:
    """Return a random model of transformers whose norms and biases matter too."""
    family, settings = MODELS[kind]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings, **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.5 if "gate.weight" in name else 0.15)
    return model


def save_stacked(model: Any, folder: Path) -> None:
    """Save as transformers holds it: all experts of a layer in one tensor."""
    tied = model.config.tie_word_embeddings
    state = {name: value.contiguous() for name, value in model.state_dict().items() if not (tied and "lm_head" in name)}
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


def prompts(count: int = 3, length: int = 17, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(3))


def theirs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    found = list(prompt)
    for _ in range(count):
        found.append(int(theirs(model, torch.tensor([found]))[0, -1].argmax()))
    return found[len(prompt) :]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("form", ["one tensor per expert", "stacked", "sharded"])
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path, kind, form):
    model = tiny(kind)
    folder = tmp_path / "model"
    if form == "stacked":
        save_stacked(model, folder)
    else:
        model.save_pretrained(folder, max_shard_size="60KB" if form == "sharded" else "5GB")
    if form == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 3
    reference = Reference(open_decoder(folder), keep_bytes=1 << 26)
    tokens = prompts()
    assert (reference.logits(tokens) - theirs(model, tokens)).abs().max() < 1e-4
    prompt = tokens[0, :5].tolist()
    assert list(reference.generate(prompt, 20)) == greedy(model, prompt, 20)


def test_saved_per_expert_really_means_a_tensor_for_each(tmp_path):
    tiny("olmoe").save_pretrained(tmp_path)
    tensors = open_decoder(tmp_path).checkpoint.tensors
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in tensors
    tiny("mixtral").save_pretrained(tmp_path / "mixtral")
    assert any(".w1.weight" in name for name in open_decoder(tmp_path / "mixtral").checkpoint.tensors)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
        {"rope_type": "default", "rope_theta": 500.0},
    ],
    ids=lambda rope: "-".join(str(value) for value in rope.values()),
)
def test_rotary_scalings_are_those_of_transformers(tmp_path, rope):
    # a dictionary of our own each: transformers fills in what it is given
    model = tiny("qwen3_moe", rope_parameters={"rope_theta": 10000.0, **rope})
    model.save_pretrained(tmp_path)
    source = open_decoder(tmp_path)
    rotary = model.model.rotary_emb
    np.testing.assert_allclose(source.graph.attention.inverse_frequencies, rotary.inv_freq.numpy(), rtol=5e-7)
    assert source.graph.attention.rotary_scale == pytest.approx(rotary.attention_scaling, rel=1e-6)
    tokens = prompts(length=60)
    assert (Reference(source).logits(tokens) - theirs(model, tokens)).abs().max() < 1e-4


def test_settings_of_older_transformers_mean_the_same(tmp_path):
    tiny("mixtral", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}).save_pretrained(
        tmp_path
    )
    new = open_decoder(tmp_path).graph
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_decoder(tmp_path).graph == new


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v2 scaled", "qwen2_moe"])
def test_routing_is_that_of_transformers(tmp_path, kind):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    chosen = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out, index=index: chosen.update({index: out[1:]}))
    tokens = prompts()
    theirs(model, tokens)
    routed = Reference(open_decoder(tmp_path)).forward(tokens).routed
    assert [one is not None for one in routed] == [index in chosen for index in range(len(routed))]
    for index, (weights, experts) in chosen.items():
        ours = routed[index]
        assert ours is not None
        order = weights.argsort(dim=-1, descending=True)
        assert torch.equal(ours.experts, experts.gather(1, order))
        torch.testing.assert_close(ours.weights, weights.gather(1, order))


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v2"])
def test_tokens_that_follow_others_see_them(tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path)
    reference = Reference(open_decoder(tmp_path), keep_bytes=1 << 26)
    tokens = prompts(count=2)
    whole = reference.logits(tokens)
    past = KeyValues()
    parts = [reference.head(reference.forward(part, past=past).hidden) for part in tokens.split([4, 1, 7, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


def test_padding_behind_changes_nothing_before(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path)
    reference = Reference(open_decoder(tmp_path))
    tokens = prompts(count=1)
    padded = torch.cat((tokens, torch.zeros(1, 6, dtype=torch.int64)), dim=1)
    torch.testing.assert_close(reference.logits(padded)[:, :17], reference.logits(tokens), atol=1e-5, rtol=1e-4)


def test_a_replaced_matrix_acts_as_if_it_were_saved(tmp_path):
    model = tiny("qwen2_moe")
    save_stacked(model, tmp_path / "model")
    source = open_decoder(tmp_path / "model")
    names = ("layers.1.experts.2.down", "layers.0.qkv", "layers.1.shared.gate_up", "embedding", "head")
    rounded = {name: np.round(source.tensor(name), 1) for name in names}
    reference = Reference(source, keep_bytes=1 << 26)
    tokens = prompts()
    before = reference.logits(tokens)
    changed = reference.replaced(rounded.get).logits(tokens)
    state = model.state_dict()
    state["model.layers.1.mlp.experts.down_proj"][2] = torch.from_numpy(rounded["layers.1.experts.2.down"])
    for name, rows in zip("qkv", torch.from_numpy(rounded["layers.0.qkv"]).split([64, 32, 32]), strict=True):
        state[f"model.layers.0.self_attn.{name}_proj.weight"].copy_(rows)
    gate, up = torch.from_numpy(rounded["layers.1.shared.gate_up"]).chunk(2)
    state["model.layers.1.mlp.shared_expert.gate_proj.weight"].copy_(gate)
    state["model.layers.1.mlp.shared_expert.up_proj.weight"].copy_(up)
    state["model.embed_tokens.weight"].copy_(torch.from_numpy(rounded["embedding"]))
    state["lm_head.weight"].copy_(torch.from_numpy(rounded["head"]))
    assert (changed - theirs(model, tokens)).abs().max() < 1e-4
    assert (changed - before).abs().max() > 1e-2
    assert torch.equal(reference.logits(tokens), before)
    with pytest.raises(InputError, match=r"layers\.0\.o is"):
        reference.replaced(lambda name: np.zeros((2, 2), np.float32) if name == "layers.0.o" else None).logits(tokens)


def test_losses_and_divergence_are_those_of_whole_logits(tmp_path, monkeypatch):
    tiny("olmoe").save_pretrained(tmp_path)
    monkeypatch.setattr("edgeflex.models.decoder_reference._HEAD_BLOCK_BYTES", 97 * 4 * 5)
    monkeypatch.setattr("edgeflex.models.decoder_reference._BLOCK_BYTES", 64 * 4 * 3 * 7)
    true = Reference(open_decoder(tmp_path))
    other = true.replaced(lambda name: np.round(true.source.tensor(name), 1) if name.endswith(".o") else None)
    tokens = prompts()
    hidden, far = true.forward(tokens).hidden, other.forward(tokens).hidden
    logits = true.head(hidden)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(true.losses(tokens, hidden).flatten(), wanted)
    log_p, log_q = logits.log_softmax(-1), other.head(far).log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(true, hidden, other, far), kl.flatten(), atol=1e-6, rtol=1e-4)
    assert divergence(true, hidden, true, hidden).abs().max() < 1e-6


def test_equal_router_weights_go_to_the_lower_expert(tmp_path):
    tiny("olmoe").save_pretrained(tmp_path)
    source = open_decoder(tmp_path)
    level = Reference(source, lambda name: np.zeros_like(source.tensor(name)) if name.endswith("router") else None)
    routed = level.forward(prompts()).routed[0]
    assert routed is not None
    assert torch.equal(routed.experts, torch.arange(3).expand(51, 3))


def test_end_tokens_and_the_context_end_a_text(tmp_path):
    model = tiny("olmoe")
    first = greedy(model, [5, 6], 6)
    model.config.eos_token_id = first[3]
    model.generation_config.eos_token_id = [first[3]]
    model.save_pretrained(tmp_path)
    reference = Reference(open_decoder(tmp_path), keep_bytes=1 << 26)
    assert reference.generate([5, 6], 6) == tuple(first[: first.index(first[3]) + 1])
    assert len(reference.generate(list(range(60)), 50)) <= 4
    for prompt in ([], list(range(65))):
        with pytest.raises(InputError, match="1 to 64 are possible"):
            reference.generate(prompt, 3)
    with pytest.raises(InputError, match="vocabulary has 97"):
        reference.generate([97], 3)


@pytest.mark.needs_data
def test_the_trained_decoder_speaks_as_in_transformers():
    from tokenizers import Tokenizer

    folder = needed_data("moe-lm")
    source = open_decoder(folder)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(source.tokenizer_file)).encode(text[:20000]).ids[:768]
    tokens = torch.tensor(ids).reshape(3, 256)
    reference = Reference(source, keep_bytes=1 << 28)
    passed = reference.forward(tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = theirs(model, tokens)
    assert (reference.head(passed.hidden) - logits).abs().max() < 1e-4
    loss = float(reference.losses(tokens, passed.hidden).mean())
    assert loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())), abs=1e-4
    )
    assert 1.0 < loss < 5.0, "a trained decoder is far below the ln 8192 = 9.01 of an untrained one"
    assert list(reference.generate(ids[:24], 12)) == greedy(model, ids[:24], 12)
