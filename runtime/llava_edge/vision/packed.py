"""An encoded picture as bytes, and back: what the cache on disk keeps.

Shapes: T tokens of a chunk, D width of the language model's embeddings.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_edge.vision import EncodedImage, ImageChunk

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LENGTH = struct.Struct("<I")


def pack(image: EncodedImage) -> list[bytes | memoryview]:
    """The chunks, without the picture's key: a table in JSON, then the arrays in its order."""
    table = [
        {
            "n_tokens": chunk.n_tokens,
            "n_pos": chunk.n_pos,
            "tokens": list(chunk.tokens),
            "causal": chunk.causal,
            "embeddings": None if chunk.embeddings is None else list(chunk.embeddings.shape),
            "positions": chunk.positions is not None,
        }
        for chunk in image.chunks
    ]
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 4)
    arrays: list[NDArray[Any]] = []
    for chunk in image.chunks:
        arrays += [array for array in (chunk.embeddings, chunk.positions) if array is not None]
    return [_LENGTH.pack(len(text)), text, *(np.ascontiguousarray(array).data.cast("B") for array in arrays)]


def unpack(key: str, data: memoryview, width: int) -> EncodedImage:
    """The picture; ValueError, KeyError or TypeError if the bytes are not one of embeddings of this width."""
    (length,) = _LENGTH.unpack(data[: _LENGTH.size])
    start = _LENGTH.size + length
    chunks = []
    for row in json.loads(bytes(data[_LENGTH.size : start])):
        count = int(row["n_tokens"])
        embeddings = positions = None
        if row["embeddings"] is not None:
            if row["embeddings"] != [count, width] or count < 1:
                raise ValueError(f"embeddings of the shape {row['embeddings']}")
            embeddings, start = _array(data, start, np.float32, [count, width])
            if not np.isfinite(embeddings).all():
                raise ValueError("embeddings that are not numbers")
        if row["positions"]:
            positions, start = _array(data, start, np.int32, [4, count])
        tokens = tuple(int(token) for token in row["tokens"])
        if len(tokens) != (count if embeddings is None else 0):
            raise ValueError(f"{len(tokens)} tokens of {count}")
        chunks.append(ImageChunk(count, int(row["n_pos"]), tokens, embeddings, positions, bool(row["causal"])))
    if start != len(data) or not chunks:
        raise ValueError(f"{len(data)} bytes for {len(chunks)} chunks that have {start}")
    return EncodedImage(key, tuple(chunks))


def digest(image: EncodedImage) -> str:
    """SHA-256 over everything that the language model reads of a picture."""
    found = hashlib.sha256()
    for piece in pack(image):
        found.update(piece)
    return found.hexdigest()


def _array(data: memoryview, start: int, kind: Any, shape: Sequence[int]) -> tuple[NDArray[Any], int]:
    count = int(np.prod(shape))
    return np.frombuffer(data, kind, count, start).reshape(shape), start + 4 * count
