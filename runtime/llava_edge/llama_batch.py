"""llama.cpp's batches over NumPy memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INT32 = ctypes.POINTER(ctypes.c_int32)


class Batches:
    """Makes batches of up to ``size`` rows. A batch is valid until the next one is made."""

    def __init__(self, library: Any, size: int, n_seq_max: int, every_output: bool = False) -> None:
        self._library = library
        self._every_output = every_output
        self._counts = np.ones(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        self._ids = (ctypes.c_int32 * n_seq_max)(*range(n_seq_max))
        self._pointers = [
            ctypes.cast(ctypes.byref(self._ids, seq * ctypes.sizeof(ctypes.c_int32)), _INT32)
            for seq in range(n_seq_max)
        ]
        self._alone = [(_INT32 * size)(*[pointer] * size) for pointer in self._pointers]
        self._held: tuple[Any, ...] = ()

    def tokens(self, ids: NDArray[np.int32], start: int, seq: int, logits: bool) -> Any:
        """Tokens of one sequence from a position on, with logits of the last one if they are wanted."""
        places = np.arange(start, start + len(ids), dtype=np.int32)
        batch = self._batch(len(ids), places, self._alone[seq], ids)
        self._outputs[len(ids) - 1] |= logits
        batch.token = ids.ctypes.data_as(_INT32)
        return batch

    def embeddings(self, rows: NDArray[np.float32], places: NDArray[np.int32], seq: int, logits: bool) -> Any:
        """Embeddings ``[T, D]`` of one sequence at positions ``[1, T]``, or ``[4, T]`` for M-RoPE."""
        batch = self._batch(len(rows), places, self._alone[seq], rows)
        self._outputs[len(rows) - 1] |= logits
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return batch

    def side_by_side(
        self, ids: NDArray[np.int32], starts: Sequence[int], sequences: Sequence[int], outputs: Sequence[int]
    ) -> Any:
        """The same number of tokens ``[S, T]`` for each of several sequences, with logits of these rows."""
        length = ids.shape[1]
        places = np.add.outer(np.array(starts, np.int32), np.arange(length, dtype=np.int32)).ravel()
        pointers = (_INT32 * ids.size)(*[self._pointers[seq] for seq in sequences for _ in range(length)])
        batch = self._batch(ids.size, places, pointers, ids)
        self._outputs[list(outputs)] = 1
        batch.token = ids.ctypes.data_as(_INT32)
        return batch

    def _batch(self, count: int, places: NDArray[np.int32], sequences: Any, data: NDArray[Any]) -> Any:
        positions = np.ascontiguousarray(places)
        self._outputs[:count] = self._every_output
        self._held = (positions, sequences, data)
        batch = self._library.llama_batch()
        batch.n_tokens = count
        batch.pos = positions.ctypes.data_as(_INT32)
        batch.n_seq_id = self._counts.ctypes.data_as(_INT32)
        batch.seq_id = sequences
        batch.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        return batch
