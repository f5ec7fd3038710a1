"""The small LLaVA to try quantisation on: every matrix of its language model takes the type that is asked for."""

from __future__ import annotations

from pathlib import Path

from llava_edge.convert.tokenizer import pre_tokenizer_name
from llava_edge.train_gpu.prepare_small import QUESTIONS, SPECIALS, language_model, make_tokenizer, samples
from llava_edge.train_gpu.recipe_file import load_recipe

CAPTIONS = {"a.jpg": ["A dog runs.", "A brown dog is outside."], "b.jpg": ["Two cats."]}


def test_no_tensor_falls_back() -> None:
    model = language_model(make_tokenizer([*QUESTIONS, "A dog runs."]), seed=0)
    assert {p.shape[1] % 256 for p in model.parameters() if p.ndim == 2} == {0}
    assert model.config.tie_word_embeddings


def test_every_caption_answers_a_question_about_its_picture() -> None:
    made = samples(CAPTIONS, "photos", seed=0)
    assert [sample["id"] for sample in made] == ["a.jpg#0", "a.jpg#1", "b.jpg#0"]
    assert {sample["image"] for sample in made} == {"photos/a.jpg", "photos/b.jpg"}
    for sample in made:
        question, answer = sample["conversations"]
        assert question["value"].removeprefix("<image>\n") in QUESTIONS
        assert any(answer["value"] in listed for listed in CAPTIONS.values())


def test_its_tokenizer_is_one_that_convert_knows(tmp_path: Path) -> None:
    import json

    tokenizer = make_tokenizer([*QUESTIONS, *CAPTIONS["a.jpg"]])
    tokenizer.save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert pre_tokenizer_name(spec["pre_tokenizer"]) == "smollm"
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == [0, 1, 2, 3]


def test_its_recipe_trains_the_whole_language_model() -> None:
    recipe = load_recipe(Path("small"))
    assert (recipe.stage, recipe.init, recipe.output, recipe.lora.rank) == ("finetune", "base", "small", 0)
