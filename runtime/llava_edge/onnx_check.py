"""The preflight of an ONNX file: its structure, sizes and what it refers to, before ONNX Runtime reads it.

ONNX is Protocol Buffers (onnx.proto of the ONNX project). Only what matters for safety is walked through: every length
against the file's size, every initialiser's bytes against its shape, no data in other files, no operators from
libraries outside of ONNX Runtime. Weights are not read.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from llava_edge.errors import ModelError, ModelFileError
from llava_edge.protobuf import BYTES, Field, Wire

DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
MAX_DEPTH = 8
MAX_NODES = 1_000_000
MAX_NAME_BYTES = 4096
# TensorProto.DataType -> bits of a value; texts and complex numbers have no place in a vision tower.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 17: 8, 18: 8,
         19: 8, 20: 8, 21: 4, 22: 4, 23: 4}  # fmt: skip
# Numbers of fields, by message.
_IR_VERSION, _GRAPH, _OPSET, _FUNCTION = 1, 7, 8, 25
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _SPARSE = 1, 5, 11, 12, 15
_FUNCTION_NODE = 7
_OP_TYPE, _ATTRIBUTE, _DOMAIN = 4, 5, 7
_A_TENSOR, _A_GRAPH, _A_TENSORS, _A_GRAPHS = 5, 6, 10, 11
_DIMS, _DATA_TYPE, _TENSOR_NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14


def check_onnx(path: Path) -> None:
    """Check an ONNX file.

    Raises
    ------
    ModelFileError
        The file is malformed, or refers to something outside of itself; ``field`` names what is wrong.
    ModelError
        No such file, or it can't be read.
    """
    try:
        with path.open("rb") as file:
            try:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise ModelFileError(path, "file", "is empty") from None
            with data:
                _Checker(path, data).model()
    except FileNotFoundError:
        raise ModelError(f"no such model file: {path}", hint="Check the path.") from None
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None


class _Checker:
    """Walks through the messages; ``_nodes`` counts those of all graphs."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._wire = Wire(path, data)
        self._nodes = 0

    def model(self) -> None:
        graphs = 0
        version = 0
        for field in self._wire.fields("model", 0, len(self._data)):
            if field.number == _IR_VERSION:
                version = field.value
            elif field.number == _OPSET:
                self._opset(field)
            elif field.number == _GRAPH:
                graphs += 1
                self._graph("graph", field, 0)
            elif field.number == _FUNCTION:
                for inner in self._wire.fields("function", field.start, field.end):
                    if inner.number == _FUNCTION_NODE:
                        self._node("function", inner, 0)
        if not 3 <= version <= 64:
            raise self._error("ir_version", f"is {version}; this is not an ONNX file")
        if graphs != 1:
            raise self._error("graph", f"stands {graphs} times; expected one")

    def _opset(self, field: Field) -> None:
        domain = ""
        for inner in self._wire.fields("opset_import", field.start, field.end):
            if inner.number == 1:
                domain = self._text("opset_import", inner)
        self._check_domain("opset_import", domain)

    def _graph(self, where: str, field: Field, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(where, f"has graphs in graphs more than {MAX_DEPTH} deep")
        inputs = outputs = 0
        for inner in self._wire.fields(where, field.start, field.end):
            if inner.number == _NODE:
                self._node(where, inner, depth)
            elif inner.number == _INITIALIZER:
                self._tensor("initializer", inner)
            elif inner.number == _SPARSE:
                raise self._error(where, "has sparse initialisers, which no vision tower needs")
            inputs += inner.number == _INPUT
            outputs += inner.number == _OUTPUT
        if not outputs or (depth == 0 and not inputs):
            raise self._error(where, f"has {inputs} inputs and {outputs} outputs")

    def _node(self, where: str, field: Field, depth: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._error(where, f"has more than {MAX_NODES} nodes")
        domain = kind = ""
        attributes: list[Field] = []
        for inner in self._wire.fields("node", field.start, field.end):
            if inner.number == _DOMAIN:
                domain = self._text("node.domain", inner)
            elif inner.number == _OP_TYPE:
                kind = self._text("node.op_type", inner)
            elif inner.number == _ATTRIBUTE:
                attributes.append(inner)
        self._check_domain(f"node {kind}", domain)
        for attribute in attributes:
            for inner in self._wire.fields(f"node {kind}", attribute.start, attribute.end):
                if inner.number in (_A_GRAPH, _A_GRAPHS):
                    self._graph(f"graph of node {kind}", inner, depth + 1)
                elif inner.number in (_A_TENSOR, _A_TENSORS):
                    self._tensor(f"attribute of node {kind}", inner)

    def _tensor(self, where: str, field: Field) -> None:
        dims: list[int] = []
        kind, raw, name, external = 0, None, "", False
        for inner in self._wire.fields(where, field.start, field.end):
            if inner.number == _DIMS:
                dims += self._varints(where, inner)
            elif inner.number == _DATA_TYPE:
                kind = inner.value
            elif inner.number == _TENSOR_NAME:
                name = self._text(where, inner)
            elif inner.number == _RAW:
                raw = inner.end - inner.start
            elif inner.number == _EXTERNAL or (inner.number == _LOCATION and inner.value):
                external = True
        label = f"{where} {name[:80]}".strip()
        if external:
            raise self._error(label, "keeps its data in another file, which is not allowed")
        if kind not in _BITS:
            raise self._error(label, f"has the type {kind}, which is no type of weights")
        count = 1
        for length in dims:
            count *= length
        if len(dims) > 16 or any(length >= 1 << 62 for length in dims):
            raise self._error(label, f"has the shape {dims[:16]}")
        expected = -(-count * _BITS[kind] // 8)
        if raw is not None and raw != expected:
            raise self._error(label, f"of shape {dims} has {raw} bytes; expected {expected}")
        if raw is None and count * _BITS[kind] // 8 > 8 * (field.end - field.start):
            raise self._error(label, f"of shape {dims} has too little data")

    def _check_domain(self, where: str, domain: str) -> None:
        if domain not in DOMAINS:
            raise self._error(where, f"is of the domain {domain[:80]!r}; ONNX Runtime has no such operators")

    def _text(self, where: str, field: Field) -> str:
        if field.wire != BYTES or field.end - field.start > MAX_NAME_BYTES:
            raise self._error(where, "holds a name that is too long, or none")
        return self._data[field.start : field.end].decode("utf-8", "replace")

    def _varints(self, where: str, field: Field) -> list[int]:
        """Whole numbers, packed or one by one."""
        if field.wire != BYTES:
            return [field.value]
        values, at = [], field.start
        while at < field.end:
            value, at = self._wire.varint(where, at, field.end)
            values.append(value)
        return values

    def _error(self, field: str, problem: str) -> ModelFileError:
        return ModelFileError(self._path, field, problem)
