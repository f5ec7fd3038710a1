"""POPE: does the model see objects that aren't there (Li et al., EMNLP 2023, arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data, identifier
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.stats import Metric
from llava_edge.bench.tasks.task import SHORT_ANSWER, BaseTask, Metrics, grouped
from llava_edge.bench.tasks.yes_no import detection_metrics, mean_f1, pope_answer, says_either
from llava_edge.errors import InputError
from llava_edge.strict_json import Fields

SPLITS = ("random", "popular", "adversarial")


class Pope(BaseTask):
    """Reads ``*pope*SPLIT.json`` with lines ``{"question_id", "image", "text", "label"}``."""

    headline = "mean_f1"

    def __init__(self, suffix: str = SHORT_ANSWER) -> None:
        self._suffix = suffix

    def read(self, data: Data) -> list[Sample]:
        """The questions of every split that is there."""
        samples = []
        for split in SPLITS:
            path = data.find(f"**/*pope*{split}.json", f"**/*pope*{split}.jsonl", optional=True)
            if path is not None:
                samples += data.jsonl(path, partial(self._sample, data, split))
        if not samples:
            raise InputError(f"{data.root} has no questions of POPE; expected *pope*random.json, popular, adversarial")
        return samples

    def _sample(self, data: Data, split: str, fields: Fields) -> Sample:
        label = fields.text("label")
        if label not in ("yes", "no"):
            raise InputError(f"label is {label!r}; expected yes or no")
        picture = data.picture(fields.text("image"), "val2014")
        number = identifier(fields, "question_id")
        return Sample(f"{split}-{number}", fields.text("text") + self._suffix, picture, label, {"split": split})

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Right or wrong by POPE's own reading of the answer."""
        answer = pope_answer(said.text)
        return Mark(float(answer == sample.expected), {"said": answer, "unclear": not says_either(said.text)})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """Per split, and the mean of the splits' F1 as papers print it."""
        splits = grouped(records, "split")
        metrics = detection_metrics(records)
        for split in SPLITS:
            if split in splits:
                metrics |= detection_metrics(splits[split], f"{split}/")
        if len(splits) > 1:
            metrics["mean_f1"] = mean_f1(list(splits.values()))
        else:
            metrics["mean_f1"] = metrics["f1"]
        metrics["unclear_answers"] = Metric(float(sum(record.detail["unclear"] for record in records)))
        return metrics
