"""ScienceQA (Lu et al., NeurIPS 2022) in the two protocols of LLaVA.

v1 gives question, context and options (QCM) and lets the model reason before it says "The answer is X." (LEA), or the
other way round (ALE); v1.5 gives the context first (CQM) and asks for a letter (A).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.animals import right_share
from llava_edge.bench.tasks.asking import LETTERS, Said
from llava_edge.bench.tasks.choices import LETTER_INSTRUCTION
from llava_edge.bench.tasks.reading import Data, as_fields, identifier, listed
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import BaseTask, Metrics, grouped
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

FORMATS = ("qcm-lea", "qcm-ale", "cqm-a")
FAILED = "FAILED"
OPTIONS = LETTERS[:5]
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_ANSWER = re.compile(r"The answer is ([A-Z]).")
_ANSWER_FIRST = "\nGive the answer first, then the reasons: The answer is X. BECAUSE:"


class ScienceQa(BaseTask):
    """Reads ``problems.json``, ``pid_splits.json`` and ``images/SPLIT/ID/image.png``. LLaVA's own
    questions (``llava_SPLIT_CQM-A.json`` and the like) are taken where they are there.
    """

    def __init__(self, format: str = "cqm-a", split: str = "test") -> None:
        if format not in FORMATS:
            raise InputError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
        self._format = format
        self._split = split
        self.max_tokens = 1024

    def read(self, data: Data) -> list[Sample]:
        """The problems of the split."""
        path = data.require("problems.json", "**/problems.json")
        problems = data.object(path).raw()
        splits = data.object(data.require("pid_splits.json", "**/pid_splits.json"))
        published = self._published(data)
        named = [(number, (number, problems.get(number))) for number in splits.texts(self._split)]
        return data.each(path, named, lambda item: self._sample(data, item, published))

    def _published(self, data: Data) -> dict[str, str]:
        """LLaVA's questions by problem, without the mark for the picture."""
        path = data.find(f"**/llava_{self._split}_{self._format.upper()}.json", optional=True)
        if path is None:
            return {}
        return dict(data.entries(path, listed(data.json(path)), _published_question))

    def _sample(self, data: Data, item: tuple[str, Any], published: dict[str, str]) -> Sample:
        number, value = item
        if value is None:
            raise InputError("no problem has this number")
        problem = as_fields(value)
        choices = problem.texts("choices")
        answer = problem.integer("answer")
        if not 2 <= len(choices) <= len(OPTIONS) or not 0 <= answer < len(choices):
            raise InputError(f"answer is {answer} of {len(choices)} choices; expected 2 to {len(OPTIONS)} choices")
        image = None
        if problem.raw().get("image"):
            name = f"{number}/{problem.text('image')}"
            split = self._split.removeprefix("mini")  # whose pictures lie among those that it was drawn from
            image = data.picture(name, f"images/{split}", split)
        facts = _facts(problem, len(choices))
        question = published.get(number) or question_text(problem, choices, context_first=self._format == "cqm-a")
        instruction = {"cqm-a": f"\n{LETTER_INSTRUCTION}", "qcm-ale": _ANSWER_FIRST, "qcm-lea": ""}[self._format]
        return Sample(number, question + instruction, image, OPTIONS[answer], facts, folder=number)

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Right if the letter that was read is the expected one; no letter is wrong, and counted."""
        letter = read_letter(said.text, sample.facts["choices"])
        return Mark(float(letter == sample.expected), {"letter": letter})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The share that is right: of all, by subject, modality and grade."""
        metrics = {"accuracy": right_share(records)}
        for fact in ("subject", "grades"):
            for name, group in grouped(records, fact).items():
                metrics[f"{name}/accuracy"] = right_share(group)
        for name in ("TXT", "IMG", "NO"):
            metrics[f"{name}/accuracy"] = right_share([r for r in records if name in r.facts["modality"]])
        metrics["failed"] = stats.Metric(float(sum(record.detail["letter"] == FAILED for record in records)))
        return metrics


def read_letter(text: str, choices: int) -> str:
    """The chosen letter as LLaVA's script reads it: a bare letter, ``B. …``, or one "The answer is B."."""
    options = OPTIONS[:choices]
    if len(text) == 1 and text in OPTIONS:
        letter = text
    elif len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = _ANSWER.findall(text)
        letter = found[0] if len(found) == 1 else FAILED
    return letter if letter in options else FAILED


def question_text(problem: Fields, choices: Sequence[str], *, context_first: bool) -> str:
    """Question, context and options in the order of the format."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTIONS, choices, strict=False))
    question = f"{problem.text('question')}\n"
    context = f"Context: {problem.text('hint').strip() or 'N/A'}\n"
    # LLaVA takes "Question: " away where a prompt begins with it.
    opening = f"{context}Question: {question}" if context_first else question + context
    return f"{opening}Options: {options}".replace("  ", " ").strip()


def _facts(problem: Fields, choices: int) -> dict[str, Any]:
    modality = [name for name, key in (("TXT", "hint"), ("IMG", "image")) if problem.raw().get(key)] or ["NO"]
    subject = problem.text("subject")
    if subject not in SUBJECTS:
        raise InputError(f"subject is {subject!r}; expected one of {', '.join(SUBJECTS)}")
    grade = problem.text("grade").removeprefix("grade")
    if not grade.isdigit():
        raise InputError(f"grade is {problem.text('grade')!r}; expected grade1 to grade12")
    grades = "G1-6" if int(grade) <= 6 else "G7-12"
    return {"subject": SUBJECTS[subject], "modality": modality, "grades": grades, "choices": choices}


def _published_question(fields: Fields) -> tuple[str, str]:
    turns = fields.objects("conversations")
    if not turns:
        raise InputError("conversations is empty")
    return identifier(fields, "id"), turns[0].text("value").replace("<image>", "").strip()
