"""Pictures that are put together from icons and coloured shapes, so that everything in them is known.

Each comes with questions whose answers follow from the layout: how many, what colour, where, which is bigger, is there
one, and what it shows. Everything is deterministic for a given random generator.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageEnhance

from llava_edge.train_gpu.datagen import symbols
from llava_edge.train_gpu.datagen.icons import Icon, draw_icon

SIZE = 224
"""Pixels of a picture's side."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 32), "green": (38, 150, 50), "blue": (36, 74, 210), "yellow": (246, 214, 30),
    "orange": (244, 130, 22), "purple": (128, 44, 168), "pink": (250, 130, 186), "brown": (120, 72, 34),
    "black": (18, 18, 18), "white": (250, 250, 250), "gray": (132, 132, 132),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "rectangle", "cross")
MOST_PAIRS = 6
"""Pairs of things in a picture of which it is asked how they lie; four things make twelve."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_IN_PHOTOS = symbols.word_set("""
airplane apple backpack banana basketball bat bear bed bee bell bicycle bird boat book bridge bus cake camera candle
car cat chair chicken cloud coat cow cup deer dog door dress drum duck fish flower goat guitar hat horse house kite
ladder lamp laptop leaf lion monkey moon motorcycle mountain parrot phone plant rabbit rocket rose sheep ship shirt
shoe shovel skateboard sled snowman spoon swan tent tiger tomato tractor train tree truck umbrella watch wheel
window zebra
""")
"""Nouns that photographs often show: they neither stand on one nor are asked for there."""
# Where one of the things on the right is, what stands on the left can be seen too, or one could say so.
_SEEN_IN = {
    noun: symbols.word_set(things)
    for noun, things in {
        "bear": "koala panda", "bird": "chicken duck eagle flamingo owl parrot peacock penguin rooster swan",
        "boat": "ship", "car": "ambulance taxi truck", "carrot": "snowman", "cat": "lion tiger", "chicken": "rooster",
        "circle": "basketball clock coconut cookie donut moon pizza watch wheel", "clock": "watch",
        "coat": "dress shirt", "cross": "ambulance", "cup": "teapot", "diamond": "kite rectangle square",
        "dinosaur": "crocodile lizard", "dog": "fox wolf", "door": "car castle house train",
        "fish": "dolphin shark whale", "flower": "plant rose", "guitar": "violin", "hat": "snowman",
        "horse": "unicorn zebra",
        "leaf": "apple carrot flower lemon onion peach pear pineapple plant rose strawberry tomato tree",
        "lizard": "crocodile dinosaur", "monkey": "gorilla", "plant": "cactus flower leaf mushroom rose tree",
        "rectangle": "book door envelope laptop phone square", "rooster": "chicken", "ship": "boat",
        "square": "book rectangle window", "tree": "plant", "truck": "ambulance tractor", "violin": "guitar",
        "watch": "clock", "wheel": "airplane ambulance bicycle bus car motorcycle skateboard taxi tractor train truck",
        "window": "airplane ambulance bus car castle house taxi train truck",
    }.items()
}  # fmt: skip
_PLURALS = {
    "mouse": "mice", "snowman": "snowmen", "fish": "fish", "sheep": "sheep", "deer": "deer", "wolf": "wolves",
    "leaf": "leaves", "bus": "buses", "cross": "crosses", "fox": "foxes", "peach": "peaches",
    "sandwich": "sandwiches", "dress": "dresses", "shrimp": "shrimps", "watch": "watches",
    "toothbrush": "toothbrushes", "butterfly": "butterflies", "strawberry": "strawberries", "octopus": "octopuses",
    "cactus": "cactuses", "potato": "potatoes", "tomato": "tomatoes",
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """A thing in a picture: what it is, a shape's colour, and the edges (left, top, right, bottom) in pixels."""

    noun: str
    colour: str | None
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        """Across and down, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def side(self) -> float:
        """The longer side, in pixels."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)

    @property
    def area(self) -> float:
        """Square pixels between the edges."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


@dataclass(frozen=True)
class Question:
    """A question with its answer as a sentence and as a word, if a word can say it, and what it asks for."""

    kind: str
    text: str
    sentence: str
    word: str | None = None

    def turn(self, *, short: bool) -> symbols.Turn:
        """Question and answer, the short one as the question then asks for."""
        if not short:
            return self.text, self.sentence
        assert self.word is not None
        return f"{self.text}\n{symbols.SHORT_ANSWER}", self.word


@dataclass(frozen=True)
class Composed:
    """A picture, what is in it, and the colour of its ground (None: a photograph)."""

    picture: Image.Image
    things: tuple[Thing, ...]
    ground: str | None


def compose(icons: Mapping[str, Sequence[Icon]], photos: Sequence[Image.Image], rng: Random) -> Composed:
    """Put a picture of one to six things together.

    ``icons`` are the drawings of each noun. Some of the pictures have a photograph as their ground, if there are enough
    icons; it is made paler, and only icons stand on it, since a photograph has shapes and colours of its own.
    Without icons there are shapes only.
    """
    picture, ground = ground_of(photos if fits_on_photos(icons) else (), rng)
    wanted = _wanted(icons if ground else sorted(set(icons) - _IN_PHOTOS), ground, rng)
    boxes = _places(len(wanted), rng)
    things = []
    for (noun, colour), (across, down, side) in zip(wanted, boxes, strict=True):
        drawn = _draw(noun, colour, round(side), icons, rng)
        corner = round(across - drawn.width / 2), round(down - drawn.height / 2)
        things.append(_stand(picture, noun, colour, drawn, corner))
    return Composed(picture, tuple(things), ground)


def fits_on_photos(nouns: Collection[str]) -> bool:
    """Whether there are enough things that photographs don't often show: some to be drawn, others to be missing."""
    return len(set(nouns) - _IN_PHOTOS) >= len(SHAPES)


def compose_one(noun: str, drawn: Image.Image, photos: Sequence[Image.Image], rng: Random) -> Composed:
    """A picture of one thing, drawn as RGBA, that fills a half of its side or more."""
    picture, ground = ground_of(photos, rng)
    drawn = _scaled(drawn, rng.randint(SIZE // 2, SIZE - 10))
    corner = rng.randint(0, SIZE - drawn.width), rng.randint(0, SIZE - drawn.height)
    return Composed(picture, (_stand(picture, noun, None, drawn, corner),), ground)


def _stand(picture: Image.Image, noun: str, colour: str | None, drawn: Image.Image, corner: tuple[int, int]) -> Thing:
    """Put what was drawn into a picture, its upper left corner at (left, top)."""
    picture.paste(drawn, corner, drawn)
    left, top = corner
    return Thing(noun, colour, (left, top, left + drawn.width, top + drawn.height))


def ground_of(photos: Sequence[Image.Image], rng: Random) -> tuple[Image.Image, str | None]:
    """A ground with the name of its colour, or three times of ten a photograph without one."""
    if photos and rng.random() < 0.3:
        return _photo(rng.choice(photos), rng), None
    colour = rng.choice(("white", *COLOURS))
    return Image.new("RGB", (SIZE, SIZE), shade(colour, rng)), colour


def _scaled(drawn: Image.Image, side: int) -> Image.Image:
    scale = side / max(drawn.size)
    wide, high = (max(1, round(edge * scale)) for edge in drawn.size)
    return drawn.resize((wide, high), Image.Resampling.BILINEAR)


def _wanted(nouns: Collection[str], ground: str | None, rng: Random) -> list[tuple[str, str | None]]:
    """What to draw, as (noun, a shape's colour): several of one kind, or a few different things."""

    def one(taken: Sequence[str]) -> tuple[str, str | None]:
        left = [noun for noun in nouns if noun not in taken]
        shape = ground is not None and (not left or rng.random() < 0.45)
        noun = rng.choice([noun for noun in SHAPES if noun not in taken] if shape else left)
        return noun, rng.choice([c for c in COLOURS if c != ground]) if shape else None

    if rng.random() < 0.5:
        first, second = one(()), one(())
        count = rng.randint(1, 5)
        more = rng.choice((0, 0, 1, 2, 3)) if second[0] != first[0] else 0
        chosen = [first] * count + [second] * min(more, 6 - count)
    else:
        chosen = []
        for _ in range(rng.randint(2, 4)):
            chosen.append(one([noun for noun, _ in chosen]))
    rng.shuffle(chosen)
    return chosen


def _places(count: int, rng: Random) -> list[tuple[float, float, float]]:
    """Centres (across, down) and sides in pixels of squares that don't overlap."""
    largest = {1: 150, 2: 105, 3: 88, 4: 80}.get(count, 66)
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(60 * count):
            side = rng.uniform(0.5, 1) * largest
            across, down = (rng.uniform(side / 2, SIZE - side / 2) for _ in range(2))
            if all(max(abs(across - a), abs(down - d)) > (side + s) / 2 + 3 for a, d, s in placed):
                placed.append((across, down, side))
                if len(placed) == count:
                    return placed


def shade(colour: str, rng: Random) -> tuple[int, ...]:
    """A tone of one of :data:`COLOURS`, as red, green and blue from 0 to 255."""
    return tuple(min(255, max(0, level + rng.randint(-14, 14))) for level in COLOURS[colour])


def _photo(photo: Image.Image, rng: Random) -> Image.Image:
    side = min(photo.size)
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    ground = photo.convert("RGB").crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
    return Image.blend(ImageEnhance.Color(ground).enhance(0.6), Image.new("RGB", ground.size, "white"), 0.4)


def _draw(noun: str, colour: str | None, side: int, icons: Mapping[str, Sequence[Icon]], rng: Random) -> Image.Image:
    """RGBA, its longer side ``side`` pixels."""
    if colour is None:
        drawn = draw_icon(rng.choice(icons[noun]))
    else:
        drawn = Image.new("RGBA", (4 * side, 4 * side))
        outline = [(x * 4 * side, y * 4 * side) for x, y in _outline(noun, rng)]
        ImageDraw.Draw(drawn).polygon(outline, fill=shade(colour, rng))
        drawn = drawn.crop(drawn.getchannel("A").getbbox())
    return _scaled(drawn, side)


def _outline(shape: str, rng: Random) -> list[tuple[float, float]]:
    """Corners of a shape, from 0 to 1 across and down."""
    turns = [2 * math.pi * step / 60 for step in range(60)]
    if shape == "circle":
        return [(0.5 + math.sin(t) / 2, 0.5 - math.cos(t) / 2) for t in turns]
    if shape == "heart":
        return [
            (0.5 + math.sin(t) ** 3 / 2,
             0.47 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 34)
            for t in turns
        ]  # fmt: skip
    if shape == "star":
        radii = [(0.5 if corner % 2 == 0 else 0.2, math.pi * corner / 5) for corner in range(10)]
        return [(0.5 + r * math.sin(t), 0.5 - r * math.cos(t)) for r, t in radii]
    if shape == "rectangle":
        corners, turned = [(0.0, 0.25), (1.0, 0.25), (1.0, 0.75), (0.0, 0.75)], rng.random() < 0.5
        return [(y, x) for x, y in corners] if turned else corners
    if shape == "cross":
        a, b = 0.33, 0.67
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    return {
        "square": [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)],
        "triangle": [(0.5, 0.0), (1.0, 0.9), (0.0, 0.9)],
        "diamond": [(0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)],
    }[shape]


def plural(noun: str) -> str:
    """The plural of a noun that this module draws."""
    return _PLURALS.get(noun, f"{noun}s")


def counted(number: int, thing: str) -> str:
    """A number and what it counts, "two red stars"; one has its article."""
    return symbols.article(thing) if number == 1 else f"{NUMBERS[number]} {plural(thing)}"


def description(scene: Composed) -> str:
    """One sentence with everything that stands on a plain ground."""
    kinds = Counter((thing.colour, thing.noun) for thing in scene.things)
    parts = [counted(number, f"{colour} {noun}" if colour else noun) for (colour, noun), number in kinds.items()]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{listed[0].upper()}{listed[1:]} on {symbols.article(str(scene.ground))} background."


def questions(scene: Composed, nouns: Sequence[str], rng: Random) -> list[Question]:
    """Everything that is asked about a picture; ``nouns`` are things that may be missing from it."""
    amounts = Counter(thing.noun for thing in scene.things)
    seen = _seen_in(amounts)
    single = _single(scene.things)
    possible = (*nouns, *SHAPES) if scene.ground else [noun for noun in nouns if noun not in _IN_PHOTOS]
    missing = [noun for noun in possible if noun not in seen | set(amounts)]
    missing = rng.sample(missing, min(3, len(missing)))  # of shapes alone there may be two
    asked = [_count(noun, number, rng) for noun, number in amounts.items() if noun not in seen]
    asked += _colours(scene, rng)
    pairs = list(itertools.permutations(single, 2))
    pairs = rng.sample(pairs, min(MOST_PAIRS, len(pairs)))
    asked += [question for pair in pairs for question in _relations(*pair, rng)]
    asked += [_where(thing, rng) for thing in single]
    present = rng.sample(sorted(amounts), min(2, len(amounts)))
    asked += [_presence(noun, True, rng) for noun in present]
    asked += [_presence(noun, False, rng) for noun in missing[: len(present)]]
    asked.append(_absent(missing[-1], rng))
    if scene.ground:
        asked.append(Question("description", rng.choice(symbols.BRIEF), description(scene)))
    return asked


def where_questions(things: Sequence[Thing], rng: Random) -> list[Question]:
    """Where each thing lies that is there once, and how each two of them lie, in several wordings."""
    single = _single(things)
    asked = [_where(thing, rng) for thing in single]
    for pair in itertools.permutations(single, 2):
        asked += [question for _ in range(2) for question in _relations(*pair, rng) if question.kind == "relation"]
    return list({question.text: question for question in asked}.values())


def _single(things: Sequence[Thing]) -> list[Thing]:
    """Those that are there once and that nothing else could be taken for."""
    amounts = Counter(thing.noun for thing in things)
    seen = _seen_in(amounts)
    return [thing for thing in things if amounts[thing.noun] == 1 and thing.noun not in seen]


def _seen_in(nouns: Collection[str]) -> set[str]:
    """What can be seen in one of these, too."""
    return {noun for noun, things in _SEEN_IN.items() if things & set(nouns)}


def _absent(noun: str, rng: Random) -> Question:
    """What can't be answered, in words that are used of what is there too."""
    shape = noun in SHAPES and rng.random() < 0.7
    text = f"What {rng.choice(symbols.COLOUR_WORDS)} is the {noun}?" if shape else f"Where is the {noun}?"
    return Question("absent", text, symbols.cannot_see(noun))


def _where(thing: Thing, rng: Random) -> Question:
    """In which ninth of the picture it is."""
    column, row = (min(2, int(3 * middle / SIZE)) for middle in thing.centre)
    place = " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column]))) or "middle"
    text = rng.choice((f"Where is the {thing.noun}?", f"Where do you see the {thing.noun}?"))
    where = "in the middle" if place == "middle" else f"at the {place}"
    return Question("place", text, f"The {thing.noun} is {where}.", place)


def _count(noun: str, number: int, rng: Random) -> Question:
    many = plural(noun)
    text = rng.choice(
        (f"How many {many} are there?", f"How many {many} do you see?", f"How many {many} are in the picture?")
    )
    sentence = f"There is one {noun}." if number == 1 else f"There are {NUMBERS[number]} {many}."
    return Question("count", text, sentence, NUMBERS[number])


def _colours(scene: Composed, rng: Random) -> list[Question]:
    asked = []
    shapes: dict[str, set[str]] = {}
    for thing in scene.things:
        if thing.colour:
            shapes.setdefault(thing.noun, set()).add(thing.colour)
    amounts = Counter(thing.noun for thing in scene.things)
    colour_word = rng.choice(symbols.COLOUR_WORDS)
    for noun, colours in shapes.items():
        (colour,) = colours
        be, name = ("is", noun) if amounts[noun] == 1 else ("are", plural(noun))
        asked.append(Question("colour", f"What {colour_word} {be} the {name}?", f"The {name} {be} {colour}.", colour))
    if scene.ground and rng.random() < 0.4:
        text = f"What {colour_word} is the background?"
        asked.append(Question("colour", text, f"The background is {scene.ground}.", scene.ground))
    return asked


def _relations(one: Thing, other: Thing, rng: Random) -> list[Question]:
    """Where ``one`` is, seen from ``other``, if that is plain, and which is bigger, if that is."""
    asked = []
    across, down = (one.centre[axis] - other.centre[axis] for axis in (0, 1))
    if max(abs(across), abs(down)) > 1.4 * min(abs(across), abs(down)):
        sideways = abs(across) > abs(down)
        words = ("left", "right") if sideways else ("above", "below")
        place = words[(across if sideways else down) > 0]
        where = f"to the {place} of" if sideways else place
        if rng.random() < 0.5:
            said = rng.choice(words)
            claim = f"to the {said} of" if sideways else said
            right = said == place
            sentence = f"{'Yes' if right else 'No'}, the {one.noun} is {where} the {other.noun}."
            text = f"Is the {one.noun} {claim} the {other.noun}?"
            asked.append(Question("relation", text, sentence, "Yes" if right else "No"))
        else:
            choice = "to the left or to the right of" if sideways else "above or below"
            text = f"Is the {one.noun} {choice} the {other.noun}?"
            asked.append(Question("relation", text, f"The {one.noun} is {where} the {other.noun}.", place))
    if one.side > 1.4 * other.side and one.area > 1.6 * other.area:
        names = [one.noun, other.noun]
        rng.shuffle(names)
        text = f"Which looks bigger, the {names[0]} or the {names[1]}?"
        asked.append(Question("size", text, f"The {one.noun} looks bigger.", one.noun))
    return asked


def _presence(noun: str, present: bool, rng: Random) -> Question:
    text, sentence = symbols.presence(noun, present, rng, short=0.0)
    return Question("presence", text, sentence, "Yes" if present else "No")
