"""One page of HTML that needs nothing else: opened from a disk, without a network, on a phone too."""

from __future__ import annotations

import base64
from importlib import resources

import jinja2

from llava_edge.bench.record import Result
from llava_edge.bench.report import table, text
from llava_edge.bench.report.plots import draw, plots_of


def page(result: Result, title: str) -> str:
    """The whole result. Everything in it is escaped; the page may load nothing and run nothing."""
    template = resources.files("llava_edge.bench.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    used = table.columns(result)
    picked = {rec.label for rec in result.recommendations}
    return environment.from_string(template).render(
        title=title,
        recommendations=result.recommendations,
        columns=used,
        rows=[(row.label in picked, [column.cell(row) for column in used]) for row in result.rows],
        plots=[(plot.title, _inline(draw(plot, result, "svg"))) for plot in plots_of(result)],
        legend=text.legend(result),
        warnings=result.warnings,
        circumstances=text.circumstances(result),
    )


def _inline(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
