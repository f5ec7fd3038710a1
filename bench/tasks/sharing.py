"""What it saves to read a picture once for all its questions, measured in one run."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np

from llava_edge.bench.tasks.asking import Asker, Said
from llava_edge.bench.tasks.evaluate import Job, Progress, read_job
from llava_edge.bench.tasks.run import Numbered, together
from llava_edge.bench.tasks.stats import bootstrap
from llava_edge.bench.tasks.task import Task


def measure_sharing(job: Job, progress: Progress) -> dict[str, Any]:
    """Ask every question twice, picture by picture in turn: once with its picture's reading shared, once with
    everything forgotten before each question. The model is loaded once, outside the times.
    """
    task, _, plan = read_job(job)
    samples = [sample for _, sample in plan.samples]
    rows = []
    same = 0
    with job.choice.load() as model, progress(len(samples), 0, f"sharing {job.task} {model.name}") as step:
        sharing = Asker(model, system=job.choice.system)
        alone = Asker(model, system=job.choice.system, share=False)
        alone.answers(task, [samples[0]])  # loads the tower
        for _, group in groupby(plan.samples, key=lambda pair: pair[1].image_name):
            questions = list(group)
            model.forget()
            shared_seconds, shared = _timed(sharing, task, questions)
            alone_seconds, separate = _timed(alone, task, questions)
            rows.append([shared_seconds, alone_seconds])
            same += sum(a.text == b.text for a, b in zip(shared, separate, strict=True))
            step(len(questions))
    times = np.array(rows)
    faster = bootstrap([str(n) for n in range(len(rows))], times, lambda sums: float(sums[1] / sums[0]))
    return {
        "task": job.task,
        "model": plan.settings["model"],
        "vision_backend": model.vision_backend,
        "pictures": len(rows),
        "questions": len(samples),
        "shared_seconds": float(times[:, 0].sum()),
        "separate_seconds": float(times[:, 1].sum()),
        "times_faster": asdict(faster),
        "same_answers": same,
    }


def _timed(asker: Asker, task: Task, questions: list[Numbered]) -> tuple[float, list[Said]]:
    started = time.perf_counter()
    said: list[Said] = []
    for group in together(questions, asker.width):
        said += asker.answers(task, [sample for _, sample in group])
    return time.perf_counter() - started, said
