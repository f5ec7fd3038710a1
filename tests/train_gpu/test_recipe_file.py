"""Recipes: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_edge.errors import InputError
from llava_edge.train_gpu.recipe_file import builtin_recipes, load_recipe

RECIPE = """
stage = "align"
init = "base"
output = "out"
[data]
samples = "samples.json"
[optim]
steps = 12
lr = 1e-3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.speed=3", "unknown key optim.speed"),
        ("colour=3", "unknown key colour"),
        ("stage=evaluate", "align, finetune or norms"),
        ("optim.steps=0", "optim.steps is 0"),
        ("optim.lr=fast", "optim.lr is 'fast'; expected float"),
        ("optim.epochs=2", "either steps or epochs"),
        ("optim.betas=[0.9]", "two numbers"),
        ("optim=3", "optim is 3; expected a table"),
        ("model.tower_blocks=1", "projector only"),
        ("lora.rank=4", r"lora\.alpha is 0; expected a number above 0"),
        ("lora.rank=-1", r"lora\.rank is -1; expected 0"),
        ("lora.dropout=1.0", r"lora\.dropout is 1\.0; expected 0 or more and below 1"),
        ("optim", "no '='"),
        ("data.image_tokens=[16]", "differ in length"),
        ("data.packing=1", "data.packing is 1; expected bool"),
        ("data.format=alpaca", "expected plain, v1"),
        ("data.sources.a.path=x", "either sources or samples"),
        ("model.llm=x", "belong together"),
        ("scale.attention=flash_attention_2", "needs data.packing"),
    ],
)
def test_a_wrong_recipe_is_refused_in_words(path: Path, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(path, (change,))


def test_samples_that_share_their_picture_have_it_first(path: Path) -> None:
    with pytest.raises(InputError, match="image_position first"):
        load_recipe(path, ("data.branches=2", "data.image_position=random"))


def test_what_is_missing_is_named(path: Path) -> None:
    path.write_text(RECIPE.replace("lr = 1e-3", ""))
    with pytest.raises(InputError, match=r"optim\.lr is missing"):
        load_recipe(path)


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe") as caught:
        load_recipe(tmp_path / "v2.toml")
    assert "v1.5-finetune" in (caught.value.hint or "")


@pytest.mark.parametrize("name", builtin_recipes())
def test_the_builtin_recipes_can_be_read(name: str) -> None:
    recipe = load_recipe(Path(name))
    named = [stage for stage in ("align", "norms") if stage in name]
    assert recipe.stage == (named[0] if named else "finetune")


def test_the_published_values_of_stage_two() -> None:
    recipe = load_recipe(Path("v1.5-finetune"))
    assert (recipe.optim.lr, recipe.optim.batch_size, recipe.optim.epochs) == (2e-5, 128, 1)
    assert (recipe.optim.betas, recipe.optim.weight_decay, recipe.data.max_length) == ((0.9, 0.999), 0.0, 2048)
