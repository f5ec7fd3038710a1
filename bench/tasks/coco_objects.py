"""The 80 object categories of COCO and the words that people use for them.

The list is our own and shorter than the one behind published CHAIR figures; a file in that format (a line an object:
its name, then its synonyms, with commas) can take its place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from llava_edge.errors import InputError

_SYNONYMS = """
person, man, woman, boy, girl, child, kid, baby, toddler, infant, people, men, women, children, guy, lady, player, \
skateboarder, skier, snowboarder, surfer, biker, cyclist, rider, climber, runner, swimmer, fisherman, worker, police, \
policeman, officer, crowd, couple, family, gentleman, teenager, adult, bride, groom, soldier, dancer, singer, musician
bicycle, bike, cycle
car, automobile, taxi, cab, van, suv, sedan, minivan
motorcycle, motorbike, motor bike, motor cycle, dirt bike, scooter, moped
airplane, plane, aeroplane, jet, aircraft, passenger jet
bus, minibus, school bus
train, locomotive, subway, railway car, tram
truck, lorry, pickup, fire truck
boat, ship, sailboat, canoe, kayak, raft, ferry, sail boat, rowboat
traffic light, stoplight, traffic signal, street light
fire hydrant, hydrant
stop sign
parking meter
bench, park bench
bird, duck, goose, gull, seagull, pigeon, parrot, owl, eagle, hawk, swan, flamingo, ostrich, penguin, rooster, geese
cat, kitten, kitty
dog, puppy, pup, poodle, beagle, greyhound, retriever, terrier, collie, dalmatian, bulldog, hound
horse, pony, foal, colt
sheep, lamb, ram, goat
cow, calf, bull, cattle, ox, oxen
elephant
bear, grizzly, panda, polar bear
zebra
giraffe
backpack, rucksack, knapsack
umbrella, parasol
handbag, purse, hand bag, pocketbook
tie, necktie, bow tie
suitcase, luggage, briefcase
frisbee, flying disc
skis, ski
snowboard
sports ball, ball, football, soccer ball, basketball, baseball, tennis ball, volleyball, beach ball
kite
baseball bat
baseball glove, mitt
skateboard, skate board
surfboard, surf board, boogie board
tennis racket, racket, racquet
bottle, water bottle, beer bottle
wine glass
cup, mug, coffee cup, glass of water
fork
knife, knives
spoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger, sub
orange
broccoli
carrot
hot dog
pizza
donut, doughnut
cake, cupcake, cheesecake
chair, stool, armchair, high chair
couch, sofa, loveseat
potted plant, houseplant, pot plant
bed
dining table, table, desk
toilet, toilet seat
tv, television, tv monitor, television set
laptop, notebook computer
mouse, computer mouse
remote, remote control
keyboard, computer keyboard
cell phone, phone, cellphone, mobile phone, telephone, smartphone
microwave, microwave oven
oven, stove
toaster
sink
refrigerator, fridge
book
clock
vase
scissors
teddy bear, teddy
hair drier, hairdryer, hair dryer
toothbrush, tooth brush
"""
# Words that contain an object's name and are none.
_NOT_OBJECTS = ("home plate", "train track", "train tracks", "bus stop", "cat tree", "dog house")
_SINGULAR = {
    "buses": "bus", "glasses": "glass", "skis": "skis", "ties": "tie", "neckties": "necktie", "tvs": "tv",
    "calves": "calf", "mice": "mouse",
}  # fmt: skip
# Of these a young or a grown one is an animal, and no person beside it.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_VEHICLES = {"passenger jet": "airplane", "passenger train": "train"}


class Objects:
    """Finds objects in text."""

    def __init__(self, lines: Sequence[Sequence[str]]) -> None:
        self.names = [line[0] for line in lines]
        self._object = {_singular_phrase(word): line[0] for line in lines for word in line}
        self._object |= {_singular_phrase(phrase): "" for phrase in _NOT_OBJECTS}
        for name in self.names:
            if name in _ANIMALS:
                same = [_singular_phrase(word) for line in lines if line[0] == name for word in line]
                self._object |= {f"{age} {word}": name for age in ("baby", "adult") for word in same}
        self._object |= {phrase: name for phrase, name in _VEHICLES.items() if name in self.names}
        self._longest = max(len(phrase.split()) for phrase in self._object)

    def mentions(self, text: str) -> list[str]:
        """The objects that a text names, in its order, as often as it names them; longer phrases go first."""
        words = [_singular(word) for word in re.findall(r"[a-z]+", text.lower())]
        found = []
        place = 0
        while place < len(words):
            for length in range(min(self._longest, len(words) - place), 0, -1):
                name = self._object.get(" ".join(words[place : place + length]))
                if name is not None:
                    place += length
                    if name:
                        found.append(name)
                    break
            else:
                place += 1
        return found


@functools.cache
def coco_objects() -> Objects:
    """The 80 categories with this project's synonyms."""
    lines = _SYNONYMS.strip().split("\n")
    return Objects([[word.strip() for word in line.split(",")] for line in lines])


def read_objects(path: Path) -> Objects:
    """Synonyms from a file: a line an object, its name first, commas between."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    parsed = [[word.strip().lower() for word in line.split(",") if word.strip()] for line in lines]
    if not any(parsed):
        raise InputError(f"{path} names no object; expected a line an object: its name, then synonyms, with commas")
    return Objects([words for words in parsed if words])


def _singular_phrase(phrase: str) -> str:
    return " ".join(_singular(word) for word in re.findall(r"[a-z]+", phrase.lower()))


def _singular(word: str) -> str:
    """The word without its plural's ending; synonyms go the same way."""
    if word in _SINGULAR:
        return _SINGULAR[word]
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word
