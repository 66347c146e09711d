"""The shipped decoder: what is packed comes back, its folder is a published layout, its text is the library's."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeflex.errors import InputError
from edgeflex.models.tiny_decoder import (
    library_text,
    pack_weights,
    tiny_config,
    unpack_weights,
    write_tiny_decoder,
)

if TYPE_CHECKING:
    from pathlib import Path

PAGE = "A statement of this kind is carried out when its condition holds, and is left out when it does not hold."


def small_library(folder: Path, modules: int = 60) -> Path:
    for number in range(modules):
        folder.joinpath(f"module{number}.py").write_text(f'"""{PAGE} This is module {"x" * (number + 1)}."""\n')
    return folder


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([2, 4, 6]), st.integers(1, 9))
def test_packed_rows_come_back_within_half_a_step(seed: int, experts: int, rows: int, columns: int) -> None:
    values = np.random.default_rng(seed).normal(size=(experts, rows, columns)).astype(np.float32)
    packed = pack_weights({"model.layers.0.mlp.experts.gate_up_proj": values})
    back = unpack_weights(packed)
    for expert in range(experts):
        halves = [back[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up")]
        step = np.abs(values[expert]).max(axis=-1, keepdims=True) / 127
        # scales are held in fp16, whose rounding moves a code of 127 by 127 · 2⁻¹¹ of a step
        assert (np.abs(np.concatenate(halves) - values[expert]) <= 0.57 * step + 1e-6).all()


def test_vectors_and_routers_are_not_coded() -> None:
    router = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
    packed = pack_weights({"model.layers.0.mlp.gate.weight": router, "model.norm.weight": router[0]})
    assert {name: value.dtype for name, value in packed.items()} == {
        "model.layers.0.mlp.gate.weight": np.float16,
        "model.norm.weight": np.float16,
    }


def test_the_folder_holds_every_tensor_that_its_config_calls_for(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = write_tiny_decoder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    assert config == tiny_config()
    assert hidden % 32 == inner % 32 == 0
    wanted = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            wanted[f"{at}.{name}.weight"] = (hidden,)
        for name in "qkvo":
            wanted[f"{at}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        wanted[f"{at}.mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            one = f"{at}.mlp.experts.{expert}"
            wanted[f"{one}.gate_proj.weight"] = wanted[f"{one}.up_proj.weight"] = (inner, hidden)
            wanted[f"{one}.down_proj.weight"] = (hidden, inner)
    with safe_open(folder / "model.safetensors", "pt") as file:
        held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
        kinds = {file.get_slice(name).get_dtype() for name in held}
    assert held == wanted
    assert kinds == {"BF16"}


def test_what_ships_is_small() -> None:
    data = [one for one in resources.files("edgeflex.models").joinpath("data").iterdir() if "tiny_decoder" in one.name]
    assert len(data) == 2
    assert sum(len(one.read_bytes()) for one in data) < 2 << 20


def test_a_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("mine.txt").write_text("mine")
    with pytest.raises(InputError):
        write_tiny_decoder(tmp_path)


def test_the_library_is_split_without_overlap_and_alike_each_time(tmp_path: Path) -> None:
    root = small_library(tmp_path, 600)
    train, heldout = library_text("train", root=root), library_text("heldout", root=root)
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 600
    assert 25 <= len(heldout) <= 80  # a twelfth is 50
    assert heldout == library_text("heldout", root=root)


def test_pages_docstrings_and_comments_are_read_and_code_is_not(tmp_path: Path) -> None:
    root = small_library(tmp_path, 600)
    root.joinpath("pydoc_data").mkdir()
    code = "for x in y:\n    z[x] += {1: 2}[x] + f(x)(y)[z] | {3} - {4} * {5} / {6} % {7}\n"
    page = f"A heading\n*********\n\n   {PAGE}\n\n   {code}\n\n   {PAGE} Again."
    topics = {f"topic{number}": page.replace("Again", f"Again {number}") for number in range(9)}
    root.joinpath("pydoc_data", "topics.py").write_text(f"topics = {topics!r}\n")
    comment = f"# {PAGE[:60]}\n    # {PAGE[60:]} Comment.\n"
    root.joinpath("commented.py").write_text(f"def f():\n    {comment}    return 1\n")
    texts = (*library_text("train", root=root), *library_text("heldout", root=root))
    assert any(text.endswith("Comment.") and "#" not in text for text in texts)
    assert any(text.endswith("Again 3.") for text in texts)
    assert not any("z[x]" in text for text in texts)


def test_installed_packages_and_broken_sources_are_passed_over(tmp_path: Path) -> None:
    root = small_library(tmp_path)
    before = library_text("train", root=root)
    root.joinpath("site-packages").mkdir()
    root.joinpath("site-packages", "other.py").write_text(f'"""{PAGE} From somewhere else."""\n')
    root.joinpath("broken.py").write_text("def (:\n")
    assert library_text("train", root=root) == before


def test_a_stripped_installation_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stripped"):
        library_text("heldout", root=tmp_path)


def test_this_python_carries_prose_of_both_parts() -> None:
    heldout = library_text("heldout")
    assert sum(map(len, heldout)) > 50_000
    assert all(len(text) >= 80 for text in heldout)
