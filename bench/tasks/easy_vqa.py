"""easy-VQA: coloured shapes (Victor Zhou, package ``easy-vqa`` 1.0)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_edge.bench.tasks.animals import right_share
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import SHORT_ANSWER, BaseTask, Metrics, grouped
from llava_edge.errors import InputError

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ANSWERS = ("yes", "no", *SHAPES, *COLOURS)


class EasyVqa(BaseTask):
    """Reads ``test/questions.json``, a list of [question, answer, picture's number], and ``test/images``.

    An answer is right if the expected word is the only one of the 13 possible answers in it.
    """

    def __init__(self, suffix: str = SHORT_ANSWER, split: str = "test") -> None:
        self._suffix = suffix
        self._split = split

    def read(self, data: Data) -> list[Sample]:
        """All questions of the split."""
        path = data.require(f"{self._split}/questions.json", f"**/{self._split}/questions.json")
        values = data.json(path)
        if not isinstance(values, list):
            raise InputError(f"{path} is no list; expected [[question, answer, number of the picture], …]")
        numbered = [(f"entry {n}", (n, value)) for n, value in enumerate(values, 1)]
        return data.each(path, numbered, lambda item: self._sample(path.parent / "images", *item))

    def _sample(self, images: Path, number: int, value: Any) -> Sample:
        right = isinstance(value, list) and [type(part) for part in value] == [str, str, int]
        if not right:
            raise InputError("expected [question, answer, number of the picture]")
        question, answer, picture = value
        if answer not in ANSWERS:
            raise InputError(f"the answer is {answer!r}; expected one of {', '.join(ANSWERS)}")
        image = images / f"{picture}.png"
        if not image.is_file():
            raise InputError(f"no picture {image}")
        kind = "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"
        return Sample(str(number), question.capitalize() + self._suffix, image, answer, {"kind": kind})

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Which of the possible answers the text has."""
        named = sorted(set(re.findall(r"[a-z]+", said.text.lower())) & set(ANSWERS))
        return Mark(float(named == [sample.expected]), {"named": named})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The share that is right, of all and by kind of answer."""
        metrics = {"accuracy": right_share(records)}
        for kind, group in grouped(records, "kind").items():
            metrics[f"{kind}/accuracy"] = right_share(group)
        return metrics
