"""The mixture that nano learns from, in LLaVA's JSON format.

Several samples may name the same picture; the loader lets them share one reading of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from llava_edge.train_gpu.datagen import picture_sets, signs, symbols
from llava_edge.train_gpu.datagen.icons import Icon
from llava_edge.train_gpu.datagen.picture_sets import Sample
from llava_edge.train_gpu.datagen.symbols import Turn

HELD_OUT_PETS = 100
"""Pictures of cats and of dogs, each, that are never trained on."""

PRESENCE_TAUGHT = 0.4
"""The share of questions whether something is there that the scenes' questions for a word keep."""

_CALTECH = {
    "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane", "bass": "fish",
    "car_side": "car", "cougar_body": "cougar", "cougar_face": "cougar", "crocodile_head": "crocodile",
    "flamingo_head": "flamingo", "hawksbill": "sea turtle", "ibis": "bird", "ketch": "sailing boat",
    "schooner": "sailing ship", "water_lilly": "water lily", "wild_cat": "wild cat", "cellphone": "cell phone",
    "euphonium": "euphonium", "ewer": "jug", "gerenuk": "antelope", "inline_skate": "roller skate",
    "mayfly": "mayfly", "yin_yang": "yin-yang sign", "windsor_chair": "chair", "scissors": "pair of scissors",
    "snoopy": "cartoon dog", "garfield": "cartoon cat", "brontosaurus": "dinosaur", "stegosaurus": "dinosaur",
}  # fmt: skip
_CALTECH_ALSO = {
    "Faces": ("man", "woman", "person"), "Motorbikes": ("motorcycle",), "airplanes": ("plane",), "bass": ("bass",),
    "binocular": ("binoculars",), "bonsai": ("bonsai tree", "tree"), "brontosaurus": ("brontosaurus",),
    "cougar_body": ("puma", "mountain lion"), "cougar_face": ("puma", "mountain lion"), "dalmatian": ("dog",),
    "dollar_bill": ("money",), "electric_guitar": ("guitar",), "euphonium": ("tuba",), "ewer": ("ewer", "pitcher"),
    "garfield": ("garfield", "cat"), "gerenuk": ("gerenuk",), "gramophone": ("record player",),
    "grand_piano": ("piano",), "hawksbill": ("turtle", "hawksbill"), "headphone": ("headphones",), "ibis": ("ibis",),
    "inline_skate": ("inline skate", "skate"), "joshua_tree": ("tree",), "ketch": ("sailboat", "boat", "ship", "ketch"),
    "lotus": ("lotus flower", "flower"), "rhino": ("rhinoceros",), "schooner": ("sailboat", "boat", "ship", "schooner"),
    "scissors": ("scissors",), "sea_horse": ("seahorse",), "snoopy": ("snoopy", "dog"), "soccer_ball": ("ball",),
    "stegosaurus": ("stegosaurus",), "stop_sign": ("sign",), "sunflower": ("flower",), "water_lilly": ("flower",),
    "wild_cat": ("cat", "wildcat"), "windsor_chair": ("windsor chair",), "yin_yang": ("yin yang",),
}  # fmt: skip
"""What else is a right name, besides that of ``_CALTECH``, where held-out pictures are named."""
_CALTECH_ANIMALS = symbols.word_set("""
Leopards ant bass beaver butterfly cougar_body cougar_face crab crayfish crocodile crocodile_head dalmatian
dolphin dragonfly elephant emu flamingo flamingo_head gerenuk hawksbill hedgehog ibis kangaroo llama lobster
mayfly nautilus octopus okapi panda pigeon platypus rhino rooster scorpion sea_horse starfish tick wild_cat
""")
# Positions in the ImageNet-1k order.
_IMAGENET_ANIMALS, _IMAGENET_DOGS, _IMAGENET_CATS = range(398), range(151, 269), range(281, 286)
_IMAGENET_LEFT_OUT = {"nipple"}  # said of other pictures, it makes a bad joke


def held_out(names: list[str], count: int) -> set[str]:
    """The ``count`` names whose SHA-256 comes first: a choice that no seed and no listing order can move."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count])


def held_out_pets(root: Path) -> list[tuple[str, str]]:
    """(picture, "cat" or "dog") of the pets that are kept out of training."""
    pets = []
    for noun in ("cat", "dog"):
        names = [_relative(root, p) for p in sorted((root / "cats-dogs-train" / noun).glob("*.jpg"))]
        pets += [(name, noun) for name in sorted(held_out(names, HELD_OUT_PETS))]
    return pets


def build(root: Path, captions_file: Path, seed: int = 0) -> dict[str, list[Sample]]:
    """Samples by source. ``root`` holds the unpacked archives, each in a folder of its own name."""
    rng = Random(seed)
    scenes = picture_sets.read_samples(root, "scenes")
    return {
        "flickr8k-captions": _flickr_captions(captions_file, rng),
        "flickr8k-facts": _flickr_facts(captions_file, rng),
        "pets": _pets(root, rng),
        "imagenet": _imagenet(root, rng),
        "caltech101": _caltech(root, rng),
        "easy-vqa": _easy_vqa(root, rng),
        "flickr8k-short": _flickr_short(captions_file, rng),
        "scenes": scenes,
        "scenes-short": _for_a_word(scenes, rng),
        "scenes-where": picture_sets.where_samples(root, "scenes", seed),
        "icons": picture_sets.read_samples(root, "icons"),
        "signs": picture_sets.read_samples(root, "signs"),
    }


def _for_a_word(scenes: Iterable[Sample], rng: Random) -> list[Sample]:
    """Those that ask for a word each time, but of those on presence a part: there are most of these."""
    kept = []
    for sample in scenes:
        asked = [turn["value"] for turn in sample["conversations"] if turn["from"] == "human"]
        on_presence = len(asked) == 1 and symbols.asks_presence(asked[0].removeprefix("<image>\n"))
        if all(text.endswith(symbols.SHORT_ANSWER) for text in asked) and not (
            on_presence and rng.random() > PRESENCE_TAUGHT
        ):
            kept.append(sample)
    return kept


def words_to_write(captions_file: Path, icons: Iterable[Icon]) -> list[str]:
    """Words that three of Flickr8k's training captions have, of the names of icons, and of signs."""
    said = Counter(word for _, sentences in _flickr(captions_file) for s in sentences for word in symbols.words(s))
    named = [word for icon in icons for word in icon.noun.split()]
    return signs.fit_words([*(word for word, count in said.items() if count > 2), *named, *signs.SIGN_WORDS])


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _flickr(captions_file: Path) -> Iterator[tuple[str, list[str]]]:
    """Picture and its captions as sentences."""
    captions = json.loads(captions_file.read_text())["train"]
    for name in sorted(captions):
        yield f"flickr8k-train/train/{name}", [s for s in map(symbols.clean_caption, captions[name]) if s]


def _flickr_captions(captions_file: Path, rng: Random) -> list[Sample]:
    samples = []
    for name, sentences in _flickr(captions_file):
        question = rng.choice(symbols.BRIEF)  # one for all, so that they share it with the picture in a document
        samples += [
            picture_sets.sample(name, number, [(question, sentence)]) for number, sentence in enumerate(sentences)
        ]
    return samples


def _flickr_short(captions_file: Path, rng: Random) -> list[Sample]:
    """The three captions that agree best with the others, as answers to who asks for a short one."""
    samples = []
    for name, sentences in _flickr(captions_file):
        question, agreed = rng.choice(symbols.SHORT), symbols.by_consensus(sentences)[:3]
        samples += [picture_sets.sample(name, number, [(question, sentence)]) for number, sentence in enumerate(agreed)]
    return samples


def _flickr_facts(captions_file: Path, rng: Random) -> list[Sample]:
    """Questions on what the captions agree on, some of them as a conversation that may begin with a caption."""
    samples = []
    for name, sentences in _flickr(captions_file):
        turns = symbols.caption_facts(sentences, rng)
        if turns:
            samples += [picture_sets.sample(name, number, [turn]) for number, turn in enumerate(turns)]
            opening = [(rng.choice(symbols.BRIEF), rng.choice(sentences))] if rng.random() < 0.5 else []
            chain = opening + rng.sample(turns, min(len(turns), 2))
            samples.append(picture_sets.sample(name, len(turns), chain))
    return samples


def _pets(root: Path, rng: Random) -> list[Sample]:
    samples = []
    kept_out = {name for name, _ in held_out_pets(root)}
    for path in sorted((root / "cats-dogs-train").glob("*/*.jpg")):
        name = _relative(root, path)
        if name not in kept_out:
            samples += picture_sets.samples(name, symbols.pet_turns(path.parent.name, rng), rng)
    return samples


def _imagenet(root: Path, rng: Random) -> list[Sample]:
    paths = sorted((root / "imagenet-1000").glob("n*.JPEG"))
    names = [re.sub(r"^n\d+_", "", p.stem).replace("_", " ") for p in paths]
    samples = []
    for index, (path, noun) in enumerate(zip(paths, names, strict=True)):
        if noun in _IMAGENET_LEFT_OUT:
            continue
        kind = "animal" if index in _IMAGENET_ANIMALS else None
        kind = "dog" if index in _IMAGENET_DOGS else "cat" if index in _IMAGENET_CATS else kind
        samples += picture_sets.samples(_relative(root, path), symbols.name_turns(noun, kind, names, rng), rng)
    return samples


def _caltech(root: Path, rng: Random) -> list[Sample]:
    folders = list(_caltech_parts(root))
    nouns = sorted(_caltech_noun(folder) for folder, _, _ in folders)
    samples = []
    for folder, paths, _ in folders:
        kind = "animal" if folder in _CALTECH_ANIMALS else None
        kind = "dog" if folder == "dalmatian" else kind
        for path in paths:
            turns = symbols.name_turns(_caltech_noun(folder), kind, nouns, rng)
            samples += picture_sets.samples(_relative(root, path), turns, rng)
    return samples


def _caltech_noun(folder: str) -> str:
    return _CALTECH.get(folder, folder.replace("_", " ").lower())


def _caltech_parts(root: Path) -> Iterator[tuple[str, list[Path], list[Path]]]:
    """Each category's folder, its pictures to train on, and the tenth that is kept out."""
    for folder in sorted(p for p in (root / "caltech101-train").iterdir() if p.is_dir()):
        paths = sorted(folder.glob("*.jpg"))
        kept_out = held_out([p.name for p in paths], len(paths) // 10)
        yield folder.name, [p for p in paths if p.name not in kept_out], [p for p in paths if p.name in kept_out]


def held_out_caltech(root: Path) -> list[tuple[str, str, list[str]]]:
    """(picture, category, names that are right) of the pictures of Caltech-101 that are kept out of training."""
    return [
        (_relative(root, path), folder, list(dict.fromkeys((_caltech_noun(folder), *_CALTECH_ALSO.get(folder, ())))))
        for folder, _, kept_out in _caltech_parts(root)
        for path in kept_out
    ]


def _easy_vqa(root: Path, rng: Random) -> list[Sample]:
    turns: dict[int, list[Turn]] = {}
    for question, answer, picture in json.loads((root / "easyvqa" / "train" / "questions.json").read_text()):
        turns.setdefault(picture, []).append((f"{question.capitalize()}\n{symbols.SHORT_ANSWER}", answer))
    samples = []
    for picture, asked in sorted(turns.items()):
        samples += picture_sets.samples(f"easyvqa/train/images/{picture}.png", asked, rng)
    return samples
