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
    """Makes batches of up to ``size`` rows. A batch is valid until the next one is made.

    They are one batch over memory that stays, since a small model's token takes five milliseconds, and making ctypes
    pointers for it would take a tenth of one.
    """

    def __init__(self, library: Any, size: int, n_seq_max: int, every_output: bool = False) -> None:
        self._every_output = every_output
        self._ids = np.zeros(size, np.int32)
        self._places = np.zeros(4 * size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        self._numbers = (ctypes.c_int32 * n_seq_max)(*range(n_seq_max))
        self._pointers = [
            ctypes.cast(ctypes.byref(self._numbers, seq * ctypes.sizeof(ctypes.c_int32)), _INT32)
            for seq in range(n_seq_max)
        ]
        self._alone = [(_INT32 * size)(*[pointer] * size) for pointer in self._pointers]
        self._held: tuple[Any, ...] = ()
        self._batch = library.llama_batch()
        self._batch.pos = self._places.ctypes.data_as(_INT32)
        self._batch.n_seq_id = self._counts.ctypes.data_as(_INT32)
        self._batch.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._token_pointer = self._ids.ctypes.data_as(_INT32)

    def tokens(self, ids: Sequence[int], start: int, seq: int, logits: bool) -> Any:
        """Tokens of one sequence from a position on, with logits of the last one if they are wanted."""
        count = len(ids)
        self._ids[:count] = ids
        self._places[:count] = range(start, start + count)
        return self._filled(count, self._alone[seq], [count - 1] if logits else [])

    def embeddings(self, rows: NDArray[np.float32], places: NDArray[np.int32], seq: int, logits: bool) -> Any:
        """Embeddings ``[T, D]`` of one sequence at positions ``[1, T]``, or ``[4, T]`` for M-RoPE."""
        self._places[: places.size] = places.ravel()
        return self._filled(len(rows), self._alone[seq], [len(rows) - 1] if logits else [], rows)

    def side_by_side(
        self, ids: NDArray[np.int32], starts: Sequence[int], sequences: Sequence[int], outputs: Sequence[int]
    ) -> Any:
        """The same number of tokens ``[S, T]`` for each of several sequences, with logits of these rows."""
        length = ids.shape[1]
        self._places[: ids.size] = np.add.outer(np.array(starts, np.int32), np.arange(length, dtype=np.int32)).ravel()
        self._ids[: ids.size] = ids.ravel()
        pointers = (_INT32 * ids.size)(*[self._pointers[seq] for seq in sequences for _ in range(length)])
        return self._filled(ids.size, pointers, outputs)

    def _filled(
        self, count: int, sequences: Any, outputs: Sequence[int], rows: NDArray[np.float32] | None = None
    ) -> Any:
        self._outputs[:count] = self._every_output
        for row in outputs:
            self._outputs[row] = 1
        self._held = (sequences, rows)
        batch = self._batch
        batch.n_tokens = count
        batch.seq_id = sequences
        batch.token = self._token_pointer if rows is None else None
        batch.embd = None if rows is None else rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return batch
