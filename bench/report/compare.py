"""Two results side by side: ratios with intervals, and everything that keeps them from being comparable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llava_edge.bench.record import Metric, Result, Row
from llava_edge.bench.statistics import SURE
from llava_edge.errors import InputError

_LEGEND = (
    f"?: nobody can tell, because a side has no interval, or that of fewer than {SURE} samples: "
    "their range, which covers the median with less than 95 %."
)


@dataclass(frozen=True)
class Comparison:
    """One metric of one model in both results. ``ratio`` is second over first, None where one of them is not above 0.

    ``differs`` is None where one of the two has no interval, or one of fewer samples than 95 % take: nobody can tell.
    """

    label: str
    metric: str
    unit: str
    first: float
    second: float
    ratio: float | None
    interval: tuple[float, float] | None
    differs: bool | None


@dataclass(frozen=True)
class Compared:
    """All metrics that both results have, and what else differs between them."""

    rows: tuple[Comparison, ...]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(first: Result, second: Result) -> Compared:
    """Compare rows of the same label; InputError if there are none. Two results of one row each are compared anyway."""
    pairs = list(_pairs(first, second))
    rows = [
        _compare(one.label, name, metric, other.metrics[name])
        for one, other in pairs
        for name, metric in one.metrics.items()
        if name in other.metrics
    ]
    if not rows:
        raise InputError(
            f"nothing to compare: one result has {_names(first)}, the other {_names(second)}",
            hint="Compare results of the same models and the same kind of benchmark.",
        )
    return Compared(tuple(rows), tuple(_differences(first, second, pairs)))


def _pairs(first: Result, second: Result) -> Iterator[tuple[Row, Row]]:
    if len(first.rows) == len(second.rows) == 1:
        yield first.rows[0], second.rows[0]
        return
    others = {row.label: row for row in second.rows}
    yield from ((row, others[row.label]) for row in first.rows if row.label in others)


def _compare(label: str, name: str, first: Metric, second: Metric) -> Comparison:
    ratio = second.value / first.value if first.value > 0 and second.value > 0 else None
    interval, differs = None, None
    spreads = [_log_half_width(metric) for metric in (first, second)]
    if ratio is not None and spreads[0] is not None and spreads[1] is not None:
        factor = math.exp(math.hypot(spreads[0], spreads[1]))
        interval = (ratio / factor, ratio * factor)
        few = any(0 < len(metric.samples) < SURE for metric in (first, second))
        differs = None if few else not interval[0] <= 1 <= interval[1]
    elif ratio is None and first.value == second.value:
        differs = False
    return Comparison(label, name, first.unit, first.value, second.value, ratio, interval, differs)


def _log_half_width(metric: Metric) -> float | None:
    """Half of the interval on a logarithmic scale, on which ratios are differences."""
    if metric.interval is None or metric.interval[0] <= 0:
        return None
    return math.log(metric.interval[1] / metric.interval[0]) / 2


def _differences(first: Result, second: Result, pairs: list[tuple[Row, Row]]) -> Iterator[str]:
    for key in ("kind", "version", "llama_cpp_version", "llama_cpp_commit", "onnxruntime_version"):
        yield from _differs(key, getattr(first, key), getattr(second, key))
    ours, theirs = asdict(first.machine), asdict(second.machine)
    for key in ours:
        yield from _differs(f"machine.{key}", ours[key], theirs[key])
    for key in dict.fromkeys([*first.settings, *second.settings]):
        yield from _differs(f"settings.{key}", first.settings.get(key), second.settings.get(key))
    for one, other in pairs:
        yield from _differs("model", one.label, other.label)
        yield from _differs(f"{one.label}: image size", one.image_size, other.image_size)
        yield from _differs(f"{one.label}: visual tokens", one.image_tokens, other.image_tokens)
        yield from _differs(
            f"{one.label}: vision backend", one.vision_backend or "none", other.vision_backend or "none"
        )
        hashes = [{file.role: file.sha256 for file in row.files} for row in (one, other)]
        for role in dict.fromkeys([*hashes[0], *hashes[1]]):
            if hashes[0].get(role) != hashes[1].get(role):
                yield f"{one.label}: the {role} files are different ones"


def _differs(name: str, first: Any, second: Any) -> Iterator[str]:
    if first != second:
        yield f"{name}: {first} and {second}"


def _names(result: Result) -> str:
    return ", ".join(row.label for row in result.rows) or "no models"


def markdown(compared: Compared) -> str:
    """The comparison as a table in Markdown."""
    lines = [["model", "metric", "first", "second", "unit", "ratio", "95 % interval", ""]]
    for row in compared.rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        interval = "" if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        verdict = {True: "differs", False: "same", None: "?"}[row.differs]
        cells = [row.label, row.metric, f"{row.first:.5g}", f"{row.second:.5g}", row.unit, ratio, interval, verdict]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    legend = ["", _LEGEND] if any(row.differs is None for row in compared.rows) else []
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:], *legend]) + "\n"
