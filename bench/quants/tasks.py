"""Tasks of ``llava-edge eval`` as figures of a row: what a type costs in answers that are right or wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llava_edge
from llava_edge.bench.models import Subject
from llava_edge.bench.progress import Progress, Say
from llava_edge.bench.record import Metric
from llava_edge.bench.tasks.asking import Asker
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.run import Plan, ask, plan_run, together
from llava_edge.bench.tasks.samples import Record
from llava_edge.bench.tasks.task import Task, make_task


@dataclass(frozen=True)
class QuantsTask:
    """A task with the samples that every variant is asked."""

    name: str
    task: Task
    plan: Plan

    @property
    def facts(self) -> dict[str, Any]:
        """What makes two runs the same."""
        return {key: self.plan.settings[key] for key in ("samples", "data_sha256", "max_tokens")}


def read_task(name: str, folder: Path, images: Path | None, limit: int | None) -> QuantsTask:
    """A task on the first ``limit`` samples of a benchmark's folder; InputError where that is malformed."""
    task = make_task(name, {})
    data = Data(folder, images=[images] if images else [])
    return QuantsTask(name, task, plan_run(name, {}, task, data, {}, limit=limit))


def measure_tasks(subject: Subject, tasks: Sequence[QuantsTask], threads: int, say: Say) -> dict[str, Metric]:
    """Each task's headline figure with its 95 % interval, by the task's name."""
    if not tasks:
        return {}
    found = {}
    with llava_edge.load(
        subject.bundle.directory,
        n_threads=threads,
        image_tokens=subject.image_tokens,
        vision_backend=subject.vision_backend,
        cache=False,
    ) as model:
        asker = Asker(model)
        for entry in tasks:
            progress = Progress(f"{subject.label}: {entry.name}", len(entry.plan.samples), say)
            records = [
                record
                for group in together(entry.plan.samples, asker.width)
                for record in _counted(ask(entry.task, asker, group), progress)
            ]
            metric = entry.task.summarize(records)[entry.task.headline]
            if metric.value is not None:
                interval = None if metric.low is None or metric.high is None else (metric.low, metric.high)
                found[f"{entry.name} {entry.task.headline}"] = Metric("score", metric.value, interval)
    return found


def _counted(records: Iterator[Record], progress: Progress) -> Iterator[Record]:
    for record in records:
        yield record
        progress.step()
