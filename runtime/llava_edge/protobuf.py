"""The fields of Protocol Buffers messages in a file (https://protobuf.dev/programming-guides/encoding).

ONNX files are such messages. They are walked through without being read whole.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_edge.errors import ModelFileError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field, from byte ``begin`` on; what it holds lies from ``start`` to ``end``, a whole number is ``value``."""

    number: int
    wire: int
    value: int
    begin: int
    start: int
    end: int


class Wire:
    """Reads messages in the file at ``path``. ModelFileError, by the name of the message, where one is malformed."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data

    def fields(self, where: str, start: int, end: int) -> Iterator[Field]:
        """The fields of the message from byte ``start`` to ``end``."""
        at = start
        while at < end:
            begin = at
            key, at = self.varint(where, at, end)
            number, wire = key >> 3, key & 7
            value, content = 0, at
            if wire == VARINT:
                value, at = self.varint(where, at, end)
            elif wire == BYTES:
                length, content = self.varint(where, at, end)
                at = content + length
            elif wire in (FIXED64, FIXED32):
                at += 8 if wire == FIXED64 else 4
            else:
                raise self._error(where, f"has the wire type {wire} at byte {at}; the file is damaged, or no ONNX")
            if at > end or not number:
                raise self._error(where, f"has a field that ends at byte {at}, beyond its end at {end}")
            yield Field(number, wire, value, begin, content, at)

    def varint(self, where: str, at: int, end: int) -> tuple[int, int]:
        """A whole number, and the byte behind it."""
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (1 << 64) - 1, at
        raise self._error(where, f"has a number that does not end, at byte {at}")

    def _error(self, field: str, problem: str) -> ModelFileError:
        return ModelFileError(self._path, field, problem)
