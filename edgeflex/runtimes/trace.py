"""Routing traces: which experts every token used, as a text file that other tools write too.

A trace is CSV with a preamble of ``#`` lines; columns are found by name and unknown ones are passed over:

    # route_trace v1
    # model=NAME arch=FAMILY n_layer=48 n_expert=128 n_expert_used=8
    # layer=0 expert_bytes=3059712 [dense_bytes=...]              one line per layer
    turn,phase,step,layer,iter,slot,expert,weight

``phase`` is 0 in a prompt and 1 while decoding; ``step`` is the token's position; ``iter`` numbers the prompt's
chunks (or, while decoding, repeated passes over a position) and is 0 where the column is absent; ``slot`` is the
rank that the router gave; ``weight`` is the weight applied, ``nan`` when unknown. ``turn``, ``iter``, ``slot``
and ``weight`` may be absent. The public traces of BigMoeOnEdge are of this form.

An event is one layer of one forward pass. While decoding, a pass is one (turn, step, iter); in a prompt it is
one (turn, iter), that is, the whole prompt where there are no chunks.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeflex.errors import InputError
from edgeflex.files import read_bytes, write_atomic
from edgeflex.runtimes.expert_cache import parts_of_weight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Int64 = NDArray[np.int64]

_log = logging.getLogger(__name__)

COLUMNS = ("turn", "phase", "step", "layer", "iter", "slot", "expert", "weight")
_NEEDED = ("phase", "step", "layer", "expert")
_MOST_FAULTS = 5
_MOST_ID = 1 << 31  # beyond it a number is damage, and products of ids would overflow
_PAIR = re.compile(r"(?:^|\s)([A-Za-z_][\w.-]*)=")


class TraceEvent(NamedTuple):
    """One layer of one forward pass.

    Attributes:
        decoding: False in a prompt.
        turn: As recorded.
        step: Number of the pass in the trace, counted from 0.
        layer: The layer.
        experts: The union that its tokens use, ascending.
        weights: Each expert's part of the router's weight in the pass, or None when unknown.
        tokens: How many went through the layer.
    """

    decoding: bool
    turn: int
    step: int
    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...] | None
    tokens: int


@dataclass(frozen=True, eq=False)
class Trace:
    """A routing trace; one row for each (token, layer, expert used), all columns equally long.

    Args:
        turn: Which prompt.
        phase: 0 in a prompt, 1 while decoding.
        step: Position of the token.
        layer: The layer.
        iter: Chunk of the prompt.
        slot: Rank given by the router.
        expert: Expert used.
        weight: float32; nan when unknown.
        layers: Of the decoder, with and without experts.
        experts: Of a layer, at most.
        top_k: Experts that a token uses in a layer.
        expert_bytes: ``[layers]``, 0 where unknown or where there are none.
        precision_bytes: The same for other precisions, by name.
        name: Of the model.
    """

    turn: Int64
    phase: Int64
    step: Int64
    layer: Int64
    iter: Int64
    slot: Int64
    expert: Int64
    weight: NDArray[np.float32]
    layers: int
    experts: int
    top_k: int
    expert_bytes: Int64
    precision_bytes: Mapping[str, Int64] = field(default_factory=dict)
    name: str = ""

    def sizes(self, precision: str | None = None) -> Int64:
        """Return ``[layers, experts]`` bytes, every expert of a layer alike.

        Args:
            precision: One of ``precision_bytes``; None means ``expert_bytes``.

        Raises:
            InputError: The trace does not say how many bytes a used layer's experts have.
        """
        if precision is not None and precision not in self.precision_bytes:
            known = ", ".join(self.precision_bytes) or "none"
            raise InputError(f"the trace has no bytes for precision {precision!r}; it has {known}.")
        per_layer = self.expert_bytes if precision is None else self.precision_bytes[precision]
        unknown = [int(layer) for layer in np.unique(self.layer) if per_layer[layer] <= 0]
        if unknown:
            raise InputError(
                f"the trace does not say how many bytes the experts of layers {_few(unknown)} have. "
                "Add lines '# layer=N expert_bytes=BYTES', or give the sizes."
            )
        return np.repeat(per_layer[:, None], self.experts, axis=1)

    @cached_property
    def decode_tokens(self) -> int:
        """Tokens that were decoded."""
        rows = self.phase == 1
        return len(np.unique(np.stack([self.turn[rows], self.step[rows]]), axis=1).T)

    @cached_property
    def events(self) -> tuple[TraceEvent, ...]:
        """Every event, in the order in which a decoder meets them, whatever the order of the rows."""
        at_step = np.where(self.phase == 1, self.step, 0)
        # ties keep the rows' order; tokens within an event follow their positions
        order = np.lexsort((self.slot, self.step, self.layer, self.iter, at_step, self.phase, self.turn))
        passes = np.stack([self.turn, self.phase, at_step, self.iter])[:, order]
        pass_number = _numbered(passes)
        number = _numbered(np.stack([pass_number, self.layer[order]]))
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        firsts = order[starts]
        tokens = self._tokens(number, self.step[order])
        used, place = np.unique(number * self.experts + self.expert[order], return_inverse=True)
        sums = np.bincount(place, weights=self.weight[order].astype(np.float64)).tolist()
        ends = np.searchsorted(used, np.arange(len(firsts) + 1) * self.experts).tolist()
        ids = (used % self.experts).tolist()
        heads = np.stack([self.phase[firsts], self.turn[firsts], pass_number[starts], self.layer[firsts], tokens])
        built = []
        for (phase, turn, step, layer, count), start, end in zip(heads.T.tolist(), ends, ends[1:], strict=False):
            weights = parts_of_weight(sums[start:end])
            built.append(TraceEvent(phase == 1, turn, step, layer, tuple(ids[start:end]), weights, count))
        return tuple(built)

    @staticmethod
    def _tokens(number: Int64, step: Int64) -> Int64:
        """Return how many tokens each event has."""
        pairs = np.unique(np.stack([number, step]), axis=1)
        return np.bincount(pairs[0])

    def uses(self, *, decoding: bool | None = None) -> Int64:
        """Return ``[layers, experts]``: how many tokens used each expert, all or only those of one phase."""
        rows = np.full(len(self.phase), fill_value=True) if decoding is None else (self.phase == 1) == decoding
        flat = np.bincount(self.layer[rows] * self.experts + self.expert[rows], minlength=self.layers * self.experts)
        return flat.reshape(self.layers, self.experts)


def _numbered(columns: Int64) -> Int64:
    """Number the runs of equal columns of ``[keys, rows]`` from 0."""
    changed = (np.diff(columns, axis=1) != 0).any(axis=0)
    return np.concatenate([[0], np.cumsum(changed)])


def _few(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:_MOST_FAULTS])
    return shown if len(values) <= _MOST_FAULTS else f"{shown} and {len(values) - _MOST_FAULTS} more"


# --- reading -------------------------------------------------------------------------------------------


def read_trace(path: Path) -> Trace:
    """Return the trace in ``path``.

    Raises:
        InputError: The file is absent, is no trace, or is damaged; every kind of fault is named with its lines.
    """
    subject = f"trace {str(path)!r}"
    try:
        text = read_bytes(path, "trace").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{subject}: byte {error.start} is not UTF-8. A trace is CSV text; check that this is one."
        ) from None
    preamble, header, first_row = _head(text.splitlines(), subject)
    lines = text.splitlines()[first_row:]
    facts, layer_facts, faults = _preamble(preamble)
    table = _table(lines, header, first_row + 1, subject)
    faults += _faults(table, facts, first_row + 1)
    if faults:
        raise InputError.collect(subject, faults)
    return _trace(table, facts, layer_facts)


def _head(lines: Sequence[str], subject: str) -> tuple[list[str], list[str], int]:
    """Return the preamble, the names of the columns, and the index of the first row."""
    at = next((index for index, line in enumerate(lines) if line.strip() and not line.startswith("#")), None)
    if at is None:
        raise InputError(f"{subject}: there is no line of column names. It needs {', '.join(COLUMNS)}.")
    header = [name.strip() for name in lines[at].split(",")]
    faults = [f"the column {name!r} is missing" for name in _NEEDED if name not in header]
    faults += [f"the column {name!r} is there twice" for name in COLUMNS if header.count(name) > 1]
    if faults:
        shown = lines[at] if len(lines[at]) <= 80 else f"{lines[at][:80]}…"
        raise InputError.collect(
            subject, [*faults, f"line {at + 1} should name the columns {', '.join(COLUMNS)} and reads {shown!r}"]
        )
    if not any(line.strip() for line in lines[at + 1 :]):
        raise InputError(f"{subject}: it has column names and no rows. Record it again.")
    return [line for line in lines[:at] if line.startswith("#")], header, at + 1


def _preamble(lines: Sequence[str]) -> tuple[dict[str, str], dict[int, dict[str, int]], list[str]]:
    """Return the facts of the model, of each layer, and what is wrong with them."""
    facts: dict[str, str] = {}
    layer_facts: dict[int, dict[str, int]] = {}
    faults = []
    for line in lines:
        pairs = _pairs(line)
        if "layer" not in pairs:
            facts.update(pairs)
            continue
        try:
            numbers = {key: int(value) for key, value in pairs.items()}
        except ValueError:
            faults.append(f"the preamble's line {line!r} has something else than whole numbers")
            continue
        layer = numbers.pop("layer")
        if layer in layer_facts or min(layer, *numbers.values(), 0) < 0 or max(layer, *numbers.values(), 0) >= 2**62:
            faults.append(f"the preamble's line {line!r} repeats a layer or has an impossible number")
        layer_facts[layer] = numbers
    faults += [
        f"the preamble says {name}={facts[name]}; a whole number of at least 1 is needed"
        for name in ("n_layer", "n_expert", "n_expert_used")
        if name in facts and not 0 < _whole(facts[name]) < _MOST_ID
    ]
    return facts, layer_facts, faults


def _pairs(line: str) -> dict[str, str]:
    """Return the ``key=value`` pairs of a line; a value reaches to the next key, since paths have spaces."""
    body = line.lstrip("# ")
    found = list(_PAIR.finditer(body))
    ends = [*(match.start() for match in found[1:]), len(body)][: len(found)]
    return {match.group(1): body[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


def _whole(text: str) -> int:
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else -1


def _table(
    lines: Sequence[str], header: Sequence[str], first_line: int, subject: str
) -> dict[str, NDArray[np.float64]]:
    """Return the known columns as float64."""
    names = [name for name in COLUMNS if name in header]
    kept = [line for line in lines if line.strip() and not line.startswith("#")]
    if any(line.count(",") != len(header) - 1 for line in kept):
        raise InputError.collect(subject, _bad_lines(lines, header, names, first_line))
    try:
        values = np.loadtxt(
            StringIO("\n".join(kept)),
            delimiter=",",
            usecols=[header.index(name) for name in names],
            ndmin=2,
            comments=None,
        )
    except ValueError:
        raise InputError.collect(subject, _bad_lines(lines, header, names, first_line)) from None
    return dict(zip(names, values.T, strict=True))


def _bad_lines(lines: Sequence[str], header: Sequence[str], names: Sequence[str], first_line: int) -> list[str]:
    """Say which lines cannot be read, and why."""
    faults = []
    for number, line in enumerate(lines, first_line):
        if not line.strip() or line.startswith("#"):
            continue
        cells = line.split(",")
        if len(cells) != len(header):
            faults.append(f"line {number} has {len(cells)} columns and {len(header)} are named")
            continue
        bad = [name for name in names if not _is_number(cells[header.index(name)])]
        if bad:
            faults.append(f"line {number} has no number as {bad[0]}: {cells[header.index(bad[0])][:20]!r}")
    more = len(faults) - _MOST_FAULTS
    return faults if more <= 0 else [*faults[:_MOST_FAULTS], f"and {more} more lines that cannot be read"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _faults(table: Mapping[str, NDArray[np.float64]], facts: Mapping[str, str], first_line: int) -> list[str]:
    """Say which values are impossible; lines are counted as if none were left out."""
    most = {
        "phase": 1,
        "layer": _whole(facts.get("n_layer", str(_MOST_ID))) - 1,
        "expert": _whole(facts.get("n_expert", str(_MOST_ID))) - 1,
    }
    faults = []
    for name, values in table.items():
        if name == "weight":
            bad = ~(np.isnan(values) | ((values >= 0.0) & np.isfinite(values)))
            wanted = "a weight of at least 0"
        else:
            limit = most.get(name, _MOST_ID - 1)
            bad = ~((values >= 0) & (values <= limit) & (values == np.floor(values)))
            wanted = f"a whole number from 0 to {limit}"
        if bad.any():
            row = int(bad.argmax())
            faults.append(
                f"line {first_line + row} has {name} {values[row]:g} ({bad.sum()} such in all); {wanted} is needed"
            )
    return faults or _repeats(table, first_line)


def _repeats(table: Mapping[str, NDArray[np.float64]], first_line: int) -> list[str]:
    """Say where a token uses the same expert of a layer twice, which no router does."""
    keys = np.stack([table[name] for name in ("turn", "phase", "step", "layer", "iter", "expert") if name in table])
    order = np.lexsort(keys)
    same = (np.diff(keys[:, order], axis=1) == 0).all(axis=0)
    if not same.any():
        return []
    row = int(order[1:][same].min())
    return [
        f"line {first_line + row} names an expert that its token has already, and so do {same.sum()} line(s) in all"
    ]


def _trace(
    table: Mapping[str, NDArray[np.float64]], facts: Mapping[str, str], by_layer: Mapping[int, Mapping[str, int]]
) -> Trace:
    rows = len(table["layer"])
    columns = {name: table.get(name, np.zeros(rows)).astype(np.int64) for name in COLUMNS if name != "weight"}
    weight = table.get("weight", np.full(rows, np.nan)).astype(np.float32)
    layers = max(_whole(facts.get("n_layer", "0")), int(columns["layer"].max()) + 1)
    experts = max(_whole(facts.get("n_expert", "0")), int(columns["expert"].max()) + 1)
    cells = np.unique(
        np.stack([columns[name] for name in ("turn", "phase", "step", "layer", "iter")]), axis=1, return_counts=True
    )
    top_k = max(_whole(facts.get("n_expert_used", "0")), int(cells[1].max()))
    if (cells[1] != top_k).any():
        _log.warning("the trace has tokens with fewer than %d experts in a layer; it may have been cut off", top_k)
    names = {name for numbers in by_layer.values() for name in numbers if name.endswith("_bytes")}
    sizes = {name: np.array([by_layer.get(layer, {}).get(name, 0) for layer in range(layers)]) for name in names}
    expert_bytes = sizes.pop("expert_bytes", np.zeros(layers, dtype=np.int64))
    sizes.pop("dense_bytes", None)
    return Trace(
        **columns,
        weight=weight,
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=expert_bytes,
        precision_bytes={name.removesuffix("_bytes"): values for name, values in sorted(sizes.items())},
        name=facts.get("model", ""),
    )


# --- writing -------------------------------------------------------------------------------------------


def write_trace(path: Path, trace: Trace) -> None:
    """Write ``trace`` so that ``read_trace`` gives the same back, weights to the last bit.

    Raises:
        InputError: The file cannot be written.
        DeviceError: The disk is full.
    """
    counts = f"n_layer={trace.layers} n_expert={trace.experts} n_expert_used={trace.top_k}"
    lines = [
        "# route_trace v1",
        f"# model={' '.join(trace.name.split())} {counts}",
    ]
    kinds = {"expert": trace.expert_bytes, **trace.precision_bytes}
    for layer in range(trace.layers):
        known = [f"{name}_bytes={values[layer]}" for name, values in kinds.items() if values[layer]]
        lines += [f"# layer={layer} {' '.join(known)}"] if known else []
    lines.append(",".join(COLUMNS))
    whole = [getattr(trace, name).tolist() for name in COLUMNS[:-1]]
    # nine digits bring every float32 back
    rows = zip(*whole, trace.weight.tolist(), strict=True)
    lines += ["%d,%d,%d,%d,%d,%d,%d,%.9g" % row for row in rows]  # noqa: UP031 - a million rows
    write_atomic(path, "\n".join(lines) + "\n")
