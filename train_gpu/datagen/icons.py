"""Pictures of things with a name: sets of icons in Iconify's JSON, as ``@iconify-json/noto`` on npm.

Names are the icons' own, with what nobody would say made plain (``automobile`` is a car, ``dog-face`` a dog).
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_edge.errors import InputError, require_extra
from llava_edge.train_gpu.datagen.symbols import word_set

SCENE_NOUNS = sorted(
    word_set("""
airplane ambulance anchor ant apple axe backpack banana basketball bat bear bed bee bell bicycle bird boat book
bridge bus butterfly cactus cake camel camera candle car carrot castle cat chair chicken clock cloud coat coconut
cookie cow crab crocodile crown cup deer dinosaur dog dolphin donut door dress drum duck eagle egg elephant envelope
fish flamingo flower fox frog giraffe goat gorilla guitar hamburger hammer hat hedgehog helicopter horse house
kangaroo key kite koala ladder lamp laptop leaf lemon lion lizard lobster monkey moon motorcycle mountain mouse
mushroom octopus onion owl panda parrot peach peacock pear pencil penguin phone piano pig pineapple pizza plant
potato rabbit rocket rooster rose sandwich shark sheep ship shirt shoe shovel shrimp skateboard sled snail snake
snowman spider spoon strawberry swan taxi teapot telescope tent tiger tomato toothbrush tractor train tree truck
trumpet turtle umbrella unicorn violin watch watermelon whale wheel window wolf zebra
""")
)
"""Things that everybody names alike. Those that a collection lacks are left out."""

_CALLED = {
    "automobile": "car", "oncoming-automobile": "car", "sport-utility-vehicle": "car", "oncoming-taxi": "taxi",
    "oncoming-bus": "bus", "oncoming-police-car": "police car", "delivery-truck": "truck", "pickup-truck": "truck",
    "articulated-lorry": "truck", "locomotive": "train", "high-speed-train": "train", "bullet-train": "train",
    "fire-engine": "fire truck", "motor-boat": "boat", "speedboat": "boat", "sailboat": "boat",
    "passenger-ship": "ship", "red-apple": "apple", "deciduous-tree": "tree", "evergreen-tree": "tree",
    "palm-tree": "palm tree", "ear-of-corn": "corn", "doughnut": "donut", "lady-beetle": "ladybug", "honeybee": "bee",
    "ewe": "sheep", "two-hump-camel": "camel", "spouting-whale": "whale", "monarch-butterfly": "butterfly",
    "baby-chick": "chick", "front-facing-baby-chick": "chick", "hatching-chick": "chick", "tropical-fish": "fish",
    "sauropod": "dinosaur", "t-rex": "dinosaur", "leafy-green": "lettuce", "bell-pepper": "pepper",
    "mobile-phone": "phone", "telephone": "phone", "television": "TV", "closed-book": "book", "blue-book": "book",
    "green-book": "book", "orange-book": "book", "open-book": "book", "alarm-clock": "clock",
    "mantelpiece-clock": "clock", "camera-with-flash": "camera", "womans-hat": "hat", "top-hat": "hat",
    "billed-cap": "cap", "t-shirt": "shirt", "running-shoe": "shoe", "mans-shoe": "shoe", "high-heeled-shoe": "shoe",
    "flat-shoe": "shoe", "womans-boot": "boot", "hiking-boot": "boot", "hot-beverage": "cup",
    "teacup-without-handle": "cup", "birthday-cake": "cake", "potted-plant": "plant", "tulip": "flower",
    "hibiscus": "flower", "white-flower": "flower", "blossom": "flower", "cherry-blossom": "flower",
    "maple-leaf": "leaf", "crescent-moon": "moon", "full-moon": "moon", "black-cat": "cat", "black-bird": "bird",
    "small-airplane": "airplane", "closed-umbrella": "umbrella", "house-with-garden": "house",
    "derelict-house": "house", "bridge-at-night": "bridge", "snowman-without-snow": "snowman", "sun-with-face": "sun",
    "glowing-star": "star", "light-bulb": "lamp", "guide-dog": "dog", "service-dog": "dog", "poodle": "dog",
    "mount-fuji": "mountain", "snow-capped-mountain": "mountain", "racing-car": "racing car",
    "kick-scooter": "scooter", "motor-scooter": "scooter", "musical-keyboard": "piano",
    "fork-and-knife": "fork and knife", "red-paper-lantern": "lantern", "christmas-tree": "Christmas tree",
    "chess-pawn": "pawn", "game-die": "die", "soft-ice-cream": "ice cream", "high-voltage": "lightning",
    "gem-stone": "diamond", "wrapped-gift": "gift", "jack-o-lantern": "pumpkin", "pool-8-ball": "pool ball",
    "glass-of-milk": "milk",
}  # fmt: skip
_ALSO = {
    "donut": ("doughnut",), "airplane": ("plane",), "bicycle": ("bike",), "phone": ("telephone", "cell phone"),
    "boat": ("sailboat", "ship"), "ship": ("boat",), "TV": ("television",), "hamburger": ("burger",),
    "rooster": ("chicken", "bird"), "chick": ("chicken", "bird"), "motorcycle": ("motorbike",),
    "taxi": ("car", "cab"), "police car": ("car",), "racing car": ("car", "race car"),
    "fire truck": ("truck", "fire engine"), "shrimp": ("prawn",), "lamp": ("light bulb", "bulb"), "rose": ("flower",),
    "sunflower": ("flower",), "palm tree": ("tree",), "Christmas tree": ("tree",),
    "soccer ball": ("ball", "football"), "basketball": ("ball",), "volleyball": ("ball",), "baseball": ("ball",),
    "tennis": ("tennis ball", "ball"), "gift": ("present", "box"), "eagle": ("bird",), "duck": ("bird",),
    "owl": ("bird",), "parrot": ("bird",), "dove": ("bird",), "swan": ("bird",), "polar bear": ("bear",),
    "peacock": ("bird",), "penguin": ("bird",), "flamingo": ("bird",), "turkey": ("bird",), "goose": ("bird",),
    "ferry": ("boat", "ship"), "canoe": ("boat",), "ladybug": ("beetle", "bug"), "tangerine": ("orange",),
    "green apple": ("apple",), "cup": ("coffee", "tea", "mug"), "cap": ("hat",), "boot": ("shoe",),
    "lantern": ("lamp",), "minibus": ("van", "bus"), "tram": ("train",), "metro": ("train",),
}  # fmt: skip
_LEFT_OUT = re.compile(
    r"skin-tone|oclock|thirty|moon-|quarter-moon|first-quarter|arrow|-with-(lower|raised|lightning|rain|snow|slash|pen|"
    r"key|cloud)|behind|speaker|volume|banknote|yen|envelope-|mailbox|landslide|hammer-and|nose|level-|card-|"
    r"chart|x-ray|e-mail|globe-|pouring|locked|-done|place-medal|tilted|pinata|-suit|-glass-|hammer-|cut-of|fish-cake|-tray|page-|tokyo|kaaba|japan|hotel|building|store|office|cityscape|bank|school|hospital|station|motorway"
)
_WITHOUT_ARTICLE = word_set("""
bacon badminton bread broccoli butter camping cooking corn curling dna fire fog foggy fondue garlic grass honey ice
lacrosse lettuce lightning litter milk money oden paper popcorn rice salt sake snow soap spaghetti sushi tennis thread
unlocked water wood wedding yarn memo
""")
"""Words that end names of which nobody says "a"; plurals are told by their s."""
_CATEGORIES = (
    "Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities", "Nature", "Food", "Travel",
)  # fmt: skip
"""As collections call them: the last three are emojione's."""


@dataclass(frozen=True)
class Icon:
    """A drawing as SVG: the name of its file, what it shows, what else it may be called, and its collection."""

    slug: str
    noun: str
    also: tuple[str, ...]
    collection: str
    svg: str

    @property
    def accepted(self) -> list[str]:
        """All names that are right."""
        return list(dict.fromkeys((self.noun, *self.also, self.slug.replace("-", " "))))


def read_icons(folder: Path) -> list[Icon]:
    """The icons of things in a package of ``@iconify-json``: ``icons.json`` with ``metadata.json`` beside it.

    People, smileys, symbols, flags, clock faces and the like are left out, and names that take no "a".

    Raises
    ------
    InputError
        The folder has no such files, or they are in another form.
    """
    try:
        values = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        categories = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["categories"]
        slugs = sorted(slug for name in _CATEGORIES for slug in categories.get(name, ()))
        read = [_icon(slug, values) for slug in slugs if slug in values["icons"] and not _LEFT_OUT.search(slug)]
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is no package of icons: {Path(error.filename).name} is missing",
            hint="Unpack one of @iconify-json from npm, such as @iconify-json/noto, and name its folder 'package'.",
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is not in Iconify's JSON: {error!r}") from None
    found = [icon for icon in read if _takes_an_article(icon.noun)]
    if not found:
        raise InputError(f"{folder} has no icon of Iconify's categories {', '.join(_CATEGORIES)}")
    return found


def _icon(slug: str, values: dict[str, Any]) -> Icon:
    noun = _CALLED.get(slug, slug.removesuffix("-face").replace("-", " "))
    body, side = values["icons"][slug], values.get("width", 16)
    wide, high = body.get("width", side), body.get("height", values.get("height", side))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {wide} {high}">{body["body"]}</svg>'
    )
    return Icon(slug, noun, _ALSO.get(noun, ()), values["prefix"], svg)


def _takes_an_article(noun: str) -> bool:
    last = noun.split()[-1]
    return last not in _WITHOUT_ARTICLE and (not last.endswith("s") or last.endswith(("ss", "us", "is")))


@functools.lru_cache(maxsize=512)
def draw_icon(icon: Icon, size: int = 192) -> Image.Image:
    """The icon as RGBA, cut to what is drawn, its longer side about ``size`` pixels."""
    require_extra("train", "resvg_py")
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_string=icon.svg, width=size, skip_system_fonts=True)
    except ValueError as error:
        raise InputError(f"the icon {icon.slug} of {icon.collection} can't be drawn: {error}") from None
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    return drawn.crop(drawn.getchannel("A").getbbox() or (0, 0, *drawn.size))


def by_noun(icons: Sequence[Icon]) -> dict[str, list[Icon]]:
    """The icons of each noun of ``SCENE_NOUNS``."""
    found: dict[str, list[Icon]] = {noun: [] for noun in SCENE_NOUNS}
    for icon in icons:
        if icon.noun in found:
            found[icon.noun].append(icon)
    return {noun: drawn for noun, drawn in found.items() if drawn}
