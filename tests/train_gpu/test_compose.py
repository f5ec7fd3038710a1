"""Drawn pictures: what is said of them is what is in them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner
from PIL import Image

from llava_edge.bench.tasks.questions import Questions
from llava_edge.bench.tasks.reading import Data
from llava_edge.cli import cli
from llava_edge.errors import InputError
from llava_edge.train_gpu.datagen import compose, picture_sets, symbols
from llava_edge.train_gpu.datagen.icons import Icon, by_noun, draw_icon, read_icons
from llava_edge.train_gpu.samples import from_llava

NAMES = ("anchor", "ant", "apple", "axe", "banana", "cactus", "crab", "crown", "dog-face", "automobile")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in Iconify's form: ten drawings that differ in colour and width, and one of a person."""
    folder = tmp_path_factory.mktemp("icons")
    icons = {
        name: {"body": f'<rect x="2" y="8" width="{8 + 2 * n}" height="16" fill="#{n * 25:02x}80{n:02x}"/>'}
        for n, name in enumerate((*NAMES, "old-man"))
    }
    (folder / "icons.json").write_text(json.dumps({"prefix": "ours", "icons": icons, "width": 32, "height": 32}))
    categories = {"Objects": list(NAMES), "People & Body": ["old-man"], "Food & Drink": ["not-there"]}
    (folder / "metadata.json").write_text(json.dumps({"categories": categories}))
    return folder


@pytest.fixture(scope="module")
def icons(package: Path) -> dict[str, list[Icon]]:
    return by_noun(read_icons(package))


PHOTOS = [Image.linear_gradient("L").convert("RGB").resize((300, 260))]


def test_icons_have_plain_names_and_no_people(package: Path) -> None:
    found = {icon.slug: icon for icon in read_icons(package)}
    assert set(found) == set(NAMES)
    assert (found["dog-face"].noun, found["automobile"].noun, found["apple"].noun) == ("dog", "car", "apple")
    assert found["automobile"].accepted == ["car", "automobile"]
    assert found["dog-face"].accepted == ["dog", "dog face"]


def test_an_icon_is_cut_to_what_is_drawn(icons: dict[str, list[Icon]]) -> None:
    drawn = draw_icon(icons["apple"][0], 64)
    assert drawn.mode == "RGBA"
    assert drawn.size == (24, 32)  # 12 x 16 of 32 units at 64 pixels
    assert drawn.getpixel((5, 5)) == (50, 128, 2, 255)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_asked_follows_from_the_layout(icons: dict[str, list[Icon]], seed: int) -> None:
    rng = Random(seed)
    scene = compose.compose(icons, PHOTOS, rng)
    amounts = Counter(thing.noun for thing in scene.things)
    only = {thing.noun: thing for thing in scene.things if amounts[thing.noun] == 1}
    asked = compose.questions(scene, sorted(icons), rng)
    assert {"count", "presence", "absent"} <= {question.kind for question in asked}
    for question in asked:
        words = question.text.rstrip("?").replace(",", "").split()
        named = [noun for noun in (*icons, *compose.SHAPES) if noun in words]
        if question.kind == "count":
            (noun,) = [n for n in amounts if compose.plural(n) in words]
            assert question.word == compose.NUMBERS[amounts[noun]]
        elif question.kind == "presence":
            assert question.word == ("Yes" if named[0] in amounts else "No")
        elif question.kind == "absent":
            assert named[0] not in amounts
        elif question.kind == "colour" and "background" not in words:
            colours = {t.colour for t in scene.things if t.noun in words or compose.plural(t.noun) in words}
            assert colours == {question.word}
        elif question.kind == "size":
            big, small = sorted((only[noun] for noun in named), key=lambda thing: -thing.side)
            assert question.word == big.noun
            assert big.side > small.side
        elif question.kind == "relation":
            one, other = sorted((only[noun] for noun in named), key=lambda thing: words.index(thing.noun))
            (left, top), (x, y) = one.centre, other.centre
            holds = {"left": left < x, "right": left > x, "above": top < y, "below": top > y}
            if question.word in ("Yes", "No"):
                (claim,) = set(words) & set(holds)
                assert holds[claim] == (question.word == "Yes")
            else:
                assert holds[question.word]
            assert any(word in question.sentence for word, true in holds.items() if true)


@pytest.mark.parametrize("seed", range(40))
def test_things_lie_inside_and_apart_and_have_their_colour(icons: dict[str, list[Icon]], seed: int) -> None:
    scene = compose.compose(icons, (), Random(seed))
    for thing in scene.things:
        left, top, right, bottom = thing.box
        assert min(left, top) >= -1
        assert max(right, bottom) <= compose.SIZE + 1
        if thing.colour:
            pixel = scene.picture.getpixel((round(thing.centre[0]), round(thing.centre[1])))
            assert isinstance(pixel, tuple)
            assert max(abs(a - b) for a, b in zip(pixel, compose.COLOURS[thing.colour], strict=True)) <= 16
            assert thing.colour != scene.ground
    for one, other in combinations(scene.things, 2):
        apart = (one.box[2] <= other.box[0], other.box[2] <= one.box[0], one.box[3] <= other.box[1])
        assert any((*apart, other.box[3] <= one.box[1]))


def test_on_a_photograph_nothing_is_said_of_what_it_may_show(icons: dict[str, list[Icon]]) -> None:
    many = {**icons, **{f"gadget{n}": icons["apple"] for n in range(8)}}
    grounds = [compose.compose(many, PHOTOS, Random(seed)) for seed in range(40)]
    on_photos = [scene for scene in grounds if scene.ground is None]
    assert on_photos
    for scene in on_photos:
        texts = " ".join(question.text for question in compose.questions(scene, sorted(many), Random(1))).split()
        assert not {"dog", "car", "dog?", "car?", "circle", "circle?"} & set(texts)


def test_a_description_counts() -> None:
    def thing(noun: str, colour: str | None = None) -> compose.Thing:
        return compose.Thing(noun, colour, (0, 0, 9, 9))

    things = (thing("wolf"), thing("wolf"), thing("star", "red"), thing("apple"))
    scene = compose.Composed(Image.new("RGB", (9, 9)), things, "orange")
    assert compose.description(scene) == "Two wolves, a red star and an apple on an orange background."


def test_held_out_icons_leave_another_drawing_of_the_same_thing() -> None:
    icons = [Icon(f"{noun}-{n}", noun, (), "ours", "") for noun in ("dog", "cat", "axe") for n in range(4)]
    icons.append(Icon("lonely", "lonely", (), "ours", ""))
    kept, out = picture_sets.hold_out(icons, 0.4)
    assert len(out) == 6
    assert sorted(kept + out, key=lambda icon: icon.slug) == sorted(icons, key=lambda icon: icon.slug)
    assert {icon.noun for icon in kept} == {"dog", "cat", "axe", "lonely"}


def test_a_set_of_icons_asks_for_their_names(package: Path, tmp_path: Path) -> None:
    read = read_icons(package)
    assert list(picture_sets.write_icons(tmp_path / "icons", read, PHOTOS, 1, each=2)) == list(range(1, 21))
    asked = json.loads((tmp_path / "icons" / "questions.json").read_text())
    assert len(asked) == 20
    right = ["car", "automobile"]
    assert {"image": "ours-automobile-0.jpg", "question": "What is this?", "answer": right, "kind": "ours"} in asked
    named = picture_sets.read_samples(tmp_path, "icons")
    shown = [s for s in named if s["image"] == "icons/ours-anchor-1.jpg"]
    assert any("anchor" in turn["value"] for sample in shown for turn in sample["conversations"])
    assert not any("Yes, there is a car" in turn["value"] for sample in shown for turn in sample["conversations"])


def test_scenes_by_command(package: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    PHOTOS[0].save(photos / "a.png")
    written = []
    for name in ("one", "two"):
        options = ["--icons", str(package), "--photos", str(photos), "--count", "5", "--seed", "7", "--json", "--quiet"]
        result = CliRunner().invoke(cli, ["datagen", "scenes", "-o", str(tmp_path / name), *options])
        assert result.exit_code == 0, result.output
        written.append(json.loads(result.stdout))
    assert [out["pictures"] for out in written] == [5, 5]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert sorted(one) == [*(f"{n:05d}.jpg" for n in range(5)), "questions.json", "samples.json"]

    samples = [from_llava(item, tmp_path / "one") for item in json.loads(one["samples.json"])]
    assert len(samples) == written[0]["samples"]
    assert all(sample.pictures[0].path.is_file() for sample in samples)
    assert any(question.endswith(symbols.SHORT_ANSWER) for sample in samples for question, _ in sample.turns)
    asked = Questions(tmp_path / "one" / "questions.json").read(Data(tmp_path / "one"))
    assert len(asked) == written[0]["questions"]


def test_scenes_of_shapes_need_no_icons(tmp_path: Path) -> None:
    list(picture_sets.write_scenes(tmp_path / "shapes", 8, {}, PHOTOS, 1))
    asked = json.loads((tmp_path / "shapes" / "questions.json").read_text())
    assert {"count", "colour", "presence"} <= {question["kind"] for question in asked}


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(cli, ["datagen", "scenes", "-o", str(tmp_path / "out"), "--count", "1"])
    assert isinstance(result.exception, InputError)
    assert "is there already" in str(result.exception)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("damage", [{"icons": []}, {"prefix": "x"}, {"icons": {"apple": {}}, "prefix": "x"}])
def test_a_broken_package_is_named(package: Path, tmp_path: Path, damage: dict[str, object]) -> None:
    (tmp_path / "icons.json").write_text(json.dumps(damage))
    (tmp_path / "metadata.json").write_bytes((package / "metadata.json").read_bytes())
    with pytest.raises(InputError, match="Iconify"):
        read_icons(tmp_path)


def test_a_folder_without_icons_says_what_to_unpack(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"icons\.json is missing") as caught:
        read_icons(tmp_path)
    assert "npm" in str(caught.value.hint)


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no pictures"):
        picture_sets.read_photos(tmp_path, Random(1))
