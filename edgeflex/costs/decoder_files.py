"""What a decoder's calibration keeps on the disk: arrays by name, and the experts that routers chose on its text.

Planning and measuring a device read these; torch is not needed for it.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from tokenize import TokenError
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.errors import InputError
from edgeflex.files import read_bytes, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ROUTING = "routing.npz"
_IDS = ("turn", "phase", "step", "layer", "iter", "slot", "expert")
# What NumPy and its zip raise on a damaged file, whichever byte it is.
_NO_ARRAYS = (
    *(ValueError, OSError, EOFError, KeyError, SyntaxError, TokenError, MemoryError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Routing:
    """Columns of a routing trace, one row for each (token, layer, expert used), all equally long.

    ``phase`` is 0 in a prompt and 1 while decoding, ``step`` the token's position, ``iter`` the prompt's chunk.
    """

    turn: NDArray[np.int64]
    phase: NDArray[np.int64]
    step: NDArray[np.int64]
    layer: NDArray[np.int64]
    iter: NDArray[np.int64]
    slot: NDArray[np.int64]
    expert: NDArray[np.int64]
    weight: NDArray[np.float32]

    def uses(self, layers: int, experts: int) -> NDArray[np.float64]:
        """Return the share of decoded tokens that use each expert, [layers, experts]; of all if none is decoded."""
        rows = self.phase == 1 if (self.phase == 1).any() else np.ones(len(self.phase), dtype=bool)
        flat = np.bincount(self.layer[rows] * experts + self.expert[rows], minlength=layers * experts)
        tokens = len(np.unique(np.stack([self.turn[rows], self.step[rows]]), axis=1).T)
        return flat.reshape(layers, experts) / max(1, tokens)


def read_routing(folder: Path) -> Routing:
    """Return the routing trace that calibration recorded.

    Raises:
        InputError: ``folder`` holds none, or a damaged one.
    """
    path = folder / ROUTING
    arrays = load(path)
    if set(arrays) != {*_IDS, "weight"} or len({len(values) for values in arrays.values()}) != 1:
        raise damaged(path, "columns are missing or of unequal length")
    return Routing(**{name: arrays[name].astype(np.int64) for name in _IDS}, weight=arrays["weight"].astype(np.float32))


def save(path: Path, arrays: dict[str, NDArray[np.generic]], *, packed: bool = False) -> str:
    """Write arrays whole or not at all, and return their digest."""
    buffer = io.BytesIO()
    # numbers only, so that nothing is ever pickled; not every numpy has savez refuse objects by itself
    (np.savez_compressed if packed else np.savez)(buffer, **arrays)  # type: ignore[arg-type]
    raw = buffer.getvalue()
    write_atomic(path, raw)
    return hashlib.sha256(raw).hexdigest()


def load(path: Path, digest: str | None = None) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of a file by name, in the order in which they were written.

    Raises:
        InputError: It is absent or damaged, or its bytes have another ``digest``.
    """
    raw = read_bytes(path, "calibration file")
    if digest is not None and hashlib.sha256(raw).hexdigest() != digest:
        raise damaged(path, "its content is not what was written")
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except _NO_ARRAYS as error:
        raise damaged(path, error) from None


def damaged(path: Path, reason: object) -> InputError:
    """Return the error that a file of a calibration is damaged."""
    return InputError(f"calibration file {str(path)!r} is damaged: {reason}. Delete it and calibrate again.")
