"""Captions of photos against those of people: CIDEr-D, BLEU-4, ROUGE-L."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.caption_files import read_captions
from llava_edge.bench.tasks.cider import CiderD
from llava_edge.bench.tasks.ngrams import bleu4, bleu_counts, rouge_l
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import BaseTask, Metrics
from llava_edge.errors import InputError

QUESTION = "Write a short caption for this picture."


class Captions(BaseTask):
    """One caption a picture. A sample's score is its CIDEr-D."""

    headline = "cider_d"
    max_tokens = 40

    def __init__(self, file: Path | None = None, split: str = "dev", question: str = QUESTION) -> None:
        self._file = file
        self._split = split
        self._question = question
        self._cider: CiderD | None = None

    def read(self, data: Data) -> list[Sample]:
        """One question a picture, in order of the pictures' names."""
        captions = read_captions(data, self._file, self._split)
        return [Sample(name, self._question, path, list(texts)) for name, (path, texts) in sorted(captions.items())]

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Count how rare every word is; with a single picture nothing could be told."""
        if len(samples) < 2:
            raise InputError("CIDEr-D needs two pictures or more: with one, every word is in every picture")
        self._cider = CiderD([sample.expected for sample in samples])

    def mark(self, sample: Sample, said: Said) -> Mark:
        """CIDEr-D, and what BLEU-4 and ROUGE-L are made of."""
        assert self._cider is not None
        detail = {
            "bleu": bleu_counts(said.text, sample.expected),
            "rouge_l": rouge_l(said.text, sample.expected),
        }
        return Mark(self._cider.score(said.text, sample.expected), detail)

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """Means over pictures, and BLEU-4 of the whole."""
        clusters = [record.cluster for record in records]
        counts = np.array([record.detail["bleu"] for record in records], dtype=np.float64)
        return {
            "cider_d": stats.mean(clusters, [record.score or 0.0 for record in records]),
            "bleu_4": stats.bootstrap(clusters, counts, lambda sums: bleu4(sums.tolist()) if sums[8] else math.nan),
            "rouge_l": stats.mean(clusters, [record.detail["rouge_l"] for record in records]),
        }
