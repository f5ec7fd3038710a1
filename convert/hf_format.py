"""Checkpoints in the format of transformers: ``llava``, ``llava_next`` and ``llava_onevision`` with one picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bundle import VisualTokens
from llava_edge.convert.checkpoint import (
    LLM_TYPES,
    Checkpoint,
    Description,
    Options,
    build_config,
    check,
    description_requirements,
    from_end,
    read_description,
    text_requirements,
)
from llava_edge.convert.pictures import image_spec, preprocessor_config
from llava_edge.convert.projector import Projector, joined_projector
from llava_edge.convert.prompts import find_prompt
from llava_edge.convert.tower import MODEL_TYPES, Tower, tower_from_config, unsupported
from llava_edge.convert.weights import Stored, Weights, read_directory

if TYPE_CHECKING:
    from transformers import LlavaConfig

FAMILIES = {"llava": "llava", "llava_next": "llava-next", "llava_onevision": "llava-onevision"}
_MAX_TILES = re.compile(r"anyres_max_([1-9]\d?)\Z")


def open_hf(
    directory: Path,
    raw: dict[str, Any],
    options: Options,
    *,
    read: Callable[[], dict[str, Stored]] | None = None,
    name: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of transformers. See :func:`llava_edge.convert.checkpoint.open_checkpoint`.

    ``read`` gives the tensors if they are not simply those of the directory, and ``name`` the model's name.
    """
    read = read or (lambda: read_directory(directory))
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise unsupported("model_type", kind, *FAMILIES)
    config = _config(directory, raw)
    tower = tower_from_config(config.vision_config, class_token=getattr(config, "vision_class_token", None))
    layers = from_end(config.vision_feature_layer, tower.blocks, "vision_feature_layer")
    check(_requirements(config, tower))
    if "image_seq_length" in raw:  # its default is right for one size only
        check(iter([("image_seq_length", raw["image_seq_length"], tower.patches)]))
    description = read_description(directory)
    notes: tuple[str, ...] = ()
    if description is None:
        description, notes = _describe(directory, name or directory.resolve().name, config, tower, options)
    check(description_requirements(description, tower))
    text = config.text_config
    one_matrix = config.projector_hidden_act == "linear"
    return Checkpoint(
        directory=directory,
        tokenizer_directory=directory,
        text_config=text,
        tower=tower,
        projector=Projector(1 if one_matrix else 2, len(layers) * tower.width, text.hidden_size),
        feature_layers=layers,
        tied=bool(config.tie_word_embeddings or text.tie_word_embeddings),
        image_newline=kind != "llava",
        description=description,
        open_weights=lambda: Weights(joined_projector(read()) if one_matrix else read()),
        notes=notes,
    )


def _config(directory: Path, raw: dict[str, Any]) -> LlavaConfig:
    from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

    if raw.get("quantization_config"):
        raise unsupported("quantization_config", raw["quantization_config"], None)
    # Fields that a file leaves out are CLIP's and LLaMA's, as transformers fills them in.
    for part, types in (("text_config", LLM_TYPES), ("vision_config", tuple(MODEL_TYPES))):
        found = raw.get(part)
        named = found.get("model_type") if isinstance(found, dict) else None
        if named is not None and named not in types:
            raise unsupported(f"{part}.model_type", named, *types)
    kinds = {"llava": LlavaConfig, "llava_next": LlavaNextConfig, "llava_onevision": LlavaOnevisionConfig}
    config: LlavaConfig = build_config(kinds[raw["model_type"]], raw, directory / "config.json")
    return config


def _requirements(config: LlavaConfig, tower: Tower) -> Iterator[tuple[str, object, object]]:
    """Fields of ``config.json``, their values, and the only values with which the files come out right."""
    has_token = tower.family != "siglip"
    yield "vision_feature_select_strategy", config.vision_feature_select_strategy, "default" if has_token else "full"
    if config.projector_hidden_act not in ("gelu", "linear"):
        raise unsupported("projector_hidden_act", config.projector_hidden_act, "gelu", "linear")
    yield from text_requirements(config.text_config, "text_config.")


def _describe(
    directory: Path, name: str, config: LlavaConfig, tower: Tower, options: Options
) -> tuple[Description, tuple[str, ...]]:
    """The description of a checkpoint that llava-edge didn't train, from its own files."""
    grid: tuple[tuple[int, int], ...] = ()
    pictures = preprocessor_config(directory)
    if config.model_type != "llava":
        grid = _grid(config, pictures)
    prompt, note = find_prompt(directory, options.prompt)
    notes: tuple[str, ...] = (note,)
    if config.model_type == "llava_onevision":
        notes += ("pictures: one a conversation is read as in the reference, which shows several without tiles",)
    description = Description(
        name=name,
        family=FAMILIES[config.model_type],
        license="as the checkpoint's",
        source=name,
        image=image_spec(pictures, tower.image_size, grid, _max_tiles(config)),
        visual_tokens=VisualTokens(tower.patches, (tower.side, tower.side), (tower.patches,), tower.patches),
        prompt=prompt,
    )
    return description, notes


def _grid(config: Any, pictures: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """Widths and heights of the resolutions, on which model and preprocessing have to agree."""
    pinpoints = config.image_grid_pinpoints
    if (other := pictures.get("image_grid_pinpoints")) is not None and other != pinpoints:
        raise unsupported("preprocessor_config.json: image_grid_pinpoints", other, pinpoints)
    return tuple((width, height) for height, width in pinpoints)


def _max_tiles(config: Any) -> int:
    """How many tiles' tokens LLaVA-OneVision takes of a picture besides the squashed whole; 0 for the others."""
    if config.model_type != "llava_onevision":
        return 0
    if found := _MAX_TILES.match(str(config.vision_aspect_ratio)):
        return int(found[1])
    raise unsupported("vision_aspect_ratio", config.vision_aspect_ratio, "anyres_max_9", "anyres_max_ and a number")
