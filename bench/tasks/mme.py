"""MME (Fu et al., arXiv 2306.13394): two yes/no questions a picture; accuracy and accuracy+ add up to a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import SHORT_ANSWER, BaseTask, Metrics
from llava_edge.bench.tasks.yes_no import mme_answer
from llava_edge.errors import InputError

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_OFFICIAL_SUFFIX = " Please answer yes or no."
_PICTURES = (".jpg", ".png", ".jpeg")


class Mme(BaseTask):
    """Reads the release's folders: a category a folder with ``NAME.txt`` (lines question, tab, Yes or No) beside the
    pictures, or in ``questions_answers_YN`` with the pictures in ``images``.

    As LLaVA does, " Please answer yes or no." gives way to the suffix; with ``suffix`` None questions stay as they are.
    """

    headline = "perception"

    def __init__(self, suffix: str | None = SHORT_ANSWER) -> None:
        self._suffix = suffix

    def read(self, data: Data) -> list[Sample]:
        """The questions of every category that is there."""
        samples = []
        for category in (*PERCEPTION, *COGNITION):
            folder = next((path for path in sorted(data.root.glob(f"**/{category}")) if path.is_dir()), None)
            if folder is None:
                continue
            texts = folder / "questions_answers_YN"
            for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
                lines = [(n, line) for n, line in enumerate(data.text(path).split("\n"), 1) if line.strip()]
                picture = _picture(folder, path.stem)
                numbered = [(n, (n, line)) for n, line in lines]
                samples += data.each(path, numbered, partial(self._sample, category, picture))
        if not samples:
            raise InputError(f"{data.root} has none of the folders {', '.join(PERCEPTION)}, …")
        return samples

    def _sample(self, category: str, picture: Path | None, numbered: tuple[int, str]) -> Sample:
        number, line = numbered
        question, tab, answer = line.rpartition("\t")
        expected = answer.strip().lower()
        if not tab or expected not in ("yes", "no"):
            raise InputError(f"is {line[:60]!r}; expected a question, a tab and Yes or No")
        if picture is None:
            raise InputError("there is no picture of this name")
        if self._suffix is not None:
            question = question.strip().removesuffix(_OFFICIAL_SUFFIX.strip()).strip() + self._suffix
        name = f"{category}/{picture.stem}/{number}"
        return Sample(name, question, picture, expected, {"category": category}, folder=category)

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Right or wrong; what is neither yes nor no is wrong."""
        answer = mme_answer(said.text)
        return Mark(float(answer == sample.expected), {"said": answer})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """Each category's score (200 is the best), and the sums of perception and cognition."""
        categories = [c for c in (*PERCEPTION, *COGNITION) if any(r.facts["category"] == c for r in records)]
        pictures, counts = _by_picture(records, categories)
        metrics: Metrics = {}
        for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
            places = [n for n, category in enumerate(categories) if category in members]
            if places:
                metrics[name] = stats.bootstrap(pictures, counts, partial(_score, places))
        for place, category in enumerate(categories):
            metrics[category] = stats.bootstrap(pictures, counts, partial(_score, [place]))
        metrics["other_answers"] = stats.Metric(float(sum(record.detail["said"] == "other" for record in records)))
        return metrics


def _by_picture(records: Sequence[Record], categories: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """A row a picture; four columns a category: right answers, questions, pictures with all right, pictures."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.cluster, []).append(record)
    rows = np.zeros((len(groups), 4 * len(categories)))
    for row, group in zip(rows, groups.values(), strict=True):
        at = 4 * categories.index(group[0].facts["category"])
        right = sum(record.score or 0.0 for record in group)
        row[at : at + 4] = right, len(group), right == len(group), 1
    return list(groups), rows


def _score(categories: Sequence[int], sums: NDArray[np.float64]) -> float:
    """The sum over categories of 100 (accuracy + accuracy+)."""
    blocks = [sums[4 * n : 4 * n + 4] for n in categories]
    return math.fsum(100 * (stats.ratio(b[0], b[1]) + stats.ratio(b[2], b[3])) for b in blocks)


def _picture(folder: Path, stem: str) -> Path | None:
    places = [place / f"{stem}{ending}" for place in (folder / "images", folder) for ending in _PICTURES]
    return next((path for path in places if path.is_file()), None)
