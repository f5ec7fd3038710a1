"""Self-critical training: what the model writes is scored, and what scores well becomes likelier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from llava_edge.cider import CiderD
from llava_edge.errors import InputError
from llava_edge.train_gpu.config import Recipe, RewardConfig
from llava_edge.train_gpu.loop import Run, train
from llava_edge.train_gpu.prompts import IGNORE
from llava_edge.train_gpu.recipe_file import load_recipe
from llava_edge.train_gpu.reward import SelfCritic

RECIPE = """
stage = "finetune"
init = "{init}"
output = "{output}"
save_every = 5
log_every = 1
[data]
samples = "{root}/captions.json"
features = "{root}/features"
weights = {{ captions = 0.75, colours = 0.25 }}
image_tokens = [4]
image_token_weights = [1.0]
branches = 3
[optim]
steps = {steps}
lr = 5e-3
batch_size = 8
[lora]
rank = 4
alpha = 8
"""
REWARD = '[reward]\nsources = ["captions"]\ndraws = 4\nmax_tokens = 8\n'


@pytest.fixture(scope="module")
def captions(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captions.json: three captions of each picture, of which two say its colour first."""
    root = tmp_path_factory.mktemp("reward")
    (root / "features").symlink_to(workspace / "features")
    colours = json.loads((workspace / "samples.json").read_text())["colours"]
    every = []
    for sample in colours[1::2]:
        name = sample["conversations"][1]["value"]
        for number, text in enumerate((f"A {name} picture", f"A {name} picture", "white")):
            turns = [{"from": "human", "value": "<image>\nA picture?"}, {"from": "gpt", "value": text}]
            every.append({"id": f"{sample['id']}-{number}", "image": sample["image"], "conversations": turns})
    (root / "captions.json").write_text(json.dumps({"captions": every, "colours": colours}))
    (root / "start.toml").write_text(RECIPE.format(root=root, init=workspace / "base", output=root / "start", steps=60))
    train(load_recipe(root / "start.toml"))
    return root


def recipe(root: Path, output: Path, *overrides: str, steps: int = 12) -> Recipe:
    path = output.with_suffix(".toml")
    path.write_text(RECIPE.format(root=root, init=root / "start", output=output, steps=steps) + REWARD)
    return load_recipe(path, overrides)


def rewards(output: Path) -> list[float]:
    lines = (output.with_name(f"{output.name}.run") / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["reward"] for line in lines]


def test_answers_that_people_agree_on_become_likelier(captions: Path, tmp_path: Path) -> None:
    train(recipe(captions, tmp_path / "out", steps=40))
    found = rewards(tmp_path / "out")
    assert len(found) == 40
    assert sum(found[-8:]) > 1.2 * sum(found[:8])


def test_a_step_weighs_each_answer_by_how_far_it_lies_above_the_others(captions: Path, tmp_path: Path) -> None:
    run = Run(recipe(captions, tmp_path / "out", "reward.weight=2.0"))
    assert run.critic is not None
    step, score = run.critic.step(3)
    (batch,) = step.batches
    assert batch.weights is not None
    tokenizer, stop = run.tokenizer, run.critic.mixture.renderer.stop
    items = {item[0].pictures[0].name: item for item in run.mixture.items["captions"]}
    scorer = CiderD([[f"{s.turns[0][1]} endofcaption" for s in item] for item in items.values()])
    every, weights = [], []
    for row, name in enumerate(batch.names):
        picture, draws, _ = name.partition(" x 4")
        if not draws:  # of the other source: every label weighs 1
            assert (batch.weights[row][batch.labels[row] != IGNORE] == 1).all()
            continue
        references = [f"{sample.turns[0][1]} endofcaption" for sample in items[picture]]
        found = []
        for branch in range(1, 5):
            here = (batch.branches[row] == branch) & (batch.labels[row] != IGNORE)
            text = tokenizer.decode(batch.labels[row][here])
            assert here.sum() == 8 or text.endswith(stop)
            found.append(scorer.score(text.replace(stop, " endofcaption"), references))
            (weight,) = set(batch.weights[row][here].tolist())
            weights.append(weight)
        every.append(found)
    scores = torch.tensor(every)
    advantage = scores - (scores.sum(dim=1, keepdim=True) - scores) / 3
    expected = 2 * advantage / advantage.square().mean().sqrt()
    torch.testing.assert_close(torch.tensor(weights), expected.flatten())
    assert score == pytest.approx(float(scores.mean()))

    # The loss is the weighted sum of the labels' cross-entropies.
    with torch.no_grad():
        hidden, _ = run.engine.trainee._read(batch)
        logits = run.engine.trainee.head(hidden[:, :-1]).float()
        each = functional.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="none")
        assert run.engine.trainee(batch).item() == pytest.approx(float((each * batch.weights[:, 1:]).sum()), rel=1e-4)


def test_what_is_drawn_is_what_the_model_would_say_next(captions: Path, tmp_path: Path) -> None:
    """Nearly greedy draws through the cache are the greedy answers of whole passes without one."""
    run = Run(recipe(captions, tmp_path / "out", "reward.temperature=0.0001"))
    run.engine.forward.eval()
    assert run.critic is not None
    step, _ = run.critic.step(0)
    (batch,) = step.batches
    with torch.no_grad():
        hidden, _ = run.engine.trainee._read(batch)
        best = run.engine.trainee.head(hidden[:, :-1]).argmax(dim=-1)
    rewarded = [row for row, name in enumerate(batch.names) if name.endswith(" x 4")]
    assert rewarded
    for row in rewarded:
        # Every branch but the first begins behind the shared prompt, which predicts its first token.
        here = batch.labels[row, 1:] != IGNORE
        inside = here & (batch.branches[row, 1:] == batch.branches[row, :-1])
        assert inside.any()
        assert torch.equal(best[row][inside], batch.labels[row, 1:][inside])


def test_a_stopped_run_goes_on_as_if_it_had_not_been(captions: Path, tmp_path: Path) -> None:
    train(recipe(captions, tmp_path / "whole", steps=10))
    stopped = recipe(captions, tmp_path / "parts", steps=10)
    run = Run(stopped)
    for number in range(5):
        assert run.critic is not None
        step, _ = run.critic.step(number)
        run._update(step, step.n_labels)
        run.step += 1
    run.save()
    resumed = Run(stopped, resume=True)
    resumed.loop()
    resumed.finish()
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_what_cant_be_rewarded_is_said(captions: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reward.sources names \['photos'\]"):
        Run(recipe(captions, tmp_path / "a", "reward.sources=['photos']"))
    with pytest.raises(InputError, match=r"data\.branches above 1"):
        recipe(captions, tmp_path / "b", "data.branches=1")
    with pytest.raises(InputError, match=r"reward\.draws is 1"):
        recipe(captions, tmp_path / "c", "reward.draws=1")
    several = Run(recipe(captions, tmp_path / "d"))
    several.engine.accelerator.state._shared_state["num_processes"] = 2
    try:
        with pytest.raises(InputError, match="one process; there are 2"):
            SelfCritic(RewardConfig(("captions",)), several.mixture, several.engine, 0)
    finally:
        several.engine.accelerator.state._shared_state["num_processes"] = 1
