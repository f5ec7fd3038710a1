"""Learning from a score of what the model draws: the loss is what it says, the score rises, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from llava_edge.bench.tasks.cider import CiderD
from llava_edge.cli import cli
from llava_edge.errors import InputError
from llava_edge.train_gpu.config import Recipe, RewardConfig
from llava_edge.train_gpu.loop import Run, Stopped, train
from llava_edge.train_gpu.prompts import IGNORE, Tokens
from llava_edge.train_gpu.reward import Score, advantages
from llava_edge.train_gpu.rows import make_document

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
packing = true
[reward]
source = "colours"
references = "colours"
pictures = 4
draws = 6
max_tokens = 12
[optim]
steps = 6
lr = 3e-3
batch_size = 2
[lora]
rank = 4
alpha = 8
"""


def brevity(said: Sequence[Sequence[str]]) -> Score:
    """Six where an answer ends at once, less for every letter."""
    assert len(said) == 16
    return lambda text, references: 6 - len(text) / 4


def scores(recipe: Recipe) -> list[float]:
    log = Path(recipe.output).with_name(f"{Path(recipe.output).name}.run") / "log.jsonl"
    return [json.loads(line)["score"] for line in log.read_text().splitlines()]


def test_the_score_of_what_is_drawn_rises(make: Callable[..., Recipe]) -> None:
    recipe = make("short", "optim.steps=40", "optim.lr=1e-2", "reward.weight=4.0")
    train(recipe, make_score=brevity)
    found = scores(recipe)
    assert np.mean(found[-5:]) > np.mean(found[:5]) + 1


def test_a_stopped_run_draws_and_learns_the_same(make: Callable[..., Recipe]) -> None:
    whole, parts = make("whole", "optim.steps=12"), make("parts", "optim.steps=12")
    train(whole, make_score=brevity)
    calls = 0

    def stopping(said: Sequence[Sequence[str]]) -> Score:
        def score(text: str, references: Sequence[str]) -> float:
            nonlocal calls
            calls += 1
            if calls == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return brevity(said)(text, references)

        return score

    with pytest.raises(Stopped):
        train(parts, make_score=stopping)
    assert 0 < len(scores(parts)) < 12
    train(parts, resume=True, make_score=brevity)
    assert scores(whole) == scores(parts)
    one, other = (load_file(Path(recipe.output) / "model.safetensors") for recipe in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_that_of_each_draw_times_its_advantage(make: Callable[..., Recipe]) -> None:
    changes = ("scale.precision='float32'", "reward.temperature=0.7", "reward.weight=3.0", "reward.max_tokens=24")
    run = Run(make("loss", *changes), make_score=brevity)
    assert run.reward is not None
    trainee, tokenizer, end = run.engine.trainee.eval(), run.mixture.renderer.tokenizer, run.reward.end
    made: list[list[list[list[int]]]] = []
    draw = trainee.draw
    trainee.draw = lambda *args, **options: made.append(draw(*args, **options)) or made[-1]
    batches, mean = run.reward.draw(trainee, 0)
    _, same = run.reward.draw(trainee, 0)
    assert (made[0], mean) == (made[1], same)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())

    def score(answer: list[int]) -> float:
        if answer[-1] != end or special & set(answer[:-1]):
            return 0.0
        return 6 - len(tokenizer.decode(answer[:-1]).strip()) / 4

    judged = [[score(answer) for answer in answers] for answers in made[0]]
    assert mean == pytest.approx(np.mean(judged))
    weights: dict[tuple[int, ...], list[float]] = {}
    for answers, gains in zip(made[0], advantages(judged), strict=True):
        for answer in dict.fromkeys(map(tuple, answers)):
            gain = sum(g for a, g in zip(answers, gains, strict=True) if tuple(a) == answer)
            weights.setdefault(answer, []).append(3 * gain / 24 / len(answer))
    total = expected = 0.0
    found = []
    with torch.no_grad():
        for batch in batches:
            assert batch.temperature == 0.7
            total += float(trainee(batch))
            logits = _logits(trainee, batch)
            for row, document, branch in _answers(batch):
                mask = (batch.documents[row] == document) & (batch.branches[row] == branch)
                places = [int(p) for p in mask.nonzero() if int(batch.labels[row, p]) != IGNORE]
                answer = tuple(int(batch.labels[row, p]) for p in places)
                weight = min(weights[answer], key=lambda w, of=float(batch.weights[row, places[0]]): abs(w - of))
                found.append(weight)
                assert batch.weights[row, places].tolist() == pytest.approx([weight] * len(places))
                surprise = [-float(logits[row, p - 1].log_softmax(-1)[batch.labels[row, p]]) for p in places]
                expected += weight * sum(surprise)
    assert len(found) == sum(abs(w) > 1e-6 for every in weights.values() for w in every) > 1
    assert total == pytest.approx(expected, rel=1e-4, abs=1e-6)


def _logits(trainee: torch.nn.Module, batch: object) -> torch.Tensor:
    hidden = trainee._read(trainee.llm, trainee._embeddings(batch)[0], batch)
    logits: torch.Tensor = trainee.head(hidden) / 0.7
    return logits


def _answers(batch: object) -> list[tuple[int, int, int]]:
    labelled = batch.labels != IGNORE
    found = torch.stack([labelled.nonzero()[:, 0], batch.documents[labelled], batch.branches[labelled]], dim=1)
    return [tuple(map(int, each)) for each in found.unique(dim=0)]


def test_branches_with_weights_are_the_samples_alone(make: Callable[..., Recipe]) -> None:
    run = Run(make("weights", "scale.precision='float32'"), make_score=brevity)
    trainee, image = run.engine.trainee.eval(), run.mixture.renderer.image_token
    sample = next(iter(run.mixture.samples))
    tokens = run.mixture.renderer.render(sample)
    other = Tokens([*tokens.ids[:-2], 5, tokens.ids[-1]], [*tokens.labels[:-2], 5, tokens.labels[-1]])

    def loss(*samples: Tokens) -> float:
        document = make_document(samples, sample.pictures, "x", image, 4)
        with torch.no_grad():
            return float(trainee(run.mixture.batch([[document]], 4)))

    weighted = loss(replace(tokens, weight=2.0), replace(other, weight=-0.5))
    assert weighted == pytest.approx(2 * loss(tokens) - 0.5 * loss(other), rel=1e-4)
    assert loss(replace(tokens, weight=-3.0)) == pytest.approx(-3 * loss(tokens))


def test_advantages_compare_with_the_other_draws_of_the_picture() -> None:
    found = np.array(list(advantages([[1.0, 0.0, 0.0], [5.0, 5.0, 5.0]])))
    assert found[1].tolist() == [0, 0, 0]
    assert found[0, 0] == pytest.approx(-2 * found[0, 1])
    assert found.std() == pytest.approx(1)
    assert list(advantages([[2.0, 2.0]])) == [[0.0, 0.0]]


def test_the_end_of_a_caption_counts_where_it_is_trained_on() -> None:
    said = [["A dog runs in a field.", "A dog is in a field."], ["Two people sit.", "People on a bench."]]
    for count_end in (False, True):
        score = CiderD(said, count_end=count_end).score
        broken, whole = score("A dog runs in a", said[0]), score("A dog runs", ["A dog runs.", *said[0]])
        assert (broken > whole) == (not count_end)


def test_the_command_trains_with_cider(make: Callable[..., Recipe], tmp_path: Path) -> None:
    make("command")
    done = CliRunner().invoke(cli, ["train", str(tmp_path / "command.toml"), "--set", "optim.steps=2", "--json"])
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.stdout)["score"] < 10


def test_what_cannot_be_done_is_said(make: Callable[..., Recipe]) -> None:
    with pytest.raises(InputError, match="no score was given"):
        Run(make("none"))
    with pytest.raises(InputError, match="'people'"):
        Run(make("source", "reward.references='people'"), make_score=brevity)
    with pytest.raises(InputError, match="reward needs stage finetune"):
        make("stage", "stage='align'", "lora.rank=0")
    with pytest.raises(InputError, match=r"reward.draws is 1; expected at least 2"):
        RewardConfig("a", "b", draws=1)
    with pytest.raises(InputError, match=r"reward.temperature is 0; expected a number above 0"):
        RewardConfig("a", "b", temperature=0)
