"""Drawn pictures: what is said of them is what is in them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from llava_edge.bench.tasks.questions import Questions
from llava_edge.bench.tasks.reading import Data
from llava_edge.cli import cli
from llava_edge.errors import InputError
from llava_edge.train_gpu.datagen import compose, picture_sets, symbols
from llava_edge.train_gpu.datagen.icons import SCENE_NOUNS, Icon, by_noun, draw_icon, read_icons
from llava_edge.train_gpu.samples import from_llava

NAMES = (
    "anchor",
    "ant",
    "apple",
    "axe",
    "banana",
    "cactus",
    "crab",
    "crown",
    "koala",
    "snail",
    "dog-face",
    "automobile",
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package in Iconify's form: twelve drawings that differ in colour and width, and one of a person."""
    folder = tmp_path_factory.mktemp("icons")
    icons = {
        name: {"body": f'<rect x="2" y="8" width="{8 + 2 * n}" height="16" fill="#{n * 20:02x}80{n:02x}"/>'}
        for n, name in enumerate((*NAMES, "old-man"))
    }
    (folder / "icons.json").write_text(json.dumps({"prefix": "ours", "icons": icons, "width": 32, "height": 32}))
    categories = {"Objects": list(NAMES), "People & Body": ["old-man"], "Food & Drink": ["not-there"]}
    (folder / "metadata.json").write_text(json.dumps({"categories": categories}))
    return folder


@pytest.fixture(scope="module")
def icons(package: Path) -> dict[str, list[Icon]]:
    return by_noun(read_icons(package))


NOUNS = (*NAMES[:-2], "dog", "car")
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
    assert drawn.getpixel((5, 5)) == (40, 128, 2, 255)


def sentence_of(question: compose.Question, scene: compose.Composed) -> str:
    """What the long answer has to be, by the things in the picture and by the short answer."""
    amounts = Counter(thing.noun for thing in scene.things)
    only = {thing.noun: thing for thing in scene.things if amounts[thing.noun] == 1}
    words = question.text.rstrip("?").replace(",", "").split()
    named = sorted((noun for noun in (*NOUNS, *compose.SHAPES) if noun in words), key=words.index)
    several = [noun for noun in amounts if compose.plural(noun) in words]
    if question.kind == "count":
        (noun,) = several
        assert question.word == compose.NUMBERS[amounts[noun]]
        return f"There is one {noun}." if amounts[noun] == 1 else f"There are {question.word} {compose.plural(noun)}."
    if question.kind == "colour":
        if "background" in words:
            assert question.word == scene.ground
            return f"The background is {scene.ground}."
        noun = (several or named)[0]
        assert {thing.colour for thing in scene.things if thing.noun == noun} == {question.word}
        return f"The {compose.plural(noun)} are {question.word}." if several else f"The {noun} is {question.word}."
    if question.kind == "place":
        x, y = only[named[0]].centre
        third = compose.SIZE / 3
        assert ("left" in question.word) == (x < third)
        assert ("right" in question.word) == (x >= 2 * third)
        assert ("top" in question.word) == (y < third)
        assert ("bottom" in question.word) == (y >= 2 * third)
        return f"The {named[0]} is {'in the middle' if question.word == 'middle' else f'at the {question.word}'}."
    if question.kind == "size":
        small, big = sorted((only[noun] for noun in named), key=lambda thing: thing.area)
        assert (big.side > small.side, question.word) == (True, big.noun)
        return f"The {big.noun} looks bigger."
    if question.kind == "relation":
        one, other = (only[noun] for noun in named)
        (left, top), (x, y) = one.centre, other.centre
        sideways = abs(left - x) > abs(top - y)
        place = ("left" if left < x else "right") if sideways else ("above" if top < y else "below")
        said = f"the {one.noun} is {f'to the {place} of' if sideways else place} the {other.noun}."
        if question.word in ("Yes", "No"):
            assert (question.word == "Yes") == (place in words)
            return f"{question.word}, {said}"
        assert question.word == place
        return f"T{said[1:]}"
    if question.kind == "presence":
        there = named[0] in amounts
        assert question.word == ("Yes" if there else "No")
        thing = symbols.article(named[0])
        return f"Yes, there is {thing} in the picture." if there else f"No, there is no {named[0]} in the picture."
    if question.kind == "absent":
        assert named[0] not in amounts
        return f"I can't see {symbols.article(named[0])} in the picture."
    return compose.description(scene)


def test_what_is_asked_follows_from_the_layout(icons: dict[str, list[Icon]]) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(150):
        rng = Random(seed)
        scene = compose.compose(icons, PHOTOS, rng)
        for question in compose.questions(scene, sorted(icons), rng):
            assert question.sentence == sentence_of(question, scene), question
            kinds[question.kind] += 1
    expected = {"count", "colour", "place", "relation", "size", "presence", "absent", "description"}
    assert set(kinds) == expected
    assert min(kinds.values()) >= 10


def test_every_pair_is_asked_for_where_things_lie(icons: dict[str, list[Icon]]) -> None:
    answers: Counter[str | None] = Counter()
    for seed in range(60):
        scene = compose.compose(icons, PHOTOS, Random(seed))
        asked = compose.where_questions(scene.things, Random(seed))
        assert {question.kind for question in asked} <= {"place", "relation"}
        assert len({question.text for question in asked}) == len(asked)
        for question in asked:
            assert question.sentence == sentence_of(question, scene), question
        answers.update(question.word for question in asked if question.kind == "relation")
    assert {"Yes", "No", "left", "right", "above", "below"} == set(answers)
    assert 0.7 < answers["Yes"] / answers["No"] < 1.4


def test_no_question_gives_its_answer_away(icons: dict[str, list[Icon]]) -> None:
    """What is asked of absent things begins as what is asked of present ones, and as often in either spelling."""
    asked = []
    for seed in range(300):
        rng = Random(seed)
        asked += compose.questions(compose.compose(icons, PHOTOS, rng), sorted(icons), rng)
    absent = Counter(question.text.rsplit(" ", 1)[0] for question in asked if question.kind == "absent")
    present = {question.text.rsplit(" ", 1)[0] for question in asked if question.kind in ("place", "colour")}
    assert set(absent) == {"What colour is the", "What color is the", "Where is the"}
    assert set(absent) <= present
    answers = Counter(question.word for question in asked if question.kind == "presence")
    assert answers["Yes"] == answers["No"]


def test_what_is_seen_in_another_thing_is_not_missing() -> None:
    things = (compose.Thing("owl", None, (0, 0, 50, 50)), compose.Thing("square", "red", (100, 100, 150, 150)))
    scene = compose.Composed(Image.new("RGB", (compose.SIZE, compose.SIZE)), things, "blue")
    nouns = ["owl", "bird", "anchor", "ant", "apple"]
    asked = [question for seed in range(60) for question in compose.questions(scene, nouns, Random(seed))]
    texts = " ".join(question.text for question in asked if question.kind in ("presence", "absent"))
    assert "ant" in texts
    assert not {"bird", "rectangle", "diamond"} & set(texts.replace("?", "").split())


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("unicorn", "a unicorn"), ("umbrella", "an umbrella"), ("hourglass", "an hourglass"), ("euphonium", "a euphonium"),
     ("apple", "an apple"), ("onion", "an onion"), ("car", "a car"), ("one-way sign", "a one-way sign")],
)  # fmt: skip
def test_articles(noun: str, expected: str) -> None:
    assert symbols.article(noun) == expected


def test_plurals() -> None:
    many = {noun: compose.plural(noun) for noun in (*SCENE_NOUNS, *compose.SHAPES)}
    irregular = {noun: word for noun, word in many.items() if word != f"{noun}s"}
    assert irregular["snowman"] == "snowmen"
    assert all(word.endswith(("es", "fish", "deer", "sheep", "mice", "men")) for word in irregular.values())
    assert not any(noun.endswith(("s", "x", "z", "ch", "sh")) for noun in set(many) - set(irregular))


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


def test_on_a_photograph_nothing_is_said_of_what_photographs_show(icons: dict[str, list[Icon]]) -> None:
    many = {**icons, **{f"gadget{n}": icons["apple"] for n in range(8)}}
    made = [compose.compose(many, PHOTOS, Random(seed)) for seed in range(60)]
    on_photos = [scene for scene in made if scene.ground is None]
    assert len(on_photos) > 5
    for scene in on_photos:
        assert not {thing.noun for thing in scene.things} & {"apple", "banana", "car", "dog", *compose.SHAPES}
        texts = " ".join(question.text for question in compose.questions(scene, sorted(many), Random(1)))
        assert not {"dog", "car", "apple", "circle", "square"} & set(texts.replace("?", "").split())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_icons_are_enough(icons: dict[str, list[Icon]], count: int) -> None:
    few = dict(list(icons.items())[:count])
    for seed in range(40):
        scene = compose.compose(few, PHOTOS, Random(seed))
        assert scene.ground is not None
        assert compose.questions(scene, sorted(few), Random(seed))


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
    assert list(picture_sets.write_icons(tmp_path / "icons", read, PHOTOS, 1, each=2)) == list(range(1, 25))
    asked = json.loads((tmp_path / "icons" / "questions.json").read_text())
    assert len(asked) == 24
    right = ["car", "automobile"]
    assert {"image": "ours-automobile-0.jpg", "question": "What is this?", "answer": right, "kind": "ours"} in asked
    named = picture_sets.read_samples(tmp_path, "icons")
    shown = [s for s in named if s["image"] == "icons/ours-anchor-1.jpg"]
    assert any("anchor" in turn["value"] for sample in shown for turn in sample["conversations"])
    assert not any("Yes, there is a car" in turn["value"] for sample in shown for turn in sample["conversations"])


def test_boxes_frame_what_was_drawn(package: Path, tmp_path: Path) -> None:
    """On a plain ground all that differs from it lies in the boxes, up to what JPEG blurs."""
    list(picture_sets.write_scenes(tmp_path / "scenes", 12, {}, (), 3))
    list(picture_sets.write_icons(tmp_path / "icons", read_icons(package), (), 3))
    boxes = picture_sets.read_boxes(tmp_path / "scenes") | picture_sets.read_boxes(tmp_path / "icons")
    assert {len(layout["things"]) for name, layout in boxes.items() if name.startswith("icons")} == {1}
    for name, layout in boxes.items():
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"), np.int16)
        framed = np.zeros(pixels.shape[:2], bool)
        for thing in layout["things"]:
            left, top, right, bottom = (round(edge * compose.SIZE) for edge in thing["box"])
            framed[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = True
        ground = np.median(pixels[~framed], axis=0)
        drawn = np.abs(pixels - ground).max(axis=-1) > 40
        assert not (drawn & ~framed).any(), name
        for thing in layout["things"]:
            left, top, right, bottom = (round(edge * compose.SIZE) for edge in thing["box"])
            assert drawn[top:bottom, left:right].any(), (name, thing)


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
    assert sorted(one) == [*(f"{n:05d}.jpg" for n in range(5)), "boxes.json", "questions.json", "samples.json"]

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


def test_samples_ask_less_for_one_than_questions_do(tmp_path: Path) -> None:
    list(picture_sets.write_scenes(tmp_path / "shapes", 60, {}, (), 2))
    asked = json.loads((tmp_path / "shapes" / "questions.json").read_text())
    answers = [question["answer"] for question in asked if question["kind"] == "count"]
    turns = {
        (item["image"], item["conversations"][0]["value"], item["conversations"][1]["value"])
        for item in json.loads((tmp_path / "shapes" / "samples.json").read_text())
    }
    taught = [answer for _, question, answer in turns if "How many" in question]
    ones = sum("one" in symbols.words(answer) for answer in taught)
    assert answers.count("one") > 50
    assert len(taught) - ones == len(answers) - answers.count("one")
    assert 0.2 * answers.count("one") < ones < 0.6 * answers.count("one")


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(cli, ["datagen", "scenes", "-o", str(tmp_path / "out"), "--count", "1"])
    assert isinstance(result.exception, InputError)
    assert "is there already" in str(result.exception)
    assert list((tmp_path / "out").iterdir()) == []


def test_photographs_without_icons_are_an_error(tmp_path: Path) -> None:
    PHOTOS[0].save(tmp_path / "a.png")
    result = CliRunner().invoke(cli, ["datagen", "scenes", "-o", str(tmp_path / "out"), "--photos", str(tmp_path)])
    assert "needs --icons" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_run_that_fails_leaves_nothing(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "package"
    broken.mkdir()
    icons = json.loads((package / "icons.json").read_text())
    for icon in icons["icons"].values():
        icon["body"] = "<rect"
    (broken / "icons.json").write_text(json.dumps(icons))
    (broken / "metadata.json").write_bytes((package / "metadata.json").read_bytes())
    options = ["--icons", str(broken), "--count", "20", "--quiet"]
    result = CliRunner().invoke(cli, ["datagen", "scenes", "-o", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, InputError)
    assert "can't be drawn" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


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
