"""Finished runs as a table in Markdown, and its place in a document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_edge.bench.tasks.run import JUDGED, SUMMARY, Run
from llava_edge.bench.tasks.samples import write_text
from llava_edge.errors import InputError

BEGIN, END = "<!-- results: written by `llava-edge eval report` -->", "<!-- end of results -->"
_SHOWN = {
    "captions": ("cider_d", "bleu_4", "rouge_l"),
    "pope": ("mean_f1", "accuracy", "precision", "recall", "yes_ratio"),
    "chair": ("chair_s", "chair_i", "recall", "words"),
    "mme": ("perception", "cognition"),
}


def markdown_table(runs: Sequence[Run]) -> str:
    """A row a task's metric, a column a model; every value with its 95 % interval."""
    summaries = [_summary(run) for run in runs]
    models = list(dict.fromkeys(_label(summary) for summary in summaries))
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for summary in summaries:
        task = summary["task"]
        for name in _SHOWN.get(task, (summary["headline"],)):
            metric = summary["metrics"].get(name)
            row = cells.setdefault((task, name, summary["asked"]), {})
            if _label(summary) in row:
                raise InputError(f"two runs of {task} are on {_label(summary)}", hint="Leave one of them out.")
            if metric is not None:
                row[_label(summary)] = _cell(metric)
    lines = [
        "| task | samples | metric | " + " | ".join(models) + " |",
        "|---|---|---|" + "---|" * len(models),
    ]
    for (task, name, asked), row in cells.items():
        lines.append(f"| {task} | {asked} | {name} | " + " | ".join(row.get(model, "-") for model in models) + " |")
    return "\n".join(lines) + "\n"


def write_into(document: Path, table: str) -> None:
    """Put the table between the document's two marks."""
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't read {document}: {error.strerror}") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{document} has no place for results", hint=f"Put these two lines in: {BEGIN} and {END}")
    write_text(document, f"{before}{BEGIN}\n\n{table}\n{END}{after}")


def _summary(run: Run) -> dict[str, Any]:
    judged = run.folder / JUDGED
    path = judged if run.settings["task"] == "llava-bench" and judged.is_file() else run.folder / SUMMARY
    if not path.is_file():
        raise InputError(f"{run.folder} is not finished", hint="Run it again with --resume.")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _label(summary: dict[str, Any]) -> str:
    model = summary["model"]
    types = model.get("types", {})
    parts = [model["name"], types.get("llm", "")]
    text = " ".join(part for part in parts if part)
    return f"{text}, {model['image_tokens']} tokens" if model.get("image_tokens") else text


def _cell(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "-"
    digits = 1 if abs(metric["value"]) >= 10 else 3
    interval = "" if metric["low"] is None else f" ({metric['low']:.{digits}f} to {metric['high']:.{digits}f})"
    return f"{metric['value']:.{digits}f}{interval}"
