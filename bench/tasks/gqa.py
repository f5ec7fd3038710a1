"""GQA (Hudson, Manning, CVPR 2019): exact match, of all and of binary and open questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava_edge.bench.tasks.animals import right_share
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data, as_fields
from llava_edge.bench.tasks.samples import Mark, Record, Sample, write_text
from llava_edge.bench.tasks.task import SHORT_ANSWER, BaseTask, Metrics, grouped
from llava_edge.strict_json import Fields

PREDICTIONS = "gqa-predictions.json"


class Gqa(BaseTask):
    """Reads ``SPLIT_questions.json``, an object from question id to question, and ``images/ID.jpg``.

    Consistency, validity, plausibility and distribution are left to the official script, for which the predictions
    are written in its format.
    """

    def __init__(self, suffix: str = SHORT_ANSWER, split: str = "testdev_balanced") -> None:
        self._suffix = suffix
        self._split = split

    def read(self, data: Data) -> list[Sample]:
        """The questions of the split."""
        path = data.require(f"**/{self._split}_questions.json")
        named = [(key, (key, value)) for key, value in data.object(path).raw().items()]
        return data.each(path, named, lambda item: self._sample(data, item[0], as_fields(item[1])))

    def _sample(self, data: Data, number: str, fields: Fields) -> Sample:
        picture = data.picture(f"{fields.text('imageId')}.jpg", "images")
        answer = fields.text("answer") if fields.has("answer") else None
        facts = {}
        if fields.has("types"):
            structural = fields.object("types").text("structural")
            facts = {"structural": structural, "kind": "open" if structural == "query" else "binary"}
        return Sample(number, fields.text("question") + self._suffix, picture, answer, facts)

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Right if the answer without a final point, in lower case, is the expected one."""
        predicted = said.text.rstrip(".").lower()
        score = None if sample.expected is None else float(predicted == sample.expected)
        return Mark(score, {"predicted": predicted})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The share that is right, of all, by kind and by the question's structure."""
        marked = [record for record in records if record.score is not None]
        metrics = {"accuracy": right_share(marked)}
        for fact in ("kind", "structural"):
            for name, group in grouped(marked, fact).items():
                metrics[f"{name}/accuracy"] = right_share(group)
        return metrics

    def extra_files(self, records: Sequence[Record], folder: Path) -> list[Path]:
        """The predictions as the official script reads them."""
        rows = [{"questionId": record.id, "prediction": record.detail["predicted"]} for record in records]
        write_text(folder / PREDICTIONS, json.dumps(rows))
        return [folder / PREDICTIONS]
