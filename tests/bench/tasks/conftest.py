"""Benchmarks of a few pictures in their published formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_edge.bench.tasks.evaluate import Job, Outcome, evaluate
from llava_edge.bench.tasks.models import ModelChoice
from llava_edge.bench.tasks.samples import Record


class Files:
    """Writes what tests read."""

    def picture(self, path: Path, number: int = 0) -> Path:
        """A small picture; each number has its own colour."""
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), ((number * 67) % 256, (number * 29) % 256, 90)).save(path)
        return path

    def jsonl(self, path: Path, rows: Sequence[Any]) -> Path:
        """JSON lines; texts are written as they are."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    def json(self, path: Path, value: Any) -> Path:
        """One JSON value."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path


@pytest.fixture(scope="session")
def files() -> Files:
    return Files()


@contextmanager
def silent(length: int, done: int, label: str) -> Iterator[Callable[[int], None]]:
    """A progress that nobody sees."""
    yield lambda count: None


@pytest.fixture
def pope_data(files: Files, tmp_path: Path) -> Path:
    """Three splits of two questions on each of three pictures."""
    folder = tmp_path / "pope"
    for n in range(3):
        files.picture(folder / "images" / f"p{n}.png", n)
    for split, objects in (("random", "dog car"), ("popular", "dog person"), ("adversarial", "dog cat")):
        rows = [
            {"question_id": 2 * n + m, "image": f"p{n}.png", "text": f"Is there a {noun}?", "label": ("yes", "no")[m]}
            for n in range(3)
            for m, noun in enumerate(objects.split())
        ]
        files.jsonl(folder / f"coco_pope_{split}.json", rows)
    return folder


@pytest.fixture
def evaluate_tiny(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Run a task on the tiny model."""
    choice = ModelChoice(model=str(tiny_bundle), threads=1, n_ctx=1024)

    def run(task: str, data: Path, output: str | None = "run", **fields: Any) -> Outcome:
        fields.setdefault("choice", choice)
        fields.setdefault("max_tokens", 4)
        folder = tmp_path / output if output else None
        return evaluate(Job(task, data, output=folder, **fields), silent)

    return run


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    """A record with as little as a test needs."""

    def make(expected: Any = None, score: float | None = None, **fields: Any) -> Record:
        values: dict[str, Any] = {
            "index": 0, "id": "0", "image": None, "question": "?", "prompt_sha256": "", "answer": "", "detail": {},
            "facts": {}, "seconds": 0.0, "tokens": 0,
        }  # fmt: skip
        return Record(**{**values, "expected": expected, "score": score, **fields})

    return make
