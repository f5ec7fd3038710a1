"""The header of a GGUF file, read without trusting it: every length is checked before it is used.

The layout is that of the GGUF specification (docs/gguf.md in ggml). Data of tensors is never read, and a number that
the file claims is never allocated: what counts is how many bytes the file really has.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_edge.errors import ModelError, ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 * 1024 * 1024
MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 63
MAX_KEY_BYTES = 255
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_ITEMS = 1 << 22
MAX_DIMS = 4
MIN_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 20
LONG_LIST = 512
_FIRST_READ = 4 * 1024 * 1024

# Numbers of the types of values, with their struct codes.
TEXT, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
KIND_NAMES = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", 7: "bool", TEXT: "string",
    ARRAY: "array", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip
UINT16, UINT32, INT32, FLOAT32, BOOL = 2, 4, 5, 6, 7

# ggml's types of weights: number -> name, values a block, bytes a block. Types that only exist while computing (Q8_1,
# Q8_K) or that no layer takes (integers, float64) are left out, and so refused.
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """A list of values: ``items`` are ``bytes`` for texts and numbers otherwise."""

    kind: int
    items: list[Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Field:
    """A value of the header with the number of its type."""

    kind: int
    value: Any

    @property
    def kind_name(self) -> str:
        """The type in words."""
        return f"array of {KIND_NAMES[self.value.kind]}" if self.kind == ARRAY else KIND_NAMES[self.kind]


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry. ``shape`` has the row's length first, as the file does; ``offset`` counts from the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int

    @property
    def padded_shape(self) -> tuple[int, int, int, int]:
        """The shape with ones up to four dimensions."""
        a, b, c, d = (*self.shape, 1, 1, 1, 1)[:MAX_DIMS]
        return a, b, c, d


@dataclass(frozen=True)
class Header:
    """A whole header, consistent in itself and with the file's size."""

    path: Path
    size: int
    version: int
    fields: dict[str, Field]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """``general.architecture``, empty if there is none."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A text of the header; empty if the key is missing or no text."""
        field = self.fields.get(key)
        return field.value.decode("utf-8", "replace") if field is not None and field.kind == TEXT else ""

    def without_long_lists(self) -> Header:
        """The same without vocabularies and the like."""
        short = {key: f for key, f in self.fields.items() if f.kind != ARRAY or len(f.value.items) <= LONG_LIST}
        return replace(self, fields=short)

    def error(self, field: str, problem: str) -> ModelFileError:
        """An error about one field of this file."""
        return ModelFileError(self.path, field, problem)


def read_header(path: Path) -> Header:
    """Read and check a header.

    Raises
    ------
    ModelFileError
        Not a GGUF file, or a malformed one; the message names the field.
    ModelError
        No such file, or it can't be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = _FIRST_READ
            data = file.read(wanted)
            while True:
                try:
                    return _Parser(path, data, size).header()
                except _TooShort:
                    if len(data) >= min(size, MAX_HEADER_BYTES):
                        problem = f"is longer than {MAX_HEADER_BYTES} bytes"
                        raise ModelFileError(path, "header", problem) from None
                    wanted *= 4
                    data += file.read(min(wanted, MAX_HEADER_BYTES) - len(data))
    except FileNotFoundError:
        raise ModelError(f"no such model file: {path}", hint="Check the path.") from None
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None


class _TooShort(Exception):
    """The file goes on, but what was read of it ends."""


class _Parser:
    """Goes through the bytes once. ``field`` is what is being read, for messages."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self._path = path
        self._data = data
        self._size = size
        self._at = 0
        self._field = "magic"

    def header(self) -> Header:
        magic = self._data[:4]
        if magic != MAGIC:
            raise ModelFileError(self._path, "magic", f"is {magic!r}; this is not a GGUF file")
        self._at = 4
        version = self._version()
        n_tensors = self._count("tensor count", MAX_TENSORS)
        n_keys = self._count("key count", MAX_KEYS)
        fields: dict[str, Field] = {}
        for number in range(n_keys):
            self._field = f"key {number}"
            key = self._name(MAX_KEY_BYTES)
            self._field = key
            if key in fields:
                raise self._error("stands twice")
            fields[key] = self._value()
        tensors = self._tensors(n_tensors, self._alignment(fields))
        return Header(self._path, self._size, version, fields, tensors)

    def _version(self) -> int:
        self._field = "version"
        version: int = self._number("I")
        if version not in VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0] in VERSIONS
            why = "the file is big-endian" if swapped else f"expected {' or '.join(map(str, VERSIONS))}"
            raise self._error(f"is {version}; {why}")
        return version

    def _count(self, field: str, limit: int) -> int:
        self._field = field
        count: int = self._number("Q")
        if count > limit:
            raise self._error(f"is {count}; at most {limit} are allowed")
        return count

    def _value(self) -> Field:
        kind = self._number("I")
        if kind == ARRAY:
            return Field(ARRAY, self._array())
        if kind == TEXT:
            return Field(TEXT, self._bytes(MAX_TEXT_BYTES))
        if kind not in SCALARS:
            raise self._error(f"has the type {kind}, which does not exist")
        return Field(kind, self._number(SCALARS[kind]))

    def _array(self) -> Array:
        kind, count = self._number("I"), self._number("Q")
        if count > MAX_ITEMS:
            raise self._error(f"is a list of {count} values; at most {MAX_ITEMS} are allowed")
        if kind == TEXT:
            self._need(count * 8)
            return Array(TEXT, self._texts(count))
        if kind not in SCALARS:
            raise self._error(f"is a list of type {kind}; lists of numbers, bools and texts are allowed")
        self._need(count * struct.calcsize(SCALARS[kind]))
        values = struct.unpack_from(f"<{count}{SCALARS[kind]}", self._data, self._at)
        self._at += count * struct.calcsize(SCALARS[kind])
        return Array(kind, values)

    def _texts(self, count: int) -> list[bytes]:
        """A quick loop: a vocabulary has hundreds of thousands of texts."""
        data, at, unpack = self._data, self._at, struct.Struct("<Q").unpack_from
        texts: list[bytes] = []
        append: Callable[[bytes], None] = texts.append
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                append(data[start:at])
        except (struct.error, OverflowError):
            at = max(at, len(data)) + 8
        if at > len(data):
            self._need(at - self._at)
        self._at = at
        return texts

    def _tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        offset = 0
        for number in range(count):
            self._field = f"tensor {number}"
            tensor = self._tensor(offset)
            if tensor.name in tensors:
                raise self._error("stands twice")
            tensors[tensor.name] = tensor
            offset += -(-tensor.n_bytes // alignment) * alignment
        start = -(-self._at // alignment) * alignment
        for tensor in tensors.values():
            if start + tensor.offset + tensor.n_bytes > self._size:
                self._field = f"tensor {tensor.name}"
                end = start + tensor.offset + tensor.n_bytes
                raise self._error(f"ends at byte {end}; the file has {self._size}")
        return tensors

    def _tensor(self, expected_offset: int) -> Tensor:
        name = self._name(MAX_NAME_BYTES)
        self._field = f"tensor {name}"
        n_dims = self._number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._error(f"has {n_dims} dimensions; expected 1 to {MAX_DIMS}")
        shape = tuple(self._number("Q") for _ in range(n_dims))
        if min(shape) < 1:
            raise self._error(f"has the shape {list(shape)}; every length must be 1 or more")
        number, offset = self._number("I"), self._number("Q")
        if number not in TENSOR_TYPES:
            raise self._error(f"has the type {number}, which is no type of weights")
        kind, block, block_bytes = TENSOR_TYPES[number]
        if shape[0] % block:
            raise self._error(f"has rows of {shape[0]} values; {kind} packs {block} together")
        n_bytes = shape[0] // block * block_bytes
        for length in shape[1:]:
            n_bytes *= length
        if n_bytes > self._size:
            raise self._error(f"of shape {list(shape)} and type {kind} has {n_bytes} bytes; the file has {self._size}")
        if offset != expected_offset:
            raise self._error(f"has the offset {offset}; expected {expected_offset}, right after the tensor before")
        return Tensor(name, shape, kind, offset, n_bytes)

    def _alignment(self, fields: dict[str, Field]) -> int:
        self._field = "general.alignment"
        field = fields.get(self._field, Field(UINT32, MIN_ALIGNMENT))
        if field.kind != UINT32:
            raise self._error(f"is of type {field.kind_name}; expected uint32")
        value: int = field.value
        if not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._error(f"is {value}; expected a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}")
        return value

    def _name(self, limit: int) -> str:
        raw = self._bytes(limit)
        if not raw or not raw.isascii() or not raw.decode("ascii").isprintable():
            raise self._error(f"is named {raw[:40]!r}; expected printable ASCII")
        return raw.decode("ascii")

    def _bytes(self, limit: int) -> bytes:
        length = self._number("Q")
        if length > limit:
            raise self._error(f"has a text of {length} bytes; at most {limit} are allowed")
        self._need(length)
        self._at += length
        return self._data[self._at - length : self._at]

    def _number(self, code: str) -> Any:
        self._need(struct.calcsize(code))
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def _need(self, count: int) -> None:
        if self._at + count <= len(self._data):
            return
        if self._at + count > self._size:
            raise self._error(f"needs {count} bytes at byte {self._at}; the file ends at {self._size}")
        raise _TooShort

    def _error(self, problem: str) -> ModelFileError:
        return ModelFileError(self._path, self._field, problem)
