"""Which number formats an ONNX graph holds, read from the file itself.

ONNX Runtime does not tell, and a device that runs a bundle need not have the ``onnx`` package. Only what is needed of
the protocol-buffer encoding is read: https://protobuf.dev/programming-guides/encoding, field numbers from onnx.proto3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Members of TensorProto.DataType.
INT8_TYPES = frozenset({2, 3})
FP8_TYPES = frozenset({17, 18, 19, 20, 24})
INT4_TYPES = frozenset({21, 22})

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH = 1, 3, 5, 6
_TENSOR_DATA_TYPE = 2
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


def element_types(model: bytes) -> frozenset[int]:
    """Return the data types (``TensorProto.DataType``) of every constant, and those that nodes quantise or cast to.

    Raises:
        ValueError: ``model`` is no protocol buffer.
    """
    found: set[int] = set()
    for graph in _messages(memoryview(model), _MODEL_GRAPH):
        found.update(_graph_types(graph))
    return frozenset(found)


def _graph_types(graph: memoryview) -> Iterator[int]:
    for tensor in _messages(graph, _GRAPH_INITIALIZER):
        yield from _numbers(tensor, _TENSOR_DATA_TYPE)
    for node in _messages(graph, _GRAPH_NODE):
        for attribute in _messages(node, _NODE_ATTRIBUTE):
            yield from _attribute_types(attribute)


def _attribute_types(attribute: memoryview) -> Iterator[int]:
    for tensor in _messages(attribute, _ATTRIBUTE_TENSOR):
        yield from _numbers(tensor, _TENSOR_DATA_TYPE)
    for graph in _messages(attribute, _ATTRIBUTE_GRAPH):
        yield from _graph_types(graph)
    if any(bytes(name) in {b"output_dtype", b"to"} for name in _messages(attribute, _ATTRIBUTE_NAME)):
        yield from _numbers(attribute, _ATTRIBUTE_INT)


def _messages(data: memoryview, number: int) -> Iterator[memoryview]:
    return (value for found, value in _fields(data) if found == number and isinstance(value, memoryview))


def _numbers(data: memoryview, number: int) -> Iterator[int]:
    return (value for found, value in _fields(data) if found == number and isinstance(value, int))


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and the value of every field; numbers of fixed width are left out."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == _LENGTH:
            size, at = _varint(data, at)
            yield key >> 3, data[at : at + size]
        elif wire in {_EIGHT_BYTES, _FOUR_BYTES}:
            size = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        at += size
    if at != len(data):
        raise ValueError("the last field is cut off")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a number is cut off")
