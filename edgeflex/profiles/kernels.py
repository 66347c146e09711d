"""Which kernels to time, and a journal so that a killed profile goes on where it stopped.

How a kernel is timed is the caller's: a room below the exporters cannot build a program.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from edgeflex import files
from edgeflex.profiles.samples import summarise
from edgeflex.progress import Progress, Silent
from edgeflex.schema import Kernel, LayerKind, LayerShape, Precision
from edgeflex.units import format_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

_LINEAR_WIDTHS = (64, 256, 1024, 4096)
_LINEAR_ROWS = (1, 4, 16, 64, 256)
# About 0.1 s at 10 GMAC/s: one call longer than this tells nothing that a smaller one does not.
_MAX_MACS = 1 << 30
# (channels, pixels): from the CIFAR ResNets' 16 x 32 px to the late stages of ImageNet networks.
_PLAIN = ((16, 32), (32, 16), (64, 8), (16, 112), (32, 56), (64, 28), (64, 56), (128, 28), (256, 8), (256, 14))
_STRIDED = ((3, 32, 112), (16, 32, 32), (32, 64, 16), (32, 64, 56), (64, 128, 28), (128, 256, 14))
_DEPTHWISE = (
    (16, 112, 1),
    (32, 56, 1),
    (32, 56, 2),
    (64, 28, 1),
    (64, 28, 2),
    (128, 14, 1),
    (256, 14, 1),
    (256, 14, 2),
)
_POINTWISE = (
    (16, 64, 112),
    (64, 16, 56),
    (64, 64, 56),
    (32, 192, 28),
    (192, 32, 28),
    (64, 256, 28),
    (256, 64, 14),
    (256, 256, 8),
)


@dataclass(frozen=True)
class KernelJob:
    """One kernel to time: a layer shape at a precision with a number of threads."""

    shape: LayerShape
    precision: Precision
    threads: int


def kernel_grid(
    precisions: Mapping[LayerKind, Sequence[Precision]], *, quick: bool, threads: Sequence[int]
) -> tuple[KernelJob, ...]:
    """Return the kernels to time, the same in the same order for the same arguments.

    Args:
        precisions: What the backend runs per layer kind, as in ``Capabilities.precisions``.
        quick: One job per layer kind and precision, each of another shape, with the first thread count;
            otherwise every shape at every precision and thread count.
        threads: Thread counts, for instance 1 and all.
    """
    if quick:
        return tuple(_covering(precisions, threads[0]))
    every = ((LayerKind.LINEAR, _linear_shapes()), (LayerKind.CONV2D, _conv_shapes()))
    return tuple(
        KernelJob(shape, precision, count)
        for kind, shapes in every
        for shape in shapes
        for precision in precisions.get(kind, ())
        if _fits(shape, precision)
        for count in dict.fromkeys(threads)
    )


def measure_kernels(
    jobs: Sequence[KernelJob],
    *,
    run: Callable[[KernelJob], Sequence[float]],
    journal: Path | None = None,
    context: str = "",
    progress: Progress | None = None,
) -> tuple[Kernel, ...]:
    """Time every job once; those that the journal already holds are not run again.

    Args:
        jobs: What to time.
        run: Times one job and returns raw seconds per call, warm-up left out.
        journal: A file that gets one JSON line per finished kernel; a torn last line is dropped.
        context: What else the times depend on (machine, versions); lines of another context are not used.
        progress: Who hears of every finished job.

    Returns:
        The kernels in the order of ``jobs``.

    Raises:
        DeviceError: ``run`` gave no positive time, or the disk is full.
        InputError: The journal cannot be read or written.
    """
    done = _read_journal(journal, context) if journal is not None else {}
    kernels = []
    with (progress or Silent()).task("kernels", len(jobs)) as advance:
        for job in jobs:
            kernel = done.get(_key(job))
            if kernel is None:
                source = f"one-layer program, {format_count(job.threads, 'thread')}, median over repeated calls"
                kernel = _to_kernel(job, run(job), source)
                if journal is not None:
                    _append(journal, kernel, context)
            kernels.append(kernel)
            advance(1)
    return tuple(kernels)


def _to_kernel(job: KernelJob, samples_s: Sequence[float], source: str) -> Kernel:
    seconds = summarise(samples_s, source)
    return Kernel(shape=job.shape, precision=job.precision, threads=job.threads, seconds=seconds)


def _key(job: KernelJob | Kernel) -> tuple[str, Precision, int]:
    return job.shape.canonical_json(), job.precision, job.threads


def _line(kernel: Kernel, context: str) -> str:
    return json.dumps({"context": context, "kernel": kernel.model_dump(mode="json")}, sort_keys=True) + "\n"


def _append(journal: Path, kernel: Kernel, context: str) -> None:
    try:
        with journal.open("a", encoding="utf-8") as file:
            file.write(_line(kernel, context))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise files.explain_os_error(error, journal) from None


def _read_journal(journal: Path, context: str) -> dict[tuple[str, Precision, int], Kernel]:
    """Return what is finished, and rewrite the file without torn or foreign lines."""
    if not journal.exists():
        files.write_atomic(journal, "")
        return {}
    lines = files.read_bytes(journal, "profile journal").decode("utf-8", errors="replace").splitlines()
    kernels = [kernel for line in lines if (kernel := _parse_line(line, context)) is not None]
    if len(kernels) < len(lines):
        _log.warning("%s: %d of %d lines not used", journal, len(lines) - len(kernels), len(lines))
        files.write_atomic(journal, "".join(_line(kernel, context) for kernel in kernels))
    return {_key(kernel): kernel for kernel in kernels}


def _parse_line(line: str, context: str) -> Kernel | None:
    try:
        entry = json.loads(line)
        return Kernel.model_validate(entry["kernel"]) if entry["context"] == context else None
    except (ValueError, KeyError, TypeError, ValidationError):
        return None


def _fits(shape: LayerShape, precision: Precision) -> bool:
    return precision.group_size is None or (shape.in_channels // shape.groups) % precision.group_size == 0


def _linear_shapes() -> Iterator[LayerShape]:
    for rows, width_in, width_out in itertools.product(_LINEAR_ROWS, _LINEAR_WIDTHS, _LINEAR_WIDTHS):
        if rows * width_in * width_out <= _MAX_MACS:
            yield linear(width_in, width_out, rows)


def _conv_shapes() -> Iterator[LayerShape]:
    yield from (conv(channels, channels, pixels, kernel=3) for channels, pixels in _PLAIN)
    yield from (conv(source, target, pixels, kernel=3, stride=2) for source, target, pixels in _STRIDED)
    yield from (
        conv(channels, channels, pixels, kernel=3, stride=stride, groups=channels)
        for channels, pixels, stride in _DEPTHWISE
    )
    yield from (conv(source, target, pixels) for source, target, pixels in _POINTWISE)


def linear(in_channels: int, out_channels: int, rows: int) -> LayerShape:
    """Return the shape of a linear layer over ``rows`` tokens."""
    return LayerShape(kind=LayerKind.LINEAR, in_channels=in_channels, out_channels=out_channels, rows=rows)


def conv(
    in_channels: int, out_channels: int, pixels: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> LayerShape:
    """Return the shape of a square convolution that keeps the size at stride 1."""
    return LayerShape(
        kind=LayerKind.CONV2D,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        height=pixels,
        width=pixels,
    )


def _covering(precisions: Mapping[LayerKind, Sequence[Precision]], threads: int) -> Iterator[KernelJob]:
    shapes = {
        LayerKind.LINEAR: (
            linear(256, 256, 1),
            linear(1024, 1024, 1),
            linear(256, 1024, 64),
            linear(1024, 256, 16),
        ),
        LayerKind.CONV2D: (
            conv(16, 16, 32, kernel=3),
            conv(32, 64, 16, kernel=3, stride=2),
            conv(64, 64, 28, kernel=3, groups=64),
            conv(64, 64, 28),
        ),
    }
    for kind, known in precisions.items():
        for precision, shape in zip(known, itertools.cycle(shapes[kind]), strict=False):
            yield KernelJob(shape, precision, threads)
