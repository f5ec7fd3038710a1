"""Real tokens a second against transformers' Trainer with padding: ``python -m llava_edge.train_gpu.benchmark --help``.

Both train the same LLaVA of random weights on the same samples in the same order, in one process, one after the
other, with AdamW and gradients at every step. The lengths are spread like those of instruction data: a picture's
tokens, a text whose length is log-normal (median 120 tokens, sigma 1.1 at full size), one sample of sixteen without a
picture. The Trainer gets samples that are tokenised and pictures that are decoded beforehand; the loop does both while
it runs.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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

from llava_edge.train_gpu.loop import Run
from llava_edge.train_gpu.prompts import IGNORE
from llava_edge.train_gpu.recipe_file import load_recipe
from llava_edge.train_gpu.rows import Document


@dataclass(frozen=True)
class Size:
    """A model and its rows. The grid has ``grid`` x ``grid`` patches; ``batch`` is samples a step."""

    width: int
    layers: int
    heads: int
    hidden: int
    grid: int
    max_length: int
    batch: int
    trainer_batch: int
    rows: int


SIZES = {
    "tiny": Size(64, 2, 2, 128, 4, 128, 16, 8, 4),
    "cpu": Size(512, 8, 8, 1408, 12, 512, 32, 8, 2),
    "0.5b": Size(1024, 24, 16, 4096, 24, 2048, 64, 8, 8),
    "1.5b": Size(2048, 24, 16, 5632, 24, 2048, 64, 8, 4),
}
SKIPPED_STEPS = 2
"""Steps at the beginning that are not counted: they allocate, compile and warm caches up."""


def write_parts(root: Path, size: Size, steps: int, seed: int) -> None:
    """``llm``, ``tower``, pictures and ``samples.json`` of a benchmark."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=8 * size.grid,
        patch_size=8,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(root / "tower")
    (root / "tower" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5,0.5,0.5], "image_std": [0.3,0.3,0.3]}'
    )
    letters = [*"abcdefghijklmnopqrstuvwxyz", "<unk>", "</s>"]
    plain = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.decoder = decoders.Fuse()
    plain.add_special_tokens([AddedToken("</s>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", unk_token="<unk>").save_pretrained(root / "llm")
    text = LlamaConfig(
        vocab_size=32064, hidden_size=size.width, intermediate_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, bos_token_id=None,
        eos_token_id=len(letters) - 1,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(root / "llm")
    rng = random.Random(seed)
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (8 * size.grid, 8 * size.grid, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    samples = [_sample(rng, number, size) for number in range(size.batch * steps)]
    (root / "samples.json").write_text(json.dumps(samples))


def _sample(rng: random.Random, number: int, size: Size) -> dict[str, Any]:
    scale = size.max_length / 2048
    length = max(4, min(int(rng.lognormvariate(4.8, 1.1) * scale), size.max_length - size.grid**2 - 16))
    words = " ".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
    picture = number % 16 != 0
    question = f"{'<image>' if picture else ''}\na b"
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": words}]
    return {"id": str(number), "conversations": said} | ({"image": f"{number % 16}.png"} if picture else {})


def recipe_text(root: Path, size: Size, steps: int, precision: str) -> str:
    """The recipe of the loop's part."""
    return f"""
stage = "finetune"
output = "{root}/out"
log_every = 1
save_every = 1000000
[model]
llm = "{root}/llm"
vision_tower = "{root}/tower"
[data]
format = "mistral_instruct"
packing = true
max_length = {size.max_length}
[data.sources.mix]
path = "{root}/samples.json"
[optim]
steps = {steps}
batch_size = {size.batch}
micro_batch_rows = {size.rows}
lr = 1e-5
betas = [0.9, 0.999]
spike_factor = 0
[scale]
precision = "{precision}"
"""


def measure_loop(run: Run) -> dict[str, Any]:
    """Train with the loop and read its own log."""
    run.loop()
    log = (run.directory / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log][SKIPPED_STEPS:]
    seconds = sum(record["step_seconds"] for record in records)
    tokens = sum(record["tokens_per_second"] * record["step_seconds"] for record in records)
    measured = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    for name in ("packing_efficiency", "mfu"):
        values = [record[name] for record in records if record[name] is not None]
        measured[name] = float(np.mean(values)) if values else None
    return measured


class _Timed(Trainer):  # type: ignore[misc]
    """Keeps the samples' order and the time at which each optimiser step began."""

    began: list[float]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        self.began.append(time.monotonic())
        return super().training_step(*arguments, **options)


def measure_trainer(run: Run, size: Size, steps: int) -> dict[str, float]:
    """Train the same documents, padded, with transformers' Trainer."""
    rows = [document for step in range(steps) for document in run.mixture.documents(step)[0]]
    pictures = {picture: run.pictures.load(picture) for row in rows for picture in row.pictures}

    def pad(batch: Sequence[Document]) -> dict[str, torch.Tensor]:
        width = max(map(len, batch))
        made = {
            "input_ids": torch.tensor([row.ids + [0] * (width - len(row)) for row in batch]),
            "labels": torch.tensor([row.labels + [IGNORE] * (width - len(row)) for row in batch]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch]),
        }
        found = [pictures[picture] for row in batch for picture in row.pictures]
        return made | ({"pixel_values": torch.from_numpy(np.stack(found))} if found else {})

    model = LlavaForConditionalGeneration.from_pretrained(run.init, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    passes = size.batch // size.trainer_batch
    arguments = TrainingArguments(
        output_dir=str(run.directory / "trainer"), max_steps=steps, per_device_train_batch_size=size.trainer_batch,
        gradient_accumulation_steps=passes, learning_rate=1e-5, lr_scheduler_type="cosine", save_strategy="no",
        report_to=[], use_cpu=not torch.cuda.is_available(), bf16=run.engine.trainee.bf16, disable_tqdm=True,
        remove_unused_columns=False, logging_strategy="no", optim="adamw_torch_fused",
    )  # fmt: skip
    trainer = _Timed(model=model, args=arguments, train_dataset=rows, data_collator=pad)
    trainer.began = []
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.monotonic() - trainer.began[SKIPPED_STEPS * passes]
    counted = rows[SKIPPED_STEPS * size.batch :]
    tokens = sum(map(len, counted))
    size_b = size.trainer_batch
    padded = sum(
        max(map(len, counted[at : at + size_b])) * len(counted[at : at + size_b])
        for at in range(0, len(counted), size_b)
    )
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "packing_efficiency": tokens / padded,
    }


@click.command()
@click.option("--size", "name", type=click.Choice(list(SIZES)), default="cpu", show_default=True)
@click.option("--steps", type=click.IntRange(4), default=12, show_default=True)
@click.option("--precision", type=click.Choice(["auto", "bf16", "float32"]), default="auto", show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--loop-only", is_flag=True, help="Leave the Trainer out.")
@click.option("--profile", type=click.Path(path_type=Path), help="Write where the loop's time goes, as a table.")
def main(name: str, steps: int, precision: str, seed: int, loop_only: bool, profile: Path | None) -> None:
    """Print both speeds and their ratio as one JSON object."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_parts(root, size, steps, seed)
        (root / "recipe.toml").write_text(recipe_text(root, size, steps, precision))
        run = Run(load_recipe(root / "recipe.toml"))
        result: dict[str, Any] = {"size": name, "steps": steps, "seed": seed}
        result["precision"] = "bf16" if run.engine.trainee.bf16 else "float32"
        result["parameters"] = sum(p.numel() for p in run.engine.trainee.parameters())
        if profile is None:
            result["loop"] = measure_loop(run)
        else:
            with torch.profiler.profile() as profiler:
                result["loop"] = measure_loop(run)
            profile.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
        if not loop_only:
            result["trainer"] = measure_trainer(run, size, steps)
            result["ratio"] = result["loop"]["tokens_per_second"] / result["trainer"]["tokens_per_second"]
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
