"""Rounding that makes up for itself: what a weight loses is put on the weights that are rounded after it.

llama.cpp rounds each weight to the nearest level. Where inputs go together, another choice of levels errs less in what
the matrix computes: column by column, the error so far is carried to the columns not yet rounded, as their inputs'
correlations say (GPTQ, Frantar et al., arXiv 2210.17323). Scales stay those that llama.cpp chose, so the file has the
same types and size, and columns may be taken in any order: those with the largest inputs come first.

Shapes: R rows and K columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DAMPING = 0.01
"""What is added to each input's mean square, as a share of the mean of all: of rare inputs few samples say little."""
_COLUMNS = 64  # columns whose errors are carried on together


@dataclass
class Grid:
    """Levels that a quantised matrix may take: ``scale * table[level] - offset``; all but ``table`` are ``[R, K]``."""

    table: NDArray[np.float32]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]
    levels: NDArray[np.uint8]

    def values(self) -> NDArray[np.float32]:
        """The matrix that the levels say."""
        return self.scale * self.table[self.levels] - self.offset


def _nibbles(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of four bits ``[N, 2 n]`` as bytes ``[N, n]``: the first half of a row below the second."""
    low, high = np.split(levels & np.uint8(15), 2, axis=-1)
    packed: NDArray[np.uint8] = low | (high << np.uint8(4))
    return packed


def _from_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _scales(blocks: NDArray[np.uint8], first: int = 0) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)


class _Small:
    """Q4_0, Q5_0 and IQ4_NL: blocks of 32 with one scale."""

    def __init__(self, table: Any, *, fifth_bit: bool = False) -> None:
        self.table = np.array(table, dtype=np.float32)
        self.fifth_bit = fifth_bit

    def read(self, data: NDArray[np.uint8]) -> Grid:
        rows = len(data)
        blocks = data.reshape(-1, 22 if self.fifth_bit else 18)
        levels = _from_nibbles(blocks[:, -16:])
        if self.fifth_bit:
            levels |= np.unpackbits(blocks[:, 2:6], axis=-1, bitorder="little") << 4
        scale = np.repeat(_scales(blocks), 32, axis=-1).reshape(rows, -1)
        return Grid(self.table, scale, np.zeros_like(scale), levels.reshape(rows, -1))

    def write(self, data: NDArray[np.uint8], levels: NDArray[np.uint8]) -> None:
        blocks = data.reshape(-1, 22 if self.fifth_bit else 18).copy()
        levels = levels.reshape(-1, 32)
        blocks[:, -16:] = _nibbles(levels)
        if self.fifth_bit:
            blocks[:, 2:6] = np.packbits(levels >> 4, axis=-1, bitorder="little")
        data[:] = blocks.reshape(data.shape)


class _Q4K:
    """Q4_K: blocks of 256 in eight parts, each with a scale and an offset."""

    table = np.arange(16, dtype=np.float32)

    def read(self, data: NDArray[np.uint8]) -> Grid:
        rows = len(data)
        blocks = data.reshape(-1, 144)
        parts, offsets = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        scale = np.repeat(_scales(blocks) * parts.astype(np.float32), 32, axis=-1)
        offset = np.repeat(_scales(blocks, 2) * offsets.astype(np.float32), 32, axis=-1)
        levels = _from_nibbles(blocks[:, 16:].reshape(-1, 32))  # [4 N, 64]
        return Grid(self.table, scale.reshape(rows, -1), offset.reshape(rows, -1), levels.reshape(rows, -1))

    def write(self, data: NDArray[np.uint8], levels: NDArray[np.uint8]) -> None:
        blocks = data.reshape(-1, 144).copy()
        blocks[:, 16:] = _nibbles(levels.reshape(-1, 64)).reshape(len(blocks), 128)
        data[:] = blocks.reshape(data.shape)


_TYPES: dict[str, _Small | _Q4K] = {
    "Q4_0": _Small(range(-8, 8)),
    "Q5_0": _Small(range(-16, 16), fifth_bit=True),
    "IQ4_NL": _Small(gguf.quants.IQ4_NL.kvalues),
    "Q4_K": _Q4K(),
}


def round_again(
    source: Path,
    target: Path,
    correlations: Mapping[str, NDArray[np.float32]],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Choose the levels of ``target`` anew, a quantised file of ``source``, whose tensors are floats.

    Matrices of other types than Q4_0, Q5_0, IQ4_NL and Q4_K, and those without correlations ``[K, K]``, stay.

    Returns
    -------
    tuple of float
        What rounding changes in the matrices' outputs, relative to these, before and after: the root of the mean
        square, over all matrices that were rounded again.
    """
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    made = [t for t in gguf.GGUFReader(target, "r+").tensors if t.tensor_type.name in _TYPES and t.name in correlations]
    alike: dict[int, list[Any]] = {}  # those that read the same inputs
    for tensor in made:
        alike.setdefault(id(correlations[tensor.name]), []).append(tensor)
    before = after = 0.0
    done = 0
    for group in alike.values():
        together = correlations[group[0].name]
        order, carry = _factor(together)
        for tensor in group:
            kind, origin = _TYPES[tensor.tensor_type.name], exact[tensor.name]
            matrix = gguf.quants.dequantize(origin.data, origin.tensor_type).astype(np.float32)
            grid = kind.read(tensor.data)
            nearest = _error(matrix - grid.values(), together)
            grid.levels = _levels(matrix, grid, order, carry)
            carried = _error(matrix - grid.values(), together)
            if carried < nearest:
                kind.write(tensor.data, grid.levels)
            whole = _error(matrix, together)
            before, after = before + nearest / whole, after + min(nearest, carried) / whole
            done += 1
            if progress:
                progress(done, len(made))
    if made:
        made[0].data.flush()
    count = max(1, len(made))
    return (before / count) ** 0.5, (after / count) ** 0.5


def _error(difference: NDArray[np.float32], together: NDArray[np.float32]) -> float:
    """The sum of squares of what a matrix's change does to its outputs."""
    return max(float(np.vdot(difference @ together, difference)), 1e-30)


def _factor(together: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The order of the columns, and how errors are carried: the inverse's upper Cholesky factor in that order."""
    hessian = together.astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += DAMPING * float(np.mean(np.diag(hessian))) + 1e-12
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    return order, np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)


def _levels(
    matrix: NDArray[np.float32], grid: Grid, order: NDArray[np.intp], carry: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """The levels of each column, rounded in ``order`` with the errors of those before it."""
    left = np.ascontiguousarray(matrix[:, order].T)  # [K, R]
    scale, offset = (np.ascontiguousarray(part[:, order].T) for part in (grid.scale, grid.offset))
    levels = np.ascontiguousarray(grid.levels[:, order].T)
    edges = (grid.table[1:] + grid.table[:-1]) / 2
    columns = len(left)
    for first in range(0, columns, _COLUMNS):
        last = min(columns, first + _COLUMNS)
        errors = np.empty((last - first, left.shape[1]), dtype=np.float32)
        for column in range(first, last):
            steps = scale[column]
            used = steps != 0
            wanted = (left[column] + offset[column])[used] / steps[used]
            levels[column, used] = np.searchsorted(edges, wanted)
            rounded = steps * grid.table[levels[column]] - offset[column]
            error = (left[column] - rounded) / carry[column, column]
            errors[column - first] = error
            left[column + 1 : last] -= np.outer(carry[column, column + 1 : last], error)
        left[last:] -= carry[first:last, last:].T @ errors
    back = np.empty_like(levels)
    back[order] = levels
    return np.ascontiguousarray(back.T)
