"""POPE-style questions and CHAIR-style annotations from nothing but captions.

An object is taken to be in a picture if two of its captions name it, and to be absent if none does. People don't
mention everything, so an absent object may be there: figures on these sets compare models with each other, not with
published ones.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from llava_edge.bench.tasks.coco_objects import coco_objects
from llava_edge.bench.tasks.samples import write_text
from llava_edge.errors import InputError

NAMED_BY = 2
QUESTIONS = 3
"""Questions with the answer yes a picture, at most, and as many with the answer no."""
Chooser = Callable[[set[str]], list[str]]


def make_sets(
    captions: dict[str, Sequence[str]], folder: Path, *, pictures: int = 500, seed: int = 0
) -> dict[str, int]:
    """Write ``pope/captions_pope_{random,popular,adversarial}.json`` and ``chair/captions_set.json``.

    ``pictures`` is how many are drawn for POPE among those that have an object at all; CHAIR's set has all pictures.
    """
    rng = random.Random(seed)
    named = {name: _named(texts) for name, texts in sorted(captions.items())}
    present = {name: {n for n, count in counts.items() if count >= NAMED_BY} for name, counts in named.items()}
    able = [name for name, objects in present.items() if objects]
    if not able:
        raise InputError("no object is named by two captions of a picture")
    chosen = sorted(rng.sample(able, min(pictures, len(able))))
    yes = {name: rng.sample(sorted(present[name]), min(QUESTIONS, len(present[name]))) for name in chosen}
    written = {}
    for split, choose in _choosers(present, rng).items():
        pairs = []
        for name in chosen:
            absent = [noun for noun in choose(present[name]) if noun not in named[name]]
            for there, missing in zip(yes[name], absent, strict=False):
                pairs += [(name, there, "yes"), (name, missing, "no")]
        rows = [_question(number, *pair) for number, pair in enumerate(pairs, 1)]
        path = folder / "pope" / f"captions_pope_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        written[split] = len(rows)
    (folder / "chair").mkdir(parents=True, exist_ok=True)
    write_text(folder / "chair" / "captions_set.json", json.dumps(_coco(captions)))
    return {**written, "chair": len(captions)}


def _question(number: int, image: str, noun: str, label: str) -> dict[str, Any]:
    article = "an" if noun[0] in "aeiou" else "a"
    text = f"Is there {article} {noun} in the image?"
    return {"question_id": number, "image": image, "text": text, "label": label}


def _named(texts: Sequence[str]) -> Counter[str]:
    """How many of the captions name an object."""
    return Counter(noun for text in texts for noun in set(coco_objects().mentions(text)))


def _choosers(present: dict[str, set[str]], rng: random.Random) -> dict[str, Chooser]:
    """Orders of absent objects: any, the commonest first, those that most often come with what is there first."""
    common = Counter(noun for objects in present.values() for noun in objects)
    together: Counter[tuple[str, str]] = Counter()
    for objects in present.values():
        for first, second in combinations(sorted(objects), 2):
            together[first, second] += 1
            together[second, first] += 1
    by_count = sorted(common, key=lambda noun: (-common[noun], noun))

    def adversarial(there: set[str]) -> list[str]:
        return sorted(by_count, key=lambda noun: -sum(together[noun, other] for other in there))

    return {
        "random": lambda there: rng.sample(by_count, len(by_count)),
        "popular": lambda there: by_count,
        "adversarial": adversarial,
    }


def _coco(captions: dict[str, Sequence[str]]) -> dict[str, Any]:
    images = [{"id": number, "file_name": name} for number, name in enumerate(sorted(captions), 1)]
    annotations = [
        {"image_id": image["id"], "caption": text} for image in images for text in captions[str(image["file_name"])]
    ]
    return {"images": images, "annotations": annotations}
