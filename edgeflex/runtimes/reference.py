"""Segments as plain PyTorch modules: slow, simple, and the oracle that every backend is compared with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeflex.errors import DeviceError, InputError, UnsupportedError
from edgeflex.runtimes.loop import Outcome, check_thresholds, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn
    from typing_extensions import Self

    from edgeflex.bundle import Bundle

    Float32 = NDArray[np.float32]


class ReferenceSession:
    """A session over torch modules.

    Each module but the last returns (activations, probabilities ``[1, classes]``), the last the probabilities.
    """

    def __init__(self, segments: Sequence[nn.Module], *, clock: Callable[[], float] = time.perf_counter) -> None:
        if not segments:
            raise InputError("no segments: a session needs at least one module.")
        self._segments = tuple(segments)
        self._clock = clock
        self._open = False
        self._load_s = 0.0

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int = 1) -> ReferenceSession:
        """Refuse: a bundle holds programs, no modules.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"{bundle.path}: runtime 'reference' runs torch modules ({threads} thread(s) asked), and a bundle "
            f"holds none. Run it with --runtime {bundle.manifest.backend}."
        )

    @property
    def load_s(self) -> float:
        """Seconds that entering took."""
        return self._load_s

    @property
    def segment_count(self) -> int:
        """Number of segments, and of exits."""
        return len(self._segments)

    def __enter__(self) -> Self:
        """Open; the modules are there already."""
        start = self._clock()
        self._open = True
        self._load_s = self._clock() - start
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Refuse further work; the modules stay their owner's."""
        self._open = False

    def segment(self, index: int, x: Float32) -> tuple[Float32 | None, Float32]:
        """Run one segment by itself; see ``Session.segment``."""
        if not 0 <= index < len(self._segments):
            raise InputError(f"segment {index}: there are segments 0 to {len(self._segments) - 1}. Name one.")
        activations, probabilities, _ = self._step(index, _tensor(x))
        copied = None if activations is None else activations.numpy().copy()
        return copied, probabilities.numpy()[0].copy()

    def infer(self, x: Float32, thresholds: Sequence[float | None]) -> Outcome:
        """Run segments until one may be left; see ``Session.infer``."""
        check_thresholds(thresholds, len(self._segments))
        index, probabilities, confidence = walk(self._step, _tensor(x), thresholds)
        return Outcome(index, probabilities.numpy()[0].copy(), confidence)

    def _step(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, float]:
        if not self._open:
            raise DeviceError("the session is closed. Run inside `with ReferenceSession(...)`.")
        try:
            with torch.inference_mode():
                outputs = self._segments[index](x)
        except RuntimeError as error:
            raise InputError(
                f"segment {index} refuses an input of {list(x.shape)}: {error}. "
                "Prepare it with the model's preprocessing."
            ) from None
        activations, probabilities = _split(outputs, last=index == len(self._segments) - 1)
        return activations, probabilities, probabilities.max().item()


def _split(outputs: torch.Tensor | Sequence[torch.Tensor], *, last: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return None, outputs
    return (None if last else outputs[0]), outputs[-1]


def _tensor(x: Float32) -> torch.Tensor:
    if x.dtype not in {np.dtype(np.float32), np.dtype(np.int8)}:
        raise InputError(f"the input is {x.dtype}; float32 is needed. Prepare it with the model's preprocessing.")
    return torch.from_numpy(np.array(x, order="C"))
