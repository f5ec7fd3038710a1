"""Multiple choice from any file, decided by the model's probabilities: nothing is generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from llava_edge.bench.tasks.animals import right_share
from llava_edge.bench.tasks.asking import LETTERS, ChoiceBy, Said
from llava_edge.bench.tasks.reading import Data, identifier
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import BaseTask, Metrics, grouped
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."


class Choices(BaseTask):
    """Reads ``choices.jsonl`` with ``image`` (or null), ``question``, ``choices``, ``answer`` (number from 0, letter,
    or the choice itself; may be absent), and if wanted ``id`` and ``category``.
    """

    def __init__(self, by: ChoiceBy = "letter", suffix: str | None = None) -> None:
        if by not in ("letter", "text"):
            raise InputError(f"choices are chosen by {by!r}; expected letter or text")
        self.choose_by = by
        self._suffix = suffix

    def read(self, data: Data) -> list[Sample]:
        """One sample a line."""
        path = data.require("choices.jsonl", "*.jsonl")
        numbers = iter(range(1, 1 << 62))
        return data.jsonl(path, lambda fields: self._sample(data, next(numbers), fields))

    def _sample(self, data: Data, number: int, fields: Fields) -> Sample:
        choices = fields.texts("choices")
        if not 2 <= len(choices) <= len(LETTERS) or len(set(choices)) != len(choices):
            raise InputError(f"choices has {len(choices)} texts; expected 2 to {len(LETTERS)} different ones")
        image, folder = None, ""
        if fields.has("image") and not fields.is_null("image"):
            image = data.picture(fields.text("image"))
            folder = "/".join(PurePath(fields.text("image")).parts[:-1])
        expected = _expected(fields, choices) if fields.has("answer") else None
        facts = {"category": fields.text("category")} if fields.has("category") else {}
        name = identifier(fields, "id") if fields.has("id") else str(number)
        question = self._question(fields.text("question"), choices)
        return Sample(name, question, image, expected, facts, choices, folder)

    def _question(self, question: str, choices: Sequence[str]) -> str:
        if self.choose_by == "text":
            return question + (self._suffix or "")
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        return question + options + (self._suffix if self._suffix is not None else f"\n{LETTER_INSTRUCTION}")

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Right or wrong, with the logarithm of every choice's probability."""
        score = None if sample.expected is None else float(said.text == sample.expected)
        return Mark(score, {"log_probabilities": list(said.log_probabilities)})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The share that is right, of all with an answer and by category."""
        marked = [record for record in records if record.score is not None]
        metrics = {"accuracy": right_share(marked)}
        for name, group in grouped(marked, "category").items():
            metrics[f"{name}/accuracy"] = right_share(group)
        return metrics


def _expected(fields: Fields, choices: Sequence[str]) -> str:
    answer = fields.raw()["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    if isinstance(answer, str):
        if answer in choices:
            return answer
        if len(answer) == 1 and answer in LETTERS[: len(choices)]:
            return choices[LETTERS.index(answer)]
    raise InputError(f"answer is {answer!r}; expected a choice, its letter, or its number from 0")
