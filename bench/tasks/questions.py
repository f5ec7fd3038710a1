"""A person's own questions with known answers of a few words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path, PurePath

from llava_edge.bench.tasks.animals import right_share
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import SHORT_ANSWER, BaseTask, Metrics, grouped
from llava_edge.bench.tasks.vqa_accuracy import challenge_answer
from llava_edge.bench.tasks.yes_no import detection_metrics
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

_KEYS = ("image", "question", "answer", "kind")


class Questions(BaseTask):
    """Reads a JSON list, or lines, of ``{"image", "question", "answer"}``, if wanted with a ``kind``.

    ``answer`` is one text or a list of those that are right. Without ``file`` it is ``questions.json`` or
    ``questions.jsonl`` in the data's folder.
    """

    def __init__(self, file: Path | None = None, suffix: str = SHORT_ANSWER) -> None:
        self._file = file
        self._suffix = suffix

    def read(self, data: Data) -> list[Sample]:
        """The questions in the file's order."""
        numbers = count(1)
        path = self._file or data.require("questions.json", "questions.jsonl")
        return data.rows(path, lambda fields: self._sample(data, str(next(numbers)), fields))

    def _sample(self, data: Data, number: str, fields: Fields) -> Sample:
        if unknown := sorted(set(fields.raw()) - set(_KEYS)):
            raise InputError(f"unknown key {unknown[0]}; expected {', '.join(_KEYS)}")
        image = fields.text("image")
        facts = {"kind": _filled(fields, "kind")} if fields.has("kind") else {}
        question = _filled(fields, "question").removesuffix(self._suffix.strip()).rstrip() + self._suffix
        folder = "/".join(PurePath(image).parts[:-1])
        return Sample(number, question, data.picture(image), _answers(fields), facts, folder=folder)

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Right if it is one of the answers, all normalised as the VQA challenge's script does it.

        Where only yes, or only no, is right, the first word decides: what begins with neither is wrong.
        """
        answer = challenge_answer(said.text)
        if _yes_or_no(sample.expected):
            answer = answer.split(" ")[0]
        return Mark(float(answer in map(challenge_answer, sample.expected)), {"said": answer})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The share that is right, of all and by kind; F1, precision, recall and share of yes of the kinds in which
        every answer is yes or no.

        An answer that is neither is wrong in these too: it counts as the opposite of the expected one.
        """
        metrics: Metrics = {"accuracy": right_share(records)}
        for kind, group in grouped(records, "kind").items():
            if all(_yes_or_no(record.expected) for record in group):
                metrics |= detection_metrics([_detection(record) for record in group], f"{kind}/")
            else:
                metrics[f"{kind}/accuracy"] = right_share(group)
        return metrics


def _filled(fields: Fields, key: str) -> str:
    text = fields.text(key).strip()
    if not text:
        raise InputError(f"{key} is empty; expected a text")
    return text


def _answers(fields: Fields) -> list[str]:
    several = isinstance(fields.raw().get("answer"), list)
    answers = list(fields.texts("answer")) if several else [fields.text("answer")]
    if not answers or not all(map(challenge_answer, answers)):  # nothing said would be right
        raise InputError(f"answer is {fields.raw()['answer']!r}; expected words besides articles and marks")
    return answers


def _yes_or_no(answers: Sequence[str]) -> str | None:
    """The only answer that is right, if that is yes or no."""
    different = set(map(challenge_answer, answers))
    return different.pop() if different in ({"yes"}, {"no"}) else None


def _detection(record: Record) -> Record:
    """The record as :func:`detection_metrics` reads it."""
    expected = _yes_or_no(record.expected)
    opposite = "no" if expected == "yes" else "yes"
    return replace(record, expected=expected, detail={"said": expected if record.score == 1 else opposite})
