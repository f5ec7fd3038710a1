"""The mixture that nano learns from, in LLaVA's JSON format.

Several samples may name the same picture; the loader lets them share one reading of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from llava_edge.train_gpu.datagen import symbols
from llava_edge.train_gpu.datagen.symbols import Turn

Sample = dict[str, Any]

HELD_OUT_PETS = 100
"""Pictures of cats and of dogs, each, that are never trained on."""

_CALTECH = {
    "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane", "bass": "fish",
    "car_side": "car", "cougar_body": "cougar", "cougar_face": "cougar", "crocodile_head": "crocodile",
    "flamingo_head": "flamingo", "hawksbill": "sea turtle", "ibis": "bird", "ketch": "sailing boat",
    "schooner": "sailing ship", "water_lilly": "water lily", "wild_cat": "wild cat", "cellphone": "cell phone",
    "euphonium": "euphonium", "ewer": "jug", "gerenuk": "antelope", "inline_skate": "roller skate",
    "mayfly": "mayfly", "yin_yang": "yin-yang sign", "windsor_chair": "chair", "scissors": "pair of scissors",
    "snoopy": "cartoon dog", "garfield": "cartoon cat", "brontosaurus": "dinosaur", "stegosaurus": "dinosaur",
}  # fmt: skip
_CALTECH_ANIMALS = symbols.word_set("""
Leopards ant bass beaver butterfly cougar_body cougar_face crab crayfish crocodile crocodile_head dalmatian
dolphin dragonfly elephant emu flamingo flamingo_head gerenuk hawksbill hedgehog ibis kangaroo llama lobster
mayfly nautilus octopus okapi panda pigeon platypus rhino rooster scorpion sea_horse starfish tick wild_cat
""")
# Positions in the ImageNet-1k order.
_IMAGENET_ANIMALS, _IMAGENET_DOGS, _IMAGENET_CATS = range(398), range(151, 269), range(281, 286)


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
    return {
        "flickr8k-captions": _flickr_captions(captions_file, rng),
        "flickr8k-facts": _flickr_facts(captions_file, rng),
        "pets": _pets(root, rng),
        "imagenet": _imagenet(root, rng),
        "caltech101": _caltech(root, rng),
        "easy-vqa": _easy_vqa(root, rng),
        "flickr8k-short": _flickr_short(captions_file, rng),
    }


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _sample(image: str, number: int, turns: list[Turn]) -> Sample:
    conversation = []
    for index, (question, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": f"<image>\n{question}" if index == 0 else question})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": f"{image}#{number}", "image": image, "conversations": conversation}


def _samples(image: str, turns: list[Turn], rng: Random, chained: float = 0.15) -> list[Sample]:
    """One sample a question, and now and then a conversation of up to three questions."""
    samples = [_sample(image, number, [turn]) for number, turn in enumerate(turns)]
    different = list({question: (question, answer) for question, answer in turns}.values())
    if len(different) > 1 and rng.random() < chained * len(turns) ** 0.5:
        chain = rng.sample(different, min(len(different), rng.choice((2, 3))))
        samples.append(_sample(image, len(turns), chain))
    return samples


def _flickr(captions_file: Path) -> Iterator[tuple[str, list[str]]]:
    """Picture and its captions as sentences."""
    captions = json.loads(captions_file.read_text())["train"]
    for name in sorted(captions):
        yield f"flickr8k-train/train/{name}", [s for s in map(symbols.clean_caption, captions[name]) if s]


def _flickr_captions(captions_file: Path, rng: Random) -> list[Sample]:
    samples = []
    for name, sentences in _flickr(captions_file):
        question = rng.choice(symbols.BRIEF)  # one for all, so that they share it with the picture in a document
        samples += [_sample(name, number, [(question, sentence)]) for number, sentence in enumerate(sentences)]
    return samples


def _flickr_short(captions_file: Path, rng: Random) -> list[Sample]:
    """The three captions that agree best with the others, as answers to who asks for a short one."""
    samples = []
    for name, sentences in _flickr(captions_file):
        question, agreed = rng.choice(symbols.SHORT), symbols.by_consensus(sentences)[:3]
        samples += [_sample(name, number, [(question, sentence)]) for number, sentence in enumerate(agreed)]
    return samples


def _flickr_facts(captions_file: Path, rng: Random) -> list[Sample]:
    """Questions on what the captions agree on, some of them as a conversation that may begin with a caption."""
    samples = []
    for name, sentences in _flickr(captions_file):
        turns = symbols.caption_facts(sentences, rng)
        if turns:
            samples += [_sample(name, number, [turn]) for number, turn in enumerate(turns)]
            opening = [(rng.choice(symbols.BRIEF), rng.choice(sentences))] if rng.random() < 0.5 else []
            chain = opening + rng.sample(turns, min(len(turns), 2))
            samples.append(_sample(name, len(turns), chain))
    return samples


def _pets(root: Path, rng: Random) -> list[Sample]:
    samples = []
    kept_out = {name for name, _ in held_out_pets(root)}
    for path in sorted((root / "cats-dogs-train").glob("*/*.jpg")):
        name = _relative(root, path)
        if name not in kept_out:
            samples += _samples(name, symbols.pet_turns(path.parent.name, rng), rng)
    return samples


def _imagenet(root: Path, rng: Random) -> list[Sample]:
    paths = sorted((root / "imagenet-1000").glob("n*.JPEG"))
    names = [re.sub(r"^n\d+_", "", p.stem).replace("_", " ") for p in paths]
    samples = []
    for index, (path, noun) in enumerate(zip(paths, names, strict=True)):
        kind = "animal" if index in _IMAGENET_ANIMALS else None
        kind = "dog" if index in _IMAGENET_DOGS else "cat" if index in _IMAGENET_CATS else kind
        samples += _samples(_relative(root, path), symbols.name_turns(noun, kind, names, rng), rng)
    return samples


def _caltech(root: Path, rng: Random) -> list[Sample]:
    folders = sorted(p for p in (root / "caltech101-train").iterdir() if p.is_dir())
    nouns = {f.name: _CALTECH.get(f.name, f.name.replace("_", " ").lower()) for f in folders}
    samples = []
    for folder in folders:
        kind = "animal" if folder.name in _CALTECH_ANIMALS else None
        kind = "dog" if folder.name == "dalmatian" else kind
        paths = sorted(folder.glob("*.jpg"))
        kept_out = held_out([p.name for p in paths], len(paths) // 10)
        for path in paths:
            if path.name not in kept_out:
                turns = symbols.name_turns(nouns[folder.name], kind, sorted(nouns.values()), rng)
                samples += _samples(_relative(root, path), turns, rng)
    return samples


def _easy_vqa(root: Path, rng: Random, pictures: int = 1500) -> list[Sample]:
    questions = json.loads((root / "easyvqa" / "train" / "questions.json").read_text())
    turns: dict[int, list[Turn]] = {}
    for question, answer, picture in questions:
        if picture < pictures:
            turns.setdefault(picture, []).append((f"{question.capitalize()}\n{symbols.SHORT_ANSWER}", answer))
    samples = []
    for picture, asked in sorted(turns.items()):
        samples += _samples(f"easyvqa/train/images/{picture}.png", asked, rng)
    return samples
