"""Pictures of a written word, on a sign or on the bare ground, so that it is known where each letter stands.

Words have three to eight letters of the English alphabet; each letter is :data:`LEAST` pixels wide or more on average.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from llava_edge.errors import InputError
from llava_edge.train_gpu.datagen import symbols
from llava_edge.train_gpu.datagen.compose import COLOURS, NUMBERS, SIZE, Composed, Question, Thing, ground_of, shade

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST = 3, 8
LEAST, MOST = 24.0, 64.0
"""Pixels that a letter is wide on average."""
SIGN_WORDS = symbols.word_set("""
airport ahead apple bakery bank bar beach beer bikes book books bread bridge bus cafe camp cars caution city clean
closed coffee danger door down drink dry east elevator enter entry exit fire fish flowers food fresh garage garden gas
gate girls give halt help here hot hotel house ice info keep kitchen ladies lake left library lift lost lunch mail main
market men menu milk mind music new news north office oil one open order out paint park parking pay phone pizza police
pool post private public pull push quiet rent repair rest right road room sale salad school sea shop silence slow small
smoking south speed stairs station stop store street swim taxi tea thank thanks tickets toilet tour town toys traffic
train turn wait walk warning water way welcome west wet wine women work yield zone zoo
""")
"""Words that stand on signs: what is written if no others are named."""
READ = (
    "What does it say?",
    "What is written here?",
    "What word is this?",
    "What does the sign say?",
    "Read the text.",
    "What word is written in the picture?",
    "Which word can you read?",
    "What does the text in the picture say?",
)
_ANY = ("Is there any text in the picture?", "Is anything written here?", "Do you see a word in the picture?")
_NOTHING = "I can't see any text in the picture."
_COUNTED = (*NUMBERS, "seven", "eight")

Font = ImageFont.FreeTypeFont


def read_fonts(paths: Iterable[Path]) -> list[Path]:
    """The files of fonts among ``paths`` that have the English letters.

    Raises
    ------
    InputError
        One of the files is not a font that FreeType reads.
    """
    found = []
    for path in paths:
        font = _font(path, 32)
        nothing = font.getmask("\uffff")  # what stands for a letter that is missing
        if all(bytes(font.getmask(letter)) != bytes(nothing) for letter in LETTERS + LETTERS.upper()):
            found.append(path)
    return found


def fit_words(words: Iterable[str]) -> list[str]:
    """Those of three to eight English letters, in lower case, each once and in order."""
    plain = {word.lower() for word in words}
    return sorted(w for w in plain if SHORTEST <= len(w) <= LONGEST and set(w) <= set(LETTERS))


def hold_out_words(words: Sequence[str], share: float = 0.1) -> tuple[list[str], list[str]]:
    """Words to train on and words that are never written in training, chosen by their SHA-256."""
    by_digest = sorted(words, key=lambda word: hashlib.sha256(word.encode()).hexdigest())
    kept_out = set(by_digest[: round(share * len(words))])
    return [word for word in words if word not in kept_out], sorted(kept_out)


def compose_sign(word: str, fonts: Sequence[Path], photos: Sequence[Image.Image], rng: Random) -> Composed:
    """A picture in which ``word`` stands; each letter is one of its things. An empty word leaves the sign empty.

    Without fonts it is written in Pillow's own.
    """
    picture, ground = ground_of(photos, rng)
    font = _fitting(word or "empty", rng.choice(fonts) if fonts else None, rng)
    shown = _cased(word, rng)
    left, top, right, bottom = font.getbbox(shown or "empty")
    wide, high = right - left, bottom - top
    x, y = (rng.uniform(2, max(2.0, SIZE - 2 - side)) for side in (wide, high))
    if ground is None or rng.random() < 0.5:
        ground, behind = None, rng.choice(sorted(COLOURS))
        rim = rng.uniform(4, 30)
        box = (x - rim, y - rim, x + wide + rim, y + high + rim)
        edge = shade(rng.choice(sorted(COLOURS)), rng) if rng.random() < 0.4 else None
        ImageDraw.Draw(picture).rounded_rectangle(
            box, rng.choice((0, 6, 14)), fill=shade(behind, rng), outline=edge, width=rng.randint(2, 4)
        )
    else:
        behind = ground
    ink = rng.choice([colour for colour in COLOURS if abs(_light(colour) - _light(behind)) > 90])
    ImageDraw.Draw(picture).text((x - left, y - top), shown, font=font, fill=shade(ink, rng))
    things = []
    for place, letter in enumerate(word):
        start, end = (x - left + font.getlength(shown[:stop]) for stop in (place, place + 1))
        things.append(Thing(letter, None, (start, y, min(end, SIZE), y + high)))
    return Composed(picture, tuple(things), ground)


def questions(word: str, others: Sequence[str], rng: Random) -> list[Question]:
    """What is asked about a picture with a word, or with an empty one; ``others`` are words that aren't there."""
    other = rng.choice([w for w in others if w != word])
    anything = rng.choice(_ANY)
    if not word:
        return [
            Question("unwritten", rng.choice(READ), _NOTHING),
            Question("text", anything, f"No, {_NOTHING}", "No"),
            Question("text", _is_written(other, rng), f"No, {_NOTHING}", "No"),
        ]
    spelt = "-".join(word)
    place, letter = rng.choice((("first", word[0]), ("last", word[-1])))
    return [
        *(Question("word", text, rng.choice((f'It says "{word}".', f'The word is "{word}".')), word)
          for text in rng.sample(READ, 2)),
        Question("spelling", rng.choice(("Spell the word.", "How is the word spelt?")), spelt, spelt),
        Question("letter", f"What is the {place} letter of the word?", f'The {place} letter is "{letter}".', letter),
        Question("length", "How many letters does the word have?", f"It has {_COUNTED[len(word)]} letters.",
                 _COUNTED[len(word)]),
        Question("text", _is_written(word, rng), f'Yes, it says "{word}".', "Yes"),
        Question("text", _is_written(other, rng), f'No, it says "{word}".', "No"),
        Question("text", anything, f'Yes, it says "{word}".', "Yes"),
    ]  # fmt: skip


def _is_written(word: str, rng: Random) -> str:
    return rng.choice((f'Does it say "{word}"?', f'Is the word "{word}" written here?'))


def _cased(word: str, rng: Random) -> str:
    return rng.choice((word, word.upper(), word.capitalize()))


def _fitting(word: str, path: Path | None, rng: Random) -> Font:
    """The font at a size at which the word can be read and fits into the picture, in capitals too."""
    trial = _font(path, 100)
    capital, small = (trial.getlength(shown) / 100 for shown in (word.upper(), word))
    widest = max(capital, small)
    least = LEAST * len(word) / small
    most = min(MOST * len(word), SIZE - 6) / widest
    return _font(path, rng.uniform(min(least, most), most))


def _font(path: Path | None, size: float) -> Font:
    if path is None:
        font = ImageFont.load_default(size)
        assert isinstance(font, Font)
        return font
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise InputError(
            f"{path} is not a font that can be read: {error}", hint="Name TrueType, OpenType or WOFF files."
        ) from None


def _light(colour: str) -> float:
    """From 0 to 255, by ITU-R BT.601."""
    red, green, blue = COLOURS[colour]
    return 0.299 * red + 0.587 * green + 0.114 * blue
