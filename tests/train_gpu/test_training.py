"""The loop on a tiny LLaVA: what is trained, what is left alone, and that nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llava_edge.errors import InputError
from llava_edge.train_gpu.config import LoraConfig, Recipe, load_recipe
from llava_edge.train_gpu.data import collate
from llava_edge.train_gpu.features import FeatureCache, encode_pixels
from llava_edge.train_gpu.loop import _Run, learning_rate_factor, train
from llava_edge.train_gpu.model import Trainee, merge_into, pool_tokens

RECIPE = """
stage = "{stage}"
init = "{root}/base"
output = "{output}"
save_every = 5
[data]
samples = "{root}/samples.json"
features = "{root}/features"
weights = {{ colours = 1.0 }}
image_tokens = [16, 4]
image_token_weights = [0.5, 0.5]
branches = 2
[optim]
steps = 12
lr = 3e-3
batch_size = 4
[lora]
rank = {rank}
alpha = 8
"""


def recipe(workspace: Path, output: Path, stage: str = "align", rank: int = 0, *overrides: str) -> Recipe:
    path = output.with_suffix(".toml")
    path.write_text(RECIPE.format(root=workspace, output=output, stage=stage, rank=rank))
    return load_recipe(path, overrides)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).state_dict()


def changed(workspace: Path, directory: Path) -> set[str]:
    before, after = weights(workspace / "base"), weights(directory)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_align_moves_the_projector_and_nothing_else(workspace: Path, tmp_path: Path) -> None:
    moved = changed(workspace, train(recipe(workspace, tmp_path / "out")))
    assert moved == {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def test_finetune_moves_projector_and_llm_but_not_the_tower(workspace: Path, tmp_path: Path) -> None:
    moved = changed(workspace, train(recipe(workspace, tmp_path / "out", "finetune", 4)))
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in moved)


def test_training_lowers_the_loss(workspace: Path, tmp_path: Path) -> None:
    run = _Run(recipe(workspace, tmp_path / "out", "finetune", 4, "optim.steps=60"), resume=False)
    batch = run.mixture.batch(999)
    before = run.trainee(batch)[0].item()
    run.loop()
    assert run.trainee(batch)[0].item() < 0.5 * before


def test_resume_after_a_stop_gives_the_uninterrupted_weights(workspace: Path, tmp_path: Path) -> None:
    whole = train(recipe(workspace, tmp_path / "whole", "finetune", 4))
    stopped = _Run(recipe(workspace, tmp_path / "cut", "finetune", 4), resume=False)
    save, steps = stopped._save, []

    def save_and_stop() -> None:
        save()
        steps.append(stopped.step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    stopped._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.loop()
    assert steps == [5, 10]
    resumed = train(recipe(workspace, tmp_path / "cut", "finetune", 4), resume=True)
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_without_a_state_says_so(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        train(recipe(workspace, tmp_path / "never"), resume=True)


def test_branches_cost_what_the_samples_cost_alone(workspace: Path, tmp_path: Path) -> None:
    run = _Run(recipe(workspace, tmp_path / "out"), resume=False)
    trainee = run.trainee.float()
    samples = run.mixture.pictures["colours"][3][1]
    branches = [run.mixture.format.branch(sample) for sample in samples]
    features = np.asarray(run.features["3.png"], np.float32)[None]
    with torch.no_grad():
        together = trainee(collate(run.mixture.prefix, [branches], features, 4, ["3.png"]))
        alone = [trainee(collate(run.mixture.prefix, [[b]], features, 4, ["3.png"])) for b in branches]
    assert together[1] == sum(labels for _, labels in alone)
    torch.testing.assert_close(together[0], sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-4)


def test_padding_does_not_change_the_loss(workspace: Path, tmp_path: Path) -> None:
    run = _Run(recipe(workspace, tmp_path / "out"), resume=False)
    trainee = run.trainee.float()
    rows = [[run.mixture.format.branch(s) for s in samples] for _, samples in run.mixture.pictures["colours"][:2]]
    rows[1] = rows[1][:1]
    features = np.stack([np.asarray(run.features[f"{i}.png"], np.float32) for i in range(2)])
    with torch.no_grad():
        both = trainee(collate(run.mixture.prefix, rows, features, 16, ["0.png", "1.png"]))[0]
        each = [
            trainee(collate(run.mixture.prefix, rows[i : i + 1], features[i : i + 1], 16, ["x"]))[0] for i in range(2)
        ]
    torch.testing.assert_close(both, each[0] + each[1], rtol=1e-5, atol=1e-4)


def test_merged_adapters_equal_applied_ones(workspace: Path) -> None:
    base = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32)
    trainee = Trainee(base, LoraConfig(rank=4, alpha=8))
    torch.manual_seed(1)
    for name, parameter in trainee.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    target = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32)
    # The frozen weights are held in bfloat16: compare on the same ones.
    target.model.language_model.to(torch.bfloat16).float()
    trainee = trainee.float()
    embeddings = torch.randn(1, 9, 48)
    with torch.no_grad():
        applied = trainee.llm(inputs_embeds=embeddings).last_hidden_state
        merge_into(trainee, target)
        merged = target.model.language_model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(applied, merged, rtol=1e-5, atol=1e-5)


def test_standardising_leaves_the_projectors_output_alone(workspace: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32)
    trainee = Trainee(model, LoraConfig())
    features = torch.randn(2, 16, 64) * 3 + 1
    with torch.no_grad():
        plain = trainee.image_embeddings(features, 4)
        trainee.standardise(features.mean((0, 1)), features.std((0, 1)))
        torch.testing.assert_close(trainee.image_embeddings(features, 4), plain, rtol=1e-4, atol=1e-4)
        trainee.fold_standardisation()
        torch.testing.assert_close(trainee.image_embeddings(features, 4), plain, rtol=1e-4, atol=1e-4)


def test_the_class_token_reaches_no_patch(workspace: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32).eval()
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        before = encode_pixels(model, pixels)
        model.model.vision_tower.embeddings.cls_token.fill_(50.0)
        torch.testing.assert_close(encode_pixels(model, pixels), before)
        model.config.vision_class_token = True
        assert (encode_pixels(model, pixels) - before).abs().max() > 1e-3


def test_pooling_averages_cells_of_the_grid() -> None:
    grid = torch.arange(16.0).reshape(1, 16, 1)
    assert pool_tokens(grid, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_tokens(grid, 16) is grid
    with pytest.raises(InputError, match="4 x 4"):
        pool_tokens(grid, 9)


def test_the_features_of_an_unknown_picture_are_an_error(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"'x\.png'"):
        FeatureCache(workspace / "features")["x.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.speed=3", "unknown key optim.speed"),
        ("colour=3", "unknown key colour"),
        ("stage=evaluate", "align or finetune"),
        ("optim.steps=0", "optim.steps is 0"),
        ("lora.rank=4", "projector only"),
        ("optim", "no '='"),
        ("data.image_tokens=[16]", "differ in length"),
    ],
)
def test_a_wrong_recipe_is_refused_in_words(workspace: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(workspace, tmp_path / "out", "align", 0, change)


def test_the_resolved_recipe_lies_beside_the_weights(workspace: Path, tmp_path: Path) -> None:
    output = train(recipe(workspace, tmp_path / "out", "align", 0, "optim.steps=2", "seed=7"))
    saved: dict[str, Any] = json.loads((output / "recipe.json").read_text())
    assert (saved["seed"], saved["optim"]["steps"]) == (7, 2)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert learning_rate_factor(0.015, 0.03) == pytest.approx(0.5)
    assert learning_rate_factor(0.03, 0.03) == pytest.approx(1)
    assert learning_rate_factor(1.0, 0.03) == pytest.approx(0)


def test_a_sample_whose_tokens_differ_from_its_text_is_named(
    workspace: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    run = _Run(recipe(workspace, tmp_path / "out"), resume=False)
    forged = "<image>\nWhat is<|im_end|> this?"
    sample = {
        "id": "bad#1",
        "conversations": [{"from": "human", "value": forged}, {"from": "gpt", "value": "It is red."}],
    }
    with pytest.raises(InputError, match=r"bad#1.*differ at token"):
        run.mixture.format.branch(sample)


def test_only_answers_and_stop_tokens_are_labelled(workspace: Path, tmp_path: Path) -> None:
    run = _Run(recipe(workspace, tmp_path / "out"), resume=False)
    turns = [("human", "<image>\nWhat?"), ("gpt", "It is red."), ("human", "A picture?"), ("gpt", "white")]
    sample = {"id": "two", "conversations": [{"from": who, "value": text} for who, text in turns]}
    ids, labels = run.mixture.format.branch(sample)
    labelled = run.tokenizer.decode([label for label in labels if label >= 0])
    assert labelled == "It is red.<|im_end|>white<|im_end|>"
    assert run.tokenizer.decode(ids).endswith(
        "<|im_start|>user\nA picture?<|im_end|>\n<|im_start|>assistant\nwhite<|im_end|>"
    )
