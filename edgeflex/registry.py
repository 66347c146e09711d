"""Which exporters and runtimes exist, as rows of data that can be read without importing any of them.

Third parties add rows through the entry-point groups ``edgeflex.exporters`` and ``edgeflex.runtimes``; such an
entry point names a ``Row``.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from edgeflex.errors import InputError, MissingDependencyError
from edgeflex.schema import Capabilities, LayerKind, Precision


@dataclass(frozen=True)
class Row:
    """One backend.

    Attributes:
        name: What users write.
        target: ``module:attribute`` of what ``get`` returns.
        extra: The extra of edgeflex that installs its packages; empty where a plain install has them.
        description: One line for people.
        capabilities: What it really runs.
    """

    name: str
    target: str
    extra: str
    description: str
    capabilities: Capabilities


@dataclass(frozen=True)
class Table:
    """Rows of one kind, with the entry-point group that adds to them."""

    kind: str
    group: str
    rows: tuple[Row, ...]

    def _plugins(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        taken = {row.name: "edgeflex itself" for row in self.rows}
        for point in entry_points(group=self.group):
            if point.name in taken:
                raise InputError(
                    f"{self.kind} {point.name!r} is offered by {point.value!r} and by {taken[point.name]}; "
                    "a name belongs to one. Uninstall one of the two packages."
                )
            taken[point.name] = repr(point.value)
            found[point.name] = point
        return found

    def names(self) -> tuple[str, ...]:
        """Return every name, our own first.

        Raises:
            InputError: Two packages offer the same name.
        """
        return (*(row.name for row in self.rows), *sorted(self._plugins()))

    def row(self, name: str) -> Row:
        """Return the row of ``name``.

        Raises:
            InputError: No row has this name, or two packages offer it.
            MissingDependencyError: The plug-in needs a package that is absent.
        """
        plugins = self._plugins()
        for row in self.rows:
            if row.name == name:
                return row
        if name in plugins:
            return _plugin_row(plugins[name])
        known = self.names()
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known)}.")


def names(table: Table) -> tuple[str, ...]:
    """Return the names of ``table``."""
    return table.names()


def capabilities(table: Table, name: str) -> Capabilities:
    """Return what the backend ``name`` runs, without importing it."""
    return table.row(name).capabilities


def get(table: Table, name: str) -> Any:
    """Return what the row's target names, imported now.

    Raises:
        InputError: The name is unknown; the nearest one is offered.
        MissingDependencyError: A package is absent; the message ends with the pip line.
    """
    row = table.row(name)
    module_name, _, attribute = row.target.partition(":")
    try:
        return getattr(import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise _missing(f"{table.kind} {row.name!r}", error, row.extra) from error


def _plugin_row(point: EntryPoint) -> Row:
    try:
        row = point.load()
    except ModuleNotFoundError as error:
        raise _missing(f"plug-in {point.name!r}", error, "") from error
    if not isinstance(row, Row) or row.name != point.name:
        raise InputError(
            f"plug-in {point.name!r}: {point.value!r} is not an edgeflex.registry.Row of that name. "
            "Ask its author to mend the entry point."
        )
    return row


def _missing(what: str, error: ModuleNotFoundError, extra: str) -> Exception:
    package = (error.name or "").partition(".")[0]
    if package in {"", "edgeflex"}:
        return error  # a fault of ours keeps its traceback
    line = f"pip install 'edgeflex[{extra}]'" if extra else f"pip install {package}"
    return MissingDependencyError(f"{what} needs the package {package!r}, which is not installed. Run: {line}")


# What ExecuTorch 1.5 lowers to XNNPACK with right results: a convolution has static 8-bit kernels only, a
# linear layer also dynamic 8-bit and 4-bit ones (per channel, or groups that are a multiple of 32 weights).
_XNNPACK = {
    LayerKind.CONV2D: (Precision.FP32, Precision.INT8_STATIC),
    LayerKind.LINEAR: (
        Precision.FP32,
        Precision.INT8_STATIC,
        Precision.INT8_DYNAMIC,
        Precision.INT4_CHANNEL,
        Precision.INT4_GROUP32,
    ),
}
_EXECUTORCH = Capabilities(backend="executorch", precisions=_XNNPACK, group_multiple=32)
_REFERENCE = Capabilities(backend="reference", precisions=_XNNPACK, group_multiple=32)

EXPORTERS = Table(
    kind="exporter",
    group="edgeflex.exporters",
    rows=(
        Row(
            name="executorch",
            target="edgeflex.exporters.executorch:program_from_prepared",
            extra="",
            description="One .pte with a method per segment, lowered to XNNPACK",
            capabilities=_EXECUTORCH,
        ),
    ),
)
RUNTIMES = Table(
    kind="runtime",
    group="edgeflex.runtimes",
    rows=(
        Row(
            name="executorch",
            target="edgeflex.runtimes.executorch:ExecutorchSession",
            extra="",
            description="ExecuTorch with XNNPACK in this process",
            capabilities=_EXECUTORCH,
        ),
        Row(
            name="reference",
            target="edgeflex.runtimes.reference:ReferenceSession",
            extra="",
            description="Plain PyTorch over the quantised reference modules; the oracle of the contract tests",
            capabilities=_REFERENCE,
        ),
    ),
)
