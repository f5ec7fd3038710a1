"""ONNX files tensor by tensor: a tower of 1.2 GB is written and read with the memory of its largest weight.

``onnx.save_model`` and ``onnx.load`` hold the whole file two or three times. What they would write is a message whose
parts stand one after the other (Protocol Buffers' encoding, https://protobuf.dev/programming-guides/encoding), so the
weights can be put behind the rest of the graph as they come.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from llava_edge.errors import ModelError

_GRAPH, _INITIALIZER = 7, 5  # fields of ModelProto and GraphProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LENGTH_BYTES = 5  # of the graph, whose length is known at the end
_LARGEST_GRAPH = 2**31 - 1


def write(model: Any, tensors: Iterable[Any], path: Path) -> None:
    """Write a ``ModelProto`` without weights, and its weights (``TensorProto``) as they come."""
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    with path.open("wb") as file:
        file.write(rest.SerializeToString())
        file.write(_varint(_GRAPH << 3 | _BYTES))
        place = file.tell()
        file.write(bytes(_LENGTH_BYTES))
        file.write(model.graph.SerializeToString())
        for tensor in tensors:
            data = tensor.SerializeToString()
            file.write(_varint(_INITIALIZER << 3 | _BYTES) + _varint(len(data)))
            file.write(data)
            length = file.tell() - place - _LENGTH_BYTES
            if length > _LARGEST_GRAPH:
                raise ModelError("the tower is larger than an ONNX file can be, 2 GB", hint="Take --vision none.")
        length = file.tell() - place - _LENGTH_BYTES
        file.seek(place)
        file.write(_varint(length, _LENGTH_BYTES))


def read(path: Path) -> tuple[Any, Iterator[Any]]:
    """A file's ``ModelProto`` without weights, and its weights one by one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model, graph, spans = bytearray(), bytearray(), []
        for number, whole, inner in _fields(data, slice(0, len(data))):
            if number != _GRAPH:
                model += data[whole]
                continue
            for number, part, content in _fields(data, inner):
                if number == _INITIALIZER:
                    spans.append(content)
                else:
                    graph += data[part]
    found = onnx.ModelProto.FromString(bytes(model))
    found.graph.CopyFrom(onnx.GraphProto.FromString(bytes(graph)))
    return found, _tensors(path, spans)


def _tensors(path: Path, spans: Iterable[slice]) -> Iterator[Any]:
    with path.open("rb") as file:
        for span in spans:
            file.seek(span.start)
            yield onnx.TensorProto.FromString(file.read(span.stop - span.start))


def _fields(data: mmap.mmap, span: slice) -> Iterator[tuple[int, slice, slice]]:
    """The fields of a message: number, where it stands, and where its content does."""
    at = span.start
    while at < span.stop:
        begin = at
        key, at = _read_varint(data, at)
        content = at
        if key & 7 == _VARINT:
            _, at = _read_varint(data, at)
        elif key & 7 == _BYTES:
            length, content = _read_varint(data, at)
            at = content + length
        else:
            at += {_FIXED64: 8, _FIXED32: 4}[key & 7]
        yield key >> 3, slice(begin, at), slice(content, at)


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int, width: int = 1) -> bytes:
    """A number in groups of seven bits, the last first; of at least ``width`` bytes."""
    groups = [value & 0x7F]
    while (value := value >> 7) or len(groups) < width:
        groups.append(value & 0x7F)
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
