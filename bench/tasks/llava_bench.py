"""LLaVA-Bench (COCO) and (In-the-Wild): open questions whose answers a judge compares with a reference.

This is the stage that answers; :mod:`llava_edge.bench.tasks.review` is the one that judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data, identifier
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import BaseTask, Metrics
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

CATEGORIES = ("conv", "detail", "complex")


class LlavaBench(BaseTask):
    """Reads questions, the reference's answers and what the judge is told of the pictures, in the published files:

    COCO: ``*questions.jsonl``, ``*gpt4*answer*.jsonl``, ``*caps_boxes*.jsonl``; In-the-Wild: ``questions.jsonl``,
    ``answers_gpt4.jsonl``, ``context.jsonl``.
    """

    headline = "words"
    max_tokens = 1024

    def read(self, data: Data) -> list[Sample]:
        """The questions with reference and context."""
        questions = data.require("questions.jsonl", "*questions*.jsonl")
        answers = data.require("answers_gpt4.jsonl", "*gpt4*answer*.jsonl")
        contexts = data.require("context.jsonl", "*caps_boxes*.jsonl")
        references = dict(data.jsonl(answers, lambda f: (identifier(f, "question_id"), f.text("text"))))
        seen = dict(data.jsonl(contexts, _context))
        return data.jsonl(questions, lambda fields: _sample(data, fields, references, seen))

    def mark(self, sample: Sample, said: Said) -> Mark:
        """The judge tells later."""
        return Mark(None)

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """How long the answers are. The scores are in the review."""
        return {"words": stats.mean([r.cluster for r in records], [len(r.answer.split()) for r in records])}


def _sample(data: Data, fields: Fields, references: dict[str, str], contexts: dict[str, tuple[str, bool]]) -> Sample:
    number, name, category = identifier(fields, "question_id"), fields.text("image"), fields.text("category")
    if category not in CATEGORIES:
        raise InputError(f"category is {category!r}; expected one of {', '.join(CATEGORIES)}")
    if number not in references:
        raise InputError(f"question_id is {number}, for which there is no reference answer")
    if name not in contexts:
        raise InputError(f"image is {name!r}, for which there is no context")
    context, boxes = contexts[name]
    facts = {"category": category, "context": context, "boxes": boxes}
    return Sample(number, fields.text("text"), _picture(data, name), references[number], facts)


def _picture(data: Data, name: str) -> Path:
    """COCO's pictures may have the split in their name."""
    try:
        return data.picture(name, "val2014")
    except InputError:
        return data.picture(f"COCO_val2014_{name}", "val2014")


def _context(fields: Fields) -> tuple[str, tuple[str, bool]]:
    """Captions, and lines ``category: [x1, y1, x2, y2]`` where there are boxes."""
    if fields.has("instances"):
        boxes = [f"{entry.text('category')}: {list(entry.numbers('bbox', 4))}" for entry in fields.objects("instances")]
        text = "\n".join(fields.texts("captions")) + "\n\n" + "\n".join(boxes)
        return fields.text("image"), (text, True)
    caption = fields.raw().get("caption")
    if isinstance(caption, str):
        return fields.text("image"), (caption, False)
    return fields.text("image"), ("\n".join(fields.texts("caption")), False)
