"""A small trained mixture-of-experts decoder that edgeflex ships, and English that every Python carries.

The weights (``data/tiny_decoder.safetensors``, made by ``benchmarks/tiny_decoder_train.py``) are stored as int8
codes with one scale per row and written out in bfloat16, as a Hugging Face folder of family OLMoE. Trained on the
spot, twenty seconds on one core do not reach words; see the figures that the script prints.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sysconfig
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeflex.errors import InputError
from edgeflex.files import staged_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.resources.abc import Traversable

    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"

# One document of this many is held out. The share is by name, not by position, so that nearly the same documents
# are held out in every version of Python.
_HELD_OUT_OF = 12
_LEAST_CHARACTERS = 80
# Tables, signatures and code fall below this share of letters and spaces; prose does not.
_PROSE = 0.82
_LEAST_DOCUMENTS = 20
_NO_PROSE = frozenset({"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
_COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)
_DATA = "tiny_decoder"

_CONFIG: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "clip_qkv": None,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 1024,
}


def tiny_config() -> dict[str, Any]:
    """Return the decoder's ``config.json``: 4 layers, 16 experts of which 2 answer, hidden 128, 1,024 tokens."""
    return dict(_CONFIG)


def library_text(part: Literal["train", "heldout"], *, root: Path | None = None) -> tuple[str, ...]:
    """Return prose of the standard library: its docstrings, comments and the pages of ``pydoc``, in a stable order.

    A file is only parsed, never run.

    Args:
        part: What the shipped decoder was trained on, or the twelfth that it never saw.
        root: The library's folder; by default that of this Python.

    Raises:
        InputError: This Python carries hardly any text (a stripped installation).
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    held_out = part == "heldout"
    found = [text for text in _pages(folder, held_out=held_out) if _is_prose(text)]
    for path in _modules(folder, held_out=held_out):
        found += [text for text in _explanations(path) if _is_prose(text)]
    texts = tuple(dict.fromkeys(found))
    if len(texts) < _LEAST_DOCUMENTS:
        raise InputError(
            f"The standard library at {folder} holds {len(texts)} texts, fewer than {_LEAST_DOCUMENTS}: "
            "its sources seem to be stripped. Give a text file of your own."
        )
    return texts


def write_tiny_decoder(folder: Path, *, overwrite: bool = False) -> Path:
    """Write the shipped decoder as a Hugging Face folder: ``config.json``, ``model.safetensors``, tokenizer.

    Returns:
        ``folder``.

    Raises:
        InputError: ``folder`` exists and ``overwrite`` is not set.
        DeviceError: The disk is full.
    """
    with staged_folder(folder, overwrite=overwrite) as staging:
        (staging / "config.json").write_text(json.dumps(_CONFIG, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (staging / "tokenizer.json").write_bytes(_shipped(f"{_DATA}.tokenizer.json").read_bytes())
        names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
        (staging / "tokenizer_config.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
        _write_weights(staging / "model.safetensors")
    return folder


def pack_weights(tensors: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
    """Return what is shipped of ``tensors``: int8 codes and fp16 scales per row; vectors and routers in fp16.

    Experts come fused, as transformers holds them: ``gate_up_proj [experts, 2 · inner, hidden]`` and ``down_proj``.
    """
    packed: dict[str, NDArray[Any]] = {}
    for name, values in tensors.items():
        if values.ndim < 2 or name.endswith("mlp.gate.weight"):
            packed[name] = values.astype(np.float16)
            continue
        scales = (np.abs(values).max(axis=-1, keepdims=True) / 127).astype(np.float16)
        codes = np.rint(values / np.maximum(scales.astype(np.float32), 1e-12))
        packed[f"{name}.codes"] = np.clip(codes, -127, 127).astype(np.int8)
        packed[f"{name}.scales"] = scales
    return packed


def unpack_weights(packed: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Return the fp32 tensors of a published checkpoint, one per expert and projection; see `pack_weights`."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, values in packed.items():
        if name.endswith(".scales"):
            continue
        plain = name.removesuffix(".codes")
        numbers = values.astype(np.float32)
        if plain != name:
            numbers *= packed[f"{plain}.scales"].astype(np.float32)
        tensors.update(_per_expert(plain, numbers))
    return tensors


def _per_expert(name: str, values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Return fused experts one by one, named as in published OLMoE checkpoints; other tensors as they are."""
    if values.ndim != 3:
        return {name: values}
    prefix, _, projection = name.rpartition(".")
    if projection == "down_proj":
        return {f"{prefix}.{expert}.down_proj.weight": rows for expert, rows in enumerate(values)}
    inner = values.shape[1] // 2
    gates = {f"{prefix}.{expert}.gate_proj.weight": rows[:inner] for expert, rows in enumerate(values)}
    return gates | {f"{prefix}.{expert}.up_proj.weight": rows[inner:] for expert, rows in enumerate(values)}


def _write_weights(path: Path) -> None:
    """Write the shipped weights in bfloat16, which numpy does not have and torch does."""
    import torch
    from safetensors.numpy import load
    from safetensors.torch import save_file

    tensors = unpack_weights(load(_shipped(f"{_DATA}.safetensors").read_bytes()))
    halves = {name: torch.from_numpy(values).to(torch.bfloat16).contiguous() for name, values in tensors.items()}
    save_file(halves, path, metadata={"format": "pt"})


def _shipped(name: str) -> Traversable:
    """Return a data file of this package."""
    return resources.files("edgeflex.models") / "data" / name


# --- the standard library's prose ----------------------------------------------------------------------


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % _HELD_OUT_OF == 0


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= _LEAST_CHARACTERS and text.isascii() and letters >= _PROSE * len(text)


def _modules(folder: Path, *, held_out: bool) -> Iterator[Path]:
    """Yield the library's sources of one part, in order of their names; installed packages are not walked."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _NO_PROSE)
        for file in sorted(files):
            path = Path(parent, file)
            if file.endswith(".py") and _is_held_out(path.relative_to(folder).as_posix()) == held_out:
                yield path


def _source(path: Path) -> tuple[str, ast.Module]:
    """Return a source and its tree; both empty for one that this Python cannot read (kept for other versions)."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return "", ast.Module(body=[], type_ignores=[])


def _explanations(path: Path) -> Iterator[str]:
    """Yield a source's docstrings, then its comments of several lines."""
    source, tree = _source(path)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            yield (ast.get_docstring(node) or "").strip()
    for run in _COMMENTS.findall(source):
        lines = (line.strip().removeprefix("#").removeprefix(" ") for line in run.splitlines())
        yield "\n".join(lines).strip()


def _pages(folder: Path, *, held_out: bool) -> Iterator[str]:
    """Yield the paragraphs of the language reference that ``pydoc`` shows (``help('assert')``), unindented."""
    _, tree = _source(folder / "pydoc_data" / "topics.py")
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, page in sorted(ast.literal_eval(node.value).items()):
                if _is_held_out(name) == held_out:
                    yield from _sections(page)


def _sections(page: str) -> Sequence[str]:
    """Return runs of prose paragraphs: a page mixes them with grammar and code, which would rule it out whole."""
    runs: list[list[str]] = [[]]
    for paragraph in page.split("\n\n"):
        text = inspect.cleandoc(paragraph)
        if _is_prose(text):
            runs[-1].append(text)
        elif runs[-1]:
            runs.append([])
    return ["\n\n".join(run) for run in runs if run]
