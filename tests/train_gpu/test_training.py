"""The loop on a tiny LLaVA: what is trained, what is left alone, and that nothing is lost."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_edge.errors import InputError
from llava_edge.train_gpu import build, checkpoint, features
from llava_edge.train_gpu.config import Recipe
from llava_edge.train_gpu.features import FeatureCache, encode_pixels
from llava_edge.train_gpu.loop import Run, train
from llava_edge.train_gpu.model import Trainee, merge_into, pool_tokens
from llava_edge.train_gpu.optim import learning_rate_factor
from llava_edge.train_gpu.prompts import IGNORE, Tokens
from llava_edge.train_gpu.recipe_file import load_recipe
from llava_edge.train_gpu.rows import Batch, collate, make_document
from llava_edge.train_gpu.samples import Sample

from .conftest import TALK

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


def test_a_cache_without_one_of_the_pictures_is_told_before_the_first_step(workspace: Path, tmp_path: Path) -> None:
    model = build.load_model(str(workspace / "base"))
    spec = build.image_spec(checkpoint.read_description(workspace / "base"), None)
    names = [f"{index}.png" for index in range(15)]
    features.build_cache(model, spec, workspace / "pictures", names, tmp_path / "features")
    lacking = f"data.features={tmp_path / 'features'}"
    with pytest.raises(InputError, match=r"the feature cache lacks 1 of the samples' pictures, such as 15\.png"):
        train(recipe(workspace, tmp_path / "out", "align", 0, lacking))
    train(recipe(workspace, tmp_path / "skipping", "align", 0, lacking, "data.skip_bad=true"))


def test_finetune_moves_projector_and_llm_but_not_the_tower(workspace: Path, tmp_path: Path) -> None:
    moved = changed(workspace, train(recipe(workspace, tmp_path / "out", "finetune", 4)))
    assert any("language_model" in name for name in moved)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in moved)


def test_finetune_without_adapters_moves_the_whole_llm_but_not_the_tower(workspace: Path, tmp_path: Path) -> None:
    moved = changed(workspace, train(recipe(workspace, tmp_path / "out", "finetune")))
    assert "model.language_model.embed_tokens.weight" in moved
    assert not any("vision_tower" in name for name in moved)


def test_blocks_that_the_cache_leaves_to_be_run_give_the_features_and_are_trained(
    workspace: Path, tmp_path: Path
) -> None:
    model = build.load_model(str(workspace / "base"))
    names = [f"{index}.png" for index in range(16)]
    spec = build.image_spec(checkpoint.read_description(workspace / "base"), None)
    short = features.build_cache(model, spec, workspace / "pictures", names, tmp_path / "features", 1)
    states = torch.from_numpy(np.stack([short[name] for name in names])).float()
    whole = FeatureCache(workspace / "features")
    expected = torch.from_numpy(np.stack([whole[name] for name in names])).float()
    with torch.no_grad():
        found = features.through_blocks(model.model.vision_tower, model.config, states, 1)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)  # bfloat16 where the CPU has it

    changes = (f"data.features={tmp_path / 'features'}", "model.tower_blocks=1")
    moved = changed(workspace, train(recipe(workspace, tmp_path / "out", "finetune", 4, *changes)))
    assert {name.split("layer.")[1][0] for name in moved if "vision_tower" in name} == {"2"}
    # Frozen, they are run all the same.
    frozen = changed(workspace, train(recipe(workspace, tmp_path / "frozen", "align", 0, changes[0])))
    assert {name.split(".")[1] for name in frozen} == {"multi_modal_projector"}
    with pytest.raises(InputError, match="leave 1 blocks"):
        Run(recipe(workspace, tmp_path / "more", "finetune", 4, changes[0], "model.tower_blocks=2"))


def test_blocks_behind_what_is_cached_dont_run(workspace: Path) -> None:
    model = build.load_model(str(workspace / "base")).eval()
    tower, pixels = model.model.vision_tower, torch.randn(2, 3, 56, 56)
    ran = []
    blocks = features.used_blocks(tower, model.config)
    hooks = [block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(blocks)]
    with torch.no_grad():
        entered = features.before_blocks(tower, model.config, pixels, 1)
        assert ran == list(range(len(blocks) - 1))
        expected = features.tower_features(tower, model.config, pixels)
        torch.testing.assert_close(features.through_blocks(tower, model.config, entered, 1), expected)
    for hook in hooks:
        hook.remove()
    with pytest.raises(InputError, match=f"pass {len(blocks)} blocks of the tower, not 9"):
        features.before_blocks(tower, model.config, pixels, 9)


def test_a_cache_cant_begin_behind_a_layer_that_is_read(workspace: Path, tmp_path: Path) -> None:
    model = build.load_model(str(workspace / "base"))
    model.config.vision_feature_layer = [1, 3]
    with pytest.raises(InputError, match="hidden state 1, which lies before the last 1 blocks"):
        features.through_blocks(model.model.vision_tower, model.config, torch.zeros(1, 16, 32), 1)


def test_training_lowers_the_loss(workspace: Path, tmp_path: Path) -> None:
    run = Run(recipe(workspace, tmp_path / "out", "finetune", 4, "optim.steps=60"))
    batch = run.mixture.step(50).batches[0]
    before = run.engine.trainee(batch).item()
    run.loop()
    assert run.engine.trainee(batch).item() < 0.5 * before


def features_of(run: Run, *names: str) -> torch.Tensor:
    cache = FeatureCache(Path(run.recipe.data.features or ""))
    return torch.from_numpy(np.stack([np.asarray(cache[name], np.float32) for name in names]))


def batch_of(run: Run, rows: list[list[list[int]]], image_tokens: int) -> Batch:
    """Rows of documents; each is a list of the numbers of samples of one picture."""
    samples = list(run.mixture.samples)
    documents = [
        [
            make_document(
                [run.mixture.renderer.render(samples[number]) for number in numbers],
                samples[numbers[0]].pictures, "x", run.mixture.renderer.image_token, image_tokens,
            )
            for numbers in row
        ]
        for row in rows
    ]  # fmt: skip
    names = [document.pictures[0].name for row in documents for document in row]
    return collate(documents, features_of(run, *names), True, image_tokens)


@pytest.fixture
def exact(workspace: Path, tmp_path: Path) -> Run:
    return Run(recipe(workspace, tmp_path / "exact", "align", 0, "scale.precision=float32"))


def test_branches_cost_what_the_samples_cost_alone(exact: Run) -> None:
    trainee = exact.engine.trainee
    with torch.no_grad():
        together = batch_of(exact, [[[6, 7]]], 4)
        alone = [batch_of(exact, [[[number]]], 4) for number in (6, 7)]
        assert together.n_labels == sum(batch.n_labels for batch in alone)
        torch.testing.assert_close(trainee(together), sum(trainee(b) for b in alone), rtol=1e-5, atol=1e-4)


def test_answers_to_one_question_share_the_question_too(exact: Run) -> None:
    renderer, trainee = exact.mixture.renderer, exact.engine.trainee
    sample = next(sample for sample in exact.mixture.samples if len(sample.pictures) == 1)
    said = ["A dog runs.", "A dog sleeps on a mat.", "Two cats."]
    texts = [renderer.render(replace(sample, turns=((sample.turns[0][0], answer),))) for answer in said]

    def loss(*tokens: Tokens) -> torch.Tensor:
        document = make_document(tokens, sample.pictures, "x", renderer.image_token, 4)
        return trainee(collate([[document]], features_of(exact, sample.pictures[0].name), True, 4))  # type: ignore[no-any-return]

    with torch.no_grad():
        torch.testing.assert_close(loss(*texts), sum(loss(tokens) for tokens in texts), rtol=1e-5, atol=1e-4)
    document = make_document(texts, sample.pictures, "x", renderer.image_token, 4)
    first_label = [next(i for i, label in enumerate(tokens.labels) if label != IGNORE) for tokens in texts]
    # What each has of its own: its answer, and the token that predicts the answer's first.
    own = sum(len(tokens.ids) - first + 1 for tokens, first in zip(texts, first_label, strict=True))
    assert len(document) == first_label[0] - 1 + 3 + own  # one picture of 4 tokens stands for its mark
    assert sum(label != IGNORE for label in document.labels) == own - 3


def test_neither_padding_nor_packing_changes_the_loss(exact: Run) -> None:
    trainee = exact.engine.trainee
    with torch.no_grad():
        each = sum(trainee(batch_of(exact, [[numbers]], 16)) for numbers in ([0, 1], [2], [4]))
        padded = trainee(batch_of(exact, [[[0, 1]], [[2]], [[4]]], 16))
        packed = trainee(batch_of(exact, [[[0, 1], [2], [4]]], 16))
    torch.testing.assert_close(padded, each, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(packed, each, rtol=1e-5, atol=1e-4)


def test_samples_without_a_picture_are_trained_on_beside_a_cache_of_features(
    workspace: Path, talks: Path, tmp_path: Path
) -> None:
    shares = (f"data.samples={talks}", "data.weights={colours = 0.3, chat = 0.7}", "optim.batch_size=2")
    options = (*shares, "data.packing=true", "scale.precision=float32")
    run = Run(recipe(workspace, tmp_path / "out", "finetune", 4, *options))
    trainee, mixture = run.engine.trainee, run.mixture
    pictures = set()
    with torch.no_grad():
        for number in range(12):
            documents, _ = mixture.documents(number)
            pictures.add(tuple(sorted(len(document.pictures) for document in documents)))
            together, *alone = (
                sum(trainee(batch) for batch in mixture.batches(part, mixture.image_tokens(number)))
                for part in (documents, *([document] for document in documents))
            )
            torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=1e-4)
    assert pictures >= {(0, 0), (0, 1)}  # steps without any, and rows of both kinds
    run.loop()
    assert run.finish().is_dir()
    assert changed(workspace, train(recipe(workspace, tmp_path / "align", "align", 0, *shares)))


def test_the_loss_of_a_talk_without_a_picture_is_that_of_transformers(workspace: Path, exact: Run) -> None:
    renderer = exact.mixture.renderer
    tokens = renderer.render(Sample("talk", TALK))
    model = build.load_model(str(workspace / "base")).float().eval()
    ids, labels = torch.tensor([tokens.ids]), torch.tensor([tokens.labels])
    (batch,) = exact.mixture.batches([make_document([tokens], (), "talk", renderer.image_token, 4)], 4)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss * batch.n_labels
        torch.testing.assert_close(exact.engine.trainee(batch), expected, rtol=1e-5, atol=1e-4)


def test_merged_adapters_equal_applied_ones(workspace: Path, tmp_path: Path) -> None:
    run = Run(recipe(workspace, tmp_path / "out", "finetune", 4, "scale.precision=float32"))
    trainee = run.engine.trainee
    torch.manual_seed(1)
    for name, parameter in trainee.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    target = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32)
    embeddings = torch.randn(1, 9, 48)
    with torch.no_grad():
        applied = trainee.llm(inputs_embeds=embeddings).last_hidden_state
        merge_into(trainee, target)
        merged = target.model.language_model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(applied, merged, rtol=1e-5, atol=1e-5)


def test_standardising_leaves_the_projectors_output_alone(workspace: Path, exact: Run) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32)
    trainee = Trainee(model, exact.recipe, live_tower=False)
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


def test_the_resolved_recipe_lies_beside_the_weights(workspace: Path, tmp_path: Path) -> None:
    output = train(recipe(workspace, tmp_path / "out", "align", 0, "optim.steps=2", "seed=7"))
    saved: dict[str, Any] = json.loads((output / "recipe.json").read_text())
    assert (saved["seed"], saved["optim"]["steps"]) == (7, 2)
    assert saved["versions"]["torch"] == torch.__version__
    (digest,) = saved["data_sha256"].values()
    assert digest == hashlib.sha256((workspace / "samples.json").read_bytes()).hexdigest()


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert learning_rate_factor(0.015, 0.03) == pytest.approx(0.5)
    assert learning_rate_factor(0.03, 0.03) == pytest.approx(1)
    assert learning_rate_factor(1.0, 0.03) == pytest.approx(0)


@pytest.mark.filterwarnings("ignore")  # of deprecated parts of torch that its own compiler uses
def test_compiled_layers_train_like_plain_ones(workspace: Path, tmp_path: Path) -> None:
    few = ("optim.steps=3", 'scale.precision="float32"')
    losses = []
    for name in ("true", "false"):
        run = Run(recipe(workspace, tmp_path / name, "finetune", 0, f"scale.compile={name}", *few))
        run.loop()
        losses.append([json.loads(line)["loss"] for line in (run.directory / "log.jsonl").read_text().splitlines()])
        compiled = [module for module in run.engine.trainee.llm.modules() if module._compiled_call_impl is not None]
        assert bool(compiled) == (name == "true")
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
