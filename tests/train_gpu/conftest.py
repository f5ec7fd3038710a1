"""A LLaVA of a few thousand parameters with a tokenizer of its own, made in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_edge.train_gpu import build, checkpoint, features, parts
from llava_edge.train_gpu.config import DataConfig, Recipe
from llava_edge.train_gpu.recipe_file import load_recipe
from llava_edge.types import ImageSpec

SPEC = ImageSpec(size=56, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), mode="pad", pad_color=(0, 0, 0))
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]
COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "white": (250, 250, 250)}

TALK = (("What is it?", "It is red."), ("A picture?", "It is green."))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    corpus = ["What colour is it? It is red. user assistant A green blue white picture\n"] * 3
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    plain.train_from_iterator(corpus, trainer)
    plain.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(0)
    tower = Dinov2Model(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
            use_mask_token=False,
        )
    )
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
        )
    )  # fmt: skip
    return parts.assemble(tower, llm, tokenizer, (2, 3))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """base/, features/ and samples.json of sixteen one-coloured pictures."""
    root = tmp_path_factory.mktemp("work")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    samples = []
    for index in range(16):
        name = list(COLOURS)[index % 4]
        noise = rng.integers(-15, 15, (56, 56, 3))
        pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{index}.png")
        for number, (question, answer) in enumerate((("What colour is it?", f"It is {name}."), ("A picture?", name))):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            samples.append({"id": f"{index}#{number}", "image": f"{index}.png", "conversations": turns})
    (root / "samples.json").write_text(json.dumps({"colours": samples}))
    model = tiny_model(tokenizer)
    cache = features.build_cache(model, SPEC, root / "pictures", [f"{i}.png" for i in range(16)], root / "features")
    parts.initialise_projector(model, *cache.statistics(model.model.vision_tower, model.config), seed=0)
    data = DataConfig(samples="-", image_tokens=(16, 4), image_token_weights=(0.5, 0.5))
    checkpoint.save_checkpoint(root / "base", model, tokenizer, build.describe(model, SPEC, tokenizer, data))
    return root


@pytest.fixture(scope="session")
def talks(workspace: Path) -> Path:
    """The samples of the workspace, and a source ``chat`` without pictures: the first turn of TALK, or both."""
    sources = json.loads((workspace / "samples.json").read_text())
    said = [{"from": who, "value": text} for turn in TALK for who, text in zip(("human", "gpt"), turn, strict=True)]
    sources["chat"] = [{"id": f"chat#{n}", "conversations": said[: 2 + 2 * (n % 2)]} for n in range(6)]
    path = workspace / "with-talks.json"
    path.write_text(json.dumps(sources))
    return path


@pytest.fixture
def make(request: pytest.FixtureRequest, workspace: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Makes recipes of the module's RECIPE, by the name of their output."""

    def make(name: str, *changes: str) -> Recipe:
        path = tmp_path / f"{name}.toml"
        path.write_text(request.module.RECIPE.format(root=workspace, output=tmp_path / name))
        return load_recipe(path, changes)

    return make
