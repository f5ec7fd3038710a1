"""The projector's start: visual tokens near the words of the picture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from llava_edge.train_gpu import build, checkpoint, read_words
from llava_edge.train_gpu.features import FeatureCache, build_cache, through_blocks
from llava_edge.train_gpu.model import pool_tokens
from llava_edge.train_gpu.teach_words import main
from llava_edge.train_gpu.words import (
    PLACES,
    Lesson,
    align_words,
    cell_words,
    common_directions,
    picture_words,
    place_words,
    word_pieces,
    word_targets,
)

COLOURS = ("red", "green", "blue", "white")


def sample(image: str, *answers: str) -> dict[str, object]:
    turns = [turn for text in answers for turn in ({"from": "human", "value": "?"}, {"from": "gpt", "value": text})]
    return {"id": image, "image": image, "conversations": turns}


def test_only_what_is_affirmed_counts() -> None:
    said = picture_words([sample("a", "Two dogs run.", "No, there is no cat in the picture."), sample("a", "dogs")])
    assert said["a"] == {"two": 1, "dogs": 2, "run": 1}


def test_rare_words_weigh_more_and_rows_add_up_to_one(tokenizer: PreTrainedTokenizerFast) -> None:
    said = picture_words([sample(f"{i}", "user" if i % 4 else "red user") for i in range(16)])
    ids, target = word_targets(said, tokenizer, least=1)
    rare, common = (word_pieces(tokenizer, word) for word in ("red", "user"))
    row = {token: float(value) for token, value in zip(ids, target[0], strict=True)}
    assert min(row[t] for t in rare if t not in common) > max(row[t] for t in common)
    torch.testing.assert_close(target[0].sum(), torch.tensor(1.0))


def test_a_picture_speaks_its_colour(workspace: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(workspace / "base", dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters() if "multi_modal_projector" not in name}
    cache = FeatureCache(workspace / "features")
    samples = json.loads((workspace / "samples.json").read_text())["colours"]
    align_words(model, cache, samples, tokenizer, image_tokens=4, epochs=150, batch_size=16, lr=1e-2)

    table = model.get_input_embeddings().weight.detach()
    words = [tokenizer(f" {colour}")["input_ids"] for colour in COLOURS]
    right = 0
    for index in range(16):
        features = torch.from_numpy(np.asarray(cache[f"{index}.png"], np.float32))
        with torch.no_grad():
            said = model.model.multi_modal_projector(features) @ table.T  # [patches, vocabulary]
        scores = [said[:, ids].mean().item() for ids in words]
        right += int(np.argmax(scores)) == index % 4
    assert right >= 14
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_the_blocks_behind_the_cache_learn_the_words_too(
    workspace: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build.load_model(str(workspace / "base"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    spec = build.image_spec(checkpoint.read_description(workspace / "base"), None)
    names = [f"{index}.png" for index in range(16)]
    cache = build_cache(model, spec, workspace / "pictures", names, tmp_path / "features", 1)
    samples = json.loads((workspace / "samples.json").read_text())["colours"]
    align_words(model, cache, samples, tokenizer, image_tokens=4, epochs=2, batch_size=16)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    blocks = {name.split("layer.")[1][0] for name in moved if "vision_tower" in name}
    assert blocks == {"2"}
    assert not any("language_model" in name for name in moved)


def test_a_cell_says_what_covers_it() -> None:
    thing = {"noun": "star", "colour": "red", "box": [0.5, 0.0, 1.0, 0.75]}
    top_left, top_right, bottom_left, bottom_right = cell_words({"ground": "white", "things": [thing]}, 2)
    assert top_left == bottom_left == {"white": 1, "background": 1}
    assert top_right == {"star": 1, "red": 1, "one": 1}
    assert bottom_right == {"star": 0.5, "red": 0.5, "white": 0.5, "background": 0.5}


def test_on_a_photograph_only_things_are_known() -> None:
    cells = cell_words({"ground": None, "things": [{"noun": "star", "colour": None, "box": [0, 0, 0.5, 0.5]}]}, 2)
    assert cells == [{"star": 1, "one": 1}, {}, {}, {}]


def test_places_are_thirds_of_a_picture() -> None:
    places = place_words(4)
    assert [sorted(places[cell]) for cell in (0, 1, 5, 7, 14)] == [
        ["left", "top"], ["middle", "top"], ["middle"], ["middle", "right"], ["bottom", "middle"],
    ]  # fmt: skip
    assert places[5]["middle"] == 2


def test_a_blank_that_stands_alone_is_no_piece_of_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer(" top")["input_ids"][:1]) == " "
    assert tokenizer.decode(word_pieces(tokenizer, "top")) == "top"
    assert len({word_pieces(tokenizer, place)[0] for place in PLACES}) > 1


def test_a_lesson_is_learnt_when_each_token_says_what_it_covers(tokenizer: PreTrainedTokenizerFast) -> None:
    layout = {"ground": "white", "things": [{"noun": "star", "colour": "red", "box": [0.5, 0, 1, 0.5]}]}
    lesson = Lesson({"a": Counter({"star": 3})}, {"a": layout}, tokenizer, 4)
    target = lesson._cells(layout)
    assert target.sum().item() == pytest.approx(1)
    assert target[1].sum().item() == pytest.approx(0.5)  # the only cell with a thing
    said = (target / target.sum(dim=1, keepdim=True)).clamp(min=1e-9).log()
    elsewhere = said[[1, 0, 2, 3]]
    assert lesson.loss(["a"], said[None]) < lesson.loss(["a"], elsewhere[None]) - 1
    assert Lesson({"a": Counter("x")}, {"a": {**layout, "ground": None}}, tokenizer, 4)._cells(
        {**layout, "ground": None}
    ).sum().item() == pytest.approx(1)

    places = place_words(2)
    right = torch.tensor([[cell[word] / 2 for word in PLACES] for cell in places]).clamp(min=1e-9).log()
    assert lesson.place_loss(right[None]).item() == pytest.approx(np.log(2), abs=1e-5)
    assert lesson.place_loss(right.flip(0)[None]) > 5


def test_common_directions_are_those_that_most_of_the_tokens_lie_along() -> None:
    generator = torch.Generator().manual_seed(0)
    strong = torch.linalg.qr(torch.randn(144, 2, generator=generator)).Q.T
    tokens = torch.randn(50, 16, 144, generator=generator) + 60 * torch.randn(50, 16, 2, generator=generator) @ strong
    found = common_directions(tokens)
    assert found.shape == (2, 144)
    torch.testing.assert_close((found @ strong.T).norm(dim=0), torch.ones(2), atol=1e-2, rtol=0)


@pytest.fixture(scope="module")
def halves(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two colours side by side with boxes.json and samples.json; teach() leaves a cache there too."""
    root = tmp_path_factory.mktemp("halves")
    folder = root / "pictures" / "halves"
    folder.mkdir(parents=True)
    values = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210), "white": (240, 240, 240)}
    layouts, samples = {}, []
    for left in COLOURS:
        for right in COLOURS:
            name = f"{left}-{right}.png"
            picture = Image.new("RGB", (56, 56), values[right])
            picture.paste(values[left], (0, 0, 28, 56))
            picture.save(folder / name)
            layouts[name] = {
                "ground": None,
                "things": [
                    {"noun": "user", "colour": colour, "box": box}
                    for colour, box in ((left, [0, 0, 0.5, 1]), (right, [0.5, 0, 1, 1]))
                ],
            }
            samples.append(sample(f"halves/{name}", f"A {left} user and a {right} one"))
    (folder / "boxes.json").write_text(json.dumps(layouts))
    (root / "samples.json").write_text(json.dumps({"halves": samples}))
    return root


def teach(init: Path, halves: Path, output: Path, *options: str) -> None:
    arguments = [str(init), "--samples", str(halves / "samples.json"), "--features", str(halves / "features")]
    arguments += ["--pictures", str(halves / "pictures"), "--tower-blocks", "1"]
    arguments += ["--boxes", str(halves / "pictures" / "halves"), "--image-tokens", "4", "--batch-size", "16"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(output), *options])
    assert result.exit_code == 0, result.output


def test_each_token_says_the_colour_that_it_covers(workspace: Path, halves: Path, tmp_path: Path) -> None:
    teach(workspace / "base", halves, tmp_path / "taught", "--epochs", "200", "--lr", "1e-2")
    colour, place = {}, {}
    for checkpoint_ in (workspace / "base", tmp_path / "taught"):
        arguments = [str(checkpoint_), str(halves / "pictures" / "halves"), "--image-tokens", "4"]
        result = CliRunner().invoke(read_words.main, arguments)
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        assert (said["colour"]["tokens"], said["colour"]["words"]) == (64, 4)
        colour[checkpoint_.name], place[checkpoint_.name] = said["colour"]["right"], said["place"]["right"]
    assert colour["base"] < 0.5
    assert colour["taught"] > 0.85
    assert place["taught"] > place["base"] + 0.1


def visual_tokens(checkpoint_: Path, halves: Path) -> torch.Tensor:
    """Four tokens of each picture, ``[N, 4, D]``."""
    model, cache = build.load_model(str(checkpoint_)), FeatureCache(halves / "features")
    with torch.no_grad():
        states = torch.from_numpy(np.stack([cache[name] for name in cache.rows])).float()
        reached = through_blocks(model.model.vision_tower, model.config, states, 1)
        return pool_tokens(model.model.multi_modal_projector(reached), 4)


def test_what_is_kept_moves_less(workspace: Path, halves: Path, tmp_path: Path) -> None:
    moved = []
    for output, weight in (("free", "0"), ("kept", "100")):
        options = ("--epochs", "30", "--lr", "1e-3", "--keep", "halves", "--keep-weight", weight)
        teach(workspace / "base", halves, tmp_path / output, *options)
        change = visual_tokens(tmp_path / output, halves) - visual_tokens(workspace / "base", halves)
        moved.append(change.square().sum().item())
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_checkpoint_in_bfloat16_learns_too_and_stays_one(
    workspace: Path, halves: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, attention: str
) -> None:
    teach(workspace / "base", halves, tmp_path / "unused", "--epochs", "1")  # makes the cache
    model = build.load_model(str(workspace / "base")).to(torch.bfloat16)
    tower = model.model.vision_tower
    tower.set_attn_implementation(attention)
    samples = json.loads((halves / "samples.json").read_text())["halves"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    align_words(model, FeatureCache(halves / "features"), samples, tokenizer, image_tokens=4, epochs=10, lr=1e-2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tower.config._attn_implementation == attention
    assert not any(p.requires_grad for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in tower.named_parameters(prefix="model.vision_tower"))


def refusal(init: Path, samples: Path, tmp_path: Path, *options: str) -> str:
    arguments = [str(init), "--samples", str(samples), "--features", str(tmp_path / "none")]
    arguments += ["--image-tokens", "4", "-o", str(tmp_path / "x")]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 1, result.output
    assert not (tmp_path / "x").exists()
    return result.output


def test_what_is_wrong_is_named_before_any_work(workspace: Path, halves: Path, tmp_path: Path) -> None:
    base, samples, folder = workspace / "base", halves / "samples.json", halves / "pictures" / "halves"
    assert "has no source photos; it has halves" in refusal(base, samples, tmp_path, "--keep", "photos")
    assert f"no feature cache in {tmp_path / 'none'}" in refusal(base, samples, tmp_path)
    assert "can't be pooled to 5 tokens" in refusal(base, samples, tmp_path, "--image-tokens", "5")
    assert f"{tmp_path} has no boxes.json" in refusal(base, samples, tmp_path, "--boxes", str(tmp_path))
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(json.loads(samples.read_text())["halves"]))
    assert "is a list; expected samples by source" in refusal(base, listed, tmp_path)
    others = workspace / "samples.json"
    assert "no sample has a picture of" in refusal(base, others, tmp_path, "--boxes", str(folder))
    lacking = refusal(base, others, tmp_path, "--features", str(halves / "features"))
    assert "the feature cache lacks 16 of the samples' pictures, such as 0.png" in lacking


def test_a_folder_with_something_else_is_left_alone(workspace: Path, halves: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = [str(workspace / "base"), "--samples", str(halves / "samples.json")]
    result = CliRunner().invoke(main, [*arguments, "--features", str(halves / "features"), "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "is no checkpoint" in result.output
    assert (tmp_path / "notes.txt").read_text() == "mine"
