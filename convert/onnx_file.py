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
from llava_edge.protobuf import BYTES, Field, Wire

_GRAPH, _INITIALIZER = 7, 5  # fields of ModelProto and GraphProto
_LENGTH_BYTES = 5  # of the graph, whose length is known at the end
_LARGEST_GRAPH = 2**31 - 1


def write(model: Any, tensors: Iterable[Any], path: Path) -> None:
    """Write a ``ModelProto`` without weights, and its weights (``TensorProto``) as they come."""
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    with path.open("wb") as file:
        file.write(rest.SerializeToString())
        file.write(_varint(_GRAPH << 3 | BYTES))
        place = file.tell()
        file.write(bytes(_LENGTH_BYTES))
        length = file.write(model.graph.SerializeToString())
        for tensor in tensors:
            data = tensor.SerializeToString()
            length += file.write(_varint(_INITIALIZER << 3 | BYTES) + _varint(len(data))) + file.write(data)
            if length > _LARGEST_GRAPH:
                raise ModelError("the tower is larger than an ONNX file can be, 2 GB", hint="Take --vision none.")
        file.seek(place)
        file.write(_varint(length, _LENGTH_BYTES))


def read(path: Path) -> tuple[Any, Iterator[Any]]:
    """A file's ``ModelProto`` without weights, and its weights one by one."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        wire, model, graph, weights = Wire(path, data), bytearray(), bytearray(), []
        for field in wire.fields("model", 0, len(data)):
            if field.number != _GRAPH:
                model += data[field.begin : field.end]
                continue
            for part in wire.fields("graph", field.start, field.end):
                if part.number == _INITIALIZER:
                    weights.append(part)
                else:
                    graph += data[part.begin : part.end]
    found = onnx.ModelProto.FromString(bytes(model))
    found.graph.CopyFrom(onnx.GraphProto.FromString(bytes(graph)))
    return found, _tensors(path, weights)


def _tensors(path: Path, weights: Iterable[Field]) -> Iterator[Any]:
    with path.open("rb") as file:
        for field in weights:
            file.seek(field.start)
            yield onnx.TensorProto.FromString(file.read(field.end - field.start))


def _varint(value: int, width: int = 1) -> bytes:
    """A number in groups of seven bits, the last first; of at least ``width`` bytes."""
    groups = [value & 0x7F]
    while (value := value >> 7) or len(groups) < width:
        groups.append(value & 0x7F)
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
