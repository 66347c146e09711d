"""What decoder calibration carries from layer to layer, kept on the disk so that a killed run goes on.

The hidden states of the variants lie in files of a few each and are read and written file by file, so that memory does
not grow with their number, which grows with the number of layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from edgeflex.costs.decoder_files import damaged, load, save
from edgeflex.files import read_bytes, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

_POINTER = "state.json"
_UNIFORM, _VARIANT = "u:", "v:"


class ShelfFile(NamedTuple):
    """A file of hidden states.

    Attributes:
        name: In the calibration's folder.
        digest: SHA-256 of its bytes.
        variants: How many it holds.
    """

    name: str
    digest: str
    variants: int


@dataclass(frozen=True)
class Shelf:
    """The hidden states of variants before one layer, in the order in which they began.

    Attributes:
        folder: Where the files lie.
        files: In order.
    """

    folder: Path
    files: tuple[ShelfFile, ...] = ()

    def read(self, file: ShelfFile) -> dict[str, Tensor]:
        """Return the hidden states ``[sequences, tokens, hidden]`` of one file by name.

        Raises:
            InputError: The file is absent, or not what was written.
        """
        return {name: torch.from_numpy(value) for name, value in load(self.folder / file.name, file.digest).items()}


class ShelfWriter:
    """Puts hidden states on a new shelf, ``per_file`` to a file.

    Args:
        folder: The calibration's.
        layer: Before which they are.
        per_file: At least 1.
    """

    def __init__(self, folder: Path, layer: int, per_file: int) -> None:
        self._folder = folder
        self._layer = layer
        self._per_file = per_file
        self._open: dict[str, Tensor] = {}
        self._files: list[ShelfFile] = []

    def put(self, name: str, hidden: Tensor) -> None:
        """Add one variant."""
        self._open[name] = hidden
        if len(self._open) == self._per_file:
            self._write()

    def shelf(self) -> Shelf:
        """Write what is left and return the whole."""
        if self._open:
            self._write()
        return Shelf(self._folder, tuple(self._files))

    def _write(self) -> None:
        file = _name(self._layer, len(self._files))
        digest = save(self._folder / file, {name: hidden.numpy() for name, hidden in self._open.items()})
        self._files.append(ShelfFile(file, digest, len(self._open)))
        self._open = {}


@dataclass
class State:
    """What the sweep carries from layer to layer.

    Attributes:
        done: Layers passed.
        clean: ``[sequences, tokens, hidden]`` of the unchanged decoder, all text.
        uniform: By precision, everything in it: ``[kl sequences, tokens, hidden]``.
        shelf: The other variants.
        shares: By unit and precision: share of its layer's error, and tokens it was judged by.
        agreement: By precision: share of equal choices in each layer.
        experts: Of each layer ``[tokens, top_k]``, or empty.
        weights: Likewise.
    """

    done: int
    clean: Tensor
    uniform: dict[str, Tensor]
    shelf: Shelf
    shares: dict[str, tuple[float, int]] = field(default_factory=dict)
    agreement: dict[str, list[float]] = field(default_factory=dict)
    experts: list[NDArray[np.int64]] = field(default_factory=list)
    weights: list[NDArray[np.float32]] = field(default_factory=list)


def keep(state: State, folder: Path) -> None:
    """Write the state; the pointer last, so that a killed run finds the layer before. Its shelf is written already."""
    arrays: dict[str, NDArray[np.generic]] = {"clean": state.clean.numpy()}
    arrays.update({f"{_UNIFORM}{name}": value.numpy() for name, value in state.uniform.items()})
    arrays.update({f"e:{place}": value for place, value in enumerate(state.experts)})
    arrays.update({f"w:{place}": value for place, value in enumerate(state.weights)})
    digest = save(folder / f"state-{state.done}.npz", arrays)
    pointer = {
        "done": state.done,
        "digest": digest,
        "files": [(file.digest, file.variants) for file in state.shelf.files],
        "shares": state.shares,
        "agreement": state.agreement,
    }
    write_atomic(folder / _POINTER, json.dumps(pointer, sort_keys=True))
    for old in (folder / f"state-{state.done - 1}.npz", *folder.glob(f"state-{state.done - 1}-*.npz")):
        old.unlink(missing_ok=True)


def resumed(folder: Path, per_file: int) -> State | None:
    """Return the state that ``keep`` wrote last, or None where there is none.

    Raises:
        InputError: A file is damaged or missing.
    """
    path = folder / _POINTER
    if not path.exists():
        return None
    try:
        pointer = json.loads(read_bytes(path, "calibration state"))
        done, digest = int(pointer["done"]), str(pointer["digest"])
        told = enumerate(pointer.get("files", ()))
        files = [ShelfFile(_name(done, number), str(sha256), int(count)) for number, (sha256, count) in told]
        shares = {name: (float(share), int(tokens)) for name, (share, tokens) in pointer["shares"].items()}
        agreement = {name: [float(one) for one in values] for name, values in pointer["agreement"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from None
    arrays = load(folder / f"state-{done}.npz", digest)
    hidden = {name: torch.from_numpy(value) for name, value in arrays.items() if name[:2] in {_UNIFORM, _VARIANT}}
    shelf = Shelf(folder, tuple(files))
    if not files:
        shelf = _from_one_file(hidden, ShelfWriter(folder, done, per_file))
    return State(
        done=done,
        clean=torch.from_numpy(arrays["clean"]),
        uniform={name.split("@")[-1].removeprefix(_UNIFORM): one for name, one in hidden.items() if _is_uniform(name)},
        shelf=shelf,
        shares=shares,
        agreement=agreement,
        experts=[arrays[f"e:{place}"].astype(np.int64) for place in range(done)],
        weights=[arrays[f"w:{place}"].astype(np.float32) for place in range(done)],
    )


def _name(layer: int, number: int) -> str:
    return f"state-{layer}-{number}.npz"


def _is_uniform(name: str) -> bool:
    return name.startswith((_UNIFORM, f"{_VARIANT}uniform@"))


def _from_one_file(hidden: dict[str, Tensor], writer: ShelfWriter) -> Shelf:
    """Put the variants of a state that an earlier version wrote, all in one file, on a shelf."""
    for name, one in hidden.items():
        if not _is_uniform(name):
            writer.put(name.removeprefix(_VARIANT), one)
    return writer.shelf()
