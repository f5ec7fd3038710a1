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


METHODS = ("pool", "grid", "random", "diversity")


def reduce(
    embeddings: NDArray[np.float32], grid: tuple[int, int], n_tokens: int, method: str = "pool"
) -> NDArray[np.float32]:
    """Fewer of a picture's embeddings ``[R * C, D]``, in their order, by one of :data:`METHODS`.

    ``pool`` is :func:`pool`, for which models are trained. The others keep some of the embeddings as they are:
    ``grid`` one of each cell, ``random`` any (the same ones every time), ``diversity`` those that are least like the
    ones that were taken before, by cosine.
    """
    if method not in METHODS:
        raise InputError(f"image_reduction is {method!r}; expected one of {', '.join(METHODS)}")
    pooled = pool(embeddings, grid, n_tokens)  # refuses wrong counts
    if method == "pool" or n_tokens == len(embeddings):
        return pooled
    if method == "grid":
        cells = pooled_grid(grid, n_tokens)
        rows, columns = ((np.arange(cells[i]) * 2 + 1) * grid[i] // (2 * cells[i]) for i in (0, 1))
        chosen = (rows[:, None] * grid[1] + columns).reshape(-1)
    elif method == "random":
        chosen = np.random.default_rng(n_tokens).permutation(len(embeddings))[:n_tokens]
    else:
        chosen = _most_different(embeddings, n_tokens)
    kept: NDArray[np.float32] = embeddings[np.sort(chosen)]
    return kept


def _most_different(embeddings: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Greedily the embedding whose nearest chosen one is farthest; the first is farthest from the mean."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)
    chosen = np.empty(count, np.intp)
    nearest = unit @ unit.mean(axis=0)
    for number in range(count):
        chosen[number] = last = int(nearest.argmin())
        likeness = unit @ unit[last]
        nearest = likeness if number == 0 else np.maximum(nearest, likeness)
        nearest[chosen[: number + 1]] = np.inf
    return chosen
