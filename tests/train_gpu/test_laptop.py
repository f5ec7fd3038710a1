"""Train to laptop, in one test: what was learnt by heart is said again by the quantised bundle, through ``chat``.

The tiny model runs everywhere. The real one (SmolLM2-135M, DINOv2-S, 300 captions of Flickr8k) needs
``LLAVA_EDGE_NANO_WORK``, the folder that ``python -m llava_edge.train_gpu.prepare_nano`` has filled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_edge.cli import cli
from llava_edge.convert import convert_checkpoint
from llava_edge.train_gpu import build, checkpoint, features, parts
from llava_edge.train_gpu.config import DataConfig
from llava_edge.train_gpu.loop import train
from llava_edge.train_gpu.recipe_file import load_recipe
from llava_edge.types import ImageSpec

SPEC = ImageSpec(size=56, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), mode="pad", pad_color=(0, 0, 0))
RECIPE = """
stage = "finetune"
init = "{base}"
output = "{output}"
log_every = 1
save_every = 10000
[data]
samples = "{samples}"
features = "{features}"
image_tokens = [{tokens}]
image_token_weights = [1.0]
[optim]
steps = {steps}
batch_size = {batch}
lr = {lr}
spike_factor = 0
"""


def repeated(pictures: Path, samples: list[dict[str, Any]], recipe_text: str, tmp_path: Path) -> tuple[float, float]:
    """The last losses' mean, and the share of the answers that the Q4_K_M bundle repeats."""
    (tmp_path / "recipe.toml").write_text(recipe_text)
    recipe = load_recipe(tmp_path / "recipe.toml")
    output = train(recipe)
    log = [json.loads(line) for line in (Path(recipe.output + ".run") / "log.jsonl").read_text().splitlines()]
    bundle = tmp_path / "bundle"
    convert_checkpoint(output, bundle, llm_type="Q4_K_M")
    right = 0
    for sample in samples:
        question = sample["conversations"][0]["value"].removeprefix("<image>\n")
        command = ["chat", "--model", str(bundle), "--image", str(pictures / sample["image"]), "-p", question]
        result = CliRunner().invoke(cli, [*command, "--max-tokens", "64"])
        assert result.exit_code == 0, result.output
        right += result.stdout.strip() == sample["conversations"][1]["value"]
    return float(np.mean([record["loss"] for record in log[-5:]])), right / len(samples)


def tiny_base(root: Path, tokenizer: PreTrainedTokenizerFast, names: list[str]) -> None:
    torch.manual_seed(0)
    vision = Dinov2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, layer_norm_eps=1e-6,
        use_mask_token=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = parts.assemble(Dinov2Model(vision), LlamaForCausalLM(text), tokenizer, (2, 3))
    cache = features.build_cache(model, SPEC, root / "pictures", names, root / "features")
    parts.initialise_projector(model, *cache.statistics(model.model.vision_tower, model.config), seed=0)
    data = DataConfig(samples="-", image_tokens=(16,), image_token_weights=(1.0,))
    checkpoint.save_checkpoint(root / "base", model, tokenizer, build.describe(model, SPEC, tokenizer, data))


def test_a_tiny_model_says_on_a_laptop_what_it_learnt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(3)
    samples = []
    for index in range(20):
        corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(corners).resize((56, 56), Image.Resampling.NEAREST).save(tmp_path / "pictures" / f"{index}.png")
        words = rng.choice(["red", "green", "blue", "white", "colour", "picture"], 3)
        turns = [("human", "<image>\nWhat colour is it?"), ("gpt", f"It is {' '.join(words)}.")]
        said = [{"from": who, "value": text} for who, text in turns]
        samples.append({"id": str(index), "image": f"{index}.png", "conversations": said})
    (tmp_path / "samples.json").write_text(json.dumps({"colours": samples}))
    tiny_base(tmp_path, tokenizer, [sample["image"] for sample in samples])
    text = RECIPE.format(
        base=tmp_path / "base", output=tmp_path / "out", samples=tmp_path / "samples.json",
        features=tmp_path / "features", tokens=16, steps=150, batch=20, lr=2e-3,
    )  # fmt: skip
    loss, share = repeated(tmp_path / "pictures", samples, text, tmp_path)
    assert loss < 0.1
    assert share >= 0.95


@pytest.mark.slow
def test_nanos_parts_say_on_a_laptop_what_they_learnt(tmp_path: Path) -> None:
    work = os.environ.get("LLAVA_EDGE_NANO_WORK")
    if not work:
        pytest.skip("LLAVA_EDGE_NANO_WORK is not set")
    root = Path(work)
    chosen: dict[str, dict[str, Any]] = {}
    sources = json.loads((root / "samples.json").read_text())
    for sample in (sample for name in sorted(sources) if name.startswith("flickr8k") for sample in sources[name]):
        if len(sample["conversations"]) == 2 and len(chosen) < 300:
            # One question for all, so that only the picture tells the answer.
            question = {"from": "human", "value": "<image>\nDescribe the picture briefly."}
            chosen.setdefault(sample["image"], {**sample, "conversations": [question, sample["conversations"][1]]})
    samples = list(chosen.values())
    assert len(samples) == 300
    (tmp_path / "samples.json").write_text(json.dumps({"captions": samples}))
    text = RECIPE.format(
        base=root / "base", output=tmp_path / "out", samples=tmp_path / "samples.json", features=root / "features",
        tokens=16, steps=400, batch=10, lr=2e-4,
    )  # fmt: skip
    loss, share = repeated(root / "pictures", samples, f"{text}projector_lr = 1e-3\n", tmp_path)
    assert loss < 0.1
    assert share >= 0.95
