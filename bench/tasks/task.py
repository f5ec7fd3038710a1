"""What a benchmark has to say: which questions, what an answer is worth, how the marks add up."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llava_edge.bench.tasks.asking import ChoiceBy
from llava_edge.bench.tasks.samples import Mark, Record, Sample
from llava_edge.bench.tasks.stats import Metric
from llava_edge.errors import InputError

if TYPE_CHECKING:
    from llava_edge.bench.tasks.asking import Said
    from llava_edge.bench.tasks.reading import Data

Metrics = dict[str, Metric]

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA 1.5 puts after the questions of benchmarks with short answers (arXiv 2310.03744, section 3.2)."""

# name -> module:class
TASKS = {
    "captions": "captions:Captions",
    "animals": "animals:Animals",
    "pope": "pope:Pope",
    "easy-vqa": "easy_vqa:EasyVqa",
    "chair": "chair:Chair",
    "choices": "choices:Choices",
    "questions": "questions:Questions",
    "scienceqa": "scienceqa:ScienceQa",
    "mme": "mme:Mme",
    "vqav2": "vqav2:VqaV2",
    "gqa": "gqa:Gqa",
    "textvqa": "textvqa:TextVqa",
    "llava-bench": "llava_bench:LlavaBench",
}


class Task(Protocol):
    """A benchmark's protocol. A task is made of its options, which are plain JSON values."""

    headline: str
    """The metric that a table shows."""
    max_tokens: int
    choose_by: ChoiceBy

    def read(self, data: Data) -> list[Sample]:
        """All questions, in the benchmark's order."""
        ...

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Whatever marking needs to know of all samples of a run."""
        ...

    def mark(self, sample: Sample, said: Said) -> Mark:
        """What one answer is worth."""
        ...

    def summarize(self, records: Sequence[Record]) -> Metrics:
        """The marks of a run added up, by nothing but the records, so that parts of a run can be joined."""
        ...

    def extra_files(self, records: Sequence[Record], folder: Path) -> list[Path]:
        """Write files beside the summary (a submission), and name them."""
        ...


class BaseTask:
    """The parts of a task that most don't need."""

    headline = "accuracy"
    max_tokens = 128  # of LLaVA's own scripts; a model that answers with a word ends after it
    choose_by: ChoiceBy = "letter"

    def prepare(self, samples: Sequence[Sample]) -> None:
        """See :class:`Task`."""

    def extra_files(self, records: Sequence[Record], folder: Path) -> list[Path]:
        """See :class:`Task`."""
        return []


def make_task(name: str, options: dict[str, Any]) -> Task:
    """A task by name; ``options`` are the arguments of its class."""
    if name not in TASKS:
        raise InputError(f"no task {name!r}; expected one of {', '.join(TASKS)}")
    module, attribute = TASKS[name].split(":")
    kind = getattr(importlib.import_module(f"llava_edge.bench.tasks.{module}"), attribute)
    known = inspect.signature(kind).parameters
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    task: Task = kind(**options)
    return task


def grouped(records: Sequence[Record], fact: str) -> dict[str, list[Record]]:
    """Records by one of their facts, groups in order of their names; records without it are left out."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if fact in record.facts:
            groups.setdefault(str(record.facts[fact]), []).append(record)
    return dict(sorted(groups.items()))
