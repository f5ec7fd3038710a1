"""Plots of a result: size against quality, time against accuracy, with the front of what nothing beats."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from llava_edge.bench.quants.recommend import pareto
from llava_edge.bench.record import Metric, Result, Row
from llava_edge.bench.report.table import task_names

# the first of these that was measured
_ACCURACY = {
    "accuracy": "share of right answers",
    "cider_d": "CIDEr-D of captions",
    "top1_agreement": "share of equal top tokens",
}
_INK = "#222222"
_POINTS = (("#1f5f8b", "o"), ("#b3541e", "s"), ("#2e7d4f", "^"), ("#7a3f8f", "D"))  # a tower each


@dataclass(frozen=True)
class Plot:
    """A figure of a report. ``better`` tells in which direction the vertical axis is good."""

    name: str
    title: str
    x_title: str
    y_title: str
    x: Callable[[Row], float]
    y: str
    better: Literal["up", "down"]

    def rows(self, result: Result) -> list[Row]:
        """The rows that have both figures."""
        return [row for row in result.rows if self.y in row.metrics]


def plots_of(result: Result) -> list[Plot]:
    """The plots that the result's figures allow."""
    names = set().union(*(row.metrics for row in result.rows)) if result.rows else set()
    found = []
    if "kl_mean" in names:
        found.append(
            Plot(
                "size-quality",
                "Size and quality",
                "size, MB",
                "mean KL divergence from F16, nats",
                _size,
                "kl_mean",
                "down",
            )
        )
    accuracy = next((name for name in (*task_names(result), *_ACCURACY) if name in names), None)
    if accuracy and "ttft_warm" in names:
        found.append(
            Plot(
                "ttft-accuracy",
                "Time to the first token and accuracy",
                "TTFT warm, s",
                _ACCURACY.get(accuracy, accuracy),
                _ttft,
                accuracy,
                "up",
            )
        )
    return found


def _size(row: Row) -> float:
    return row.bytes / 1e6


def _ttft(row: Row) -> float:
    return row.metrics["ttft_warm"].value


def draw(plot: Plot, result: Result, file_type: Literal["png", "svg"]) -> bytes:
    """The figure as a file's content. Text becomes outlines in SVG, so that it looks the same everywhere."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "llava-edge", "text.color": _INK}):
        figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure.add_subplot(), plot, plot.rows(result))
        out = io.BytesIO()
        figure.savefig(out, format=file_type, metadata={"Date": None} if file_type == "svg" else None)
    return out.getvalue()


def _fill(axes: Any, plot: Plot, rows: list[Row]) -> None:
    sign = -1 if plot.better == "up" else 1
    front = pareto(rows, plot.x, lambda row: sign * row.metrics[plot.y].value)
    axes.plot([plot.x(r) for r in front], [_y(r, plot) for r in front], color=_INK, linewidth=1, label="front")
    towers = list(dict.fromkeys(map(_tower, rows)))
    for row in rows:
        low, high = _ends(row.metrics[plot.y])
        value, number = _y(row, plot), towers.index(_tower(row)) % len(_POINTS)
        colour, marker = _POINTS[number]
        axes.errorbar(
            plot.x(row), value, yerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt=marker, markersize=5,
            capsize=2, linewidth=0.6, color=colour,
        )  # fmt: skip
    for number, tower in enumerate(towers if len(towers) > 1 else []):
        colour, marker = _POINTS[number % len(_POINTS)]
        axes.plot([], [], marker, color=colour, label=f"tower {tower}")
    axes.set(title=plot.title, xlabel=plot.x_title, ylabel=plot.y_title)
    axes.grid(alpha=0.25)
    axes.margins(x=0.22)  # room for the labels
    axes.legend(fontsize=8)
    values = [_y(row, plot) for row in rows]
    if plot.better == "down" and min(values) >= 0 and max(values) > 0:
        # Types lie decades apart, and F16 at 0.
        axes.set_yscale("symlog", linthresh=min(value for value in values if value > 0))
        axes.set_ylim(bottom=0)
    _label(axes, plot, [*front, *(row for row in rows if row not in front)])


def _label(axes: Any, plot: Plot, rows: list[Row]) -> None:
    """The rows' names, the first ones first, where there is room; the table has them all."""
    axes.figure.draw_without_rendering()  # only then is it settled where points lie
    pixels = axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for row in rows:
        x, y = axes.transData.transform((plot.x(row), _y(row, plot)))
        if any(abs(x - other_x) < 75 * pixels and abs(y - other_y) < 9 * pixels for other_x, other_y in taken):
            continue
        taken.append((x, y))
        at = (plot.x(row), _y(row, plot))
        axes.annotate(row.label, at, xytext=(5, 4), textcoords="offset points", fontsize=8)


def _tower(row: Row) -> str:
    """The type of what the row's pictures were read with."""
    return row.type_of("vision_onnx" if row.vision_backend == "onnx" else "mmproj")


def _y(row: Row, plot: Plot) -> float:
    return row.metrics[plot.y].value


def _ends(metric: Metric) -> tuple[float, float]:
    return metric.interval or (metric.value, metric.value)
