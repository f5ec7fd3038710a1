"""How a checkpoint wants its pictures: transformers' preprocessor configuration in llava-edge's terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_edge.convert.tower import unsupported
from llava_edge.convert.weights import read_json
from llava_edge.errors import InputError
from llava_edge.types import ImageSpec

_BICUBIC = 3
_DEFAULTS = {"do_resize": True, "do_rescale": True, "do_normalize": True}


def preprocessor_config(directory: Path) -> dict[str, Any]:
    """``preprocessor_config.json``, or its part of ``processor_config.json``, where newer releases write it."""
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return read_json(path)
    if (directory / "processor_config.json").is_file():
        nested = read_json(directory / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested
    raise InputError(
        f"{directory} has no preprocessor_config.json, which says how pictures are prepared",
        hint="Get the whole checkpoint, or write a llava_edge.json as training does.",
    )


def image_spec(
    config: dict[str, Any], tower_size: int, grid: tuple[tuple[int, int], ...], max_tiles: int = 0
) -> ImageSpec:
    """The preparation of pictures; ``grid`` makes it LLaVA-NeXT's, and with ``max_tiles`` LLaVA-OneVision's.

    InputError by the field that can't be followed.
    """
    for name, wanted in _DEFAULTS.items():
        if bool(config.get(name, wanted)) is not wanted:
            raise unsupported(f"preprocessor_config.json: {name}", config[name], wanted)
    if config.get("resample", _BICUBIC) != _BICUBIC:
        raise unsupported("preprocessor_config.json: resample", config["resample"], _BICUBIC)
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise unsupported("preprocessor_config.json: rescale_factor", config["rescale_factor"], 1 / 255)
    mean, std = (_three(config, name) for name in ("image_mean", "image_std"))
    red, green, blue = (int(value * 255) for value in mean)
    crops = bool(config.get("do_center_crop", False))
    edge = _edge(config, crops)
    if edge != tower_size:
        raise unsupported("preprocessor_config.json: size", config.get("size"), tower_size)
    if grid:
        return ImageSpec(tower_size, mean, std, "anyres", (0, 0, 0), grid, max_tiles)
    if config.get("do_pad"):
        return ImageSpec(tower_size, mean, std, "pad", (red, green, blue))
    return ImageSpec(tower_size, mean, std, "crop" if crops else "squash", (red, green, blue))


def _three(config: dict[str, Any], name: str) -> tuple[float, float, float]:
    values = config.get(name)
    if not isinstance(values, list) or len(values) != 3:
        raise unsupported(f"preprocessor_config.json: {name}", values, "three numbers")
    first, second, third = map(float, values)
    return first, second, third


def _edge(config: dict[str, Any], crops: bool) -> int | None:
    """The side of the square that comes out."""
    value = config.get("crop_size" if crops else "size")
    if isinstance(value, int):
        return value
    if not isinstance(value, dict):
        return None
    height, width = value.get("height"), value.get("width")
    if height is None and width is None:
        edge: int | None = value.get("shortest_edge")
        return edge if crops or config.get("do_pad") else None
    return height if height == width else None
