"""The projector's start: visual tokens near the words of the picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llava_edge.train_gpu import build, checkpoint
from llava_edge.train_gpu.features import FeatureCache, build_cache
from llava_edge.train_gpu.words import align_words, picture_words, word_targets

COLOURS = ("red", "green", "blue", "white")


def sample(image: str, *answers: str) -> dict[str, object]:
    turns = [turn for text in answers for turn in ({"from": "human", "value": "?"}, {"from": "gpt", "value": text})]
    return {"id": image, "image": image, "conversations": turns}


def test_only_what_is_affirmed_counts() -> None:
    said = picture_words([sample("a", "Two dogs run.", "No, there is no cat in the picture."), sample("a", "dogs")])
    assert said["a"] == {"two": 1, "dogs": 2, "run": 1}


def test_rare_words_weigh_more_and_rows_add_up_to_one(tokenizer: PreTrainedTokenizerFast) -> None:
    said = picture_words([sample(f"{i}", "user" if i % 4 else "red user") for i in range(16)])
    ids, target = word_targets(said, tokenizer, least=1)
    rare, common = (tokenizer(f" {word}")["input_ids"] for word in ("red", "user"))
    row = {token: float(value) for token, value in zip(ids, target[0], strict=True)}
    assert min(row[t] for t in rare if t not in common) > max(row[t] for t in common)
    torch.testing.assert_close(target[0].sum(), torch.tensor(1.0))


def test_a_picture_speaks_its_colour(workspace: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters() if "multi_modal_projector" not in name}
    cache = FeatureCache(workspace / "features")
    samples = json.loads((workspace / "samples.json").read_text())["colours"]
    align_words(model, cache, samples, tokenizer, image_tokens=4, epochs=150, batch_size=16, lr=1e-2)

    table = model.get_input_embeddings().weight.detach()
    words = [tokenizer(f" {colour}")["input_ids"] for colour in COLOURS]
    right = 0
    for index in range(16):
        features = torch.from_numpy(np.asarray(cache[f"{index}.png"], np.float32))
        with torch.no_grad():
            said = model.model.multi_modal_projector(features) @ table.T  # [patches, vocabulary]
        scores = [said[:, ids].mean().item() for ids in words]
        right += int(np.argmax(scores)) == index % 4
    assert right >= 14
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_the_blocks_behind_the_cache_learn_the_words_too(
    workspace: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build.load_model(str(workspace / "base"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    spec = build.image_spec(checkpoint.read_description(workspace / "base"), None)
    names = [f"{index}.png" for index in range(16)]
    cache = build_cache(model, spec, workspace / "pictures", names, tmp_path / "features", 1)
    samples = json.loads((workspace / "samples.json").read_text())["colours"]
    align_words(model, cache, samples, tokenizer, image_tokens=4, epochs=2, batch_size=16)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    blocks = {name.split("layer.")[1][0] for name in moved if "vision_tower" in name}
    assert blocks == {"2"}
    assert not any("language_model" in name for name in moved)
