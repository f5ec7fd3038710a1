"""Run a model over pictures with known answers: captions and naming.

Every answer is kept as a line of JSON, so that a score can be traced to what was said.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bench.tasks.cider import cider_d
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from llava_edge.model import Model

CAPTION_QUESTION = "Write a short caption for this picture."
PET_QUESTION = "What animal is in this picture?"


Question = tuple[Path, str, tuple[str, ...]]
"""A picture, what to ask about it, and the answers that are expected."""


@dataclass(frozen=True)
class Answer:
    """One question on one picture, and what the model said."""

    image: str
    question: str
    answer: str
    expected: tuple[str, ...]


def ask_all(model: Model, questions: Iterable[Question], *, max_tokens: int) -> list[Answer]:
    """Ask each (picture, question, expected answers) greedily in a conversation of its own."""
    answers = []
    with model.chat() as chat:
        for path, question, expected in questions:
            reply = chat.ask(question, images=[path], max_tokens=max_tokens, temperature=0)
            chat.reset()
            answers.append(Answer(path.name, question, reply.text.strip(), expected))
    return answers


def read_captions(file: Path, split: str, images: Path) -> list[Question]:
    """Questions from ``{SPLIT: {NAME: [captions]}}``; every picture must be in the folder ``images``."""
    try:
        captions = json.loads(file.read_text())[split]
    except FileNotFoundError:
        raise InputError(f"no such caption file: {file}") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f"{file} is not {{SPLIT: {{NAME: [captions]}}}} in JSON with a split {split!r}") from None
    missing = [name for name in captions if not (images / name).is_file()]
    if missing:
        raise InputError(f"{images} lacks {len(missing)} pictures of {file}, {missing[0]} among them")
    return [(images / name, CAPTION_QUESTION, tuple(captions[name])) for name in sorted(captions)]


def read_classes(folders: Sequence[Path]) -> list[Question]:
    """Questions from folders of pictures; a folder's name is the expected word."""
    questions: list[Question] = [
        (path, PET_QUESTION, (folder.name,)) for folder in folders for path in sorted(folder.glob("*.jpg"))
    ]
    if not questions:
        raise InputError(f"no .jpg pictures in {', '.join(map(str, folders))}")
    return questions


def score_captions(answers: Sequence[Answer]) -> dict[str, Any]:
    """CIDEr-D with a 95 % bootstrap interval over pictures (1,000 draws of the pictures' scores)."""
    mean, scores = cider_d([a.answer for a in answers], [a.expected for a in answers])
    rng = random.Random(0)
    draws = sorted(sum(rng.choices(scores, k=len(scores))) / len(scores) for _ in range(1000))
    return {"pictures": len(answers), "cider_d": mean, "interval": [draws[25], draws[974]]}


def score_classes(answers: Sequence[Answer]) -> dict[str, Any]:
    """Share of answers that have the expected word and none of the other classes' words, with Wilson's interval."""
    classes = {a.expected[0] for a in answers}
    right = 0
    by_class: dict[str, list[int]] = {name: [0, 0] for name in sorted(classes)}
    for answer in answers:
        said = {name for name in classes if re.search(rf"\b{re.escape(name)}s?\b", answer.answer.lower())}
        correct = said == {answer.expected[0]}
        right += correct
        by_class[answer.expected[0]][0] += correct
        by_class[answer.expected[0]][1] += 1
    return {
        "pictures": len(answers),
        "accuracy": right / len(answers),
        "interval": list(wilson(right, len(answers))),
        "by_class": {name: f"{r}/{n}" for name, (r, n) in by_class.items()},
    }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (JASA 22, 1927)."""
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
