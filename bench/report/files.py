"""A report as files beside each other."""

from __future__ import annotations

from pathlib import Path

from llava_edge.bench.record import Result, write_atomically
from llava_edge.bench.report import table, text
from llava_edge.bench.report.html import page
from llava_edge.bench.report.plots import draw, plots_of
from llava_edge.errors import InputError


def write_report(result: Result, folder: Path, title: str) -> list[Path]:
    """Write ``report.json``, ``.csv``, ``.md``, ``.html`` and the plots; the paths of what was written."""
    plots = {f"{plot.name}.png": draw(plot, result, "png") for plot in plots_of(result)}
    contents: dict[str, str | bytes] = {
        **plots,
        "report.json": result.to_json(),
        "report.csv": table.as_csv(result),
        "report.md": text.report(result, title, tuple(plots)),
        "report.html": page(result, title),
    }
    try:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    except OSError as error:
        hint = "Make room; the same command draws the report again."
        raise InputError(f"can't write the report to {folder}: {error.strerror}", hint=hint) from None
    return [folder / name for name in contents]
