"""A decoder's experts in two memories: the host's arena, where copies start, and the device's, where they end.

Who lies where is decided elsewhere; this module keeps the places, starts the copies, and knows which of them the
device's computing must wait for. Neither arena is ever taken again or moved.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from edgeflex.errors import DeviceError, InputError
from edgeflex.runtimes.cuda_streams import explained
from edgeflex.runtimes.cuda_weights import dense_bytes
from edgeflex.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from edgeflex.runtimes.cuda_streams import Streams
    from edgeflex.runtimes.cuda_weights import Kind
    from edgeflex.schema import Precision
    from edgeflex.schema_moe import DecoderManifest

    Key = tuple[int, int]

ALIGNMENT_BYTES = 4096  # of experts in both arenas
BATCH = 8  # experts whose numbers are restored at once, at most
_MOVING = explained("the device failed while experts were moved")


class DeviceBytes(NamedTuple):
    """Bytes on the device beside the experts' arena.

    Attributes:
        dense: Weights that stay.
        key_values: Keys and values of a full context.
        work: Activations, experts' restored numbers, and what libraries keep.
    """

    dense: int
    key_values: int
    work: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.dense + self.key_values + self.work


def device_bytes(
    manifest: DecoderManifest,
    kinds: Mapping[Key, Kind],
    dtype: torch.dtype,
    *,
    context_tokens: int,
    chunk_tokens: int,
    library_bytes: int,
) -> DeviceBytes:
    """Return what a decoder takes on a device beside its experts' arena.

    Args:
        manifest: Of the bundle.
        kinds: Of all experts.
        dtype: Products run in it.
        context_tokens: Positions that the key/value cache holds.
        chunk_tokens: Most tokens of one forward pass.
        library_bytes: What libraries take.
    """
    graph, attention = manifest.graph, manifest.graph.attention
    width = attention.kv_heads * (attention.head_dim + attention.value_dim)
    top_k = max((layer.routing.top_k for layer in graph.layers if layer.routing), default=0)
    inner = max((max(layer.dense_dim, layer.shared_dim, layer.expert_dim) for layer in graph.layers), default=0)
    projected = attention.heads * (attention.head_dim + attention.value_dim) + width
    # residual, norm and their copies in dtype, projections and their turned copies, feed-forwards, experts' outputs
    floats = chunk_tokens * ((top_k + 8) * graph.hidden_dim + 4 * projected + 6 * inner * max(top_k, 1))
    floats += 3 * attention.heads * chunk_tokens * context_tokens  # scores, where no kernel fuses them
    floats += chunk_tokens * graph.vocabulary
    restoring = max((_restoring_bytes(kind, dtype) for kind in set(kinds.values())), default=0)
    largest = max((_largest_dense(manifest, dtype), min(BATCH, max(top_k, 1)) * restoring))
    return DeviceBytes(
        dense_bytes(manifest, dtype),
        len(graph.layers) * width * context_tokens * dtype.itemsize,
        4 * floats + largest + library_bytes,
    )


def _restoring_bytes(kind: Kind, dtype: torch.dtype) -> int:
    """Return the bytes of one expert's codes, gathered, and its two matrices with what they are made through."""
    return kind.size_bytes + (dtype.itemsize + 1) * (kind.gate_up.numbers + kind.down.numbers)


def _largest_dense(manifest: DecoderManifest, dtype: torch.dtype) -> int:
    """Return the bytes of the largest dense matrix's codes, and of its halves, while it is being restored."""
    dense = (one for one in manifest.matrices if ".experts." not in one.name)
    return max(
        (2 * one.weights_bytes + one.scales_bytes + one.rows * one.columns * dtype.itemsize for one in dense), default=0
    )


class ExpertMemory:
    """Places of experts in both arenas, and the copies between them.

    Args:
        streams: The device.
        kinds: Of all experts.
    """

    def __init__(self, streams: Streams, kinds: Mapping[Key, Kind]) -> None:
        self.streams = streams
        self.kinds = kinds
        self.host_problem = ""
        self.pinned = False
        self._host_arena: NDArray[np.uint8] | None = None
        self._arena: Tensor | None = None
        self._stage: Tensor | None = None
        self._share: tuple[Key, int, Any] | None = None  # whose first bytes lie there, how many, and their copy
        self._host_places: dict[Key, int] = {}
        self._places: dict[Key, int] = {}
        self._uploads: dict[Key, Any] = {}
        self._marks: list[Any] = []

    def __contains__(self, key: Key) -> bool:
        """Whether an expert lies on the device, or is on its way there."""
        return key in self._places

    @property
    def copying(self) -> bool:
        """Whether a copy may be under way that no computing waits for."""
        return bool(self._uploads)

    def on_host(self, key: Key) -> bool:
        """Return whether an expert lies in the host's arena."""
        return key in self._host_places

    def arena(self, capacity_bytes: int) -> NDArray[np.uint8]:
        """Return page-aligned memory of the host for experts, pinned where the driver allows it.

        Where it does not, ``host_problem`` says why, and copies take a detour through the driver's buffers.

        Raises:
            DeviceError: No memory.
        """
        try:
            found = self.streams.host(capacity_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise DeviceError(
                f"no memory for {format_bytes(capacity_bytes)} of experts beside the device: {error}. "
                "All of it is taken at once. Give a smaller RAM tier."
            ) from error
        self.host_problem, self.pinned = found.problem, found.pinned
        self._host_places.clear()
        self._host_arena = found.data
        return found.data

    def device_arena(self, capacity_bytes: int, staged_bytes: int = 0) -> None:
        """Take memory of the device for experts, all at once; it is never taken again or moved.

        Args:
            capacity_bytes: Of residents.
            staged_bytes: Where shares of experts arrive.

        Raises:
            DeviceError: The device refused.
        """
        self._places.clear()
        self._arena = self._stage = self._share = None
        with explained(f"the device gives no {format_bytes(capacity_bytes + staged_bytes)} for experts"):
            self._arena = self.streams.empty((capacity_bytes,), torch.uint8)
            self._stage = self.streams.empty((staged_bytes,), torch.uint8) if staged_bytes else None

    def bind(self, layer: int, expert: int, precision: Precision, offset: int) -> None:
        """Say that an expert's record lies at ``offset`` of the host's arena.

        Raises:
            InputError: No such expert, or it does not lie in the arena.
        """
        held = 0 if self._host_arena is None else self._host_arena.size
        self._check_place(layer, expert, offset, held)
        if precision is not self.kinds[layer, expert].down.precision:
            raise InputError(f"expert {expert} of layer {layer} is not {precision.value}. Mend the caller.")
        self._host_places[layer, expert] = offset

    def unbind(self, layer: int, expert: int) -> None:
        """Forget where an expert lies on the host.

        Raises:
            InputError: No such expert.
        """
        self._kind(layer, expert)
        self._host_places.pop((layer, expert), None)

    @_MOVING
    def upload(self, layer: int, expert: int, offset: int, after: Any) -> Any:
        """Start copying an expert from the host's arena to ``offset`` of the device's, where it lies from now on.

        Args:
            layer: Its layer.
            expert: Its number, bound.
            offset: A multiple of 4096.
            after: A mark of ``streams.fence``: what still uses these bytes stands before it.

        Returns:
            The copy's mark; see ``Streams.upload``.

        Raises:
            InputError: No such expert, it is not on the host, or it does not fit there.
            DeviceError: The device failed.
        """
        arena = self._device_arena()
        self._check_place(layer, expert, offset, arena.numel())
        source = torch.from_numpy(self.host_record(layer, expert))
        mark = self.streams.upload(arena[offset : offset + source.numel()], source, after)
        self._places[layer, expert] = offset
        self._uploads[layer, expert] = mark
        return mark

    @_MOVING
    def upload_share(self, layer: int, expert: int, size_bytes: int, after: Any) -> Any:
        """Start copying the first bytes of an expert to where shares arrive; it stays where it lies.

        Args:
            layer: Its layer.
            expert: Its number, bound.
            size_bytes: How many.
            after: As of ``upload``: the share before is computed ahead of it.

        Returns:
            The copy's mark; see ``Streams.upload``.

        Raises:
            InputError: No such expert, it is not on the host, or there is no room for so many.
            DeviceError: The device failed.
        """
        source = self.host_record(layer, expert)[:size_bytes]
        held = 0 if self._stage is None else self._stage.numel()
        if self._stage is None or not 0 < size_bytes <= min(held, source.size):
            raise InputError(
                f"expert {expert} of layer {layer}: {size_bytes} of its bytes do not fit into {held} for shares. "
                "Mend the caller."
            )
        mark = self.streams.upload(self._stage[:size_bytes], torch.from_numpy(source), after)
        self._share = (layer, expert), size_bytes, mark
        return mark

    def share(self, layer: int, expert: int) -> Tensor:
        """Return the first bytes of an expert on the device; what is computed from them waits for their copy.

        Raises:
            InputError: They were not copied, or taken already.
        """
        if self._stage is None or self._share is None or self._share[0] != (layer, expert):
            raise InputError(f"no share of expert {expert} of layer {layer} is on the device. Mend the caller.")
        (_, size_bytes, mark), self._share = self._share, None
        self.streams.wait(mark)
        self._marks.append(mark)
        return self._stage[:size_bytes]

    def drop(self, layer: int, expert: int) -> None:
        """Forget where an expert lies on the device; what is computed or copied later waits for its copy."""
        self._await(layer, expert)
        self._places.pop((layer, expert), None)

    @_MOVING
    def slide(self, layer: int, expert: int, target: int) -> None:
        """Move an expert within the device's arena; what lies at ``target`` is lost, also its own old bytes.

        Raises:
            InputError: It is not there.
            DeviceError: The device failed.
        """
        arena, source = self._device_arena(), self._place(layer, expert)
        self._await(layer, expert)
        size_bytes = self.kinds[layer, expert].size_bytes
        arena[target : target + size_bytes] = arena[source : source + size_bytes].clone()
        self._places[layer, expert] = target

    @_MOVING
    def fetch(self, layer: int, expert: int) -> NDArray[np.uint8]:
        """Return a copy of an expert's record from the device.

        Raises:
            InputError: It is not there.
            DeviceError: The device failed.
        """
        offset, size_bytes = self._place(layer, expert), self.kinds[layer, expert].size_bytes
        self._await(layer, expert)
        found: NDArray[np.uint8] = self._device_arena()[offset : offset + size_bytes].cpu().numpy().copy()
        return found

    def records(self, layer: int, experts: Sequence[int]) -> Tensor:
        """Return records of one kind ``[experts, bytes]`` on the device: a view of one, a copy of several.

        What is computed from them begins after their copies have landed.

        Raises:
            InputError: One is not on the device.
        """
        arena = self._device_arena()
        for expert in experts:
            self._await(layer, expert)
        size_bytes = self._kind(layer, experts[0]).size_bytes
        found = [arena[offset : offset + size_bytes] for offset in (self._place(layer, one) for one in experts)]
        return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)

    def host_record(self, layer: int, expert: int) -> NDArray[np.uint8]:
        """Return an expert's record where it lies on the host.

        Raises:
            InputError: It is not there.
        """
        offset = self._host_places.get((layer, expert))
        if offset is None or self._host_arena is None:
            raise InputError(f"expert {expert} of layer {layer} is not in the host's arena. Mend the caller.")
        return self._host_arena[offset : offset + self._kind(layer, expert).size_bytes]

    def _await(self, layer: int, expert: int) -> None:
        """Let the device's computing wait for an expert's copy, once."""
        mark = self._uploads.pop((layer, expert), None)
        if mark is not None:
            self.streams.wait(mark)
            self._marks.append(mark)

    def _place(self, layer: int, expert: int) -> int:
        offset = self._places.get((layer, expert))
        if offset is None:
            raise InputError(f"expert {expert} of layer {layer} is not on the device. Mend the caller.")
        return offset

    def _check_place(self, layer: int, expert: int, offset: int, held: int) -> None:
        size_bytes = self._kind(layer, expert).size_bytes
        if offset % ALIGNMENT_BYTES or not 0 <= offset <= held - size_bytes:
            raise InputError(
                f"expert {expert} of layer {layer}: {size_bytes} bytes at offset {offset} of {held}; multiples of "
                f"{ALIGNMENT_BYTES} inside the arena are needed. Mend the caller."
            )

    def _kind(self, layer: int, expert: int) -> Kind:
        kind = self.kinds.get((layer, expert))
        if kind is None:
            raise InputError(f"layer {layer} has no expert {expert}. Mend the caller.")
        return kind

    def _device_arena(self) -> Tensor:
        if self._arena is None:
            raise InputError("the device has no memory for experts. Take it first.")
        return self._arena

    @_MOVING
    def upload_seconds(self) -> float:
        """Return the link's seconds of the uploads since the last call; call it when nothing is under way.

        Raises:
            DeviceError: The device failed.
        """
        marks, self._marks = self._marks, []
        return sum(self.streams.seconds(mark) for mark in marks)

    @_MOVING
    def forget(self) -> None:
        """Forget all places, after everything under way has ended.

        Raises:
            DeviceError: The device failed.
        """
        self.streams.synchronize()
        for held in (self._places, self._uploads, self._host_places):
            held.clear()
        self._marks.clear()
        self._share = None

    def close(self) -> None:
        """Give both arenas back, after copies that are under way."""
        with suppress(RuntimeError):  # a lost device has none
            self.streams.synchronize()
        self._arena = self._stage = self._share = None
        self._places.clear()
        self._uploads.clear()
        self._marks.clear()
        self._host_places.clear()
        self.streams.close()
        self._host_arena = None
