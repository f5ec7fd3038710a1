"""Fewer visual tokens: what happens to a picture's embeddings after the projector.

Shapes: R x C the grid of patches, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llava_edge.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pooled_counts(grid: tuple[int, int]) -> list[int]:
    """The counts that grid pooling can give, from all patches down to one cell a side."""
    rows, columns = grid
    cells = [cell for cell in range(1, min(grid) + 1) if rows % cell == 0 and columns % cell == 0]
    return [(rows // cell) * (columns // cell) for cell in cells]


def pooled_grid(grid: tuple[int, int], n_tokens: int) -> tuple[int, int]:
    """Rows and columns that are left of the grid, for one of :func:`pooled_counts`."""
    cell = round((grid[0] * grid[1] / n_tokens) ** 0.5)
    return grid[0] // cell, grid[1] // cell


def pool(embeddings: NDArray[np.float32], grid: tuple[int, int], n_tokens: int) -> NDArray[np.float32]:
    """Average square cells of the grid: ``[R * C, D]`` to ``[n_tokens, D]``, row by row (arXiv 2405.17430).

    Raises
    ------
    InputError
        The count is none of :func:`pooled_counts`, or the embeddings are not those of the grid.
    """
    rows, columns = grid
    if embeddings.ndim != 2 or len(embeddings) != rows * columns:
        raise InputError(f"embeddings have the shape {list(embeddings.shape)}; expected [{rows} x {columns}, width]")
    counts = pooled_counts(grid)
    if n_tokens not in counts:
        raise InputError(
            f"{n_tokens} tokens can't be pooled from a grid of {rows} x {columns}",
            hint=f"Possible are {', '.join(map(str, counts))}.",
        )
    if n_tokens == rows * columns:
        return embeddings
    left = pooled_grid(grid, n_tokens)
    cell = rows // left[0]
    cells = embeddings.reshape(left[0], cell, left[1], cell, -1)  # [R/c, c, C/c, c, D]
    pooled: NDArray[np.float32] = cells.mean(axis=(1, 3), dtype=np.float32).reshape(n_tokens, -1)
    return pooled
