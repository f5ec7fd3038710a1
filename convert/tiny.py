"""Random checkpoints of every supported family, a few hundred thousand parameters each, made in a second.

The tests convert them, and so does ``python -m llava_edge.convert.parity_table``. Every tensor is random, so that one
in the wrong place shows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors.torch import save_file

from llava_edge.convert.tiny_tokenizers import CHATML, INSTRUCT, LLAMA3, ONEVISION, VICUNA, Llm, write_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SIDE, PATCH = 56, 14
GRID = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))  # width, height
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint."""

    format: Literal["hf", "original"] = "hf"
    llm: Llm = "vicuna"
    tower: Literal["clip", "siglip", "dinov2"] = "clip"
    mode: Literal["pad", "crop", "squash", "anyres"] = "pad"
    projector: int = 2
    own_tower: bool = False
    pickled: bool = False
    lora: bool = False
    tied: bool = False
    class_token: bool = True
    layers: tuple[int, ...] = (-2,)
    max_tiles: int = 0


FAMILIES: dict[str, Family] = {
    "v1 linear": Family("original", mode="crop", projector=1, pickled=True),
    "v1.5": Family("original"),
    "v1.6-vicuna": Family("original", mode="anyres", own_tower=True),
    "v1.6-mistral": Family("original", llm="mistral", mode="anyres", own_tower=True),
    "HF llava": Family(mode="crop"),
    "HF llava_next": Family(llm="mistral", mode="anyres"),
    "HF llava_onevision": Family(llm="qwen2", tower="siglip", mode="anyres", tied=True, layers=(-1,), max_tiles=2),
    "HF llava, LLaMA-3": Family(llm="llama3"),
    "SigLIP + Qwen2": Family(llm="qwen2", tower="siglip", mode="squash"),
    "DINOv2 + SmolLM": Family(llm="smollm", tower="dinov2", tied=True, class_token=False, layers=(1, 2)),
    "DINOv2 with class token": Family(llm="smollm", tower="dinov2", tied=True),
    "original, Qwen2": Family("original", llm="qwen2", mode="anyres", own_tower=True),
    "LoRA merge": Family("original", lora=True),
}


def make(family: Family, directory: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint into a new directory; what it needs besides lies in directories beside its files."""
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(family.llm, directory)
    tower = transformers.AutoModel.from_config(tower_config(family.tower))
    # The table of embeddings is longer than the vocabulary, as in many released models.
    text = text_config(family, size + 4)
    llm = transformers.AutoModelForCausalLM.from_config(text)
    depths = [len(family.layers) * 64, *[text.hidden_size] * family.projector]
    projector = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in itertools.pairwise(depths))
    for module in (tower, llm, projector):
        randomize(module)
    newline = torch.randn(text.hidden_size) * 0.3
    if family.format == "hf":
        _write_hf(family, directory, tower, llm, projector, newline)
    else:
        _write_original(family, directory, tower, llm, projector, newline)
    return directory


def randomize(module: torch.nn.Module) -> None:
    """Values for which every tensor matters, and which rounding to few bits does not blow up layer by layer."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1 and ("norm" in name or "lambda" in name) and not name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1 or "cls_token" in name or "position" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.15 if parameter.ndim < 4 else 0.05)


def tower_config(kind: str) -> PretrainedConfig:
    """A tower of 4 x 4 patches."""
    common: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    if kind == "clip":
        return transformers.CLIPVisionConfig(**common, intermediate_size=160)
    if kind == "siglip":
        return transformers.SiglipVisionConfig(**common, intermediate_size=160, vision_use_head=False)
    return transformers.Dinov2Config(**common, layer_norm_eps=1e-6, use_mask_token=False)


def text_config(family: Family, vocab_size: int) -> PretrainedConfig:
    """A language model of three layers."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4 if family.llm == "vicuna" else 2,
        "max_position_embeddings": 2048, "tie_word_embeddings": family.tied, "bos_token_id": 1, "pad_token_id": 2,
        "eos_token_id": [0, 2] if family.llm in ("qwen2", "smollm") else 2,
    }  # fmt: skip
    if family.llm == "mistral":
        return transformers.MistralConfig(**common, sliding_window=None)
    if family.llm == "qwen2":
        return transformers.Qwen2Config(**common)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0}
    if family.llm == "llama3":
        rope = {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
        }  # fmt: skip
    elif family.llm == "vicuna":
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    return transformers.LlamaConfig(**common, rope_parameters=rope)


def _write_hf(
    family: Family, directory: Path, tower: Any, llm: Any, projector: torch.nn.ModuleList, newline: torch.Tensor
) -> None:
    tiled = family.mode == "anyres"
    common: dict[str, Any] = {
        "vision_config": tower.config, "text_config": llm.config, "projector_hidden_act": "gelu",
        "image_token_index": _image_token(directory), "tie_word_embeddings": family.tied,
        "vision_feature_layer": family.layers[0] if len(family.layers) == 1 else list(family.layers),
        "vision_feature_select_strategy": "full" if family.tower == "siglip" else "default",
    }  # fmt: skip
    pinpoints = [[height, width] for width, height in GRID]
    if not family.max_tiles:
        common["image_seq_length"] = (SIDE // PATCH) ** 2
    if family.max_tiles:
        ratio = f"anyres_max_{family.max_tiles}"
        config = transformers.LlavaOnevisionConfig(**common, image_grid_pinpoints=pinpoints, vision_aspect_ratio=ratio)
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    elif tiled:
        config = transformers.LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        model = transformers.LlavaNextForConditionalGeneration(config)
    else:
        extra = {} if family.class_token else {"vision_class_token": False}
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**common, **extra))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    for target, source in zip(("linear_1", "linear_2"), projector, strict=True):
        getattr(model.model.multi_modal_projector, target).load_state_dict(source.state_dict())
    if tiled:
        with torch.no_grad():
            model.model.image_newline.copy_(newline)
    model.save_pretrained(directory)
    if (directory / "tokenizer.model").is_file():
        transformers.LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)
    _write_json(directory / "preprocessor_config.json", preprocessor(family))
    templates = {"vicuna": VICUNA, "mistral": INSTRUCT, "llama3": LLAMA3}
    template = ONEVISION if family.max_tiles else templates.get(family.llm, CHATML)
    (directory / "chat_template.jinja").write_text(template)


def preprocessor(family: Family) -> dict[str, Any]:
    """``preprocessor_config.json`` of such a checkpoint."""
    common: dict[str, Any] = {"image_mean": list(MEAN), "image_std": list(STD), "resample": 3}
    if family.mode == "squash":
        kind = "SiglipImageProcessor"
        return {**common, "image_processor_type": kind, "size": {"height": SIDE, "width": SIDE}}
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True}
    pinpoints = [[height, width] for width, height in GRID]
    if family.max_tiles:
        square = {"size": {"height": SIDE, "width": SIDE}, "do_pad": True, "image_grid_pinpoints": pinpoints}
        return {**common, **square, "image_processor_type": "LlavaOnevisionImageProcessor"}
    if family.mode == "anyres":
        kind = "LlavaNextImageProcessor"
        return {**common, **sizes, "image_processor_type": kind, "image_grid_pinpoints": pinpoints}
    pads = family.mode == "pad" and family.format == "hf"
    kind = "LlavaImageProcessor" if pads else "CLIPImageProcessor"
    return {**common, **sizes, "image_processor_type": kind, **({"do_pad": True} if pads else {})}


def _write_original(
    family: Family, directory: Path, tower: Any, llm: Any, projector: torch.nn.ModuleList, newline: torch.Tensor
) -> None:
    names = {"vicuna": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM", "qwen2": "LlavaQwenForCausalLM"}
    fields = {
        **llm.config.to_dict(), "model_type": "llava", "architectures": [names[family.llm]],
        "mm_hidden_size": 64, "mm_projector_type": f"mlp{family.projector}x_gelu" if family.projector > 1 else "linear",
        "mm_vision_select_layer": family.layers[0], "mm_vision_select_feature": "patch", "mm_vision_tower": "tower",
        "mm_use_im_start_end": False, "image_aspect_ratio": {"crop": "square"}.get(family.mode, family.mode),
    }  # fmt: skip
    if family.mode == "anyres":
        fields |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [list(pair) for pair in GRID]}
    _write_json(directory / "config.json", fields)
    _write_tower(family, directory / "tower", tower)
    one = family.projector == 1
    trained = {
        f"model.mm_projector.{name}" if not one else f"model.mm_projector.{name.removeprefix('0.')}": tensor
        for name, tensor in _sequential(projector).items()
    }
    state = llm.state_dict()
    if family.lora:
        _write_adapter(directory, state, trained)
        return
    state |= trained
    if family.mode == "anyres":
        state["model.image_newline"] = newline
    if family.own_tower:
        own = {f"model.vision_tower.vision_tower.vision_model.{name}": t for name, t in tower.state_dict().items()}
        state |= own
    save_sharded(directory, state, pickled=family.pickled)


def _sequential(projector: torch.nn.ModuleList) -> dict[str, torch.Tensor]:
    return {
        f"{2 * int(name.split('.')[0])}.{name.split('.')[1]}": tensor for name, tensor in projector.state_dict().items()
    }


def _write_tower(family: Family, directory: Path, tower: Any) -> None:
    directory.mkdir()
    _write_json(directory / "config.json", {**tower.config.to_dict(), "model_type": tower.config.model_type})
    _write_json(directory / "preprocessor_config.json", preprocessor(family))
    state = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    if family.own_tower:  # another tower that must not be taken
        state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")


def _write_adapter(directory: Path, state: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint as an adapter: the base lies in ``base``, and what was trained whole in a file of its own."""
    rank = 4
    adapter: dict[str, torch.Tensor] = {}
    base = dict(state)
    for name in state:
        if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            module = "base_model.model." + name.removesuffix(".weight")
            adapter[f"{module}.lora_A.weight"] = torch.randn(rank, state[name].shape[1]) * 0.1
            adapter[f"{module}.lora_B.weight"] = torch.randn(state[name].shape[0], rank) * 0.1
    save_file(adapter, directory / "adapter_model.safetensors")
    torch.save({f"base_model.model.{name}": t for name, t in trained.items()}, directory / "non_lora_trainables.bin")
    (directory / "base").mkdir()
    _write_json(directory / "base" / "config.json", json.loads((directory / "config.json").read_text()))
    save_sharded(directory / "base", base)
    _write_json(
        directory / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "base_model_name_or_path": str(directory / "base")},
    )


def save_sharded(directory: Path, state: Mapping[str, torch.Tensor], *, pickled: bool = False, files: int = 2) -> None:
    """Write tensors to several files and an index, as large checkpoints are."""
    names = sorted(state)
    ending, stem = ("bin", "pytorch_model") if pickled else ("safetensors", "model")
    where: dict[str, str] = {}
    for number in range(files):
        file = f"{stem}-{number + 1:05}-of-{files:05}.{ending}"
        part = {name: state[name].contiguous() for name in names[number::files]}
        where |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, directory / file)
        else:
            save_file({name: tensor.clone() for name, tensor in part.items()}, directory / file)
    _write_json(directory / f"{stem}.{ending}.index.json", {"metadata": {}, "weight_map": where})


def _image_token(directory: Path) -> int:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    found: int = tokenizer.convert_tokens_to_ids("<image>")
    return found


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1))
