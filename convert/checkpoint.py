"""A checkpoint of any supported format as one record, and the tensors that belong to it.

Each format's own reader (``hf_format``, ``original_format``, ``lora``) checks the configuration field by field and
refuses, by the name of the field, what can't be converted faithfully.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bundle import PromptFormat, VisualTokens, image_from_fields, prompt_from_fields
from llava_edge.bundle import visual_tokens_from_fields as tokens_from_fields
from llava_edge.convert.tower import unsupported
from llava_edge.convert.weights import Weights, read_json
from llava_edge.errors import InputError, require_extra
from llava_edge.strict_json import Fields, parse_object
from llava_edge.types import ImageSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llava_edge.convert.projector import Projector
    from llava_edge.convert.tower import Tower

DESCRIPTION_NAME = "llava_edge.json"
LLM_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Description:
    """What a bundle's manifest says of the model and its inputs; ``llava_edge.json`` beside a checkpoint wins."""

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
class Options:
    """What a person adds to a checkpoint that does not hold everything.

    ``prompt`` names a conversation format, ``vision_tower`` and ``base`` directories with parts that the checkpoint
    only refers to.
    """

    prompt: str | None = None
    vision_tower: Path | None = None
    base: Path | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that this version can convert.

    ``split_calls`` says that the reference tokenises the text before and after a picture in calls of their own.
    ``notes`` are for the person: what was decided and why.
    """

    directory: Path
    tokenizer_directory: Path
    text_config: PretrainedConfig
    tower: Tower
    projector: Projector
    feature_layers: tuple[int, ...]
    tied: bool
    image_newline: bool
    description: Description
    open_weights: Callable[[], Weights] = field(repr=False)
    split_calls: bool = False
    notes: tuple[str, ...] = ()


def open_checkpoint(directory: Path, options: Options | None = None) -> Checkpoint:
    """Read the configuration and refuse, by the name of the field, what this version can't convert faithfully."""
    require_extra("convert", "torch", "transformers", "safetensors")
    options = options or Options()
    from llava_edge.convert import hf_format, lora, original_format

    if lora.is_adapter(directory):
        return lora.open_adapter(directory, options)
    raw = read_json(directory / "config.json")
    if original_format.is_original(raw):
        return original_format.open_original(directory, raw, options)
    return hf_format.open_hf(directory, raw, options)


def check(fields: Iterator[tuple[str, object, object]]) -> None:
    """Fields, their values, and the only values with which the files come out right."""
    for name, value, wanted in fields:
        if value != wanted:
            raise unsupported(name, value, wanted)


def text_requirements(text: PretrainedConfig, where: str = "") -> Iterator[tuple[str, object, object]]:
    """What every language model has to be."""
    if text.model_type not in LLM_TYPES:
        raise unsupported(f"{where}model_type", text.model_type, *LLM_TYPES)
    yield f"{where}hidden_act", text.hidden_act, "silu"
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        yield f"{where}{name}", bool(getattr(text, name, False)), False
    kind = text.rope_parameters.get("rope_type", "default")
    known = ("default", "linear", "llama3")
    if kind not in known:
        raise unsupported(f"{where}rope_parameters.rope_type", kind, *known)


def description_requirements(
    description: Description, tower: Tower, where: str = "vision_config."
) -> Iterator[tuple[str, object, object]]:
    """What pictures have to be for this tower."""
    yield f"{where}image_size", tower.image_size, description.image.size
    grid = (tower.side, tower.side)
    yield f"{DESCRIPTION_NAME}: visual_tokens.grid", description.visual_tokens.grid, grid


def from_end(layers: int | list[int] | tuple[int, ...], depth: int, name: str) -> tuple[int, ...]:
    """Hidden states that feed the projector, counted from the input of the first block, which is 0."""
    listed = [layers] if isinstance(layers, int) else list(layers)
    counted = tuple(layer if layer >= 0 else depth + 1 + layer for layer in listed)
    if not counted or len(set(counted)) != len(counted) or not all(0 <= layer <= depth for layer in counted):
        raise unsupported(name, layers, f"different layers of 0 to {depth}")
    return counted


def read_description(directory: Path) -> Description | None:
    """``llava_edge.json`` of a checkpoint, if it has one."""
    path = directory / DESCRIPTION_NAME
    if not path.is_file():
        return None
    try:
        return parse_object(path.read_text(encoding="utf-8")).build(Description.from_fields)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def build_config(kind: Any, raw: dict[str, Any], path: Path) -> Any:
    """A configuration of transformers; InputError with what it says against the file."""
    try:
        return kind.from_dict(raw)
    except Exception as error:  # transformers and its validators raise many kinds
        raise InputError(
            f"transformers refuses {path}: {error}", hint="Correct the field, or get the file again."
        ) from None
