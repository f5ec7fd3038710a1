"""A run: a folder with what was asked of whom (``run.json``), every answer (``samples.jsonl``) and the summary.

A run can be stopped at any moment and resumed. Its summary is made of the records alone and holds no times, so a run
that was stopped, split over machines or joined has the very same one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_edge.bench.tasks.asking import Asker, Said
from llava_edge.bench.tasks.samples import (
    Mark,
    Record,
    Sample,
    by_picture,
    read_records,
    shard,
    write_records,
    write_text,
)
from llava_edge.bench.tasks.task import Metrics, Task, make_task
from llava_edge.errors import ContextFullError, ImageError, InputError

if TYPE_CHECKING:
    from llava_edge.bench.tasks.reading import Data

SETTINGS, SAMPLES, SUMMARY = "run.json", "samples.jsonl", "summary.json"
REVIEWS, JUDGED = "reviews.jsonl", "judged.json"
BACKEND = "vision_backend"
LOCK = ".lock"
_ANEW = "Begin anew with --overwrite."

Numbered = tuple[int, Sample]
"""A sample with its number in the whole."""


@dataclass(frozen=True)
class Plan:
    """The samples of this part of a run."""

    settings: dict[str, Any]
    samples: list[Numbered]


@dataclass(frozen=True)
class Run:
    """A run's folder that was opened: its settings and the records in it."""

    folder: Path
    settings: dict[str, Any]
    records: list[Record]


def plan_run(
    name: str,
    options: dict[str, Any],
    task: Task,
    data: Data,
    model: dict[str, Any],
    *,
    limit: int | None = None,
    part: tuple[int, int] = (1, 1),
) -> Plan:
    """Read the benchmark, choose this part's samples, and write down what makes two runs the same."""
    everything = by_picture(task.read(data))
    samples = everything[:limit]
    if not samples:
        raise InputError(f"there is nothing to ask in {data.root}: {len(data.skipped)} entries were skipped")
    if len({sample.id for sample in samples}) < len(samples):
        twice = next(name for name, count in Counter(sample.id for sample in samples).items() if count > 1)
        raise InputError(f"two samples of {data.root} have the id {twice}")
    task.prepare(samples)
    settings = {
        "task": name,
        "options": options,
        "model": model,
        "max_tokens": task.max_tokens,
        "limit": limit,
        "samples": len(samples),
        "skipped": len(data.skipped),
        "data_sha256": _data_hash(samples),
        "shard": list(part),
    }
    return Plan(settings, shard(samples, *part))


def _data_hash(samples: Sequence[Sample]) -> str:
    """Over questions and answers, not over paths: the same data lies elsewhere on another machine."""
    digest = hashlib.sha256()
    for s in samples:
        digest.update(json.dumps([s.id, s.question, s.image_name, s.expected, s.facts, s.choices]).encode())
    return digest.hexdigest()


def start(folder: Path, plan: Plan, *, resume: bool, overwrite: bool) -> list[Record]:
    """Make the run's folder, or open it to go on; the records that are there already.

    Raises
    ------
    InputError
        There is a run that was not to be resumed, or one with other settings.
    """
    settings = folder / SETTINGS
    if settings.is_file() and not overwrite:
        if not resume:
            raise InputError(f"{folder} has a run already", hint="--resume goes on with it, --overwrite begins anew.")
        _check_same(folder, _read_settings(folder), plan.settings, BACKEND)
        return _kept_records(folder, plan)
    folder.mkdir(parents=True, exist_ok=True)
    old = [name for name in (SUMMARY, SAMPLES, REVIEWS, JUDGED) if (folder / name).exists()]
    if old and not overwrite:
        raise InputError(
            f"{folder} has {', '.join(old)}, and no {SETTINGS} that says of what run",
            hint="Name another --output; --overwrite deletes them.",
        )
    for name in old:
        (folder / name).unlink()
    write_text(settings, json.dumps(plan.settings, indent=2, ensure_ascii=False) + "\n")
    return []


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """While it lasts nobody else writes the run; InputError if somebody does."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another program is writing {folder}", hint="Wait for it, or name another --output."
        ) from None
    try:
        yield
    finally:
        lock.release()


def note_backend(folder: Path, backend: str) -> None:
    """Write down what reads the run's pictures; InputError where something else has read the first of them."""
    settings = _read_settings(folder)
    if settings.get(BACKEND, backend) != backend:
        raise InputError(
            f"the pictures of {folder} were read by {settings[BACKEND]} so far, and would now be by {backend}",
            hint=f"Name it with --vision-backend {settings[BACKEND]}, or begin anew with --overwrite.",
        )
    write_text(folder / SETTINGS, json.dumps({**settings, BACKEND: backend}, indent=2, ensure_ascii=False) + "\n")


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} is not a run: it has no {SETTINGS}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    if not isinstance(settings, dict) or "task" not in settings:
        raise InputError(f"{path} does not describe a run")
    return settings


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any], *ignore: str) -> None:
    new = json.loads(json.dumps(new))
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in ignore and old.get(key) != new.get(key):
            raise InputError(
                f"{folder} is another run: its {key} is {_short(old.get(key))}, this one's {_short(new.get(key))}",
                hint="Give the same options, or another --output.",
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def _kept_records(folder: Path, plan: Plan) -> list[Record]:
    """The records of a run that goes on. A last line that was torn when the run was killed is cut off."""
    path = folder / SAMPLES
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    records = read_records(path)
    for number, (record, (index, sample)) in enumerate(zip(records, plan.samples, strict=False), 1):
        if (record.index, record.id, record.question) != (index, sample.id, sample.question):
            raise InputError(f"{path}:{number}: is sample {record.id}; expected {sample.id}")
    if len(records) > len(plan.samples):
        raise InputError(f"{path} has {len(records)} records; this run has {len(plan.samples)} samples")
    return records


def run_samples(
    folder: Path,
    plan: Plan,
    task: Task,
    asker: Asker,
    done: list[Record],
    progress: Callable[[int], None],
    *,
    skip_bad: bool = False,
) -> list[Record]:
    """Ask what is left and append every answer to the run's file at once.

    A picture that can't be read ends the run, or with ``skip_bad`` leaves a record without an answer.
    """
    records = list(done)
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        for numbered in together(plan.samples[len(done) :], asker.width):
            for record in ask(task, asker, numbered, skip_bad=skip_bad):
                file.write(record.to_json() + "\n")
                file.flush()
                records.append(record)
                progress(1)
    return records


def together(samples: Sequence[Numbered], width: int) -> Iterator[list[Numbered]]:
    """Samples that follow each other and are on one picture, up to ``width`` at a time."""
    for (image, written), found in groupby(samples, key=lambda pair: (pair[1].image, not pair[1].choices)):
        group = list(found)
        size = width if image is not None and written else 1
        for start in range(0, len(group), size):
            yield group[start : start + size]


def ask(task: Task, asker: Asker, samples: Sequence[Numbered], *, skip_bad: bool = False) -> Iterator[Record]:
    """Ask questions on one picture and mark the answers.

    What can't be asked ends the run, or leaves a record without an answer. Questions that were asked together took the
    same time each.
    """
    if len(samples) > 1:
        started = time.perf_counter()
        try:
            answers = asker.answers(task, [sample for _, sample in samples])
        except (InputError, ContextFullError):
            pass  # it is one question's; which one comes out below
        else:
            seconds = (time.perf_counter() - started) / len(samples)
            for (index, sample), said in zip(samples, answers, strict=True):
                yield _record(index, sample, said, task.mark(sample, said), seconds)
            return
    for index, sample in samples:
        yield _ask_one(task, asker, index, sample, skip_bad)


def _ask_one(task: Task, asker: Asker, index: int, sample: Sample, skip_bad: bool) -> Record:
    started = time.perf_counter()
    try:
        (said,) = asker.answers(task, [sample])
        mark = task.mark(sample, said)
    except (InputError, ContextFullError) as error:
        of_this_sample = isinstance(error, ImageError | ContextFullError)
        if not (skip_bad and of_this_sample):
            hints = [error.hint, "--resume --skip-bad goes on without it." if of_this_sample else None]
            hint = " ".join(text for text in hints if text)
            raise type(error)(f"sample {sample.id}: {error}", hint=hint or None) from None
        said, mark = Said("", "", 0), Mark(None, {"unreadable": str(error)})
    return _record(index, sample, said, mark, time.perf_counter() - started)


def _record(index: int, sample: Sample, said: Said, mark: Mark, seconds: float) -> Record:
    return Record(
        index=index,
        id=sample.id,
        image=sample.image_name,
        question=sample.question,
        prompt_sha256=said.prompt_sha256,
        answer=said.text,
        expected=sample.expected,
        score=mark.score,
        detail=mark.detail,
        facts=sample.facts,
        seconds=round(seconds, 6),
        tokens=said.tokens,
    )


def summary_of(settings: dict[str, Any], metrics: Metrics, headline: str, asked: int) -> dict[str, Any]:
    """The summary: what was run, and every metric with its interval."""
    kept = {key: settings[key] for key in ("task", "model", "options", "samples", "skipped", "shard")}
    return {
        **kept,
        BACKEND: settings.get(BACKEND),
        "asked": asked,
        "headline": headline,
        "metrics": {name: asdict(metric) for name, metric in metrics.items()},
    }


def finish(folder: Path, records: list[Record]) -> dict[str, Any]:
    """Write the summary and the task's own files beside it."""
    settings = _read_settings(folder)
    task = make_task(settings["task"], settings["options"])
    asked = [record for record in records if not record.unreadable]
    summary = summary_of(settings, task.summarize(asked), task.headline, len(asked))
    summary["unreadable"] = len(records) - len(asked)
    files = task.extra_files(asked, folder)
    if files:
        summary["files"] = [path.name for path in files]
    write_text(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def open_run(folder: Path) -> Run:
    """Open a run to look at it."""
    settings = _read_settings(folder)
    path = folder / SAMPLES
    records = read_records(path) if path.is_file() else []
    if any(after.index <= before.index for before, after in itertools.pairwise(records)):
        raise InputError(f"{path} has samples twice or out of order: two programs have written it", hint=_ANEW)
    return Run(folder, settings, records)


def merge(folders: Sequence[Path], target: Path) -> dict[str, Any]:
    """Join the parts of a run that was split with ``--shard``; the summary is that of a run in one piece.

    Raises
    ------
    InputError
        The parts are of different runs, one is missing, given twice or not finished.
    """
    runs = [open_run(folder) for folder in folders]
    asked = [run for run in runs if run.records]  # a part without a sample knows no backend
    for run in runs:
        _check_same(run.folder, run.settings, (asked or runs)[0].settings, "shard", *([] if run.records else [BACKEND]))
    parts = runs[0].settings["shard"][1]
    numbers = sorted(tuple(run.settings["shard"]) for run in runs)
    if numbers != [(number, parts) for number in range(1, parts + 1)]:
        have = ", ".join(f"{number}/{of}" for number, of in numbers)
        raise InputError(f"the parts are {have}; expected each of 1/{parts} to {parts}/{parts} once")
    records = sorted((record for run in runs for record in run.records), key=lambda record: record.index)
    wanted = runs[0].settings["samples"]
    if [record.index for record in records] != list(range(wanted)):
        raise InputError(f"the parts have {len(records)} of {wanted} samples", hint="Finish them with --resume first.")
    settings = {**(asked or runs)[0].settings, "shard": [1, 1]}
    if (target / SETTINGS).exists():
        raise InputError(f"{target} has a run already", hint="Name another folder.")
    target.mkdir(parents=True, exist_ok=True)
    write_records(target / SAMPLES, records)
    write_text(target / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return finish(target, records)
