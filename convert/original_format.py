"""Checkpoints of the original LLaVA code: one ``config.json`` of the language model with fields ``mm_*`` in it.

The vision tower lies inside the checkpoint where it was trained, and otherwise in a directory of its own. Where both
are there the checkpoint's own tensors are used, and the directory only says what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bundle import VisualTokens
from llava_edge.convert.checkpoint import (
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
from llava_edge.convert.projector import Projector
from llava_edge.convert.prompts import find_prompt
from llava_edge.convert.tokenizer import load_tokenizer
from llava_edge.convert.tower import MODEL_TYPES, Tower, tower_from_config, unsupported
from llava_edge.convert.weights import Stored, Weights, read_directory, read_file, read_json, tensor_files
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from llava_edge.types import ImageSpec

_MARKS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_ARCHITECTURES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
_PROJECTOR = re.compile(r"mlp(\d+)x_gelu\Z")
_BLOCK = re.compile(r"vision_tower\.encoder\.layers?\.(\d+)\.")


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the original code."""
    return any(name in raw for name in _MARKS)


def open_original(
    directory: Path,
    raw: dict[str, Any],
    options: Options,
    *,
    read: Callable[[], dict[str, Stored]] | None = None,
    tokenizer_directory: Path | None = None,
) -> Checkpoint:
    """Read a checkpoint of the original code. See :func:`llava_edge.convert.checkpoint.open_checkpoint`.

    ``read`` gives the tensors if they are not simply those of the directory.
    """
    tokenizer_directory = tokenizer_directory or directory
    text = _text_config(raw, directory / "config.json")
    stored = (read or (lambda: read_directory(directory)))()
    own = any(name.startswith("vision_tower.") for name in stored)
    tower_directory = _tower_directory(directory, raw, options)
    tower = tower_from_config(_tower_config(tower_directory))
    layers = from_end(raw.get("mm_vision_select_layer", -2), tower.blocks, "mm_vision_select_layer")
    check(_requirements(raw, tower))
    if not own:
        stored |= _read_tower(tower_directory)
    tower = _shortened(tower, stored, max(layers))
    image = _image(raw, tower_directory, tower)
    description = read_description(directory)
    whose = "the checkpoint's own" if own else f"that of {tower_directory}"
    notes = [f"vision tower: {whose}"]
    if description is None:
        prompt, note = find_prompt(
            tokenizer_directory, options.prompt, otherwise=_usual_prompt(tokenizer_directory, text), split_calls=True
        )
        notes.append(note)
        name = directory.resolve().name
        full = VisualTokens(tower.patches, (tower.side, tower.side), (tower.patches,), tower.patches)
        family = "llava-next" if image.grid else "llava"
        description = Description(name, family, "as the checkpoint's", name, image, full, prompt)
    check(description_requirements(description, tower, "vision tower: "))
    if not image.grid:
        stored.pop("image_newline", None)  # learnt, but used for tiles only
    return Checkpoint(
        directory=directory,
        tokenizer_directory=tokenizer_directory,
        text_config=text,
        tower=tower,
        projector=Projector(_depth(raw), len(layers) * tower.width, text.hidden_size),
        feature_layers=layers,
        tied=bool(text.tie_word_embeddings),
        image_newline=bool(image.grid),
        description=description,
        open_weights=lambda: Weights(stored),
        split_calls=True,
        notes=tuple(notes),
    )


def _text_config(raw: dict[str, Any], path: Path) -> Any:
    import transformers

    named = [name for name in raw.get("architectures") or [] if name in _ARCHITECTURES]
    if not named:
        raise unsupported("architectures", raw.get("architectures"), *_ARCHITECTURES)
    kind = _ARCHITECTURES[named[0]]
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }
    fields = {name: value for name, value in raw.items() if not name.startswith("mm_") and value is not None}
    config = build_config(classes[kind], {**fields, "model_type": kind}, path)
    check(text_requirements(config))
    return config


def _requirements(raw: dict[str, Any], tower: Tower) -> Iterator[tuple[str, object, object]]:
    yield "quantization_config", raw.get("quantization_config"), None
    yield "mm_use_im_start_end", bool(raw.get("mm_use_im_start_end", False)), False
    yield "mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), "patch"
    yield "mm_hidden_size", raw.get("mm_hidden_size", tower.width), tower.width


def _depth(raw: dict[str, Any]) -> int:
    kind = raw.get("mm_projector_type", "linear")
    if kind == "linear":
        return 1
    if found := _PROJECTOR.match(str(kind)):
        return int(found[1])
    raise unsupported("mm_projector_type", kind, "linear", "mlp2x_gelu", "mlp3x_gelu and deeper")


def _tower_directory(directory: Path, raw: dict[str, Any], options: Options) -> Path:
    if options.vision_tower is not None:
        if not options.vision_tower.is_dir():
            raise InputError(f"no such vision tower: {options.vision_tower}")
        return options.vision_tower
    named = raw.get("mm_vision_tower")
    for path in (Path(str(named)), directory / str(named)) if named else ():
        if (path / "config.json").is_file():
            return path
    raise InputError(
        f"the checkpoint refers to a vision tower that is not here: mm_vision_tower is {named!r}",
        hint="Name its directory with --vision-tower: config.json, preprocessor_config.json and, unless the "
        "checkpoint carries its own tower, the weights.",
    )


def _tower_config(directory: Path) -> Any:
    """The configuration of the tower, which may be the half of one for pictures and texts."""
    import transformers

    raw = read_json(directory / "config.json")
    kind = raw.get("model_type")
    if kind in ("clip", "siglip"):
        raw, kind = raw.get("vision_config") or {}, f"{kind}_vision_model"
    if kind not in MODEL_TYPES:
        raise unsupported(f"{directory / 'config.json'}: model_type", kind, *MODEL_TYPES)
    classes = {
        "clip_vision_model": transformers.CLIPVisionConfig,
        "siglip_vision_model": transformers.SiglipVisionConfig,
        "dinov2": transformers.Dinov2Config,
    }
    return build_config(classes[kind], {**raw, "model_type": kind}, directory / "config.json")


def _read_tower(directory: Path) -> dict[str, Stored]:
    """A tower's tensors under their names here; those of a text model beside it are no part of it."""
    found: dict[str, Stored] = {}
    for path, _ in tensor_files(directory):
        for name, tensor in read_file(path).items():
            if name.startswith(("vision_model.", "embeddings.", "encoder.", "layernorm.")):
                found[f"vision_tower.{name.removeprefix('vision_model.')}"] = tensor
    return found


def _shortened(tower: Tower, stored: Mapping[str, Stored], deepest: int) -> Tower:
    """The tower without the blocks that the checkpoint leaves out because no feature needs them."""
    blocks = [int(found[1]) for name in stored if (found := _BLOCK.match(name))]
    count = max(blocks, default=-1) + 1
    if not deepest <= count < tower.blocks:
        return tower
    config = copy(tower.config)
    config.num_hidden_layers = count
    return replace(tower, blocks=count, config=config)


def _image(raw: dict[str, Any], tower_directory: Path, tower: Tower) -> ImageSpec:
    config, grid = dict(preprocessor_config(tower_directory)), raw.get("image_grid_pinpoints")
    mode = raw.get("image_aspect_ratio") or "square"
    if mode not in ("square", "pad", "anyres"):
        raise unsupported("image_aspect_ratio", mode, "square", "pad", "anyres")
    if mode != "anyres":
        return image_spec({**config, "do_pad": mode == "pad"}, tower.image_size, ())
    merge = raw.get("mm_patch_merge_type", "flat")
    if merge != "spatial_unpad":
        raise unsupported("mm_patch_merge_type", merge, "spatial_unpad")
    if not isinstance(grid, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in grid):
        raise unsupported("image_grid_pinpoints", grid, "a list of pairs of width and height")
    return image_spec(config, tower.image_size, tuple((width, height) for width, height in grid))


def _usual_prompt(tokenizer_directory: Path, text: Any) -> str:
    """The format that the original code trains such a language model with, told by its special tokens."""
    vocabulary = load_tokenizer(tokenizer_directory).get_vocab()
    if "<|start_header_id|>" in vocabulary:
        return "llama-3"
    if "<|im_start|>" in vocabulary:
        return "chatml" if text.model_type == "qwen2" else "chatml_direct"
    return "mistral_instruct" if text.model_type == "mistral" else "vicuna_v1"
