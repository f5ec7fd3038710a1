"""Tiles and their assembly are those of transformers' LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaOnevisionConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

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


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_onevision(size: tuple[int, int]) -> None:
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[height, width] for width, height in GRID],
        image_mean=SPEC.mean,
        image_std=SPEC.std,
    )
    picture = noise(size)
    expected: Any = processor(picture, return_tensors="np")["pixel_values"][0]
    tiles, _ = anyres.split(picture, SPEC)
    np.testing.assert_allclose(np.stack([normalize(tile, SPEC) for tile in tiles]), expected, atol=1e-5)


@pytest.mark.parametrize("max_tiles", [1, 2, 3, 9])
@pytest.mark.parametrize("size", SIZES)
def test_too_many_tokens_are_scaled_down_as_in_onevision(size: tuple[int, int], max_tiles: int) -> None:
    _, layout = anyres.split(noise(size), replace(SPEC, max_tiles=max_tiles))
    random = np.random.default_rng(1)
    parts = random.standard_normal((1 + layout.rows * layout.columns, CELLS * CELLS, 6)).astype(np.float32)
    newline = random.standard_normal(6).astype(np.float32)
    config = LlavaOnevisionConfig(image_grid_pinpoints=[[height, width] for width, height in GRID])
    config.vision_config.image_size, config.vision_config.patch_size = SIDE, SIDE // CELLS
    (expected,), _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.from_numpy(parts)],
        [(size[1], size[0])],
        image_newline=torch.from_numpy(newline),
        vision_aspect_ratio=f"anyres_max_{max_tiles}",
    )
    found = anyres.assemble(list(parts), (CELLS, CELLS), layout, newline)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_tokens_are_scaled_down_only_where_there_are_too_many() -> None:
    def rows(max_tiles: int) -> int:
        _, layout = anyres.split(noise((112, 112)), replace(SPEC, max_tiles=max_tiles))
        return len(
            anyres.assemble([np.zeros((16, 1), np.float32)] * 5, (CELLS, CELLS), layout, np.zeros(1, np.float32))
        )

    whole, all_four, two = CELLS**2, 8 * (8 + 1), 5 * (5 + 1)
    assert (rows(0), rows(4), rows(2)) == (whole + all_four, whole + all_four, whole + two)


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
    with pytest.raises(InputError, match=r"image.max_tiles is 9; expected 1 or more with mode anyres"):
        ImageSpec(size=28, mean=(0, 0, 0), std=(1, 1, 1), mode="pad", max_tiles=9)
    with pytest.raises(InputError, match="the others none"):
        ImageSpec(size=28, mean=(0, 0, 0), std=(1, 1, 1), mode="pad", grid=GRID)
