"""Whether a picture is a page: text, a table, a screenshot. Pooling its tokens would blur what is written there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Chosen on rendered pages against photographs, see docs/performance.md for how often they are right.
_COLOURFUL, _MOST_COLOURFUL = 40, 0.2
_FEW_COLOURS, _LEAST_IN_FEW = 4, 0.4
_STROKE, _LEAST_STROKES = 24, 0.012


def is_written(picture: Image.Image) -> bool:
    """Whether an RGB picture, at the size that the tower reads, looks like writing on a plain ground.

    A page has little colour, most of it is of a few shades, and along its rows dark and light change from one pixel to
    the next, where a photograph has edges that are further apart.
    """
    pixels = np.asarray(picture.convert("RGB"))
    colourful = np.ptp(pixels, axis=2) > _COLOURFUL
    if colourful.mean() >= _MOST_COLOURFUL:
        return False
    shades = (pixels >> 4).astype(np.intp) @ np.array([256, 16, 1])
    if np.sort(np.bincount(shades.ravel()))[-_FEW_COLOURS:].sum() <= _LEAST_IN_FEW * shades.size:
        return False
    steps = np.diff(np.asarray(picture.convert("L"), dtype=np.int16), axis=1)
    turns = np.sign(steps) * (np.abs(steps) > _STROKE)
    strokes = turns[:, :-1] * turns[:, 1:] < 0
    return bool(strokes.sum() > _LEAST_STROKES * strokes.size)
