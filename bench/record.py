"""The one record of every benchmark. JSON, CSV, Markdown, HTML and plots derive from it.

Values are in SI units and whole bytes; rounding and prefixes belong to the reports.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from llava_edge.errors import InputError
from llava_edge.strict_json import Fields, parse_object

SCHEMA = 1
Kind = Literal["speed", "quality", "quants", "ttft"]


@dataclass(frozen=True)
class Metric:
    """A measured quantity: ``value`` (of timings the median), its 95 % interval, and the raw samples.

    ``interval`` is None where one sample alone tells nothing of the spread.
    """

    unit: str
    value: float
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise InputError(f"a metric's value is {self.value}; expected a finite number")


@dataclass(frozen=True)
class ModelFile:
    """A file of a measured model. ``tensors`` counts its tensors by their real type, whatever ``type`` promises."""

    role: str
    name: str
    type: str
    bytes: int
    sha256: str
    tensors: dict[str, int]


@dataclass(frozen=True)
class Row:
    """A model and what was measured of it. ``label`` is its name in tables, ``notes`` what a reader must know,
    ``vision_backend`` what read the pictures.
    """

    label: str
    name: str
    family: str
    image_size: int
    image_tokens: int
    files: tuple[ModelFile, ...]
    metrics: dict[str, Metric]
    notes: tuple[str, ...] = ()
    vision_backend: str = ""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    def type_of(self, role: str) -> str:
        """The type that the file of a role has, empty without such a file."""
        return next((file.type for file in self.files if file.role == role), "")


@dataclass(frozen=True)
class Machine:
    """Where it was measured. ``cpu_flags`` is what llama.cpp was built for and found."""

    cpu: str
    architecture: str
    system: str
    cores: int
    memory_bytes: int
    cpu_flags: str
    power_source: str
    python: str


@dataclass(frozen=True)
class Recommendation:
    """The row that a rule picks; ``label`` is None if none does."""

    rule: str
    label: str | None


@dataclass(frozen=True)
class Result:
    """One run of a benchmark."""

    kind: Kind
    created_utc: str
    version: str
    llama_cpp_version: str
    llama_cpp_commit: str
    machine: Machine
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    ceilings: dict[str, Metric] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    schema: int = SCHEMA
    onnxruntime_version: str = ""

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps({"schema": self.schema, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read a record; InputError names the key that is wrong."""
        root = parse_object(text)
        schema = root.integer("schema")
        if schema != SCHEMA:
            raise InputError(f"schema is {schema}; this version of llava-edge reads {SCHEMA}")
        return root.build(_result)


def read_result(path: Path) -> Result:
    """Read a result file; InputError says what is wrong with it."""
    try:
        return Result.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such result: {path}", hint="Make one with `llava-edge bench speed --json`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    except InputError as error:
        raise InputError(f"{path} is not a result of llava-edge bench: {error}") from None


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file under another name and rename it, so that a kill leaves the old file or the new one."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_result(path: Path, result: Result) -> None:
    """Write a record; InputError where that fails."""
    try:
        write_atomically(path, result.to_json())
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror}", hint="Make room, or name another file.") from None


def write_so_far(path: Path | None, result: Result, say: Callable[[str], None]) -> None:
    """Write a record that is not whole yet. What is measured isn't given up where that fails."""
    if path is not None:
        try:
            write_result(path, result)
        except InputError as error:
            say(str(error))


def row_from_dict(values: dict[str, Any]) -> Row:
    """A row from JSON."""
    return Fields(values).build(_row)


def with_metrics(row: Row, metrics: Mapping[str, Metric], notes: tuple[str, ...] = ()) -> Row:
    """The row with more metrics and notes."""
    return dataclasses.replace(row, metrics={**row.metrics, **metrics}, notes=(*row.notes, *notes))


def _result(f: Fields) -> Result:
    kind = f.text("kind")
    if kind not in get_args(Kind):
        raise InputError(f"kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")
    return Result(
        kind=cast("Kind", kind),
        created_utc=f.text("created_utc"),
        version=f.text("version"),
        llama_cpp_version=f.text("llama_cpp_version"),
        llama_cpp_commit=f.text("llama_cpp_commit"),
        machine=f.object("machine").build(_machine),
        settings=f.object("settings").raw(),
        rows=tuple(row.build(_row) for row in f.objects("rows")),
        ceilings=_metrics(f.object("ceilings")),
        warnings=f.texts("warnings"),
        recommendations=tuple(entry.build(_recommendation) for entry in f.objects("recommendations")),
        schema=f.integer("schema"),
        onnxruntime_version=f.text("onnxruntime_version") if f.has("onnxruntime_version") else "",
    )


def _machine(f: Fields) -> Machine:
    texts = {key: f.text(key) for key in ("cpu", "architecture", "system", "cpu_flags", "power_source", "python")}
    return Machine(cores=f.integer("cores"), memory_bytes=f.integer("memory_bytes"), **texts)


def _row(f: Fields) -> Row:
    return Row(
        label=f.text("label"),
        name=f.text("name"),
        family=f.text("family"),
        image_size=f.integer("image_size"),
        image_tokens=f.integer("image_tokens"),
        files=tuple(entry.build(_file) for entry in f.objects("files")),
        metrics=_metrics(f.object("metrics")),
        notes=f.texts("notes"),
        vision_backend=f.text("vision_backend"),
    )


def _file(f: Fields) -> ModelFile:
    counts = f.object("tensors")
    tensors = {kind: counts.integer(kind) for kind in counts.raw()}
    texts = {key: f.text(key) for key in ("role", "name", "type", "sha256")}
    return ModelFile(bytes=f.integer("bytes"), tensors=tensors, **texts)


def _metrics(f: Fields) -> dict[str, Metric]:
    return {name: f.object(name).build(_metric) for name in f.raw()}


def _metric(f: Fields) -> Metric:
    interval = None if f.is_null("interval") else f.numbers("interval", 2)
    f.has("value")
    value = f.raw().get("value")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(f"value is {value!r}; expected a number")
    pair = None if interval is None else (interval[0], interval[1])
    return Metric(f.text("unit"), float(value), pair, f.numbers("samples"))


def _recommendation(f: Fields) -> Recommendation:
    return Recommendation(f.text("rule"), None if f.is_null("label") else f.text("label"))
