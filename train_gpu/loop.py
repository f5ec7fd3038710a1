"""The training loop: one recipe, one stage, from checkpoint to checkpoint."""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from llava_edge.errors import InputError, LlavaEdgeError
from llava_edge.train_gpu import build, checkpoint, provenance
from llava_edge.train_gpu.answers import DevSet
from llava_edge.train_gpu.content_cache import ContentCache, tower_key
from llava_edge.train_gpu.data import Mixture, Step, ahead
from llava_edge.train_gpu.engine import Engine
from llava_edge.train_gpu.features import FeatureCache, cached_shape, frozen_features
from llava_edge.train_gpu.flops import FlopCounter
from llava_edge.train_gpu.journal import Journal, LossGuard
from llava_edge.train_gpu.meter import Meter
from llava_edge.train_gpu.model import Trainee, merge_into
from llava_edge.train_gpu.optim import learning_rate_factor, make_optimizer, warmup_share
from llava_edge.train_gpu.pictures import CachedPictures, Pictures, PixelPictures
from llava_edge.train_gpu.precision import uses_bfloat16
from llava_edge.train_gpu.prompts import Renderer
from llava_edge.train_gpu.reward import MakeScore, SelfCritical
from llava_edge.train_gpu.samples import Sample, Skipped, read_source, read_sources

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from llava_edge.train_gpu.config import Recipe

log = logging.getLogger(__name__)


class Stopped(LlavaEdgeError):
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; the state of step {step} is saved", hint="Go on with --resume.")
        self.exit_code = 128 + number


def train(recipe: Recipe, *, resume: bool = False, make_score: MakeScore | None = None) -> Path:
    """Run a recipe and return the directory of the finished checkpoint. ``make_score`` judges what ``reward`` draws.

    The state is saved every ``save_every`` steps in ``OUTPUT.run``, together with the log; ``resume`` goes on from
    there with weights, optimiser, schedule, order of the data and random state as they were. Under ``torchrun`` or
    ``accelerate launch`` every process calls this.

    Raises
    ------
    InputError
        Something in the recipe or the data is wrong.
    TrainingError
        The loss is no number, or jumped.
    Stopped
        SIGTERM or SIGINT came; the state is saved.
    """
    run = Run(recipe, resume=resume, make_score=make_score)
    run.loop()
    return run.finish()


class Run:
    """One run of a recipe, from loading to the finished checkpoint."""

    def __init__(self, recipe: Recipe, *, resume: bool = False, make_score: MakeScore | None = None) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        output = Path(recipe.output)
        self.directory = output.with_name(f"{output.name}.run")
        state = checkpoint.last_state(self.directory) if resume else None
        if not resume and (self.directory / checkpoint.MARKER).exists():
            raise InputError(
                f"{self.directory} holds the state of an earlier run, {checkpoint.last_state(self.directory).name}",
                hint="Go on from it with --resume, or remove the folder to begin again.",
            )
        self.init = _starting_checkpoint(recipe, self.directory, resumed=resume)
        model = build.load_model(self.init)
        self.tokenizer = build.load_tokenizer(self.init)
        before = build.read_or_make_description(self.init, model, self.tokenizer, recipe.data)
        self.spec = build.image_spec(before, recipe.data.image_mode)
        self.description = build.trained_description(before, self.spec, self.tokenizer, recipe.data)
        self.skipped = Skipped(recipe.data.skip_bad)
        sources = read_sources(recipe.data, self.skipped)
        renderer = Renderer(self.tokenizer, recipe.data.format, model.config.image_token_id)
        named = FeatureCache(Path(recipe.data.features)) if recipe.data.features else None
        if named and not recipe.data.skip_bad:
            every = (sample for samples in sources.values() for sample in samples)
            named.require(picture.name for sample in every for picture in sample.pictures)
        self.pictures = self._pictures(model, named)
        blocks = named.blocks if named else recipe.model.tower_blocks
        if named and recipe.model.tower_blocks > blocks:
            raise InputError(
                f"model.tower_blocks is {recipe.model.tower_blocks}, but the features in {recipe.data.features} "
                f"leave {blocks} blocks of the tower to be run"
            )
        statistics = named.statistics(model.model.vision_tower, model.config) if named else None
        trainee = Trainee(model, recipe, live_tower=not self.pictures.are_features, blocks=blocks)
        if statistics:  # features of one cache, whose statistics are at hand
            trainee.standardise(*statistics)
        self.flops = FlopCounter(trainee)
        del model
        self.engine = Engine(trainee, make_optimizer(trainee, recipe.optim), recipe.scale)
        torch.manual_seed(recipe.seed + self.engine.rank)  # the same weights everywhere, other dropout
        self.mixture = Mixture(
            sources, self.pictures, renderer, recipe.data, recipe.optim,
            grid_tokens=before["visual_tokens"]["full"], seed=recipe.seed, skipped=self.skipped,
        )  # fmt: skip
        asked = read_source(recipe.dev.source, self.skipped)[: recipe.dev.count] if recipe.dev else []
        self._fill_cache(asked)
        self.dev = DevSet(asked, recipe, renderer, self.mixture) if asked else None
        self.reward = self._reward(make_score)
        self.guard = LossGuard(self.directory, recipe.optim.spike_factor, writes=self.engine.main)
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None  # the step whose state is on the disk
        if state is not None:
            self._restore(state)
        self.journal = Journal(self.directory, self.step) if self.engine.main else None
        if self.engine.main:
            if state is not None:
                provenance.warn_of_changes(self.directory, recipe)
            provenance.write(self.directory, recipe, self.engine.world)

    def _pictures(self, model: LlavaForConditionalGeneration, named: FeatureCache | None) -> Pictures:
        data = self.recipe.data
        if named:
            return CachedPictures(named)
        if not data.cache_features:
            return PixelPictures(self.spec)
        config = model.config
        blocks = self.recipe.model.tower_blocks
        tower = model.model.vision_tower
        # Blocks that are trained become float32, and with FSDP parts of themselves: then the cache needs its own tower.
        self._tower = copy.deepcopy(tower) if blocks else tower
        key = tower_key(self._tower, config, self.spec, uses_bfloat16(self.recipe.scale), blocks)
        return CachedPictures(ContentCache(Path(data.cache_features) / key, cached_shape(config, blocks)))

    def _reward(self, make_score: MakeScore | None) -> SelfCritical | None:
        if self.recipe.reward is None:
            return None
        if make_score is None:
            raise InputError("the recipe has a reward, and no score was given to judge the draws by")
        if self.engine.world > 1:
            raise InputError(f"reward runs in one process; there are {self.engine.world}")
        return SelfCritical(self.recipe, self.mixture, make_score)

    def _fill_cache(self, more: list[Sample]) -> None:
        """Encode the pictures that a content cache lacks, on the main process."""
        if not self.recipe.data.cache_features or not isinstance(self.pictures, CachedPictures):
            return
        cache, device = self.pictures.cache, self.engine.device
        assert isinstance(cache, ContentCache)
        dtype = torch.bfloat16 if self.engine.trainee.bf16 else torch.float32
        tower, config = self._tower.to(device, dtype), self.engine.trainee.config

        @torch.inference_mode()
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return frozen_features(tower, config, pixels.to(device, dtype), self.recipe.model.tower_blocks)

        if self.engine.main:
            every = (picture for sample in (*self.mixture.samples, *more) for picture in sample.pictures)
            cache.fill(every, encode, self.spec, self.skipped)
        del self._tower
        self.engine.wait()
        cache.reopen()

    def progress(self) -> float:
        """From 0 to 1, by steps or by time, whichever is further on."""
        minutes = self.recipe.optim.max_minutes
        return max(self.step / self.mixture.steps, self.seconds / (60 * minutes) if minutes else 0.0)

    def loop(self) -> None:
        """Run until the steps or the minutes are over."""
        recipe, engine = self.recipe, self.engine
        count = sum(p.numel() for p in engine.trained)
        log.info("%s: %.2f M trained parameters, %d samples", recipe.stage, count / 1e6, self.mixture.n_items)
        engine.forward.train()
        steps = ahead(
            lambda number: self.mixture.step(number, engine.rank, engine.world),
            self.step, self.mixture.steps, recipe.data.workers,
        )  # fmt: skip
        meter = Meter(self)
        with closing(steps), _signals() as caught:
            while self.progress() < 1:
                began = time.monotonic()
                step = next(steps)
                meter.waited += time.monotonic() - began
                if self.reward is not None:
                    drawn, meter.score = self.reward.draw(engine.trainee, self.step)
                    step = replace(step, drawn=tuple(drawn))
                labels, stop, *counts = engine.sum([step.n_labels, caught.number, *meter.counts(step)])
                if stop:
                    self.save()
                    raise Stopped(caught.number or signal.SIGTERM, self.step)
                loss, norm, factor = self._update(step, labels)
                self.step += 1
                spent = time.monotonic() - began
                self.seconds += engine.sum([spent if engine.main else 0.0])[0]
                meter.add(loss, norm, counts, spent)
                if self.step % recipe.log_every == 0 or self.progress() >= 1:
                    meter.write(factor)
                if self.dev is not None and recipe.dev is not None and self.step % recipe.dev.every == 0:
                    self._answer()
                if self.step % recipe.save_every == 0:
                    self.save()

    def _update(self, step: Step, labels: float) -> tuple[float, float, float]:
        """One optimiser step. Returns the mean loss of its labels, the gradient's norm, the schedule's factor."""
        engine, optim = self.engine, self.recipe.optim
        factor = learning_rate_factor(self.progress(), warmup_share(self.mixture.steps, optim.warmup_ratio))
        for group in engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        # Processes average their gradients; the loss is the mean over the labels of all of them.
        scale = engine.world / max(labels, 1)
        total = torch.zeros((), device=engine.device)
        for number, batch in enumerate(step.batches, start=1):
            with engine.accumulate(last=number == len(step.batches)):
                loss = engine.forward(batch.to(engine.device))
                (loss * scale).backward()
            total += loss.detach()
        for batch in step.drawn:
            engine.forward(batch.to(engine.device)).backward()
        mean = engine.sum([float(total)])[0] / max(labels, 1)
        norm = engine.clip(optim.max_grad_norm)
        self.guard.check(self.step, mean, norm, step.names)
        engine.optimizer.step()
        engine.optimizer.zero_grad(set_to_none=True)
        return mean, norm, factor

    def _answer(self) -> None:
        assert self.dev is not None
        answers = self.dev.ask(self.engine)
        if self.journal is not None:
            self.journal.answers(self.step, answers)

    def save(self) -> None:
        """Save the state of this step, unless that is done; every process calls it."""
        if self.saved == self.step:
            return
        if self.engine.main:
            checkpoint.begin_state(self.directory, self.step)
        self.engine.wait()
        values = {"step": self.step, "seconds": self.seconds, "recent": list(self.guard.recent)}
        self.engine.save(checkpoint.partial_state(self.directory, self.step), values)
        self.engine.wait()
        if self.engine.main:
            checkpoint.commit_state(self.directory, self.step, self.recipe.keep)
        self.engine.wait()
        self.saved = self.step

    def _restore(self, state: Path) -> None:
        values = self.engine.restore(state)
        self.step, self.seconds = values["step"], values["seconds"]
        self.saved = self.step
        self.guard.recent.extend(values["recent"])
        log.info("resumed at step %d", self.step)

    def finish(self) -> Path:
        """Save the last state, write the finished checkpoint, draw the curve."""
        self.save()
        output = Path(self.recipe.output)
        trainee = self.engine.trainee
        if self.engine.sharded:
            weights = self.engine.whole_weights()
            if self.engine.main:
                shift, scale = trainee.feature_shift.cpu(), trainee.feature_scale.cpu()
                trainee = Trainee(
                    build.load_model(self.init),
                    self.recipe,
                    live_tower=trainee.tower is not None,
                    blocks=trainee.blocks,
                )
                trainee.load_state_dict(weights, strict=False)
                trainee.feature_shift.copy_(shift)
                trainee.feature_scale.copy_(scale)
        if self.journal is not None:
            model = build.load_model(self.init)
            merge_into(trainee, model)
            saved = json.loads((self.directory / "recipe.json").read_text())
            checkpoint.save_checkpoint(output, model, self.tokenizer, self.description, saved)
            build.copy_companions(self.init, output)
            self.journal.close()
            log.info("%d steps in %.0f s, saved as %s", self.step, self.seconds, output)
            if self.skipped.count:
                log.warning("%d samples were skipped", self.skipped.count)
        self.engine.wait()
        return output


class _Caught:
    number = 0


@contextmanager
def _signals() -> Generator[_Caught]:
    """SIGTERM and the first SIGINT are noted, for the loop to save and leave; a second SIGINT interrupts at once."""
    caught = _Caught()

    def note(number: int, frame: FrameType | None) -> None:
        if caught.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.number = number
        log.warning("%s: saving after this step", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _starting_checkpoint(recipe: Recipe, directory: Path, *, resumed: bool) -> str:
    if recipe.init is not None:
        return recipe.init
    target, wanted = directory / "init", build.parts_record(recipe.model, recipe.seed)
    if resumed and (target / checkpoint.DESCRIPTION).is_file():
        before = build.made_of(target) or wanted  # runs of earlier versions kept no record
        if changed := sorted(name for name, value in wanted.items() if before.get(name) != value):
            raise InputError(
                f"the run began with other parts than the recipe's [model] and seed; changed: {', '.join(changed)}",
                hint=f"Go on with the recipe as it was, or remove {directory} to begin again.",
            )
        return str(target)
    if os.environ.get("RANK", "0") == "0":  # before the processes know each other
        build.assemble_into(target, recipe.model, recipe.data, recipe.seed)
    deadline = time.monotonic() + 3600
    while build.made_of(target) != wanted:
        if time.monotonic() > deadline:
            raise InputError(f"the first process has not written {target} within an hour")
        time.sleep(1)
    return str(target)
