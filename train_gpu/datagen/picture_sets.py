"""Folders of drawn pictures with LLaVA samples and with questions for ``llava-edge eval questions``."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from llava_edge.errors import InputError
from llava_edge.images import open_image
from llava_edge.train_gpu.datagen import compose, signs, symbols
from llava_edge.train_gpu.datagen.generate import about_picture, write_json
from llava_edge.train_gpu.datagen.icons import SCENE_NOUNS, Icon, draw_icon
from llava_edge.train_gpu.samples import PICTURE_SUFFIXES

Sample = dict[str, Any]
Layout = dict[str, Any]
QUESTIONS = "questions.json"
SAMPLES = "samples.json"
BOXES = "boxes.json"
ONES_TAUGHT = 0.4
"""The share of questions how many, to which "one" is the answer, that become samples. Three of four have that answer,
and a model that always gives it learns no other."""
_ACCEPTED = {
    "gray": ["gray", "grey"],
    "left": ["left", "to the left", "left of", "on the left"],
    "right": ["right", "to the right", "right of", "on the right"],
}


@dataclass(frozen=True)
class Made:
    """How much of a set is there."""

    pictures: int
    samples: int
    questions: int


def sample(image: str, number: int, turns: Sequence[symbols.Turn]) -> Sample:
    """LLaVA JSON of a conversation about a picture."""
    return about_picture(f"{image}#{number}", image, turns)


def samples(image: str, turns: Sequence[symbols.Turn], rng: Random, chained: float = 0.15) -> list[Sample]:
    """One sample a question, and now and then a conversation of up to three questions."""
    made = [sample(image, number, [turn]) for number, turn in enumerate(turns)]
    different = list({question: (question, answer) for question, answer in turns}.values())
    if len(different) > 1 and rng.random() < chained * len(turns) ** 0.5:
        chain = rng.sample(different, min(len(different), rng.choice((2, 3))))
        made.append(sample(image, len(turns), chain))
    return made


def read_photos(folder: Path | None, rng: Random, count: int = 400) -> list[Image.Image]:
    """Up to ``count`` pictures of a folder, drawn at random, as grounds; large ones are made smaller."""
    if folder is None:
        return []
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise InputError(f"{folder} has no pictures; expected {', '.join(PICTURE_SUFFIXES)}")
    photos = []
    for path in rng.sample(paths, min(len(paths), count)):
        photo = open_image(path)
        photo.thumbnail((2 * compose.SIZE, 2 * compose.SIZE))
        photos.append(photo)
    return photos


def write_scenes(
    folder: Path, count: int, icons: Mapping[str, Sequence[Icon]], photos: Sequence[Image.Image], seed: int
) -> Iterator[Made]:
    """Write ``count`` composed pictures to ``folder``, with ``samples.json``, ``questions.json`` and ``boxes.json``.

    Every question of ``questions.json`` asks for a word. Yields how much there is after each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every: list[Sample] = []
    asked: list[dict[str, Any]] = []
    layouts: dict[str, Layout] = {}
    for number in range(count):
        rng = Random(f"{seed} scene {number}")
        scene = compose.compose(icons, photos, rng)
        name = f"{number:05d}.jpg"
        scene.picture.save(folder / name, quality=92)
        layouts[name] = layout(scene)
        known = compose.questions(scene, sorted(icons), rng)
        taught = [q for q in known if q.word != "one" or rng.random() < ONES_TAUGHT]
        turns = [q.turn(short=q.word is not None and rng.random() < 0.7) for q in taught]
        every += samples(name, turns, rng)
        asked += [
            {"image": name, "question": q.text, "answer": _ACCEPTED.get(q.word, q.word), "kind": q.kind}
            for q in known
            if q.word is not None
        ]
        yield Made(number + 1, len(every), len(asked))
    _write(folder, every, asked, layouts)


def hold_out(icons: Sequence[Icon], share: float = 0.12) -> tuple[list[Icon], list[Icon]]:
    """Icons to train on and icons that are kept out, chosen by the SHA-256 of their names.

    Only those are kept out of which another drawing of the same thing is left.
    """
    left = Counter(icon.noun for icon in icons)
    kept_out: set[Icon] = set()
    for icon in sorted(icons, key=_digest):
        if left[icon.noun] > 1 and len(kept_out) < share * len(icons):
            left[icon.noun] -= 1
            kept_out.add(icon)
    return [icon for icon in icons if icon not in kept_out], [icon for icon in icons if icon in kept_out]


def _digest(icon: Icon) -> str:
    return hashlib.sha256(f"{icon.collection}/{icon.slug}".encode()).hexdigest()


def write_icons(
    folder: Path, icons: Sequence[Icon], photos: Sequence[Image.Image], seed: int, each: int = 1
) -> Iterator[int]:
    """Write ``each`` pictures of every icon to ``folder``, with ``samples.json`` and ``questions.json`` on its name.

    ``boxes.json`` says where it stands. Yields how many pictures are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nouns = sorted({icon.noun for icon in icons} | set(SCENE_NOUNS))
    every: list[Sample] = []
    asked: list[dict[str, Any]] = []
    layouts: dict[str, Layout] = {}
    for done, (icon, number) in enumerate(itertools.product(icons, range(each)), start=1):
        rng = Random(f"{seed} icon {icon.collection}/{icon.slug} {number}")
        name = f"{icon.collection}-{icon.slug}-{number}.jpg"
        made = compose.compose_one(icon.noun, draw_icon(icon), photos, rng)
        made.picture.save(folder / name, quality=92)
        layouts[name] = layout(made)
        named = {word for name in icon.accepted for word in name.split()}
        others = [noun for noun in rng.sample(nouns, 40) if named.isdisjoint(noun.split())]
        every += samples(name, symbols.name_turns(icon.noun, None, others, rng), rng)
        asked.append({"image": name, "question": "What is this?", "answer": icon.accepted, "kind": icon.collection})
        yield done
    _write(folder, every, asked, layouts)


def write_signs(
    folder: Path,
    count: int,
    words: Sequence[str],
    fonts: Sequence[Path],
    photos: Sequence[Image.Image],
    seed: int,
    kind: str = "word",
) -> Iterator[Made]:
    """Write ``count`` pictures of one of ``words`` to ``folder``, with ``samples.json`` and ``boxes.json``.

    One of twelve is left without a word. ``questions.json`` asks for each word, as questions of ``kind``. Yields how
    much there is after each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every: list[Sample] = []
    asked: list[dict[str, Any]] = []
    layouts: dict[str, Layout] = {}
    for number in range(count):
        rng = Random(f"{seed} sign {kind} {number}")
        word = rng.choice(words) if rng.random() > 1 / 12 else ""
        made = signs.compose_sign(word, fonts, photos, rng)
        name = f"{kind.replace(' ', '-')}-{number:05d}.jpg"
        made.picture.save(folder / name, quality=rng.randint(75, 95))
        if word:
            layouts[name] = layout(made)
            asked.append({"image": name, "question": "What does it say?", "answer": word, "kind": kind})
        turns = [q.turn(short=q.word is not None and rng.random() < 0.6) for q in signs.questions(word, words, rng)]
        every += samples(name, turns, rng)
        yield Made(number + 1, len(every), len(asked))
    _write(folder, every, asked, layouts)


def layout(scene: compose.Composed) -> Layout:
    """What stands where, as ``boxes.json`` holds it: edges are shares of the picture's sides, from 0 to 1."""
    things = [
        {"noun": t.noun, "colour": t.colour, "box": [round(edge / compose.SIZE, 4) for edge in t.box]}
        for t in scene.things
    ]
    return {"ground": scene.ground, "things": things}


def read_boxes(folder: Path) -> dict[str, Layout]:
    """The layouts of a folder of drawn pictures, by name with the folder's own: "scenes/00000.jpg".

    Each is what :func:`layout` makes: ``{"ground": COLOUR or None, "things": [{"noun", "colour", "box"}]}``.

    Raises
    ------
    InputError
        The folder has no ``boxes.json`` with layouts in it.
    """
    path = folder / BOXES
    try:
        made: dict[str, Layout] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {BOXES}", hint="Draw the pictures again with `llava-edge datagen scenes`."
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(made, dict) or not made:
        raise InputError(f"{path} holds no layouts; expected {{PICTURE: {{ground, things}}}}")
    return {f"{folder.name}/{name}": values for name, values in made.items()}


def where_samples(root: Path, folder: str, seed: int) -> list[Sample]:
    """Many questions for a word on where the things of the scenes in ``root/FOLDER`` lie."""
    made = []
    for name, values in read_boxes(root / folder).items():
        things = [
            compose.Thing(t["noun"], t["colour"], tuple(edge * compose.SIZE for edge in t["box"]))
            for t in values["things"]
        ]
        rng = Random(f"{seed} where {name}")
        asked = compose.where_questions(things, rng)
        made += [about_picture(f"{name}#where{i}", name, [q.turn(short=True)]) for i, q in enumerate(asked)]
    return made


def read_samples(root: Path, folder: str) -> list[Sample]:
    """The samples of ``root/FOLDER`` with pictures named from ``root``."""
    made: list[Sample] = json.loads((root / folder / SAMPLES).read_text(encoding="utf-8"))
    return [{**one, "id": f"{folder}/{one['id']}", "image": f"{folder}/{one['image']}"} for one in made]


def _write(
    folder: Path, every: Sequence[Sample], asked: Sequence[Mapping[str, Any]], layouts: Mapping[str, Layout]
) -> None:
    write_questions(folder, asked)
    write_json(folder / SAMPLES, every)
    write_json(folder / BOXES, layouts)


def write_questions(folder: Path, asked: Sequence[Mapping[str, Any]]) -> None:
    """Write ``questions.json`` to a folder of pictures, as ``llava-edge eval questions`` reads it."""
    write_json(folder / QUESTIONS, asked)
