"""A checkpoint in Hugging Face format: its configuration, checked field by field, and its tensors.

Tensors are read from the safetensors files under the names they have on disk, which are stable, while the names of
modules inside transformers change between its releases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bundle import PromptFormat, VisualTokens, image_from_fields, prompt_from_fields
from llava_edge.bundle import visual_tokens_from_fields as tokens_from_fields
from llava_edge.errors import InputError, require_extra
from llava_edge.strict_json import Fields, parse_object
from llava_edge.types import ImageSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import LlavaConfig

DESCRIPTION_NAME = "llava_edge.json"


@dataclass(frozen=True)
class Description:
    """What a checkpoint's own files don't say: ``llava_edge.json`` beside them."""

    name: str
    family: str
    license: str
    source: str
    image: ImageSpec
    visual_tokens: VisualTokens
    prompt: PromptFormat

    @classmethod
    def from_fields(cls, f: Fields) -> Description:
        """Read it from a parsed JSON object."""
        return cls(
            name=f.text("name"),
            family=f.text("family"),
            license=f.text("license"),
            source=f.text("source"),
            image=f.object("image").build(image_from_fields),
            visual_tokens=f.object("visual_tokens").build(tokens_from_fields),
            prompt=f.object("prompt").build(prompt_from_fields),
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that this version can convert."""

    directory: Path
    config: LlavaConfig
    description: Description

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states that feed the projector, in its order; 0 is the input of the first block."""
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        depth = self.config.vision_config.num_hidden_layers
        return tuple(layer if layer >= 0 else depth + 1 + layer for layer in layers)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the configuration and refuse, by the name of the field, what this version can't convert faithfully."""
    require_extra("convert", "torch", "transformers", "safetensors")
    from transformers import LlavaConfig

    raw = _read_json(directory / "config.json")
    if raw.get("model_type") != "llava":
        raise _unsupported("model_type", raw.get("model_type"), "llava")
    for part, supported in (("text_config", "llama"), ("vision_config", "dinov2")):
        found = raw.get(part, {}).get("model_type") if isinstance(raw.get(part), dict) else None
        if found != supported:
            raise _unsupported(f"{part}.model_type", found, supported)
    if raw.get("quantization_config"):
        raise _unsupported("quantization_config", raw["quantization_config"], None)
    try:
        config = LlavaConfig.from_dict(raw)
    except Exception as error:  # transformers and its validators raise many kinds
        raise InputError(
            f"transformers refuses {directory / 'config.json'}: {error}",
            hint="Correct the field, or get the file again.",
        ) from None
    for field in ("image_size", "patch_size"):
        if not isinstance(getattr(config.vision_config, field), int):
            raise _unsupported(f"vision_config.{field}", getattr(config.vision_config, field), "one whole number")
    checkpoint = Checkpoint(directory, config, _read_description(directory))
    for field, value, wanted in _requirements(checkpoint):
        if value != wanted:
            raise _unsupported(field, value, wanted)
    return checkpoint


def _requirements(checkpoint: Checkpoint) -> Iterator[tuple[str, object, object]]:
    """Fields of ``config.json``, their values, and the only values with which the files come out right."""
    config, image = checkpoint.config, checkpoint.description.image
    vision, text = config.vision_config, config.text_config
    side = vision.image_size // vision.patch_size
    depth = vision.num_hidden_layers
    yield "vision_class_token", getattr(config, "vision_class_token", True), False
    yield "vision_feature_select_strategy", config.vision_feature_select_strategy, "default"
    yield "projector_hidden_act", config.projector_hidden_act, "gelu"
    yield "vision_config.hidden_act", vision.hidden_act, "gelu"
    yield "vision_config.use_swiglu_ffn", vision.use_swiglu_ffn, False
    yield "vision_config.qkv_bias", vision.qkv_bias, True
    yield "vision_config.num_channels", vision.num_channels, 3
    yield "vision_config.image_size", vision.image_size, image.size
    yield "vision_config.image_size", vision.image_size, side * vision.patch_size
    yield "vision_feature_layer", len(set(checkpoint.feature_layers)), len(checkpoint.feature_layers)
    yield "vision_feature_layer", all(0 <= layer <= depth for layer in checkpoint.feature_layers), True
    yield "image_seq_length", config.image_seq_length, side * side
    yield f"{DESCRIPTION_NAME}: visual_tokens.grid", checkpoint.description.visual_tokens.grid, (side, side)
    yield "text_config.hidden_act", text.hidden_act, "silu"
    yield "text_config.attention_bias", text.attention_bias, False
    yield "text_config.mlp_bias", text.mlp_bias, False
    yield "text_config.rope_parameters.rope_type", text.rope_parameters.get("rope_type", "default"), "default"


def _unsupported(field: str, value: object, supported: object) -> InputError:
    return InputError(
        f"can't convert this checkpoint: {field} is {value!r}; expected {supported!r}",
        hint="This version converts `llava` checkpoints of a DINOv2 tower without class token and a LLaMA-type LLM.",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path.parent} is not a checkpoint in Hugging Face format: it has no {path.name}",
            hint="Name the directory that holds config.json and the safetensors files.",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def _read_description(directory: Path) -> Description:
    path = directory / DESCRIPTION_NAME
    try:
        return parse_object(path.read_text(encoding="utf-8")).build(Description.from_fields)
    except FileNotFoundError:
        raise InputError(
            f"{directory} has no {DESCRIPTION_NAME}, which says how pictures and prompts are prepared",
            hint="Training with llava-edge writes it; for another checkpoint write one by hand.",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class Weights:
    """The tensors of a checkpoint by one set of names, read one at a time as float32.

    Older and newer releases of transformers write different prefixes; here they are always ``language_model.``
    (``embed_tokens``, ``layers.N``, ``norm``), ``lm_head.``, ``vision_tower.`` and ``multi_modal_projector.``.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._where: dict[str, tuple[Any, str]] = {}
        self._taken: set[str] = set()
        for path in _shards(directory):
            try:
                file: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"can't read {path}: {error}", hint="Get the checkpoint again.") from None
            self._where.update({plain_name(name): (file, name) for name in file.keys()})  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32. InputError if the checkpoint lacks it."""
        import torch

        self._taken.add(name)
        try:
            file, stored = self._where[name]
        except KeyError:
            raise InputError(
                f"the checkpoint has no tensor {name}", hint="Its config.json may be of another."
            ) from None
        tensor = file.get_tensor(stored).to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the tensor {name} holds values that are not finite", hint="The training diverged.")
        array: NDArray[np.float32] = tensor.contiguous().numpy()
        return array

    def names(self, prefix: str) -> list[str]:
        """The names that start with ``prefix``."""
        return sorted(name for name in self._where if name.startswith(prefix))

    def leave(self, *names: str) -> None:
        """Say that these are left out on purpose."""
        self._taken.update(names)

    def require_all_used(self) -> None:
        """InputError if a tensor was neither written nor left out on purpose: the file would be another model."""
        left = sorted(set(self._where) - self._taken)
        if left:
            raise InputError(f"the checkpoint has {len(left)} tensors that don't fit its config.json, first {left[0]}")


def plain_name(name: str) -> str:
    """One name for a tensor, whichever release of transformers wrote it."""
    name = name.removeprefix("model.")
    for old, new in (("language_model.lm_head.", "lm_head."), ("language_model.model.", "language_model.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _shards(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        path = directory / "model.safetensors"
        if path.is_file():
            return [path]
        raise InputError(f"{directory} has no model.safetensors", hint="Only safetensors checkpoints are read.")
    names = set(_read_json(index).get("weight_map", {}).values())
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{index} names no files of its own directory in weight_map")
    return [directory / name for name in sorted(names)]
