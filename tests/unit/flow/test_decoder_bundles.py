"""What the corridor does with a decoder's bundle, beside what its rooms do."""

from __future__ import annotations

import signal

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeflex.bundle_moe import TOKENIZER, open_decoder_bundle, seal_file, write_decoder_manifest
from edgeflex.flow.decoder_bundles import record_trace
from edgeflex.runtimes.sampling import Sampler
from edgeflex.runtimes.trace import read_trace
from tests.tiny_decoder import LAYERS, TOP_K, VOCABULARY, write_tiny_bundle


@pytest.fixture
def speaking(tmp_path):
    """Return the tiny bundle with a tokenizer."""
    folder = write_tiny_bundle(tmp_path / "bundle")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = open_decoder_bundle(folder).manifest
    entry = seal_file(folder, "tokenizer.json", TOKENIZER)
    write_decoder_manifest(folder, manifest.model_copy(update={"files": (*manifest.files, entry)}))
    return folder


def test_a_recorded_trace_is_whole_or_not_written(speaking, tmp_path, monkeypatch):
    prompt, trace = tmp_path / "prompt.txt", tmp_path / "trace.csv"
    prompt.write_text("Hello")
    choose, calls = Sampler.__call__, iter(range(100))

    def interrupted(sampler, logits):
        if next(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return choose(sampler, logits)

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            record_trace(speaking, prompt, trace, max_tokens=9)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not trace.exists()
    assert record_trace(speaking, prompt, trace, max_tokens=9) == 9
    recorded = read_trace(trace)
    assert recorded.decode_tokens == 8
    assert len(recorded.expert) == (5 + 8) * (LAYERS - 1) * TOP_K
