"""The real thing: a decoder on this machine's GPU. Skipped with the reason where it cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeflex.bundle_moe import open_decoder_bundle
from edgeflex.errors import DeviceError
from edgeflex.runtimes.cuda_memory import device_bytes
from edgeflex.runtimes.cuda_streams import CUDA_LIBRARY_BYTES, CudaStreams
from edgeflex.runtimes.cuda_weights import open_experts
from edgeflex.runtimes.decoder import DecoderSession
from edgeflex.runtimes.decoder_settings import Settings
from edgeflex.runtimes.device_record import record_of
from tests.tiny_decoder import write_tiny_bundle

pytestmark = pytest.mark.needs_gpu

PROMPT = [7, 3, 90, 3, 3, 15, 42, 61, 8, 8, 30]
NEW = 24


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch was built without CUDA")
    return write_tiny_bundle(tmp_path_factory.mktemp("decoder") / "bundle")


@pytest.fixture(scope="module")
def expected(bundle) -> list[int]:
    with DecoderSession.from_bundle(bundle, Settings(cache_bytes=1 << 30, device="cpu-torch")) as session:
        return list(session.generate(PROMPT, NEW))


def settings(bundle, vram: int, ram: int, *, precision: str = "fp32", **more: Any) -> Settings:
    """Return settings with ``vram`` bytes of the device for experts beside what the decoder needs."""
    manifest = open_decoder_bundle(bundle).manifest
    _, kinds = open_experts(bundle, manifest)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    plan = manifest.plan
    sizes = {"context_tokens": plan.context_tokens, "chunk_tokens": plan.prefill_chunk_tokens}
    fixed = device_bytes(manifest, kinds, dtype, library_bytes=CUDA_LIBRARY_BYTES, **sizes).total
    return Settings(ram, device="cuda", vram_bytes=fixed + vram, device_precision=precision, **more)


@pytest.mark.parametrize("rule", ["auto", "upload", "cpu", "static"])
def test_a_gpu_says_what_the_processor_says_in_all_sizes_of_tiers(bundle, expected, rule):
    store, _ = open_experts(bundle, open_decoder_bundle(bundle).manifest)
    one, total = int(store.sizes.max()), int(store.sizes.sum())
    for vram, ram in ((one, 0), (2 * one, total), (3 * one, 3 * one), (total // 2, total // 2), (total, total)):
        with DecoderSession.from_bundle(bundle, settings(bundle, vram, ram, device_rule=rule)) as session:
            for _ in range(2):
                assert list(session.generate(PROMPT, NEW)) == expected


def test_peak_memory_stays_within_the_plan(bundle):
    chosen = settings(bundle, 64 << 10, 1 << 30)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with DecoderSession.from_bundle(bundle, chosen) as session:
        list(session.generate(PROMPT, NEW))
    assert torch.cuda.max_memory_allocated() - before <= (chosen.vram_bytes or 0)
    assert torch.cuda.memory_allocated() <= before + CUDA_LIBRARY_BYTES


def test_copies_start_from_pinned_memory_and_take_time(bundle):
    with DecoderSession.from_bundle(bundle, settings(bundle, 32 << 10, 1 << 30, device_rule="upload")) as session:
        list(session.generate(PROMPT, NEW))
        done = session.device_stats()
    assert done.pinned
    assert done.upload_s > 0
    assert done.errors["link"].samples > 0


def test_watched_events_lie_on_one_axis_and_peak_memory_is_counted(bundle):
    with DecoderSession.from_bundle(bundle, settings(bundle, 32 << 10, 1 << 30, record=True)) as session:
        for _ in range(3):
            list(session.generate(PROMPT, NEW))
        found = record_of(session, [session.stats()])
    assert found.passes > 0 < found.events
    assert all(max(one.actual_busy_s) <= one.actual_s * 1.001 + 1e-6 for one in found.sample)
    assert found.event_s <= found.pass_s
    assert found.hidden_share is not None
    assert 0 < (found.peak_bytes or 0) <= found.planned_bytes
    assert 0 < (found.bound_share or 0) < 1


def test_bf16_with_grouped_products_stays_near_fp32(bundle):
    rows: dict[str, list[Any]] = {"fp32": [], "bf16": []}
    for precision, found in rows.items():

        def choose(row: Any, found: list[Any] = found) -> int:
            found.append(row)
            return PROMPT[len(found) % len(PROMPT)]

        with DecoderSession.from_bundle(bundle, settings(bundle, 1 << 20, 1 << 20, precision=precision)) as session:
            list(session.generate(PROMPT, NEW, choose))
    exact, near = (np.stack(rows[precision]) for precision in ("fp32", "bf16"))
    assert np.median(np.abs(exact - near)) < 0.02 * np.abs(exact).max()


def test_more_than_the_device_has_is_refused_and_given_back(bundle):
    streams = CudaStreams()
    free_bytes = streams.free_bytes()
    for part in range(2):
        size = torch.cuda.get_device_properties(0).total_memory + (1 << 30) * part
        with pytest.raises(DeviceError, match="out of memory"):
            torch_refuses(streams, size)
    assert abs(streams.free_bytes() - free_bytes) < 64 << 20


def torch_refuses(streams: CudaStreams, size: int) -> None:
    from edgeflex.runtimes.cuda_memory import ExpertMemory

    ExpertMemory(streams, {}).device_arena(size)
