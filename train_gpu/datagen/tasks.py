"""What the language model is asked to write: conversation, detailed description, complex reasoning.

Three kinds of instructions as in LLaVA (arXiv 2304.08485, section 3); the prompts and the examples are our own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from llava_edge.train_gpu.datagen.scenes import Scene

Kind = Literal["conversation", "detail", "reasoning"]
Message = tuple[str, str]
"""Who speaks (system, user, assistant), and what."""


@dataclass(frozen=True)
class Task:
    """A kind of instruction: what the model is told, and worked examples of symbols and answers."""

    system: str
    boxes: bool
    examples: tuple[tuple[Scene, str], ...]
    form: Literal["pairs", "pair", "text"]


_LOOKING = (
    "You look at a photo together with a person. The photo itself is not here: you are given what is known of it, "
    "sentences that people wrote about it{boxes}. Speak as one who sees the photo. Never mention sentences, "
    "captions, boxes, coordinates or that anything was given to you."
)
_BOXES = ", and things with the place of each as left, top, right, bottom from 0 to 1"
_FORM = "Write exactly in this form, each part on lines of its own:\nQuestion:\n(text)\n===\nAnswer:\n(text)\n==="

_SLED = Scene(
    "example-1",
    (
        "Two girls pull a wooden sled up a snowy hill.",
        "A pair of girls in red coats drag a sled through the snow.",
        "Kids climb a white slope with their sled.",
    ),
    (("person", (0.31, 0.28, 0.47, 0.83)), ("person", (0.52, 0.25, 0.68, 0.8)), ("dog", (0.78, 0.66, 0.93, 0.9))),
)
_STALL = Scene(
    "example-2",
    ("A man sells oranges from a cart at the side of the road.", "A fruit cart with an umbrella stands on a street."),
    (("person", (0.1, 0.2, 0.3, 0.95)), ("umbrella", (0.25, 0.02, 0.9, 0.4)), ("orange", (0.4, 0.5, 0.8, 0.7))),
)

TASKS: dict[Kind, Task] = {
    "conversation": Task(
        system=_LOOKING.format(boxes="")
        + " Write a talk of two to four questions that the person asks about the photo and your answers: what is "
        "there, how many, what colour, who does what, where things are. Ask only what has one certain answer in what "
        "is known. Answers are full sentences. " + _FORM,
        boxes=False,
        examples=(
            (
                _SLED,
                "Question:\nWhat are the girls doing?\n===\n"
                "Answer:\nThey are pulling a wooden sled up a snowy hill.\n===\n"
                "Question:\nWhat colour are their coats?\n===\nAnswer:\nTheir coats are red.\n===\n"
                "Question:\nHow many girls are there?\n===\nAnswer:\nThere are two girls.\n===",
            ),
        ),
        form="pairs",
    ),
    "detail": Task(
        system=_LOOKING.format(boxes=_BOXES)
        + " Describe the photo in one flowing paragraph of four to eight sentences: the whole first, then people, "
        "animals and things, what they do and where they stand to each other. Say nothing that is not known. Write "
        "the paragraph and nothing else.",
        boxes=True,
        examples=(
            (
                _SLED,
                "The photo shows a snowy hill in winter. Two girls in red coats are in the middle, side by side, and "
                "drag a wooden sled up the slope behind them. To their right, lower on the hill, stands a dog. "
                "Everything around them is white with snow.",
            ),
        ),
        form="text",
    ),
    "reasoning": Task(
        system=_LOOKING.format(boxes=_BOXES)
        + " Write one question about the photo that takes thought: why something happens, what may follow, what one "
        "should mind. The answer gives its reasons step by step and rests on what is known. " + _FORM,
        boxes=True,
        examples=(
            (
                _STALL,
                "Question:\nWhy might the man have put up an umbrella over his cart?\n===\n"
                "Answer:\nThe man sells oranges outdoors, at the side of a road, where nothing else gives shade. The "
                "umbrella spreads over the cart, so it keeps the sun off the fruit, which would otherwise grow warm "
                "and spoil, and it keeps rain off both him and his customers. It also "
                "makes the cart easy to see for people who pass.\n===",
            ),
        ),
        form="pair",
    ),
}

DETAIL_REQUESTS = (
    "Describe this photo in detail.",
    "What can you see in this picture? Tell me everything about it.",
    "Give me a full description of the image.",
    "Explain what the picture shows, with its details.",
    "Please describe the scene as exactly as you can.",
    "Walk me through what is in this photo.",
    "Write a detailed description of the picture.",
    "What does this image look like? Describe it thoroughly.",
)


def messages(kind: Kind, scene: Scene) -> list[Message]:
    """The whole request for one picture: instructions, examples, symbols."""
    task = TASKS[kind]
    asked: list[Message] = [("system", task.system)]
    for example, answer in task.examples:
        asked += [("user", example.text(boxes=task.boxes)), ("assistant", answer)]
    return [*asked, ("user", scene.text(boxes=task.boxes))]


def detail_request(image: str) -> str:
    """The question that a detailed description answers, drawn by the picture's name."""
    return random.Random(image).choice(DETAIL_REQUESTS)
