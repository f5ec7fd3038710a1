"""The training loop: one recipe, one stage, from checkpoint to checkpoint."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from llava_edge.errors import LlavaEdgeError
from llava_edge.train_gpu import checkpoint
from llava_edge.train_gpu.config import OptimConfig, Recipe
from llava_edge.train_gpu.data import Mixture
from llava_edge.train_gpu.features import FeatureCache
from llava_edge.train_gpu.model import Trainee, merge_into

log = logging.getLogger(__name__)


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up over the first part of the run, then a cosine to 0. ``progress`` runs from 0 to 1."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Run a recipe and return the directory of the finished checkpoint.

    The state is saved every ``save_every`` steps in ``OUTPUT.run``, together with ``log.jsonl``; ``resume`` goes
    on from there with the weights, the optimiser, the schedule and the order of the data as they were.
    """
    run = _Run(recipe, resume)
    run.loop()
    return run.finish()


class _Run:
    def __init__(self, recipe: Recipe, resume: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.directory = Path(recipe.output + ".run")
        self.tokenizer = AutoTokenizer.from_pretrained(recipe.init)
        self.features = FeatureCache(Path(recipe.data.features))
        samples = json.loads(Path(recipe.data.samples).read_text())
        self.mixture = Mixture(
            samples, self.features, self.tokenizer, recipe.data, recipe.optim.batch_size, recipe.seed
        )
        self.trainee = Trainee(_load_model(recipe.init), recipe.lora)
        mean, std = self.features.statistics()
        self.trainee.standardise(torch.from_numpy(mean), torch.from_numpy(std))
        self.optimizer = _optimizer(self.trainee, recipe.optim)
        self.step = 0
        self.seconds = 0.0
        if resume:
            self._restore()
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "recipe.json").write_text(json.dumps(recipe.to_dict(), indent=2) + "\n")

    def progress(self) -> float:
        """From 0 to 1, by steps or by time, whichever is further on."""
        optim = self.recipe.optim
        by_time = self.seconds / (60 * optim.max_minutes) if optim.max_minutes else 0.0
        return max(self.step / optim.steps, by_time)

    def loop(self) -> None:
        recipe, optim = self.recipe, self.recipe.optim
        trained = [p for p in self.trainee.parameters() if p.requires_grad]
        log.info("%s: %.2f M trained parameters", recipe.stage, sum(p.numel() for p in trained) / 1e6)
        self.trainee.train()
        batches = self.mixture.from_step(self.step)
        while self.progress() < 1:
            began = time.monotonic()
            batch = next(batches)
            factor = learning_rate_factor(self.progress(), optim.warmup_ratio)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            with torch.autocast("cpu", torch.bfloat16):
                total, labels = self.trainee(batch)
            loss = total / labels
            if not torch.isfinite(loss):
                raise LlavaEdgeError(
                    f"the loss is {loss.item()} at step {self.step}; pictures of the batch: {', '.join(batch.names)}",
                    hint="Lower optim.lr, or look at these samples.",
                )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.seconds += time.monotonic() - began
            if self.step % recipe.log_every == 0:
                self._log(loss.item(), float(norm), factor, labels, time.monotonic() - began)
            if self.step % recipe.save_every == 0:
                self._save()

    def _log(self, loss: float, norm: float, factor: float, labels: int, seconds: float) -> None:
        record = {
            "step": self.step,
            "loss": round(loss, 4),
            "grad_norm": round(norm, 3),
            "lr_factor": round(factor, 4),
            "labels": labels,
            "step_seconds": round(seconds, 3),
            "total_seconds": round(self.seconds, 1),
            "progress": round(self.progress(), 4),
        }
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        log.info("%s", record)

    def _save(self) -> None:
        state: dict[str, Any] = {
            "weights": self.trainee.trained_state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        checkpoint.save_state(self.directory, state)

    def _restore(self) -> None:
        state = checkpoint.load_state(self.directory)
        self.trainee.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"])
        log.info("resumed at step %d", self.step)

    def finish(self) -> Path:
        self._save()
        output = Path(self.recipe.output)
        model = _load_model(self.recipe.init)
        merge_into(self.trainee, model)
        description = checkpoint.read_description(Path(self.recipe.init))
        checkpoint.save_checkpoint(output, model, self.tokenizer, description, self.recipe.to_dict())
        log.info("%d steps in %.0f s, saved as %s", self.step, self.seconds, output)
        return output


def _load_model(path: str) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)


def _optimizer(trainee: Trainee, optim: OptimConfig) -> torch.optim.AdamW:
    projector = [p for p in trainee.projector.parameters() if p.requires_grad]
    adapters = [p for p in trainee.llm.parameters() if p.requires_grad]
    groups = [{"params": projector, "base_lr": optim.projector_lr or optim.lr}]
    if adapters:
        groups.append({"params": adapters, "base_lr": optim.lr})
    return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, betas=(0.9, 0.98))
