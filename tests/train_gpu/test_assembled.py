"""A CLIP tower and a LLaMA put together: live pixels, both projectors, caches, the reference trainer's curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from llava_edge.convert import convert_checkpoint
from llava_edge.errors import InputError
from llava_edge.train_gpu.config import Recipe
from llava_edge.train_gpu.content_cache import ContentCache
from llava_edge.train_gpu.loop import Run, train
from llava_edge.train_gpu.model import pool_tokens
from llava_edge.train_gpu.prompts import IGNORE
from llava_edge.train_gpu.recipe_file import load_recipe
from llava_edge.train_gpu.samples import PictureRef, Skipped
from llava_edge.types import ImageSpec

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "white": (250, 250, 250)}
RECIPE = """
stage = "{stage}"
output = "{output}"
log_every = 1
[model]
llm = "{root}/llm"
vision_tower = "{root}/tower"
[data]
format = "vicuna_v1"
[data.sources.colours]
path = "{root}/samples.json"
[optim]
steps = 6
batch_size = 4
lr = 3e-3
betas = [0.9, 0.999]
[scale]
precision = "float32"
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """tower/, llm/, pictures and samples.json; every fourth sample is text alone, every third has two turns."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7
    )
    CLIPVisionModel(vision).save_pretrained(root / "tower")
    processor = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "size": {"shortest_edge": 28}}
    (root / "tower" / "preprocessor_config.json").write_text(json.dumps(processor))
    text = LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    samples = []
    for index in range(24):
        name = list(COLOURS)[index % 4]
        Image.new("RGB", (30 + index, 28), COLOURS[name]).save(root / f"{index}.png")
        turns = [("What colour is it?", f"It is {name}.")] + [("A picture?", "It is.")] * (index % 3 == 0)
        said = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        sample: dict[str, Any] = {"id": str(index), "conversations": said}
        if index % 4 < 3:
            sample["image"] = f"{index}.png"
            said[0]["value"] = "<image>\n" + said[0]["value"]
        samples.append(sample)
    (root / "samples.json").write_text(json.dumps(samples))
    return root


@pytest.fixture
def make(parts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(name: str, stage: str = "align", *changes: str) -> Recipe:
        path = tmp_path / f"{name}.toml"
        path.write_text(RECIPE.format(root=parts, output=tmp_path / name, stage=stage))
        return load_recipe(path, changes)

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).state_dict()


def moved(before: Path, after: Path) -> set[str]:
    first, second = weights(before), weights(after)
    return {name.removeprefix("model.").split(".")[0] for name in first if not torch.equal(first[name], second[name])}


def log_of(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(recipe.output + ".run") / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_align_leaves_llm_and_tower_bit_identical(make: Callable[..., Recipe], precision: str) -> None:
    recipe = make("align", "align", f"scale.precision={precision}", "data.packing=true", "optim.micro_batch_rows=1")
    output = train(recipe)
    assert moved(Path(recipe.output + ".run") / "init", output) == {"multi_modal_projector"}


def test_finetune_moves_projector_and_llm_and_the_tower_blocks_that_were_asked_for(make: Callable[..., Recipe]) -> None:
    first = make("one", "finetune", "scale.gradient_checkpointing=true")
    init = Path(first.output + ".run") / "init"
    assert moved(init, train(first)) == {"multi_modal_projector", "language_model", "lm_head"}
    second = make("two", "finetune", "model.tower_blocks=1")
    output = train(second)
    before, after = weights(init), weights(output)
    blocks = {n.split("layers.")[1][0] for n in before if "vision" in n and not torch.equal(before[n], after[n])}
    assert blocks == {"1"}  # of three blocks the last is not used by feature layer -2


@pytest.mark.parametrize(("precision", "near"), [("float32", 2e-3), ("bf16", 2e-2)])  # what is cached is in float16
def test_what_enters_the_trained_blocks_is_cached_and_changes_nothing(
    make: Callable[..., Recipe], tmp_path: Path, precision: str, near: float
) -> None:
    settings = ("finetune", "model.tower_blocks=1", f"scale.precision={precision}")
    live = make("live", *settings)
    cached = make("kept", *settings, f"data.cache_features={tmp_path / 'cache'}")
    losses = [[record["loss"] for record in (train(recipe), log_of(recipe))[1]] for recipe in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=near)
    before, after = weights(Path(cached.output + ".run") / "init"), weights(Path(cached.output))
    blocks = {n.split("layers.")[1][0] for n in before if "vision" in n and not torch.equal(before[n], after[n])}
    assert blocks == {"1"}


def test_a_linear_projector_stays_one_matrix_and_is_converted(make: Callable[..., Recipe], tmp_path: Path) -> None:
    output = train(make("linear", "align", "model.projector=linear", "optim.steps=3"))
    model = LlavaForConditionalGeneration.from_pretrained(output, dtype=torch.float32)
    projector = model.model.multi_modal_projector
    features = torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(projector(features), torch.nn.functional.linear(
            features, projector.linear_1.weight, projector.linear_1.bias))  # fmt: skip
    assert (output / "preprocessor_config.json").is_file()
    bundle = tmp_path / "bundle"
    parity = convert_checkpoint(output, bundle, llm_type="F16", mmproj_type="F16", vision="none")["parity"]
    assert parity["mmproj"]["F16"]["cosine_min"] >= 0.999


def test_a_changed_model_is_put_together_again_until_a_state_is_saved(make: Callable[..., Recipe]) -> None:
    def projector(*changes: str, resume: bool = False) -> torch.Tensor:
        init = Run(make("changed", "align", "optim.steps=1", *changes), resume=resume).init
        return weights(Path(init))["model.multi_modal_projector.linear_2.weight"]

    first = projector()
    assert torch.equal(projector(), first)
    assert not torch.equal(projector("seed=1"), first)
    assert torch.equal(projector("model.projector=linear"), torch.eye(48))
    train(make("changed", "align", "optim.steps=1", "model.projector=linear"))
    assert torch.equal(projector("model.projector=linear", resume=True), torch.eye(48))
    with pytest.raises(InputError, match=r"began with other parts.*changed: projector, seed"):
        projector("seed=1", resume=True)


def test_the_result_answers_in_plain_transformers_as_in_training(make: Callable[..., Recipe]) -> None:
    recipe = make("plain", "finetune", "optim.steps=2")
    run = Run(recipe)
    run.loop()
    batch = run.mixture.step(0).batches[0]
    ours = run.engine.trainee.eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(run.finish(), dtype=torch.float32).eval()
    with_picture = [row for row in range(4) if (batch.ids[row] == ours.image_token).any()]
    assert len(with_picture) >= 2
    for place, row in enumerate(with_picture):
        rows = {
            name: getattr(batch, name)[row : row + 1]
            for name in ("ids", "labels", "positions", "documents", "branches", "weights")
        }
        alone = replace(batch, **rows, pictures=batch.pictures[place : place + 1], n_pictures=1)
        real = batch.documents[row] > 0
        with torch.no_grad():
            expected = theirs(
                input_ids=batch.ids[row][real][None],
                pixel_values=batch.pictures[place][None],
                labels=batch.labels[row][real][None],
            ).loss
            torch.testing.assert_close(ours(alone) / alone.n_labels, expected, rtol=1e-4, atol=1e-5)


class _InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def reference_curve(recipe: Recipe, steps: int) -> list[float]:
    """transformers' Trainer on the same samples in the same order, padded."""
    run = Run(recipe)
    rows = []
    for number in range(steps):
        documents, _ = run.mixture.documents(number)
        for document in documents:
            pictures = [run.pictures.load(p) for p in document.pictures]
            rows.append({"ids": document.ids, "labels": document.labels, "pictures": pictures})

    def pad(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(f["ids"]) for f in features)
        fill = [width - len(f["ids"]) for f in features]
        batch = {
            "input_ids": torch.tensor([f["ids"] + [0] * n for f, n in zip(features, fill, strict=True)]),
            "labels": torch.tensor([f["labels"] + [IGNORE] * n for f, n in zip(features, fill, strict=True)]),
            "attention_mask": torch.tensor(
                [[1] * len(f["ids"]) + [0] * n for f, n in zip(features, fill, strict=True)]
            ),
        }
        pictures = [picture for f in features for picture in f["pictures"]]
        if pictures:
            batch["pixel_values"] = torch.from_numpy(np.stack(pictures))
        return batch

    model = LlavaForConditionalGeneration.from_pretrained(run.init, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=recipe.output + ".reference", max_steps=steps, per_device_train_batch_size=4,
        learning_rate=recipe.optim.lr, lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        optim="adamw_torch",
    )  # fmt: skip
    trainer = _InOrder(model=model, args=arguments, train_dataset=rows, data_collator=pad)  # type: ignore[arg-type]
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


STEPS = 50
CURVE = ("optim.steps=50", "optim.lr=1e-3", "optim.warmup_ratio=0.03", "optim.max_grad_norm=1.0")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_curve_is_that_of_transformers_trainer_on_one_process_and_two(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make("curve", "finetune", *CURVE)
    expected = reference_curve(recipe, STEPS)
    assert len(expected) == STEPS
    assert expected[-1] < 0.5 * expected[0]
    train(recipe)
    ours = [record["loss"] for record in log_of(recipe)]
    np.testing.assert_allclose(ours, expected, atol=1e-4)

    packed = make("packed", "finetune", *CURVE, "data.packing=true", "data.max_length=200", "optim.micro_batch_rows=1")
    train(packed)
    np.testing.assert_allclose([record["loss"] for record in log_of(packed)], expected, atol=1e-4)

    two = make("two", "finetune", *CURVE, "optim.micro_batch_rows=1")
    assert processes(2, tmp_path / "two.toml", *CURVE, "optim.micro_batch_rows=1").returncode == 0
    np.testing.assert_allclose([record["loss"] for record in log_of(two)], expected, atol=1e-4)
    assert json.loads((Path(two.output) / "recipe.json").read_text())["processes"] == 2


def processes(count: int, recipe: Path, *changes: str, resume: bool = False) -> subprocess.CompletedProcess[str]:
    options = [part for change in changes for part in ("--set", change)] + ["--resume"] * resume
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
        "-m", "llava_edge", "train", str(recipe), *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_sharded_run_resumes_and_equals_an_undivided_one(make: Callable[..., Recipe], tmp_path: Path) -> None:
    changes = ("scale.sharding=fsdp2", "save_every=3", "keep=9", "optim.micro_batch_rows=1")
    sharded = make("sharded", "finetune", *changes)
    assert processes(2, tmp_path / "sharded.toml", *changes).returncode == 0
    run, whole = Path(sharded.output + ".run"), weights(Path(sharded.output))
    assert (run / "step-00000003" / "shards").is_dir()
    (run / "last").write_text("step-00000003\n")
    assert processes(2, tmp_path / "sharded.toml", *changes, resume=True).returncode == 0
    resumed = weights(Path(sharded.output))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    undivided = weights(train(make("undivided", "finetune")))
    for name, expected in undivided.items():
        torch.testing.assert_close(whole[name], expected, rtol=1e-3, atol=1e-4)


def test_features_are_cached_by_content_and_train_as_pixels_do(make: Callable[..., Recipe], tmp_path: Path) -> None:
    live = make("live", "align")
    train(live)
    cached = make("cached", "align", f"data.cache_features={tmp_path / 'cache'}")
    train(cached)
    np.testing.assert_allclose([r["loss"] for r in log_of(cached)], [r["loss"] for r in log_of(live)], atol=2e-3)
    (folder,) = (tmp_path / "cache").iterdir()
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 18
    before = (folder / "features.f16").stat().st_mtime_ns
    again = make("again", "align", f"data.cache_features={tmp_path / 'cache'}")
    train(again)
    assert (folder / "features.f16").stat().st_mtime_ns == before
    other = make("other", "align", f"data.cache_features={tmp_path / 'cache'}", "data.image_mode=squash")
    train(other)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_was_cut_off_keeps_its_whole_rows(parts: Path, tmp_path: Path) -> None:
    spec = ImageSpec(size=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pictures = [PictureRef(f"{i}.png", parts / f"{i}.png") for i in range(3)]
    encoded = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return pixels[:, :2, 14, :3]

    def fill(count: int) -> ContentCache:
        cache = ContentCache(tmp_path, (2, 3))
        cache.fill(pictures[:count], encode, spec, Skipped(False))
        return cache

    first = [fill(2).find(picture).tolist() for picture in pictures[:2]]
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"conte')
    with (tmp_path / "features.f16").open("ab") as file:
        file.write(b"torn")
    cache = fill(3)
    assert encoded == [2, 1]
    assert [cache.find(picture).tolist() for picture in pictures[:2]] == first
    assert cache.find(pictures[2]).tolist() not in first
    with pytest.raises(InputError, match=r"5\.png are not in the cache"):
        cache.find(PictureRef("5.png", parts / "5.png"))


def test_nested_visual_tokens_pool_the_grid(make: Callable[..., Recipe]) -> None:
    recipe = make("nested", "align", "data.image_tokens=[16, 4]", "data.image_token_weights=[0.5, 0.5]")
    run = Run(recipe)
    counts = {run.mixture.image_tokens(step) for step in range(20)}
    assert counts == {16, 4}
    for step in range(4):
        batch = run.mixture.step(step).batches[0]
        tokens = int((batch.ids == run.engine.trainee.image_token).sum())
        assert tokens == batch.n_pictures * run.mixture.image_tokens(step)
    run.loop()
    described = json.loads((run.finish() / "llava_edge.json").read_text())
    assert described["visual_tokens"]["trained"] == [16, 4]


def test_answers_to_a_fixed_set_are_kept(make: Callable[..., Recipe], parts: Path) -> None:
    recipe = make(
        "dev", "finetune", f"dev.source.path={parts}/samples.json", "dev.every=40", "dev.count=4", "dev.max_tokens=8",
        "optim.steps=80", "optim.lr=5e-3",
    )  # fmt: skip
    train(recipe)
    lines = (Path(recipe.output + ".run") / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["step"] for a in answers] == [40] * 4 + [80] * 4
    assert answers[0]["expected"] == "It is red."
    assert [a["answer"] == a["expected"] for a in answers[4:]].count(True) >= 2


def test_a_tower_without_its_preprocessor_is_refused(make: Callable[..., Recipe], parts: Path, tmp_path: Path) -> None:
    CLIPVisionModel.from_pretrained(parts / "tower").save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        Run(make("bare", "align", f"model.vision_tower={tmp_path / 'bare'}"))
    with pytest.raises(InputError, match="transformers can't load"):
        Run(make("none", "align", "model.llm=/nowhere/at/all"))


def test_what_the_log_says_about_the_machine(make: Callable[..., Recipe]) -> None:
    recipe = make("meter", "align", "scale.peak_tflops=0.001", "data.packing=true", "data.max_length=300")
    train(recipe)
    for record in log_of(recipe):
        assert 0 < record["packing_efficiency"] <= 1
        assert 0 <= record["input_wait"] <= 1
        assert record["mfu"] > 0
        assert record["tokens_per_second"] > 0
        assert record["memory_bytes"] > 1e6
    assert (Path(recipe.output + ".run") / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_the_count_of_operations_is_what_pytorch_counts(make: Callable[..., Recipe], stage: str) -> None:
    run = Run(make("flops", stage, "scale.attention=eager"))
    batch = run.mixture.step(0).batches[0]
    with FlopCounterMode(display=False) as counter:
        run.engine.forward(batch).backward()
    # PyTorch also counts the half of the attention's square that no token sees, and padding.
    rows, width = batch.ids.shape
    unseen = 12 * 2 * 48 * rows * width**2 / 2
    padding = batch.ids.numel() / batch.real_tokens
    assert counter.get_total_flops() == pytest.approx((run.flops.count(batch) + unseen) * padding, rel=0.05)


def test_pooling_is_what_the_runtime_does() -> None:
    grid = torch.arange(16.0).reshape(1, 16, 1)
    assert pool_tokens(grid, 1).item() == 7.5
