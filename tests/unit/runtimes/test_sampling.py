"""Tokens from logits, and text that is only printed when it is certain."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeflex.errors import BundleError, DeviceError, InputError
from edgeflex.runtimes.sampling import Sampler, TextStream, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, so that every longer character is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def token_of(byte: int) -> int:
    """Return the token of one byte (GPT-2's table of printable stand-ins)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))
    found = TOKENIZER.token_to_id(letter)
    assert found is not None
    return found


def pieces(ids, stops=()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stops)
    said = []
    for token in ids:
        said.append(stream.feed(token))
        if stream.stopped:
            break
    return [*said, stream.finish()], stream


def test_greedy_takes_the_largest_and_of_equals_the_first():
    assert Sampler()(np.array([0.0, 3.0, 3.0, -1.0], dtype=np.float32)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(bad: float, temperature: float):
    with pytest.raises(DeviceError, match="logit of token 2"):
        Sampler(temperature=temperature)(np.array([0.0, 1.0, bad], dtype=np.float32))


def test_all_wrong_numbers_stand_in_one_error():
    with pytest.raises(InputError, match="4 faults"):
        Sampler(temperature=-1.0, top_k=0, top_p=0.0, seed=-3)


def test_equal_seeds_draw_equal_tokens_and_others_do_not():
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    draws = [[sampler(logits) for _ in range(40)] for sampler in (Sampler(temperature=1.0, seed=s) for s in (7, 7, 8))]
    assert draws[0] == draws[1] != draws[2]


def test_draws_follow_softmax_of_the_divided_logits():
    logits = np.array([0.0, 1.0, 2.0], dtype=np.float32)
    sampler = Sampler(temperature=2.0, seed=1)
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=3) / 20_000
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    assert counts == pytest.approx(expected, abs=0.012)


@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 1.0, 3.0]), min_size=1, max_size=30),
    st.integers(1, 31),
    st.floats(0.01, 1.0),
)
def test_top_k_and_top_p_draw_only_from_what_they_allow(values: list[float], top_k: int, top_p: float):
    logits = np.array(values, dtype=np.float32)
    order = np.argsort(-logits, kind="stable")[:top_k]
    chances = np.exp(logits[order].astype(np.float64) - logits.max())
    chances /= chances.sum()
    before = np.concatenate([[0.0], np.cumsum(chances)[:-1]])
    allowed = {int(token) for token, mass in zip(order, before, strict=True) if mass < top_p + 1e-9}
    sampler = Sampler(temperature=1.0, top_k=top_k, top_p=top_p, seed=3)
    assert {sampler(logits) for _ in range(30)} <= allowed


def test_a_nucleus_wider_than_the_sorted_head_is_still_exact():
    logits = np.zeros(5000, dtype=np.float32)
    sampler = Sampler(temperature=1.0, top_p=0.5, seed=2)
    drawn = [sampler(logits) for _ in range(300)]
    assert max(drawn) < 2501
    assert max(drawn) > 1200


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-30, 1.7e308])
def test_temperatures_at_the_edge_of_numbers_draw_without_a_warning(temperature: float):
    logits = np.random.default_rng(0).normal(size=500, scale=9.0).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {Sampler(temperature=temperature, seed=seed)(logits) for seed in range(30)}
    assert drawn == {int(logits.argmax())} if temperature < 1 else len(drawn) > 20


def test_top_k_of_one_is_greedy_at_any_temperature():
    logits = np.random.default_rng(1).normal(size=100).astype(np.float32)
    assert {Sampler(temperature=5.0, top_k=1, seed=s)(logits) for s in range(20)} == {int(logits.argmax())}


@given(st.text(max_size=12))
def test_pieces_put_together_are_the_text_and_none_ends_inside_a_character(text: str):
    said, _ = pieces([token_of(byte) for byte in text.encode("utf-8", errors="ignore")])
    whole = text.encode("utf-8", errors="ignore").decode()
    assert "".join(said) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in said)


@given(st.binary(max_size=16))
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_decodes_them(raw: bytes):
    ids = [token_of(byte) for byte in raw]
    said, _ = pieces(ids)
    assert "".join(said) == TOKENIZER.decode(ids)


def test_a_character_of_four_tokens_comes_with_its_last():
    said, _ = pieces([token_of(byte) for byte in "a😀b".encode()])
    assert said == ["a", "", "", "", "😀", "b", ""]


def test_a_character_cut_off_by_the_end_is_shown_as_broken():
    said, _ = pieces([token_of(byte) for byte in "é".encode()[:1]])
    assert said == ["", "\ufffd"]


def test_byte_fallback_tokens_never_print_half_a_character():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(tokenizer)
    said = [stream.feed(byte) for byte in "é😀é".encode()]
    assert said == ["", "é", "", "", "", "😀", "", "é"]


def piece_tokenizer(decoder: str) -> Tokenizer:
    """Return a tokenizer whose decoder joins tokens by what stands before them, and that has special ones."""
    words = ["<unk>", "<s>", "▁Hello", "▁world", "llo", "##s", "▁", ".", "中"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>"])
    stripped = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    known: dict[str, Callable[[], Any]] = {
        "llama": lambda: decoders.Sequence(stripped),
        "metaspace": decoders.Metaspace,
        "word pieces": decoders.WordPiece,
    }
    tokenizer.decoder = known[decoder]()
    return tokenizer


@pytest.mark.parametrize("decoder", ["llama", "metaspace", "word pieces"])
@given(ids=st.lists(st.integers(0, 8), max_size=10))
def test_special_tokens_within_a_text_take_no_space_with_them(decoder: str, ids: list[int]):
    tokenizer = piece_tokenizer(decoder)
    stream = TextStream(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.finish() == tokenizer.decode(ids)


@given(st.text(alphabet="ab\n", max_size=20), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_split(text: str, stops: list[str]):
    said, stream = pieces([token_of(byte) for byte in text.encode()], stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert ("".join(said), stream.stopped) == (text, False)
        return
    cut = text[: min(ends)]  # token by token, the stop string that is complete first stops
    assert stream.stopped
    assert "".join(said) == cut[: min(cut.find(stop) for stop in stops if stop in cut)]


def test_nothing_that_may_become_a_stop_string_is_handed_out():
    said, stream = pieces([token_of(byte) for byte in b"ok\n\nUser: hi"], ["\n\nUser:"])
    assert said[:2] == ["o", "k"]
    assert "".join(said) == "ok"
    assert stream.stopped
    assert stream.feed(token_of(65)) == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="empty"):
        TextStream(TOKENIZER, [""])


def test_a_broken_tokenizer_file_is_a_damaged_bundle(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="no tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="no tokenizer"):
        load_tokenizer(tmp_path / "absent.json")
