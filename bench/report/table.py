"""A result as columns, which become Markdown, CSV and HTML. Rounding happens here and nowhere else."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_edge.bench.record import Metric, Result, Row


@dataclass(frozen=True)
class Column:
    """A title and how a row's cell reads; ``numeric`` cells stand on the right."""

    title: str
    cell: Callable[[Row], str]
    numeric: bool = True


# metric, title, in which unit and with how many digits it is shown
QUALITY = (
    ("kl_mean", "KL mean", 1.0, "{:.4f}"),
    ("kl_median", "KL median", 1.0, "{:.4f}"),
    ("kl_p99", "KL p99", 1.0, "{:.3f}"),
    ("top1_agreement", "same top token %", 100.0, "{:.1f}"),
    ("perplexity", "perplexity", 1.0, "{:.3f}"),
    ("perplexity_ratio", "ratio to reference", 1.0, "{:.4f}"),
    ("same_text", "same answer %", 100.0, "{:.0f}"),
    ("cider_d", "CIDEr-D", 1.0, "{:.3f}"),
    ("accuracy", "accuracy %", 100.0, "{:.1f}"),
)
SPEED = (
    ("ttft_cold", "TTFT cold s", 1.0, "{:.2f}"),
    ("ttft_warm", "TTFT warm s", 1.0, "{:.3f}"),
    ("ttft_warm_p95", "p95 s", 1.0, "{:.3f}"),
    ("load", "load s", 1.0, "{:.2f}"),
    ("encode", "encode s", 1.0, "{:.3f}"),
    ("peak_memory", "memory MB", 1e-6, "{:.0f}"),
)


def columns(result: Result) -> list[Column]:
    """The columns that at least one row fills."""
    found = [Column("model", lambda row: row.label, numeric=False), Column("size MB", lambda r: f"{r.bytes / 1e6:.1f}")]
    names = list(dict.fromkeys(name for row in result.rows for name in row.metrics))
    if any(row.vision_backend for row in result.rows):
        found.append(Column("pictures read by", lambda row: row.vision_backend, numeric=False))
    found += [_metric(*entry) for entry in QUALITY if entry[0] in names]
    found += [_metric(name, name, 1.0, "{:.3f}") for name in task_names(result)]
    found += [_metric(*entry) for entry in SPEED if entry[0] in names]
    for name in names:
        if re.fullmatch(r"pp\d+|tg\d+@\d+", name):
            found.append(_metric(name, f"{name} t/s", 1.0, "{:.1f}"))
    for name in names:
        if name.endswith(("_mfu", "_mbu")):
            what, share = name.rsplit("_", 1)
            found.append(_metric(name, f"{share.upper()} {what} %", 100.0, "{:.0f}"))
        elif name.endswith("_energy"):
            found.append(_metric(name, f"{name.removesuffix('_energy')} J/token", 1.0, "{:.2f}"))
    if result.kind == "quants":
        found.append(Column("LLM tensors", tensor_mix, numeric=False))
    return found


def task_names(result: Result) -> list[str]:
    """The metrics that are scores of a task, such as ``easy-vqa accuracy``."""
    return list(
        dict.fromkeys(name for row in result.rows for name, metric in row.metrics.items() if metric.unit == "score")
    )


def tensor_mix(row: Row) -> str:
    """The real types of the language model's quantised tensors: ``Q5_0 167, Q6_K 14``."""
    counts = next((file.tensors for file in row.files if file.role == "llm"), {})
    ordered = sorted(((n, kind) for kind, n in counts.items() if kind != "F32"), reverse=True)
    return ", ".join(f"{kind} {n}" for n, kind in ordered)


def markdown(result: Result) -> str:
    """The table in GitHub's Markdown, aligned so that it reads well in a terminal too."""
    used = columns(result)
    cells = [[column.title for column in used], *([column.cell(row) for column in used] for row in result.rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(used))]
    lines = [_line(line, widths, used) for line in cells]
    rule = (
        "|" + "|".join(f"{'-' * (w + 1)}{':' if c.numeric else '-'}" for w, c in zip(widths, used, strict=True)) + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def as_csv(result: Result) -> str:
    """Every metric of every row with its full precision, one line a row."""
    names = list(dict.fromkeys(name for row in result.rows for name in row.metrics))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    sides = [part for name in names for part in (name, f"{name}_low", f"{name}_high")]
    writer.writerow(["label", "llm_type", "vision_backend", "vision_type", "bytes", *sides])
    for row in result.rows:
        values = [value for name in names for value in _triple(row.metrics.get(name))]
        vision = row.type_of("vision_onnx" if row.vision_backend == "onnx" else "mmproj")
        writer.writerow([row.label, row.type_of("llm"), row.vision_backend, vision, row.bytes, *values])
    return out.getvalue()


def _triple(metric: Metric | None) -> tuple[object, object, object]:
    if metric is None:
        return "", "", ""
    low, high = metric.interval or ("", "")
    return metric.value, low, high


def _metric(name: str, title: str, scale: float, digits: str) -> Column:
    def cell(row: Row) -> str:
        metric = row.metrics.get(name)
        if metric is None:
            return ""
        text = digits.format(metric.value * scale)
        if metric.interval is None:
            return text
        return f"{text} ±{digits.format((metric.interval[1] - metric.interval[0]) / 2 * scale)}"

    return Column(title, cell)


def _line(cells: Sequence[str], widths: Sequence[int], used: Sequence[Column]) -> str:
    padded = [
        f" {cell:>{width}} " if column.numeric else f" {cell:<{width}} "
        for cell, width, column in zip(cells, widths, used, strict=True)
    ]
    return "|" + "|".join(padded) + "|"
