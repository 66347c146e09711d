"""FlatTensor files (``.ptd``): what stands before the data, and where every piece of data lies.

ExecuTorch's own serialiser takes all data in memory and calls the flatbuffer compiler for every file. Experts of
one shape share everything but their numbers, so the front is made once per kind of file, with ExecuTorch's own
schema and compiler, and files are then written piece by piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_SEGMENT_ALIGNMENT = 128  # the serialiser's own choice; XNNPACK asks for 16
_FRONT_ALIGNMENT = 16


@dataclass(frozen=True)
class DataKey:
    """A name under which a program asks for a piece; ``layout`` (a TensorLayout) where it wants a tensor."""

    key: str
    layout: Any = None


@dataclass(frozen=True)
class DataPiece:
    """Bytes in a file, under one or more names."""

    name: str
    size_bytes: int
    keys: tuple[DataKey, ...]


@dataclass(frozen=True)
class DataFront:
    """What stands before the data.

    Attributes:
        head: The first bytes of the file, up to the first piece.
        offsets: Where each piece starts in the file, multiples of 128.
        size_bytes: Of the whole file.
    """

    head: bytes
    offsets: tuple[int, ...]
    size_bytes: int


def data_front(pieces: Sequence[DataPiece]) -> DataFront:
    """Return the front of a file that holds ``pieces`` in this order."""
    from executorch.exir._serialize._program import _insert_flatbuffer_header
    from executorch.extension.flat_tensor.serialize import serialize
    from executorch.extension.flat_tensor.serialize.flat_tensor_schema import DataSegment, FlatTensor, NamedData

    starts: list[int] = []
    end = 0
    for piece in pieces:
        starts.append(_aligned(end, _SEGMENT_ALIGNMENT))
        end = starts[-1] + piece.size_bytes
    flatbuffer = bytes(
        serialize._serialize_to_flatbuffer(  # noqa: SLF001 - the public serialiser wants all data at once
            FlatTensor(
                version=0,
                segments=[
                    DataSegment(offset=start, size=piece.size_bytes)
                    for start, piece in zip(starts, pieces, strict=True)
                ],
                named_data=[
                    NamedData(key=one.key, segment_index=index, tensor_layout=one.layout)
                    for index, piece in enumerate(pieces)
                    for one in piece.keys
                ],
            )
        )
    )
    header_bytes = _aligned(serialize.FlatTensorHeader.EXPECTED_LENGTH, _FRONT_ALIGNMENT)
    base = _aligned(len(flatbuffer) + header_bytes, _SEGMENT_ALIGNMENT)
    header = serialize.FlatTensorHeader(
        flatbuffer_offset=header_bytes,
        flatbuffer_size=len(flatbuffer),
        segment_base_offset=base,
        segment_data_size=end,
    ).to_bytes()
    front = _insert_flatbuffer_header(
        flatbuffer_data=flatbuffer,
        magic_regex=r"FT[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=header.ljust(header_bytes, b"\0"),
    )
    return DataFront(front.ljust(base, b"\0"), tuple(base + start for start in starts), base + end)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
