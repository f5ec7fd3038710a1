"""Captions that a model draws itself: they are its own answers, and those that agree best are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from llava_edge.cli import cli
from llava_edge.errors import InputError
from llava_edge.images import fit, normalize
from llava_edge.train_gpu import build, checkpoint
from llava_edge.train_gpu.datagen.draws import Drawer, best_captions, draw_all
from llava_edge.train_gpu.datagen.generate import Progress
from llava_edge.train_gpu.features import build_cache, encode_pixels
from llava_edge.train_gpu.samples import Asked, read_asked

from .conftest import SPEC

QUESTION = "<image>\nA picture?"


@pytest.fixture(scope="module")
def ending(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made to end its answers soon."""
    model, tokenizer = build.load_model(str(workspace / "base")), build.load_tokenizer(str(workspace / "base"))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 4
    output = tmp_path_factory.mktemp("ending") / "model"
    description = json.loads((workspace / "base" / checkpoint.DESCRIPTION).read_text())
    checkpoint.save_checkpoint(output, model, tokenizer, description)
    return output


@pytest.mark.parametrize("blocks", [0, 1])
def test_without_chance_the_draws_are_what_transformers_answers(
    ending: Path, workspace: Path, tmp_path: Path, blocks: int
) -> None:
    names = [f"{index}.png" for index in range(4)]
    cached = tmp_path / "features"
    build_cache(build.load_model(str(ending)), SPEC, workspace / "pictures", names, cached, blocks)
    drawer = Drawer(ending, cached, "chatml", image_tokens=16, seed=0, bf16=False)
    drawn = drawer.draw(QUESTION, names, count=2, temperature=1e-6, max_tokens=64)
    model, tokenizer = build.load_model(str(ending)).eval(), build.load_tokenizer(str(ending))
    image = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    asked = f"<|im_start|>user\n{image * 16}\nA picture?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(asked, return_tensors="pt").input_ids
    end, ended = tokenizer.eos_token_id, 0
    for name, texts in zip(names, drawn, strict=True):
        with Image.open(workspace / "pictures" / name) as picture:
            pixels = torch.from_numpy(normalize(fit(picture, SPEC), SPEC))[None]
        with torch.inference_mode():
            read = model.get_input_embeddings()(ids)
            read[ids == model.config.image_token_id] = model.model.multi_modal_projector(encode_pixels(model, pixels))
            ids_out = model.generate(inputs_embeds=read, do_sample=False, max_new_tokens=64, eos_token_id=end)[0]
        ends = int(ids_out[-1]) == end
        ended += ends
        assert texts == [tokenizer.decode(ids_out, skip_special_tokens=True).strip() if ends else ""] * 2
    assert ended


def test_the_best_of_what_was_drawn_are_kept(ending: Path, workspace: Path, tmp_path: Path) -> None:
    asked = [Asked(f"{index}.png", QUESTION, ("It is red.", "A red picture")) for index in range(8)]

    def score(text: str, references: object) -> float:
        return -len(text)

    def drawer() -> Drawer:
        return Drawer(ending, workspace / "features", "chatml", image_tokens=4, seed=3)

    settings = {"of": "this test"}
    progress = Progress(tmp_path / "out.json", settings, resume=False)
    steps = draw_all(drawer(), asked, progress, count=6, temperature=1.0, batch_size=3)
    assert [next(steps), next(steps)] == [0, 3]  # and here it is stopped
    progress = Progress(tmp_path / "out.json", settings, resume=True)
    assert list(draw_all(drawer(), asked, progress, count=6, temperature=1.0, batch_size=8)) == [3, 8]
    made = best_captions(asked, progress, score, keep=2, min_score=-1000)
    drawn = [progress.done[one.picture]["texts"] for one in asked]
    again = drawer().draw(QUESTION, [one.picture for one in asked[:3]], 6, 1.0, 32)
    assert drawn[:3] == again
    expected = [sorted({t for t in texts if t}, key=len)[:2] for texts in drawn]
    kept = {one.picture: [] for one in asked}
    for sample in made.samples:
        assert sample["conversations"][0]["value"] == QUESTION
        kept[sample["image"]].append(sample["conversations"][1]["value"])
    assert [[len(t) for t in kept[one.picture]] for one in asked] == [[len(t) for t in best] for best in expected]
    assert made.kept == sum(map(len, expected)) > 8
    few = best_captions(asked, progress, score, keep=2, min_score=-3)
    assert few.kept == sum(len(text) <= 3 for best in expected for text in best) < made.kept


def test_the_command_adds_a_source_to_the_samples(ending: Path, workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.json"
    arguments = [
        *("datagen", "best-captions", str(ending), "-o", str(out), "--samples", str(workspace / "samples.json")),
        *("--features", str(workspace / "features"), "--source", "colours", "--image-tokens", "4", "--json"),
        *("--min-score", "0"),
    ]
    done = CliRunner().invoke(cli, [*arguments, "--references", "colours"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    values = json.loads(out.read_text())
    assert (told["pictures"], told["drawn"]) == (16, 80)
    assert told["kept"] == len(values["colours-best"]) > 0
    assert told["kept_score"] >= told["drawn_score"]
    assert values["colours"] == json.loads((workspace / "samples.json").read_text())["colours"]

    text = {"id": "t", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    values["plain"] = [*values["colours"], text]
    assert read_asked(values, "colours", "plain") == read_asked(values, "colours", "colours")
    with pytest.raises(InputError, match="not LLaVA JSON"):
        read_asked({"colours": [{"image": "0.png"}]}, "colours", "colours")

    wrong = CliRunner().invoke(cli, [*arguments, "--references", "people"])
    assert wrong.exit_code != 0
    assert "'people'" in str(wrong.exception or wrong.output)
