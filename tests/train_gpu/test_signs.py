"""Drawn words: what is said of them is what is written, and each letter stands in its box."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import matplotlib as mpl
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from llava_edge.bench.tasks.questions import Questions
from llava_edge.bench.tasks.reading import Data
from llava_edge.cli import cli
from llava_edge.errors import InputError
from llava_edge.train_gpu.datagen import picture_sets, signs, symbols
from llava_edge.train_gpu.datagen.compose import SIZE
from llava_edge.train_gpu.samples import from_llava

FONTS = Path(mpl.get_data_path()) / "fonts" / "ttf"
SANS, SERIF, SYMBOLS = FONTS / "DejaVuSans.ttf", FONTS / "DejaVuSerif-Bold.ttf", FONTS / "STIXNonUni.ttf"
PHOTOS = [Image.linear_gradient("L").convert("RGB").resize((300, 260))]


@pytest.mark.parametrize("word", ["cat", "station", "hospital"])
@pytest.mark.parametrize("fonts", [(), (SANS, SERIF)])
def test_each_letter_stands_in_its_box(word: str, fonts: tuple[Path, ...]) -> None:
    plain = 0
    for number in range(12):
        made = signs.compose_sign(word, fonts, (), Random(number))
        assert [thing.noun for thing in made.things] == list(word)
        edges = [edge for thing in made.things for edge in (thing.box[0], thing.box[2])]
        assert edges == sorted(edges)
        assert edges[0] >= -2
        assert edges[-1] <= SIZE
        if made.ground is None:
            continue  # a sign, whose rim is drawn too
        plain += 1
        pixels = np.asarray(made.picture, np.int16)
        drawn = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).max(axis=-1) > 60
        framed = np.zeros_like(drawn)
        for thing in made.things:
            left, top, right, bottom = (round(edge) for edge in thing.box)
            framed[max(0, top - 2) : bottom + 3, max(0, left - 3) : right + 3] = True
            assert drawn[max(0, top) : bottom + 1, max(0, left) : right + 1].any(), (word, number, thing)
        assert not (drawn & ~framed).any(), (word, number)
    assert plain > 2


def test_letters_are_wide_enough_to_be_read() -> None:
    for number in range(40):
        made = signs.compose_sign("hospital", (SANS,), PHOTOS, Random(number))
        wide = made.things[-1].box[2] - made.things[0].box[0]
        assert wide / 8 > 0.9 * signs.LEAST


def test_questions_agree_with_the_word() -> None:
    asked = signs.questions("stop", ["stop", "exit"], Random(1))
    by_kind = {kind: [q for q in asked if q.kind == kind] for kind in {q.kind for q in asked}}
    assert {q.word for q in by_kind["word"]} == {"stop"}
    assert by_kind["spelling"][0].word == "s-t-o-p"
    assert by_kind["letter"][0].word == ("s" if "first" in by_kind["letter"][0].text else "p")
    assert by_kind["length"][0].sentence == "It has four letters."
    assert [q.word for q in by_kind["text"] if "exit" in q.text] == ["No"]
    assert [q.word for q in by_kind["text"] if "stop" in q.text] == ["Yes"]
    assert all('"stop"' in q.sentence for q in by_kind["text"])


def test_an_empty_sign_says_nothing() -> None:
    made = signs.compose_sign("", (SANS,), (), Random(2))
    assert made.things == ()
    asked = signs.questions("", ["stop", "exit"], Random(1))
    assert {q.word for q in asked} == {None, "No"}
    assert all("I can't see any text" in q.sentence for q in asked)


def test_words_are_chosen_and_kept_out() -> None:
    words = signs.fit_words(["Stop", "stop", "at", "co-op", "café", "umbrellas", "umbrella", *signs.SIGN_WORDS])
    assert {"stop", "umbrella"} <= set(words)
    assert {"at", "co-op", "café", "umbrellas"}.isdisjoint(words)
    taught, kept_out = signs.hold_out_words(words)
    assert sorted(taught + kept_out) == words
    assert len(kept_out) == round(0.1 * len(words))
    more, _ = signs.hold_out_words([*words, "zebra"])
    assert len(set(more) - set(taught)) <= 2  # a further word hardly moves the others


def test_fonts_without_the_letters_are_left_out(tmp_path: Path) -> None:
    assert signs.read_fonts([SANS, SYMBOLS, SERIF]) == [SANS, SERIF]
    (tmp_path / "a.ttf").write_bytes(b"no font")
    with pytest.raises(InputError, match="not a font"):
        signs.read_fonts([tmp_path / "a.ttf"])


def test_signs_by_command(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    PHOTOS[0].save(photos / "a.png")
    written = []
    for name in ("one", "two"):
        options = ["--font", str(SANS), "--photos", str(photos), "--count", "30", "--seed", "7", "--json", "--quiet"]
        result = CliRunner().invoke(cli, ["datagen", "signs", "-o", str(tmp_path / name), *options])
        assert result.exit_code == 0, result.output
        written.append(json.loads(result.stdout))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    samples = [from_llava(item, tmp_path / "one") for item in json.loads(one["samples.json"])]
    assert len(samples) == written[0]["samples"]
    assert all(sample.pictures[0].path.is_file() for sample in samples)
    asked = Questions(tmp_path / "one" / "questions.json").read(Data(tmp_path / "one"))
    assert len(asked) == written[0]["questions"] < 30  # some signs are empty
    boxes = picture_sets.read_boxes(tmp_path / "one")
    words = {item["image"]: item["answer"] for item in json.loads(one["questions.json"])}
    spelt = {name: "".join(thing["noun"] for thing in made["things"]) for name, made in boxes.items()}
    assert spelt == {f"one/{name}": word for name, word in words.items()}
    assert set(words.values()) <= signs.SIGN_WORDS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--words", "few.txt"], "has 1 words of 3 to 8 letters"),
        (["--font", str(SYMBOLS)], "lacks some of the letters"),
        (["--font", "few.txt"], "not a font"),
    ],
)
def test_what_cannot_be_written_is_told(options: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a stop co-op")
    options = [str(tmp_path / option) if option == "few.txt" else option for option in options]
    result = CliRunner().invoke(cli, ["datagen", "signs", "-o", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]


def test_samples_name_their_pictures_from_the_root(tmp_path: Path) -> None:
    list(picture_sets.write_signs(tmp_path / "signs", 5, ["stop", "exit"], (), (), 1))
    for sample in picture_sets.read_samples(tmp_path, "signs"):
        assert (tmp_path / sample["image"]).is_file()
        assert symbols.words(sample["conversations"][0]["value"])
