"""What calibration needs of a session: the outputs of every exit on many images, and the time of every segment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from edgeflex.runtimes import Session

    Float32 = NDArray[np.float32]

_LEAST_S = 1e-7


def all_exits(session: Session, batches: Iterable[Float32]) -> Float32:
    """Return the probabilities [n, exits, classes] at every exit, images in batches [b, C, H, W] run one by one.

    Raises:
        DeviceError: An exit gave something that is no number. A run would stop there; counted as an answer it would
            be right or wrong by chance.
    """
    rows = []
    for batch in batches:
        for image in batch:
            x = image[None]
            exits = []
            for index in range(session.segment_count):
                activations, probabilities = session.segment(index, x)
                exits.append(probabilities)
                if activations is not None:
                    x = activations
            rows.append(np.stack(exits))
    probabilities = np.stack(rows).astype(np.float32)
    unsound = np.argwhere(~np.isfinite(probabilities).all(axis=2))  # rows of image, exit
    if len(unsound):
        image, index = unsound[0].tolist()
        raise DeviceError(
            f"exit {index} gave probabilities that are no numbers for {len(np.unique(unsound[:, 0]))} of {len(rows)} "
            f"images, the first being number {image}. Check weights and images for NaN or infinity, or leave layers "
            "with large numbers in fp32."
        )
    return probabilities


def segment_seconds(
    session: Session,
    images: Float32,
    *,
    yardstick: Callable[[], object],
    rounds: int = 240,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[tuple[float, ...], float]:
    """Return the median seconds that each segment adds, host overhead included, and those of a yardstick.

    The yardstick is the same work in every measurement; by it, programs that were timed minutes apart on a
    machine whose speed drifts can be held against each other.

    Every round forces an exit at each depth in turn, forwards and then backwards (A B … B A), so that a slow
    spell of the machine falls on all depths alike; a segment is the difference of two neighbouring depths.

    Args:
        session: Open.
        images: [n, C, H, W]; rounds take them in turn.
        yardstick: Called and timed once a round.
        rounds: Rounds to time, after a quarter as many to warm up.
        clock: Seconds, rising.
    """
    depth = session.segment_count
    forced = [tuple(0.0 if index == end else None for index in range(depth)) for end in range(depth)]
    taken: list[list[float]] = [[] for _ in range(depth)]
    steady: list[float] = []
    for number in range(rounds + rounds // 4):
        x = np.ascontiguousarray(images[number % len(images)][None])
        start = clock()
        yardstick()
        steady.append(clock() - start)
        order = range(depth) if number % 2 == 0 else range(depth - 1, -1, -1)
        for end in order:
            start = clock()
            session.infer(x, forced[end])
            seconds = clock() - start
            if number >= rounds // 4:
                taken[end].append(seconds)
    cumulative = [float(np.median(one)) for one in taken]
    parts = zip([0.0, *cumulative], cumulative, strict=False)
    return tuple(max(_LEAST_S, later - earlier) for earlier, later in parts), float(np.median(steady))
