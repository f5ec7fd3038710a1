"""Nothing is lost: a killed run goes on bit for bit, a signal saves first, a bad loss names its samples."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_edge.errors import InputError
from llava_edge.train_gpu import checkpoint
from llava_edge.train_gpu.config import Recipe
from llava_edge.train_gpu.journal import LossGuard, TrainingError
from llava_edge.train_gpu.loop import Run, Stopped, train

RECIPE = """
stage = "finetune"
init = "{root}/base"
output = "{output}"
save_every = 3
log_every = 1
[data]
samples = "{root}/samples.json"
features = "{root}/features"
image_tokens = [16, 4]
image_token_weights = [0.5, 0.5]
[optim]
steps = 30
lr = 3e-3
batch_size = 4
[lora]
rank = 4
alpha = 8
dropout = 0.1
"""


def weights(directory: Path | str) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).state_dict()


def equal(first: Path | str, second: Path | str) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(recipe: Recipe, *, resume: bool) -> BaseProcess:
    """A run in a process of its own, from a server that has loaded PyTorch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llava_edge.train_gpu.loop"])
    process = context.Process(target=train, args=(recipe,), kwargs={"resume": resume}, daemon=True)
    process.start()
    return process


def wait_for(happened: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while not happened() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def steps_done(run: Path) -> int:
    log = run / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_run_killed_at_ten_moments_gives_the_uninterrupted_weights(make: Callable[..., Recipe]) -> None:
    whole = train(make("whole"))
    recipe = make("killed")
    run = Path(recipe.output + ".run")

    def saving() -> bool:
        return any(run.glob("step-*.partial"))

    kills = 0
    # In the middle of steps, while a state is being written, and right after one was.
    for moment in (2, saving, 7, 9, saving, 13, saving, 19, 24, saving):
        process = start(recipe, resume=(run / checkpoint.MARKER).exists())
        wait_for((lambda n=moment: steps_done(run) >= n) if isinstance(moment, int) else moment, process)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
    assert kills == 10
    assert not Path(recipe.output).exists()
    train(recipe, resume=(run / checkpoint.MARKER).exists())
    assert equal(whole, recipe.output)
    log = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, 31))


def test_sigterm_saves_and_the_run_goes_on(make: Callable[..., Recipe]) -> None:
    recipe = make("stopped", "save_every=1000")
    run = Path(recipe.output + ".run")
    process = start(recipe, resume=False)
    wait_for(lambda: steps_done(run) >= 4, process)
    process.terminate()
    process.join()
    assert process.exitcode == 1
    assert checkpoint.last_state(run).name >= "step-00000004"
    train(recipe, resume=True)
    assert equal(train(make("through")), recipe.output)


def test_a_signal_in_this_process_ends_the_loop_with_words(make: Callable[..., Recipe]) -> None:
    recipe = make("here", "save_every=1000")
    run = Run(recipe)
    update = run._update

    def update_and_stop(*arguments: Any) -> Any:
        if run.step == 2:
            os.kill(os.getpid(), 15)
        return update(*arguments)

    run._update = update_and_stop  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="stopped by SIGTERM; the state of step 3 is saved") as caught:
        run.loop()
    assert caught.value.exit_code == 143


def test_only_the_last_states_are_kept(make: Callable[..., Recipe]) -> None:
    recipe = make("kept", "keep=3", "optim.steps=14")
    train(recipe)
    run = Path(recipe.output + ".run")
    assert sorted(p.name for p in run.glob("step-*")) == ["step-00000009", "step-00000012", "step-00000014"]
    assert (run / "last").read_text() == "step-00000014\n"


def test_a_step_is_saved_once(make: Callable[..., Recipe]) -> None:
    run = Run(make("once", "optim.steps=3"))
    run.loop()
    state = checkpoint.last_state(run.directory)
    saved = state.stat().st_ino
    run.finish()
    assert state.stat().st_ino == saved
    again = Run(make("once", "optim.steps=3"), resume=True)
    again.loop()
    again.finish()
    assert state.stat().st_ino == saved


def test_a_state_takes_the_place_of_an_earlier_one_of_its_step(tmp_path: Path) -> None:
    for text in ("old", "new"):
        checkpoint.begin_state(tmp_path, 7)
        (checkpoint.partial_state(tmp_path, 7) / "run.pt").write_text(text)
        checkpoint.commit_state(tmp_path, 7, keep=2)
    assert (checkpoint.last_state(tmp_path) / "run.pt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000007"]


def test_what_the_recipe_says_of_the_optimiser_holds_after_a_resume(make: Callable[..., Recipe]) -> None:
    train(make("rate", "optim.steps=3"))
    changes = ("optim.lr=1e-4", "optim.projector_lr=2e-4", "optim.weight_decay=0.1", "optim.betas=[0.8, 0.9]")
    run = Run(make("rate", "optim.steps=4", *changes), resume=True)
    assert run.step == 3
    groups = run.engine.optimizer.param_groups
    assert sorted(group["base_lr"] for group in groups) == [1e-4, 2e-4]
    assert {(group["weight_decay"], tuple(group["betas"])) for group in groups} == {(0.1, (0.8, 0.9))}
    assert all(float(state["step"]) == 3 for state in run.engine.optimizer.state.values())


def test_a_resume_that_has_nothing_to_go_on_from_says_so(make: Callable[..., Recipe]) -> None:
    recipe = make("never")
    with pytest.raises(InputError, match="nothing to resume"):
        train(recipe, resume=True)
    train(make("other", "optim.steps=3"))
    with pytest.raises(InputError, match="holds the state of an earlier run, step-00000003"):
        train(make("other", "optim.steps=3"))
    with pytest.raises(InputError, match="other weights"):
        train(make("other", "lora.rank=8"), resume=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_no_number_stops_the_run_and_names_its_samples(make: Callable[..., Recipe]) -> None:
    recipe = make("nan", "optim.steps=5")
    run = Run(recipe)
    names = run.mixture.step(0).names
    with torch.no_grad():
        run.engine.trainee.projector.linear_2.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is nan.*bad-step-00000000\.json"):
        run.loop()
    record = json.loads((Path(recipe.output + ".run") / "bad-step-00000000.json").read_text())
    assert record["samples"] == list(names)


def test_a_jump_of_the_loss_stops_the_run(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path, 5.0)
    for step in range(50):
        guard.check(step, 2.0, 1.0, ("a",))
    guard.check(50, 9.0, 1.0, ("b",))
    with pytest.raises(TrainingError, match="jumped to 11"):
        guard.check(51, 11.0, 1.0, ("c",))
    LossGuard(tmp_path, 0.0).check(0, 1e9, 1.0, ())
