"""The real thing: a decoder's engines on this machine's GPU. Skipped with the reason where it cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import DeviceError, EdgeflexError
from edgeflex.exporters.decoder_files import BundleWeights
from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder
from edgeflex.models.decoder_reference import Reference
from edgeflex.runtimes.cuda_driver import CudaContext
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.tensorrt_build import build, load_tensorrt
from edgeflex.runtimes.tensorrt_ways import measuring
from edgeflex.schema_trt import INDEX_FILE
from tests.random_decoder import RandomSource, exact_plan, mixed_plan
from tests.tiny_decoder import tiny_graph

pytestmark = pytest.mark.needs_gpu

PROMPT = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30]
NEW = 24
FP32_LOGITS = 1e-4  # of the largest
HALF_LOGITS = 2e-2


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Any:
    try:
        load_tensorrt()
    except EdgeflexError as error:
        pytest.skip(str(error))
    return RandomSource(tiny_graph(), tmp_path_factory.mktemp("model"))


def built(source: Any, plan: Any, folder: Any, *, half: bool) -> Any:
    export_tensorrt_decoder(source, plan, folder, half=half)
    build(open_decoder_bundle(folder))
    return folder


@pytest.fixture(scope="module")
def exact(source, tmp_path_factory):
    return built(source, exact_plan(source.graph), tmp_path_factory.mktemp("exact") / "bundle", half=False)


@pytest.fixture(scope="module")
def mixed(source, tmp_path_factory):
    return built(source, mixed_plan(source.graph), tmp_path_factory.mktemp("mixed") / "bundle", half=True)


def logits_of(folder: Any, tokens: list[int], settings: Settings | None = None) -> Any:
    """Return the logits of every position while ``tokens`` are said, one by one."""
    rows: list[Any] = []

    def choose(row: Any) -> int:
        rows.append(row)
        return tokens[len(rows) % len(tokens)]

    with DecoderSession.from_bundle(folder, settings) as session:
        list(session.generate(tokens[:1], len(tokens), choose))
    return np.stack(rows)


def test_fp32_is_the_reference(source, exact):
    tokens = [*PROMPT, *range(20)]
    wanted = Reference(source).logits(torch.tensor([tokens]))[0].numpy()
    assert np.abs(logits_of(exact, tokens) - wanted).max() < FP32_LOGITS * np.abs(wanted).max()
    with DecoderSession.from_bundle(exact) as session:
        assert list(session.generate(PROMPT, NEW)) == list(Reference(source).generate(PROMPT, NEW))


def test_half_precision_stays_near_the_reference_with_the_same_weights(source, mixed):
    tokens = [*PROMPT, *range(20)]
    weights = BundleWeights(mixed, open_decoder_bundle(mixed).manifest.matrices, source)
    wanted = Reference(source, weights).logits(torch.tensor([tokens]))[0].numpy()
    assert np.abs(logits_of(mixed, tokens) - wanted).max() < HALF_LOGITS * np.abs(wanted).max()


def test_no_bit_of_any_logit_depends_on_what_is_resident(mixed):
    files = [one for one in open_decoder_bundle(mixed).manifest.files if one.path.startswith("experts/")]
    one = max(entry.size_bytes for entry in files)
    wanted = logits_of(mixed, PROMPT, Settings(1 << 30))
    for settings in (Settings(one, "lru"), Settings(3 * one, "lru", prefetch_depth=1)):
        assert np.array_equal(logits_of(mixed, PROMPT, settings), wanted)


def test_sessions_give_their_memory_back(mixed):
    context = CudaContext()
    free_bytes = []
    try:
        for _ in range(6):
            with DecoderSession.from_bundle(mixed, Settings(48 << 10)) as session:
                list(session.generate(PROMPT, 4))
            free_bytes.append(context.free_bytes())
        assert free_bytes[0] - free_bytes[-1] < 16 << 20
    finally:
        context.close()


def test_tokens_are_decoded_by_graphs_and_say_what_plain_work_says(exact, monkeypatch, caplog):
    with DecoderSession.from_bundle(exact) as session:
        by_graphs = list(session.generate(PROMPT, NEW))
        engine: Any = session._engine
        assert engine._device.cuda._graphs
    assert "without a CUDA graph" not in caplog.text

    def refuse(*_: Any) -> int:
        raise DeviceError("no graphs, for a test.")

    monkeypatch.setattr(CudaContext, "capture", refuse)
    with DecoderSession.from_bundle(exact) as session:
        assert list(session.generate(PROMPT, NEW)) == by_graphs
    assert "without a CUDA graph: no graphs" in caplog.text


def test_both_ways_of_an_experts_weights_say_the_same(source, exact, record_property):
    wanted = list(Reference(source).generate(PROMPT, NEW))
    decoder = open_decoder_bundle(exact)
    index = build(decoder, measure=measuring(decoder))
    (found,) = index.experts
    record_property("seconds of an expert", f"{found.inputs_s} as inputs, {found.refit_s} by refit")
    assert found.refit_s is not None, found.reason
    try:
        for way in ("refit", "inputs"):
            other = index.model_copy(update={"experts": (found.model_copy(update={"way": way}),)})
            (exact / INDEX_FILE).write_text(other.canonical_json())
            with DecoderSession.from_bundle(exact, Settings(48 << 10)) as session:
                assert list(session.generate(PROMPT, NEW)) == wanted
    finally:
        (exact / INDEX_FILE).write_text(index.canonical_json())
