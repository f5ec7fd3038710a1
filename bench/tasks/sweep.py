"""A task over a grid of settings: one run for each combination, and a table of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llava_edge.bench.tasks.evaluate import Job, Progress, evaluate
from llava_edge.bench.tasks.models import ModelChoice
from llava_edge.bench.tasks.samples import write_text
from llava_edge.errors import InputError

SWEEP = "sweep.json"
_MODEL_KEYS = {field.name for field in fields(ModelChoice)} - {"llm", "mmproj", "threads", "n_gpu_layers", "n_ctx"}
_WHOLE = {"image_tokens", "max_tokens", "limit"}
_SWITCHES = {"ocr"}
_FILES = {"file", "folders", "synonyms"}


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``KEY=VALUE,VALUE`` to values by key. Feature layers are joined by ``+``."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key or not values:
            raise InputError(f"a grid's line is {text!r}; expected KEY=VALUE,VALUE", hint="Such as image-tokens=64,16.")
        if key in grid:
            raise InputError(f"{key} stands twice in the grid")
        grid[key] = [_value(key, value.strip()) for value in values.split(",")]
    return grid


def _value(key: str, text: str) -> Any:
    try:
        if key in _WHOLE:
            return int(text)
        if key == "feature_layers":
            return tuple(int(layer) for layer in text.split("+"))
    except ValueError:
        raise InputError(f"{key} is {text!r} in the grid; expected whole numbers") from None
    if key in _SWITCHES:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{key} is {text!r} in the grid; expected true or false")
        return text.lower() == "true"
    if key in _FILES:
        raise InputError(f"{key} names a file, which is no part of a grid", hint="Run the sweep once for each.")
    return text


def run_sweep(job: Job, grid: dict[str, list[Any]], folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Run every combination into a folder of its own. What is finished is not run again, so a sweep can be stopped."""
    rows = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = "_".join(f"{key}={_text(value)}" for key, value in point.items()).replace("/", "-") or "run"
        outcome = evaluate(_job_at(job, point, folder / name), progress)
        headline = outcome.summary["headline"]
        rows.append({"settings": point, "metric": headline, **outcome.summary["metrics"][headline], "run": name})
        write_text(folder / SWEEP, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    return rows


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _job_at(job: Job, point: dict[str, Any], output: Path) -> Job:
    model = {key: value for key, value in point.items() if key in _MODEL_KEYS}
    run = {key: value for key, value in point.items() if key in ("limit", "max_tokens")}
    options = {key: value for key, value in point.items() if key not in model and key not in run}
    return replace(
        job,
        choice=replace(job.choice, **model),
        options={**job.options, **options},
        output=output,
        resume=True,
        **run,
    )
