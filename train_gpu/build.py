"""The model that a run starts from: a LLaVA checkpoint, or a language model and a vision tower put together."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import cached_file

from llava_edge.bundle import image_from_fields
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields
from llava_edge.train_gpu import checkpoint
from llava_edge.train_gpu.prompts import FORMATS, IMAGE, blank_before_every_run, blank_opens
from llava_edge.types import FitMode, ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_edge.train_gpu.config import DataConfig, ModelConfig

log = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"
PARTS = "parts.json"
# Files that people who use transformers alone need beside the weights.
COMPANIONS = (PREPROCESSOR, "processor_config.json", "chat_template.jinja", "chat_template.json")


def load_model(path: str) -> LlavaForConditionalGeneration:
    """A LLaVA checkpoint in the types that it has on disk."""
    try:
        config = LlavaConfig.from_pretrained(path)
        if config.model_type != "llava":
            raise InputError(f"init {path} is a {config.model_type}; expected a llava checkpoint")
        return LlavaForConditionalGeneration.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        raise InputError(
            f"init {path} is not a checkpoint that transformers loads: {error}",
            hint="Name the directory that stage align has written, or a LLaVA in Hugging Face format.",
        ) from None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} has no tokenizer that transformers loads: {error}") from None
    return tokenizer


def made_of(directory: Path) -> dict[str, Any] | None:
    """What the checkpoint in a folder was put together from; None if there is no whole one."""
    if not (directory / checkpoint.DESCRIPTION).is_file() or not (directory / PARTS).is_file():
        return None
    parts: dict[str, Any] = json.loads((directory / PARTS).read_text())
    return parts


def parts_record(parts: ModelConfig, seed: int) -> dict[str, Any]:
    """What the checkpoint that :func:`assemble_into` makes depends on, as it is kept beside it."""
    values = {name: value for name, value in asdict(parts).items() if name != "tower_blocks"}
    return {**values, "feature_layers": list(parts.feature_layers), "seed": seed}


def assemble_into(directory: Path, parts: ModelConfig, data: DataConfig, seed: int) -> None:
    """Write the checkpoint that ``model.llm`` and ``model.vision_tower`` make with a fresh projector, if not there."""
    record = parts_record(parts, seed)
    if made_of(directory) == record:
        return
    log.info("putting %s and %s together", parts.llm, parts.vision_tower)
    try:
        tower = AutoModel.from_pretrained(parts.vision_tower, dtype="auto")
        llm = AutoModelForCausalLM.from_pretrained(parts.llm, dtype="auto")
    except (OSError, ValueError) as error:
        raise InputError(f"transformers can't load model.llm or model.vision_tower: {error}") from None
    tower = getattr(tower, "vision_model", tower)  # CLIP and SigLIP come with a text model
    tokenizer = load_tokenizer(parts.llm)
    blank_before_every_run(tokenizer)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE], special_tokens=True)
        if len(tokenizer) > llm.get_input_embeddings().weight.shape[0]:
            llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model = _join(tower, llm, tokenizer.convert_tokens_to_ids(IMAGE), parts, seed)
    spec = _image_spec(parts.vision_tower, model.config)
    checkpoint.save_checkpoint(directory, model, tokenizer, describe(model, spec, tokenizer, data))
    copy_companions(parts.vision_tower, directory)
    checkpoint.write_text(directory / PARTS, json.dumps(record, indent=2) + "\n")


def _join(tower: Any, llm: Any, image_token: int, parts: ModelConfig, seed: int) -> LlavaForConditionalGeneration:
    vision = tower.config
    patches = (vision.image_size // vision.patch_size) ** 2
    layers = parts.feature_layers
    config = LlavaConfig(
        vision_config=vision,
        text_config=llm.config,
        image_token_index=image_token,
        projector_hidden_act="linear" if parts.projector == "linear" else "gelu",
        vision_feature_layer=layers[0] if len(layers) == 1 else list(layers),
        vision_feature_select_strategy="default" if parts.class_token else "full",
        image_seq_length=patches,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        projector = model.model.multi_modal_projector
        projector.linear_1.reset_parameters()
        projector.linear_2.reset_parameters()
        if parts.projector == "linear":
            torch.nn.init.eye_(projector.linear_2.weight)
            projector.linear_2.bias.zero_()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    base = getattr(llm, llm.base_model_prefix)
    model.model.language_model.load_state_dict(base.state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    return model.to(llm.dtype).eval()


def copy_companions(source: str, directory: Path) -> None:
    """Copy the small files that transformers' processors read, where the source has them."""
    for name in COMPANIONS:
        found = _companion(source, name)
        if found is not None and not (directory / name).exists():
            shutil.copy(found, directory / name)


def _companion(source: str, name: str) -> str | None:
    found: str | None = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return found


def _image_spec(source: str, config: Any) -> ImageSpec:
    """How the tower wants its pictures, from its preprocessor's file; padded in the mean colour, as LLaVA 1.5 does."""
    found = _companion(source, PREPROCESSOR)
    values = json.loads(Path(found).read_text()) if found else {}
    if "image_mean" not in values or "image_std" not in values:
        raise InputError(
            f"{source} has no {PREPROCESSOR} with image_mean and image_std",
            hint="Take the tower's whole repository, not its weights alone.",
        )
    mean, std = tuple(map(float, values["image_mean"])), tuple(map(float, values["image_std"]))
    color = tuple(int(value * 255) for value in mean)
    return ImageSpec(config.vision_config.image_size, mean, std, "pad", color)  # type: ignore[arg-type]


def image_spec(description: dict[str, Any], mode: FitMode | None) -> ImageSpec:
    """The preprocessing that a checkpoint's description names, with another way to fit if ``mode`` is one."""
    spec = Fields(description, checkpoint.DESCRIPTION).object("image").build(image_from_fields)
    return spec if mode is None else replace(spec, mode=mode)


def read_or_make_description(
    init: str, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> dict[str, Any]:
    """``llava_edge.json`` of the starting checkpoint, or what its other files say where it has none."""
    if (Path(init) / checkpoint.DESCRIPTION).is_file():
        return checkpoint.read_description(Path(init))
    return describe(model, _image_spec(init, model.config), tokenizer, data)


def describe(
    model: LlavaForConditionalGeneration, spec: ImageSpec, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> dict[str, Any]:
    """What ``convert`` needs to know beside the weights: ``llava_edge.json``."""
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    described: dict[str, Any] = {
        "name": "llava",
        "family": "llava",
        "license": "that of the parts and of the training data",
        "source": f"{model.config.text_config.model_type} and {model.config.vision_config.model_type}",
        "image": {},
        "visual_tokens": {"full": grid * grid, "grid": [grid, grid], "trained": [grid * grid], "default": grid * grid},
        "prompt": _prompt(tokenizer, "vicuna_v1"),
    }
    return trained_description(described, spec, tokenizer, data)


def trained_description(
    before: dict[str, Any], spec: ImageSpec, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> dict[str, Any]:
    """The description after a run: its preprocessing, its counts of visual tokens, its conversation format."""
    image = {**asdict(spec), "mean": list(spec.mean), "std": list(spec.std), "pad_color": list(spec.pad_color)}
    tokens = dict(before["visual_tokens"])
    if data.image_tokens:
        tokens["trained"] = list(data.image_tokens)
    if tokens["default"] not in tokens["trained"]:
        tokens["default"] = max(tokens["trained"])
    prompt = before["prompt"] if data.format == "plain" else _prompt(tokenizer, data.format)
    return {**before, "image": image, "visual_tokens": tokens, "prompt": prompt}


def _prompt(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    text = FORMATS[name]
    stop = text.stop.replace("{eos}", tokenizer.eos_token or "")
    begins = text.bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    special = tuple(tokenizer.get_added_vocab())
    opens = blank_opens(tokenizer) and not (text.opening + text.user).startswith(special)
    return {
        "bos": (tokenizer.bos_token if begins else "") + " " * opens,
        "system": text.system,
        "default_system": text.default_system,
        "user_prefix": text.user,
        "image_suffix": "\n",
        "user_suffix": text.user_suffix,
        "assistant_prefix": text.assistant,
        "turn_end": stop + text.between,
        "stop": [stop.strip() or stop],
    }
