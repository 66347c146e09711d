"""Decoder calibration on a tiny random decoder: against whole forward passes, resumed, damaged, and shared out."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgeflex.costs.decoder_calibration import calibrate_decoder
from edgeflex.costs.decoder_files import read_routing
from edgeflex.errors import InputError
from edgeflex.models.decoder_reference import Reference, divergence
from edgeflex.models.decoders import open_decoder
from edgeflex.progress import Silent
from edgeflex.schema import Precision
from edgeflex.transforms.decoder_weights import dequantize, quantize_matrix

INT8, INT4 = Precision.INT8_DYNAMIC, Precision.INT4_GROUP32
LAYERS, EXPERTS, TOP_K, HIDDEN, INNER, VOCABULARY = 2, 6, 2, 32, 32, 64


def write_decoder(folder, seed=0, *, rare=True):
    """Write a random OLMoE; with ``rare`` expert 5 of layer 0 is hardly ever chosen."""
    draw = np.random.default_rng(seed)

    def matrix(*shape):
        return draw.normal(0, 1 / shape[-1] ** 0.5, shape).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": draw.normal(0, 1, (VOCABULARY, HIDDEN)).astype(np.float32),
        "lm_head.weight": 3 * matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"{at}{name}.weight"] = np.ones(HIDDEN, np.float32)
        for name in "qkvo":
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN)
        tensors[f"{at}mlp.gate.weight"] = 2 * matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name in ("gate", "up", "down"):
                tensors[f"{at}mlp.experts.{expert}.{name}_proj.weight"] = matrix(HIDDEN, HIDDEN)
    if rare:
        # of each pair of opposites one is always chosen, so expert 5 must beat the smaller of two
        gate = 3 * tensors["model.layers.0.mlp.gate.weight"]
        gate[1], gate[3], gate[4], gate[5] = -gate[0], -gate[2], 0.05 * gate[4], 0.02 * gate[5]
        tensors["model.layers.0.mlp.gate.weight"] = gate
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": False,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return open_decoder(folder)


def text_of(count=6, length=24, seed=3):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCABULARY, length - row % 3).tolist() for row in range(count)]


def calibrate(source, folder, **more):
    options = {"kl_tokens": 1000, "expert_tokens": 16, "prompt_tokens": 8, "chunk_tokens": 4, **more}
    return calibrate_decoder(source, text_of(), folder=folder, **options)


def whole_kl(source, applies, precision):
    """Return KL by a whole forward pass a sequence, with the matrices that ``applies`` names changed."""

    def weight(name):
        if not applies(name) or len(source.shape(name)) != 2 or name.endswith("router"):
            return None
        return dequantize(quantize_matrix(source.tensor(name), precision))

    true, other, found = Reference(source), Reference(source, weight), []
    with torch.no_grad():
        for one in text_of():
            tokens = torch.tensor([one])
            found.append(divergence(true, true.forward(tokens).hidden, other, other.forward(tokens).hidden))
    return float(torch.cat(found).double().mean())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("calibrated")
    source = write_decoder(folder / "model")
    return source, calibrate(source, folder / "out"), folder / "out"


def kl_of(calibration, unit, precision):
    (found,) = [one for one in calibration.losses if (one.unit, one.precision) == (unit, precision)]
    return found.kl


@pytest.mark.parametrize("precision", [INT8, INT4])
def test_groups_have_the_kl_of_whole_forward_passes(measured, precision):
    source, calibration, _ = measured
    for unit in ("embedding", "head"):
        want = whole_kl(source, lambda name, unit=unit: name == unit, precision)
        assert kl_of(calibration, unit, precision) == pytest.approx(want, rel=1e-3, abs=2e-7)
    for layer in range(LAYERS):
        experts = f"layers.{layer}.experts."
        dense = whole_kl(
            source, lambda name, at=layer: name.startswith(f"layers.{at}.") and ".experts." not in name, precision
        )
        assert kl_of(calibration, f"layers.{layer}", precision) == pytest.approx(dense, rel=1e-3, abs=2e-7)
        want = whole_kl(source, lambda name, at=experts: name.startswith(at), precision)
        found = sum(kl_of(calibration, f"{experts}{one}", precision) for one in range(EXPERTS))
        if layer == LAYERS - 1:
            # the routing of this layer is decided before its experts run
            assert found == pytest.approx(want, rel=1e-3, abs=2e-7)
        assert found == pytest.approx(want, rel=0.05)
    everything = whole_kl(source, lambda _: True, precision)
    assert calibration.uniform_kl[precision] == pytest.approx(everything, rel=1e-3)


def test_four_bits_lose_more_than_eight_and_change_more_choices(measured):
    _, calibration, _ = measured
    assert calibration.uniform_kl[INT4] > 10 * calibration.uniform_kl[INT8] > 0
    assert 0.5 < calibration.router_agreement[INT4] < calibration.router_agreement[INT8] <= 1.0


def test_rare_experts_are_judged_by_enough_tokens_and_count_little(measured):
    _, calibration, folder = measured
    uses = read_routing(folder).uses(LAYERS, EXPERTS)
    experts = [one for one in calibration.losses if ".experts." in one.unit and one.precision is INT4]
    assert min(one.tokens for one in experts) >= 16
    rare = int(np.argmin(uses[0]))
    assert uses[0, rare] < 0.1
    mean = np.mean([one.kl for one in experts if one.unit.startswith("layers.0.")])
    assert kl_of(calibration, f"layers.0.experts.{rare}", INT4) < 0.3 * mean
    assert all(one.kl > 0 for one in experts)


def test_the_trace_holds_every_choice_of_every_real_token(measured):
    source, calibration, folder = measured
    routing = read_routing(folder)
    assert len(routing.expert) == calibration.tokens * LAYERS * TOP_K
    first = torch.tensor([text_of()[1]])
    with torch.no_grad():
        (want, _) = Reference(source).forward(first).routed
    rows = (routing.turn == 1) & (routing.layer == 0)
    assert want is not None
    assert routing.expert[rows].reshape(-1, TOP_K).tolist() == want.experts.tolist()
    assert np.allclose(routing.weight[rows].reshape(-1, TOP_K), want.weights.numpy())
    assert routing.step[rows][::TOP_K].tolist() == list(range(first.shape[1]))
    assert routing.phase[rows][::TOP_K].tolist() == [0] * 8 + [1] * (first.shape[1] - 8)
    assert routing.iter[rows][::TOP_K].tolist() == [0] * 4 + [1] * 4 + [0] * (first.shape[1] - 8)
    assert routing.uses(LAYERS, EXPERTS).sum(axis=1) == pytest.approx([TOP_K] * LAYERS)


class _Killed(Silent):
    """Progress that ends the run after some layers, as a killed process would."""

    def __init__(self, layers):
        self._left = layers

    @contextmanager
    def task(self, title, total):
        yield self._advance

    def _advance(self, count):
        self._left -= count
        if self._left <= 0 and count:
            raise KeyboardInterrupt


def test_a_killed_calibration_goes_on_and_ends_in_the_same_result(measured, tmp_path):
    source, whole, _ = measured
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "c", progress=_Killed(1))
    assert (tmp_path / "c" / "state.json").exists()
    resumed = calibrate(source, tmp_path / "c")
    assert resumed == whole
    assert not list((tmp_path / "c").glob("state*"))
    # a finished one is only read
    assert calibrate(source, tmp_path / "c", progress=_Killed(0)) == whole


def test_damaged_state_is_refused(measured, tmp_path):
    source, _, _ = measured
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "c", progress=_Killed(1))
    path = tmp_path / "c" / "state-1.npz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(InputError, match="damaged"):
        calibrate(source, tmp_path / "c")


def test_a_folder_of_another_text_or_setting_is_refused(measured, tmp_path):
    source, _, folder = measured
    with pytest.raises(InputError, match="another expert_tokens"):
        calibrate(source, folder, expert_tokens=17)
    other = write_decoder(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="another weights_digest"):
        calibrate(other, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        calibrate(source, tmp_path / "full")


@pytest.mark.parametrize("text", [[], [[1]], [[1] * 65]])
def test_text_that_cannot_be_used_is_refused(measured, tmp_path, text):
    source, _, _ = measured
    with pytest.raises(InputError, match="calibration text"):
        calibrate_decoder(source, text, folder=tmp_path / "c")
