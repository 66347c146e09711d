"""What a benchmark keeps of a device: counts, times of watched passes, and events as predicted and as measured.

Each repeat is a process of its own and gives one record; ``merged`` joins them into the one that is written. Importing
this loads no PyTorch.
"""

from __future__ import annotations

import math
import random
import statistics
from typing import TYPE_CHECKING

from edgeflex.errors import InputError
from edgeflex.runtimes.curves import RESOURCES
from edgeflex.runtimes.tier_bounds import time_bound_s
from edgeflex.schema_gpu import DeviceRecord, PredictionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgeflex.runtimes.decoder import DecoderSession
    from edgeflex.runtimes.engines import DeviceStats
    from edgeflex.schema_gpu import EventTime
    from edgeflex.schema_moe import DecoderRunStats

KEPT_EVENTS = 2000
_SUMMED = (
    "tokens",
    "lookups",
    "gpu_hits",
    "host_experts",
    "upload_bytes",
    "ahead_bytes",
    "flash_bytes",
    "passes",
    "pass_s",
    "events",
    "event_s",
    "exposed_s",
    "sampled",
)


def record_of(session: DecoderSession, runs: Sequence[DecoderRunStats]) -> DeviceRecord:
    """Return the record of an open session on a device, which recorded its events.

    Args:
        session: Between generations.
        runs: All of its generations.

    Raises:
        DeviceError: The session runs on no device, or its last answer was broken off.
        InputError: It recorded no events.
    """
    done = session.device_stats()
    seen, decoding = done.watched, done.decoding
    times = [time.total_s for run in runs for time in run.times]
    return DeviceRecord(
        name=done.device,
        rule=done.rule,
        policy=runs[-1].cache.policy if runs else "",
        exclusive=done.exclusive,
        pinned=done.pinned,
        requested_bytes=done.requested_bytes,
        planned_bytes=done.fixed_bytes + done.vram_bytes,
        peak_bytes=done.peak_bytes,
        vram_bytes=done.vram_bytes,
        ram_bytes=done.ram_bytes,
        tokens=len(times),
        token_s=statistics.fmean(times) if times else 0.0,
        lookups=decoding.lookups,
        gpu_hits=decoding.gpu_hits,
        host_experts=done.host_experts,
        upload_bytes=decoding.upload_bytes + done.divided_bytes,
        ahead_bytes=done.ahead_bytes,
        flash_bytes=decoding.flash_bytes,
        passes=seen.passes,
        pass_s=seen.pass_s,
        events=seen.events,
        event_s=seen.event_s,
        busy_s=dict(zip(RESOURCES, seen.busy_s, strict=True)),
        waited_s=dict(zip(RESOURCES, seen.waited_s, strict=True)),
        exposed_s=seen.exposed_s,
        bound_token_s=_bound_s(session, done) if times else None,
        sample=seen.sample,
        sampled=seen.seen,
        errors=errors_of(seen.sample),
    )


def _bound_s(session: DecoderSession, done: DeviceStats) -> float:
    """Return the seconds per token that nothing can beat on the curves as they are now, dense parts taken as free."""
    store = session.store
    return time_bound_s(
        session.trace(),
        done.curves,
        done.vram_bytes + done.staged_bytes,
        done.ram_bytes,
        exclusive=done.exclusive,
        sizes=store.sizes,
        kind_of=lambda layer, expert: store.experts[layer, expert].precision.value,
    )


def errors_of(sample: Iterable[EventTime]) -> dict[str, PredictionError]:
    """Return the errors of predictions by resource, of whole events while decoding, and of those of prompts.

    An error is (predicted - measured) / measured; where either is 0, nothing is compared.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for one in sample:
        if not one.decoding:
            pairs.setdefault("prompt", []).append((one.predicted_s, one.actual_s))
            continue
        pairs.setdefault("event", []).append((one.predicted_s, one.actual_s))
        for resource, predicted_s, actual_s in zip(RESOURCES, one.predicted_busy_s, one.actual_busy_s, strict=True):
            pairs.setdefault(resource, []).append((predicted_s, actual_s))
    found = {name: prediction_error(pairs[name]) for name in ("event", *RESOURCES, "prompt") if name in pairs}
    return {name: error for name, error in found.items() if error is not None}


def prediction_error(pairs: Iterable[tuple[float, float]]) -> PredictionError | None:
    """Return the error statistics of (predicted, measured) seconds; None where no pair has both above 0.

    The 90th percentile is the nearest rank's.
    """
    errors = [(predicted - actual) / actual for predicted, actual in pairs if predicted > 0 and actual > 0]
    if not errors:
        return None
    sizes = sorted(map(abs, errors))
    return PredictionError(
        samples=len(errors),
        bias=statistics.fmean(errors),
        mean_error=statistics.fmean(sizes),
        p90_error=sizes[math.ceil(0.9 * len(sizes)) - 1],
    )


def merged(records: Sequence[DeviceRecord], *, limit: int = KEPT_EVENTS, seed: int = 0) -> DeviceRecord:
    """Return several repeats as one record: sums of counts and seconds, the highest peak, a sample of all events.

    Args:
        records: At least one; what they were run with is the same.
        limit: Events that are kept, each repeat's share as large as that of its events.
        seed: Of their draw.

    Raises:
        InputError: There is no record.
    """
    if not records:
        raise InputError("no record of a device to join. Measure at least one repeat.")
    first, draw = records[0], random.Random(seed)  # noqa: S311 - a sample, no secret
    total = sum(one.sampled for one in records)
    sample: list[EventTime] = []
    for one in records:
        count = min(len(one.sample), round(limit * one.sampled / total)) if total > limit else len(one.sample)
        sample += [one.sample[place] for place in sorted(draw.sample(range(len(one.sample)), count))]
    tokens = sum(one.tokens for one in records)
    peaks = [one.peak_bytes for one in records if one.peak_bytes is not None]
    bounds = [(one.bound_token_s, one.tokens) for one in records if one.bound_token_s is not None]
    changes = {name: sum(getattr(one, name) for one in records) for name in _SUMMED}
    return first.model_copy(
        update={
            **changes,
            "peak_bytes": max(peaks, default=None),
            "token_s": sum(one.token_s * one.tokens for one in records) / max(1, tokens),
            "bound_token_s": _weighted(bounds),
            "busy_s": _sums([one.busy_s for one in records]),
            "waited_s": _sums([one.waited_s for one in records]),
            "sample": tuple(sample),
            "errors": errors_of(sample),
        }
    )


def _weighted(pairs: Sequence[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / weight if weight else None


def _sums(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(one.get(name, 0.0) for one in found) for name in found[0]}
