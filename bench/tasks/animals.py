"""Folders of pictures whose name is what the pictures show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llava_edge.bench.tasks import stats
from llava_edge.bench.tasks.asking import Said
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.task import BaseTask, Metrics, grouped
from llava_edge.errors import InputError

QUESTION = "What animal is in this picture?"
_PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


class Animals(BaseTask):
    """An answer is right if it has the folder's name and no other folder's."""

    max_tokens = 24

    def __init__(self, folders: Sequence[Path] = (), question: str = QUESTION) -> None:
        self._folders = list(folders)
        self._question = question
        self._names: set[str] = set()

    def read(self, data: Data) -> list[Sample]:
        """One question a picture, folder by folder; without named folders, all those in the data's folder."""
        folders = self._folders or sorted(path for path in data.root.iterdir() if path.is_dir())
        samples = []
        for folder in folders:
            if not folder.is_dir():
                raise InputError(f"no such folder: {folder}")
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() in _PICTURES:
                    samples.append(self._sample(path, folder.name or folder.resolve().name))
        self._names = {sample.expected for sample in samples}
        return samples

    def _sample(self, path: Path, name: str) -> Sample:
        return Sample(f"{name}/{path.name}", self._question, path, name, {"class": name}, folder=name)

    def mark(self, sample: Sample, said: Said) -> Mark:
        """Which of the names the answer has."""
        text, named = said.text.lower(), []
        for name in sorted(self._names, key=len, reverse=True):  # a polar bear is no bear besides
            words = r"[\s_-]+".join(map(re.escape, re.split(r"[\s_-]+", name.lower())))
            text, found = re.subn(rf"\b{words}s?\b", " ", text)
            named += [name] if found else []
        named.sort()
        return Mark(float(named == [sample.expected]), {"named": named})

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The share that is right, of all and by class."""
        metrics = {"accuracy": right_share(records)}
        for name, group in grouped(records, "class").items():
            metrics[f"{name}/accuracy"] = right_share(group)
        return metrics


def right_share(records: Sequence[Record]) -> stats.Metric:
    """The share of records with score 1."""
    return stats.share_of([record.cluster for record in records], [float(record.score == 1) for record in records])
