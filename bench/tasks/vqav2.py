"""VQAv2 (Goyal et al., CVPR 2017): accuracy where there are annotations, and the file that the server takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Mark, Record, Sample, write_text
from llava_edge.bench.tasks.task import SHORT_ANSWER, BaseTask, Metrics, grouped
from llava_edge.bench.tasks.vqa_accuracy import challenge_accuracy, evalai_answer
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

SUBMISSION = "vqav2-submission.json"
_SUBTYPES = {"val2014": "val", "train2014": "train", "test2015": "test", "test-dev2015": "test-dev"}


class VqaV2(BaseTask):
    """Reads ``*OpenEnded_mscoco_SPLIT_questions.json`` and, where it is there, ``*mscoco_SPLIT_annotations.json``."""

    def __init__(self, suffix: str = SHORT_ANSWER, split: str = "val2014") -> None:
        if split not in _SUBTYPES:
            raise InputError(f"split is {split!r}; expected one of {', '.join(_SUBTYPES)}")
        self._suffix = suffix
        self._split = split

    def read(self, data: Data) -> list[Sample]:
        """The questions of the split."""
        path = data.require(f"**/*OpenEnded_mscoco_{self._split}_questions.json")
        people = self._annotations(data)
        return data.entries(path, data.list_of(path, "questions"), lambda fields: self._sample(data, fields, people))

    def _annotations(self, data: Data) -> dict[str, tuple[list[str], dict[str, str]]] | None:
        """Ten people's answers and the types of each question; None for the test splits."""
        path = data.find(f"**/*mscoco_{self._split}_annotations.json", optional=True)
        if path is None:
            return None
        return dict(data.entries(path, data.list_of(path, "annotations"), _annotation))

    def _sample(self, data: Data, fields: Fields, people: dict[str, Any] | None) -> Sample:
        number = str(fields.integer("question_id"))
        image = fields.integer("image_id")
        folder = "test2015" if self._split.startswith("test") else self._split
        picture = data.picture(f"COCO_{folder}_{image:012d}.jpg", folder)
        if people is not None and number not in people:
            raise InputError(f"question_id is {number}, for which there is no annotation")
        answers, facts = people[number] if people is not None else (None, {})
        return Sample(number, fields.text("question") + self._suffix, picture, answers, facts)

    def mark(self, sample: Sample, said: Said) -> Mark:
        """The official accuracy of what would be submitted, if there are answers of people."""
        submitted = evalai_answer(said.text)
        score = None if sample.expected is None else challenge_accuracy(submitted, sample.expected)
        return Mark(score, {"submitted": submitted})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The mean accuracy, of all and by the type of the answer."""
        marked = [record for record in records if record.score is not None]
        metrics = {"accuracy": mean_score(marked)}
        for kind, group in grouped(marked, "answer_type").items():
            metrics[f"{kind}/accuracy"] = mean_score(group)
        return metrics

    def extra_files(self, records: Sequence[Record], folder: Path) -> list[Path]:
        """The submission: a list of question_id and answer, normalised as LLaVA's are."""
        rows = [{"question_id": int(record.id), "answer": record.detail["submitted"]} for record in records]
        write_text(folder / SUBMISSION, json.dumps(rows))
        return [folder / SUBMISSION]


def _annotation(fields: Fields) -> tuple[str, tuple[list[str], dict[str, str]]]:
    answers = [answer.text("answer") for answer in fields.objects("answers")]
    if not answers:
        raise InputError("answers is empty")
    facts = {key: fields.text(key) for key in ("answer_type", "question_type")}
    return str(fields.integer("question_id")), (answers, facts)


def mean_score(records: Sequence[Record]) -> stats.Metric:
    """The mean of the scores, pictures drawn again for the interval."""
    return stats.mean([record.cluster for record in records], [record.score or 0.0 for record in records])
