"""Tiles and their assembly are those of transformers' LLaVA-NeXT."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava_edge.errors import InputError
from llava_edge.images import normalize
from llava_edge.types import ImageSpec
from llava_edge.vision import anyres

SIDE, CELLS = 28, 4
GRID = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))  # width, height
SPEC = ImageSpec(size=SIDE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), mode="anyres", grid=GRID)
# portrait, landscape, square, tiny, panorama, a tall strip, exactly a grid's size, and odd numbers
SIZES = ((40, 70), (90, 61), (64, 64), (9, 7), (200, 31), (20, 300), (56, 28), (333, 77), (47, 48))


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_reference(size: tuple[int, int]) -> None:
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[height, width] for width, height in GRID],
        image_mean=SPEC.mean,
        image_std=SPEC.std,
    )
    picture = noise(size)
    expected: Any = processor(picture, return_tensors="np")["pixel_values"][0]
    tiles, layout = anyres.split(picture, SPEC)
    assert layout.rows * layout.columns == len(expected) - 1
    np.testing.assert_allclose(np.stack([normalize(tile, SPEC) for tile in tiles]), expected, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_put_together_as_in_the_reference(size: tuple[int, int]) -> None:
    _, layout = anyres.split(noise(size), SPEC)
    random = np.random.default_rng(0)
    parts = random.standard_normal((1 + layout.rows * layout.columns, CELLS * CELLS, 6)).astype(np.float32)
    newline = random.standard_normal(6).astype(np.float32)
    config = LlavaNextConfig(image_grid_pinpoints=[[height, width] for width, height in GRID])
    config.vision_config.image_size, config.vision_config.patch_size = SIDE, SIDE // CELLS
    (expected,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.from_numpy(parts)],
        [(size[1], size[0])],
        vision_feature_select_strategy="full",
        image_newline=torch.from_numpy(newline),
    )
    found = anyres.assemble(list(parts), (CELLS, CELLS), layout, newline)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())


def test_the_best_fit_shows_most_of_the_picture_and_wastes_least() -> None:
    assert anyres.best_fit((100, 100), GRID) == (56, 56)
    assert anyres.best_fit((200, 100), GRID) == (56, 28)
    assert anyres.best_fit((100, 200), GRID) == (28, 56)
    assert anyres.best_fit((300, 100), GRID) == (84, 28)
    assert anyres.best_fit((10, 10), GRID) == (28, 56), "of equals the first"


def test_a_grid_needs_its_mode_and_whole_tiles() -> None:
    with pytest.raises(InputError, match=r"image.grid has \[28, 50\]"):
        ImageSpec(size=28, mean=(0, 0, 0), std=(1, 1, 1), mode="anyres", grid=((28, 50),))
    with pytest.raises(InputError, match="at most 16,777,216 pixels in all"):
        ImageSpec(size=2048, mean=(0, 0, 0), std=(1, 1, 1), mode="anyres", grid=((2048, 2048), (8192, 4096)))
    with pytest.raises(InputError, match="has 129 entries; expected at most 128"):
        ImageSpec(size=28, mean=(0, 0, 0), std=(1, 1, 1), mode="anyres", grid=((28, 56),) * 129)
    with pytest.raises(InputError, match="mode anyres needs some"):
        ImageSpec(size=28, mean=(0, 0, 0), std=(1, 1, 1), mode="anyres")
    with pytest.raises(InputError, match="the others none"):
        ImageSpec(size=28, mean=(0, 0, 0), std=(1, 1, 1), mode="pad", grid=GRID)
