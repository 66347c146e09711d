"""The shipped decoder in transformers: it has learnt English, and answers alike each time."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgeflex.models.tiny_decoder import library_text, write_tiny_decoder

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers", reason="the shipped decoder is read by transformers")
tokenizers = pytest.importorskip("tokenizers")

WINDOW = 128
PROMPTS = ("Return the number of", "This module provides", "If the file does not exist,")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_decoder(tmp_path_factory.mktemp("tiny") / "decoder")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def heldout(tokenizer: Any) -> np.ndarray:
    encoded = (tokenizer.encode(text).ids for text in library_text("heldout"))
    tokens = np.fromiter(itertools.chain.from_iterable([*ids, 0] for ids in encoded), dtype=np.int64)
    return tokens[: 48 * WINDOW]


def answer(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    begin = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        said = model.generate(
            begin, attention_mask=torch.ones_like(begin), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return str(tokenizer.decode(said[0].tolist()))


def test_it_predicts_text_it_never_saw_far_better_than_frequencies(model: Any, heldout: np.ndarray) -> None:
    rows = torch.from_numpy(heldout.reshape(-1, WINDOW))
    with torch.no_grad():
        loss = np.mean([model(input_ids=part, labels=part).loss.item() for part in rows.split(16)])
    counts = np.bincount(heldout, minlength=1024)
    # the frequencies of the very text that is to be predicted: no unigram model does better
    unigram = -(np.log(np.maximum(counts, 1) / len(heldout)) * counts).sum() / len(heldout)
    assert loss < unigram - 1.5


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_same_each_time(model: Any, tokenizer: Any, prompt: str) -> None:
    first = answer(model, tokenizer, prompt, 32)
    assert first.startswith(prompt)
    assert first == answer(model, tokenizer, prompt, 32)


def test_sampled_text_consists_of_words(model: Any, tokenizer: Any) -> None:
    known = Counter(word for text in library_text("heldout") for word in re.findall(r"[a-z]{2,}", text.lower()))
    torch.manual_seed(0)
    begin = torch.tensor([tokenizer.encode("This module provides").ids] * 4)
    with torch.no_grad():
        said = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            max_new_tokens=60,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=0,
        )
    text = " ".join(tokenizer.decode(row.tolist()) for row in said).lower()
    words = re.findall(r"[a-z]{2,}", text)
    assert len(words) > 60
    assert sum(word in known for word in words) > 0.75 * len(words)


def test_every_layer_uses_several_experts_and_none_alike(model: Any, heldout: np.ndarray) -> None:
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(heldout[: 8 * WINDOW].reshape(8, -1)), output_router_logits=True)
    for layer in logits.router_logits:
        uses = torch.bincount(layer.topk(2).indices.flatten(), minlength=16)
        assert (uses > 0).sum() >= 12
        assert uses.max() < 0.5 * uses.sum()


def test_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ("naïve — 中文 🙂", PROMPTS[0], " two  spaces\n\tand a tab"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
