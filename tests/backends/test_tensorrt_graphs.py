"""Decoding by CUDA graphs on a pretended device: what is recorded, for how long, and what becomes of what cannot be.

The fakes know the rules: a run before, nothing queued, and contexts that stay as they were while their graph lives.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.exporters.tensorrt_decoder import export_tensorrt_decoder
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from tests.engine_samples import PROMPT, give_board
from tests.random_decoder import RandomSource, mixed_plan
from tests.tiny_decoder import CONTEXT, LAYERS, TOP_K, tiny_graph

if TYPE_CHECKING:
    from pathlib import Path

NEW = 12
SPANS = 2 * LAYERS + 1  # attention and end of each layer, and the head


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source: Any = RandomSource(tiny_graph(), tmp_path_factory.mktemp("model"))
    folder: Path = tmp_path_factory.mktemp("mixed") / "bundle"
    export_tensorrt_decoder(source, mixed_plan(source.graph), folder, half=False)
    return folder


@pytest.fixture
def board(bundle, monkeypatch):
    """Return a function that builds the engines and gives this process a device that has them."""

    def give(board: str = "Jetson", **more: Any) -> Any:
        return give_board(monkeypatch, bundle, board, **more)

    return give


def said(folder: Path, prompt: list[int] | None = None, new: int = NEW) -> list[int]:
    with DecoderSession.from_bundle(folder, Settings(48 << 10)) as session:
        return list(session.generate(prompt or PROMPT, new))


def plain(board: Any, folder: Path) -> list[int]:
    """Return what is said without any graph."""
    trt = board(fail={"capture"})
    found = said(folder)
    assert "cuGraphLaunch" not in trt.cuda.calls
    return found


def graphs_of(trt: Any) -> int:
    return list(trt.cuda.handles.values()).count("executable graph")


def test_graphs_say_what_plain_work_says_and_launch_all_but_experts(board, bundle):
    wanted = plain(board, bundle)
    trt = board()
    with DecoderSession.from_bundle(bundle) as session:
        assert list(session.generate(PROMPT, NEW)) == wanted
        assert graphs_of(trt) == SPANS
    assert trt.cuda.alive == []


def test_no_bit_of_a_logit_depends_on_whether_it_was_replayed(board, bundle):
    def rows(**fields: Any) -> list[Any]:
        board(**fields)
        found: list[Any] = []

        def choose(row: Any) -> int:
            found.append(row)
            return int(row.argmax())

        with DecoderSession.from_bundle(bundle) as session:
            list(session.generate(PROMPT, NEW, choose))
        return found

    assert np.array_equal(rows(), rows(fail={"capture"}))


def test_what_comes_once_is_not_recorded_and_what_comes_twice_is(board, bundle):
    trt = board()
    with DecoderSession.from_bundle(bundle) as session:
        list(session.generate(PROMPT, 2))  # one token after the prompt's
        assert graphs_of(trt) == 0
        list(session.generate([5], 2, continued=True))
        assert graphs_of(trt) == SPANS


def test_graphs_of_attention_go_when_the_past_outgrows_them_and_never_pile_up(board, bundle):
    trt = board()
    most, counts = 0, []
    with DecoderSession.from_bundle(bundle) as session:
        for _ in session.generate(PROMPT, CONTEXT):
            most = max(most, graphs_of(trt))
            counts.append(trt.cuda.calls.count("cuGraphInstantiateWithFlags"))
        assert len(PROMPT) + len(counts) > 48  # past 16 and 32 rows
        assert list(session.generate(PROMPT, NEW)) == said(bundle)
    assert most == SPANS
    # attention once for each number of rows of the past, everything else once
    assert counts[-1] == SPANS + 2 * LAYERS  # 16, 32 and 64 rows
    assert trt.cuda.alive == []


@pytest.mark.parametrize(
    ("fail", "faults", "reason"),
    [
        ({"capture"}, None, "CAPTURE_INVALIDATED"),
        ({"half a graph"}, None, "its replay gave another answer"),
        ((), {"cuStreamBeginCapture_v2": (1, 900)}, "CAPTURE_UNSUPPORTED"),
        ((), {"cuGraphInstantiateWithFlags": (1, 2)}, "OUT_OF_MEMORY"),
        ((), {"cuGraphLaunch": (1, 700)}, "ILLEGAL_ADDRESS"),
    ],
    ids=["invalid", "incomplete", "refused", "no memory", "no launch"],
)
def test_a_graph_that_fails_or_lies_is_left_out_and_said_once(board, bundle, caplog, fail, faults, reason):
    wanted = plain(board, bundle)
    caplog.clear()
    trt = board(fail=fail, faults=faults)
    with caplog.at_level(logging.WARNING):
        assert said(bundle) == wanted
    told = [one.getMessage() for one in caplog.records if "runs without a CUDA graph" in one.getMessage()]
    assert told
    assert reason in told[0]
    names = [one.partition(" runs")[0] for one in told]
    assert len(names) == len(set(names))  # not for every layer and token
    assert "attention-0" in names
    assert trt.cuda.alive == []


def test_one_stage_that_cannot_be_recorded_leaves_the_others_their_graphs(board, bundle, caplog):
    wanted = plain(board, bundle)
    trt = board(fail={"capture head"})
    with DecoderSession.from_bundle(bundle) as session:
        assert list(session.generate(PROMPT, NEW)) == wanted
        assert graphs_of(trt) == SPANS - 1
    assert "head runs without a CUDA graph" in caplog.text


def test_without_memory_for_more_contexts_everything_runs_as_it_did(board, bundle, caplog):
    wanted = plain(board, bundle)
    caplog.clear()
    trt = board()
    with DecoderSession.from_bundle(bundle) as session:
        trt.fail.add("context")
        assert list(session.generate(PROMPT, NEW)) == wanted
        assert graphs_of(trt) == 0
    assert "could not make an execution context" in caplog.text
    assert trt.cuda.alive == []


def test_an_experts_slot_is_in_no_graph(board, bundle):
    board("desktop")
    one = max(entry.size_bytes for entry in open_decoder_bundle(bundle).manifest.files if "experts" in entry.path)
    wanted = said(bundle)
    for slots in (TOP_K, 3):  # every event moves experts
        with DecoderSession.from_bundle(bundle, Settings(slots * one, "lru")) as session:
            assert list(session.generate(PROMPT, NEW)) == wanted
