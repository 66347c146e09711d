"""Experts that stay with the processor while others are copied: computed from the very bytes that would be copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from edgeflex.errors import MissingDependencyError
from edgeflex.runtimes.cuda_weights import run_expert
from edgeflex.runtimes.native import RawExperts, RawMatrix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeflex.progress import Progress
    from edgeflex.runtimes.cuda_weights import Kind, Shape


class HostExperts(Protocol):
    """Computes one expert with the processor."""

    def __call__(self, kind: Kind, record: NDArray[np.uint8], rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return ``[n, hidden]`` of ``rows`` ``[n, hidden]`` through the expert whose bytes are ``record``."""

    def close(self) -> None:
        """Give everything back."""


class NativeExperts:
    """Experts through the native decoder's kernels for raw numbers, which read codes where they lie.

    Args:
        threads: That compute.

    Raises:
        MissingDependencyError: The native library or ExecuTorch is absent.
        DeviceError: No threads.
    """

    def __init__(self, threads: int) -> None:
        self._kernels = RawExperts(threads)

    def __call__(self, kind: Kind, record: NDArray[np.uint8], rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute one expert; see ``HostExperts``."""
        return self._kernels(_matrix(kind.gate_up, record), _matrix(kind.down, record), rows)

    def close(self) -> None:
        """End the threads."""
        self._kernels.close()


def _matrix(shape: Shape, record: NDArray[np.uint8]) -> RawMatrix:
    return RawMatrix(
        shape.precision,
        shape.rows,
        shape.columns,
        record[shape.offset :],
        record[shape.scales_offset :],
        shape.slices,
        shape.pitch,
    )


class TorchExperts:
    """Experts through PyTorch in fp32; needs nothing else, and is slow where numbers are restored at each call."""

    def __call__(self, kind: Kind, record: NDArray[np.uint8], rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute one expert; see ``HostExperts``."""
        found: NDArray[np.float32] = run_expert(
            torch.from_numpy(record), kind, torch.from_numpy(rows), torch.float32
        ).numpy()
        return found

    def close(self) -> None:
        """Do nothing."""


def open_host(threads: int, progress: Progress) -> HostExperts:
    """Return what computes experts with the processor here: native kernels, or PyTorch where there are none.

    Args:
        threads: That compute.
        progress: Told when PyTorch must do.
    """
    try:
        return NativeExperts(threads)
    except MissingDependencyError as error:
        progress.note(
            f"experts that stay with the processor go through PyTorch, which takes several times longer: {error}"
        )
        return TorchExperts()
