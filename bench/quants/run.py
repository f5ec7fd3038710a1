"""The run over all types. Each finished step is a file, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from llava_edge.bench import environment
from llava_edge.bench.models import Subject
from llava_edge.bench.progress import Say, duration
from llava_edge.bench.quality.data import Data
from llava_edge.bench.quality.measure import Quality
from llava_edge.bench.quants.make import REFERENCE, SOURCE, Maker, check_checkpoint, convert_source, open_source
from llava_edge.bench.quants.plan import MADE, QuantsSettings, Variant, check_space, variants
from llava_edge.bench.quants.recommend import recommend
from llava_edge.bench.quants.tasks import QuantsTask, measure_tasks
from llava_edge.bench.record import Machine, Metric, Result, Row, row_from_dict, with_metrics, write_atomically
from llava_edge.bench.speed.measure import ceilings_of_passes, measure_ceilings, measure_speed, of_passes, warnings_of
from llava_edge.errors import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")
WORK = "work"
_SETTINGS, _MEASURED = "settings.json", "measured.json"
_OURS = {_SETTINGS, _MEASURED, "ceilings.json", "rows", REFERENCE, f"{REFERENCE}.parity.json", SOURCE, *MADE}


def bench_quants(
    source: Path,
    output: Path,
    settings: QuantsSettings,
    data: Data | None,
    *,
    tasks: Sequence[QuantsTask] = (),
    image_tokens: int | None = None,
    keep: bool = False,
    restart: bool = False,
    say: Say = log.info,
) -> Result:
    """Make and measure every variant, or what a stopped run with the same settings left to do.

    Without ``data`` and ``tasks`` only size, memory and speed are measured. ``keep`` leaves the bundles in ``output``.

    Raises
    ------
    InputError
        A source that can't be quantised, no room, or an output that holds a run with other settings, on another
        machine, with other versions, or files of somebody else.
    """
    work = output / WORK
    try:
        _check_ours(work)
        reference = open_source(source, settings, image_tokens)
        if restart:
            _check_source_survives(source, work, reference)
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        reference = reference or convert_source(source, work, settings, image_tokens, say)
        return _Run(reference, work, settings, data, tasks, keep, say).run()
    except OSError as error:
        raise InputError(
            f"can't write {output}: {error}", hint="Make room; what is finished is kept, the same command goes on."
        ) from None


def _check_ours(work: Path) -> None:
    """Refuse a folder that only has the name of this command's: runs delete in it."""
    if not work.is_dir():
        return
    names = {path.name for path in work.iterdir() if not (path.name[0] == "." and path.suffix == ".partial")}
    marks = ((_SETTINGS, '"llama_cpp_commit"'), (SOURCE, '"checkpoint"'))
    marked = any(name in names and words in (work / name).read_text("utf-8", "replace") for name, words in marks)
    if names - _OURS or (names and not marked):
        named = ", ".join(sorted(names - _OURS or names)[:3])
        raise InputError(
            f"{work} is not a folder of this command: it holds {named}",
            hint="Choose another --output, or give that folder another name.",
        )


def _check_source_survives(source: Path, work: Path, reference: Subject | None) -> None:
    """Before ``--restart`` deletes: there is something to begin anew with, and it lies elsewhere."""
    if source.resolve().is_relative_to(work.resolve()):
        raise InputError(f"--restart would delete {source}", hint="Move it out of the output's folder work.")
    if reference is None:
        check_checkpoint(source)


class _Run:
    def __init__(
        self,
        reference: Subject,
        work: Path,
        settings: QuantsSettings,
        data: Data | None,
        tasks: Sequence[QuantsTask],
        keep: bool,
        say: Say,
    ) -> None:
        self._settings, self._data, self._work, self._keep, self._say = settings, data, work, keep, say
        self._tasks = tasks
        self._reference = reference
        self._variants = variants(settings, self._reference.bundle)
        self._facts = {
            **settings.facts(data),
            "tasks": {task.name: task.facts for task in tasks},
            "source": self._reference.bundle.manifest.name,
            "image_tokens": self._reference.image_tokens,
        }
        self._check_same_run()
        self._rows = work / "rows"
        self._rows.mkdir(exist_ok=True)
        self._maker = Maker(self._reference, work, settings.speed.threads, say)
        self._quality = Quality(self._reference, data, settings.quality, work / "cache", say) if data else None
        self._ceilings = self._kept_ceilings()
        self._made: dict[Variant, Subject] = {}

    def run(self) -> Result:
        todo = [variant for variant in self._variants if self._kept(variant, "") is None]
        if not self._keep:
            self._forget_finished()
        if len(todo) < len(self._variants):
            self._say(f"{len(self._variants) - len(todo)} of {len(self._variants)} are measured already")
        if todo:
            check_space(self._settings, todo, self._reference, self._data, self._work, keep=self._keep)
        passes = self._settings.speed.passes
        if passes > 1:
            every = [(number, variant) for number in range(passes) for variant in todo]
            steps = [step for step in every if self._kept(step[1], f".speed-{step[0]}") is None]
            for number, variant in self._counted(steps, lambda step: f"pass {step[0] + 1} of {passes}: {step[1].name}"):
                self._measure_speed(variant, number)
        for variant in self._counted(todo, lambda variant: variant.name):
            self._measure(variant)
            if not self._keep:
                self._forget_finished()
        if not self._keep:
            for name in MADE:
                shutil.rmtree(self._work / name, ignore_errors=True)
        return self._result([row for row in (self._kept(v, "") for v in self._variants) if row is not None])

    def _counted(self, steps: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
        """The steps, each announced with what is left."""
        started = time.monotonic()
        for number, step in enumerate(steps):
            each = (time.monotonic() - started) / number if number else 0.0
            left = f", about {duration(each * (len(steps) - number))} left" if number else ""
            self._say(f"{name(step)}: {number + 1} of {len(steps)}{left}")
            yield step

    def _subject(self, variant: Variant) -> Subject:
        if variant not in self._made:
            self._made[variant] = self._maker.make(variant)
        return self._made[variant]

    def _measure_speed(self, variant: Variant, number: int) -> Row:
        """The speeds of a pass, measured or kept."""
        row = self._kept(variant, f".speed-{number}")
        if row is None:
            subject = self._subject(variant)
            self._complete_ceilings(subject, number)
            row = measure_speed(subject, self._settings.speed, self._ceilings[number], self._say, number)
            self._save(variant, f".speed-{number}", row)
        return row

    def _measure(self, variant: Variant) -> None:
        passes = self._settings.speed.passes
        row = of_passes([self._measure_speed(variant, number) for number in range(passes)], passes)
        subject = self._subject(variant)
        if self._quality is not None:
            row = with_metrics(row, self._quality.measure(subject))
        row = with_metrics(row, measure_tasks(subject, self._tasks, self._settings.speed.threads, self._say))
        self._save(variant, "", row)

    def _forget_finished(self) -> None:
        """Types whose variants are all measured."""
        todo = {variant.llm_type for variant in self._variants if self._kept(variant, "") is None}
        self._maker.forget([variant for variant in self._variants if variant.llm_type not in todo])

    def _result(self, rows: list[Row]) -> Result:
        """The record, of when and where the rows were measured, not of when they were put together."""
        measured = _read_json(self._work / _MEASURED) or {}
        sources = measured["power_sources"]
        changed = [f"measured partly on another power source: {', '.join(sources)}"] if len(sources) > 1 else []
        found = environment.result(
            "quants",
            tuple(rows),
            self._facts,
            ceilings=ceilings_of_passes(self._ceilings),
            warnings=(*changed, *warnings_of(rows)),
            recommendations=recommend(rows, self._settings.memory_limit_bytes),
        )
        return replace(found, created_utc=measured["created_utc"], machine=Machine(**measured["machine"]))

    def _note_measured(self) -> None:
        """Keep when and where a figure was measured. The machine is that of the first one."""
        machine = asdict(environment.machine())
        kept = _read_json(self._work / _MEASURED) or {"machine": machine, "power_sources": []}
        sources = list(dict.fromkeys([*kept["power_sources"], machine["power_source"]]))
        noted = {"created_utc": environment.utc_now(), "machine": kept["machine"], "power_sources": sources}
        write_atomically(self._work / _MEASURED, json.dumps(noted))

    def _complete_ceilings(self, subject: Subject, number: int) -> None:
        """In a pass, the rates of the types that no variant before had."""
        known = self._ceilings[number]
        self._ceilings[number] = measure_ceilings([subject], self._settings.speed.threads, self._say, known)
        kept = [{name: asdict(metric) for name, metric in found.items()} for found in self._ceilings]
        write_atomically(self._work / "ceilings.json", json.dumps({"passes": kept}))

    def _kept_ceilings(self) -> list[dict[str, Metric]]:
        kept = (_read_json(self._work / "ceilings.json") or {}).get("passes", [])
        found = [
            {name: Metric(m["unit"], m["value"], None, tuple(m["samples"])) for name, m in each.items()}
            for each in kept
        ]
        return found or [{} for _ in range(self._settings.speed.passes)]

    def _check_same_run(self) -> None:
        """What was measured with other settings must not stand in the same table."""
        path = self._work / _SETTINGS
        files = [file.sha256 for file in self._reference.bundle.manifest.files]
        now = environment.decisive(environment.result("quants", (), {}))
        wanted = json.loads(json.dumps({**self._facts, "files": files, **now}))
        found = _read_json(path)
        if found is None:
            write_atomically(path, json.dumps(wanted, indent=1))
            return
        for key in [*wanted, *found]:
            if wanted.get(key) != found.get(key):
                raise InputError(
                    f"{self._work.parent} holds a run with other settings: its {key} is {found.get(key)}",
                    hint="Give the same options to go on, --restart to begin anew, or another --output.",
                )

    def _kept(self, variant: Variant, step: str) -> Row | None:
        values = _read_json(self._rows / f"{variant.name}{step}.json")
        return None if values is None else row_from_dict(values)

    def _save(self, variant: Variant, step: str, row: Row) -> None:
        self._note_measured()
        write_atomically(self._rows / f"{variant.name}{step}.json", json.dumps(asdict(row)))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(f"{path} is damaged", hint="--restart begins anew.") from None
    return values
