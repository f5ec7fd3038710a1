"""From a task's name and a model to a finished run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_edge.bench.tasks.asking import Asker
from llava_edge.bench.tasks.models import ModelChoice
from llava_edge.bench.tasks.reading import Data
from llava_edge.bench.tasks.run import (
    JUDGED,
    SUMMARY,
    Plan,
    finish,
    note_backend,
    plan_run,
    run_samples,
    start,
    writing,
)
from llava_edge.bench.tasks.task import Task, make_task
from llava_edge.bundle import sha256_file

Progress = Callable[[int, int, str], AbstractContextManager[Callable[[int], None]]]
"""(length, done already, label) -> something that is told how many more are done."""

RUNS = "eval-runs"


@dataclass(frozen=True)
class Job:
    """A task on a model. ``output`` None makes a folder whose name tells the settings.

    ``options`` are the task's own and part of what makes two runs the same; of ``inputs``, options that name files, the
    content is.
    """

    task: str
    data: Path
    choice: ModelChoice
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    images: tuple[Path, ...] = ()
    max_tokens: int | None = None
    limit: int | None = None
    part: tuple[int, int] = (1, 1)
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False
    skip_bad: bool = False


@dataclass(frozen=True)
class Outcome:
    """A finished run: its folder, its summary, and what was left out of the data."""

    folder: Path
    summary: dict[str, Any]
    skipped: list[str]


def evaluate(job: Job, progress: Progress) -> Outcome:
    """Run a job to its end, or go on with it.

    Raises
    ------
    LlavaEdgeError
        Malformed data, a folder that holds another run, a model that can't be loaded.
    """
    task, data, plan = read_job(job)
    folder = job.output or default_folder(plan.settings)
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        return Outcome(folder, _run(job, task, plan, folder, progress), data.skipped)


def _run(job: Job, task: Task, plan: Plan, folder: Path, progress: Progress) -> dict[str, Any]:
    done = start(folder, plan, resume=job.resume, overwrite=job.overwrite)
    if len(done) == len(plan.samples):
        return finish(folder, done)
    for name in (SUMMARY, JUDGED):
        (folder / name).unlink(missing_ok=True)
    with (
        job.choice.load() as model,
        progress(len(plan.samples), len(done), f"{job.task} {model.name}") as step,
    ):
        note_backend(folder, model.open_vision())
        records = run_samples(
            folder, plan, task, Asker(model, system=job.choice.system), done, step, skip_bad=job.skip_bad
        )
    return finish(folder, records)


def read_job(job: Job) -> tuple[Task, Data, Plan]:
    """The job's task, its data, and what is to be asked; no model is loaded."""
    data = Data(job.data, images=job.images, skip_bad=job.skip_bad)
    task = make_task(job.task, {**job.options, **job.inputs})
    if job.max_tokens is not None:
        task.max_tokens = job.max_tokens
    plan = plan_run(job.task, job.options, task, data, job.choice.describe(), limit=job.limit, part=job.part)
    contents = {name: sha256_file(path) for name, path in job.inputs.items() if isinstance(path, Path)}
    return task, data, replace(plan, settings={**plan.settings, "inputs": contents})


def default_folder(settings: dict[str, Any]) -> Path:
    """A folder of its own for each combination of settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(RUNS) / f"{settings['task']}-{settings['model']['name']}-{digest}"
