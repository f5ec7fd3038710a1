"""LLaVA-NeXT's way of looking closer: a squashed picture of the whole, and tiles of the picture at more pixels.

LLaVA-OneVision does the same and limits what the tiles add.

Shapes: T tokens, D width; R x C cells of one tile's grid; images are given as (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_edge.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llava_edge.types import ImageSpec

NEWLINE = "v.image_newline"
_TOLERANCE = 1.1


@dataclass(frozen=True)
class Layout:
    """How a picture of ``size`` was cut: ``rows`` x ``columns`` tiles, the picture centred on black.

    ``max_tiles`` is that of the ``ImageSpec``.
    """

    rows: int
    columns: int
    size: tuple[int, int]
    max_tiles: int = 0


def best_fit(size: tuple[int, int], grid: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The resolution that keeps most of the picture's pixels; of equals the one that wastes least, then the first."""

    def rank(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[0] / size[0], target[1] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - target[0] * target[1]

    return max(grid, key=rank)


def split(image: Image.Image, spec: ImageSpec) -> tuple[list[Image.Image], Layout]:
    """The squashed whole and then the tiles row by row, all of ``spec.size``."""
    side = spec.size
    width, height = best_fit(image.size, spec.grid)
    canvas = Image.new("RGB", (width, height))
    fitted = image.resize(_fitted(image.size, (width, height)), Image.Resampling.BICUBIC)
    canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
    tiles = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    whole = image.resize((side, side), Image.Resampling.BICUBIC)
    return [whole, *tiles], Layout(height // side, width // side, image.size, spec.max_tiles)


def most_tokens(spec: ImageSpec, cells: tuple[int, int]) -> int:
    """Tokens of the largest picture that fills its tiles, with ``cells`` = R x C of each."""
    most = 0
    for width, height in spec.grid:
        rows, columns = height // spec.size * cells[0], width // spec.size * cells[1]
        if spec.max_tiles:
            rows, columns = _shrunk_size(rows, columns, spec.max_tiles * cells[0] * cells[1])
        most = max(most, rows * (columns + 1))  # newline too
    return cells[0] * cells[1] + most


def most_parts(spec: ImageSpec) -> float:
    """How many times the parts of a picture of ``spec.size`` the picture of most tiles has."""

    def parts(resolution: tuple[int, int]) -> int:
        return 1 + resolution[0] * resolution[1] // spec.size**2

    return max(map(parts, spec.grid)) / parts(best_fit((spec.size, spec.size), spec.grid))


def assemble(
    parts: Sequence[NDArray[np.float32]], cells: tuple[int, int], layout: Layout, newline: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Embeddings of the whole and of every tile, each ``[R * C, D]``, into one picture's ``[T, D]``.

    The tiles are put together, rows and columns that show only padding are cut off (``spatial_unpad``), what is then
    more than ``layout.max_tiles`` allows is scaled down, and ``newline`` ``[D]`` ends each row.
    """
    rows, columns = layout.rows * cells[0], layout.columns * cells[1]
    tiles = np.stack(parts[1:]).reshape(layout.rows, layout.columns, *cells, -1)
    field = tiles.transpose(0, 2, 1, 3, 4).reshape(rows, columns, -1)
    field = _unpadded(field, layout.size)
    if layout.max_tiles:
        field = _shrunk(field, layout.max_tiles * cells[0] * cells[1])
    ends = np.broadcast_to(newline, (len(field), 1, field.shape[2]))
    lines = np.concatenate([field, ends], axis=1, dtype=np.float32)
    return np.concatenate([parts[0], lines.reshape(-1, field.shape[2])])


def read_newline(mmproj: Path, width: int) -> NDArray[np.float32]:
    """The learnt row end ``[D]``, ``width`` numbers, which a bundle keeps in its mmproj file."""
    import gguf

    try:
        reader: Any = gguf.GGUFReader(mmproj)
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"can't read {mmproj}: {error}", hint="Get the bundle again.") from None
    for tensor in reader.tensors:
        if tensor.name == NEWLINE:
            newline = np.array(tensor.data, dtype=np.float32).reshape(-1)
            if len(newline) != width:
                raise ModelError(f"{mmproj}: {NEWLINE} has {len(newline)} numbers; the language model reads {width}")
            return newline
    raise ModelError(f"{mmproj} has no tensor {NEWLINE}, which ends the rows of a picture", hint="Convert again.")


def _fitted(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size with its aspect kept that fills the target in one direction; fractions of pixels are rounded up."""
    across, down = target[0] / size[0], target[1] / size[1]
    if across < down:
        return target[0], min(math.ceil(size[1] * across), target[1])
    return min(math.ceil(size[0] * down), target[0]), target[1]


def _unpadded(field: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    width, height = size
    rows, columns = field.shape[:2]
    # The rounding to seven digits is that of transformers: 0.1 short of a whole number is not a row less.
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return field[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return field[:, cut : columns - cut]


def _shrunk(field: NDArray[np.float32], room: int) -> NDArray[np.float32]:
    """The field ``[R, C, D]`` with about ``room`` cells."""
    rows, columns = _shrunk_size(field.shape[0], field.shape[1], room)
    if (rows, columns) == field.shape[:2]:
        return field
    return _resampled(_resampled(field, rows, 0), columns, 1)


def _shrunk_size(rows: int, columns: int, room: int) -> tuple[int, int]:
    """Rows and columns with about ``room`` cells, as transformers counts them; a tenth too many a side stay."""
    ratio = math.sqrt(rows * columns / room)
    if ratio <= _TOLERANCE:
        return rows, columns
    return max(1, int(rows // ratio)), max(1, int(columns // ratio))


def _resampled(field: NDArray[np.float32], count: int, axis: int) -> NDArray[np.float32]:
    """Bilinear interpolation along one axis: cells are squares, and their values stand in the middle."""
    length = field.shape[axis]
    places = np.maximum((np.arange(count) + 0.5) * (length / count) - 0.5, 0)
    low = places.astype(np.int64)
    share = (places - low).astype(np.float32)
    share = share[:, None, None] if axis == 0 else share[None, :, None]
    high = np.minimum(low + 1, length - 1)
    result: NDArray[np.float32] = field.take(low, axis) * (1 - share) + field.take(high, axis) * share
    return result
