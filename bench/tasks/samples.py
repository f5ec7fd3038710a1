"""What is asked and what came of it. A run's file has one :class:`Record` a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llava_edge.errors import InputError


@dataclass(frozen=True)
class Sample:
    """A question on a picture (or on none).

    ``expected`` and ``facts`` (category, split …) are JSON values that go into the record. With ``choices`` nothing
    is generated: the model's probabilities choose among them.
    """

    id: str
    question: str
    image: Path | None
    expected: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    folder: str = ""

    @property
    def image_name(self) -> str | None:
        """The picture's name in the record; ``folder`` goes in front where names alone are not unique."""
        if self.image is None:
            return None
        return f"{self.folder}/{self.image.name}" if self.folder else self.image.name


@dataclass(frozen=True)
class Mark:
    """What an answer is worth. ``score`` is None where it can't be told (no reference, an unreadable judgement)."""

    score: float | None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One answered sample. ``prompt_sha256`` is over the tokens of the prompt and the picture's content."""

    index: int
    id: str
    image: str | None
    question: str
    prompt_sha256: str
    answer: str
    expected: Any
    score: float | None
    detail: dict[str, Any]
    facts: dict[str, Any]
    seconds: float
    tokens: int

    @property
    def unreadable(self) -> bool:
        """Whether the picture could not be read, so that nothing was asked."""
        return "unreadable" in self.detail

    @property
    def cluster(self) -> str:
        """The picture, as the unit that the bootstrap draws; a sample without one is its own."""
        return self.image if self.image is not None else f"sample {self.id}"

    def to_json(self) -> str:
        """The record's line, without the line's end."""
        return json.dumps(asdict(self), ensure_ascii=False)


_FIELDS = {f.name for f in fields(Record)}


def read_records(path: Path) -> list[Record]:
    """The records of a run's file; InputError names file and line."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            values = json.loads(line)
        except ValueError:
            raise InputError(f"{path}:{number}: not a line of JSON", hint="--resume mends a torn last line.") from None
        if not isinstance(values, dict) or set(values) != _FIELDS:
            raise InputError(f"{path}:{number}: not a record of this version; expected {', '.join(sorted(_FIELDS))}")
        records.append(Record(**values))
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a run's file in one go, under a temporary name first."""
    write_text(path, "".join(record.to_json() + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def by_picture(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of one picture one after the other, in the order in which the pictures first come.

    A picture whose questions follow each other is read once.
    """
    order: dict[Path | str, int] = {}
    for sample in samples:
        order.setdefault(_key(sample), len(order))
    return sorted(samples, key=lambda sample: order[_key(sample)])


def shard(samples: Sequence[Sample], part: int, parts: int) -> list[tuple[int, Sample]]:
    """The (index, sample) pairs of part 1 to ``parts``; a picture's questions stay together."""
    order: dict[Path | str, int] = {}
    for sample in samples:
        order.setdefault(_key(sample), len(order))
    return [(i, sample) for i, sample in enumerate(samples) if order[_key(sample)] % parts == part - 1]


def _key(sample: Sample) -> Path | str:
    return sample.image if sample.image is not None else f"sample {sample.id}"
