"""Room of what writes programs. Its door: the ``Exporter`` that every backend gives, found through the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn
    from torch.fx import GraphModule

    from edgeflex.models import DynamicModel
    from edgeflex.schema import ModelGraph, Precision, SegmentProgram
    from edgeflex.transforms import PreparedModel

__all__ = ["Exporter", "Written"]


@dataclass(frozen=True)
class Written:
    """A program that was written, read back and found to hold what was asked for.

    Attributes:
        files: Path of each file, relative to the folder, by role (``program`` or ``program:NAME``).
        segments: What each segment takes and returns.
        precisions: What the files hold for each layer.
        size_bytes: Of all files together.
    """

    files: Mapping[str, str]
    segments: tuple[SegmentProgram, ...]
    precisions: Mapping[str, Precision]
    size_bytes: int


class Exporter(Protocol):
    """A backend's way from a model to a program."""

    def prepare(
        self, model: DynamicModel, precisions: Mapping[str, Precision], ranges: Mapping[str, tuple[float, float]]
    ) -> PreparedModel:
        """Return the segments as modules with the very numbers that will be written; they are the reference too.

        Raises:
            InputError: ``precisions`` names a layer that the model lacks, or a range is missing.
            UnsupportedError: A precision does not exist for a layer.
        """

    def prepare_segment(
        self,
        segment: GraphModule,
        index: int,
        precisions: Mapping[str, Precision],
        ranges: Mapping[str, tuple[float, float]],
    ) -> nn.Module:
        """Return a copy of segment ``index`` in the given precisions, layers not named in fp32; it ends in logits."""

    def write(self, prepared: PreparedModel, graph: ModelGraph, folder: Path) -> Written:
        """Write the program into ``folder``, read it back and compare it with ``prepared.precisions``.

        Raises:
            UnsupportedError: The backend cannot express the model, or the file does not hold the precisions.
        """

    def pad(self, written: Written, folder: Path, size_bytes: int) -> None:
        """Make the program exactly ``size_bytes`` large, so that a promise about bytes on disk is exact.

        Raises:
            UnsupportedError: It is larger already.
        """
