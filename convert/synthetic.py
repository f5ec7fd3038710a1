"""``python -m llava_edge.convert.synthetic DIR``: a checkpoint of LLaVA-1.5's shape with random weights.

It shows what a conversion takes before 13.5 GB are downloaded. Tensors are made and written one file at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from safetensors.torch import save_file

from llava_edge.convert.llm import expected_shapes
from llava_edge.convert.tiny_tokenizers import VICUNA, write_tokenizer
from llava_edge.errors import InputError

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
SIDE = 336


def config_of(layers: int) -> Any:
    """LLaVA-1.5-7B's configuration with so many layers in its language model (it has 32)."""
    tower = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=SIDE,
        patch_size=14,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip
    return transformers.LlavaConfig(vision_config=tower, text_config=text)


def tensor_shapes(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names on disk and shapes, file by file: the vision part, the word tables, then a few layers each."""
    vision, text = config.vision_config, config.text_config
    with torch.device("meta"):
        tower = transformers.AutoModel.from_config(vision)
    shapes = {f"model.vision_tower.vision_model.{name}": tuple(p.shape) for name, p in tower.named_parameters()}
    for number, columns in ((1, vision.hidden_size), (2, text.hidden_size)):
        name = f"model.multi_modal_projector.linear_{number}"
        shapes |= {f"{name}.weight": (text.hidden_size, columns), f"{name}.bias": (text.hidden_size,)}
    yield shapes
    found = {f"model.{name}": shape for name, shape in expected_shapes(text).items()}
    ends = {name: found.pop(name) for name in list(found) if ".layers." not in name}
    yield {**ends, "lm_head.weight": (text.vocab_size, text.hidden_size)}
    for first in range(0, text.num_hidden_layers, 4):
        numbers = range(first, first + 4)
        yield {name: shape for name, shape in found.items() if int(name.split(".layers.")[1].split(".")[0]) in numbers}


def make(directory: Path, layers: int = 32) -> None:
    """Write the checkpoint into a new directory."""
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} exists and is not empty", hint="Choose another name.")
    directory.mkdir(parents=True, exist_ok=True)
    config = config_of(layers)
    write_tokenizer("vicuna", directory)
    torch.manual_seed(0)
    where: dict[str, str] = {}
    for number, shapes in enumerate(tensor_shapes(config)):
        file = f"model-{number:05}.safetensors"
        save_file({name: _random(name, shape) for name, shape in shapes.items()}, directory / file)
        where |= dict.fromkeys(shapes, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (directory / "config.json").write_text(config.to_json_string())
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
        "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True,
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (directory / "chat_template.jinja").write_text(VICUNA)


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Small enough to stay in float16's range through every layer, norms near one."""
    if len(shape) == 1 and "norm" in name and not name.endswith("bias"):
        return torch.ones(shape, dtype=torch.float16)
    return (torch.randn(shape) * 0.02).half()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), default=32, show_default=True, help="Layers of the language model.")
def main(directory: Path, layers: int) -> None:
    """Write a checkpoint of LLaVA-1.5-7B's shape with random weights into DIRECTORY."""
    make(directory, layers)


if __name__ == "__main__":
    main()
