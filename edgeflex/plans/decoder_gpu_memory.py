"""What a decoder holds on a machine with a GPU: on the card beside its experts, and in the processor's memory.

On the card dense matrices lie as bfloat16, whatever their precision in the bundle, with a scale a row where products
are scaled afterwards; so the precision of a dense part decides accuracy and disk, not memory. Experts lie as they do
in the bundle. Every sum here is at least what a run takes; what no sum tells (the driver's context, PyTorch in the
processor's memory) is a stated constant, larger than what is usual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from edgeflex.plans.decoder_costs import PAGE_BYTES, activations_bytes, raw_bytes, small_bytes
from edgeflex.schema import Precision
from edgeflex.schema_gpu import GpuMemory
from edgeflex.schema_moe import DecoderMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeflex.plans.decoder_costs import Shape, Space
    from edgeflex.plans.decoder_mixes import Mix
    from edgeflex.schema_moe import DecoderGraph

CONTEXT_BYTES = 512 << 20  # the driver's, with the kernels that PyTorch loads
LIBRARY_BYTES = 64 << 20  # cuBLAS's workspace and the rounding of PyTorch's allocator
HOST_LIBRARY_BYTES = 1 << 30  # PyTorch and CUDA in the processor's memory
LANDING_EXPERTS = 4  # places where reads land when no RAM tier keeps them

_NUMBER_BYTES = 2  # bfloat16
_BATCH = 8  # experts whose numbers are restored at once
_SEGMENT_BYTES = 128  # in an expert's file every piece starts at a multiple of it
_FRONT_BYTES = 1024  # of an expert's file, before the first piece


def slot_bytes(precision: Precision, shapes: Sequence[Shape]) -> int:
    """Return the bytes of an expert in an arena: its file, in whole pages."""
    size = _FRONT_BYTES
    for rows, columns in shapes:
        weights = rows * columns * precision.bits // 8
        scales = raw_bytes(precision, rows, columns) - weights
        size += _up(weights, _SEGMENT_BYTES) + _up(scales, _SEGMENT_BYTES)
        if precision is Precision.INT4_GROUP32 and columns == precision.group_size:
            size += _up(4 * rows, _SEGMENT_BYTES)
    return _up(size, PAGE_BYTES)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def device_space(space: Space, *, gpu_bytes_per_s: float, link_bytes_per_s: float) -> Space:
    """Return the decisions with what they cost on a GPU: bytes in its memory, seconds by its rates.

    The seconds only price precisions against each other; a plan's come from the virtual device.

    Args:
        space: Of the decoder.
        gpu_bytes_per_s: Rate of the GPU's memory.
        link_bytes_per_s: Rate at which experts that miss are brought.
    """
    have = np.isfinite(space.kl)
    memory, experts = np.zeros_like(space.memory_bytes), np.zeros_like(space.expert_bytes)
    for row, pick in enumerate(space.picks):
        for column, precision in enumerate(space.options):
            if not have[row, column]:
                continue
            if pick.layer >= 0:
                experts[row, column] = slot_bytes(precision, pick.shapes)
            else:
                memory[row, column] = sum(_held(shape) for shape in pick.shapes)
    seconds = (memory + space.use[:, None] * experts) / gpu_bytes_per_s
    return replace(
        space,
        memory_bytes=memory,
        expert_bytes=experts,
        token_s={space.threads[0]: seconds},
        threads=space.threads[:1],
        rates=space.rates.model_copy(update={"read_bytes_per_s": link_bytes_per_s}),
    )


def _held(shape: Shape) -> int:
    rows, columns = shape
    return rows * columns * _NUMBER_BYTES + 4 * rows


@dataclass(frozen=True)
class Holdings:
    """What is held beside experts.

    Args:
        space: Of ``device_space``.
        context_tokens: Positions of the key/value cache.
        runtime_bytes: Of an idle process without PyTorch.
    """

    space: Space
    context_tokens: int
    runtime_bytes: int

    @property
    def graph(self) -> DecoderGraph:
        """The decoder."""
        return self.space.graph

    def gpu(self, arena_bytes: int, chunk_tokens: int) -> GpuMemory:
        """Return the GPU's memory; dense parts take the same whatever their precision."""
        attention = self.graph.attention
        width = attention.kv_heads * (attention.head_dim + attention.value_dim)
        return GpuMemory(
            dense_bytes=self._dense_bytes,
            arena_bytes=arena_bytes,
            kv_bytes=len(self.graph.layers) * width * self.context_tokens * _NUMBER_BYTES,
            activations_bytes=chunk_tokens * self._row_bytes + self._restored_bytes,
            context_bytes=CONTEXT_BYTES + LIBRARY_BYTES,
        )

    def host(self, mix: Mix, ram_bytes: int, chunk_tokens: int) -> DecoderMemory:
        """Return the processor's memory: the embedding, experts, buffers, and the process itself."""
        landing = 0 if ram_bytes else LANDING_EXPERTS * int(mix.sizes.max(initial=0))
        return DecoderMemory(
            dense_bytes=self._embedding_bytes[int(mix.columns[self._embedding_row])],
            cache_bytes=ram_bytes,
            kv_bytes=0,
            activations_bytes=self._buffers_bytes(chunk_tokens) + landing,
            runtime_bytes=self.runtime_bytes + HOST_LIBRARY_BYTES,
        )

    @cached_property
    def _dense_bytes(self) -> int:
        return int(self.space.memory_bytes.max(axis=1).sum()) + small_bytes(self.graph)

    @cached_property
    def _embedding_row(self) -> int:
        return next(place for place, pick in enumerate(self.space.picks) if pick.looked_up is not None)

    @cached_property
    def _embedding_bytes(self) -> list[int]:
        return [raw_bytes(one, self.graph.vocabulary, self.graph.hidden_dim) for one in self.space.options]

    def _buffers_bytes(self, chunk_tokens: int) -> int:
        if chunk_tokens not in self._buffers:
            self._buffers[chunk_tokens] = activations_bytes(self.graph, chunk_tokens)
        return self._buffers[chunk_tokens]

    @cached_property
    def _buffers(self) -> dict[int, int]:
        return {}

    @cached_property
    def _row_bytes(self) -> int:
        """Bytes of one row: residual, norms, projections, feed-forwards, scores, logits."""
        graph, attention = self.graph, self.graph.attention
        width = attention.kv_heads * (attention.head_dim + attention.value_dim)
        top_k = max((layer.routing.top_k for layer in graph.layers if layer.routing), default=0)
        inner = max((max(layer.dense_dim, layer.shared_dim, layer.expert_dim) for layer in graph.layers), default=0)
        projected = attention.heads * (attention.head_dim + attention.value_dim) + width
        row = (top_k + 8) * graph.hidden_dim + 4 * projected + 6 * inner * max(top_k, 1) + graph.vocabulary
        return 4 * (row + 3 * attention.heads * self.context_tokens)

    @cached_property
    def _restored_bytes(self) -> int:
        """Bytes in which numbers are restored: the largest dense matrix's, or a batch of experts'."""
        graph, options = self.graph, self.space.options
        shapes = {name: shape for name, shape in graph.matrix_shapes().items() if ".experts." not in name}
        dense = max((_restoring(one, *shape) for shape in shapes.values() for one in options), default=0)
        dense = max(dense, max((10 * _count(shape) for shape in graph.small_shapes().values()), default=0))
        top_k = max((layer.routing.top_k for layer in graph.layers if layer.routing), default=0)
        pairs = [pick.shapes for pick in self.space.picks if pick.layer >= 0]
        expert = 0
        for shapes_of in set(pairs):
            numbers = sum(rows * columns for rows, columns in shapes_of)
            largest = max(slot_bytes(one, shapes_of) for one in options)
            expert = max(expert, largest + (_NUMBER_BYTES + 1) * numbers)
        return max(dense, min(_BATCH, max(top_k, 1)) * expert)


def _restoring(precision: Precision, rows: int, columns: int) -> int:
    weights = rows * columns * precision.bits // 8
    return weights + raw_bytes(precision, rows, columns) + rows * columns * _NUMBER_BYTES


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
